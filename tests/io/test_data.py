"""Every form of data address, and what each says when it cannot be meant."""

import csv
import gzip
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from holdfast.core.batch import Data
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Bounds
from holdfast.io.data.data import bundled_data, open_data
from holdfast.io.data.layouts import DeclaredData
from holdfast.io.data.loaders import as_data

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (12, 5, 6), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (12, 5, 6, 3), dtype=np.uint8)
Y = np.arange(12) % 3


def npz(path: Path, **arrays: np.ndarray) -> str:
    np.savez_compressed(path, **arrays)
    return str(path)


def read_all(data: Data) -> torch.Tensor:
    return data.read(0, len(data)).x


# npz -------------------------------------------------------------------------------------------------


def test_bytes_become_floats_with_the_channels_first(tmp_path: Path) -> None:
    images = DeclaredData(layout="hwc")
    parts = npz(tmp_path / "g.npz", x_test=BYTES, y_test=Y, x_train=BYTES[:2], y_train=Y[:2])
    grey = open_data(parts, expected=images)
    torch.testing.assert_close(read_all(grey), torch.from_numpy(BYTES[:, None]).float() / 255)
    colour = open_data(npz(tmp_path / "c.npz", x=COLOUR, y=Y), expected=images)
    torch.testing.assert_close(read_all(colour), torch.from_numpy(COLOUR).permute(0, 3, 1, 2).float() / 255)
    assert colour.notes == ("the channels came last and were put first",)
    batch = colour.read(3, 5)
    assert batch.y.tolist() == [0, 1] and batch.ids.tolist() == [3, 4]
    assert (batch.y.dtype, batch.ids.dtype, batch.x.dtype) == (torch.int64, torch.int64, torch.float32)
    assert isinstance(colour, Data)


def test_splits_and_selections(tmp_path: Path) -> None:
    address = npz(tmp_path / "d.npz", x_test=BYTES, y_test=Y, x_train=BYTES[::-1], y_train=Y[::-1])
    assert torch.equal(read_all(open_data(address, split="train")), read_all(open_data(address)).flip(0))
    assert open_data(address, n=5).read(0, 5).ids.tolist() == [0, 1, 2, 3, 4]
    assert len(open_data(address, n=100)) == 12
    assert open_data(address, n=100).notes == (
        "100 examples were requested, and the data have 12: all of them were used",
    )
    assert open_data(address, n=12).notes == ()
    drawn = [open_data(address, sample=5, seed=seed).read(0, 5).ids.tolist() for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] == sorted(set(drawn[0]))
    with pytest.raises(UsageError, match=r"no split 'trian' \(did you mean 'train'"):
        open_data(address, split="trian")
    bundled = r"^'mnist-mini' has no split 'tests' \(did you mean 'test'\?\); it has (train, test|test, train|test)$"
    with pytest.raises(UsageError, match=bundled):
        open_data("mnist-mini", split="tests")
    bare = npz(tmp_path / "bare.npz", x=BYTES, y=Y)
    with pytest.raises(
        UsageError, match="bare.npz' contains x, y, but no split 'val'; save x_val .* leave out split"
    ):
        open_data(bare, split="val")
    with pytest.raises(UsageError, match="exclude each other"):
        open_data(address, n=1, sample=1)
    with pytest.raises(UsageError, match="n is 0"):
        open_data(address, n=0)


def test_named_arrays_of_an_archive(tmp_path: Path) -> None:
    address = npz(tmp_path / "d.npz", images=BYTES, targets=Y, other=Y[:3])
    named = open_data(address, x="images", y="targets", n=5, expected=DeclaredData(layout="hwc"))
    assert named.y.tolist() == Y[:5].tolist() and np.array_equal(named.x[:, 0], BYTES[:5])
    with pytest.raises(
        TargetError,
        match=r"it has images, targets, other; give x=NAME, y=NAME",
    ):
        open_data(address)
    with pytest.raises(UsageError, match="x is images, which is one of two arrays of .*; give y=NAME"):
        open_data(address, x="images")
    with pytest.raises(UsageError, match="y is target, but .* has no such array; it has images, targets"):
        open_data(address, x="images", y="target")
    with pytest.raises(UsageError, match="are one set of examples in .*, which has no split 'train'"):
        open_data(address, x="images", y="targets", split="train")
    (tmp_path / "t.csv").write_text("a,y\n0,1\n")
    with pytest.raises(UsageError, match=r"is not an \.npz file and has no named arrays; leave out x"):
        open_data(str(tmp_path / "t.csv"), x="images", y="targets")


