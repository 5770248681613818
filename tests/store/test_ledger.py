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

from disk import failing
from holdfast.core.chain import GENESIS, Link, canonical
from holdfast.core.errors import TargetError, UsageError
from holdfast.rotation.ledger import HEAD, LedgerHead, utc_now
from holdfast.rotation.ledger_state import Exposure, LedgerState, Serving, Term, well_formed
from holdfast.runs.store import Ledger as AnyLedger
from holdfast.runs.store.append_log import Head, LogForm
from holdfast.runs.store.leases import locked

DIGEST = "d" * 64
KEY = b"k" * 32
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


def Ledger(folder, *now):
    return AnyLedger(folder, KEY, *now)


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


def test_a_rotation_is_written_as_it_was_read(ledger, tmp_path):
    served(ledger, "one")
    ledger.answered(1, {"ann": 3, "bob": 1})
    ledger.candidate("two", DIGEST, ["one"], "drawn")
    ledger.expose("one", "laptop stolen")
    ledger.admit("two", "all gates passed", canary="c" * 64, against=["one"])
    assert ledger.serve("two", "timer") == ledger.serving == Serving("two", 2, "2026-01-01T00:07:00Z")
    ledger.answered(1, {"ann": 2}, others=3)
    ledger.answered(1, {}, others=4)
    for view in (ledger, Ledger(tmp_path)):
        assert view.terms == (
            Term("one", 1, "2026-01-01T00:02:00Z", "2026-01-01T00:07:00Z", {"ann": 5, "bob": 1}, 7),
            Term("two", 2, "2026-01-01T00:07:00Z", None, {}, 0),
        )
        assert view.exposed() == (Exposure("one", "laptop stolen", "2026-01-01T00:05:00Z", 6),)
        assert view.states == {"one": "retired", "two": "serving"}
        assert view.member("two").bases == ("one",) and view.member("two").why == "timer"
        assert view.member("two").canary == "c" * 64 and view.member("two").against == ("one",)
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
        with pytest.raises(UsageError, match=f"'set' is {state}; only a set that is .* can become {kind}"):
            getattr(ledger, act)("set", "why")
        assert ledger.head == before == Ledger(tmp_path).head


KINDS = st.sampled_from(["candidate", *LEGAL, "deleted", "answers"])


SETS = st.sampled_from("abc")
STEPS = st.tuples(KINDS, SETS, st.lists(SETS, unique=True), st.booleans(), st.booleans())


@given(steps=st.lists(STEPS, max_size=30))
def test_at_most_one_set_serves_and_epochs_increase(steps):
    state = LedgerState()
    for kind, name, judged, forced, automatic in steps:
        now = [] if state.serving is None else [state.serving.name]
        entry = {"kind": kind, "at": "now", "set": name, "why": "", "digest": DIGEST, "bases": []}
        entry |= {"epoch": state.epoch + (kind == "serving"), "retires": now, "canary": "c"}
        entry |= {"answers": {"ann": 1}, "others": 1, "role": "service"}
        entry |= {"against": judged, "unjudged": forced, "automatic": automatic}
        well_formed(entry)
        try:
            state.refuse_illegal(entry)
        except UsageError:
            continue
        assert kind != "serving" or forced or name not in state.unjudged
        state.take(entry)
        serving = [name for name, member in state.members.items() if member.state == "serving"]
        assert serving == ([] if state.serving is None else [state.serving.name])
        assert [term.epoch for term in state.terms] == list(range(1, state.epoch + 1))
        assert all(term.until is not None for term in state.terms[:-1])
        exposed = {exposure.name for exposure in state.exposed}
        assert not exposed & set(state.ahead) and not exposed & set(state.unlisted)
        left = {name for name in exposed if not state.members[name].deleted}
        for name in set(state.ahead) - set(state.unjudged):
            assert left <= set(state.members[name].against)
        assert all(state.members[name].state == "admitted" for name in state.ahead)
        assert not any(member.deleted for member in map(state.member, state.ahead))


