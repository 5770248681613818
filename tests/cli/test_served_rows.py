"""What a served model is sent: bounded by arithmetic, stated before, and little for doubts, dry runs and doctor."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from holdfast.cli.app import run
from holdfast.core.errors import TargetLost
from holdfast.core.model import EVERY, Batches, Classifier
from holdfast.io.data.layouts import DeclaredData
from holdfast.io.data.loaders import as_data
from holdfast.io.doctor import examine
from holdfast.io.remote.payloads import ServerAnswers, Template
from holdfast.io.remote.remote import Remote
from holdfast.io.remote.served_model import InspectionCounter, Served, rows_of_calls
from holdfast.runs.assess.expected_time import ExpectedRows
from servers import Server, examples

RADIUS = 0.05
LOOKED_AT = 1 + 2 * 8
X, Y = examples(48)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty current folder with the examples in it, in which nothing waits for the disk."""
    monkeypatch.chdir(tmp_path)
    np.savez("data.npz", x=X, y=Y)


def fixed(size):
    """The metadata of a server that takes batches of one size."""
    return ("FP32", [size, 6], "FP32", [size, 3])


def served(server, *more, verb="assess", queries=40):
    threat = f"linf:{RADIUS}" + (f",queries={queries}" if queries else "")
    said = ["--threat", threat] if verb == "assess" else []
    return run([verb, server.url(), "data.npz", *said, "--allow-host", server.host, *more])


def expected(text):
    """The numbers of the first statement in a text: the total, clean, attacks, doubts, judging."""
    number = r"([\d,]+)"
    parts = f"at most {number} rows to the server, if it refuses none: {number} clean, {number} attacks"
    parts += f", {number} doubts, {number} judging"
    return [int(number.replace(",", "")) for number in re.search(parts, text).groups()]


# --- doubts


@pytest.mark.parametrize("metadata, n, queries", [(None, 24, 15), (None, 10, 25), (fixed(8), 16, 12)])
def test_doubts_take_at_most_as_many_rows_as_the_suite(capsys, metadata, n, queries):
    asked = []
    for more in (("--no-doubts",), ()):
        with Server(metadata=metadata) as server:
            assert served(server, "-q", "-n", str(n), "-o", "-", *more, queries=queries) == 0
            asked.append(len(server.rows))
            content = json.loads(capsys.readouterr().out)
    doubts = asked[1] - asked[0]
    (square,) = content["attacks"]
    assert 0 < doubts <= square["queries"] + square["surviving_before"]
    assert doubts <= asked[0]
    if metadata is None:
        assert doubts == content["doubts_cost"]["forwards"]
    measured = {doubt["name"]: doubt for doubt in content["doubts"]}
    assert measured["randomness"]["state"] == measured["state"]["state"] == "clear"
    assert measured["randomness"]["n"] > 0


def test_a_doubt_that_needs_too_many_rows_is_not_measured_and_names_a_remedy(capsys):
    with Server() as server:
        assert served(server, "-q", "-n", "9", "-o", "-", queries=30) == 0
    doubts = {doubt["name"]: doubt for doubt in json.loads(capsys.readouterr().out)["doubts"]}
    for name in ("noise", "not-exhausted"):
        assert doubts[name]["state"] == "not measured" or doubts[name]["n"] > 0
    said = doubts["not-exhausted"]
    assert (said["state"], said["statistic"]) == ("not measured", None)
    assert "at most as many rows as the suite" in said["message"] and "larger -n" in said["message"]


# --- before the run


@pytest.mark.parametrize(
    "metadata, more",
    [(None, ()), (fixed(8), ("--batch-size", "5")), (None, ("--gate", "clean_accuracy >= 0.1"))],
)
def test_the_rows_that_are_expected_are_stated_and_never_exceeded(capsys, metadata, more):
    with Server(metadata=metadata) as server:
        assert served(server, "-n", "12", *more, queries=15) == 0
        total, clean, attacks, doubts, judging = expected(capsys.readouterr().err)
        assert total == clean + attacks + doubts + judging
        assert len(server.rows) <= total
        if metadata is None:
            assert clean == LOOKED_AT + 12 + (8 if "--gate" in more else 0)
            assert (attacks, judging) == (12 * 15, 12)


