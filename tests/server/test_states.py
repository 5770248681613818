"""States of the query detector: all kinds give the same scores, share their content between processes, forget, and
survive the loss of a server or file.
"""

import logging
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from threading import Timer

import numpy as np
import pytest
import torch

from holdfast.core.errors import TargetError
from holdfast.guard.detectors.queries import QueryDetector, StateLimits, SteadyClock, Wanted
from holdfast.guard.state_in_memory import Allowance, Charge, MemoryState
from holdfast.guard.state_in_redis import RedisState
from holdfast.guard.state_in_sqlite import AT_LAST, HashIndex, SQLiteState
from redis_server import redis_server

KEY, SHAPE = bytes(range(32)), (3, 32, 32)


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory):
    pytest.importorskip("redis", reason="the package redis is not installed")
    with redis_server(tmp_path_factory.mktemp("redis")) as (url, _, _):
        yield url


@pytest.fixture(params=["memory", "sqlite", "redis"])
def state_of(request, tmp_path):
    """Function that opens the same state again, in another handle if the kind has handles."""
    if request.param == "memory":
        states = {}
        yield lambda limits=None, **settings: states.setdefault("one", MemoryState(limits))
    elif request.param == "sqlite":
        yield lambda limits=None, **settings: SQLiteState(tmp_path / "state.db", limits, **settings)
    else:
        url, name = request.getfixturevalue("redis_url"), tmp_path.name
        yield lambda limits=None, **settings: RedisState(url, limits, name=name, **settings)


def images(n, seed=0):
    """Smooth random images, whose low-pass versions differ."""
    coarse = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=32, mode="bilinear", align_corners=False)


def variants(x, n, size=0.03, seed=1):
    """Versions of one image that differ by noise."""
    noise = torch.randn(n, *x.shape[1:], generator=torch.Generator().manual_seed(seed)).sign()
    return (x + size * noise).clamp(0, 1)


def test_handles_and_principals_share_a_state(state_of):
    detectors = [QueryDetector(KEY, state_of(), SHAPE) for _ in range(4)]
    x = images(1)
    scores = [
        detectors[k % 4].score(each[None], [f"client {k % 10}"], float(k))[0]
        for k, each in enumerate(variants(x, 40))
    ]
    assert scores[0] == 0 and scores == sorted(scores) and scores[-1] > detectors[0].settings.threshold


def test_all_states_give_the_scores_of_the_memory(state_of):
    limits, others = StateLimits(half_life_s=50), images(20, seed=3)
    x = torch.cat([variants(images(1), 30), others, others[:5], variants(images(1), 6, seed=4)])
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(2))]
    principals = [f"client {k % 3}" for k in range(len(x))]
    detectors = [QueryDetector(KEY, state, SHAPE) for state in (MemoryState(limits), state_of(limits))]
    for start in range(0, len(x), 7):
        rows = slice(start, start + 7)
        first, second = (each.examine(x[rows], principals[rows], 10.0 * start) for each in detectors)
        assert first.scores == pytest.approx(second.scores, abs=0.02)  # sketches are stored in half precision
        assert [d.repeat for d in first.details] == [d.repeat for d in second.details]
        assert [d.principal_share for d in first.details] == pytest.approx(
            [d.principal_share for d in second.details], abs=0.01
        )


