"""The comparison of two models on the inputs that a server sampled, and answers of a server with odd samples."""

import io
import zipfile
from contextlib import nullcontext
from itertools import count, repeat

import numpy as np
import pytest
import torch

from holdfast.core.errors import TargetError
from holdfast.guard.detectors.outputs import Energy
from holdfast.guard.guard import GuardPipeline
from holdfast.guard.rules import Action, InputSchema, Mode, Rule
from holdfast.verbs.adapt_comparison import LivePairs, Side, read_samples

SHAPE = (3,)


def arrays(principals, x=None, **more):
    n = len(principals)
    return {
        "x": np.zeros((n, 3), np.float32) if x is None else np.asarray(x, np.float32),
        "y": np.full(n, -1),
        "principal": np.array(principals, str),
        "age": np.zeros(n),
        "set": np.full(n, "served"),
        "failed": np.zeros(n, bool),
        **more,
    }


def npz(save=np.savez, **content):
    file = io.BytesIO()
    save(file, **content)
    return file.getvalue()


class Model:
    """A model whose logits are a function of the inputs."""

    def __init__(self, function):
        self.logits = function


def side(function, threshold=None):
    guard = None
    if threshold is not None:
        rules = {"energy": Rule("energy", Mode.SHADOW, Action.FLAG, threshold)}
        guard = GuardPipeline(InputSchema(SHAPE), rules, {"energy": Energy()})
    return Side(lambda: nullcontext(Model(function)), lambda: guard)


STATUS = {
    "workers": [],
    "model": {"set": "old", "digest": "old", "reload": "none", "reason": ""},
    "canary": {"state": "serving", "reason": ""},
}


ALWAYS = repeat(0)


def pairs(candidate, served, *answers, failures=ALWAYS):
    """The comparison of two models on a server that gives these answers, the last one again and again."""
    waiting = list(answers)

    class Port:
        url = "http://127.0.0.1:9"

        def read(self, path):
            return npz(**(waiting.pop(0) if len(waiting) > 1 else waiting[0]))

        def get(self, path):
            return {**STATUS, "sets": {"new": {"model_failures": next(failures), "refused": 4}}}

    return LivePairs(Port(), "model", SHAPE, candidate, served, "new")


def sure(x):
    """Scores with a large first class, of which no guard flags any."""
    return torch.tensor([[9.0, 0, 0]]).repeat(len(x), 1)


def unsure(x):
    """Scores that a guard flags if the first value of the input is large."""
    return torch.where(x[:, :1] > 0.5, 0.0, sure(x))


CLIENTS = ["a"] * 40 + ["b"] * 40 + ["c"] * 40
"""three clients, each of which sends some inputs with a large value in their first place"""


def crafted(*shares):
    """Inputs, of which these shares of each client are crafted against the candidate."""
    return np.concatenate([np.arange(40)[:, None] < 40 * share for share in shares]) * np.ones(3)


def test_a_regression_of_several_clients_is_found():
    found = pairs(side(unsure, -5.0), side(sure, -5.0), arrays(CLIENTS, crafted(0.5, 0.5, 0.5)))
    facts = found.compared(found.sample())
    assert facts["ends"] == "the guard flagged 60 of 120 inputs, and for the served model 0"
    assert (facts["pairs"], facts["principals"], facts["flagged_candidate"]) == (120, 3, 60)


def test_one_client_does_not_decide_and_is_named():
    found = pairs(side(unsure, -5.0), side(sure, -5.0), arrays(CLIENTS, crafted(1, 0, 0)))
    facts = found.compared(found.sample())
    assert "ends" not in facts and facts["notes"][0].endswith("those of the client a")
    found = pairs(side(unsure, -5.0), side(sure, -5.0), arrays([""] * 120, crafted(1, 0, 0)))
    assert "ends" in found.compared(found.sample()), "without keys, there is one client"


def test_accuracies_are_compared_on_labelled_inputs():
    y = np.where(crafted(0.5, 0.5, 0.5)[:, 0] > 0, 1, -1)
    found = pairs(side(sure), side(lambda x: sure(x).flip(1)), arrays(CLIENTS, y=y))
    assert "ends" not in found.compared(found.sample()), "both are wrong"
    right = side(lambda x: torch.tensor([[0.0, 1, 0]]).repeat(len(x), 1))
    found = pairs(side(sure), right, arrays(CLIENTS, y=y))
    facts = found.compared(found.sample())
    assert facts["ends"] == "it misclassified 60 of 60 labelled inputs, and for the served model 0"
    assert (facts["labelled"], facts["wrong_candidate"], facts["equal_predictions"]) == (60, 60, 0.0)