def test_an_exposed_set_serves_until_the_swap_and_never_again(ledger):
    served(ledger, "one")
    ledger.expose("one", "stolen")
    ledger.expose("one", "stolen again")
    assert ledger.serving.name == "one" and [e.why for e in ledger.exposed()] == ["stolen"]
    ledger.candidate("two", DIGEST)
    ledger.admit("two")
    ledger.expose("two", "found on the net")
    assert ledger.ahead == () and [e.name for e in ledger.exposed()] == ["one", "two"]
    with pytest.raises(
        UsageError, match="'two' is listed as stolen since .* \\(found on the net\\); serve another"
    ):
        ledger.serve("two")


def test_those_admitted_first_serve_first(ledger):
    for name in ("a", "b", "c"):
        ledger.candidate(name, DIGEST)
    for name in ("c", "a", "b"):
        ledger.admit(name)
    ledger.retire("a", "odd gradients")
    assert ledger.ahead == ("c", "b")


def test_bases_that_are_neither_exposed_nor_deleted_are_reported(ledger):
    for name in ("base", "other", "idle"):
        ledger.candidate(name, DIGEST)
    ledger.candidate("drawn", DIGEST, ["base", "other"])
    assert ledger.unlisted == ("base", "other")
    ledger.expose("base", "a base")
    ledger.delete("other")
    assert ledger.unlisted == ()
    with pytest.raises(UsageError, match="'bose' is not a set of this ledger; similar names: base"):
        ledger.candidate("more", DIGEST, ["bose"])
    with pytest.raises(UsageError, match="'other' was deleted; it cannot become admitted"):
        ledger.admit("other")
    with pytest.raises(
        UsageError, match="'base' is listed as stolen .*keep it, because new sets must be tested"
    ):
        ledger.delete("base")


@pytest.mark.parametrize(
    "name, says",
    [
        ("3f9ab0", "similar names: 3f9abc12"),
        ("3g9abc12", "similar names: 3f9abc12"),
        ("zzz", "the last ones are 3f9abc12, 77aa"),
    ],
)
def test_an_unknown_set_is_refused_with_those_near_it(ledger, name, says):
    with pytest.raises(UsageError, match=f"'{name}' is not a set of this ledger; it contains no sets yet"):
        ledger.expose(name, "stolen")
    for known in ("3f9abc12", "77aa"):
        ledger.candidate(known, DIGEST)
    with pytest.raises(UsageError, match=f"'{name}' is not a set of this ledger; {says}"):
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
        lambda ledger: AnyLedger.create(ledger.path.parent, KEY, DIGEST),
        lambda ledger: ledger.candidate("two", DIGEST, role="idol"),
        lambda ledger: ledger.expose("one", "stolen", automatic="no"),
    ],
)
def test_impossible_settings_are_refused_and_not_written(ledger, act):
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


def holding(folder, lines, entries=None):
    """A ledger of these lines, whose head says that it has so many entries: as many as it has, unless told."""
    (folder / "ledger.jsonl").write_bytes(lines)
    last = json.loads(lines.splitlines()[-1] if lines.endswith(b"\n") else lines.splitlines()[-2])
    LedgerHead(folder / HEAD, KEY).write(Head(entries or last["counter"], last["digest"]))
    return Ledger(folder)


def forged(contents, key=KEY):
    """Lines of a chain that is computed again."""
    form = LogForm(lambda content: None, authenticated=True, key=key)
    return form.lines(map(canonical, contents))[0]


def contents_of(lines):
    return [json.loads(line)["content"] for line in lines.splitlines()]


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
            TargetError, match=f"entry {line + 1} of .*ledger.jsonl' was changed.*no set of this pool is"
        ):
            view(ledger)


@pytest.mark.parametrize(
    "old, new",
    [
        (b'"content":', b'"content":{},"content":'),
        (b'"kind":', b'"kind":"x","kind":'),
        (b'"counter":2', b'"counter":7,"counter":2'),
        (b":", b": "),
        (b"\n", b"\r\n"),
        (b"\n", b"\r"),
        (b'"previous":', b'"more":1,"previous":'),
    ],
)
def test_only_the_canonical_text_of_an_entry_is_valid(whole, tmp_path, old, new):
    lines = whole.splitlines(keepends=True)
    assert old in lines[1]
    lines[1] = lines[1].replace(old, new, 1)
    with pytest.raises(TargetError, match=r"entry 2 of .*ledger.jsonl' was changed"):
        holding(tmp_path, b"".join(lines)).head  # noqa: B018


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda file: file.symlink_to("/dev/zero")])
def test_a_ledger_is_a_regular_file(whole, tmp_path, make):
    holding(tmp_path, whole)
    (tmp_path / "ledger.jsonl").unlink()
    make(tmp_path / "ledger.jsonl")
    with pytest.raises(TargetError):
        Ledger(tmp_path).head  # noqa: B018


