"""A model behind a server, from the command line: what the server is asked, how often at most, and how it goes on."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

import holdfast
from holdfast.cli.app import run
from holdfast.core.errors import UsageError
from holdfast.verbs.functions import assess
from servers import Server, examples

RADIUS = 0.05
X, Y = examples()
SIZES = (1,)
"""rows that are asked for before the run begins, to see whether the model writes into them"""
LOOKED_AT = sum(SIZES) + 2 * 8


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty current folder with the examples in it, in which nothing waits for the disk."""
    monkeypatch.chdir(tmp_path)
    np.savez("data.npz", x=X, y=Y)


def words(server, *more, path="/v2/models/small", queries=60):
    threat = f"linf:{RADIUS},queries={queries}"
    allowed = ["--allow-host", server.host]
    return ["assess", server.url(path), "data.npz", "--threat", threat, *allowed, *more]


BLACK_BOX = ("--suite", "black-box", "--no-doubts", "-q")


def test_texts_of_a_server_have_no_control_characters_in_the_terminal(capsys):
    with Server(["orders"]) as server:
        template = ("--http-request", '{"instances": $x}', "--http-response", "predictions")
        assert run(words(server, *BLACK_BOX, *template, path="/predict")) == 3
    said = capsys.readouterr().err
    assert "has no 'predictions', but the keys \ufffd]0;owned\ufffdlong" in said
    assert len(said.partition("; finished steps")[0]) < 400


def rows(path):
    return list(csv.DictReader(Path(path).read_text().splitlines()))


def test_the_evidence_counts_every_row_that_was_sent(capsys):
    with Server() as server:
        assert run(words(server, *BLACK_BOX, "-o", "-", "-o", "r.csv")) == 0
        content = json.loads(capsys.readouterr().out)
        (square,) = content["attacks"]
        judged = square["surviving_before"]
        assert len(server.rows) == LOOKED_AT + len(X) + square["queries"] + judged
        assert len(server.rows) == LOOKED_AT + content["cost"]["forwards"]
        assert max(server.sizes) <= 64
        assert (
            0 < content["metrics"]["robust_accuracy"]["value"] < content["metrics"]["clean_accuracy"]["value"]
        )
        assert content["model"]["how"] == "http"
        assert content["model"]["access"] == "scores"
        assert any("may change" in note for note in content["notes"])


@pytest.mark.parametrize("more", [(), ("--batch-size", "5", "--http-max-rows", "2")], ids=["whole", "pieces"])
def test_no_example_gets_more_queries_than_its_budget(more):
    with Server() as server:
        assert run(words(server, *BLACK_BOX, "-o", "r.csv", *more, queries=50)) == 0
        asked = server.asked(X, RADIUS)
        assert asked[None] == 0
        spent = [int(row["queries"]) for row in rows("r.csv")]
        assert max(spent) == 50
        for k, queries in enumerate(spent):
            looked = 2 + sum(k < size for size in SIZES) if k < 8 else 0
            judged = queries > 0
            assert asked[k] == looked + 1 + queries + judged


def test_the_doubts_are_probed_and_counted_too(capsys):
    with Server() as server:
        assert run(words(server, "--suite", "black-box", "-q", "-o", "-")) == 0
        content = json.loads(capsys.readouterr().out)
        assert len(server.rows) == LOOKED_AT + content["cost"]["forwards"]
        states = {doubt["name"]: doubt["state"] for doubt in content["doubts"]}
        assert states["randomness"] == states["noise"] == "clear"
        assert states["zero-gradient"] == "not applicable"


def test_the_default_suite_needs_no_gradients_and_a_named_one_is_refused_with_the_way_out(capsys):
    with Server() as server:
        assert run(words(server, "-q", "--no-doubts", "-o", "-", queries=5)) == 0
        assert json.loads(capsys.readouterr().out)["suite"] == "black-box@1"
        assert run(words(server, "--suite", "fast")) == 2
        said = capsys.readouterr().err
        assert "needs gradients, and the model gives scores only (the model is behind HTTP" in said
        assert "give --suite black-box" in said


