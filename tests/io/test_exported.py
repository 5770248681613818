"""Programs of torch.export: opened where they are tensors and known operators, else only with trust."""

import copy
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._export.serde.schema import SCHEMA_VERSION
from torch._export.serde.serialize import serialize

from holdfast.core.errors import TargetError, UsageError
from holdfast.io.models.exported import FREE_BATCH, is_operator_of_networks, replace_unchecked
from holdfast.io.models.models import open_model

pytestmark = pytest.mark.usefixtures("in_this_process")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(8, 3)
    ).eval()


class Sized(nn.Module):
    """Needs the batch size with which it was exported."""

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
    assert opened.notes == ()
    assert not any(module.training for module in copy.deepcopy(opened.model.eval()).modules())
    assert opened.access == "gradients"


def test_a_large_batch_is_not_enlarged_to_try_other_sizes(programs: Path, tmp_path: Path, set_limit) -> None:
    set_limit("holdfast.io.models.exported._MOST_TRIED", 4 * 16)
    assert open_model(str(programs / "fixed.pt2")).notes == ()
    set_limit("holdfast.io.models.exported._MOST_TRIED", 4 * 16 - 1)
    opened = open_model(str(programs / "fixed.pt2"))
    assert "accepts only batches of 4 examples" in opened.notes[0]
    # the export that the note names
    dynamic = torch.export.export(
        network(), (torch.rand(4, 1, 4, 4),), dynamic_shapes=({0: torch.export.Dim("n")},)
    )
    assert FREE_BATCH in opened.notes[0] and "dynamic_shapes=({0: torch.export.Dim('n')},)" in FREE_BATCH
    torch.export.save(dynamic, tmp_path / "dynamic.pt2")
    assert open_model(str(tmp_path / "dynamic.pt2")).notes == ()
    x = torch.rand(6, 1, 4, 4)
    torch.testing.assert_close(opened.model(x), network()(x))


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
        with pytest.raises(UsageError, match=f"{what}.*trust_code=True"):
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


def packed(source: Path, target: Path, edit: Callable[[str, bytes], bytes], **more: bytes) -> Path:
    """The archive with its members edited, and some added at the top level or in a folder."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for member in old.infolist():
            new.writestr(member.filename, edit(member.filename, old.read(member)))
        for name, content in more.items():
            new.writestr(name, content)
    return target


class Touching:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_program_of_the_older_format_beside_the_new_one_runs_nothing(
    programs: Path, tmp_path: Path
) -> None:
    marker, pickled = tmp_path / "ran", io.BytesIO()
    torch.save(Touching(marker), pickled)
    exported = torch.export.export(network(), (torch.rand(4, 1, 4, 4),))
    artifact = serialize(exported)
    older = {
        "version": ".".join(map(str, SCHEMA_VERSION)).encode(),
        "serialized_exported_program.json": artifact.exported_program,
        "serialized_constants.pt": artifact.constants,
        "serialized_example_inputs.pt": pickled.getvalue(),
        "serialized_state_dict.pt": pickled.getvalue(),
    }
    path = packed(programs / "fixed.pt2", tmp_path / "both.pt2", lambda _, content: content, **older)
    for trust_code in (False, True):
        with pytest.raises(TargetError, match="do not all lie in one folder"):
            open_model(str(path), trust_code=trust_code)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("top", "do not all lie in one folder"),
        ("/top", "leads out of the archive"),
        ("other/top", "do not all lie in one folder"),
        ("fixed/Models/model.json", "two of its members have one name"),
        ("fixed/data\\weights", "a name has a backslash"),
        ("fixed/../top", "leads out of the archive"),
        ("fixed/models/other/model.json", "the second program models/other/model.json"),
        ("fixed/models/other.txt", r"the second program models/other\.txt"),
    ],
)
def test_members_that_torch_would_find_elsewhere_are_refused(
    programs: Path, tmp_path: Path, name: str, message: str
) -> None:
    path = packed(programs / "fixed.pt2", tmp_path / "more.pt2", lambda _, content: content, **{name: b"{}"})
    with pytest.raises((TargetError, UsageError), match=message):
        open_model(str(path))


def test_a_second_directory_of_the_archive_is_refused(programs: Path, tmp_path: Path) -> None:
    """Readers of zip differ in which directory they take; what is judged must be what is loaded."""
    benign, path = (programs / "fixed.pt2").read_bytes(), tmp_path / "two.pt2"
    path.write_bytes((programs / "dynamic.pt2").read_bytes() + benign)
    with pytest.raises(TargetError):
        open_model(str(path))


def test_names_that_would_be_written_into_source_code_need_trust(programs: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    evil = json.dumps(f"""x" if open({str(marker)!r}, 'w') else "weight""").encode()
    for name in (b"0.weight", b"p_0_weight", b"input"):

        def edit(file: str, content: bytes, name: bytes = name) -> bytes:
            return content.replace(b'"%s"' % name, evil) if file.endswith(".json") else content

        path = packed(programs / "fixed.pt2", tmp_path / "name.pt2", edit)
        with pytest.raises(UsageError, match=r"the name .*trust_code=True"):
            open_model(str(path))
    assert not marker.exists()


def test_an_opaque_constant_needs_trust(programs: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    payload = pickle.dumps(Touching(marker))

    def edit(name: str, content: bytes) -> bytes:
        if not name.endswith("model_constants_config.json"):
            return content
        meta = {"dtype": 1, "sizes": [{"as_int": len(payload)}], "requires_grad": False}
        meta |= {"device": {"type": "cpu", "index": None}, "strides": [{"as_int": 1}]}
        meta |= {"storage_offset": {"as_int": 0}, "layout": 7}
        how = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": False, "tensor_meta": meta}
        return json.dumps({"config": {"c": how}}).encode()

    member = {"fixed/data/constants/opaque_obj_0": payload}
    path = packed(programs / "fixed.pt2", tmp_path / "opaque.pt2", edit, **member)
    with pytest.raises(UsageError, match="the pickled tensor 'c'"):
        open_model(str(path))
    assert not marker.exists()


def test_a_container_that_names_a_module_needs_trust(programs: Path, tmp_path: Path) -> None:
    context = json.dumps([{"__enum__": True, "fqn": "antigravity:X", "name": "a"}])

    def edit(name: str, content: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return content
        graph = json.loads(content)
        spec = [1, {"type": "builtins.dict", "context": context, "children_spec": []}]
        graph["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = json.dumps(spec)
        return json.dumps(graph).encode()

    with pytest.raises(UsageError, match="the container"):
        open_model(str(packed(programs / "fixed.pt2", tmp_path / "enum.pt2", edit)))


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


class Reaching(nn.Module):
    """Calls an operator that reaches outside of its tensors."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        place, value = torch.tensor([[2]]), torch.ones(1)
        return x.flatten(1) + torch.ops.aten._sparse_coo_tensor_unsafe.default(place, value, [16]).to_dense()


