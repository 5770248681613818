"""Probes, drain and counters: they state the truth about a full disk, a locked state, lost workers and the end."""

import asyncio
import io
import json
import logging
import os
import resource
import signal
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from http.client import HTTPConnection, HTTPException
from mmap import mmap

import httpx
import pytest
import torch

from holdfast.guard.detectors.queries import QueryDetector
from holdfast.guard.guard import GuardPipeline
from holdfast.guard.query_rule import QueryRule
from holdfast.guard.rules import Action, Incoming, InputSchema, Mode, RequestDecision, RowDecision, Rule
from holdfast.guard.state_in_sqlite import SQLiteState
from holdfast.server.answering_requests import Answer, Job, Outcome, log_requests
from holdfast.server.audit_chain import AuditKey, ChainFile
from holdfast.server.audit_folder import verify_audit
from holdfast.server.connections import Check, ModelTest, StandIn, audit_fault
from holdfast.server.messages import _memory_file, bound_socket
from holdfast.server.requests import REQUESTS, JSONFormatter, Refused
from holdfast.server.server_worker import Worker
from holdfast.server.telemetry import MEMORY_BYTES, MetricTotals, Telemetry
from waiting import until

from .small import FEATURES, request
from .test_server import JSON, X, running, setup

WITHIN_S = 2.0


def test_counters_are_kept_when_a_process_ends_and_gauges_are_not():
    telemetry, totals = Telemetry(), MetricTotals()
    totals.follow("worker-1", telemetry.memory)
    telemetry.count("holdfast_requests_total", "200", n=3)
    telemetry.set("holdfast_connections", 2)
    telemetry.observe("holdfast_batch_rows", 3.0)
    assert (
        totals.value("holdfast_requests_total", "200")
        == telemetry.value("holdfast_requests_total", "200")
        == 3
    )
    assert totals.value("holdfast_connections") == 2
    totals.forget("worker-1")
    totals.follow("worker-2", Telemetry().memory)
    assert totals.value("holdfast_requests_total", "200") == 3 and totals.value("holdfast_connections") == 0
    assert b"holdfast_batch_rows_sum 3.0" in totals.text()


def test_metrics_of_a_worker_that_are_not_valid_are_left_out():
    telemetry, totals = Telemetry(), MetricTotals()
    totals.follow("worker-1", telemetry.memory)
    telemetry.count("holdfast_workers_of_mine")
    telemetry.count("holdfast_swaps_total")
    whole = telemetry.memory[:]
    assert totals.value("holdfast_swaps_total") == 1 and b"of_mine" not in totals.text()
    for start, content in ((8, b"\xff" * 64), (0, struct.pack("@Q", 1 << 60)), (16, b"[" * 8)):
        telemetry.memory[:] = whole
        telemetry.memory[start : start + len(content)] = content
        totals.text()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no seals of files")
def test_a_worker_cannot_shorten_the_memory_of_its_metrics():
    """The supervisor, which reads it, would be ended by SIGBUS."""
    with _memory_file() as file, pytest.raises(PermissionError):
        os.ftruncate(file.fileno(), 0)


def test_a_stand_in_whose_thread_begins_after_its_end_accepts_no_connection(monkeypatch, set_limit):
    ended, start_server = threading.Event(), asyncio.start_server

    async def late(*args, **settings):
        ended.wait(60)
        return await start_server(*args, **settings)

    monkeypatch.setattr(asyncio, "start_server", late)
    set_limit("holdfast.server.connections._READ_S", 0.01)
    with bound_socket("127.0.0.1", 0) as listener:
        stand_in = StandIn(listener, Telemetry())
        stand_in.end()
        ended.set()
        assert stand_in._closed.wait(60)


def test_a_check_that_waits_counts_as_failed_until_it_ends():
    released = threading.Event()
    check = Check("state", lambda: released.wait(60) and "", late_s=0.05)
    thread = threading.Thread(target=check.run)
    thread.start()
    until(lambda: check.failure.startswith("no answer for"))
    released.set()
    thread.join()
    assert not check.failure


def test_the_test_of_an_audit_disk_leaves_the_chain_unchanged(tmp_path):
    chain = ChainFile(tmp_path / "chain.jsonl")
    chain.add([{"kind": "server", "time": 0}])
    before = chain.path.read_bytes()
    assert audit_fault(chain) == "" and chain.path.read_bytes() == before
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 1000, hard))  # as a disk with some bytes left
    try:
        assert audit_fault(chain) == "File too large"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert chain.path.read_bytes() == before and audit_fault(chain) == ""


