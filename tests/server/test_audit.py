"""Audit chains: what was written is verified, and every change, gap or missing chain is detected."""

import copy
import errno
import json
import os
import stat

import pytest

from holdfast.cli.app import run
from holdfast.core.chain import GENESIS, canonical, digest
from holdfast.core.errors import TargetError, UsageError
from holdfast.guard.rules import Action, Mode, RequestDecision, RowDecision, Score
from holdfast.server import audit_folder
from holdfast.server.audit_chain import (
    SERVER,
    SUFFIX,
    AuditKey,
    ChainFile,
    answered,
    end_chain,
    started,
    timed_record,
)
from holdfast.server.audit_folder import AuditFolder, verify_audit
from store.forging import chained


def start_record(request, principal, rows, digest):
    """The content of the record of a request before the model is called."""
    return json.loads(started(request, principal, rows, digest, 1.5))


def folder(path):
    """An audit folder with two workers: one drained, and one that died with an open request."""
    audit = AuditFolder.open(path, {"model": "m"})
    key = AuditKey.of(path)
    for number, requests in enumerate(("ab", "cd")):
        place = audit.new_worker()
        chain = ChainFile(place)
        chain.add([start_record(request, key.pseudonym("alice"), 1, "0" * 32) for request in requests])
        answered = requests if number == 0 else requests[:1]
        chain.add([timed_record("answered", request=request, status=200, set="s") for request in answered])
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


def test_records_of_requests_are_canonical_texts():
    """Also of names and numbers that JSON writes in another way than Python."""
    name = 'é"\\\n\u2028'
    scores = [("b", 1e-6), (name, -0.0), ("a", 2.5e9), ("c", float("inf")), ("d", float("nan")), ("e", 1e22)]
    row = RowDecision(tuple(Score(rule, v, v > 1, Mode.ENFORCE, Action.FLAG) for rule, v in scores))
    decisions = (
        RequestDecision(name, "", (row, RowDecision(), row)),
        RequestDecision("r", "", (), notes={"z": name, "a": [1, None]}),
    )
    texts = [started(name, name, 2, name, 1.0)]
    texts += [answered(each.request, each, Action.LABEL_ONLY, 200, name, 3, 1e9) for each in decisions]
    assert [canonical(json.loads(text)) for text in texts] == texts
    rows = json.loads(texts[1])["rows"]
    assert [action for action, _ in rows] == ["flag", "flag"]
    assert rows[0][1] == {
        "a": [2.5e9, True, "enforce"],
        "b": [1e-6, False, "enforce"],
        "c": ["inf", True, "enforce"],
        "d": ["nan", False, "enforce"],
        "e": [1e22, True, "enforce"],
        name: [0.0, False, "enforce"],
    }


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
        (
            lambda p: p.write_bytes(b"".join(p.read_bytes().splitlines(keepends=True)[1:])),
            "record 1 of .* the one before",
        ),
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
        chain.add([start_record(request, "", 1, ""), timed_record("answered", request=request, status=200)])
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
    place.write_bytes(chained("0" * 64, [{**content, "time": 0} for content in contents])[0])
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
    chain.add([timed_record("answered", request="a", status=200)])
    with pytest.raises(OSError, match="still writes"):  # its records would overwrite the one that is added
        end_chain(place, wait_s=0.0)
    chain.close()
    with place.open("ab") as file:
        file.write(b'{"content":{"kind":"answered"')  # what a kill leaves
    with audit.chain.path.open("ab") as file:
        file.write(b'{"content')
    audit.chain.close()
    assert verify_audit(tmp_path / "audit").open == 1
    monkeypatch.setattr("holdfast.runs.store.leases.Owner.alive", lambda owner: False)
    following = AuditFolder.open(tmp_path / "audit", {})
    assert following.recovered == 1
    verified = verify_audit(tmp_path / "audit")
    assert (verified.answered, verified.interrupted, verified.open) == (1, 1, 0)


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(TargetError, match="contains other files"):
        AuditFolder.open(tmp_path, {})