def test_the_digest_follows_values_labels_and_selection(tmp_path: Path) -> None:
    address = npz(tmp_path / "d.npz", x=BYTES, y=Y)
    moved = npz(tmp_path / "other.npz", x=BYTES, y=Y)
    changed = BYTES.copy()
    changed[3, 2, 1] ^= 1
    digests = [open_data(address).digest, open_data(moved).digest]
    first, second = digests
    assert first == second
    others = [
        open_data(npz(tmp_path / "x.npz", x=changed, y=Y)).digest,
        open_data(npz(tmp_path / "y.npz", x=BYTES, y=Y[::-1])).digest,
        open_data(address, n=11).digest,
    ]
    assert len({first, *others}) == 4


def test_lzma_members_and_class_names_are_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "l.npz", "w", zipfile.ZIP_LZMA) as archive:
        for name, array in {"x": BYTES, "y": Y, "classes": np.array(["a", "b", "c"])}.items():
            file = io.BytesIO()
            np.save(file, array)
            archive.writestr(f"{name}.npy", file.getvalue())
    data = open_data(str(tmp_path / "l.npz"), n=2)
    assert data.classes == ("a", "b", "c")
    torch.testing.assert_close(read_all(data), torch.from_numpy(BYTES[:2]).float() / 255)


def test_fortran_order_and_float64_are_read(tmp_path: Path) -> None:
    x = np.asfortranarray(RNG.random((12, 4)))
    data = open_data(npz(tmp_path / "f.npz", x=x, y=Y), n=7)
    torch.testing.assert_close(read_all(data), torch.from_numpy(x[:7]).float())


def test_one_image_and_one_class_are_data_too(tmp_path: Path) -> None:
    data = open_data(npz(tmp_path / "one.npz", x=BYTES[:1], y=Y[:1]))
    assert data.read(0, 1).x.shape == (1, 5, 6)


def test_binary_features_and_bounds_to_255_are_not_divided(tmp_path: Path) -> None:
    binary = open_data(npz(tmp_path / "b.npz", x=RNG.integers(0, 2, (12, 7), dtype=np.uint8), y=Y))
    assert read_all(binary).unique().tolist() == [0, 1]
    raw = open_data(npz(tmp_path / "r.npz", x=BYTES, y=Y), expected=DeclaredData(bounds=Bounds(0, 255)))
    assert torch.equal(read_all(raw), torch.from_numpy(BYTES).float())
    assert binary.notes and raw.notes


