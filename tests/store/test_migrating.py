"""Pools of the older format are converted once, on request, and never opened as they are."""

import json
import os
import shutil
from itertools import count

import pytest

from holdfast.core.errors import TargetError, UsageError
from holdfast.store import Pool
from holdfast.store.encryption import KEY_VARIABLE
from holdfast.store.migrating import migrate
from store.lives import begun, dying, ended, life, weights
from store.old_format import aged, chained


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "5a" * 32)


@pytest.fixture
def pool(tmp_path):
    """Set 0 served and is exposed, 1 serves, 2 waits; a base, a set that was drawn from it, and a generator."""
    pool = begun(tmp_path / "pool", 2)
    base = pool.add(weights(7), {"base": True}, role="base")
    pool.refuse(base, "whatever this says")
    pool.add(weights(8), {}, bases=[base])
    pool.answered(1, {"alice": 3})
    old = pool.serving.name
    pool.swap(why="timer")
    pool.expose(old, "a base of something")
    pool.keep("generator", weights(9), {})
    return pool


def told(pool):
    ledger = pool.ledger
    members = [(one.name, one.state, one.role, one.bases, one.why) for one in ledger.members]
    return members, [one.name for one in ledger.exposed()], ledger.terms, pool.serving


def test_a_converted_pool_says_what_it_said_and_asks_for_new_judgements(pool):
    before, old = told(pool), aged(pool)
    with pytest.raises(
        TargetError, match=r"schema version 1, whose ledger is not authenticated.* rotate migrate"
    ):
        Pool.open(old)
    lines = pool.ledger.path.read_bytes()
    found = migrate(old)
    held = Pool.open(old, expect_head=found.head)
    assert told(held) == before and held.ledger.unauthenticated == found.entries == len(lines.splitlines())
    assert not held.ledger.exposed()[0].automatic, "the words of a reason decide nothing"
    assert found.unjudged == held.unjudged == held.ahead != ()
    assert (old / "ledger-1.jsonl").read_bytes() == lines
    assert held.kept("generator") is not None and float(held.weights(held.ahead[0])["b"]) == 2
    held.keep("generator", weights(3), {})
    assert held.ledger.terms[0].answers == {held.pseudonym("alice"): 3}
    with pytest.raises(UsageError, match="has schema version 2 already"):
        migrate(old)


def test_a_downgraded_pool_is_refused_even_by_the_conversion(pool):
    """The exposure is removed, and manifest and ledger are rewritten in the older format, which needs no key."""
    sealed = {file: file.read_bytes() for file in pool.path.rglob("*.sealed")}
    head = (pool.path / "ledger.head").read_bytes()
    path = aged(pool, lambda content: content["kind"] != "exposed")
    for file, data in sealed.items():
        file.write_bytes(data)
    with pytest.raises(TargetError, match="whose ledger is not authenticated"):
        Pool.open(path)
    with pytest.raises(TargetError, match="sealed' has version 2: .* was replaced"):
        migrate(path)
    (path / "ledger.head").write_bytes(head)
    with pytest.raises(TargetError, match="ledger.head' has version 2"):
        migrate(path)


def test_without_its_own_manifest_a_downgraded_ledger_is_refused(pool):
    contents = [json.loads(line)["content"] for line in pool.ledger.path.read_bytes().splitlines()]
    pool.ledger.path.write_bytes(chained(one for one in contents if one["kind"] != "exposed"))
    with pytest.raises(TargetError, match="entry 1 of .* has no authentication, which this format requires"):
        Pool.open(pool.path)


@pytest.mark.parametrize("how", ["changed", "shortened", "another manifest"])
def test_an_older_pool_that_does_not_hold_is_not_converted(pool, how):
    path = aged(pool, lambda content: how != "shortened" or content.get("set") != pool.ahead[0])
    if how == "changed":
        text = (path / "ledger.jsonl").read_text()
        (path / "ledger.jsonl").write_text(text.replace("timer", "timed"))
    if how == "another manifest":
        text = (path / "pool.json").read_text()
        (path / "pool.json").write_text(text.replace("a test", "another"))
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    says = {
        "changed": "was changed after it was written",
        "shortened": "is in no entry of .* which was shortened",
        "another manifest": "pool.json' is not what the ledger recorded",
    }[how]
    with pytest.raises(TargetError, match=says):
        migrate(path)
    assert before == {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
def test_a_kill_at_any_call_to_the_disk_leaves_a_pool_of_one_format(pool, tmp_path):
    before, calls = told(pool), tmp_path / "calls"
    first = aged(pool)
    for die_at in count(1):
        path = shutil.copytree(first, tmp_path / f"killed-{die_at}")
        if os.WIFEXITED(ended(life(dying(lambda p=path: migrate(p), die_at, calls)))):
            break
        if json.loads((path / "pool.json").read_text())["schema_version"] == 1:
            migrate(path)
        assert told(Pool.open(path)) == before, die_at
        shutil.rmtree(path)
    assert die_at > 15