@pytest.mark.parametrize("kept, entry", [([0, 2, 3], 2), ([1, 0, 2], 1), ([0, 1, 1, 2], 3), ([1, 2], 1)])
def test_an_entry_that_was_taken_out_moved_or_repeated_is_named(whole, tmp_path, kept, entry):
    lines = whole.splitlines(keepends=True)
    with pytest.raises(
        TargetError, match=f"entry {entry} of .* does not contain the digest of the one before it"
    ):
        _ = holding(tmp_path, b"".join(lines[k] for k in kept)).serving


def test_a_valid_chain_with_an_impossible_record_is_refused(whole, tmp_path):
    contents = [one for one in contents_of(whole) if (one["kind"], one["set"]) != ("admitted", "two")]
    with pytest.raises(TargetError, match="entry 5 of .* cannot follow those before it .*'two' is candidate"):
        _ = holding(tmp_path, forged(contents)).serving


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"kind": "gossip", "at": "now"},
        {
            "kind": "candidate",
            "at": "now",
            "set": "../../x",
            "digest": DIGEST,
            "bases": [],
            "why": "",
            "role": "base",
        },
        {"kind": "admitted", "at": 7, "set": "one", "why": "", "canary": "", "against": []},
        {
            "kind": "serving",
            "at": "now",
            "set": "one",
            "why": "",
            "epoch": "1",
            "retires": [],
            "unjudged": False,
        },
        {"kind": "exposed", "at": "now", "set": "one", "why": "", "automatic": "yes"},
        {"kind": "answers", "at": "now", "epoch": 1, "answers": {"ann": True}, "others": 0},
        {"kind": "answers", "at": "now", "epoch": 1, "answers": {"ann": 1}, "others": -1},
    ],
)
def test_an_entry_of_another_form_is_refused(tmp_path, content):
    with pytest.raises(TargetError, match="entry 1 of "):
        _ = holding(tmp_path, forged([content])).serving


def test_a_line_that_is_nested_too_deeply_is_no_entry(tmp_path):
    (tmp_path / "ledger.jsonl").write_bytes(b"[" * 100_000 + b"\n")
    with pytest.raises(TargetError, match="entry 1 of .* was changed"):
        Ledger(tmp_path).head  # noqa: B018


# --- attacks without the key


@pytest.fixture
def stolen(whole, tmp_path):
    """A ledger in which set two serves and one is listed as exposed, and its lines."""
    ledger = holding(tmp_path, whole)
    ledger.expose("one", "laptop stolen")
    ledger.candidate("three", DIGEST)
    return (tmp_path / "ledger.jsonl").read_bytes()


def test_a_ledger_without_its_exposures_and_with_a_recomputed_chain_is_refused(stolen, tmp_path):
    contents = [one for one in contents_of(stolen) if one["kind"] != "exposed"]
    forger = b"?" * 32
    (tmp_path / "ledger.jsonl").write_bytes(forged(contents, forger))
    with pytest.raises(TargetError, match="entry 1 of .* was not written with the pool's key"):
        Ledger(tmp_path).exposed()
    last = json.loads((tmp_path / "ledger.jsonl").read_bytes().splitlines()[-1])
    LedgerHead(tmp_path / HEAD, forger).write(Head(len(contents), last["digest"]))
    with pytest.raises(TargetError, match="ledger.head' was not written with the pool's key"):
        Ledger(tmp_path).exposed()