BAD_ARRAYS: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "floats to 255": (
        {"x": BYTES.astype(np.float32), "y": Y},
        r"range from 0 to 255; 0 to 1 was.*divide them by 255",
    ),
    "floats below 0": (
        {"x": BYTES / 255 - 0.5, "y": Y},
        r"range from -0\.5 to 0\.5;.*data_normalised=.*bounds=",
    ),
    "not a number": (
        {"x": np.where(BYTES[4, 0, 0] == BYTES, np.nan, 0.5), "y": Y},
        "NaN or infinity, first in row",
    ),
    "integers": (
        {"x": BYTES.astype(np.int64), "y": Y},
        r"are int64 from 0 to \d+; uint8.*: give x.astype\('float32'\) / \d+",
    ),
    "one dimension": ({"x": BYTES[:, 0, 0], "y": Y}, r"shape \(12,\)"),
    "float labels": ({"x": BYTES, "y": Y + 0.5}, "are float64 with values such as 0.5; .*--task"),
    "one-hot labels": ({"x": BYTES, "y": np.eye(3)[Y]}, r"y\.argmax\(1\)"),
    "negative labels": (
        {"x": BYTES, "y": Y - 1},
        "contain -1; class numbers start at 0: remove rows without a class, or",
    ),
    "too few labels": ({"x": BYTES, "y": Y[:7]}, "12 rows and y 7"),
    "no examples": ({"x": BYTES[:0], "y": Y[:0]}, "is empty"),
    "no labels": ({"x": BYTES}, "has the inputs x, and no other array; save the labels in it as y"),
    "other labels": (
        {"x": BYTES, "labels": Y},
        r"the inputs x, and no labels y; its other arrays are labels; give x='x', y=NAME to holdfast.open_data",
    ),
    "other names": ({"images": BYTES, "labels": Y}, "neither x_test, y_test nor x, y; it has images, labels"),
    "objects": ({"x": np.array([{}] * 12, dtype=object), "y": Y}, "pickled objects, which are never opened"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays_are_refused_with_what_was_expected(tmp_path: Path, case: str) -> None:
    arrays, message = BAD_ARRAYS[case]
    with pytest.raises(TargetError, match=message):
        open_data(npz(tmp_path / "bad.npz", **arrays))


def test_labels_outside_the_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"range from 0 to 2, but the model has 2 classes \(0 to 1\)"):
        open_data(npz(tmp_path / "a.npz", x=BYTES, y=Y), expected=DeclaredData(classes=2))
    with pytest.raises(TargetError, match="count from 1: subtract 1"):
        open_data(npz(tmp_path / "b.npz", x=BYTES, y=Y + 1), expected=DeclaredData(classes=3))


def test_damaged_archives_are_named(tmp_path: Path) -> None:
    whole = Path(npz(tmp_path / "w.npz", x=BYTES, y=Y)).read_bytes()
    for name, content in {
        "cut": whole[:300],
        "noise": b"no zip at all",
        "flipped": whole[:150] + b"\0\0\0\0" + whole[154:],
    }.items():
        (tmp_path / f"{name}.npz").write_bytes(content)
        with pytest.raises(
            TargetError, match="damaged or truncated: .*; download (it again|or write it again)"
        ):
            open_data(str(tmp_path / f"{name}.npz"))
    with pytest.raises(TargetError, match=r"does not exist"):
        open_data(str(tmp_path / "absent.npz"))
    (tmp_path / "empty.npz").write_bytes(b"")
    with pytest.raises(TargetError, match="empty"):
        open_data(str(tmp_path / "empty.npz"))


def test_a_member_with_a_false_size_is_refused_before_memory_is_allocated(
    tmp_path: Path,
) -> None:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": "|u1", "fortran_order": False, "shape": (10**12, 28, 28)}
    )
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", file.getvalue())
        archive.writestr("y.npy", file.getvalue())
    with pytest.raises(TargetError, match="x declares .* MB, but has"):
        open_data(str(tmp_path / "bomb.npz"))


def test_a_bomb_is_refused_by_how_much_it_shrank(set_limit, tmp_path: Path) -> None:
    set_limit("holdfast.io.data.npz._SMALL", 10**6)
    np.savez_compressed(
        tmp_path / "bomb.npz", x=np.zeros((6000, 28, 28), np.uint8), y=np.zeros(6000, np.int64)
    )
    with pytest.raises(TargetError, match="a decompression bomb"):
        open_data(str(tmp_path / "bomb.npz"))
    set_limit("holdfast.io.data.npz._RATIO", 1000)
    assert len(open_data(str(tmp_path / "bomb.npz")))


def test_names_that_are_not_known_offer_the_nearest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOLDFAST_DATA", str(tmp_path))
    with pytest.raises(UsageError, match="did you mean 'cifar10'"):
        open_data("cifar100")
    with pytest.raises(TargetError, match="holdfast data fetch cifar10"):
        open_data("cifar10")
    with pytest.raises(TargetError, match="no official mirror.*import FOLDER"):
        open_data("gtsrb")
    with pytest.raises(UsageError, match="is a URL, but data are read from files: download it first"):
        open_data("https://host/data.npz")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UsageError, match="unknown data format"):
        open_data(str(tmp_path / "notes.txt"))