@pytest.mark.slow
def test_labels_are_attacked_by_what_needs_no_more(capsys):
    Path("h.yaml").write_text("attacks: [{use: RayS}]\n")
    labels = (
        "--http-request",
        '{"instances": $x}',
        "--http-response",
        "classes",
        "--http-labels",
        "--classes",
        "3",
    )
    with Server() as server:
        assert run(words(server, *labels, "--suite", "fast", path="/classify")) == 2
        said = capsys.readouterr().err
        assert "Sprint needs gradients, and the model gives labels only" in said
        assert "give --suite black-box" in said
        assert run(words(server, *BLACK_BOX, *labels, "-q", "-o", "-", path="/classify", queries=50)) == 0
        assert [attack["name"] for attack in json.loads(capsys.readouterr().out)["attacks"]] == ["RayS"]
        assert (
            run(words(server, *labels, "-c", "h.yaml", "-q", "-o", "-", path="/classify", queries=200)) == 0
        )
        content = json.loads(capsys.readouterr().out)
        assert content["model"]["access"] == "labels"
        assert content["attacks"][0]["name"] == "RayS"
        assert content["metrics"]["robust_accuracy"]["value"] < content["metrics"]["clean_accuracy"]["value"]
        states = {doubt["name"]: doubt["state"] for doubt in content["doubts"]}
        assert states["probabilities"] == "not applicable"


def test_a_run_whose_server_dies_resumes_to_what_an_undisturbed_one_finds(capsys):
    with Server() as server:
        port = server.port
        assert run(words(server, *BLACK_BOX, "--run", "whole", "-o", "whole.csv")) == 0
        asked = len(server.sizes)
    dying = (*BLACK_BOX, "--run", "cut", "--http-retries", "0", "-o", "cut.csv")
    with Server(port=port, dies_after=asked - 20) as server:
        assert run(words(server, *dying)) == 3
    said = capsys.readouterr().err
    assert "the connection failed" in said
    assert "finished steps are stored; resume with: holdfast" in said
    assert said.rstrip().endswith("--run cut --resume")
    assert run([*words(server, *dying), "--resume"]) == 3
    assert "cannot be reached" in capsys.readouterr().err
    with Server(port=port) as server:
        assert run([*words(server, *dying), "--resume"]) == 0
        assert len(server.rows) > 0
    assert rows("cut.csv") == rows("whole.csv")
    notes = {}
    for name in ("cut", "whole"):
        capsys.readouterr()
        assert run(["report", name, "-o", "-"]) == 0
        notes[name] = " ".join(json.loads(capsys.readouterr().out)["notes"])
    assert "had no response when the run was stopped" in notes["cut"] and "stopped" not in notes["whole"]


def test_a_run_resumes_after_a_server_that_refused_an_input_is_corrected(capsys):
    refused = (*BLACK_BOX, "--run", "cut", "--on-refused", "stop")
    with Server() as server:
        port = server.port
        assert run(words(server, *BLACK_BOX)) == 0
        sent = len(server.sizes)
    with Server([None] * (sent - 20) + [400] * 10, port=port) as server:
        assert run(words(server, *refused)) == 3
    said = capsys.readouterr().err
    assert "responds 400 Bad Request" in said
    assert "finished steps are stored; resume with: holdfast" in said
    with Server(port=port) as server:
        assert run([*words(server, *refused), "--resume"]) == 0
        assert 0 < len(server.sizes) < sent


def test_repeated_requests_are_in_the_notes(capsys, set_limit):
    set_limit("holdfast.io.remote.http_client._FIRST_WAIT_S", 0.001)
    with Server([None] * 12 + [(429, {"Retry-After": "0"}), 503]) as server:
        assert run(words(server, *BLACK_BOX, "-o", "-")) == 0
        content = json.loads(capsys.readouterr().out)
        (note,) = (note for note in content["notes"] if "sent again" in note)
        assert "2 requests with 32 rows failed temporarily" in note
        assert "(429 Too Many Requests 1, 503 Service Unavailable 1)" in note
        assert len(server.rows) == LOOKED_AT + content["cost"]["forwards"]


def test_a_secret_is_in_no_file_and_no_message(capsys, monkeypatch):
    monkeypatch.setenv("HOLDFAST_TEST_TOKEN", "hunter2hunter2")
    header = ("--header", "Authorization: env:HOLDFAST_TEST_TOKEN")
    with Server() as server:
        assert run(words(server, *BLACK_BOX, *header, "--run", "r", "-o", "r.html", "-o", "r.json")) == 0
        assert {sent.get("Authorization") for sent in server.headers} == {"hunter2hunter2"}
    said = capsys.readouterr()
    assert "hunter2" not in said.out + said.err
    written = [*Path("r").iterdir(), Path("r.html"), Path("r.json")]
    assert not [path for path in written if b"hunter2" in path.read_bytes()]


