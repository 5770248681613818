"""Answers of the operator's port are checked before they are used."""

import copy
import json

import pytest

from holdfast.adaptation.server_state import approval_of, monitor_state, send_labels, server_state
from holdfast.core.catalogue import names
from holdfast.core.errors import TargetError
from holdfast.reports.audit import monitoring_report
from holdfast.reports.terminal import body
from holdfast.reports.write import rendered

FILE = {
    "workers": [{"set": "a"}],
    "sets": {"a": {"requests": 3, "other": 0.5}},
    "canary": {"state": "none", "reason": ""},
    "model": {
        "set": "a",
        "digest": "ab",
        "reload": "done",
        "reason": "line\x1b[2J\nof ::error::text",
        "settings": {"model": "/m.safetensors", "arch": "cnn", "mean": [0.5], "guard": None},
        "epoch": 1,
    },
}
POOL = {
    "workers": [],
    "sets": {},
    "pool": {"set": "a", "reason": "", "settings": {"pool": "/pool"}, "epoch": 1},
}
SHARE = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 10}
MONITOR = {
    "verdict": "alarm",
    "alarmed": ["mmd"],
    "requests": 3,
    "flagged": 0,
    "stream": {"name": "the requests", "n": 3, "labels": False},
    "reference": {"name": "r", "n": 3},
    "decisive": ["martingale"],
    "measured": {"accuracy": SHARE, "calibration_error": 0.1, "errors": [{"name": "a", "error": SHARE}]},
    "of_reference": None,
    "expected": SHARE,
    "tests": [
        {
            "name": "mmd",
            "compares": "x",
            "state": "alarm",
            "alarm": {"after": 3, "signal": "s", "evidence": "e", "view": "inputs"},
            "guarantee": "g",
            "power": {"signal": "s", "shift": None, "drop": 0.1, "false_alarms": 1, "errors": True},
            "fewest": 10,
            "restarted": [],
        }
    ],
    "notes": ["n"],
    "model": "m",
}
RUNS = {"runs": [{"run": "r", "steps": [], "approval": "pending", "by": ""}]}
LABELS = {"accepted": 1, "unknown": ["a"], "invalid": {"b": "c"}}


class Port:
    """A port with one answer."""

    url = "http://a"

    def __init__(self, answer):
        self.answer = answer

    def get(self, path):
        return self.answer

    def post(self, path, body):
        return self.answer


READERS = [
    (FILE, server_state),
    (POOL, server_state),
    (MONITOR, monitor_state),
    (RUNS, lambda port: approval_of(port, "r")),
    (LABELS, lambda port: send_labels(port, {})),
]


def parts(content, way=()):
    """The ways to all values of a document."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in items:
        yield (*way, key)
        if isinstance(value, dict | list):
            yield from parts(value, (*way, key))


def with_part(content, way, value):
    """A copy of a document with another value at a place, or without it if the value is `...`."""
    changed = copy.deepcopy(content)
    parent = changed
    for key in way[:-1]:
        parent = parent[key]
    parent[way[-1]] = value
    if value is ...:
        del parent[way[-1]]
    return changed


def refusal_of(read, answer):
    """Why an answer is refused; empty if it is accepted, and can be written as JSON."""
    try:
        json.dumps(read(Port(answer)))
    except TargetError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("good", "read"), READERS)
def test_any_value_at_any_place_is_accepted_or_refused_with_one_error(good, read):
    read(Port(copy.deepcopy(good)))
    refused = 0
    for way in parts(good):
        for odd in (
            ...,
            None,
            -1,
            "",
            "@/dev/zero",
            "x" * 20_000,
            [],
            [[]],
            {},
            True,
            float("inf"),
            1e300,
            "a\0b",
        ):
            refusal = refusal_of(read, with_part(good, way, odd))
            refused += bool(refusal)
            assert len(refusal) < 600 and refusal.isprintable()
    assert refused > 20


def test_every_accepted_state_of_a_monitor_is_reported():
    odd = [with_part(MONITOR, way, value) for way in parts(MONITOR) for value in (..., None, [], "")]
    states = [MONITOR, *odd]
    accepted = [state for state in states if not refusal_of(monitor_state, state)]
    assert 5 < len(accepted) < len(states)
    for state in accepted:
        shown = monitor_state(Port(state))
        report = monitoring_report(shown)
        assert report.headline and body(report, colour=False)
        assert all(rendered(report, suffix) for suffix in names("reports"))


def test_texts_are_shown_in_one_line_and_further_fields_are_kept():
    state = server_state(Port(FILE))
    assert "\x1b" not in state["model"]["reason"] and "\n" not in state["model"]["reason"]
    assert state["model"]["epoch"] == 1 and monitor_state(Port(MONITOR))["model"] == "m"


@pytest.mark.parametrize("key", ["model", "guard", "arch", "class_names", "bounds", "mean"])
def test_no_setting_is_read_from_a_file_that_the_server_names(key):
    changed = copy.deepcopy(FILE)
    changed["model"]["settings"][key] = " @/dev/zero" if key == "mean" else "@/dev/zero"
    with pytest.raises(TargetError, match="was expected"):
        server_state(Port(changed))


def test_a_server_is_one_of_a_file_or_of_a_pool():
    for answer in (FILE | POOL, {"workers": [], "sets": {}}, {**FILE, "canary": None}):
        with pytest.raises(TargetError):
            server_state(Port(answer))
    assert server_state(Port(POOL), of="pool")["pool"]["set"] == "a"
    with pytest.raises(TargetError, match="no longer the server of a file"):
        server_state(Port(POOL), of="model")
    assert approval_of(Port(RUNS), "other") == (None, "")