def test_bundled_data_is_read() -> None:
    if "mnist-mini" not in bundled_data():
        pytest.skip("no data is bundled with this checkout")
    data = open_data("mnist-mini")
    assert len(data) == 1000 and read_all(data).shape == (1000, 1, 28, 28)
    assert len(open_data("mnist-mini", split="train")) == 5000


# folders of images -----------------------------------------------------------------------------------


def picture(path: Path, size: tuple[int, int] = (6, 5), mode: str = "RGB", value: int = 7) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode in {"L", "P", "I;16"} else (value,) * len(mode)).save(path)


def test_class_folders_are_read_in_turn(tmp_path: Path) -> None:
    for name, values in {"dog": (10, 11), "cat": (20, 21, 22), "bird": (30,)}.items():
        for i, value in enumerate(values):
            picture(tmp_path / name / f"{i}.png", value=value)
    data = open_data(str(tmp_path))
    batch = data.read(0, len(data))
    assert data.classes == ("bird", "cat", "dog")
    assert batch.y.tolist() == [0, 1, 2, 1, 2, 1]
    assert (batch.x[:, 0, 0, 0] * 255).round().tolist() == [30, 20, 10, 21, 11, 22]
    assert batch.x.shape == (6, 3, 5, 6)
    assert open_data(str(tmp_path), n=3).read(0, 3).y.tolist() == [0, 1, 2]
    assert open_data(str(tmp_path), n=3).digest != data.digest


def test_grey_mixed_palette_and_transparent_images(tmp_path: Path) -> None:
    picture(tmp_path / "grey" / "a" / "0.png", mode="L")
    picture(tmp_path / "grey" / "a" / "1.png", mode="I;16", value=7 * 257)
    grey = open_data(str(tmp_path / "grey"))
    assert grey.read(0, 2).x.shape == (2, 1, 5, 6)
    torch.testing.assert_close(read_all(grey), torch.full((2, 1, 5, 6), 7 / 255))
    picture(tmp_path / "mixed" / "a" / "0.png", mode="L")
    picture(tmp_path / "mixed" / "b" / "0.png", mode="RGBA")
    mixed = open_data(str(tmp_path / "mixed"))
    torch.testing.assert_close(read_all(mixed), torch.full((2, 3, 5, 6), 7 / 255))
    assert len(mixed.notes) == 2


@pytest.mark.parametrize(
    "empty, said",
    [
        (["1"], "1 class folder holds no image (1)"),
        (["1", "2", "3", "4"], "4 class folders hold no image (1, 2, 3 …)"),
    ],
)
def test_class_folders_without_images_are_noted(tmp_path: Path, empty: list[str], said: str) -> None:
    picture(tmp_path / "0" / "a.png")
    for name in empty:
        (tmp_path / name).mkdir()
    assert open_data(str(tmp_path)).notes[-1] == said


def test_bad_folders_of_images_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "sizes" / "a" / "0.png")
    picture(tmp_path / "sizes" / "b" / "0.png", size=(7, 5))
    with pytest.raises(TargetError, match=r"is 6 x 5, .* is 7 x 5; resize"):
        open_data(str(tmp_path / "sizes"))
    (tmp_path / "flat").mkdir()
    picture(tmp_path / "flat" / "0.png")
    with pytest.raises(TargetError, match="no class folders"):
        open_data(str(tmp_path / "flat"))
    (tmp_path / "none" / "a").mkdir(parents=True)
    with pytest.raises(TargetError, match="hold no images; a threat such as bytes:"):
        open_data(str(tmp_path / "none"))
    (tmp_path / "text" / "a").mkdir(parents=True)
    (tmp_path / "text" / "a" / "0.png").write_text("no image")
    with pytest.raises(TargetError, match="cannot be read as PNG"):
        open_data(str(tmp_path / "text"))
    for name in ("a", "b", "c"):
        picture(tmp_path / "three" / name / "0.png")
    with pytest.raises(TargetError, match=r"has 3 class folders \(a, b, c\), but the model has 2 classes"):
        open_data(str(tmp_path / "three"), expected=DeclaredData(classes=2))
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 10)
    with pytest.raises(TargetError, match="too large to decode"):
        open_data(str(tmp_path / "sizes"))


