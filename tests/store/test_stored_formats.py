"""Pools, audit folders, key files and calibrations that earlier versions wrote are opened, verified and continued.

The folders in `stored_formats` were written before the logs of runs, pools and servers had one implementation. Two
servers wrote the audit folder; the second one and a worker of it were killed in the middle of a record.
"""

import shutil
from pathlib import Path

import pytest

from holdfast.core.errors import TargetError
from holdfast.guard.calibration import read_calibration, write_calibration
from holdfast.rotation.ledger import verify_pool
from holdfast.runs.store import Pool
from holdfast.runs.store.encryption import KEY_VARIABLE
from holdfast.server.audit_chain import AuditKey
from holdfast.server.audit_folder import AuditFolder, server_records, verify_audit
from holdfast.server.keys import KeyFile, add_key, read_keys
from store.lives import weights

STORED = Path(__file__).parent / "stored_formats"
POOL_HEAD = "1aaec21cafbdafdee1d957e0c1308a579ab9621c9df279d25ec22273482e257f"
AUDIT_HEAD = "25386dbdca8a4e642842f113e9b25e4b9a7cf459a719e5dc63a6c13a67ab058b"
API_KEY = "hf_wh2MRKdItaHbWrRMS-uf_3oN4OXW3tRuroMcqV-TNn8"


@pytest.fixture
def stored(tmp_path):
    copy = shutil.copytree(STORED, tmp_path / "stored")
    for file in copy.rglob("*"):
        file.chmod(0o700 if file.is_dir() else 0o600)
    return copy


def test_a_stored_pool_is_verified_and_continued(stored, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "5a" * 32)
    verified = verify_pool(stored / "pool", expect_head=POOL_HEAD)
    assert (verified.head, verified.entries, verified.sets) == (POOL_HEAD, 14, 3) and verified.authenticated
    assert [status for _, status in verified.members] == ["exposed", "serving", "admitted", "refused"]
    pool = Pool.open(stored / "pool")
    assert float(pool.weights(pool.serving.name)["b"]) == 1 and [*pool.ledger.terms[0].answers.values()] == [
        5
    ]
    assert float(pool.kept("generator").columns["b"]) == 7
    before = pool.ledger.path.read_bytes()
    pool.admit(pool.add(weights(4), {}))
    assert pool.ledger.path.read_bytes().startswith(before)
    assert verify_pool(stored / "pool", expect_head=POOL_HEAD).entries == 16
    monkeypatch.delenv(KEY_VARIABLE)
    assert not verify_pool(stored / "pool").authenticated


def test_a_stored_ledger_is_protected_and_its_incomplete_end_is_removed(stored, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "5a" * 32)
    path, head = stored / "pool" / "ledger.jsonl", stored / "pool" / "ledger.head"
    whole, expected = path.read_bytes(), head.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(whole + lines[-1][:70])
    assert Pool.open(stored / "pool").ledger.head == POOL_HEAD
    assert path.read_bytes() == whole and head.read_bytes() == expected
    for damaged in (
        lines[:-1],
        [*lines[:4], *lines[5:]],
        [line.replace(b"stolen", b"leaked") for line in lines],
    ):
        path.write_bytes(b"".join(damaged))
        with pytest.raises(TargetError, match="entr(y|ies)"):
            verify_pool(stored / "pool")


def test_a_stored_audit_folder_is_verified_and_continued(stored):
    verified = verify_audit(stored / "audit", expect_head=AUDIT_HEAD)
    assert (verified.chains, verified.records, verified.head) == (6, 30, AUDIT_HEAD)
    assert (verified.answered, verified.interrupted, verified.open) == (6, 1, 1)
    assert "was killed" in verified.notes[0]
    assert [record["step"] for record in server_records(stored / "audit", ("adapt",))] == ["begin"]
    assert AuditKey.of(stored / "audit", create=False).pseudonym("ann")
    before = {file.name: file.read_bytes() for file in (stored / "audit").glob("*.jsonl")}
    audit = AuditFolder.open(stored / "audit", {"model": "m"})
    assert audit.recovered == 1
    audit.close()
    after = verify_audit(stored / "audit", expect_head=AUDIT_HEAD)
    assert (after.interrupted, after.open, after.notes) == (2, 0, ())
    for name, content in before.items():
        assert (stored / "audit" / name).read_bytes().startswith(content[: content.rfind(b"\n") + 1])


def test_a_stored_key_file_is_read_and_extended(stored):
    assert [key.name for key in read_keys(stored / "keys.json")] == ["ann"]
    assert KeyFile(stored / "keys.json").authenticated(f"Bearer {API_KEY}".encode(), "infer").name == "ann"
    add_key(stored / "keys.json", "bob", ["infer"])
    assert [key.name for key in read_keys(stored / "keys.json")] == ["ann", "bob"]


def test_a_stored_calibration_is_read_and_written_with_equal_bytes(stored, tmp_path):
    calibration = read_calibration(stored / "calibration.json")
    assert calibration.thresholds == {"energy": 1.5, "range": float("inf")}
    write_calibration(calibration, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (stored / "calibration.json").read_bytes()
