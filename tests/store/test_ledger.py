"""The exposure ledger: legal steps only, one chain whoever writes, and a broken one serves nothing."""

import json
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.chain import GENESIS, Link, broken_at, canonical
from holdfast.core.errors import TargetError, UsageError
from holdfast.store import Ledger
from holdfast.store.ledger import utc_now
from holdfast.store.locking import locked
from holdfast.store.standing import Exposure, Serving, Standing, Term, well_formed

DIGEST = "d" * 64
LEGAL = {
    "admitted": {"candidate", "admitted"},
    "refused": {"candidate", "admitted"},
    "serving": {"admitted"},
    "retired": {"admitted", "serving"},
    "exposed": {"candidate", "admitted", "refused", "serving", "retired"},
}


def ticking():
    """A clock of which every look is a minute later."""
    minutes = iter(range(10**6))
    return lambda: f"2026-01-01T{(m := next(minutes)) // 60:02d}:{m % 60:02d}:00Z"


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path, ticking())


def served(ledger, *names):
    """Sets that came to serve, one after another."""
    for name in names:
        ledger.candidate(name, DIGEST)
        ledger.admit(name)
        ledger.serve(name)
    return ledger


def test_a_rotation_is_told_back(ledger, tmp_path):
    served(ledger, "one")
    ledger.answered(1, {"ann": 3, "bob": 1})
    ledger.candidate("two", DIGEST, ["one"], "drawn")
    ledger.admit("two", "all gates passed", canary="c" * 64)
    ledger.expose("one", "laptop stolen")
    assert ledger.serve("two", "timer") == ledger.serving == Serving("two", 2, "2026-01-01T00:07:00Z")
    ledger.answered(1, {"ann": 2}, others=3)
    ledger.answered(1, {}, others=4)
    for view in (ledger, Ledger(tmp_path)):
        assert view.terms == (
            Term("one", 1, "2026-01-01T00:02:00Z", "2026-01-01T00:07:00Z", {"ann": 5, "bob": 1}, 7),
            Term("two", 2, "2026-01-01T00:07:00Z", None, {}, 0),
        )
        assert view.exposed() == (Exposure("one", "laptop stolen", "2026-01-01T00:06:00Z", 7),)
        assert view.states == {"one": "retired", "two": "serving"}
        assert view.member("two").bases == ("one",) and view.member("two").why == "timer"
        assert view.member("two").canary == "c" * 64
        assert view.entries == 10 and view.head == ledger.head


def test_the_time_is_of_the_wall_in_utc(tmp_path):
    ledger = Ledger(tmp_path)
    before = utc_now()
    ledger.candidate("one", DIGEST)
    assert before <= ledger.member("one").since <= utc_now()
    assert before.endswith("Z") and len(before) == 20


def reached(tmp_path, state):
    ledger = Ledger(tmp_path)
    ledger.candidate("set", DIGEST)
    for step in {"serving": ("admit", "serve"), "admitted": ("admit",), "refused": ("refuse",)}.get(
        state, ()
    ):
        getattr(ledger, step)("set", "why")
    if state == "retired":
        ledger.admit("set")
        ledger.retire("set")
    assert ledger.states == {"set": state}
    return ledger


@pytest.mark.parametrize("state", ["candidate", "admitted", "refused", "serving", "retired"])
@pytest.mark.parametrize("kind", LEGAL)
def test_only_legal_steps_are_taken(tmp_path, state, kind):
    ledger = reached(tmp_path, state)
    act = {"admitted": "admit", "refused": "refuse", "serving": "serve", "retired": "retire"}.get(
        kind, "expose"
    )
    before = ledger.head
    if state in LEGAL[kind]:
        getattr(ledger, act)("set", "why")
        assert ledger.states["set"] == (state if kind == "exposed" else kind)
        assert bool(ledger.exposed()) == (kind == "exposed")
    else:
        with pytest.raises(UsageError, match=f"'set' is {state}; only what is .* can become {kind}"):
            getattr(ledger, act)("set", "why")
        assert ledger.head == before == Ledger(tmp_path).head


