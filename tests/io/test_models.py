"""Every form of model address, and what each says when it cannot be opened."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Batches, Bounds, Classifier
from holdfast.io.models.adapting import digest_of_object
from holdfast.io.models.models import Declared, bundled_models, open_model

CODE = """
from pathlib import Path
import torch
from torch import nn

def net(width: int = 3, scale: float = 1.0, deep: bool = False, note: str = "", path: Path | None = None):
    layers = [nn.Flatten(), nn.Linear(4, width)] + [nn.ReLU(), nn.Linear(width, width)] * deep
    made = nn.Sequential(*layers).eval()
    with torch.no_grad():
        made[1].weight.fill_(scale)
        made[1].bias.zero_()
    made.note, made.path = note, path
    return made

def needy(path, mode): return nn.Linear(1, 1)
def adds(width): return nn.Linear(width + 1, 1)
def raises(): raise ValueError("the weights are on another planet")
def exits(): raise SystemExit("bye")
def a_class(): return nn.Linear
def a_factory(): return number
def silent(): assert False
async def waits(): return 7
def model(x): return x
def number(): return 7
def lazy(): return nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
def odd(sizes: list[int]): return nn.Linear(1, 1)
constant = 5
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(CODE)
    return path


def test_lazy_layers_of_a_factory_are_refused_with_weights_and_without(code: Path, tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    safetensors.torch.save_file({"1.weight": torch.ones(3, 4), "1.bias": torch.ones(3)}, weights)
    for address, arch in ((f"{code}:lazy", None), (str(weights), f"{code}:lazy")):
        with pytest.raises(
            TargetError, match="weight is UninitializedParameter: .*; call the network on a batch"
        ):
            open_model(address, arch=arch)


def test_a_factory_gets_its_arguments_as_it_annotates_them(code: Path, tmp_path: Path) -> None:
    data = tmp_path / "w.bin"
    data.write_bytes(b"x")
    arguments = {"width": "5", "scale": "0.5", "deep": "yes", "note": "7", "path": str(data)}
    opened = open_model(
        f"{code}:net", model_args=arguments, declared=Declared(Bounds(-1, 1), [0.5], [0.5], 5)
    )
    net = opened.model.net
    assert isinstance(net, nn.Sequential)
    assert net.note == "7" and net.path == data and len(net) == 4
    assert (opened.how, opened.access, opened.model.bounds) == ("code", "gradients", Bounds(-1, 1))
    assert set(opened.files) == {str(code), str(data), f"{code}:net state"}
    x = torch.rand(2, 1, 2, 2)
    torch.testing.assert_close(opened.model(x), net((x - 0.5) / 0.5))


def test_the_digest_follows_code_weights_and_named_files(code: Path) -> None:
    first = open_model(f"{code}:net").digest
    assert open_model(f"{code}:net").digest == first
    assert open_model(f"{code}:net", model_args={"scale": "2"}).digest != first
    code.write_text(CODE + "\n# another comment\n")
    assert open_model(f"{code}:net").digest != first


@pytest.mark.parametrize(
    "factory, arguments, error, message",
    [
        ("nett", {}, UsageError, r"no factory 'nett' \(did you mean 'net'"),
        ("zzz", {}, UsageError, "it defines net, needy"),
        ("constant", {}, UsageError, "an int; a network or a function"),
        ("net", {"widht": "3"}, UsageError, r"no argument 'widht' \(did you mean 'width'"),
        ("net", {"width": "3.5"}, UsageError, "argument width of .* is '3.5'; an int was expected"),
        ("net", {"scale": "big"}, UsageError, "argument scale of .*; a float was expected"),
        ("net", {"deep": "maybe"}, UsageError, "argument deep of .* is 'maybe'; true or false was expected"),
        ("odd", {"sizes": "1"}, UsageError, "str, int, float, bool or Path"),
        ("needy", {"mode": "a"}, UsageError, "model_args={'path': VALUE}"),
        (
            "adds",
            {"width": "3"},
            TargetError,
            r"raised TypeError in line .*: .* \(width was passed as text; annotate it as int",
        ),
        (
            "raises",
            {},
            TargetError,
            r"raised ValueError in line \d+ of own.py: the weights are on another planet",
        ),
        ("exits", {}, TargetError, r"raised SystemExit in line \d+ of own.py: bye"),
        ("number", {}, TargetError, "returned an int; a torch.nn.Module or a function"),
        ("a_factory", {}, TargetError, "returned a function that accepts no inputs; a torch.nn.Module"),
        ("silent", {}, TargetError, r"raised AssertionError in line \d+ of own.py$"),
        ("waits", {}, TargetError, "returned a coroutine; a torch.nn.Module"),
        (
            "model",
            {},
            UsageError,
            r"needs x\. If model is the model itself, .*: def make\(\): return model",
        ),
        ("a_class", {}, TargetError, "returned the class Linear; a torch.nn.Module or a function"),
    ],
)
def test_errors_of_a_factory_are_explained(
    code: Path, factory: str, arguments: dict[str, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        open_model(f"{code}:{factory}", model_args=arguments)


@pytest.mark.slow
def test_a_network_or_a_function_will_do(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(
        "import torch\nready = torch.nn.Linear(4, 3)\n"
        "def doubled(k: float = 2):\n    return lambda x: torch.stack((x[:, 0], k * x[:, 1]), 1)\n"
    )
    x = torch.rand(2, 4)
    ready = open_model(f"{path}:ready").model
    torch.testing.assert_close(ready(x), ready.net(x))
    opened = open_model(f"{path}:doubled", model_args={"k": "3"})
    torch.testing.assert_close(opened.model(x), torch.stack((x[:, 0], 3 * x[:, 1]), 1))
    assert opened.digest == open_model(f"{path}:doubled", model_args={"k": "3"}).digest
    assert opened.digest != open_model(f"{path}:doubled").digest
    torch.save({"w": x}, tmp_path / "w.pt")
    with pytest.raises(TargetError, match="returned a function, which has no weights to load"):
        open_model(str(tmp_path / "w.pt"), arch=f"{path}:doubled")


def test_the_digest_of_a_function_does_not_depend_on_the_place_of_its_file(tmp_path: Path) -> None:
    code = (
        "import torch\nclass Net:\n    def __init__(self, k): self.k = k\n"
        "    def __call__(self, x): return self.k * x\n"
        "def own(): return Net(2.0)\ndef closure():\n    net = Net(2.0)\n    return lambda x: net(x)\n"
    )
    digests = set()
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "own.py").write_text(code)
        names = ("own", "closure")
        digests.add(
            tuple(digest_of_object(open_model(f"{tmp_path}/{folder}/own.py:{n}").model.net) for n in names)
        )
    assert len(digests) == 1


def test_a_line_that_is_no_python_is_named(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("import torch\n\ndef net(:\n")
    with pytest.raises(TargetError, match="raised SyntaxError in line 3 of own.py: invalid syntax"):
        open_model(f"{tmp_path / 'own.py'}:net")


def test_an_error_in_a_neighbour_is_placed_there(tmp_path: Path) -> None:
    (tmp_path / "neighbour_that_fails.py").write_text("def fail():\n    raise ValueError('no weights')\n")
    (tmp_path / "own.py").write_text("import neighbour_that_fails\ndef net(): neighbour_that_fails.fail()\n")
    with pytest.raises(TargetError, match="in line 2 of neighbour_that_fails.py: no weights"):
        open_model(f"{tmp_path / 'own.py'}:net")


def test_code_that_does_not_import_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("import a_module_that_is_not_there\n")
    with pytest.raises(TargetError, match="in line 1 of bad.py: .*a_module_that_is_not_there"):
        open_model(f"{tmp_path / 'bad.py'}:net")
    with pytest.raises(TargetError, match=r"does not exist \(did you mean '.*bad.py'"):
        open_model(f"{tmp_path / 'bda.py'}:net")


def test_code_imports_its_neighbours_without_touching_the_path(tmp_path: Path) -> None:
    import sys

    (tmp_path / "neighbour_of_own.py").write_text("WIDTH = 6\n")
    (tmp_path / "own.py").write_text(
        "from torch import nn\nfrom neighbour_of_own import WIDTH\ndef net(): return nn.Linear(WIDTH, 2)\n"
    )
    before = list(sys.path)
    assert open_model(f"{tmp_path / 'own.py'}:net").model.net.in_features == 6
    assert sys.path == before


def test_a_state_dict_needs_an_architecture_that_fits(code: Path, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    address = str(tmp_path / "w.safetensors")
    safetensors.torch.save_file(net.state_dict(), address)
    x = torch.rand(2, 1, 2, 2)
    opened = open_model(address, arch=f"{code}:net")
    torch.testing.assert_close(opened.model(x), net(x))
    assert not opened.model.net.training
    with pytest.raises(TargetError, match=r"1\.weight is \(3, 4\), expected \(5, 4\)"):
        open_model(address, arch=f"{code}:net", model_args={"width": "5"})
    with pytest.raises(
        TargetError,
        match=r"missing 3\.weight, 3\.bias\. Check the architecture and its arguments .*rename the keys",
    ):
        open_model(address, arch=f"{code}:net", model_args={"deep": "1"})
    with pytest.raises(UsageError, match="no architecture.*give arch="):
        open_model(address)
    with pytest.raises(UsageError, match="there is no architecture 'nothing-of-the-kind'"):
        open_model(address, arch="nothing-of-the-kind")


def test_wrapped_names_are_unwrapped_and_noted(code: Path, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    wrapped = {f"module._orig_mod.{name}": value for name, value in net.state_dict().items()}
    safetensors.torch.save_file(wrapped, tmp_path / "w.safetensors")
    opened = open_model(str(tmp_path / "w.safetensors"), arch=f"{code}:net")
    x = torch.rand(2, 1, 2, 2)
    torch.testing.assert_close(opened.model(x), net(x))
    assert opened.notes == (
        "the prefix 'module.' was removed from every name",
        "the prefix '_orig_mod.' was removed from every name",
    )


def test_weights_that_are_not_numbers_are_refused(code: Path, tmp_path: Path) -> None:
    state = {"1.weight": torch.full((3, 4), float("nan")), "1.bias": torch.zeros(3)}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(TargetError, match=r"NaN or infinity in 1\.weight"):
        open_model(str(tmp_path / "w.safetensors"), arch=f"{code}:net")
    # too large for the 32 bits of the network
    torch.save(state | {"1.weight": torch.full((3, 4), 1e300, dtype=torch.float64)}, tmp_path / "w.pt")
    with pytest.raises(TargetError, match=r"NaN or infinity in 1\.weight"):
        open_model(str(tmp_path / "w.pt"), arch=f"{code}:net")
    torch.save(state | {"1.weight": torch.zeros(3, 4, dtype=torch.complex64)}, tmp_path / "w.pt")
    with pytest.raises(TargetError, match=r"1\.weight is torch\.complex64, expected torch\.float32"):
        open_model(str(tmp_path / "w.pt"), arch=f"{code}:net")


def test_damaged_safetensors_are_named(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(TargetError, match="not a valid safetensors file"):
        open_model(str(tmp_path / "w.safetensors"))
    safetensors.torch.save_file(
        {"a": torch.ones(1)}, tmp_path / "m.safetensors", {"holdfast": json.dumps([1])}
    )
    with pytest.raises(TargetError, match="a JSON object was expected"):
        open_model(str(tmp_path / "m.safetensors"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architecture", ["mlp"]),
        ("bounds", ["a", "b"]),
        ("bounds", [1, 0]),
        ("bounds", [False, True]),
        ("mean", [10**400]),
        ("std", [float("nan")]),
        ("classes", 1_000_001),
        ("class_names", [1, 2]),
        ("output", "logits"),
        ("layout", {}),
    ],
)
def test_the_description_of_a_network_in_a_file_has_one_form(tmp_path: Path, key: str, value: object) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({"a": torch.ones(1)}, path, {"holdfast": json.dumps({key: value})})
    with pytest.raises(
        TargetError, match=rf"metadata of .*, {key} is .*; .* was expected\. Write the file again"
    ):
        open_model(str(path))


@pytest.mark.parametrize(
    "address, message",
    [
        ("https://host/v2/models/m", "allow_hosts=.*host"),
        ("hf:owner/name", "is the address of a model hub"),
        ("timm:resnet18", "is the address of a model hub"),
        ("rotating:pool", "which can only be the model of an assessment"),
        ("mnist-cn", "no bundled model 'mnist-cn'"),
    ],
)
def test_a_model_that_cannot_be_opened_is_refused_by_name(address: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_model(address)


def test_a_missing_file_is_a_target_error_even_where_a_flag_is_missing_too(tmp_path: Path) -> None:
    for name in ("w.pt", "w.safetensors", "m.onnx", "m.pt2", "nowhere/net.bin", "folder/model"):
        with pytest.raises(TargetError, match="does not exist"):
            open_model(str(tmp_path / name))


def test_bundled_models_open_by_name() -> None:
    bundled = bundled_models()
    if not bundled:
        pytest.skip("no model is bundled with this checkout")
    for name, path in bundled.items():
        opened = open_model(name)
        assert opened.how == "bundled"
        assert opened.digest == open_model(str(path)).digest
        if name not in {"scenes-detector", "scenes-unet"}:  # of other outputs
            assert opened.model(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    with pytest.raises(UsageError, match=f"did you mean '{name}'"):
        open_model(name[:-1])


@pytest.mark.slow
def test_real_models_open_by_factory_and_by_weights(models_folder: Path) -> None:
    file = models_folder / "mnist_trades_smallcnn.pt"
    code = models_folder / "architectures.py"
    by_factory = open_model(f"{code}:mnist_trades_smallcnn", model_args={"path": str(file)})
    by_weights = open_model(str(file), arch=f"{code}:SmallCNN")
    x = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(by_factory.model(x), by_weights.model(x))
    with pytest.raises(TargetError, match="do not fit SmallCNN: missing"):
        open_model(str(models_folder / "mnist_badnet.pth"), arch=f"{code}:SmallCNN")


def test_a_classifier_keeps_what_it_declares() -> None:
    own = Classifier(nn.Flatten(), bounds=Bounds(-1, 1), mean=[0.5], batches=Batches(7))
    wrapped = Declared(classes=3).wrap(own)
    assert (wrapped.bounds, wrapped.batches, wrapped.classes) == (Bounds(-1, 1), Batches(7), 3)
    assert wrapped.mean is not None
    assert wrapped.mean.tolist() == [0.5]