def test_one_of_three_clients_does_not_decide_by_being_the_only_one_with_labels():
    right = side(lambda x: torch.tensor([[0.0, 1, 0]]).repeat(len(x), 1))
    for names, ends in ((CLIENTS, False), (["a"] * 40 + ["b"] * 80, True)):
        y = np.where(np.array(names) == "a", 1, -1)
        found = pairs(side(sure), right, arrays(names, y=y))
        facts = found.compared(found.sample())
        assert (facts["labelled"], facts["wrong_candidate"]) == (40, 40)
        assert ("ends" in facts) is ends
        assert ends or facts["notes"][0].endswith("those of the client a")


def raising(x):
    if (x[:, 0] > 0.5).any():
        raise ValueError("too bright")
    return sure(x)


def nan(x):
    return torch.where(x[:, :1] > 0.5, torch.nan, sure(x))


@pytest.mark.parametrize("candidate", [raising, nan])
def test_one_input_on_which_the_candidate_alone_fails_is_enough(candidate):
    x = crafted(0, 0, 0)
    x[0] = 1
    found = pairs(side(candidate, -5.0), side(sure, -5.0), arrays(CLIENTS, x))
    assert "fails on 1 of 120 inputs" in found.compared(found.sample())["ends"]
    found = pairs(side(candidate, -5.0), side(nan, -5.0), arrays(CLIENTS, x, failed=x[:, 0] > 0))
    assert "ends" not in found.compared(found.sample()), "the served model fails on it as well"


@pytest.mark.parametrize(
    ("failing", "names", "fault"),
    [
        (["a"], CLIENTS, False),  # one client does not decide by the process that it reaches
        (["a", "b"], CLIENTS, True),
        (["a"], ["a"] * 120, True),
    ],
)
def test_failures_that_cannot_be_repeated(failing, names, fault):
    sets, failed = np.full(120, "served"), np.zeros(120, bool)
    for name in failing:
        place = CLIENTS.index(name)
        sets[place], failed[place] = "new", True
    found = pairs(side(sure), side(sure), arrays(names, set=sets, failed=failed))
    facts = found.compared(found.sample())
    assert ("its process failed on inputs of" in facts.get("ends", "")) is fault
    assert fault or "its process failed on inputs of the client a" in facts["notes"][0]


def test_a_time_of_watching_ends_with_a_fault(set_limit):
    set_limit("holdfast.verbs.adapt_comparison._POLL_S", 0.01)
    quiet = pairs(side(sure), side(sure), arrays(CLIENTS))
    facts = quiet.watched(0.05, lambda status: "")
    assert (facts["pairs"], facts["refused"]) == (120, 0) and "ends" not in facts
    assert quiet.watched(60, lambda status: "it ended")["ends"] == "it ended"
    old = pairs(side(sure), side(sure), arrays(CLIENTS, age=np.full(120, 1e4)))
    assert old.watched(0.05, lambda status: "")["pairs"] == 0, "they were sent before"
    x = crafted(1, 0, 0)
    failing = pairs(side(nan), side(sure), arrays(CLIENTS, x, failed=x[:, 0] > 0), failures=count())
    assert "fails on 40 of 40" in failing.watched(60, lambda status: "")["ends"]


def compressed():
    return npz(np.savez_compressed, **arrays(["a"]))


def without(name):
    return npz(**{key: value for key, value in arrays(["a"]).items() if key != name})


def nested():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(
            "x.npy", b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (9,)}"
        )
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x05\x06",
        compressed(),
        nested(),
        npz(**arrays(["a"]))[:-40],
        *(without(name) for name in arrays([])),
        npz(**arrays(["a"], np.full((1, 3), np.nan))),
        npz(**arrays(["a"], np.zeros((1, 4)))),
        npz(**arrays(["a"], np.zeros((2, 3)))),
        npz(**arrays(["a"], y=np.zeros(1))),
        npz(**arrays(["a"], y=np.zeros((1, 1), int))),
        npz(**arrays(["a"], principal=np.array([{}], object))),
        npz(**arrays(["a" * 201])),
        npz(**arrays(["a"], age=np.array([np.inf]))),
        npz(**arrays(["a"], failed=np.zeros(1))),
        npz(**{**arrays(["a"]), "x": np.zeros((1, 3), complex)}),
        npz(**arrays(["a"], set=np.array([b"a"]))),
    ],
)
def test_odd_samples_are_refused(content):
    with pytest.raises(TargetError, match="did not answer with samples"):
        read_samples(content, SHAPE, "http://a")


def test_no_samples():
    empty = read_samples(npz(**arrays([], np.zeros((0, 1)))), SHAPE, "http://a")
    assert len(empty.newer(1).x) == 0