def test_a_secret_that_a_server_repeats_in_its_metadata_is_in_nothing_that_is_written(capsys, monkeypatch):
    monkeypatch.setenv("HOLDFAST_TEST_TOKEN", "Bearer hunter2hunter2")
    header = ("--header", "Authorization: env:HOLDFAST_TEST_TOKEN")
    digests = []
    for secret in ("hunter2hunter2", "Bearer hunter2hunter2"):
        with Server() as server:
            server.metadata |= {"platform": secret, "versions": [secret]}
            server.metadata["inputs"][0]["name"] = f"x-{secret}"
            server.metadata["outputs"] += [{"name": secret, "datatype": "BYTES", "shape": [-1, 1]}]
            run_folder = f"r{len(digests)}"
            assert run(words(server, *BLACK_BOX, *header, "--run", run_folder, "-o", "-")) == 0
        said = capsys.readouterr()
        assert "hunter2" not in said.out + said.err
        assert not [path for path in Path(run_folder).iterdir() if b"hunter2" in path.read_bytes()]
        digests.append(json.loads(Path(run_folder, "run.json").read_text())["model"])
    assert "hunter2" not in json.dumps(digests)


def test_a_secret_written_out_is_refused_before_anything_is_kept(capsys):
    with Server() as server:
        assert run(words(server, *BLACK_BOX, "--header", "Authorization: Bearer hunter2")) == 2
        assert server.headers == []
    assert "hunter2" not in capsys.readouterr().err
    assert not Path("holdfast-runs").exists()


def test_nothing_is_sent_to_a_host_that_the_command_line_does_not_allow(capsys):
    with Server() as server:
        Path("h.yaml").write_text(f"model: {server.url()}\ndata: data.npz\nallow_hosts: ['{server.host}']\n")
        assert run(["assess", server.url(), "data.npz"]) == 2
        assert f"give --allow-host {server.host}" in capsys.readouterr().err
        assert run(["assess", "-c", "h.yaml"]) == 2
        assert "A configuration alone cannot allow a host" in capsys.readouterr().err
        with pytest.raises(UsageError, match="allow_hosts="):
            assess(server.url(), (X, Y))
        assert server.headers == []
        assert (
            run(["assess", "-c", "h.yaml", "--allow-host", server.host, *BLACK_BOX, "-t", "linf:0,queries=5"])
            == 0
        )


def test_a_configuration_alone_sends_nothing_of_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("HOLDFAST_TEST_TOKEN", "hunter2hunter2")
    with Server() as server:
        said = f"model: {server.url()}\ndata: data.npz\nheaders: ['X-A: env:HOLDFAST_TEST_TOKEN']\n"
        Path("h.yaml").write_text(said)
        flags = ["-c", "h.yaml", "--allow-host", server.host, *BLACK_BOX, "-t", "linf:0,queries=5"]
        assert run(["assess", *flags]) == 2
        assert "--header 'X-A: env:HOLDFAST_TEST_TOKEN'" in capsys.readouterr().err
        assert server.headers == []
        assert run(["assess", *flags, "--header", "X-A: env:HOLDFAST_TEST_TOKEN"]) == 0


def test_the_python_twin_and_the_doctor_take_the_same(capsys):
    with Server() as server:
        path, template = (
            "/predict",
            {"http_request": '{"instances": $x}', "http_response": "predictions.*.scores"},
        )
        result = assess(
            holdfast.open_model(server.url(path), allow_hosts=[server.host], **template),
            (X, Y),
            f"linf:{RADIUS},queries=20",
            "black-box",
            doubts=False,
        )
        assert result.metrics["clean_accuracy"].value == pytest.approx(1 - 2 / len(X))
        assert run(["doctor", server.url(), "data.npz", "--allow-host", "127.0.0.1"]) == 0
        assert "the model gives scores only (the model is behind HTTP" in " ".join(
            capsys.readouterr().out.split()
        )


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--http-timeout", "soon"), "http_timeout is 'soon'"),
        (("--http-timeout", "0s"), "0s"),
        (("--http-max-rows", "0"), "--http-max-rows is 0"),
        (("--http-retries", "-1"), "--http-retries is -1"),
    ],
)
def test_flags_that_cannot_be_meant(flags, said, capsys):
    assert run(["assess", "http://localhost:1/x", "data.npz", "--allow-host", "localhost", *flags]) == 2
    assert said in capsys.readouterr().err
