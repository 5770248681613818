"""Threat models are equal after they were written as text, as the JSON of a run and on a card, and read again."""

import json
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from holdfast.core.constraints import L0, L1, L2, Linf
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.threat import ThreatModel
from holdfast.runs.harden.hardened import trained_under
from holdfast.threats import domains
from holdfast.threats.domains import IMAGE, NUMBERS, TABLE, TEXT, domain_of
from holdfast.threats.parsing import FORMS, parse_threat, threat_of
from holdfast.threats.stored import threat_for_report, threat_from_json, threat_to_json
from holdfast.threats.transformations import Colour, Corruptions, Patch, Spatial
from holdfast.threats.triggers import TrainingSet

TEXTS = (
    "linf:8/255",
    "linf",
    "l2:0.333333333333,unit=std",
    "l1:12,goal=targeted:3,access=scores,queries=50",
    "l0:3",
    "l0:10px",
    "snr:40dB",
    "snr:33.3333dB,access=scores,queries=50",
    "peak:30.5dB",
    "snr",
    "corruptions:3",
    "patch:5x5",
    "patch:5x6,at=centre,jitter=2",
    "patch:2x2,within=4:4-9:9",
    "patch:4x4,printable=default,shape=circle",
    "spatial:rotate=30.1234567,shift=2",
    "spatial:flow=1.5",
    "colour:hue=18,contrast=0.1",
    "training-set:20",
    "text:edits=2,words=3",
    "bytes:change=16,append=64,insert=8,file=rules.json",
    "text:synonyms=2,file=words.json",
    "text:inserts=2,file=words.json,access=labels",
    "table:rules.yaml,eps=0.3",
    "trigger:drill.npz,goal=targeted:1",
    "observations:linf:0.1,unit=std",
    "actions:l2:0.5",
    "parameters:mass=0.25,length=0.1",
)


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """Files that the threats name, in the folder of the test."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.json").write_text(json.dumps({"synonyms": {"good": ["fine"]}, "insert": ["hello"]}))
    (tmp_path / "rules.json").write_text(json.dumps([{"starts": "PK", "append": True}, {"change": [[0, 4]]}]))
    (tmp_path / "rules.yaml").write_text("columns:\n  a: {min: 0, max: 1}\n  b: {min: 0, max: 2}\n")
    mask = np.zeros((1, 4, 4), np.float32)
    mask[0, 0, 0] = 1
    np.savez(tmp_path / "drill.npz", mask=mask, pattern=mask, target=1)


def test_every_form_has_a_text_here():
    assert {parse_threat(text).name for text in TEXTS} == set(FORMS)


@pytest.mark.parametrize("text", TEXTS)
def test_a_threat_is_equal_after_text_json_and_card(text):
    threat = parse_threat(text).opened()
    assert threat.text == text
    assert parse_threat(threat.text).opened() == threat
    assert threat_of(threat).opened() == threat
    stored = json.loads(json.dumps(threat_to_json(threat), allow_nan=False))
    assert threat_from_json(stored) == threat
    assert threat_from_json(stored).text == text
    unaimed = ThreatModel(threat.constraint, unit=threat.unit)
    assert parse_threat(trained_under(threat)).constraint == unaimed.constraint
    training = {name: stored[name] for name in ("norm", "eps", "per", "limits", "unit") if name in stored}
    assert threat_from_json(training) == unaimed


@pytest.mark.parametrize("text", TEXTS)
def test_a_report_states_the_text_of_the_constraint_without_the_content_of_files(text):
    report = threat_for_report(parse_threat(text).opened())
    change = text.partition(",goal=")[0].partition(",access=")[0]
    assert report["constraint"] == change
    assert "content" not in report["limits"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_threat_states_the_same_before_and_after_its_constraint_is_created(text):
    threat = parse_threat(text)
    assert str(threat) == text
    assert (threat.change.name, threat.change.eps, threat.change.domain) == (
        threat.constraint.name, threat.constraint.eps, threat.constraint.domain,
    )  # fmt: skip


@pytest.mark.parametrize("eps", [8 / 255, 0.2, 1 / 3, 1e-7, 1000.0, float(np.float32(8 / 255))])
def test_a_size_is_written_exactly(eps):
    assert parse_threat(ThreatModel(Linf(eps)).text).eps == eps


def test_text_is_parsed_without_torch():
    code = (
        "import sys; from holdfast.threats.parsing import parse_threat\n"
        f"texts = {TEXTS!r}\n"
        "assert [str(parse_threat(text)) for text in texts] == [*texts]\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_target_class_of_a_trigger_is_that_of_its_file():
    assert parse_threat("trigger:drill.npz").opened().goal == 1
    with pytest.raises(UsageError, match="goal is targeted:0, and trigger:drill.npz has the target class 1"):
        parse_threat("trigger:drill.npz,goal=targeted:0").opened()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "Linfinity"}, "does not support"),
        ({"limits": {"height": "5", "width": 5}}, "limits of the threat model are damaged"),
        ({"limits": {"height": 5, "width": -1}}, "limits of the threat model are damaged"),
        ({"limits": {"height": 5, "depth": 1}}, "limits of the threat model are damaged"),
        ({"eps": 2.0}, "its limits have 1"),
    ],
)
def test_a_damaged_threat_of_a_run_is_refused(change, message):
    stored = threat_to_json(ThreatModel(Patch(5, 5)))
    with pytest.raises(TargetError, match=message):
        threat_from_json({**stored, **change})


def test_another_size_is_written_in_the_form_of_the_constraint():
    threat = ThreatModel(L0(10, "pixel"), access="scores")
    assert threat.with_size(5) == "l0:5px,access=scores"
    assert ThreatModel(Patch(5, 5)).with_size(2) == "patch:5x5"


def test_a_change_of_a_threat_forgets_its_given_text():
    threat = parse_threat("linf:0.10")
    assert (str(threat), str(replace(threat, access="scores"))) == ("linf:0.10", "linf:0.1,access=scores")


def test_a_domain_is_that_of_the_constraint_or_of_the_shape():
    assert domain_of(parse_threat("text:edits=1,words=1").constraint, (40,)) is TEXT
    assert domain_of(parse_threat("table:rules.yaml").constraint, (2,)) is TABLE
    assert domain_of(Linf(), (3, 8, 8)) is IMAGE
    for shape in ((40,), (5, 8, 8), None):
        assert domain_of(Linf(), shape) is NUMBERS


def test_facts_of_the_families():
    balls = (Linf(), L2(), L1(), L0())
    assert [ball.in_input_units for ball in balls] == [True, True, True, False]
    assert [ball.bounds_each_value for ball in balls] == [True, False, False, False]
    others = (Corruptions(), TrainingSet(2), Patch(), Spatial(rotate=3), Colour(hue=3))
    assert not any(other.is_ball or other.has_size or other.in_input_units for other in others)
    assert [other.changes_inputs for other in others] == [True, False, True, True, True]
    assert [other.drawn_at_random for other in others] == [True, False, False, False, False]


@pytest.mark.parametrize(
    ("constraint", "x", "message"),
    [
        (Patch(5, 5), torch.zeros(2, 1, 4, 4), "does not fit"),
        (Patch(2, 2), torch.zeros(2, 4), "needs images"),
        (Spatial(rotate=3), torch.zeros(2, 4), "needs images"),
        (Colour(hue=3), torch.zeros(2, 1, 4, 4), "three channels"),
        (Corruptions(1), torch.zeros(2, 2, 4, 4), "1 or 3 channels"),
    ],
)
def test_inputs_that_cannot_be_changed_are_refused(constraint, x, message):
    with pytest.raises(UsageError, match=message):
        constraint.refuse_unfit(x)
    Linf(0.1).refuse_unfit(x)


def test_a_kind_of_inputs_is_the_same_object_in_another_process():
    kinds = [value for value in vars(domains).values() if isinstance(value, domains.Domain)]
    assert all(pickle.loads(pickle.dumps(kind)) is kind for kind in kinds)
