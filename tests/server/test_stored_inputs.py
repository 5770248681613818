"""Flagged inputs are stored encrypted, expire, and are deleted by principal and by request."""

import pytest
import torch

from holdfast.core.errors import TargetError
from holdfast.guard.rules import Action, Mode, RequestDecision, RowDecision, Score
from holdfast.guard.stored_inputs import StoredInputs
from holdfast.runs.store.encryption import Seal

pytest.importorskip("cryptography")


class Clock:
    now = 1_000_000.0

    def __call__(self):
        return self.now


def decision(request, principal="client", fired=(True, False), dtype=torch.float32):
    x = torch.arange(2 * 6).view(2, 6).to(dtype)
    rows = tuple(
        RowDecision((Score("energy", torch.inf, each, Mode.OBSERVE, Action.FLAG),)) for each in fired
    )
    return RequestDecision(request, principal, rows, x=x)


def opened(folder, key=b"k" * 32, **settings):
    return StoredInputs(folder, Seal(key), clock=settings.pop("clock", Clock()), **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_the_fired_rows_are_read_again_by_the_owner_of_the_key_only(tmp_path, dtype):
    store = opened(tmp_path / "inputs")
    assert store.add(decision("a" * 32, "secret-client", (False, True), dtype))
    assert store.add(decision("b" * 32, fired=(False, False)))
    (stored,) = opened(tmp_path / "inputs").read()
    assert stored.x.dtype == dtype and torch.equal(stored.x, decision("", dtype=dtype).x[1:])
    assert (stored.request, stored.rows, stored.scores) == ("a" * 32, (1,), ({"energy": torch.inf},))
    (file,) = (tmp_path / "inputs").iterdir()
    assert file.stat().st_mode & 0o077 == 0 and "secret-client" not in file.name
    with pytest.raises(TargetError, match="encrypted with key"):
        list(opened(tmp_path / "inputs", b"l" * 32).read())
    file.rename(file.with_name(file.name.replace("a" * 32, "c" * 32)))
    with pytest.raises(TargetError, match="changed or truncated"):
        list(opened(tmp_path / "inputs").read())


def test_inputs_expire_and_the_oldest_go_first_if_the_folder_is_too_large(tmp_path):
    clock = Clock()
    store = opened(tmp_path, clock=clock, retention_s=130)
    for k in range(4):
        store.add(decision(f"{k:032d}"))
        clock.now += 40
    assert store.purge() == 1
    assert [int(each.request) for each in store.read()] == [1, 2, 3]
    size = next(tmp_path.iterdir()).stat().st_size
    opened(tmp_path, clock=clock, retention_s=1000, max_bytes=2 * size)
    assert [int(each.request) for each in store.read()] == [2, 3]


def test_inputs_are_deleted_by_principal_and_by_request(tmp_path):
    store = opened(tmp_path)
    for k in range(4):
        store.add(decision(f"{k:032d}", principal="even" if k % 2 == 0 else "odd"))
    assert store.delete(principal="even") == 2
    assert store.delete(request=f"{1:032d}") == 1
    assert [int(each.request) for each in store.read()] == [3]


def test_other_files_of_the_folder_are_left_alone(tmp_path):
    inputs, other = tmp_path / "inputs", tmp_path / "other"
    other.write_text("x")
    inputs.mkdir()
    names = ("x-0-0.inputs", "-1-00-00.inputs", "000000000000-ab-cd.inputs", "000000000000-ab-ce.inputs")
    (inputs / names[0]).write_text("x")
    (inputs / names[1]).write_text("x")
    (inputs / names[2]).symlink_to(other)
    (inputs / names[3]).mkdir()
    store = opened(inputs)
    assert store.purge() == 0 and list(store.read()) == [] and store.delete(request="cd") == 0
    assert sorted(file.name for file in inputs.iterdir()) == sorted(names) and other.read_text() == "x"


def test_a_request_is_decided_although_its_inputs_cannot_be_stored(tmp_path):
    store = opened(tmp_path / "inputs")
    (tmp_path / "inputs").rmdir()
    assert not store.add(decision("a" * 32)) and store.failures == 1