# --- folders from elsewhere


RUN = "20200101T000000000000-abcdef"


def foreign(path, contents, run=RUN):
    """An audit folder from elsewhere with one server chain."""
    path.mkdir()
    (path / "audit.json").write_bytes(b'{"kind":"holdfast audit","schema":1}\n')
    owner = {"kind": "begin", "time": 1.0, "owner": ["elsewhere", 2**40, ""], "earlier": []}
    (path / f"{run}.server.jsonl").write_bytes(chained(GENESIS, [owner, *contents])[0])
    return path


def test_names_in_a_chain_are_not_used_as_paths(tmp_path):
    victim = tmp_path / f"{RUN}.worker-1.jsonl"
    victim.write_bytes(chained(GENESIS, [start_record("a", "", 1, "")])[0])
    before = victim.read_bytes()
    other_run = f"{RUN[:-1]}0.worker-1.jsonl"
    names = (
        str(victim),
        f"../{victim.name}",
        f"./{victim.name}",
        "x.jsonl",
        f"{victim.name}\n",
        other_run,
        None,
    )
    for number, name in enumerate(names):
        for record in (
            {"kind": "worker", "chain": name},
            {"kind": "closed", "chain": name, "records": 0, "head": GENESIS},
            {"kind": "heads", "chains": [[name, 0, GENESIS]]},
            {"kind": "begin", "owner": ["h", 1, ""], "earlier": [[name, 0, GENESIS]]},
        ):
            if name == other_run and record["kind"] == "begin":
                continue  # a server chain of this name may exist
            folder_of_others = foreign(tmp_path / f"{number}-{record['kind']}", [record])
            for read in (verify_audit, lambda path: AuditFolder.open(path, {})):
                with pytest.raises(TargetError):
                    read(folder_of_others)
    assert victim.read_bytes() == before