@pytest.mark.parametrize("recent", [0, 50, 10_000])
def test_processes_see_the_queries_of_each_other_in_a_file(tmp_path, set_limit, recent):
    """Each has an index of the file in memory, whose newest entries are merged after `recent` ones."""
    set_limit("holdfast.guard.state_in_sqlite._RECENT", recent)
    opened = [SQLiteState(tmp_path / "state.db") for _ in range(2)]
    alone = QueryDetector(KEY, MemoryState(), SHAPE)
    several = [QueryDetector(KEY, state, SHAPE) for state in opened]
    x = torch.cat([variants(images(1), 12), images(20, seed=3), images(20, seed=3), variants(images(1), 4)])
    for start in range(0, len(x), 3):
        if start == 30:  # a process that starts later reads all of it
            several.append(QueryDetector(KEY, SQLiteState(tmp_path / "state.db"), SHAPE))
        batch, names = x[start : start + 3], ["client"] * len(x[start : start + 3])
        second = several[start // 3 % len(several)].examine(batch, names, float(start))
        first = alone.examine(batch, names, float(start))
        assert first.scores == pytest.approx(second.scores, abs=0.02)
        assert [d.repeat for d in first.details] == [d.repeat for d in second.details]


def test_pairs_are_dropped_from_an_index_without_a_copy_of_it(monkeypatch, set_limit):
    """Each query near a full bucket drops some, within a transaction for which other processes wait."""
    set_limit("holdfast.guard.state_in_sqlite._RECENT", 40)
    index, pairs, chance = HashIndex(), dict[int, list[int]](), random.Random(0)
    copies, merge = [], HashIndex._merge
    monkeypatch.setattr(HashIndex, "_merge", lambda each: (copies.append(each), merge(each)))
    for row in range(1000):
        hashes = chance.sample(range(30), 5)
        index.add(hashes, row)
        for each in hashes:
            pairs.setdefault(each, []).append(row)
            if len(pairs[each]) > 4:
                index.discard(each, pairs[each].pop(chance.randrange(4)))
        assert index.rows(np.arange(-5, 35)) == pairs
    assert len(copies) <= 5000 / 40 * 2
    index.keep(np.array([999]))
    assert index.rows(np.arange(30)) == {each: [999] for each in hashes} and len(index) == 5


def test_the_index_in_memory_does_not_keep_dropped_queries(tmp_path, set_limit):
    set_limit("holdfast.guard.state_in_sqlite._STALE", 0)
    state = SQLiteState(tmp_path / "state.db", StateLimits(clusters=20, digests=20))
    detector, other = QueryDetector(KEY, state, SHAPE), SQLiteState(tmp_path / "state.db")
    x = torch.rand(600, *SHAPE, generator=torch.Generator().manual_seed(0))
    for start in range(0, 600, 60):
        detector.score(x[start : start + 60], [""] * 60, float(start))
    assert QueryDetector(KEY, other, SHAPE).examine(x[-1:], [""], 600.0).details[0].repeat
    for each in (state, other):
        assert len(each._clusters) <= 8 * 200 and len(each._answers) <= 200


def test_exact_repeats_of_answered_queries_do_not_count(state_of):
    detector, x = QueryDetector(KEY, state_of(), SHAPE), images(1)
    again = [detector.examine(x, ["client"], float(k)) for k in range(30)]
    assert all(result.scores[0] == 0 for result in again) and again[-1].details[0].repeat


def test_masses_halve_in_a_half_life(state_of):
    detector, attack = (
        QueryDetector(KEY, state_of(StateLimits(half_life_s=100)), SHAPE),
        variants(images(1), 12),
    )
    for each in attack[:-2]:
        detector.score(each[None], [""], 0.0)
    before = detector.score(attack[-2:-1], [""], 0.0)[0]
    after = detector.examine(attack[-1:], [""], 100.0)
    assert after.scores[0] == pytest.approx(before / 2 + after.details[0].weight, rel=0.01)


def test_the_least_recently_used_clusters_are_dropped(state_of):
    detector = QueryDetector(KEY, state_of(StateLimits(clusters=20, digests=20, accounts=20)), SHAPE)
    many = images(120, seed=5)
    for k, each in enumerate(many):
        detector.score(each[None], [f"client {k}"], float(k))
    old, new = (
        detector.examine(variants(each[None], 1), [""], 200.0).details[0] for each in (many[0], many[-1])
    )
    assert old.cluster is None and new.cluster is not None


def test_many_clusters_with_a_common_hash_are_bounded(state_of):
    detector = QueryDetector(KEY, state_of(), SHAPE, bucket=1e6)  # all inputs have the same hashes
    many = images(50, seed=6)
    for k, each in enumerate(many):
        detector.score(each[None], [""], float(k))
    old, new = (
        detector.examine(variants(each[None], 1), [""], 60.0).details[0] for each in (many[0], many[-1])
    )
    assert old.cluster is None and new.cluster is not None


def test_rates_and_budgets_are_those_of_the_memory(state_of):
    draws, states = random.Random(0), (MemoryState(), state_of())
    allowances = [
        Allowance(rate_per_s=2, burst=5),
        Allowance(budget=20, period_s=30),
        Allowance(rate_per_s=1, burst=8, budget=30, period_s=20),
        Allowance(),
    ]
    now, granted = 0.0, set()
    for _ in range(60):
        now += draws.expovariate(1)
        charges = [
            Charge(f"client {k}", draws.randint(1, 9), allowances[k]) for k in draws.choices(range(4), k=3)
        ]
        first, second = (state.spend(charges, now) for state in states)
        for one, other in zip(first, second, strict=True):
            assert (one.granted, one.reason) == (other.granted, other.reason)
            assert one.retry_after_s == pytest.approx(other.retry_after_s, abs=1e-3)
            granted.add((one.granted, one.reason))
    assert granted == {(True, ""), (False, "rate"), (False, "budget"), (False, "size")}


def test_a_refused_charge_is_granted_after_the_stated_time(state_of):
    state, charge = state_of(), Charge("client", 5, Allowance(rate_per_s=2, burst=5))
    assert state.spend([charge], 0.0)[0].granted
    refused = state.spend([charge], 1.0)[0]
    assert not refused.granted and refused.retry_after_s == pytest.approx(1.5)
    assert state.spend([charge], 1.0 + refused.retry_after_s)[0].granted


def test_a_clock_that_is_set_neither_stops_nor_jumps():
    clock = SteadyClock()
    assert [clock.at(now, None) for now in (1000.0, 1010.0, 500.0, 520.0)] == [0, 10, 10, 30]
    assert clock.at(10**9, None) == 30 + 3600
    assert SteadyClock().at(1010.0, (1000.0, 70.0)) == 80  # a new process continues the time of the state


WORKER = """
import sys, torch
from pathlib import Path
from holdfast.guard.detectors.queries import QueryDetector
from holdfast.guard.state_in_sqlite import SQLiteState
detector = QueryDetector(bytes(range(32)), SQLiteState(Path(sys.argv[1])), (3, 32, 32))
generator = torch.Generator().manual_seed(int(sys.argv[2]))
for k in range(25):
    x = 0.5 + 0.03 * torch.randn(1, 3, 32, 32, generator=generator).sign()
    detector.score(x, [""], float(k))
"""


@pytest.mark.slow
def test_processes_write_one_file_at_the_same_time(tmp_path):
    path = tmp_path / "state.db"
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(path), str(seed)]) for seed in range(3)]
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    state = SQLiteState(path)
    detail = QueryDetector(KEY, state, SHAPE).examine(torch.full((1, 3, 32, 32), 0.5), [""], 30.0).details[0]
    assert detail.members == 76
    state.close()
    assert path.stat().st_mode & 0o077 == 0  # nobody else may read it


