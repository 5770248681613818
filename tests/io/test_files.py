"""Files that a user names: refused with the reason and the way out."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from shutil import rmtree

import pytest
from PIL import Image

from holdfast.certifiers.vnnlib.reading import read_query
from holdfast.core.errors import TargetError
from holdfast.guard.calibration import read_calibration
from holdfast.io.data.data import open_data
from holdfast.io.data.npz import Npz, read_trigger
from holdfast.io.data.pictures import open_samples
from holdfast.io.files import existing, readable_file, sha256_of_file, text_of_file
from holdfast.io.models.factories import function_from_file
from holdfast.io.models.models import CARD
from holdfast.io.models.weights import state_dict_content
from holdfast.io.onnx.reading import onnx_content
from holdfast.io.remote.operator_port import read_key
from holdfast.io.texts_of_users import text_edits
from holdfast.settings.guard_settings import read_guard_settings
from holdfast.settings.table_rules import table_threat
from holdfast.settings.texts import load, read_labels
from holdfast.verbs.checked_settings import check_settings
from holdfast.verbs.opening.recipes import trained_by
from holdfast.verbs.settings import Assess


@pytest.mark.parametrize("wanted", [existing, readable_file])
def test_a_missing_name_is_refused_with_the_nearest_one_or_the_place(wanted, tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"x")
    with pytest.raises(
        TargetError, match=r"^model '.*wieghts.pt' does not exist \(did you mean '.*weights.pt'"
    ):
        wanted(tmp_path / "wieghts.pt", "model")
    with pytest.raises(TargetError, match=r"did you mean '.*weights.pt'"):
        open_data(str(tmp_path / "wieghts.pt"))
    with pytest.raises(TargetError, match=rf"does not exist in the folder '{tmp_path}'"):
        wanted(tmp_path / "other.csv", "data")
    with pytest.raises(TargetError, match="does not exist, and neither does its folder '.*gone'"):
        wanted(tmp_path / "gone" / "weights.pt", "model")
    for impossible in ("w" * 300, "w\0"):
        with pytest.raises(TargetError, match="does not exist"):
            wanted(tmp_path / impossible, "model")


def test_a_folder_is_there_and_no_file(tmp_path: Path) -> None:
    assert existing(tmp_path, "data") == tmp_path
    with pytest.raises(TargetError, match="is a folder; a file was expected"):
        readable_file(tmp_path, "data")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.pt"
    empty.touch()
    with pytest.raises(TargetError, match="is empty"):
        readable_file(empty, "model")
    empty.write_bytes(b"x")
    assert readable_file(empty, "model") == empty


def readers(path: str) -> dict[str, Callable[[], object]]:
    """Every way in which a command reads a file with any name as a whole."""
    return {
        "bounds": lambda: check_settings({"bounds": f"@{path}"}, "here", kind=Assess),
        "class names": lambda: check_settings({"class_names": f"@{path}"}, "here", kind=Assess),
        "configuration": lambda: load(Path(path)),
        "guard": lambda: read_guard_settings(Path(path)),
        "calibration": lambda: read_calibration(Path(path)),
        "labels": lambda: read_labels(Path(path), ()),
        "rules": lambda: table_threat(file=path),
        "words": lambda: text_edits(synonyms=1, file=path),
        "trigger": lambda: read_trigger(path),
        "key": lambda: read_key(path),
        "query": lambda: read_query(Path(path)),
        "code": lambda: function_from_file(f"{path}:f"),
        "arrays": lambda: Npz(Path(path)),
        "weights": lambda: state_dict_content(Path(path)),
        "model": lambda: onnx_content(Path(path)),
        "digest": lambda: sha256_of_file(Path(path)),
        "card": lambda: trained_by(str(Path(path).with_name("model.safetensors"))),
    }


@pytest.mark.skipif(os.name == "nt", reason="no pipes and devices with names in folders")
@pytest.mark.parametrize("name", readers(""))
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_every_reader_refuses_what_is_no_regular_file_and_does_not_wait(name, kind, tmp_path: Path) -> None:
    path = tmp_path / CARD
    (tmp_path / "model.safetensors").touch()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(TargetError, match="is not a regular file, but a device, a pipe or a socket"):
        readers(str(path))[name]()


@pytest.mark.parametrize(
    "name",
    ["bounds", "class names", "configuration", "labels", "rules", "words", "calibration", "key", "card"],
)
def test_every_reader_of_a_text_has_a_limit_of_its_size(name, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    path = tmp_path / CARD
    with path.open("wb") as file:
        file.truncate(2**33)  # takes no space on the disk
    with pytest.raises(TargetError, match=r"has 8,590 MB; at most \S+ MB is read"):
        readers(str(path))[name]()


@pytest.mark.skipif(os.name == "nt", reason="no pipes with names in folders")
def test_a_file_that_is_exchanged_for_a_pipe_before_it_is_opened_is_refused(
    tmp_path: Path, monkeypatch
) -> None:
    path, pipe = tmp_path / "names.txt", tmp_path / "pipe"
    path.write_text("cat\ndog\n")
    os.mkfifo(pipe)
    opens = os.open

    def exchanged(place, *arguments):
        pipe.replace(path)
        return opens(place, *arguments)

    monkeypatch.setattr(os, "open", exchanged)
    with pytest.raises(TargetError, match="is not a regular file"):
        text_of_file(path, "file of class names")


def test_other_text_than_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(
        TargetError, match=r"names.txt' is no text in UTF-8 \(.* at byte 3\); save it as UTF-8"
    ):
        text_of_file(tmp_path / "names.txt", "file")


LINKS = {
    "a file": ("a/x.png", "{out}/x.png"),
    "a folder of a class": ("b", "{out}"),
    "a folder of a split": ("test", "{out}/.."),
    "a chain": ("a/x.png", "../b/y.png"),
    "a path with ..": ("a/x.png", "../../out/x.png"),
    "a device": ("a/x.png", "/dev/zero"),
    "the folder above": ("b", "../.."),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of images of two classes, and beside it another one, `out`."""
    for place in ("in/a", "in/b", "out"):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2)).save(tmp_path / place / "0.png")
    Image.new("L", (2, 2), 255).save(tmp_path / "out" / "x.png")
    return tmp_path / "in"


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
@pytest.mark.parametrize("name", LINKS)
def test_a_link_that_leads_out_of_a_folder_of_images_is_refused(name, folder: Path) -> None:
    place, target = LINKS[name]
    out = folder.parent / "out"
    if place == "b":
        rmtree(folder / "b")
    if name == "a chain":
        (folder / "b" / "y.png").symlink_to(out / "x.png")
    (folder / place).symlink_to(target.format(out=out))
    with pytest.raises(TargetError, match=r"is a link to .*, which is outside of the folder") as refused:
        open_data(str(folder))
    assert refused.value.on_command_line().endswith("give --follow-links to read it")
    samples = folder / "a"
    if place.startswith("a/"):
        with pytest.raises(TargetError, match="is outside of the folder"):
            open_samples(samples)
    if name in ("a file", "a chain", "a path with .."):
        assert open_data(str(folder), follow_links=True).read(0, 9).x.max() == 1
        assert len(open_samples(samples, follow_links=True)) == 2
    if name == "a device":
        with pytest.raises(TargetError, match="is not a regular file"):
            open_data(str(folder), follow_links=True)


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_inside_of_a_folder_of_images_and_to_the_folder_are_followed(folder: Path) -> None:
    whole = open_data(str(folder)).digest
    (folder.parent / "link").symlink_to(folder)
    (folder / "README").symlink_to("/dev/zero")  # which is not read
    assert open_data(str(folder.parent / "link")).digest == whole
    (folder / "a" / "1.png").symlink_to("../b/0.png")
    assert len(open_data(str(folder))) == 3
    (folder / "a" / "1.png").unlink()
    (folder / "a" / "1.png").symlink_to("1.png")
    with pytest.raises(TargetError, match="is a link to '1.png', which does not exist"):
        open_data(str(folder))
    (folder / "a" / "1.png").unlink()
    os.mkfifo(folder / "a" / "1.png")
    with pytest.raises(TargetError, match="is not a regular file"):
        open_data(str(folder))


def test_lists_of_words_have_limits(tmp_path: Path) -> None:
    path = tmp_path / "words.json"
    for content, message in (
        ({"synonyms": {"a": [f"w{k}" for k in range(1001)]}}, "1,001 synonyms of one word; at most 1,000"),
        ({"synonyms": {"a": ["w" * 1001]}}, "of 1,001 characters; a word of at most 1,000"),
        ({"synonyms": {"a": ["b"]}, "protect": ["c"] * 1001}, "1,001 patterns in protect; at most 1,000"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(TargetError, match=message):
            text_edits(synonyms=1, file=str(path))
