"""Small files that ask for much: each reader refuses them at its limit, and says how to raise it."""

import gzip
import io
import json
import os
import warnings
import zipfile
import zlib
from functools import partial
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from fuzzing.encodings import chunks, png
from holdfast.core.errors import HoldfastError, TargetError, UsageError
from holdfast.io.data.data import open_data
from holdfast.io.models.models import open_model
from holdfast.io.models.weights import Weights, check_archive, read_once, refuse_misfit
from holdfast.io.onnx.reading import bytes_beside
from holdfast.io.sandbox.calling import read_under_limits
from holdfast.io.sandbox.sandbox_main import Limits, cpu_seconds
from holdfast.settings.texts import parse_yaml


def table(path: Path, row: bytes, rows: int) -> str:
    path.write_bytes(b"a,label\n" + row * rows)
    return str(path)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="limits of a process are those of POSIX")
def test_a_parser_ends_at_its_limits_and_the_message_names_the_option(tmp_path: Path, monkeypatch, set_limit):
    monkeypatch.setenv("HOLDFAST_READ_SECONDS", "1")
    with pytest.raises(
        TargetError, match=r"more than (1 s of CPU time|5 s) to read .* HOLDFAST_READ_SECONDS=600"
    ):
        open_data(table(tmp_path / "long.csv", b"0.25,1\n", 20_000_000), label="label")
    monkeypatch.delenv("HOLDFAST_READ_SECONDS")
    address = table(tmp_path / "t.csv", b"0.25,1\n", 300_000)
    set_limit("holdfast.io.data.tables.LIMITS", Limits(copies=0, spare_bytes=2**24))
    with pytest.raises(TargetError, match=r"more than the 17 MB that .* HOLDFAST_READ_MEMORY=16GB"):
        open_data(address, label="label", n=5)
    monkeypatch.setenv("HOLDFAST_READ_MEMORY", "2 GB")
    assert len(open_data(address, label="label", n=5)) == 5


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("HOLDFAST_READ_MEMORY", "much"),
        ("HOLDFAST_READ_MEMORY", "16"),
        ("HOLDFAST_READ_SECONDS", "0"),
        ("HOLDFAST_READ_SECONDS", "86401"),
    ],
)
def test_a_limit_that_is_no_number_is_refused_with_an_example(monkeypatch, variable, text):
    monkeypatch.setenv(variable, text)
    with pytest.raises(UsageError, match=f"{variable} is '{text}'; .* was expected, as "):
        Limits(1, 1).memory(1), cpu_seconds()


def test_a_process_that_does_not_start_is_no_fault_of_the_file(tmp_path: Path):
    (tmp_path / "t.csv").write_text("a,label\n0,1\n")
    reading = read_under_limits("absent", tmp_path / "t.csv", Limits(1, 2**30))
    with pytest.raises(HoldfastError, match="did not start: ModuleNotFoundError") as raised, reading:
        pass
    assert raised.value.exit_code == 5


def test_networks_of_other_threads_are_not_counted():
    def make() -> nn.Module:
        other = Thread(target=lambda: [nn.Linear(2, 2) for _ in range(5)])
        other.start()
        other.join()
        return nn.Linear(2, 2)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an exception of a thread is a warning of pytest
        refuse_misfit(make, Weights(nn.Linear(2, 2).state_dict()), "w")


def test_data_beside_an_onnx_model_count_as_its_size(tmp_path: Path):
    for name in ("m.onnx", "m.data", "other.data"):
        (tmp_path / name).write_bytes(bytes(10))
    assert bytes_beside(tmp_path / "m.onnx") == 20


@pytest.mark.usefixtures("in_this_process")
def test_text_that_shrank_too_much_is_no_table(tmp_path: Path, set_limit):
    set_limit("holdfast.io.sandbox.tables._SMALL", 2**20)
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress(b"a,label\n" + b"1,0\n" * 600_000))
    with pytest.raises(TargetError, match=r"inflates to more than 1 MB: a bomb .* HOLDFAST_READ_MEMORY"):
        open_data(str(path), label="label")
    path.write_bytes(gzip.compress(b"a,label\n" + b"1,0\n" * 200_000))
    assert len(open_data(str(path), label="label")) == 200_000


def test_an_archive_with_two_arrays_of_one_name_is_refused(tmp_path: Path):
    np.savez(tmp_path / "d.npz", x=np.zeros((2, 3)), y=np.zeros(2, int))
    with zipfile.ZipFile(tmp_path / "d.npz") as archive:
        content = archive.read("x.npy")
    with zipfile.ZipFile(tmp_path / "d.npz", "a") as archive:
        archive.writestr("x", content)
    with pytest.raises(TargetError, match="contains two arrays named 'x'; one was expected"):
        open_data(str(tmp_path / "d.npz"))


