"""Model files that run code: TorchScript, and pickles of whole modules, which open with trust alone."""

import hashlib
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from holdfast.core.errors import TargetError, UsageError
from holdfast.io.models.models import open_model

pytestmark = pytest.mark.usefixtures("in_this_process")
X = torch.rand(3, 64, generator=torch.Generator().manual_seed(0))


def test_a_torchscript_file_opens_with_trust_alone(tmp_path: Path):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; its files are still about
        torch.jit.save(torch.jit.trace(net, torch.rand(1, 64)), tmp_path / "m.ts")
    with pytest.raises(TargetError, match=r"TorchScript .*state_dict\(\).*ONNX.*trust_code=True"):
        open_model(str(tmp_path / "m.ts"))
    opened = open_model(str(tmp_path / "m.ts"), trust_code=True)
    torch.testing.assert_close(opened.model(X), net(X))
    with pytest.raises(
        UsageError, match="contains a whole model, and the architecture mlp is given; leave out arch"
    ):
        open_model(str(tmp_path / "m.ts"), trust_code=True, arch="mlp")


def test_the_pickle_of_a_module_opens_with_trust_alone(tmp_path: Path):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    place = tmp_path / "m.pt"
    for saved in (net, {"epoch": 3, "model": net}):
        torch.save(saved, place)
        with pytest.raises(TargetError, match=r"wants code.*trust_code=True"):
            open_model(str(place))
        opened = open_model(str(place), trust_code=True)
        torch.testing.assert_close(opened.model(X), net(X))


def test_trust_changes_nothing_for_a_state_dict(tmp_path: Path):
    net = nn.Linear(64, 10)
    torch.save(net.state_dict(), tmp_path / "m.pt")
    code = tmp_path / "own.py"
    code.write_text("import torch\ndef make(): return torch.nn.Linear(64, 10)\n")
    opened = open_model(str(tmp_path / "m.pt"), trust_code=True, arch=f"{code}:make")
    assert opened.how == "pt"


def test_a_class_beside_the_pickle_is_found_and_a_missing_one_is_named(tmp_path: Path, monkeypatch):
    code = tmp_path / "beside_it.py"
    code.write_text("import torch\nclass Net(torch.nn.Linear): pass\n")
    with monkeypatch.context() as path:
        path.syspath_prepend(tmp_path)
        import beside_it

        torch.save(beside_it.Net(64, 10), tmp_path / "m.pt")
    monkeypatch.delitem(__import__("sys").modules, "beside_it")
    assert open_model(str(tmp_path / "m.pt"), trust_code=True).how == "pickle"
    monkeypatch.delitem(__import__("sys").modules, "beside_it")
    code.unlink()
    with pytest.raises(
        TargetError, match="needs a class that cannot be imported here: No module named 'beside_it'"
    ):
        open_model(str(tmp_path / "m.pt"), trust_code=True)


def test_what_holds_no_module_is_refused_with_trust_too(tmp_path: Path):
    torch.save([nn.ReLU, 3], tmp_path / "m.pt")
    with pytest.raises(TargetError, match=r"contains a list; a state dict .* or a torch\.nn\.Module"):
        open_model(str(tmp_path / "m.pt"), trust_code=True)


@pytest.mark.parametrize("name", ["m.ts", "m.pt", "m.pt2", "own.py", "weights.pt", "weights.safetensors"])
def test_the_bytes_that_are_checked_are_those_that_run(tmp_path: Path, name: str, monkeypatch):
    """A file that changes after it was read first: what was read first is opened, and has the digest."""
    net, place = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), tmp_path / name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "m.ts":
            torch.jit.save(torch.jit.trace(net, torch.rand(1, 64)), place)
        elif name == "m.pt2":
            torch.export.save(torch.export.export(net, (torch.rand(2, 64),)), place)
        elif name == "m.pt":
            torch.save(net, place)
        elif name == "weights.pt":
            torch.save(net.state_dict(), place)
        elif name == "weights.safetensors":
            safetensors.torch.save_file(net.state_dict(), place)
        else:
            place.write_text("import torch\ndef make(): return torch.nn.Linear(64, 10)\n")
    content, read = place.read_bytes(), Path.read_bytes

    def once(path: Path) -> bytes:
        found = read(path)
        if path == place:
            path.write_bytes(b"no longer what was read")
        return found

    monkeypatch.setattr(Path, "read_bytes", once)
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef make(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    arch = f"{tmp_path / 'net.py'}:make" if name.startswith("weights") else None
    opened = open_model(f"{place}:make" if name == "own.py" else str(place), arch=arch, trust_code=True)
    assert hashlib.sha256(content).hexdigest() in opened.files.values()


class Rated(nn.Module):
    """Needs a sampling rate beside its inputs."""

    def forward(self, x: torch.Tensor, rate: int, state: torch.Tensor) -> torch.Tensor:
        return x[:, :3] * 2 + float(rate) + state[:, None]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TorchScript
def test_a_script_that_needs_further_arguments_is_refused_with_a_function_that_works(
    tmp_path: Path, monkeypatch
):
    place = tmp_path / "m.jit"
    torch.jit.save(torch.jit.script(Rated().eval()), place)
    with pytest.raises(TargetError, match=r"trust_code=True"):
        open_model(str(place))
    with pytest.raises(TargetError, match="is called with x, rate, state; one batch") as caught:
        open_model(str(place), trust_code=True)
    (tmp_path / "scores.py").write_text("\n".join(caught.value.code))
    monkeypatch.chdir(tmp_path)
    torch.testing.assert_close(open_model("scores.py:make").model(X), X[:, :3] * 2)