KINDS = st.sampled_from(["candidate", *LEGAL, "deleted", "answers"])


@given(steps=st.lists(st.tuples(KINDS, st.sampled_from("abc")), max_size=30))
def test_whatever_is_said_one_set_serves_at_most_and_epochs_count_up(steps):
    standing = Standing()
    for kind, name in steps:
        now = [] if standing.serving is None else [standing.serving.name]
        entry = {"kind": kind, "at": "now", "set": name, "why": "", "digest": DIGEST, "bases": []}
        entry |= {"epoch": standing.epoch + (kind == "serving"), "retires": now, "canary": "c"}
        entry |= {"answers": {"ann": 1}, "others": 1}
        well_formed(entry)
        try:
            standing.refuse_illegal(entry)
        except UsageError:
            continue
        standing.take(entry)
        serving = [name for name, member in standing.members.items() if member.state == "serving"]
        assert serving == ([] if standing.serving is None else [standing.serving.name])
        assert [term.epoch for term in standing.terms] == list(range(1, standing.epoch + 1))
        assert all(term.until is not None for term in standing.terms[:-1])
        exposed = {exposure.name for exposure in standing.exposed}
        assert not exposed & set(standing.ahead) and not exposed & set(standing.unlisted)
        assert all(standing.members[name].state == "admitted" for name in standing.ahead)
        assert not any(member.deleted for member in map(standing.member, standing.ahead))


def test_an_exposed_set_that_serves_goes_on_until_the_swap_and_never_serves_again(ledger):
    served(ledger, "one")
    ledger.expose("one", "stolen")
    ledger.expose("one", "stolen again")
    assert ledger.serving.name == "one" and [e.why for e in ledger.exposed()] == ["stolen"]
    ledger.candidate("two", DIGEST)
    ledger.admit("two")
    ledger.expose("two", "found on the net")
    assert ledger.ahead == () and [e.name for e in ledger.exposed()] == ["one", "two"]
    with pytest.raises(UsageError, match="'two' is exposed since .* \\(found on the net\\); serve another"):
        ledger.serve("two")


def test_those_admitted_first_serve_first(ledger):
    for name in ("a", "b", "c"):
        ledger.candidate(name, DIGEST)
    for name in ("c", "a", "b"):
        ledger.admit(name)
    ledger.retire("a", "odd gradients")
    assert ledger.ahead == ("c", "b")


def test_bases_that_are_neither_exposed_nor_deleted_are_said(ledger):
    for name in ("base", "other", "idle"):
        ledger.candidate(name, DIGEST)
    ledger.candidate("drawn", DIGEST, ["base", "other"])
    assert ledger.unlisted == ("base", "other")
    ledger.expose("base", "a base")
    ledger.delete("other")
    assert ledger.unlisted == ()
    with pytest.raises(UsageError, match="'bose' is no set of this ledger; near it: base"):
        ledger.candidate("more", DIGEST, ["bose"])
    with pytest.raises(UsageError, match="'other' was deleted; it cannot become admitted"):
        ledger.admit("other")
    with pytest.raises(UsageError, match="'base' is exposed .*tested against it, so keep it"):
        ledger.delete("base")


@pytest.mark.parametrize(
    "name, says",
    [("3f9ab0", "near it: 3f9abc12"), ("3g9abc12", "near it: 3f9abc12"), ("zzz", "it has 3f9abc12, 77aa")],
)
def test_an_unknown_set_is_refused_with_those_near_it(ledger, name, says):
    with pytest.raises(UsageError, match=f"'{name}' is no set of this ledger; it has none yet"):
        ledger.expose(name, "stolen")
    for known in ("3f9abc12", "77aa"):
        ledger.candidate(known, DIGEST)
    with pytest.raises(UsageError, match=f"'{name}' is no set of this ledger; {says}"):
        ledger.expose(name, "stolen")
    assert ledger.entries == 2