@pytest.mark.usefixtures("in_this_process")
def test_names_of_columns_are_short_and_few_are_shown(tmp_path: Path):
    (tmp_path / "t.csv").write_text("a" * 1001 + ",label\n0,1\n")
    with pytest.raises(TargetError, match=r"a name of 1,001 characters; at most 1,000 were expected"):
        open_data(str(tmp_path / "t.csv"), label="label")
    np.savez(tmp_path / "d.npz", **{f"part_{k}": np.zeros(1) for k in range(300)})
    with pytest.raises(TargetError, match=r"it has part_0, .* …; give x=NAME") as raised:
        open_data(str(tmp_path / "d.npz"))
    assert len(str(raised.value)) < 2000


@pytest.mark.usefixtures("in_this_process")
def test_labels_are_short_and_few(tmp_path: Path, set_limit):
    with pytest.raises(TargetError, match=r"column 'label' .* a text of more than 1,000 characters"):
        open_data(table(tmp_path / "t.csv", b"1," + b"a" * 1001 + b"\n", 2), label="label")
    (tmp_path / "t.csv").write_text("a,label\n0,cat\n1,horse\n")
    set_limit("holdfast.io.sandbox.tables.MOST_CHARACTERS", 7)
    with pytest.raises(TargetError, match=r"has 2 different texts or more, of more than 7 characters in all"):
        open_data(str(tmp_path / "t.csv"), label="label")
    set_limit("holdfast.io.data.labels.MOST_NAMES", 1)
    (tmp_path / "t.csv").write_text("a,label\n0,cat\n1,dog\n")
    with pytest.raises(TargetError, match="2 different text labels; at most 1 classes were expected"):
        open_data(str(tmp_path / "t.csv"), label="label")


def test_names_of_classes_are_short_in_all(tmp_path: Path, accepted_up_to):
    np.savez(tmp_path / "d.npz", x=np.zeros((2, 3), np.float32), y=np.array(["cat", "horse"]))
    accepted_up_to(
        "data.labels.MOST_CHARACTERS",
        8,
        lambda: open_data(str(tmp_path / "d.npz")),
        "has 2 text labels of 8 characters in all; names of classes of at most 7",
    )


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        (
            np.empty((10**9, 0), np.float32),
            np.empty((10**9, 0), np.int64),
            r"x has the shape \(1000000000, 0\)",
        ),
        (
            np.zeros((3, 2), np.float32),
            np.array(["a", "b", "c"]),
            "3 labels that are text; at most 2 are read",
        ),
    ],
)
def test_rows_that_take_no_space_in_the_file_take_none_in_memory(tmp_path: Path, set_limit, x, y, says):
    set_limit("holdfast.io.data.labels.MOST_TEXTS", 2)
    np.savez(tmp_path / "d.npz", x=x, y=y)
    with pytest.raises(TargetError, match=says):
        open_data(str(tmp_path / "d.npz"))


def test_names_of_classes_are_counted_before_they_are_read(tmp_path: Path):
    np.savez_compressed(
        tmp_path / "d.npz", x=np.zeros((2, 2)), y=np.zeros(2, int), classes=np.zeros(100_001, np.uint8)
    )
    with pytest.raises(TargetError, match="classes in .* has 100,001 entries; at most 100,000 class names"):
        open_data(str(tmp_path / "d.npz"))


@pytest.mark.usefixtures("in_this_process")
def test_a_table_of_many_columns_or_of_many_labels_takes_no_quadratic_time(tmp_path: Path):
    path, n = tmp_path / "t.csv", 15_000
    path.write_text(f"label,{','.join(f'c{i}' for i in range(n))}\n1{',0' * n}\n")
    assert open_data(str(path), label="label").x.shape == (1, n)
    with pytest.raises(UsageError, match=r"its columns are label, c0, c1, .*, c48 …; give label="):
        open_data(str(path))
    path.write_text("a,label\n" + "".join(f"0,{i + 0.5}\n" for i in range(n)))
    with pytest.raises(TargetError, match="label of row 0 of .* is 0.5; whole numbers from 0 on"):
        open_data(str(path), label="label")


@pytest.mark.parametrize(
    "described",
    [
        {"architecture": "mlp", "arguments": {"width": 10**7, "depth": 1}},
        {"architecture": "mlp", "arguments": {"width": 4, "depth": 10**9}},
        {"architecture": "resnet", "arguments": {"blocks": 10**9}},
        {"architecture": "cnn", "arguments": {"width": 2**62}},
        {"architecture": ["cnn"]},
        {"architecture": "cnn", "arguments": {"side": "x"}},
        {"architecture": "mlp", "bounds": [0, 1, 2]},
        {"architecture": "mlp", "std": [0]},
        {"architecture": "resnet", "arguments": {"blocks": 0, "width": 0, "stages": 10**12}},
    ],
)
def test_a_header_that_describes_another_network_than_the_file_holds_is_refused_before_it_is_made(
    tmp_path: Path, described
):
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(nn.Linear(4, 4).state_dict(), path, {"holdfast": json.dumps(described)})
    with pytest.raises(
        TargetError, match=r"do not fit|invalid arguments|metadata of .*, \w+ is .*; .* was expected"
    ):
        open_model(str(path))


