"""Pools of parameter sets: sealed, swapped by one entry, refused when anything does not hold, whole after any kill."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from disk import failing
from holdfast.core.errors import Inconclusive, InUse, TargetError, UsageError
from holdfast.rotation.ledger import is_complete, verify_pool
from holdfast.runs.store import Pool
from holdfast.runs.store.encryption import KEY_VARIABLE, Seal, key_file
from store.lives import begun, weights

HERE = Path(__file__).resolve().parent
KEY = "5a" * 32


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, KEY)


@pytest.fixture
def pool(tmp_path):
    """Set 0 serves, 1 and 2 wait."""
    return begun(tmp_path / "pool", 2)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def file_of(pool, name):
    return pool.path / "sets" / f"{name}.sealed"


def test_an_added_set_is_read_again_with_the_key(pool):
    name = pool.add(weights(5), {"seed": 5}, bases=[pool.serving.name])
    for held in (pool, Pool.open(pool.path)):
        assert same(held.weights(name), weights(5)) and held.about(name) == {"seed": 5}
        assert held.ledger.member(name).bases == (pool.serving.name,)
        assert held.manifest["about"] == {"of": "a test"}


def test_the_description_of_a_set_is_decrypted_once_and_deleted_with_the_set(pool, monkeypatch):
    name = pool.add(weights(5), {"seed": 5})
    held, opened = Pool.open(pool.path), []
    whole = Seal.open
    monkeypatch.setattr(Seal, "open", lambda self, *given: opened.append(given) or whole(self, *given))
    assert [held.about(name) for _ in range(3)] == [{"seed": 5}] * 3 and len(opened) == 1
    pool.delete(name)
    with pytest.raises(UsageError, match="were deleted"):
        held.about(name)


def test_the_same_weights_are_one_set_whatever_their_description(pool):
    name, entries = pool.ahead[0], pool.ledger.entries
    before = file_of(pool, name).read_bytes()
    assert pool.add(weights(1), {"another": "story"}) == name
    assert pool.ledger.entries == entries and file_of(pool, name).read_bytes() == before
    assert pool.about(name) == {"k": 1}
    assert pool.add(weights(6), {}) != name


def test_nothing_on_the_disk_shows_the_weights_or_is_open_to_others(pool):
    pool.keep("generator", {"g": torch.full((64,), 3.5)}, {})
    plain = torch.full((8,), 1.0).numpy().tobytes()
    files = [path for path in pool.path.rglob("*") if path.is_file()]
    assert len(files) == 4 + 1 + 3
    for path in files:
        assert plain[:16] not in path.read_bytes() and b"safetensors" not in path.read_bytes()
        assert os.name == "nt" or path.stat().st_mode & 0o777 == 0o600
    for folder in (pool.path, pool.path / "sets"):
        assert os.name == "nt" or folder.stat().st_mode & 0o777 == 0o700
    assert KEY not in repr(vars(pool))


def test_the_ledger_counts_answers_without_names(pool):
    pool.answered(1, {"alice": 3, "bob": 1}, others=2)
    Pool.open(pool.path).answered(1, {"alice": 2})
    (term,) = pool.ledger.terms
    assert term.answers == {pool.pseudonym("alice"): 5, pool.pseudonym("bob"): 1} and term.others == 2
    assert b"alice" not in pool.ledger.path.read_bytes()
    other = Pool.create(pool.path.with_name("other"), {})
    assert other.pseudonym("alice") != pool.pseudonym("alice"), "two pools know her by two names"
    with pytest.raises(UsageError, match="7 is not the name of a principal"):
        pool.answered(1, {7: 1})


def test_a_swap_is_one_entry_and_takes_the_set_that_waits_longest(pool):
    old, (first, second), entries = pool.serving, pool.ahead, pool.ledger.entries
    now = pool.swap(why="timer")
    assert (now.name, now.epoch) == (first, 2) and pool.ledger.entries == entries + 1
    assert pool.ledger.states[old.name] == "retired" and pool.ahead == (second,)
    assert same(pool.weights(now.name), weights(1))
    assert Pool.open(pool.path).serving == now


def test_another_than_the_first_may_be_chosen_and_only_among_those_that_wait(pool):
    first, second = pool.ahead
    old = pool.serving.name
    with pytest.raises(
        UsageError, match=f"'{old}' is serving; only a set that is admitted can become serving"
    ):
        pool.swap(choose=lambda waiting: old)
    assert pool.swap(choose=lambda waiting: waiting[-1]).name == second and pool.ahead == (first,)


def test_an_exposed_set_is_passed_over(pool):
    first, second = pool.ahead
    old = pool.serving.name
    pool.expose(first, "a backup was copied")
    pool.expose(old, "laptop stolen")
    pool.admit(second, against=[first, old])
    assert pool.swap().name == second
    with pytest.raises(
        Inconclusive, match=f"contains no waiting admitted set, so '{second}' still serves"
    ) as caught:
        pool.swap()
    assert caught.value.exit_code == 4 and pool.serving.name == second
    assert "draw and admit more sets" in str(caught.value)
    pool.add(weights(5), {})
    with pytest.raises(Inconclusive, match="judge the drawn sets with holdfast rotate admit "):
        pool.swap()


def test_a_set_that_was_not_judged_against_all_exposed_sets_serves_only_on_request(pool):
    first, second = pool.ahead
    old = pool.serving.name
    pool.expose(old, "laptop stolen")
    with pytest.raises(Inconclusive, match=r"2 were admitted before.* rotate admit .*--unjudged"):
        pool.swap()
    with pytest.raises(UsageError, match="was not judged against all stolen sets"):
        pool.serve(first)
    pool.admit(second, against=[old])
    assert pool.unjudged == (first,) and pool.swap().name == second, "which is taken first"
    with pytest.raises(Inconclusive):
        pool.swap()
    assert pool.swap(unjudged=True).name == first


def test_two_triggers_at_once_swap_once(pool):
    other = Pool.open(pool.path)
    assert pool.swap(epoch=1) == other.swap(epoch=1) == other.serving
    assert other.swap(epoch=2).epoch == 3


def test_a_trigger_of_a_retired_epoch_does_not_swap(pool):
    epoch = pool.serving.epoch
    pool.retire(pool.serving.name, "stopped")
    with pytest.raises(
        Inconclusive, match=f"epoch {epoch} has ended, and no set serves in .*; swap without an epoch"
    ):
        pool.swap(epoch=epoch)
    assert pool.serving is None
    assert pool.swap().epoch == epoch + 1


def test_a_refused_set_may_be_stolen_too(pool):
    name = pool.add(weights(7), {})
    pool.refuse(name, "transfer_success 0.6")
    pool.expose(name, "laptop stolen")
    assert [exposure.name for exposure in pool.ledger.exposed()] == [name]


@pytest.mark.parametrize(
    "given, said, expected",
    [
        ({}, {}, "the set contains no parameters; give the state dict"),
        ({"w": [1.0]}, {}, "w of the set is a list; a tensor was expected"),
        ({"w": torch.full((2,), torch.nan)}, {}, "w of the set contains NaN or infinite values"),
        (
            {"w": torch.ones(2)},
            {"when": Path("now")},
            "the metadata of the set cannot be stored: .* is not JSON",
        ),
        (
            {"w": torch.ones(2)},
            {"share": float("nan")},
            "the metadata of the set cannot be stored: .* not JSON compliant",
        ),
    ],
)
def test_a_set_or_description_of_another_form_is_refused(pool, given, said, expected):
    entries = pool.ledger.entries
    with pytest.raises(UsageError, match=expected):
        pool.add(given, said)
    assert pool.ledger.entries == entries


def test_a_pool_that_cannot_be_begun_leaves_the_folder_as_it_is(pool, tmp_path):
    with pytest.raises(UsageError, match="the metadata of the set cannot be stored"):
        Pool.create(tmp_path / "new", {"model": object()})
    assert not (tmp_path / "new").exists()
    pool.path.chmod(0o755)
    with pytest.raises(UsageError, match="contains a pool already"):
        Pool.create(pool.path, {})
    assert pool.path.stat().st_mode & 0o777 == 0o755


def test_before_the_first_swap_nothing_serves(tmp_path):
    pool = Pool.create(tmp_path / "pool", {})
    assert pool.serving is None
    with pytest.raises(Inconclusive, match="no set serves yet"):
        pool.swap()
    name = pool.add(weights(0), {})
    with pytest.raises(
        UsageError, match=f"'{name}' is candidate; only a set that is admitted can become serving"
    ):
        pool.serve(name)
    pool.admit(name)
    assert pool.serve(name).epoch == 1
    pool.retire(name, "alarm")
    assert pool.serving is None and Pool.open(pool.path).ledger.states == {name: "retired"}


def test_a_refused_set_remains_refused_when_it_is_added_again(pool):
    name = pool.add(weights(5), {})
    pool.refuse(name, "transfer .4")
    assert pool.add(weights(5), {}) == name and pool.ledger.states[name] == "refused"
    pool.delete(name)
    assert not file_of(pool, name).exists()
    with pytest.raises(UsageError, match="parameters of .* were deleted"):
        pool.weights(name)
    with pytest.raises(UsageError, match="was deleted, or is the name of another set; draw another"):
        pool.add(weights(5), {})
    for waits in (pool.ahead[0], pool.serving.name):
        with pytest.raises(
            UsageError, match="only a set that is candidate or refused or retired or base can become deleted"
        ):
            pool.delete(waits)
        assert file_of(pool, waits).exists()


def test_other_secrets_are_stored_encrypted(pool):
    assert pool.kept("generator") is None
    for k in (1, 2):
        pool.keep("generator", weights(k), {"k": k})
    found = Pool.open(pool.path).kept("generator")
    assert same(found.columns, weights(2)) and found.about == {"k": 2}
    with pytest.raises(UsageError, match="'../x' is not a valid file name"):
        pool.keep("../x", weights(1), {})


def test_both_are_imported_from_the_lower_layer():
    from holdfast.runs import store

    assert {"Ledger", "Pool"} == set(dir(store)) and store.Pool.__name__ == "Pool"
    with pytest.raises(AttributeError, match="no attribute 'Legder'; it has Ledger, Pool"):
        _ = store.Legder


# --- bad input


def test_an_unknown_set_is_refused_everywhere(pool):
    near = pool.serving.name
    for act in (pool.weights, pool.about, pool.serve, pool.admit, lambda name: pool.expose(name, "stolen")):
        with pytest.raises(UsageError, match=f"is not a set of this ledger; similar names: .*{near}"):
            act(near[:-1])


def test_a_missing_pool_and_an_existing_pool_are_reported(pool, tmp_path):
    (tmp_path / "empty").mkdir()
    for none in (tmp_path / "none", tmp_path / "empty"):
        with pytest.raises(TargetError, match="is not a pool, or its creation was interrupted"):
            Pool.open(none)
        assert not is_complete(none)
    assert not list((tmp_path / "empty").iterdir())
    with pytest.raises(UsageError, match="contains a pool already"):
        Pool.create(pool.path, {})
    (tmp_path / "empty" / "run.json").write_text("{}")
    Pool.create(tmp_path / "empty", {})
    assert is_complete(tmp_path / "empty")


def test_no_folder_is_begun_for_a_key_that_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "abc")
    with pytest.raises(UsageError, match="64 hex digits"):
        Pool.create(tmp_path / "pool", {})
    assert not list(tmp_path.iterdir())


def test_a_wrong_key_is_distinguished_from_a_corrupt_file(pool, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "77" * 32)
    with pytest.raises(
        TargetError, match=f"pool.json' is encrypted with key {pool.seal.id}.*from {KEY_VARIABLE}\\); set"
    ):
        Pool.open(pool.path)
    monkeypatch.delenv(KEY_VARIABLE)
    with pytest.raises(TargetError, match=f"{KEY_VARIABLE} is not set, and .*pool.key' does not exist"):
        Pool.open(pool.path)
    key_file(pool.path).write_text(KEY + "\n")
    key_file(pool.path).chmod(0o600)
    assert Pool.open(pool.path).serving == pool.serving


@pytest.mark.parametrize("how", ["flipped", "cut", "emptied", "another", "of another pool"])
def test_a_set_that_is_not_what_it_was_never_serves(pool, tmp_path, how):
    first, second = pool.ahead
    path, old = file_of(pool, first), pool.serving
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(
        {
            "flipped": data,
            "cut": data[:-7],
            "emptied": b"",
            "another": file_of(pool, second).read_bytes(),
            "of another pool": file_of(begun(tmp_path / "other", 2), first).read_bytes(),
        }[how]
    )
    held = Pool.open(pool.path)
    for act in (held.swap, lambda: held.serve(first), lambda: held.weights(first)):
        with pytest.raises(
            TargetError, match=f"{first}.sealed' (is not|was changed or truncated).*restore it"
        ):
            act()
    assert held.serving == old
    held.retire(first, "its file is corrupt")
    assert held.swap().name == second


@pytest.mark.parametrize("lost", ["serving", "admitted", "exposed"])
def test_a_missing_set_that_is_needed_is_named(pool, lost):
    old, (first, _) = pool.serving.name, pool.ahead
    if lost == "exposed":
        pool.swap()
        pool.expose(old, "stolen")
    file_of(pool, first if lost == "admitted" else old).unlink()
    with pytest.raises(
        TargetError, match=f"sealed' is missing, but the ledger lists the set as {lost}; restore"
    ):
        Pool.open(pool.path)


def test_the_file_of_a_retired_set_may_be_missing(pool):
    old = pool.serving.name
    pool.swap()
    file_of(pool, old).unlink()
    held = Pool.open(pool.path)
    with pytest.raises(TargetError, match=f"{old}.sealed' cannot be used: No such file"):
        held.weights(old)
    assert held.add(weights(0), {"k": 0}) == old and same(held.weights(old), weights(0))


def test_a_broken_chain_serves_nothing_and_names_the_entry(pool):
    path = pool.path / "ledger.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], lines[2].replace('"admitted"', '"refused"'), *lines[3:]]))
    with pytest.raises(
        TargetError, match="entry 3 of .*ledger.jsonl' was changed.*no set of this pool is served"
    ):
        Pool.open(pool.path)


def test_a_ledger_that_was_shortened_with_its_head_is_noticed_by_the_sets(pool, tmp_path):
    shutil.copytree(pool.path, tmp_path / "before")
    name = pool.add(weights(5), {})
    for file in ("ledger.jsonl", "ledger.head"):
        shutil.copy(tmp_path / "before" / file, pool.path / file)
    with pytest.raises(
        TargetError, match=f"{name}.sealed' is in no entry of .*ledger.jsonl', which was shortened"
    ):
        Pool.open(pool.path)
    assert file_of(pool, name).exists()


def test_an_older_copy_of_the_whole_folder_is_known_by_a_head_that_is_kept_elsewhere(pool, tmp_path):
    shutil.copytree(pool.path, tmp_path / "before")
    early = pool.ledger.head
    pool.expose(pool.serving.name, "laptop stolen")
    head = pool.ledger.head
    for known in (early, head):
        assert Pool.open(pool.path, expect_head=known).ledger.head == head
    assert Pool.open(tmp_path / "before").ledger.exposed() == (), "which nothing within the folder tells"
    with pytest.raises(TargetError, match=f"has the digest {head[:16]}… that was expected: .* older copy"):
        Pool.open(tmp_path / "before", expect_head=head)
    with pytest.raises(UsageError, match="64 hex digits were expected"):
        Pool.open(pool.path, expect_head="abc")


@pytest.mark.parametrize("lost", ["pool.json", "ledger.jsonl"])
def test_a_missing_part_of_a_pool_is_named_and_not_replaced(pool, lost):
    (pool.path / lost).unlink()
    for ask in (Pool.open, lambda path: Pool.create(path, {})):
        with pytest.raises(TargetError, match=f"contains a pool whose {lost} is missing"):
            ask(pool.path)


def test_a_changed_manifest_is_refused(pool):
    path = pool.path / "pool.json"
    text = path.read_text()
    path.write_text(text.replace("a test", "another"))
    with pytest.raises(TargetError, match="pool.json' is not what the ledger recorded"):
        Pool.open(pool.path)
    path.write_text(text.replace('"schema_version": 2', '"schema_version": 7'))
    with pytest.raises(TargetError, match="schema version 7; this version reads 2"):
        Pool.open(pool.path)


def test_pools_do_not_take_each_others_ledgers(pool, tmp_path):
    """They share a key, and the sets are the same."""
    other = begun(tmp_path / "other", 2)
    for file in ("ledger.jsonl", "ledger.head"):
        shutil.copy(other.path / file, pool.path / file)
    with pytest.raises(TargetError, match="ledger.head' was not written with the pool's key"):
        Pool.open(pool.path)
    shutil.copy(other.path / "pool.json", pool.path / "pool.json")
    held = Pool.open(pool.path)  # which is the other pool by now, and cannot open these sets
    with pytest.raises(TargetError, match="is a copy of another file"):
        held.weights(held.ahead[0])


def test_a_set_whose_writer_was_killed_before_the_rename_can_be_added_again(pool):
    name = pool.ahead[0]
    file_of(pool, name).rename(pool.path / "sets" / f"{name}.sealed.new")
    assert same(pool.weights(name), weights(1)) and file_of(pool, name).exists()


ALONE = """
import sys, time
from pathlib import Path
from holdfast.runs.store import Pool