def test_quiet_and_finished_runs_state_nothing(capsys):
    with Server() as server:
        assert served(server, "-q", "-n", "8", "--run", "r", "--no-doubts", queries=5) == 0
        assert "expected" not in capsys.readouterr().err
        assert served(server, "-n", "8", "--run", "r", "--no-doubts", "--resume", queries=5) == 0
        assert "expected" not in capsys.readouterr().err


def test_an_attack_that_nothing_bounds_is_named():
    said = ExpectedRows(1, 0, 0, 2, ("Mine",)).description
    assert "not counted are the rows of Mine" in said and "queries=1000" in said


# --- the dry run


@pytest.mark.parametrize("size", [None, 8, 32, 40, 100])
def test_a_dry_run_sends_at_most_64_rows_and_states_their_number(capsys, size):
    metadata = None if size is None else fixed(size)
    with Server(metadata=metadata) as server:
        assert served(server, "--dry-run") == 0
        out, err = capsys.readouterr()
        assert f"sent to the server for this estimate: {len(server.rows)} rows" in err
        assert 0 < len(server.rows) <= max(64, size or 0)
    assert expected(out)[0] > 46 * 40
    assert "46 of 48" in out if (size or 0) >= 100 else "if the share of correct examples is" in out


def test_a_dry_run_that_tries_every_example_counts_those_that_are_right(capsys):
    with Server() as server:
        assert served(server, "--dry-run", "-n", "20", queries=None) == 0
        assert len(server.rows) == 20 + 8
    out = capsys.readouterr().out
    assert "18 of 20 clean examples" in out
    assert expected(out)[2] == 18 * 5000


def test_a_dry_run_refuses_what_the_run_would_refuse(capsys):
    with Server() as server:
        assert served(server, "--dry-run", "--suite", "fast") == 2
        assert "the model gives scores only" in capsys.readouterr().err
        assert len(server.rows) <= 64


# --- doctor


@pytest.mark.parametrize("size", [None, 8, 32, 40, 100])
def test_doctor_sends_at_most_64_rows_and_states_their_number(capsys, size):
    with Server(metadata=None if size is None else fixed(size)) as server:
        assert served(server, verb="doctor") == 0
        out = " ".join(capsys.readouterr().out.split())
        assert f"{len(server.rows)} rows were sent to the server" in out
        assert len(server.rows) <= max(64, size or 0)
        if size == 32:
            assert len(server.sizes) == 2
    assert "+ accuracy" in out
    assert ("+ steadiness" in out) == (size in (None, 8, 32))


@pytest.mark.parametrize(
    "y, says",
    [((Y + 1) % 3, "with labels -1"), (Y + 1, "they seem to start at 1")],
    ids=["shifted", "from 1"],
)
def test_doctor_finds_labels_that_are_off_on_few_rows(capsys, y, says):
    np.savez("data.npz", x=X, y=y)
    with Server() as server:
        assert served(server, verb="doctor") == 3
        assert len(server.rows) <= 64
    assert says in " ".join(capsys.readouterr().out.split())


class Answering:
    """A server in the process, which answers what a function of the rows returns."""

    def __init__(self, net):
        self.net = net

    def resume(self):
        pass

    def request(self, path, body, *, sent, rows):
        sent.sending(rows)
        return {"r": self.net(torch.tensor(json.loads(body)["x"])).tolist()}


def behind_a_server(net, batches=EVERY):
    form = Template.of('{"x": $x}', "r")
    answers = ServerAnswers(form, labels=None, names=None, declared=False, masked=str)
    served = Served(Answering(net), "/", form, answers, Remote())
    model = Classifier(served, access="scores", batches=batches)
    model.remote = True
    return model