def test_a_truncated_image_is_named_when_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    file = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(file, "PNG")
    (tmp_path / "a" / "0.png").write_bytes(file.getvalue()[:2000])
    with pytest.raises(TargetError, match=r"0\.png.* is damaged or truncated"):
        open_data(str(tmp_path)).read(0, 1)


# tables ----------------------------------------------------------------------------------------------

ROWS = [
    ["a", "b", "kind", "split"],
    ["0.5", "1", "yes", "train"],
    ["0.25", "0", "no", "test"],
    ["1", "true", "yes", "test"],
]


def table(path: Path, rows: list[list[str]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    content = text.getvalue().encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def test_folders_inside_class_folders_are_pointed_out(tmp_path: Path) -> None:
    for name in ("0", "1"):
        (tmp_path / name).mkdir()
        Image.new("L", (4, 4)).save(tmp_path / name / "a.png")
    assert not open_data(str(tmp_path)).notes
    (tmp_path / "1" / "more").mkdir()
    assert open_data(str(tmp_path)).notes == ("folders inside class folders are not read: 1/more",)


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_tables_are_numbers_and_a_label(tmp_path: Path, name: str) -> None:
    data = open_data(table(tmp_path / name, ROWS), label="kind")
    batch = data.read(0, 2)
    assert batch.x.tolist() == [[0.25, 0.0], [1.0, 1.0]]
    assert batch.y.tolist() == [0, 1] and batch.ids.tolist() == [1, 2]
    assert data.classes == ("no", "yes")
    assert data.notes == ("text labels were numbered: no=0, yes=1",)
    assert len(open_data(table(tmp_path / name, ROWS), label="kind", split="train")) == 1


@pytest.mark.parametrize("odd", ["1.5", "nan"])
def test_a_label_that_is_no_whole_number_among_numbers_is_shown(tmp_path: Path, odd: str) -> None:
    with pytest.raises(
        TargetError, match=rf"the label of row 2 of .* is {odd}; whole numbers from 0 on, or names"
    ):
        open_data(
            table(tmp_path / "t.csv", [["a", "y"], ["0.5", "0"], ["0.2", "1"], ["0.1", odd]]), label="y"
        )


@pytest.mark.slow
def test_parquet_is_read_as_csv_is(tmp_path: Path, process_limits, set_limit) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"a": [0.5, 0.25, 1.0], "b": [True, False, True], "kind": [1, 0, 1]}
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    batch = open_data(str(tmp_path / "t.parquet"), label="kind").read(0, 3)
    assert batch.x.tolist() == [[0.5, 1.0], [0.25, 0.0], [1.0, 1.0]]
    assert batch.y.tolist() == [1, 0, 1]
    parquet.write_table(
        pa.table({"a": pa.repeat(pa.scalar(0.5), 3_000_000), "y": [0] * 3_000_000}), tmp_path / "b.parquet"
    )
    assert (tmp_path / "b.parquet").stat().st_size < 100_000
    process_limits(True)
    set_limit("holdfast.io.sandbox.tables.MAX_CELLS", 5_000_000)
    with pytest.raises(TargetError, match="has 3,000,000 rows of 2 columns or more; at most 5,000,000 cells"):
        open_data(str(tmp_path / "b.parquet"), label="y")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(TargetError, match="no readable parquet"):
        open_data(str(tmp_path / "bad.parquet"), label="kind")


@pytest.mark.usefixtures("in_this_process")
def test_labels_of_an_extension_type_are_refused_with_the_type(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    labels = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([bytes(16), bytes(16)], pa.binary(16)))
    parquet.write_table(pa.table({"a": [0.0, 1.0], "y": labels}), tmp_path / "t.parquet")
    with pytest.raises(TargetError, match=r"column 'y' .* has the type extension<arrow.uuid>, which is not"):
        open_data(str(tmp_path / "t.parquet"), label="y")


@pytest.mark.slow
def test_columns_that_are_no_features_are_left_out(tmp_path: Path) -> None:
    rows = [["id", "a", "full name", "y"], ["7", "0.5", "Ann", "0"], ["8", "0.25", "Bob", "1"]]
    address = table(tmp_path / "t.csv", rows)
    with pytest.raises(TargetError, match=r"not numbers: full name. Write numbers .*drop=\('full name',\)"):
        open_data(address, label="y")
    data = open_data(address, label="y", drop=("id", "full name"))
    assert data.read(0, 2).x.tolist() == [[0.5], [0.25]]
    with pytest.raises(UsageError, match="no column 'ful name' to drop.*did you mean 'full name'"):
        open_data(address, label="y", drop=("ful name",))
    with pytest.raises(
        UsageError,
        match=r"no column .id,full name.; columns are listed one by one; give drop=\('id', 'full name'\)",
    ):
        open_data(address, label="y", drop=("id,full name",))
    with pytest.raises(UsageError, match="'y' is the label of .*, and is dropped; leave out drop"):
        open_data(address, label="y", drop=("y",))
    with pytest.raises(UsageError, match="'mnist-mini' is not a table and has no columns; leave out drop"):
        open_data("mnist-mini", drop=("id",))


@pytest.mark.parametrize(
    "rows, label, error, message",
    [
        (ROWS, None, UsageError, "is not stated; its columns are a, b, kind, split; give label="),
        (ROWS, "knd", UsageError, "no column 'knd'; its columns are a, b, kind, split; give label='kind'"),
        (
            [["a", "t", "y"], ["1", "red", "0"]],
            "y",
            TargetError,
            r"1 column of .* is not numbers: t. Write numbers .*drop=\('t',\)",
        ),
        (
            [["a", "t", "u", "y"], ["1", "red", "up", "0"]],
            "y",
            TargetError,
            r"2 columns of .* are not numbers: t, u. Write numbers .*drop=\('t', 'u'\)",
        ),
        (
            [["a", "t", "y"], ["1", "2.5", "0"], ["1", "?", "0"], ["1", "3", "0"]],
            "y",
            TargetError,
            r"not numbers: t. Write .*Most cells of t are numbers: leave a cell empty for a missing value$",
        ),
        (
            [["a", "t", "u", "y"], ["1", "2.5", "up", "0"], ["1", "NA", "up", "0"], ["1", "3", "up", "0"]],
            "y",
            TargetError,
            r"not numbers: t, u. .*leave a cell empty for a missing value; give drop=\('u',\)",
        ),
        (
            [["a", "b", "y"], ["0", "4", "0"], ["91", "2", "1"]],
            "y",
            TargetError,
            "range from 0 to 91; 0 to 1 was expected; scale the features as in training.*bounds=",
        ),
        ([["a", "y"], ["0", "0"], ["255", "1"]], "y", TargetError, "divide them by 255"),
        ([["a", "y"], ["", "0"]], "y", TargetError, "value of a in row 0 of .* is missing"),
        ([["a", "y"], ["nan", "0"]], "y", TargetError, "NaN or infinity"),
        ([["a", "y"], ["1", ""]], "y", TargetError, "label of row 0 of .* is missing"),
        ([["a", "y"], ["7", "0"]], "y", TargetError, "range from 7 to 7;"),
        ([["a", "y"], ["1"]], "y", TargetError, "row 1 of .* has 1 cells; the header has 2"),
        ([["a", "a"], ["1", "2"]], "a", TargetError, "several columns named .a."),
        ([["a", "y"]], "y", TargetError, "is empty"),
        ([["y"], ["1"]], "y", TargetError, "no column beside its label"),
    ],
)
def test_bad_tables_are_refused(
    tmp_path: Path, rows: list[list[str]], label: str | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        open_data(table(tmp_path / "t.csv", rows), label=label)


# in memory -------------------------------------------------------------------------------------------


def test_tensors_keep_their_layout_and_type() -> None:
    x, y = torch.rand(5, 4, 4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    for given in (as_data(x, y), as_data((x, y))):
        batch = given.read(1, 4)
        assert torch.equal(batch.x, x[1:4]) and batch.x.dtype == torch.float64
        assert batch.y.tolist() == [1, 2, 0] and batch.ids.tolist() == [1, 2, 3]


def test_arrays_loaders_and_datasets_give_the_same_data() -> None:
    x, y = torch.rand(7, 1, 3, 3), torch.arange(7) % 2
    dataset = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(dataset, batch_size=3)
    forms = [
        as_data(x, y),
        as_data(x.numpy(), y.numpy()),
        as_data(dataset),
        as_data(loader),
        as_data(list(dataset)),
    ]
    assert len({form.digest for form in forms}) == 1
    assert as_data(forms[0]) is forms[0]


@pytest.mark.parametrize(
    "x, y, message",
    [
        (torch.rand(0, 2), torch.zeros(0, dtype=torch.int64), "empty"),
        (torch.rand(3, 2) * 9, torch.tensor([0, 1, 1]), "range from"),
        (torch.rand(3, 2), torch.tensor([0.0, 1.5, 1.0]), "are float32"),
        (torch.rand(3, 2), torch.tensor([0, 1]), "3 examples and 2 labels"),
        (torch.full((3, 2), float("nan")), torch.tensor([0, 1, 1]), "NaN"),
        (7, None, "is an int"),
        ([], None, "yield no batch"),
        (["a", "b"], None, "yield a str"),
        ([[1.0], [1.0, 2.0]], [0, 1], "different shapes"),
        (torch.full((3, 2, 2), 9), torch.tensor([0, 1, 1]), "are int64 from 9 to 9; uint8"),
        (torch.full((3, 2), 9), torch.tensor([0, 1, 1]), "range from 9 to 9; 0 to 1 was expected"),
        (torch.full((3, 2), 2**24 + 1), torch.tensor([0, 1, 1]), "whole numbers only up to 16777216"),
        (
            torch.full((3, 1, 9), -9000, dtype=torch.int16),
            torch.tensor([0, 1, 1]),
            r"samples of audio, whose largest value is 32768.*give bounds=\(-32768, 32767\)",
        ),
    ],
)
def test_bad_data_in_memory_is_refused(x: object, y: object, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        as_data(x, y)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.int32])
@pytest.mark.parametrize("shape", [(6, 4), (6, 1, 4), (6, 1, 2, 2)])
def test_whole_numbers_are_features_inside_declared_bounds(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x, y = torch.arange(24, dtype=dtype).reshape(shape) - 3, torch.arange(6) % 3
    bounds = DeclaredData(bounds=Bounds(-3.0, 20.0))
    for inputs in (x, x.numpy()):
        assert torch.equal(as_data(inputs, y, expected=bounds).read(0, 6).x.flatten(), x.float().flatten())
    assert as_data(torch.ones(6, 4, dtype=dtype), y).read(0, 6).x.eq(1.0).all()


def test_bounds_may_be_one_per_feature() -> None:
    x, y = torch.tensor([[0.0, 5.0], [1.0, 9.0]]), torch.tensor([0, 1])
    bounds = Bounds(torch.tensor([0.0, 5.0]), torch.tensor([1.0, 9.0]))
    assert len(as_data(x, y, expected=DeclaredData(bounds=bounds))) == 2
    with pytest.raises(TargetError, match="feature 0 in row 1 .* is 1.1, outside its bounds 0 to 1"):
        as_data(x + 0.1, y, expected=DeclaredData(bounds=bounds))
    with pytest.raises(UsageError, match="bounds have shape"):
        as_data(torch.rand(2, 3), y, expected=DeclaredData(bounds=bounds))


def test_real_data_is_read(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_DATA", str(data_folder))
    for name, shape in {"mnist": (1, 28, 28), "gtsrb": (3, 32, 32), "pneumoniamnist": (1, 28, 28)}.items():
        data = open_data(name, n=10)
        assert data.read(0, 10).x.shape == (10, *shape)
    fraud = open_data("credit-fraud", expected=DeclaredData(bounds=Bounds(-1e6, 1e6)))
    assert set(fraud.read(0, len(fraud)).y.tolist()) == {0, 1}


def test_labels_of_two_signs_are_refused_with_their_numbers(tmp_path: Path) -> None:
    address = npz(tmp_path / "d.npz", x=BYTES, y=np.where(Y > 0, 1, -1))
    with pytest.raises(TargetError, match=r"contain -1; class numbers start at 0: give \(y \+ 1\) // 2"):
        open_data(address, n=3)


def test_text_labels_of_an_archive_are_looked_up(tmp_path: Path) -> None:
    names = np.array(["cat", "dog", "emu"])
    address = npz(tmp_path / "d.npz", x=BYTES, y=names[Y])
    known = DeclaredData(class_names=("emu", "cat", "dog"), layout="hwc")
    assert open_data(address, expected=known).y.tolist() == ((Y + 1) % 3).tolist()
    assert open_data(address, expected=DeclaredData(layout="hwc")).y.tolist() == Y.tolist()
    told = npz(tmp_path / "c.npz", x=BYTES, y=names[Y], classes=names[::-1])
    assert open_data(told, expected=DeclaredData(layout="hwc")).y.tolist() == (2 - Y).tolist()
    with pytest.raises(TargetError, match="emu"):
        open_data(address, expected=DeclaredData(class_names=("cat", "dog", "gnu"), layout="hwc"))


def test_whole_numbers_that_float32_does_not_represent_are_refused(tmp_path: Path) -> None:
    for name, values in (("id", [16777217, 16777218, 3]), ("amount", [16777217.5, 16777218.25, 3.0])):
        (tmp_path / f"{name}.csv").write_text(
            f"a,{name},y\n" + "".join(f"1,{value},{row % 2}\n" for row, value in enumerate(values))
        )
    accepted = open_data(str(tmp_path / "amount.csv"), label="y", expected=DeclaredData(lenient=True))
    assert accepted.read(0, 3).x.shape == (3, 2)  # fractions are rounded by less than their own precision
    with pytest.raises(TargetError, match="column 'id' of .* above 16,777,216, first in row 0") as caught:
        open_data(str(tmp_path / "id.csv"), label="y", expected=DeclaredData(lenient=True))
    (drop,) = caught.value.remedies
    open_data(str(tmp_path / "id.csv"), label="y", drop=drop.value, expected=DeclaredData(lenient=True))


TIMES = 1.7e9 + np.arange(8.0)
"""Times in seconds, of which float32 represents one in 128."""


@pytest.mark.parametrize(
    "values", [TIMES, TIMES + 0.5, TIMES + np.arange(8.0) / 8], ids=["whole", "half", "parts"]
)
def test_large_numbers_whose_differences_float32_does_not_represent_are_refused(
    tmp_path: Path, values: np.ndarray
) -> None:
    x, y = np.stack([np.ones(8), values], 1), np.arange(8) % 2
    np.savez(tmp_path / "times.npz", x=x, y=y)
    rows = [f"1,{value!r},{k}\n" for value, k in zip(values.tolist(), y, strict=True)]
    (tmp_path / "times.csv").write_text("a,time,y\n" + "".join(rows))
    with pytest.raises(TargetError, match="the column 'time' of .* first in row"):
        open_data(str(tmp_path / "times.csv"), label="y", expected=DeclaredData(lenient=True))
    bounds = DeclaredData(bounds=Bounds(0.0, 2e9))
    with pytest.raises(TargetError, match=r"times.npz have the value 1700000\d+\.\d+ in feature 1"):
        open_data(str(tmp_path / "times.npz"), expected=bounds)
    np.savez(tmp_path / "spread.npz", x=np.stack([np.ones(8), np.arange(8) * 1e8 + 0.3], 1), y=y)
    assert open_data(str(tmp_path / "spread.npz"), expected=bounds).read(0, 8).x.max() == np.float32(
        7e8 + 0.3
    )


def test_a_stream_needs_no_label_column_and_no_threat_is_advised(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,land\n1,AT\n2,DE\n")
    expected = DeclaredData(lenient=True, needs_labels=False, has_threat=False)
    assert open_data(str(tmp_path / "t.csv"), drop=("land",), expected=expected).y.tolist() == [-1, -1]
    with pytest.raises(TargetError, match="1 column .* land") as caught:
        open_data(str(tmp_path / "t.csv"), expected=expected)
    assert "threat" not in caught.value.message