with Pool.open(Path(sys.argv[1])).alone_at("admit"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_step_has_one_process_and_a_dead_one_is_not_waited_for(pool):
    other = subprocess.Popen([sys.executable, "-c", ALONE, str(pool.path)], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        said = "another process runs admit in .*pool'; wait until it ends"
        with pytest.raises(InUse, match=said), pool.alone_at("admit"):
            pass
        with pool.alone_at("draw"):  # another step may go on meanwhile
            pass
    finally:
        other.kill()
        other.communicate()
    with pool.alone_at("admit"):
        pass


def test_files_of_a_killed_writer_without_an_entry_are_removed_and_no_others(pool):
    sets = pool.path / "sets"
    for name in ("0123456789abcdef.sealed.new", ".0123456789abcdef.sealed.new.part", "notes.txt"):
        (sets / name).write_text("half")
    (pool.path / ".pool.json.part").write_text("half")
    Pool.open(pool.path)
    assert {path.name for path in sets.iterdir()} == {
        *(f"{name}.sealed" for name in pool.ledger.states),
        "notes.txt",
    }
    assert not (pool.path / ".pool.json.part").exists()


# --- full disks


CALLS = ("open", "write", "fsync", "replace")


@pytest.mark.parametrize("at", range(1, 13))
def test_a_full_disk_leaves_the_old_pool_or_the_new(pool, monkeypatch, at):
    before = pool.ledger.states
    with monkeypatch.context() as patch:
        failing(patch, at, CALLS)
        with pytest.raises(TargetError, match="the disk is full"):
            pool.add(weights(5), {})
    left = [path.name for path in (pool.path / "sets").glob("*.new")]  # a full disk is not filled further
    assert left == [] or len(pool.ledger.states) == 4
    held = Pool.open(pool.path)
    assert held.serving == pool.serving and len(held.ledger.states) - len(before) in (0, 1)
    name = held.add(weights(5), {})
    assert held.ledger.states == before | {name: "candidate"} and same(held.weights(name), weights(5))
    assert len(list((pool.path / "sets").iterdir())) == 4


def test_a_swap_that_finds_the_disk_full_leaves_what_serves(pool, monkeypatch):
    old = pool.serving
    with monkeypatch.context() as patch:
        failing(patch, 2, CALLS)
        with pytest.raises(TargetError, match="the disk is full"):
            pool.swap()
    assert pool.serving == Pool.open(pool.path).serving == old
    assert pool.swap().epoch == 2


def fill(pool):
    for k in range(100):
        pool.add({"w": torch.full((2000,), float(k))}, {})


def test_a_tiny_disk_loses_nothing(tiny):
    pool = begun(tiny / "pool", 1)
    with pytest.raises(TargetError, match="the disk is full"):
        fill(pool)
    held = Pool.open(tiny / "pool")
    assert held.serving.epoch == 1 and held.swap().epoch == 2
    kept = len(held.ledger.states)
    subprocess.run(["mount", "-o", "remount,size=4m", str(tiny)], check=True)
    fill(held)
    assert 2 < kept < len(Pool.open(tiny / "pool").ledger.states) == 102


# --- kills and several processes


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    """What is told of pools whose processes were killed, or met."""
    if not hasattr(os, "fork"):
        pytest.skip("the system cannot fork")
    done = subprocess.run(
        [sys.executable, str(HERE / "lives.py"), str(tmp_path_factory.mktemp("lives"))],
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1] / "src"), KEY_VARIABLE: KEY},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_pool_can_be_used_after_a_kill_at_any_call_to_the_disk(lives):
    assert lives["calls"]["calls"] > 30 and lives["calls"]["epochs"] == [1, 2]


@pytest.mark.slow
def test_a_pool_whose_beginning_was_killed_is_begun_again(lives):
    assert lives["begun"]["calls"] > 10


@pytest.mark.slow
def test_twenty_kills_among_swaps_leave_the_old_set_serving_or_the_new(lives):
    assert lives["random"]["epoch"] > 20


def test_processes_that_ask_for_the_same_swap_get_one(lives):
    assert lives["together"]["epoch"] == 2


def test_processes_that_add_the_same_sets_add_each_once(lives):
    assert lives["together"]["sets"] == 10


@pytest.mark.parametrize("content", [b"", b"no tensors", None])
def test_verification_opens_every_encrypted_file(content, pool):
    pool.keep("canaries", {"x": torch.zeros(1)}, {})
    pool.keep("seed", {"seed": torch.zeros(1)}, {})
    assert verify_pool(pool.path).authenticated
    file = pool.path / "canaries.sealed"
    file.write_bytes((pool.path / "seed.sealed").read_bytes() if content is None else content)
    with pytest.raises(TargetError, match=r"canaries\.sealed"):
        verify_pool(pool.path)