def found_by_doctor(net, x=None, y=None, batches=EVERY):
    x = torch.rand(80, 6, generator=torch.Generator().manual_seed(0)) if x is None else x
    y = x[:, :3].argmax(1) if y is None else y
    model = behind_a_server(net, batches)
    findings = {
        finding.check: finding
        for finding in examine(model, as_data((x, y), expected=DeclaredData(lenient=True)))
    }
    assert model.net.sent.rows <= model.net.sent.most
    return findings


def test_doctor_distinguishes_random_outputs_from_outputs_that_depend_on_the_batch():
    calls = []

    def drawing(x):
        calls.append(1)
        return x[:, :3] + 0.01 * len(calls)

    assert found_by_doctor(drawing)["randomness"].level == "warning"
    assert found_by_doctor(lambda x: x[:, :3] + 0.1 * x[:1, :1])["state"].level == "problem"


def test_doctor_tries_the_readings_that_its_rows_allow_and_names_the_others():
    dark = torch.rand(80, 6, generator=torch.Generator().manual_seed(0)) / 30
    y = dark[:, :3].argmax(1)

    def trained_on_bright_inputs(x):
        return torch.where(x.amax(1, keepdim=True) > 0.1, x[:, :3], -x[:, :3])

    found = found_by_doctor(trained_on_bright_inputs, dark, y)
    assert found["scale"].level == "problem" and found["scale"].gain > 0.5
    assert "readings" not in found
    weak = found_by_doctor(lambda x: x[:, 3:], y=torch.arange(80) % 3)
    assert "not tried" in weak["readings"].message


def test_inputs_that_are_bytes_are_examined_divided():
    x = torch.rand(80, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    found = found_by_doctor(
        lambda x: (x.flatten(1)[:, :3] - 0.5) * (x.max() <= 1), 255 * x, x[:, 0, 0].argmax(1)
    )
    assert found["range"].level == "problem"
    assert found["accuracy"].message.startswith("accuracy is 100.0%")


# --- the limit


def test_no_more_rows_are_sent_than_the_limit():
    look = InspectionCounter(5)
    look.sending(3)
    with pytest.raises(TargetLost, match="layout="):
        look.sending(3)
    assert (look.rows, look.remaining) == (3, 2)


@pytest.mark.parametrize("size", [1, 2, 7, 16, 31, 32, 33, 64])
def test_two_calls_fit_in_the_rows_that_are_left(size):
    model = behind_a_server(lambda x: x, Batches(size))
    for left in (64, 60, 32, 3, 0):
        first, second = rows_of_calls(model, left, 20, 20)
        assert sum(-(-n // size) * size for n in (first, second)) <= left
        assert second <= first
        assert bool(first) == (left >= size)


# --- certification


@pytest.mark.parametrize("metadata", [None, fixed(4)])
def test_smoothing_sends_at_most_the_stated_rows_and_resumes_from_the_answers(capsys, metadata):
    smooth = ["--threat", "l2:0.03", "--method", "smoothing", "--sigma", "0.05", "--draws", "60"]
    with Server(metadata=metadata) as server:
        command = ["certify", server.url(), "data.npz", "-n", "6", *smooth, "--run", "run"]
        assert run([*command, "--max-queries", "20000"]) == 2
        assert "is a server, and requests are sent only to allowed hosts" in capsys.readouterr().err
        assert not server.rows
        allowed = [*command, "--allow-host", server.host, "-o", "r.json"]
        assert run([*allowed, "--max-queries", "700"]) == 3  # during the draws
        total, clean, attacks, doubts, judging = expected(capsys.readouterr().err)
        before = len(server.rows)
        assert LOOKED_AT + 600 < before <= 700
        assert run([*allowed, "--resume", "--max-queries", "20000"]) == 0
        assert len(server.rows) < before + 400
        content = json.loads(Path("r.json").read_text())
        assert content["certification"]["certified"] > 2
        assert content["model"]["name"].startswith("smoothed classifier, σ = 0.05, on top of http")
        rows = content["served"]
        assert (rows["clean"] <= clean) and (rows["attacks"] <= attacks) and (rows["judging"] <= judging)
        assert total == clean + attacks + doubts + judging
        assert len(server.rows) == rows["rows"] <= total
        assert not doubts
