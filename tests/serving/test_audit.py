"""Audit chains: what was written is verified, and every change, gap or missing chain is detected."""

import errno
import json
import os
import stat

import pytest

from holdfast.core.chain import Link
from holdfast.core.errors import TargetError
from holdfast.serving.audit_chain import AuditKey, ChainFile, end_record, interrupt, lines, start_record
from holdfast.serving.audit_folder import AuditFolder, verify_audit
from holdfast.store.records import line_of


def folder(path):
    """An audit folder with two workers: one drained, and one that died with an open request."""
    audit = AuditFolder.open(path, {"model": "m"})
    key = AuditKey.of(path)
    for number, requests in enumerate(("ab", "cd")):
        place = audit.new_worker()
        chain = ChainFile(place)
        chain.add([start_record(request, key.pseudonym("alice"), 1, "0" * 32) for request in requests])
        answered = requests if number == 0 else requests[:1]
        chain.add([end_record("answered", request, status=200, set="s") for request in answered])
        chain.close()
        audit.ended(place, reason="the worker died")
    return audit


def test_all_chains_are_verified_together(tmp_path):
    audit = folder(tmp_path / "audit")
    verified = verify_audit(tmp_path / "audit")
    assert (verified.chains, verified.answered, verified.interrupted, verified.open) == (3, 3, 1, 0)
    assert "runs" in verified.notes[0]
    audit.close()
    assert verify_audit(tmp_path / "audit").notes == ()


def test_lines_are_those_of_other_chains():
    contents = [{"kind": "started", "request": 'é"\\', "rows": 1}, {"kind": "x", "list": [1.5, None]}]
    data, head = lines("0" * 64, contents)
    first = Link("0" * 64, contents[0])
    assert data == line_of(first) + line_of(Link(first.digest, contents[1]))
    assert head == Link(first.digest, contents[1]).digest


def test_nothing_on_the_disk_shows_principals_or_is_open_to_others(tmp_path):
    folder(tmp_path / "audit").close()
    files = [tmp_path / "audit.key", *(tmp_path / "audit").iterdir()]
    for file in files:
        assert b"alice" not in file.read_bytes()
        assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0, file
    assert AuditKey.of(tmp_path / "audit") == AuditKey.of(tmp_path / "audit")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda p: p.unlink(), "missing, was shortened"),
        (lambda p: p.write_bytes(b"".join(p.read_bytes().splitlines(keepends=True)[:-1])), "was shortened"),
        (lambda p: p.write_bytes(p.read_bytes().replace(b"200", b"201")), "was changed"),
        (lambda p: p.write_bytes(b"".join(p.read_bytes().splitlines(keepends=True)[1:])), "was changed"),
        (lambda p: p.rename(p.with_name("x.jsonl")), "missing"),
    ],
)
@pytest.mark.parametrize("worker", [1, 2])
def test_a_changed_shortened_or_missing_chain_is_detected(tmp_path, damage, reason, worker):
    folder(tmp_path / "audit").close()
    (place,) = (tmp_path / "audit").glob(f"*.worker-{worker}.jsonl")
    damage(place)
    with pytest.raises(TargetError, match=reason):
        verify_audit(tmp_path / "audit")


def test_a_chain_that_was_shortened_while_its_worker_runs_is_detected(tmp_path):
    audit = AuditFolder.open(tmp_path / "audit", {})
    place = audit.new_worker()
    chain = ChainFile(place)
    for request in "abc":
        chain.add([start_record(request, "", 1, ""), end_record("answered", request, status=200)])
    assert chain.flushed[0] == 0
    chain.flush()
    for _ in range(2):
        audit.record_heads({place.name: chain.flushed})
    chain.add([start_record("d", "", 1, "")])
    verified = verify_audit(tmp_path / "audit")
    assert (verified.answered, verified.open, verified.records) == (
        3,
        1,
        10,
    )  # an unchanged head is recorded once
    lines_of_chain = place.read_bytes().splitlines(keepends=True)
    place.write_bytes(b"".join(lines_of_chain[:6]))
    verify_audit(tmp_path / "audit")  # what was not recorded may be lost
    place.write_bytes(b"".join(lines_of_chain[:5]))
    chain.close()
    audit.ended(place, reason="the worker died")  # the end of a worker does not hide it
    with pytest.raises(TargetError, match=r"was shortened or replaced: .* recorded its record 6"):
        verify_audit(tmp_path / "audit")