def test_only_operators_that_networks_need_are_called_without_trust(programs: Path, tmp_path: Path) -> None:
    torch.export.save(torch.export.export(Reaching(), (torch.rand(4, 1, 4, 4),)), tmp_path / "reaching.pt2")
    said = r"the operator 'torch\.ops\.aten\.\w+_unsafe.*ONNX.*file\.py:factory.*trust_code=True"
    with pytest.raises(UsageError, match=said):
        open_model(str(tmp_path / "reaching.pt2"))
    for name in (
        "set_.source_Storage",
        "as_strided.default",
        "from_file.default",
        "relu.out",
        "relu",
        "lstm.data",
    ):
        assert not is_operator_of_networks(f"torch.ops.aten.{name}"), name
    for name in ("relu.default", "relu_.default", "add.Tensor", "lstm.input", "conv2d.padding"):
        assert is_operator_of_networks(f"torch.ops.aten.{name}"), name


def test_weights_of_another_size_than_the_input_needs_are_refused_by_every_operator() -> None:
    aten, x = torch.ops.aten, torch.rand(2, 3, 40)
    short, states = torch.ones(1), [torch.zeros(1, 2, 50)] * 2
    graph = torch.fx.Graph()
    normed = graph.call_function(
        aten._native_batch_norm_legit_no_training.default,
        (graph.placeholder("x"), *[graph.placeholder(f"w{i}") for i in range(4)], 0.1, 1e-5),
    )
    graph.output(normed)
    replace_unchecked(graph)
    norm = torch.fx.GraphModule({}, graph)
    torch.testing.assert_close(norm(x, *[torch.ones(3)] * 4)[0], (x - 1) / (1 + 1e-5) ** 0.5 + 1)
    with pytest.raises(RuntimeError, match="should contain 3 elements not 1"):
        norm(x, short, short, short, short)
    graph = torch.fx.Graph()
    places = [graph.placeholder(f"w{i}") for i in range(7)]
    arguments = (places[0], places[1:3], places[3:], True, 1, 0.0, False, False, True)
    graph.output(graph.call_function(aten.lstm.input, arguments))
    replace_unchecked(graph)
    lstm, weights = (
        torch.fx.GraphModule({}, graph),
        [torch.rand(200, 40), torch.rand(200, 50), *[torch.rand(200)] * 2],
    )
    assert lstm(x, *states, *weights)[0].shape == (2, 3, 50)
    with pytest.raises(RuntimeError):
        lstm(x, *states, torch.rand(20, 40), *weights[1:])


def test_attention_in_a_program_for_one_example_is_mapped_without_warnings(tmp_path: Path, capfd) -> None:
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True).eval()
    net = nn.Sequential(net, nn.Flatten(), nn.Linear(32, 3)).eval()
    torch.export.save(torch.export.export(net, (torch.rand(1, 4, 8),)), tmp_path / "m.pt2")
    capfd.readouterr()
    opened = open_model(str(tmp_path / "m.pt2"))
    x = torch.rand(5, 4, 8, requires_grad=True)
    ours, theirs = opened.model(x), net(x)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(logits.square().sum(), x)[0] for logits in (ours, theirs)]
    torch.testing.assert_close(*gradients)
    assert opened.notes == () and capfd.readouterr().err == ""