ANSWERING = """
import sys, torch
from pathlib import Path
from holdfast.guard.detectors.queries import QueryDetector
from holdfast.guard.state_in_sqlite import SQLiteState
detector = QueryDetector(bytes(range(32)), SQLiteState(Path(sys.argv[1])), (3, 32, 32))
for k in range(10**6):
    x = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(k))
    detector.score(x, ["client"] * 8, float(k))
    print(k, flush=True)
"""


@pytest.mark.slow
def test_a_kill_loses_no_answered_query_and_no_part_of_a_batch(tmp_path):
    path = tmp_path / "state.db"
    with subprocess.Popen([sys.executable, "-c", ANSWERING, str(path)], stdout=subprocess.PIPE) as process:
        for _ in range(40):
            process.stdout.readline()
        process.kill()
        answered = 40 + len([line for line in process.stdout if line.endswith(b"\n")])
    state = SQLiteState(path)
    detector = QueryDetector(KEY, state, SHAPE)
    for k in range(answered):
        x = torch.rand(8, *SHAPE, generator=torch.Generator().manual_seed(k))
        assert all(each.repeat for each in detector.examine(x, ["client"] * 8, float(k)).details)
    state.close()
    with closing(sqlite3.connect(path)) as db:
        clusters, answers = db.execute("SELECT clusters, answers FROM state").fetchone()
        assert clusters == answers and answers // 8 in (answered, answered + 1) and answers % 8 == 0
        assert db.execute("SELECT count(*) FROM answers").fetchone() == (answers,)


