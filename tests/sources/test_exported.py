"""Programs of torch.export: opened where they are tensors and known operators, else only with trust."""

import copy
import json
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from holdfast.core.errors import TargetError, UsageError
from holdfast.sources.models import open_model


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(8, 3)
    ).eval()


class Sized(nn.Module):
    """Counts on the batch that it was exported with."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(4, -1)[:, :3] * 2


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, x = tmp_path_factory.mktemp("programs"), torch.rand(4, 1, 4, 4)
    torch.export.save(torch.export.export(network(), (x,)), folder / "fixed.pt2")
    torch.export.save(torch.export.export(Sized(), (x,)), folder / "sized.pt2")
    anyhow = torch.export.export(network(), (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(anyhow, folder / "dynamic.pt2")
    return folder


def rewritten(source: Path, target: Path, change: dict[str, str]) -> Path:
    """The archive with texts of its graph replaced."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for member in old.infolist():
            content = old.read(member)
            if member.filename.endswith("models/model.json"):
                for before, after in change.items():
                    assert before.encode() in content
                    content = content.replace(before.encode(), after.encode())
            new.writestr(member.filename, content)
    return target


@pytest.mark.parametrize("name", ["fixed", "dynamic", "sized"])
@pytest.mark.parametrize("n", [1, 3, 4, 9])
def test_any_batch_size_gives_the_networks_outputs_and_gradients(programs: Path, name: str, n: int) -> None:
    opened = open_model(str(programs / f"{name}.pt2"))
    x = torch.rand(n, 1, 4, 4, requires_grad=True)
    original = (lambda x: x.flatten(1)[:, :3] * 2) if name == "sized" else network()
    torch.testing.assert_close(opened.model(x), original(x))
    ours, theirs = (torch.autograd.grad(net(x).square().sum(), x)[0] for net in (opened.model, original))
    torch.testing.assert_close(ours, theirs)
    assert opened.notes == (
        ("the program takes batches of 4 only; others are cut and filled up",) if name == "sized" else ()
    )
    assert not any(module.training for module in copy.deepcopy(opened.model.eval()).modules())
    assert opened.access == "gradients"


def test_programs_that_carry_code_need_trust(programs: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    evil = json.dumps(f"__import__('pathlib').Path({str(marker)!r}).touch()")[1:-1]
    expression = rewritten(
        programs / "dynamic.pt2", tmp_path / "expression.pt2", {"Symbol('s": f"{evil} or Symbol('s"}
    )
    operator = rewritten(
        programs / "fixed.pt2",
        tmp_path / "operator.pt2",
        {"torch.ops.aten.relu.default": "torch.serialization.os.system"},
    )
    for path, what in (
        (expression, "the expression"),
        (operator, r"the operator 'torch\.serialization\.os\.system'"),
    ):
        with pytest.raises(UsageError, match=f"{what}.*--trust-code"):
            open_model(str(path))
    assert not marker.exists()


def test_a_pickled_member_needs_trust(programs: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled.pt2"
    with zipfile.ZipFile(programs / "fixed.pt2") as old, zipfile.ZipFile(pickled, "w") as new:
        for member in old.infolist():
            inputs = "sample_inputs" in member.filename
            new.writestr(member.filename, _whole_module(tmp_path) if inputs else old.read(member))
    with pytest.raises(UsageError, match=r"the pickle data/sample_inputs/model\.pt"):
        open_model(str(pickled))


def _whole_module(folder: Path) -> bytes:
    torch.save(nn.Linear(1, 1), folder / "module.pt")
    return (folder / "module.pt").read_bytes()


def test_damage_and_foreign_archives_are_named(programs: Path, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "weights.pt2")
    with pytest.raises(TargetError, match=r"no program of torch\.export\.save"):
        open_model(str(tmp_path / "weights.pt2"))
    (tmp_path / "cut.pt2").write_bytes((programs / "fixed.pt2").read_bytes()[:3000])
    with pytest.raises(TargetError, match="truncated"):
        open_model(str(tmp_path / "cut.pt2"))
    with zipfile.ZipFile(tmp_path / "squeezed.pt2", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/models/model.json", "{}" * 1000)
    with pytest.raises(TargetError, match="compressed"):
        open_model(str(tmp_path / "squeezed.pt2"))
