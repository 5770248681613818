"""Append-only logs: no record can be changed, removed, added, moved or cut off without being noticed."""

import json

import pytest

from disk import failing
from holdfast.core.errors import TargetError
from holdfast.io.files import canonical
from holdfast.runs.store.append_log import GENESIS, AppendLog, Head, Link, LogForm, LogReader
from store.forging import chained

CONTENTS = [{"kind": "a", "k": 0}, {"kind": "b", "name": "x", "k": 'é"\\'}, {"kind": "b", "k": [1.5, None]}]
PLAIN = LogForm(lambda content: content["kind"])
SECRET = LogForm(lambda content: content["kind"], "entry", authenticated=True, key=b"k" * 32)
OPEN = LogForm(lambda content: content["kind"], "entry", authenticated=True)


def written(path, form=PLAIN):
    log = AppendLog(path / "log.jsonl", form)
    for content in CONTENTS:
        log.add(content)
    return log


def read(log, form=PLAIN, lines=None):
    """The records of the file of a log, or of other lines, as another process reads them."""
    if lines is not None:
        log.path.write_bytes(b"".join(lines))
    again = AppendLog(log.path, form)
    again.read()
    return again


@pytest.mark.parametrize("form", [PLAIN, SECRET])
def test_records_are_read_as_they_were_added(tmp_path, form):
    log = written(tmp_path, form)
    again = read(log, form)
    assert [link.content for link in again.links] == CONTENTS and again.end == log.end == Head(3, log.head)
    assert again.links[0].previous == GENESIS and again.entry_of(again.links[1].digest) == 2
    assert again.last("b") == CONTENTS[2] and again.last("b", "x") == CONTENTS[1] and again.last("c") is None
    assert read(log, OPEN if form.authenticated else PLAIN).head == log.head, "without the key"
    assert again.entry_of(GENESIS) is None and AppendLog(tmp_path / "none", form).read() == 0


def test_lines_are_canonical_json_whose_digest_is_that_of_a_link(tmp_path):
    log = written(tmp_path)
    assert (log.path.read_bytes(), log.head) == chained(GENESIS, CONTENTS)
    for line in log.path.read_bytes().splitlines():
        record = json.loads(line)
        assert (
            canonical(record) == line
            and record["digest"] == Link(record["previous"], record["content"]).digest
        )


@pytest.mark.parametrize("form", [PLAIN, SECRET, OPEN])
@pytest.mark.parametrize(
    ("kept", "number"),
    [([1, 2], 1), ([0, 2], 2), ([0, 2, 1], 2), ([0, 1, 1, 2], 3), ([0, 1, 2, 0], 4)],
)
def test_records_that_are_missing_moved_or_repeated_are_named(tmp_path, form, kept, number):
    log = written(tmp_path, SECRET if form is OPEN else form)
    lines = log.path.read_bytes().splitlines(keepends=True)
    with pytest.raises(TargetError, match=f"{form.noun} {number} of .* the digest of the one before it"):
        read(log, form, [lines[k] for k in kept])


@pytest.mark.parametrize("form", [PLAIN, SECRET, OPEN])
@pytest.mark.parametrize(
    "change",
    [
        lambda line: line.replace(b'"kind":"b"', b'"kind":"c"'),
        lambda line: line.replace(b":", b": ", 1),
        lambda line: line.replace(b'"content":', b'"content":{},"content":'),
        lambda line: line.replace(b"\n", b"\r\n"),
        lambda line: line.replace(b'"previous":', b'"more":1,"previous":'),
        lambda line: line.replace(b'"kind":"b",', b""),
        lambda line: b"[" * 100_000 + b"\n",
        lambda line: b"null\n",
        lambda line: b"\xff\n",
        lambda line: b"\n",
        lambda line: b'{"content":{"kind":"b"},"counter":2,"digest":7,"mac":7,"previous":[]}\n',
    ],
)
def test_a_changed_record_is_named(tmp_path, form, change):
    log = written(tmp_path, SECRET if form is OPEN else form)
    lines = log.path.read_bytes().splitlines(keepends=True)
    assert change(lines[1]) != lines[1]
    with pytest.raises(TargetError, match=f"{form.noun} 2 of .* (was changed|has no authentication)"):
        read(log, form, [lines[0], change(lines[1]), lines[2]])


def test_a_recomputed_chain_needs_the_key(tmp_path):
    log = written(tmp_path, SECRET)
    forger = LogForm(SECRET.check, authenticated=True, key=b"?" * 32)
    forged = forger.lines(map(canonical, CONTENTS))[0]
    with pytest.raises(TargetError, match="entry 1 of .* was not written with the pool's key"):
        read(log, SECRET, [forged])
    assert read(log, OPEN).entries == 3, "only the public chain is verified without the key"


def test_a_log_is_read_on_from_where_it_ended(tmp_path):
    log = written(tmp_path)
    other = read(log)
    log.add({"kind": "late"})
    assert other.has_changed() and other.read() == 0 and other.last("late") and not other.has_changed()
    log.path.write_bytes(b"".join(log.path.read_bytes().splitlines(keepends=True)[:2]))
    with pytest.raises(TargetError, match="record 4 of .* or an earlier one was removed"):
        other.read()


def test_an_incomplete_last_line_is_no_record_and_is_removed_by_a_writer(tmp_path):
    log = written(tmp_path)
    whole = log.path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    for cut in range(1, len(last)):
        log.path.write_bytes(whole[:-cut])
        reader = AppendLog(log.path, PLAIN)
        assert reader.read() == len(last) - cut and reader.entries == 2
        assert log.path.read_bytes() == whole[:-cut], "reading changes nothing"
        reader.repair()
        assert log.path.read_bytes() == whole[: -len(last)]
        reader.add(CONTENTS[2])
        assert log.path.read_bytes() == whole


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_leaves_the_records_before(tmp_path, monkeypatch, call):
    log = written(tmp_path)
    whole = log.path.read_bytes()
    with monkeypatch.context() as patch:
        failing(patch, 1, (call,))
        with pytest.raises(TargetError, match="the disk is full"):
            log.add({"kind": "late"})
    assert log.path.read_bytes() == whole and log.entries == 3
    log.add({"kind": "late"})
    assert read(log).entries == 4


def test_a_record_that_is_refused_is_refused_again(tmp_path):
    log = written(tmp_path)

    def take(link, number):
        if link.content["k"] != 0:
            raise TargetError(f"record {number} is impossible")

    other = AppendLog(log.path, PLAIN, take)
    for _ in range(2):
        with pytest.raises(TargetError, match="record 2 is impossible"):
            other.read()
        assert other.entries == 1


def test_a_reader_continues_after_a_record_and_does_not_read_an_endless_line(tmp_path):
    log = written(tmp_path)
    first, *others = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(b"".join(others))
    with log.path.open("rb") as file:
        reader = LogReader(file, log.path, PLAIN, Head(1, json.loads(first)["digest"]))
        assert [link.content for link in reader] == CONTENTS[1:] and reader.last == log.end
    with log.path.open("wb") as file:
        file.truncate(1 << 27)
    with log.path.open("rb") as file, pytest.raises(TargetError, match="record 1 of .* is longer than"):
        list(LogReader(file, log.path, PLAIN))