def test_a_process_waits_for_another_one_that_creates_the_file(tmp_path):
    path = tmp_path / "state.db"
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("CREATE TABLE t (x)")
        other.execute(
            "BEGIN IMMEDIATE"
        )  # SQLite itself does not wait for this one to change the mode of the file
        release = Timer(0.1, other.rollback)
        release.start()
        SQLiteState(path).close()
        release.join()


def test_a_file_that_cannot_be_opened_is_refused(tmp_path):
    with pytest.raises(TargetError, match="expected a file in a writable folder"):
        SQLiteState(tmp_path / "absent" / "state.db")
    (tmp_path / "other").write_bytes(b"no database" * 100)
    with pytest.raises(TargetError, match="file is not a database"):
        SQLiteState(tmp_path / "other")


@pytest.mark.parametrize("fail", ["open", "closed"])
def test_a_lost_file_is_reported_and_handled(tmp_path, fail, caplog):
    path = Path(tmp_path / "state.db")
    state = SQLiteState(path, fail=fail, wait_s=0.05)
    detector = QueryDetector(KEY, state, SHAPE)
    with closing(sqlite3.connect(path)) as blocker, caplog.at_level(logging.WARNING):
        blocker.execute("BEGIN EXCLUSIVE")
        result = detector.examine(images(2), ["", ""], 0.0)
        grant = state.spend([Charge("client", 1, Allowance())], 0.0)[0]
    assert result.scores.tolist() == ([0, 0] if fail == "open" else [float("inf")] * 2)
    assert all(detail.lost for detail in result.details) and grant.lost and grant.granted == (fail == "open")
    assert [record.levelname for record in caplog.records] == ["ERROR"] and not state.health.reachable


@pytest.mark.parametrize("suffix", ["", "-wal", "-shm"])
@pytest.mark.parametrize("how", ["removed", "replaced", "emptied"])
@pytest.mark.parametrize("fail", ["open", "closed"])
def test_a_file_that_is_removed_or_replaced_is_noticed(tmp_path, suffix, how, fail, caplog, set_limit):
    set_limit("holdfast.guard.state_in_sqlite._RETRY_S", 0.0)
    path = tmp_path / "state.db"
    state = SQLiteState(path, fail=fail)
    detector, attack = QueryDetector(KEY, state, SHAPE), variants(images(1), 20)
    assert detector.score(attack[:15], [""] * 15, 0.0)[-1] > 5
    file = Path(f"{path}{suffix}")
    if how == "emptied" and suffix:
        pytest.skip("SQLite itself empties the files beside it")
    with closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA wal_checkpoint")
    detector.score(attack[18:19], [""], 0.0)
    if how == "replaced":
        shutil.copy(file, tmp_path / "copy")
        (tmp_path / "copy").replace(file)
    elif how == "emptied":
        os.truncate(file, 0)
    else:
        file.unlink()
    with caplog.at_level(logging.INFO):
        lost = detector.examine(attack[15:16], [""], 1.0)
        assert lost.details[0].lost and not state.health.reachable
        assert lost.scores[0] == (0 if fail == "open" else float("inf"))
        if how == "emptied":  # the log beside it does not match it
            return
        for k in (16, 17):
            assert not detector.examine(attack[k : k + 1], [""], 2.0).details[0].lost
    assert (state.health.reachable, state.health.losses, state.health.emptied) == (True, 1, 1)
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR", "INFO"]