def test_the_missing_chain_of_a_running_worker_is_detected(tmp_path):
    audit = AuditFolder.open(tmp_path / "audit", {})
    audit.new_worker().unlink()
    with pytest.raises(TargetError, match="missing"):
        verify_audit(tmp_path / "audit")


def test_a_rewritten_chain_differs_from_what_the_server_recorded(tmp_path):
    folder(tmp_path / "audit").close()
    (place,) = (tmp_path / "audit").glob("*.worker-1.jsonl")
    contents = [json.loads(line)["content"] for line in place.read_bytes().splitlines()]
    place.write_bytes(lines("0" * 64, [{**content, "time": 0} for content in contents])[0])
    with pytest.raises(TargetError, match="replaced"):
        verify_audit(tmp_path / "audit")


def test_a_missing_server_chain_is_noticed_by_the_next_one(tmp_path):
    folder(tmp_path / "audit").close()
    AuditFolder.open(tmp_path / "audit", {}).close()
    verify_audit(tmp_path / "audit")
    first = min((tmp_path / "audit").glob("*.server.jsonl"))
    (worker,) = (tmp_path / "audit").glob("*.worker-1.jsonl")
    first.unlink()
    with pytest.raises(TargetError, match="missing"):
        verify_audit(tmp_path / "audit")
    assert worker.exists()


def test_the_chains_of_a_killed_server_are_completed_by_the_next_one(tmp_path, monkeypatch):
    audit = AuditFolder.open(tmp_path / "audit", {})
    place = audit.new_worker()
    chain = ChainFile(place)
    chain.add([start_record("a", "", 1, ""), start_record("b", "", 1, "")])
    chain.add([end_record("answered", "a", status=200)])
    with pytest.raises(OSError, match="still writes"):  # its records would overwrite the one that is added
        interrupt(place, "", wait_s=0.0)
    chain.close()
    with place.open("ab") as file:
        file.write(b'{"content":{"kind":"answered"')  # what a kill leaves
    with audit.chain.path.open("ab") as file:
        file.write(b'{"content')
    audit.chain.close()
    assert verify_audit(tmp_path / "audit").open == 1
    monkeypatch.setattr("holdfast.store.leases.Owner.alive", lambda owner: False)
    following = AuditFolder.open(tmp_path / "audit", {})
    assert following.recovered == 1
    verified = verify_audit(tmp_path / "audit")
    assert (verified.answered, verified.interrupted, verified.open) == (1, 1, 0)


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(TargetError, match="contains other files"):
        AuditFolder.open(tmp_path, {})


@pytest.fixture
def full_disk(monkeypatch):
    """A disk that accepts half of each write and then is full, while `full` is true."""
    state = {"full": False}
    pwrite = os.pwrite

    def write(handle, data, at):
        if state["full"]:
            if len(data) < 20:
                raise OSError(errno.ENOSPC, "No space left on device")
            return pwrite(handle, data[: len(data) // 2], at)
        return pwrite(handle, data, at)

    monkeypatch.setattr(os, "pwrite", write)
    return state


@pytest.mark.parametrize("fail_open", [False, True])
def test_a_full_disk_leaves_a_valid_chain(tmp_path, full_disk, fail_open):
    audit = AuditFolder.open(tmp_path / "audit", {})
    place = audit.new_worker()
    chain = ChainFile(place, fail_open=fail_open)
    chain.add([start_record("a", "", 1, "")])
    full_disk["full"] = True
    for record in (end_record("answered", "a", status=200), start_record("b", "", 1, "")):
        if fail_open:
            chain.add([record])
        else:
            with pytest.raises(OSError, match="No space"):
                chain.add([record])
    full_disk["full"] = False
    chain.add([end_record("answered", "b", status=200)] if fail_open else [start_record("b", "", 1, "")])
    verified = verify_audit(tmp_path / "audit")
    assert verified.lost == (2 if fail_open else 0) and verified.open == (1 if fail_open else 2)
    chain.close()
    full_disk["full"] = True
    with pytest.raises(
        TargetError, match=r"the disk is full; free some space; with --on-audit-failure answer"
    ):
        audit.new_worker()
    full_disk["full"] = False
    audit.close()
    last = verify_audit(tmp_path / "audit")
    assert (last.open, last.interrupted) == (0, verified.open)
