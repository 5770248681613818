"""Files that a user names: refused with the reason and the way out."""

from pathlib import Path

import pytest

from holdfast.core.errors import TargetError
from holdfast.io.data.data import open_data
from holdfast.io.files import existing, readable_file


@pytest.mark.parametrize("wanted", [existing, readable_file])
def test_what_is_not_there_is_refused_with_the_nearest_name_or_the_place(wanted, tmp_path: Path) -> None:
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