def test_a_model_is_not_ready_only_if_it_fails_on_an_input_of_the_server():
    failed, works = [0], [True]

    def answers():
        if not works[0]:
            raise ValueError("weights 0.123")
        return True

    check = Check("model", ModelTest(lambda: failed[0], answers))

    def failure():
        check.run()
        return check.failure

    works[0] = False
    assert failure() == ""  # no request failed
    failed[0] = 1
    assert failure() == failure() == "ValueError: weights …"
    works[0] = True
    assert failure() == ""
    failed[0] = 2  # an input of a client, on which the model fails alone
    assert failure() == ""


def test_the_log_in_json_has_one_object_for_each_request_without_inputs():
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(JSONFormatter())
    log, key = logging.getLogger(REQUESTS), AuditKey(bytes(32))
    score = Rule("queries", Mode.ENFORCE, Action.BLOCK, 0.5).score(0.987654)
    decision = RequestDecision("2", "alice", (RowDecision((score,)),), x=X, refusal="the request is refused")
    jobs = [Job(Incoming(X, "alice", name)) for name in ("1", "2", "3")]
    outcomes = [
        Outcome(
            jobs[0],
            replace(decision, rows=(RowDecision(),), refusal=""),
            answer=Answer(torch.tensor([[0.123456]])),
        ),
        Outcome(jobs[1], decision, refusal=Refused(422, "refused", (), "guard"), action=Action.BLOCK),
        Outcome(jobs[2], refusal=Refused(500, "the model failed", (), "model")),
    ]
    log_requests(key, outcomes)  # as text, there are no requests
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        log_requests(key, outcomes)
        logging.getLogger(REQUESTS).error("an error\nwith two lines")
    finally:
        log.setLevel(logging.NOTSET)
        log.removeHandler(handler)
    text = written.getvalue()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["message"] for line in lines] == [
        "answered",
        "refused",
        "refused",
        "an error\nwith two lines",
    ]
    assert [(x["level"], x["status"], x["action"], x["rules"], x["cause"]) for x in lines[:3]] == [
        ("info", 200, "allow", [], ""),
        ("info", 422, "block", ["queries"], "guard"),
        ("warning", 500, None, [], "model"),
    ]
    assert {line["principal"] for line in lines[:3]} == {key.pseudonym("alice")}
    assert [line["request"] for line in lines[:3]] == ["1", "2", "3"]
    assert not any(text.count(f"{number:.4f}"[:6]) for number in [*X.flatten().tolist(), 0.123456, 0.987654])