@pytest.mark.parametrize("counters", ["kept", "counted again"])
def test_entries_that_were_authenticated_keep_their_place(stolen, tmp_path, counters):
    """The exposure is cut out, the chain is computed again, and each entry keeps the HMAC that it had."""
    records = [json.loads(line) for line in stolen.splitlines()]
    kept, previous = [], GENESIS
    for record in (one for one in records if one["content"]["kind"] != "exposed"):
        link = Link(previous, record["content"])
        counter = record["counter"] if counters == "kept" else len(kept) + 1
        kept.append(
            canonical(record | {"previous": previous, "digest": link.digest, "counter": counter}) + b"\n"
        )
        previous = link.digest
    says = (
        "has the counter 8; 7 was expected" if counters == "kept" else "was not written with the pool's key"
    )
    with pytest.raises(TargetError, match=f"entry 7 of .* {says}"):
        _ = holding(tmp_path, b"".join(kept), len(kept)).serving


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda record: record | {"counter": 3}, "entry 7 of .* has the counter 3; 7 was expected"),
        (lambda record: record | {"counter": True}, "entry 7 of .* has the counter True"),
        (lambda record: record | {"mac": "0" * 64}, "entry 7 of .* was not written with the pool's key"),
        (lambda record: record | {"mac": None}, "entry 7 of .* was not written with the pool's key"),
        (lambda record: record | {"note": "x"}, "entry 7 of "),
        (
            lambda record: {k: v for k, v in record.items() if k != "mac"},
            "entry 7 of .* has no authentication",
        ),
        (
            lambda record: {k: v for k, v in record.items() if k != "counter"},
            "entry 7 of .* has no authentication",
        ),
    ],
)
def test_what_authenticates_an_entry_cannot_be_changed_or_left_out(stolen, tmp_path, change, says):
    lines = stolen.splitlines(keepends=True)
    lines[6] = canonical(change(json.loads(lines[6]))) + b"\n"
    (tmp_path / "ledger.jsonl").write_bytes(b"".join(lines))
    with pytest.raises(TargetError, match=says):
        Ledger(tmp_path).exposed()


def test_an_entry_of_another_pool_is_refused_wherever_it_fits(tmp_path):
    """Both ledgers have the same first entries, so that the chain of one continues with the entry of the other."""
    other = b"o" * 32
    ledgers = []
    for folder, key in ((tmp_path / "a", KEY), (tmp_path / "b", other)):
        folder.mkdir()
        ledgers.append(AnyLedger(folder, key, lambda: "2026-01-01T00:00:00Z"))
        served(ledgers[-1], "one", "two")
    mine, its = ((ledger.path).read_bytes().splitlines(keepends=True) for ledger in ledgers)
    assert [json.loads(a)["digest"] for a in mine] == [json.loads(b)["digest"] for b in its]
    ledgers[0].path.write_bytes(b"".join([*mine[:3], its[3], *mine[4:]]))
    with pytest.raises(TargetError, match="entry 4 of .* was not written with the pool's key.* copied from"):
        _ = AnyLedger(tmp_path / "a", KEY).serving


def test_entries_missing_at_the_end_are_detected_while_the_head_is_there(stolen, tmp_path):
    lines = stolen.splitlines(keepends=True)
    (tmp_path / "ledger.jsonl").write_bytes(b"".join(lines[:6]))
    with pytest.raises(TargetError, match="has 6 entries, but ledger.head records 8"):
        Ledger(tmp_path).exposed()
    (tmp_path / HEAD).unlink()
    with pytest.raises(TargetError, match="ledger.head' is missing"):
        Ledger(tmp_path).exposed()


def test_a_head_of_another_time_does_not_hide_what_was_added(stolen, tmp_path):
    """A kill leaves a ledger that is one entry longer than its head; an older head does no more than that."""
    records = [json.loads(line) for line in stolen.splitlines()]
    LedgerHead(tmp_path / HEAD, KEY).write(Head(6, records[5]["digest"]))
    assert [one.name for one in Ledger(tmp_path).exposed()] == ["one"]
    assert json.loads((tmp_path / HEAD).read_bytes())["entries"] == 8, "and the head is written again"


def test_an_older_copy_of_everything_is_known_by_a_head_that_is_kept_elsewhere(whole, stolen, tmp_path):
    head = Ledger(tmp_path).head
    old = holding(tmp_path, whole)
    assert old.exposed() == () and old.entry_of(head) is None
    newer = Ledger(tmp_path)
    early = newer.head
    newer.expose("one", "laptop stolen")
    assert newer.entry_of(early) == 6, "what was added since does not matter"


# --- what is exposed, and what was judged