@pytest.mark.parametrize(
    "act",
    [
        lambda ledger: ledger.candidate("../outside", DIGEST),
        lambda ledger: ledger.candidate("", DIGEST),
        lambda ledger: ledger.answered(1, {"ann": 0}),
        lambda ledger: ledger.answered(1, {"ann": -1}),
        lambda ledger: ledger.answered(1, {"ann": 1.5}),
        lambda ledger: ledger.answered(1, {}, others=-1),
        lambda ledger: ledger.answered(2, {"ann": 1}),
        lambda ledger: ledger.answered(0, {"ann": 1}),
        lambda ledger: ledger.candidate("one", DIGEST),
        lambda ledger: ledger.begin(DIGEST),
    ],
)
def test_what_cannot_be_meant_is_refused_and_not_written(ledger, act):
    served(ledger, "one")
    with pytest.raises(UsageError):
        act(ledger)
    assert ledger.entries == 3


def test_no_answers_make_no_entry(ledger):
    served(ledger, "one").answered(1, {})
    assert ledger.entries == 3


# --- the chain


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ledger")
    served(Ledger(folder, ticking()), "one", "two")
    return (folder / "ledger.jsonl").read_bytes()


def holding(folder, lines):
    (folder / "ledger.jsonl").write_bytes(lines)
    return Ledger(folder)


VIEWS = [
    lambda ledger: ledger.serving,
    lambda ledger: ledger.exposed(),
    lambda ledger: ledger.terms,
    lambda ledger: ledger.head,
    lambda ledger: ledger.candidate("three", DIGEST),
]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("line", range(6))
def test_a_changed_entry_is_named_and_nothing_is_served(whole, tmp_path, line, view):
    entries = [json.loads(text) for text in whole.splitlines()]
    entries[line]["content"]["why"] += "!"
    ledger = holding(tmp_path, b"".join(canonical(entry) + b"\n" for entry in entries))
    for _ in range(2):  # the second look is no better
        with pytest.raises(
            TargetError, match=f"entry {line + 1} of .*ledger.jsonl' was changed.*nothing of it is"
        ):
            view(ledger)


@pytest.mark.parametrize("kept, entry", [([0, 2, 3], 2), ([1, 0, 2], 1), ([0, 1, 1, 2], 3), ([1, 2], 1)])
def test_an_entry_that_was_taken_out_moved_or_repeated_is_named(whole, tmp_path, kept, entry):
    lines = whole.splitlines(keepends=True)
    with pytest.raises(TargetError, match=f"entry {entry} of .* does not follow from the one before it"):
        _ = holding(tmp_path, b"".join(lines[k] for k in kept)).serving


def test_a_chain_that_holds_and_says_what_cannot_be_is_refused(whole, tmp_path):
    links, previous = [], GENESIS
    for text in whole.splitlines():
        content = json.loads(text)["content"]
        if content["kind"] == "admitted" and content["set"] == "two":
            continue
        links.append(Link(previous, content))
        previous = links[-1].digest
    lines = [
        canonical({"previous": a.previous, "content": a.content, "digest": a.digest}) + b"\n" for a in links
    ]
    with pytest.raises(TargetError, match="entry 5 of .* cannot follow those before it .*'two' is candidate"):
        _ = holding(tmp_path, b"".join(lines)).serving


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"kind": "gossip", "at": "now"},
        {"kind": "candidate", "at": "now", "set": "../../x", "digest": DIGEST, "bases": [], "why": ""},
        {"kind": "admitted", "at": 7, "set": "one", "why": ""},
        {"kind": "serving", "at": "now", "set": "one", "why": "", "epoch": "1", "retires": []},
        {"kind": "answers", "at": "now", "epoch": 1, "answers": {"ann": True}, "others": 0},
        {"kind": "answers", "at": "now", "epoch": 1, "answers": {"ann": 1}, "others": -1},
    ],
)
def test_an_entry_of_another_form_is_refused(tmp_path, content):
    record = {"previous": GENESIS, "content": content, "digest": Link(GENESIS, content).digest}
    with pytest.raises(TargetError, match="entry 1 of "):
        _ = holding(tmp_path, canonical(record) + b"\n").serving