def test_every_line_of_the_log_in_json_is_an_object_also_of_libraries_and_warnings():
    program = """
import logging, warnings
from holdfast.server.requests import log_to_stderr
log_to_stderr("json")
logging.getLogger("holdfast.server").info("back")
logging.getLogger("a.library").warning("odd")
warnings.warn("old")
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("a.library").exception("fault")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["level"] for line in lines] == ["info", "warning", "warning", "error"]
    assert "UserWarning: old" in lines[2]["message"] and "ZeroDivisionError" in lines[3]["message"]


def guard(path, digest, action=Action.BLOCK):
    """A guard whose state is a file."""
    detector = QueryDetector(bytes(32), SQLiteState(path), (FEATURES,), radius=0.001)
    schema = InputSchema((FEATURES,))
    rules = {"queries": Rule("queries", Mode.ENFORCE, action, 1e9)}
    return GuardPipeline(schema, rules, queries=QueryRule(detector, schema))


def answer(url, path="/v2/health/ready"):
    response = httpx.get(url.partition("/v2")[0] + path, timeout=10)
    return response.status_code, response.json().get("error", "")


def seconds_until(condition):
    begin = time.monotonic()
    until(condition, 10)
    return time.monotonic() - begin


def test_a_lost_state_is_a_failing_check_also_where_it_refuses_no_request(tmp_path):
    prepared = setup(tmp_path, guard=partial(guard, tmp_path / "queries.db", action=Action.FLAG)).worker
    sent = []
    worker = Worker(prepared, None, lambda kind, content: sent.append(content), mmap(-1, MEMORY_BYTES))
    (tmp_path / "queries.db").unlink()
    for check in worker.served.readiness.checks:
        check.run()
    worker.report()
    worker.batcher.close()
    state = sent[-1]["checks"]["state"]
    assert not state["refuses"] and "removed" in state["failure"]
    assert worker.served.readiness.probe() == ""


@pytest.mark.slow
def test_ready_is_503_with_the_reason_within_two_seconds_without_any_request(tmp_path, new_processes):
    state = tmp_path / "queries.db"
    with running(setup(tmp_path, guard=partial(guard, state))) as (server, url, _):
        assert answer(url) == (200, "") and server.status()["ready"]
        pid = server.status()["workers"][0]["pid"]
        unlimited = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, unlimited[1]))
        expected = (503, "the audit log cannot be written; the state of the query detector cannot be reached")
        assert seconds_until(lambda: answer(url) == expected) < WITHIN_S
        until(lambda: not server.status()["ready"])
        assert server.status()["not_ready"]["audit"] == "File too large"
        audit = server.status()["workers"][0]["checks"]["audit"]
        assert audit == {"failure": "File too large", "refuses": True}
        until(lambda: server.totals.value("holdfast_ready") == 0)
        assert server.totals.value("holdfast_not_ready", "audit") == 1
        assert server.totals.value("holdfast_audit_failing") == 1
        resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)
        assert seconds_until(lambda: answer(url) == (200, "")) < WITHIN_S
        with closing(sqlite3.connect(state, isolation_level=None)) as db:
            db.execute("BEGIN EXCLUSIVE")
            expected = 503, "the state of the query detector cannot be reached"
            assert seconds_until(lambda: answer(url, "/v2/models/small/ready") == expected) < WITHIN_S
            db.execute("ROLLBACK")
        assert seconds_until(lambda: answer(url) == (200, "")) < WITHIN_S
        assert httpx.post(url, content=request(X), headers=JSON).status_code == 200
        os.kill(pid, signal.SIGKILL)
        until(lambda: server.totals.value("holdfast_worker_restarts_total") == 1)
        assert server.totals.value("holdfast_guard_inputs_total") == 1
        expected = 503, "no worker process has started"

        def is_stated():
            return answer(url) == expected and "status -9" in server.status()["not_ready"].get("workers", "")

        assert seconds_until(is_stated) < WITHIN_S
        assert answer(url, "/v2/health/live") == (200, "")
        until(lambda: answer(url) == (200, ""))


def loaded_connection(address, stop, lost, answered):
    """Send requests over connections that are kept open, until none can be opened or `stop` is set."""
    connection = HTTPConnection(*address, timeout=30)
    while not stop.is_set():
        try:
            if connection.sock is None:
                connection.connect()
        except OSError:
            return  # the port is closed: no request was sent
        try:
            connection.request("POST", "/v2/models/small/infer", request(X), JSON)
            response = connection.getresponse()
            response.read()
        except (OSError, HTTPException) as error:
            lost.append(repr(error))
            return
        answered.append(response.status)
    connection.close()


@pytest.mark.slow
def test_no_request_is_lost_at_the_end_with_busy_connections_and_a_probe_every_second(tmp_path):
    lost, answered, probes, stop = [], [], [], threading.Event()
    with running(setup(tmp_path, workers=2, drain_delay="1s")) as (server, url, _):
        threads = [
            threading.Thread(target=loaded_connection, args=(server.address, stop, lost, answered))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        until(lambda: len(answered) > 50)
        probes.append(answer(url))
        server.stop()
        count = len(answered)
        until(lambda: answer(url)[0] == 503, 1)
        probes.append(answer(url))
        until(lambda: len(answered) > count + 50, 1)  # the port is open while load balancers take notice
    for thread in threads:
        thread.join(60)
    assert not lost and {*answered} == {200}
    assert probes == [(200, ""), (503, "the server is draining")]
    verified = verify_audit(tmp_path / "audit")
    assert (verified.answered, verified.open, verified.interrupted) == (len(answered), 0, 0)
    assert server.totals.value("holdfast_requests_total", "200") == len(answered)
    assert server.totals.value("holdfast_inputs_total") == len(answered)


@pytest.mark.slow
def test_a_reload_is_given_up_at_the_end_and_the_port_stays_open(tmp_path):
    prepared = setup(tmp_path, workers=2, drain_delay="100s")
    with running(prepared, reloadable=True) as (server, url, messages):
        server.request_swap("test")
        until(lambda: len(server.status()["workers"]) == 3)
        server.stop()
        until(lambda: [worker["started"] for worker in server.status()["workers"]] == [True] * 3)
        for _ in range(10):  # with the third worker, no other one ends before the delay is over
            assert answer(url) == (503, "the server is draining")
            time.sleep(0.05)
        assert len(server.status()["workers"]) == 3 and server.status()["model"]["reload"] == "failed"
        os.kill(server.status()["workers"][0]["pid"], signal.SIGKILL)
        until(lambda: any("lost while the server ended: it ended with status -9" in m for m in messages))
        server._ended_by_signal()  # a second signal, which does not wait for the delay
    assert not server.drained
