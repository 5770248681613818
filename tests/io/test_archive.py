"""Weights of strangers: nothing runs, nothing inflates, and the message says what was found."""

import io
import os
import pickle
import tarfile
import time
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from holdfast.core.errors import TargetError
from holdfast.io.models.weights import check_archive, read_weights
from holdfast.io.sandbox.weights import state_dict


class Bomb:
    """A pickle that would run a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def zipped(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.mark.slow
def test_a_state_dict_is_read_back_exactly(tmp_path: Path) -> None:
    state = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).state_dict()
    for legacy in (False, True):
        torch.save(state, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
        found = read_weights(tmp_path / "w.pt")
        assert found.tensors.keys() == state.keys()
        assert all(torch.equal(found.tensors[name], state[name]) for name in state)
        assert found.notes == ()


def test_nestings_are_entered_and_noted() -> None:
    state = nn.Linear(3, 4).state_dict()
    tensors, notes = state_dict({"epoch": 3, "state_dict": [state]})
    assert set(tensors) == {"weight", "bias"}
    assert any("'state_dict'" in note for note in notes)


@pytest.mark.usefixtures("in_this_process")
def test_tied_weights_are_read(tmp_path: Path) -> None:
    shared = torch.ones(2, 2)
    tied = {"a": shared, "b": shared, "c": shared.t(), "d": shared[0], "e": nn.Parameter(shared)}
    torch.save(tied, tmp_path / "w.pt")
    assert set(read_weights(tmp_path / "w.pt").tensors) == set(tied)


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [0, 4])
def test_a_plain_pickle_is_refused_with_the_reason_and_the_way_out(tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb(marker), protocol=protocol))
    reason = (
        r"(wants code: it would call \w+\.system|torch\.save did not write \(it contains operation \d+\))\. "
    )
    with pytest.raises(TargetError, match=reason + r".*save model\.state_dict\(\)"):
        read_weights(tmp_path / "plain.pt")
    assert not marker.exists()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_pickle_that_wants_code_is_refused_and_nothing_runs(tmp_path: Path, *, legacy: bool) -> None:
    marker = tmp_path / "ran"
    torch.save({"weight": Bomb(marker)}, tmp_path / "bomb.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(TargetError, match=r"wants code: it would call \w+\.system"):
        read_weights(tmp_path / "bomb.pt")
    assert not marker.exists()


@pytest.mark.slow
def test_a_bare_pickle_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "bomb.pt").write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(TargetError):
        read_weights(tmp_path / "bomb.pt")
    assert not marker.exists()


@pytest.mark.slow
def test_a_pickle_inside_a_pickle_is_not_opened(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    inner = io.BytesIO()
    torch.save(Bomb(marker), inner)
    torch.save(
        {"state_dict": {"weight": torch.ones(1), "payload": Bomb(marker)}, "extra": inner.getvalue()},
        tmp_path / "b.pt",
    )
    with pytest.raises(TargetError, match="wants code"):
        read_weights(tmp_path / "b.pt")
    assert not marker.exists()


@pytest.mark.usefixtures("in_this_process")
def test_a_whole_module_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "net.pt")
    with pytest.raises(TargetError, match=r"torch\.nn\.modules\.container\.Sequential.*state_dict"):
        read_weights(tmp_path / "net.pt")


def test_a_zip_bomb_is_refused_before_anything_is_inflated(tmp_path: Path) -> None:
    bomb = zipped(tmp_path / "bomb.pt", {"archive/data/0": bytes(200_000_000)}, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 250_000
    start = time.process_time()
    with pytest.raises(TargetError, match=r"compressed \(0\.19 MB that would inflate to 200 MB\)"):
        read_weights(bomb)
    assert time.process_time() - start < 0.1  # inflating 200 MB takes several times that


@pytest.mark.parametrize("name", ["/etc/passwd", "../up", "a/../../up", "C:/up", "..\\up"])
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    path = zipped(tmp_path / "w.pt", {"archive/data.pkl": b"x"})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(zipfile.ZipInfo(name), b"x")
    with pytest.raises(TargetError, match="leads out of the archive"):
        check_archive(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicates_links_and_totals_are_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "w.pt", {"a/data.pkl": b"x"})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a/data.pkl", b"y")
    with pytest.raises(TargetError, match="twice"):
        check_archive(path)
    link = zipfile.ZipInfo("a/link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "l.pt", "w") as archive:
        archive.writestr(link, b"/etc/passwd")
    with pytest.raises(TargetError, match="symbolic link"):
        check_archive(tmp_path / "l.pt")
    big = zipped(tmp_path / "b.pt", {"a/0": bytes(600), "a/1": bytes(600)})
    with pytest.raises(TargetError, match="at most"):
        check_archive(big, max_bytes=1000)
    check_archive(big, max_bytes=1200)


@pytest.mark.usefixtures("in_this_process")
def test_damage_is_named(tmp_path: Path) -> None:
    torch.save(nn.Linear(50, 50).state_dict(), tmp_path / "w.pt")
    whole = (tmp_path / "w.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TargetError, match="truncated"):
        read_weights(tmp_path / "cut.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    with pytest.raises(TargetError, match="empty"):
        read_weights(tmp_path / "empty.pt")
    (tmp_path / "noise.pt").write_bytes(bytes(range(256)) * 8)
    with pytest.raises(TargetError, match=r"noise\.pt"):
        read_weights(tmp_path / "noise.pt")
    with pytest.raises(TargetError, match="is a folder"):
        read_weights(tmp_path)
    with pytest.raises(TargetError, match=r"does not exist \(did you mean '.*empty.pt'"):
        read_weights(tmp_path / "empt.pt")


@pytest.mark.usefixtures("in_this_process")
def test_the_tar_format_of_old_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "w.pt", "w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(TargetError, match=r"w\.pt"):
        read_weights(tmp_path / "w.pt")


@pytest.mark.slow
def test_a_tensor_far_larger_than_its_file_meets_the_memory_limit(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1).expand(10**10)}, tmp_path / "w.pt")
    assert (tmp_path / "w.pt").stat().st_size < 10_000
    with pytest.raises(TargetError, match="memory"):
        read_weights(tmp_path / "w.pt")


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1, 2], 7], ids=repr)
def test_a_file_without_tensors_is_refused_with_its_content(content: object) -> None:
    with pytest.raises(TypeError, match="contains"):
        state_dict(content)


@pytest.mark.slow
def test_real_checkpoints_are_read(models_folder: Path) -> None:
    found = read_weights(models_folder / "cifar_resnet20.th")
    assert len(found.tensors) == 97
    assert found.notes == ("the state dict was taken from the entry 'state_dict'",)


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated; its files are still about
def test_torchscript_is_refused_by_name(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.rand(1, 2)), tmp_path / "w.pt")
    with pytest.raises(TargetError, match="TorchScript archive, which carries code"):
        read_weights(tmp_path / "w.pt")


@pytest.mark.usefixtures("in_this_process")
def test_a_sparse_tensor_with_indices_outside_is_refused_before_it_is_made_dense(tmp_path):
    def coo(index):
        return torch.sparse_coo_tensor(torch.tensor([[index]]), torch.ones(1), (4,), check_invariants=False)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that its compressed layouts are in beta
        csr = torch.sparse_csr_tensor(
            torch.tensor([0, 1]), torch.tensor([4]), torch.ones(1), (1, 4), check_invariants=False
        )
        nested = torch.nested.nested_tensor([torch.rand(2), torch.rand(3)])
    for tensor, said in ((coo(4), "found index 4"), (coo(-1), "negative index -1"), (csr, "col_indices")):
        torch.save({"w": tensor}, tmp_path / "w.pt")
        with pytest.raises(TargetError, match=f"w.pt' is damaged.*{said}"):
            read_weights(tmp_path / "w.pt")
    torch.save({"w": nested}, tmp_path / "w.pt")
    with pytest.raises(TargetError, match="contains the nested tensor 'w'"):
        read_weights(tmp_path / "w.pt")
    torch.save({"w": coo(3)}, tmp_path / "w.pt")
    assert read_weights(tmp_path / "w.pt").tensors["w"].tolist() == [0, 0, 0, 1]