def test_a_theft_counts_although_the_set_had_been_listed_automatically(ledger):
    for name in ("base", "drawn"):
        ledger.candidate(name, DIGEST)
    ledger.expose("base", "drawn was made from it", automatic=True)
    ledger.admit("drawn", against=["base"])
    assert ledger.unjudged == () and ledger.exposed()[0].automatic
    ledger.expose("base", "listed again", automatic=True)
    assert ledger.unjudged == () and ledger.exposed()[0].entry == 3
    ledger.expose("base", "laptop stolen")
    (known,) = ledger.exposed()
    assert (known.why, known.automatic, known.entry) == ("laptop stolen", False, 6)
    assert ledger.unjudged == ledger.ahead == ("drawn",)
    ledger.expose("base", "listed once more", automatic=True)
    assert ledger.exposed() == (known,), "the report stands"
    ledger.admit("drawn", against=["base"])
    assert ledger.unjudged == ()


@pytest.mark.parametrize("why", ["laptop stolen", "a base of drawn", ""])
def test_no_reason_in_words_decides_whether_a_set_is_judged_again(ledger, why):
    for name in ("old", "drawn"):
        ledger.candidate(name, DIGEST)
        ledger.admit(name)
    ledger.expose("old", why)
    assert ledger.unjudged == ("drawn",)
    with pytest.raises(UsageError, match="'drawn' was not judged against all stolen sets"):
        ledger.serve("drawn")
    ledger.serve("drawn", unjudged=True)
    last = json.loads(ledger.path.read_bytes().splitlines()[-1])["content"]
    assert last["unjudged"] is True and last["kind"] == "serving"


def test_a_base_never_serves(ledger):
    ledger.candidate("base", DIGEST, role="base")
    with pytest.raises(UsageError, match="'base' is a base, which other sets are generated from"):
        ledger.admit("base")
    with pytest.raises(UsageError, match="'base' is base; only a set that is candidate or admitted"):
        ledger.refuse("base", "why")
    assert ledger.states == {"base": "base"}, "no refused set"
    ledger.delete("base")


def test_an_incomplete_last_record_is_ignored(whole, tmp_path):
    lines = whole.splitlines(keepends=True)
    for cut in (1, len(lines[-1]) // 2, len(lines[-1]) - 1):
        ledger = holding(tmp_path, whole[:-cut])  # of which the head was not written
        assert ledger.serving.name == "one" and ledger.ahead == ("two",)
        assert (tmp_path / "ledger.jsonl").read_bytes() == b"".join(lines[:-1])
        ledger.serve("two")
        assert Ledger(tmp_path).serving.name == "two"


def test_entries_that_vanish_under_a_process_are_missed(whole, tmp_path):
    ledger = holding(tmp_path, whole)
    assert ledger.serving.name == "two"
    (tmp_path / "ledger.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:4]))
    with pytest.raises(TargetError, match="entry 6 of .* or an earlier one was removed"):
        _ = ledger.serving


def test_the_files_are_their_owners_alone(ledger, tmp_path):
    (tmp_path / "ledger.jsonl").touch(0o644)
    served(ledger, "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ledger.head", "ledger.jsonl", "ledger.lock"]
    if os.name != "nt":
        assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_leaves_the_old_state(ledger, tmp_path, monkeypatch, call):
    served(ledger, "one")
    before = (tmp_path / "ledger.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        failing(patch, 1, (call,))
        with pytest.raises(TargetError, match="the disk is full: .*ledger.jsonl"):
            ledger.expose("one", "stolen")
    assert (tmp_path / "ledger.jsonl").read_bytes() == before
    assert ledger.exposed() == Ledger(tmp_path).exposed() == ()
    ledger.expose("one", "stolen")
    assert len(Ledger(tmp_path).exposed()) == 1


# --- several processes


def test_a_held_lock_is_waited_for_and_then_reported(tmp_path):
    with (
        locked(tmp_path / "lock"),
        pytest.raises(TargetError, match="lock' cannot be locked: database is locked; wait for"),
        locked(tmp_path / "lock", wait_s=0.05),
    ):
        pass
    with locked(tmp_path / "lock", wait_s=0.05):
        pass
    with (
        pytest.raises(TargetError, match="cannot be locked: [^;]*; check the free"),
        locked(tmp_path / "none" / "lock"),
    ):
        pass


WRITER = """
    import sys
    from pathlib import Path
    from holdfast.core.errors import UsageError
    from holdfast.rotation.ledger import Ledger
    folder, me, n = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    ledger, swaps = Ledger(folder, b"k" * 32), 0
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


@pytest.mark.slow
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