def test_an_end_that_a_kill_cut_short_was_never_said(whole, tmp_path):
    lines = whole.splitlines(keepends=True)
    for cut in (1, len(lines[-1]) // 2, len(lines[-1]) - 1):
        ledger = holding(tmp_path, whole[:-cut])
        assert ledger.serving.name == "one" and ledger.ahead == ("two",)
        assert (tmp_path / "ledger.jsonl").read_bytes() == b"".join(lines[:-1])
        ledger.serve("two")
        assert Ledger(tmp_path).serving.name == "two"


def test_entries_that_vanish_under_a_process_are_missed(whole, tmp_path):
    ledger = holding(tmp_path, whole)
    assert ledger.serving.name == "two"
    (tmp_path / "ledger.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:4]))
    with pytest.raises(TargetError, match="entry 6 of .* was there and is no more"):
        _ = ledger.serving


def test_the_links_of_a_part_follow_from_what_went_before():
    links = [Link(GENESIS, {"n": 0})]
    links += [Link(links[0].digest, {"n": 1})]
    assert broken_at(links) is None and broken_at(links[1:], links[0].digest) is None
    assert broken_at(links[1:]) == 0


def test_the_files_are_their_owners_alone(ledger, tmp_path):
    (tmp_path / "ledger.jsonl").touch(0o644)
    served(ledger, "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ledger.jsonl", "ledger.lock"]
    if os.name != "nt":
        assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_leaves_the_old_state(ledger, tmp_path, monkeypatch, call):
    served(ledger, "one")
    before = (tmp_path / "ledger.jsonl").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(TargetError, match="the disk is full: .*ledger.jsonl"):
            ledger.expose("one", "stolen")
    assert (tmp_path / "ledger.jsonl").read_bytes() == before
    assert ledger.exposed() == Ledger(tmp_path).exposed() == ()
    ledger.expose("one", "stolen")
    assert len(Ledger(tmp_path).exposed()) == 1


# --- several processes


def test_a_lock_that_is_held_is_waited_for_and_then_said(tmp_path):
    with (
        locked(tmp_path / "lock"),
        pytest.raises(TargetError, match="lock' cannot be locked: database is locked; wait for"),
        locked(tmp_path / "lock", wait_s=0.05),
    ):
        pass
    with locked(tmp_path / "lock", wait_s=0.05):
        pass
    with pytest.raises(TargetError, match="cannot be locked"), locked(tmp_path / "none" / "lock"):
        pass


WRITER = """
    import sys
    from pathlib import Path
    from holdfast.core.errors import UsageError
    from holdfast.store.ledger import Ledger
    folder, me, n = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    ledger, swaps = Ledger(folder), 0
    print("ready", flush=True)
    sys.stdin.readline()
    for k in range(n):
        name = f"{me}-{k}"
        ledger.candidate(name, "d" * 64)
        ledger.admit(name)
        try:
            ledger.serve(name)
            swaps += 1
        except UsageError:
            raise SystemExit("another process served what is mine")
        ledger.answered(ledger.serving.epoch, {me: 1})
    print(swaps)
"""


def test_processes_that_write_at_once_never_fork_the_chain(tmp_path):
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path), me, "10"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for me in ("a", "b", "c")
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    told = [writer.communicate()[0] for writer in writers]
    assert told == ["10\n"] * 3
    ledger = Ledger(tmp_path)
    assert ledger.entries == 3 * 10 * 4
    assert [term.epoch for term in ledger.terms] == list(range(1, 31))
    assert sum(sum(term.answers.values()) for term in ledger.terms) == 30
    lines = (tmp_path / "ledger.jsonl").read_text().splitlines()
    assert len({json.loads(line)["previous"] for line in lines}) == len(lines)


def test_threads_that_share_a_ledger_write_one_chain(tmp_path):
    ledgers = [Ledger(tmp_path)] * 2 + [Ledger(tmp_path)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda k: ledgers[k % 3].candidate(f"set-{k}", DIGEST), range(30)))
    assert Ledger(tmp_path).entries == 30 and len(ledgers[0].states) == 30


def test_a_view_is_a_copy(ledger):
    served(ledger, "one").answered(1, {"ann": 1})
    ledger.terms[0].answers["ann"] = 99
    assert ledger.terms[0].answers == {"ann": 1}
