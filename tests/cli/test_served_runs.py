"""Runs on a served model: each row is counted, none is sent twice after a stop, refused inputs are no successes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from holdfast import assess, open_model
from holdfast.cli.app import run
from holdfast.core.errors import TargetLost, UsageError
from servers import Server, examples

X, Y = examples()
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty current folder with the examples in it, in which nothing waits for the disk."""
    monkeypatch.chdir(tmp_path)
    np.savez("data.npz", x=X, y=Y)


def words(server, *more, queries=60, doubts=False):
    threat = ("--threat", f"linf:0.05,queries={queries}", "--suite", "black-box", "-q")
    probed = () if doubts else ("--no-doubts",)
    return ["assess", server.url(), "data.npz", "--allow-host", server.host, *threat, *probed, *more]


def report(folder):
    """The evidence of a run."""
    assert run(["report", folder, "-o", f"{folder}.json", "-o", f"{folder}.csv", "-q"]) == 0
    return json.loads(Path(f"{folder}.json").read_text())


def same(first, second):
    """Whether two runs have the same verdicts, queries and recorded columns."""
    columns = [sorted(Path(each).glob("*.safetensors")) for each in (first, second)]
    return [p.name for p in columns[0]] == [p.name for p in columns[1]] and all(
        one.read_bytes() == other.read_bytes() for one, other in zip(*columns, strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("doubts", [False, True], ids=["attacks", "doubts"])
def test_the_report_counts_the_rows_that_the_server_saw(doubts):
    with Server([None] * 9 + [503] * 2) as server:
        assert (
            run(words(server, "--run", "r", "--http-retries", "3", "--http-max-rows", "7", doubts=doubts))
            == 0
        )
        served = report("r")["served"]
        assert served["rows"] == len(server.rows)
        assert served["rows"] == sum(served[kind] for kind in ("clean", "attacks", "doubts", "judging"))
        assert (served["doubts"] > 0) == doubts
        assert served["retried"] == {"rows": 14, "requests": 2, "reasons": {"503 Service Unavailable": 2}}
        assert served["requests"] == len(server.sizes)
        assert served["unanswered"] == served["refused"] == 0


def test_padding_is_counted():
    with Server(metadata=("FP32", [32, 6], "FP32", [32, 3])) as server:
        assert run(words(server, "--run", "r")) == 0
        found = report("r")
        assert found["served"]["rows"] == len(server.rows) > found["cost"]["forwards"] + 17
        assert set(server.sizes) == {32}


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_sends_nothing_twice():
    with Server() as server:
        assert run(words(server, "--run", "whole")) == 0
        unbroken = len(server.rows)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words_ = [sys.executable, str(HERE / "killed_served.py"), str(port), "5", "1"]
    paths = os.pathsep.join(map(str, (HERE.parent, *filter(None, sys.path))))
    done = subprocess.run(
        words_, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    served = report("cut")["served"]
    assert unbroken <= found["rows"] <= unbroken + 5 * found["most"]
    assert served["rows"] == unbroken
    assert same("cut", "whole")
    assert not list(Path("cut").glob("answers*"))


@pytest.mark.slow
def test_a_quota_smaller_than_one_attack_is_enough_in_the_end(capsys):
    with Server() as server:
        assert run(words(server, "--run", "whole")) == 0
        unbroken, resume = len(server.rows), ()
        server.rows.clear()
        for limit in range(100, unbroken + 100, 100):
            code = run(words(server, "--run", "cut", "--max-queries", str(limit), *resume))
            assert len(server.rows) == min(limit, unbroken)
            said, resume = capsys.readouterr().err, ("--resume",)
            if code == 0:
                break
            assert code == 3
            assert f"max_queries is {limit:,}; rows that were sent to the server: {limit:,}" in said
            assert said.rstrip().endswith(f"--max-queries {2 * limit} --run cut --resume")
    assert code == 0 and same("cut", "whole")


def test_answers_are_kept_where_that_is_wanted_and_only_there():
    with Server() as server:
        assert run(words(server, "--run", "r", "--keep-answers")) == 0
        assert Path("r/answers.journal").stat().st_size > 16 * len(server.rows)
        assert run(["verify", "r"]) == 0
        before = len(server.rows)
        assert run(words(server, "--run", "r", "--keep-answers", "--resume")) == 0
        assert len(server.rows) == before


@pytest.fixture
def stopped():
    """A run that was stopped in the middle of an attack, and the server's port."""
    with Server() as server:
        assert run(words(server, "--run", "r", "--max-queries", "300")) == 3
        yield server


def test_a_journal_that_was_cut_or_changed_is_refused_by_name(stopped, capsys):
    journal = Path("r/answers.journal")
    whole = journal.read_bytes()
    middle = len(whole) // 2
    for content, said in (
        (whole[:middle], "was truncated"),
        (whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :], "was changed"),
        (b"nothing", "was changed"),
    ):
        journal.write_bytes(content)
        capsys.readouterr()
        assert run(words(stopped, "--run", "r", "--resume")) == 3
        message = capsys.readouterr().err
        assert (
            f"'r/answers.journal' {said}" in message and "remove it; then its rows are sent again" in message
        )
    assert len(stopped.rows) == 300
    journal.write_bytes(
        whole + b"\x50\x00\x00\x00half of a record"
    )  # as a kill in the middle of a write leaves it
    assert run(words(stopped, "--run", "r", "--resume")) == 0
    with Server(port=0) as fresh:
        assert run(words(fresh, "--run", "whole")) == 0
        assert len(stopped.rows) == len(fresh.rows)


def test_a_full_disk_ends_a_run_that_resumes_once_there_is_space(stopped, capsys, monkeypatch):
    full = OSError(28, "No space left on device")
    with monkeypatch.context() as patched:
        patched.setattr(
            "holdfast.runs.store.journal._write", lambda file, content: (_ for _ in ()).throw(full)
        )
        assert run(words(stopped, "--run", "r", "--resume")) == 3
        said = capsys.readouterr().err
        assert "the disk is full: 'r/answers.journal'" in said and "--resume" in said
    sent = len(stopped.rows)
    assert run(words(stopped, "--run", "r", "--resume")) == 0
    assert report("r")["served"]["rows"] + report("r")["served"]["unanswered"] >= len(stopped.rows) > sent


def test_an_expired_token_stops_the_run_and_a_new_one_resumes_it(capsys, monkeypatch):
    monkeypatch.setenv("HOLDFAST_TEST_TOKEN", "old-token")
    header = ("--header", "Authorization: env:HOLDFAST_TEST_TOKEN", "--run", "r")
    with Server(key=lambda: "old-token" if len(server.rows) < 200 else "new-token") as server:
        assert run(words(server, *header)) == 3
        said = capsys.readouterr().err
        assert "401 Unauthorized" in said and said.rstrip().endswith("--run r --resume")
        monkeypatch.setenv("HOLDFAST_TEST_TOKEN", "new-token")
        assert run(words(server, *header, "--resume")) == 0
        assert report("r")["served"]["rows"] == len(server.rows)


def changed(rows):
    """Rows in whose first feature an attack has left the clean inputs."""
    return np.abs(rows[:, :1] - X[:, 0]).min(1) > 1e-6


def test_refused_attacked_inputs_are_rejected_and_counted():
    with Server(refuses=changed) as server:
        assert run(words(server, "--run", "r", queries=12)) == 0
        found = report("r")
        served, metrics = found["served"], found["metrics"]
        assert metrics["robust_accuracy"]["value"] == metrics["clean_accuracy"]["value"]
        assert served["rejected"]["422 Unprocessable Entity"] > 100
        assert (served["rows"], served["refused"]) == (len(server.rows) + server.refused, server.refused)
        assert any("these count as rejected" in note for note in found["notes"])
        assert served["max_rows"] is None


def test_refused_inputs_end_the_run_where_that_is_wanted(capsys):
    with Server(refuses=changed) as server:
        assert run(words(server, "--run", "r", "--on-refused", "stop", queries=12)) == 3
        assert '422 Unprocessable Entity: \'{"error": "the content filter' in capsys.readouterr().err
        assert run(words(server, "--run", "r", "--resume", queries=12)) == 0


def test_a_first_input_that_is_refused_alone_is_not_sent_with_others(capsys):
    with Server(refuses=lambda rows: np.ones(len(rows), dtype=bool)) as server:
        assert run(words(server)) == 3
        assert "422" in capsys.readouterr().err
        assert server.refused == 1


def test_a_clean_input_that_is_refused_is_an_error_before_any_attack(capsys):
    with Server(refuses=lambda rows: np.abs(rows - X[20]).max(1) < 1e-6) as server:
        assert run(words(server)) == 3
        assert "422" in capsys.readouterr().err
        assert all(np.abs(X - row).max(1).min() < 1e-6 for row in server.rows)


def test_a_server_that_begins_to_refuse_everything_is_no_robust_model(capsys):
    with Server(refuses=lambda rows: np.full(len(rows), len(server.rows) > 300)) as server:
        assert run(words(server, "--run", "r")) == 3
        assert "rejects a clean input that it accepted before" in capsys.readouterr().err


def test_refusals_that_are_the_fault_of_the_server_count_for_nothing_after_a_stop():
    with Server() as server:
        assert run(words(server, "--run", "whole")) == 0
    quota = [150]
    with Server(refuses=lambda rows: np.full(len(rows), len(server.rows) > quota[0])) as server:
        assert run(words(server, "--run", "cut")) == 3
        quota[0] = 400
        assert run(words(server, "--run", "cut", "--resume")) == 3
        quota[0] = 10_000
        assert run(words(server, "--run", "cut", "--resume")) == 0
    assert report("cut")["served"]["rejected"] == {}
    assert same("cut", "whole")


def test_a_stop_in_the_look_and_a_finished_run_send_nothing_twice():
    with Server() as server:
        for limit in ("1", "10", "17"):
            resume = ("--resume",) if limit != "1" else ()
            assert run(words(server, "--run", "r", "--max-queries", limit, *resume)) == 3
            assert len(server.rows) == int(limit)
        assert run(words(server, "--run", "r", "--resume")) == 0
        rows = len(server.rows)
        assert report("r")["served"]["rows"] == rows
        assert run(words(server, "--run", "r", "--resume")) == 0
        assert report("r")["served"]["rows"] == len(server.rows) == rows


@pytest.mark.slow
def test_results_do_not_depend_on_requests_under_way():
    with Server() as server:
        assert run(words(server, "--run", "one", "--http-max-rows", "3")) == 0
        assert server.most_under_way == 1
    with Server(delay=0.005) as server:
        many = ("--http-max-rows", "3", "--http-concurrency", "8", "--http-rate", "100000/s")
        assert run(words(server, "--run", "eight", *many)) == 0
        assert 2 < server.most_under_way <= 8
        assert report("eight")["served"]["rows"] == len(server.rows)
    assert same("one", "eight")


def test_content_that_is_compressed_is_not_unpacked(capsys):
    with Server(["packed"]) as server:
        assert run(words(server)) == 3
        assert "is compressed ('gzip')" in capsys.readouterr().err


def test_limits_are_refused_where_there_is_no_server(capsys):
    assert run(["assess", "mnist-cnn", "mnist-mini", "--max-queries", "5"]) == 2
    assert "max_queries is 5" in capsys.readouterr().err
    assert run(["assess", "mnist-cnn", "mnist-mini", "--keep-answers"]) == 2
    with Server() as server:
        assert run(words(server, "--workers", "2")) == 2
        assert "--http-concurrency 2" in capsys.readouterr().err
        assert not Path("holdfast-runs").exists()
        assert run(["assess", server.url(), "data.npz", "--allow-host", server.host, "--suite", "pgd"]) == 2
        assert run(words(server, "--http-rate", "often")) == 2
        assert "http_rate is 'often'" in capsys.readouterr().err
        assert server.rows == []


def test_the_python_twin_counts_and_limits(tmp_path):
    with Server() as server:
        threat = "linf:0.05,queries=20"
        found = assess(open_model(server.url(), allow_hosts=[server.host]), (X, Y), threat, doubts=False)
        assert found.evidence.served["rows"] == len(server.rows)
        limited = open_model(server.url(), allow_hosts=[server.host], max_queries=50)
        with pytest.raises(
            TargetLost, match=r"run='.*', resume=True and holdfast.open_model.*max_queries=100"
        ):
            assess(limited, (X, Y), threat, doubts=False, run=tmp_path / "r")
        with pytest.raises(UsageError, match="keep_answers"):
            assess(open_model("mnist-cnn", keep_answers=True), "mnist-mini")