@pytest.mark.parametrize("place", ["worker-1.jsonl", "server.jsonl", "audit.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "hard link"])
def test_only_regular_files_of_the_folder_are_opened(tmp_path, place, kind):
    victim = tmp_path / "victim"
    path = foreign(tmp_path / "audit", [{"kind": "worker", "chain": f"{RUN}.worker-1.jsonl"}])
    file = path / (place if place == "audit.json" else f"{RUN}.{place}")
    content = file.read_bytes() if file.exists() else b""
    victim.write_bytes(content)
    file.unlink(missing_ok=True)
    make = {"pipe": os.mkfifo, "folder": os.mkdir, "link": lambda f: f.symlink_to(victim)}
    make.get(kind, lambda f: f.hardlink_to(victim))(file)
    if kind != "hard link":  # which is read like any file
        with pytest.raises(TargetError, match="a regular file was expected"):
            verify_audit(path)
    if kind != "hard link" or place != "audit.json":
        with pytest.raises(TargetError, match=r"a regular file was expected|has further names"):
            AuditFolder.open(path, {})
    assert victim.read_bytes() == content


@pytest.mark.parametrize("rest", [b"a1" * 32, b'{"content":[', b'{"content":{"kind":"x"}}'])
def test_what_is_not_the_rest_of_a_chain_is_not_removed(tmp_path, rest):
    path = foreign(tmp_path / "audit", [{"kind": "worker", "chain": f"{RUN}.worker-1.jsonl"}])
    worker = path / f"{RUN}.worker-1.jsonl"
    worker.write_bytes(rest)
    if rest.startswith(b'{"content":{"'):
        AuditFolder.open(path, {}).close()
        assert worker.read_bytes() == b""
        return
    with pytest.raises(TargetError, match="not the beginning of a record"):
        AuditFolder.open(path, {})
    assert worker.read_bytes() == rest


def test_only_the_canonical_text_of_a_record_is_valid(tmp_path):
    def forms(line):
        record = json.loads(line)
        yield line.replace(b'"content":{', b'"content":{},"content":{', 1)
        yield line.replace(b'"kind":"started"', b'"kind":"x","kind":"started"', 1)
        yield line.replace(b'"rows":1', b'"rows":1.0', 1)
        yield line.replace(b":", b": ", 1)
        yield line.replace(b"started", b"\\u0073tarted", 1)
        yield json.dumps({**record, "more": 1}, sort_keys=True, separators=(",", ":")).encode() + b"\n"
        yield line.replace(b"\n", b"\r\n")
        yield b"\xef\xbb\xbf" + line
        yield line.decode().encode("utf-16")[2:] + b"\n"

    folder(tmp_path / "audit").close()
    (place,) = (tmp_path / "audit").glob("*.worker-1.jsonl")
    first, *others = place.read_bytes().splitlines(keepends=True)
    for changed in forms(first):
        assert changed != first
        place.write_bytes(b"".join((changed, *others)))
        with pytest.raises(TargetError, match="record 1 of .* was changed"):
            verify_audit(tmp_path / "audit")


VALUES = (..., None, [], {}, "\ud800", -1, 2**70, 1.5, [[]], [["a", 1, 1]])
DAMAGED = (
    b"",
    b"\n",
    b"\0" * 100,
    b"\xff\xfe\n",
    b"null\n",
    b"[]\n",
    b'{"content":' + b"[" * 100_000 + b"\n",
)


def test_damaged_folders_are_refused_as_such(tmp_path):
    path, outcomes = foreign(tmp_path / "audit", []), []
    contents = [
        {
            "kind": "begin",
            "owner": ["elsewhere", 2**40, ""],
            "earlier": [[f"{RUN}.server.jsonl", 0, GENESIS]],
        },
        {"kind": "worker", "chain": f"{RUN}.worker-1.jsonl"},
        {"kind": "heads", "chains": [[f"{RUN}.worker-1.jsonl", 0, GENESIS]]},
        {"kind": "closed", "chain": f"{RUN}.worker-1.jsonl", "records": 0, "head": GENESIS},
        {"kind": "lost", "records": 0},
        start_record("a", "", 1, ""),
    ]

    def outcome(read):
        """The fault that is found; no other error is raised."""
        try:
            read()
        except TargetError as error:
            return str(error)
        return ""

    server = path / f"{RUN}.server.jsonl"
    for number, key in ((number, key) for number, content in enumerate(contents) for key in content):
        for value in VALUES:
            changed = copy.deepcopy(contents)
            changed[number][key] = value
            if value is ...:
                del changed[number][key]
            server.write_bytes(chained(GENESIS, changed)[0])
            outcomes.append(outcome(lambda: verify_audit(path)))
            outcome(lambda: audit_folder._complete(path))
    assert sum(map(bool, outcomes)) > len(outcomes) / 2
    for damaged in (
        *DAMAGED,
        b'{"content":NaN}\n',
        b'{"content":{"kind":"end","time":' + b"9" * 5000 + b"}}\n",
    ):
        server.write_bytes(damaged)
        assert outcome(lambda: verify_audit(path)), damaged[:20]
    for damaged in (*DAMAGED, b'{"kind":"holdfast audit","schema":2}\n'):
        (path / "audit.json").write_bytes(damaged)
        assert "is not the file" in outcome(lambda: verify_audit(path))
        (tmp_path / "audit.key").write_bytes(damaged)
        assert "is not the key" in outcome(lambda: AuditKey.of(path))


def test_an_expected_head_must_be_in_a_server_chain(tmp_path):
    path = tmp_path / "audit"
    folder(path).close()
    early = verify_audit(path).head
    AuditFolder.open(path, {}).close()
    later = verify_audit(path)
    (worker,) = path.glob("*.worker-1.jsonl")
    of_worker = json.loads(worker.read_bytes().splitlines()[-1])["digest"]
    for head in (early, later.head):
        assert verify_audit(path, expect_head=head) == later
    for head in (of_worker, GENESIS, digest(b"")):
        with pytest.raises(TargetError, match="no record of a server chain"):
            verify_audit(path, expect_head=head)
    for head in ("x", early[:-1], early.upper(), f"{early} "):
        with pytest.raises(UsageError, match="64 hex digits were expected"):
            verify_audit(path, expect_head=head)


def test_records_that_are_added_to_a_server_chain_replace_no_earlier_ones(tmp_path):
    path = tmp_path / "audit"
    folder(path).close()
    (server,), (worker,) = path.glob(f"*{SERVER}{SUFFIX}"), path.glob("*.worker-1.jsonl")
    expected, records = verify_audit(path).head, server.read_bytes()
    begin = json.loads(records.splitlines()[0])["content"]
    shorter, head = chained(GENESIS, [{"kind": "x"}])
    ended = {"kind": "closed", "chain": worker.name, "records": 1, "head": head}
    for added in (
        [{**begin, "earlier": []}],
        [{"kind": "heads", "chains": [[worker.name, 1, head]]}, ended],
        [{"kind": "worker", "chain": worker.name}, ended],
    ):
        server.write_bytes(records + chained(expected, added)[0])
        worker.write_bytes(shorter)
        with pytest.raises(TargetError, match="where there can be none"):
            verify_audit(path, expect_head=expected)


def test_the_command_line_compares_the_head(tmp_path, capsys):
    path = tmp_path / "audit"
    folder(path).close()
    (worker,) = path.glob("*.worker-1.jsonl")
    head = verify_audit(path).head
    for value, code in ((head, 0), (GENESIS, 3), ("", 2), ("x", 2), (head[:-1], 2)):
        assert run(["verify", str(path), "--expect-head", value]) == code
    assert run(["verify", str(path)]) == 0
    worker.write_bytes(b"x")
    (path / "audit.json").unlink()
    (path / "audit.json").mkdir()
    assert run(["verify", str(path)]) == 3
    assert "internal error" not in capsys.readouterr().err


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


def test_a_chain_that_ends_after_a_full_disk_states_how_many_records_were_lost(tmp_path, full_disk):
    audit = AuditFolder.open(tmp_path / "audit", {})
    chain = ChainFile(audit.new_worker(), fail_open=True)
    full_disk["full"] = True
    chain.add([start_record("a", "", 1, ""), timed_record("answered", request="a", status=200)])
    full_disk["full"] = False
    chain.close()
    audit.close()
    assert verify_audit(tmp_path / "audit").lost == 2


@pytest.mark.parametrize("fail_open", [False, True])
def test_a_full_disk_leaves_a_valid_chain(tmp_path, full_disk, fail_open):
    audit = AuditFolder.open(tmp_path / "audit", {})
    place = audit.new_worker()
    chain = ChainFile(place, fail_open=fail_open)
    chain.add([start_record("a", "", 1, "")])
    full_disk["full"] = True
    for record in (timed_record("answered", request="a", status=200), start_record("b", "", 1, "")):
        if fail_open:
            chain.add([record])
        else:
            with pytest.raises(OSError, match="No space"):
                chain.add([record])
    full_disk["full"] = False
    chain.add(
        [timed_record("answered", request="b", status=200)] if fail_open else [start_record("b", "", 1, "")]
    )
    verified = verify_audit(tmp_path / "audit")
    assert verified.lost == (2 if fail_open else 0) and verified.open == (1 if fail_open else 2)
    chain.close()
    full_disk["full"] = True
    with pytest.raises(
        TargetError, match=r"the disk is full; free some space; give audit=DIR for another folder"
    ):
        audit.new_worker()
    full_disk["full"] = False
    audit.close()
    last = verify_audit(tmp_path / "audit")
    assert (last.open, last.interrupted) == (0, verified.open)