@pytest.mark.parametrize("asked", [{"width": "30000", "features": "300000"}, {"depth": "1000000000"}])
def test_arguments_of_a_configuration_make_no_larger_network_than_the_file_holds(tmp_path: Path, asked):
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(nn.Linear(4, 4).state_dict(), path)
    with pytest.raises(TargetError, match="do not fit"):
        open_model(str(path), arch="mlp", model_args=asked)


def test_images_that_shrank_too_much_are_no_data(tmp_path: Path, set_limit):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (600, 600)).save(tmp_path / name / "x.png")
    assert len(open_data(str(tmp_path))) == 2
    set_limit("holdfast.io.data.pictures._SMALL", 2**20)
    with pytest.raises(TargetError, match=r"2 images of .* MB, which take 2\.2 MB .* HOLDFAST_READ_MEMORY"):
        open_data(str(tmp_path))


def images(folder: Path, content: bytes, name: str) -> str:
    (folder / "a").mkdir()
    (folder / "a" / name).write_bytes(content)
    return str(folder)


def of_many_scans() -> bytes:
    """A JPEG image of 125 kB whose last scan, which is empty, is repeated: without a limit it takes 20 s."""
    whole = io.BytesIO()
    Image.new("L", (4000, 4000)).save(whole, "JPEG", progressive=True)
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00"
    return whole.getvalue()[:-2] + scan * 6000 + b"\xff\xd9"


def of_many_profiles() -> bytes:
    """A PNG image of 3 MB whose metadata inflate to 3 GB, one MB at a time: without a limit it takes 6 s."""
    whole = io.BytesIO()
    Image.new("L", (4, 4)).save(whole, "PNG")
    first, *rest = chunks(whole.getvalue())
    return png([first, *[(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**20)))] * 3000, *rest])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "make"), [("x.jpg", of_many_scans), ("x.png", of_many_profiles)])
def test_an_image_that_takes_long_is_given_up_before_it_is_read(tmp_path: Path, monkeypatch, name, make):
    monkeypatch.setenv("HOLDFAST_READ_SECONDS", "1")
    address = images(tmp_path, make(), name)
    with pytest.raises(
        TargetError, match=rf"{name}' took more than 1 s of CPU time .* HOLDFAST_READ_SECONDS=600"
    ):
        open_data(address).read(0, 1)


def test_metadata_that_are_joined_are_limited(tmp_path: Path):
    whole = io.BytesIO()
    Image.new("L", (4, 4)).save(whole, "JPEG")
    segment = b"\xff\xe1\x00\x09Exif\0\0a"
    address = images(tmp_path, whole.getvalue()[:2] + 3 * segment + whole.getvalue()[2:], "x.jpg")
    with pytest.raises(TargetError, match="more than 2 segments of Exif metadata"):
        open_data(address)


def test_an_image_that_changes_after_it_was_checked_is_not_read(tmp_path: Path):
    def image(size: int, value: int) -> bytes:
        whole = io.BytesIO()
        Image.new("L", (size, size), value).save(whole, "PNG")
        return whole.getvalue()

    address, place = images(tmp_path, image(4, 0), "x.png"), tmp_path / "a" / "x.png"
    seen = open_data(address)
    digest = seen.digest
    place.with_suffix(".new").write_bytes(image(4, 1))
    place.with_suffix(".new").replace(place)
    with pytest.raises(TargetError, match=r"x\.png' changed after it was opened"):
        seen.read(0, 1)
    assert open_data(address).digest != digest
    place.unlink()
    place.symlink_to(tmp_path / "other.png")
    with pytest.raises(TargetError, match=r"x\.png' is a link to .*, which does not exist"):
        seen.read(0, 1)
    place.unlink()
    place.write_bytes(image(4, 0))
    unread = open_data(address)
    place.write_bytes(image(5, 0))
    with pytest.raises(TargetError, match=r"x\.png' changed after it was opened"):
        unread.read(0, 1)