@pytest.mark.parametrize("how", ["text", "bytes", "null"])
@pytest.mark.parametrize("table", ["state", "balances", "clusters", "accounts"])
def test_a_file_with_values_of_other_types_is_lost(tmp_path, table, how, caplog):
    state = SQLiteState(tmp_path / "state.db")
    detector, x = QueryDetector(KEY, state, SHAPE), images(1)
    detector.score(x, ["client"], 0.0)
    state.spend([Charge("client", 1, Allowance(budget=5))], 0.0)
    column = {"state": "steady", "balances": "tokens", "clusters": "mass", "accounts": "mass"}[table]
    value = {"text": "'x'", "bytes": "x'00'", "null": "NULL"}[how]
    with closing(sqlite3.connect(tmp_path / "state.db")) as other, other:
        other.execute(f"UPDATE {table} SET {column} = {value}")
    grant = state.spend([Charge("client", 1, Allowance(budget=5))], 1.0)[0]
    detail = detector.examine(variants(x, 1), ["client"], 1.0).details[0]
    assert not state.health.reachable and (grant.lost or detail.lost)
    assert "values of other types" in caplog.text


@pytest.mark.parametrize("target", ["present", "absent"])
def test_a_link_in_place_of_the_file_is_not_followed(tmp_path, target):
    elsewhere = tmp_path / "elsewhere"
    if target == "present":
        elsewhere.write_bytes(b"")
    (tmp_path / "state.db").symlink_to(elsewhere)
    with pytest.raises(TargetError, match=r"state\.db' is a link"):
        SQLiteState(tmp_path / "state.db")
    assert elsewhere.exists() == (target == "present")


def test_a_lost_and_emptied_server_is_reported(tmp_path, set_limit, caplog):
    pytest.importorskip("redis", reason="the package redis is not installed")
    set_limit("holdfast.guard.state_in_redis._RETRY_S", 0.0)
    with redis_server(tmp_path) as (url, start, stop), caplog.at_level(logging.INFO):
        state = RedisState(url, fail="open")
        detector, attack = QueryDetector(KEY, state, SHAPE), variants(images(1), 20)
        assert detector.score(attack[:15], [""] * 15, 0.0)[-1] > 5
        stop()
        lost = detector.examine(attack[15:16], [""], 1.0)
        assert lost.details[0].lost and lost.scores[0] == 0 and not state.health.reachable
        start()
        assert detector.score(attack[15:16], [""], 2.0)[0] == 0
        assert (state.health.reachable, state.health.losses, state.health.emptied) == (True, 1, 1)
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR", "INFO"]


def test_after_a_checkpoint_the_log_is_written_from_its_beginning(tmp_path):
    state, log = SQLiteState(tmp_path / "state.db"), tmp_path / "state.db-wal"

    def spend(n: int) -> int:
        for k in range(n):
            state.spend([Charge(f"client {k}", 1, Allowance())], float(k))
        return log.stat().st_size

    size = spend(200)
    state._checkpoints.due()
    state._checkpoints.close()  # after the checkpoint that is due
    assert spend(100) < size


def test_the_log_stays_short_although_other_processes_only_check_the_state(tmp_path, set_limit):
    set_limit("holdfast.guard.state_in_sqlite._LONGEST_LOG", 200_000)
    path, sizes, nothing = tmp_path / "state.db", [], Wanted(np.empty((0, 0), np.uint64), (), ())
    states = [SQLiteState(path) for _ in range(2)]
    until = time.monotonic() + 60  # a checkpoint takes seconds on a busy disk, while the log grows
    while not sizes or sizes[-1] == max(sizes):
        assert time.monotonic() < until, f"the log has {max(sizes):,} bytes and was never shortened"
        states[0].spend([Charge("client", 1, Allowance())], float(len(sizes)))
        states[1].exchange(nothing, float(len(sizes)), lambda view: None)
        sizes.append((tmp_path / "state.db-wal").stat().st_size)
    assert 200_000 < max(sizes) < 4096 * AT_LAST / 2, "a transaction made the checkpoint"
    for state in states:
        state.close()
    assert [file.name for file in tmp_path.iterdir()] == ["state.db"]