def test_images_files_and_members_are_counted_first(tmp_path: Path, accepted_up_to):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (6, 5)).save(tmp_path / "a" / "x.png")
    accepted_up_to(
        "data.pictures.MAX_PIXELS",
        30,
        lambda: open_data(str(tmp_path)),
        "has 6 x 5 pixels; at most 29 are decoded: resize it",
    )
    path = tmp_path / "w.pt"
    torch.save({"a": torch.zeros(3)}, path)
    with zipfile.ZipFile(path) as archive:
        n, size = len(archive.namelist()), path.stat().st_size
    assert len(read_once(path, "weights file", max_bytes=size)) == size
    with pytest.raises(
        TargetError, match="MB is read: if you trust it, raise the limit with HOLDFAST_READ_MEMORY"
    ):
        read_once(path, "weights file", max_bytes=size - 1)
    accepted_up_to(
        "models.weights.MAX_MEMBERS",
        n,
        lambda: check_archive(path),
        f"holds {n} members; at most {n - 1} are read",
    )


@pytest.mark.usefixtures("in_this_process")
def test_arrays_and_tables_are_read_up_to_their_size(tmp_path: Path, accepted_up_to):
    arrays, address = tmp_path / "d.npz", table(tmp_path / "t.csv", b"1,0\n", 5)
    np.savez(arrays, x=np.zeros((2, 3), np.float32), y=np.zeros(2, int))
    with zipfile.ZipFile(arrays) as archive:
        size = sum(member.file_size for member in archive.infolist())
    for module, path, label, most in (
        ("data.npz", str(arrays), None, size),
        ("sandbox.tables", address, "label", Path(address).stat().st_size),
    ):
        accepted_up_to(
            f"{module}.MAX_BYTES", most, partial(open_data, path, label=label), "HOLDFAST_READ_MEMORY="
        )


def test_a_configuration_is_short_and_its_numbers_have_64_bits(set_limit):
    text = f"seed: {2**63 - 1}"
    set_limit("holdfast.settings.texts.MAX_CHARACTERS", len(text))
    assert parse_yaml(text, "holdfast.yaml") == {"seed": 2**63 - 1}
    with pytest.raises(
        UsageError, match="is too large for a whole number .line 1.; give one of at most 64 bits"
    ):
        parse_yaml(f"seed: {2**63}", "holdfast.yaml")
    with pytest.raises(UsageError, match=f"holdfast.yaml has more than {len(text)} characters"):
        parse_yaml(f"{text} ", "holdfast.yaml")


@pytest.mark.slow
def test_sample_inputs_of_a_program_are_unpickled_under_the_memory_limit(tmp_path: Path):
    whole, inner, path = io.BytesIO(), io.BytesIO(), tmp_path / "net.pt2"
    torch.export.save(torch.export.export(nn.Linear(3, 2), (torch.rand(2, 3),)), whole)
    size = (2 * 10**9).to_bytes(5, "little")  # torch.Size(bytearray(2 * 10**9))
    pickled = b"\x80\x02ctorch\nSize\ncbuiltins\nbytearray\n\x8a\x05" + size + b"\x85R\x85R."
    with zipfile.ZipFile(inner, "w") as file:
        for name, content in (("data.pkl", pickled), ("version", b"3\n"), ("byteorder", b"little")):
            file.writestr(f"archive/{name}", content)
    with zipfile.ZipFile(whole) as before, zipfile.ZipFile(path, "w") as after:
        for name in before.namelist():
            after.writestr(name, inner.getvalue() if "sample_inputs" in name else before.read(name))
    with pytest.raises(TargetError, match="asks for far more memory than its size"):
        open_model(str(path))


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="limits of a process are those of POSIX")
def test_a_loop_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, kind = onnx.helper, onnx.TensorProto
    value = helper.make_tensor_value_info
    rounds, go = (
        onnx.numpy_helper.from_array(np.array(each), name) for each, name in ((60_000, "m"), (True, "go"))
    )
    inner = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Sin", ["v"], ["w"])],
        "inner",
        [value("i", kind.INT64, []), value("c", kind.BOOL, []), value("v", kind.FLOAT, None)],
        [value("d", kind.BOOL, []), value("w", kind.FLOAT, None)],
    )
    outer = helper.make_graph(
        [
            helper.make_node("Identity", ["c2"], ["d2"]),
            helper.make_node("Loop", ["m", "go", "v2"], ["w2"], body=inner),
        ],
        "outer",
        [value("i2", kind.INT64, []), value("c2", kind.BOOL, []), value("v2", kind.FLOAT, None)],
        [value("d2", kind.BOOL, []), value("w2", kind.FLOAT, None)],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["m", "go", "x"], ["y"], body=outer)],
        "g",
        [value("x", kind.FLOAT, ["n", 3])],
        [value("y", kind.FLOAT, ["n", 3])],
        [rounds, go],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    monkeypatch.setenv("HOLDFAST_READ_SECONDS", "1")
    with pytest.raises(TargetError, match=r"more than (1 s of CPU time|5 s) to read"):
        open_model(str(tmp_path / "m.onnx"))
