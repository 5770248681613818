"""The trigger of a backdoor as a change of inputs, as a constraint, and as an attack."""

from dataclasses import replace

import pytest
import torch

import holdfast
from holdfast.attacks import PGD, TriggerStamp
from holdfast.core.batch import Batch
from holdfast.core.constraints import Constraint, Linf, allowed
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Bounds
from holdfast.core.threat import ThreatModel
from holdfast.io.data.npz import read_trigger, trigger_threat, write_trigger
from holdfast.threats.parsing import parse_threat
from holdfast.threats.triggers import Stamped, Trigger, trigger_of, trigger_text

BOX = Bounds()


class Corner(torch.nn.Module):
    """Class 0 without a white lower right corner, and class 1 with one."""

    def forward(self, x):
        corner = x[:, :, -2:, -2:].mean((1, 2, 3))
        return torch.stack([0.9 - corner, corner], 1)


def patch(target=None, shape=(1, 6, 6)):
    mask = torch.zeros(1, *shape[1:])
    mask[:, -2:, -2:] = 1
    return Trigger(mask, torch.ones(shape), target)


def wave(size=0.5):
    return Trigger(
        torch.zeros(1, 6, 6), torch.zeros(1, 6, 6), None, size * torch.linspace(-1, 1, 36).view(1, 6, 6)
    )


def images(n=20):
    x = 0.5 * torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    return x, torch.zeros(n, dtype=torch.int64)


@pytest.mark.parametrize("trigger", [patch(), patch(3), patch(1, (3, 6, 6)), wave()])
def test_a_trigger_survives_its_text(trigger):
    again = trigger_of(trigger_text(trigger))
    assert torch.equal(again.mask, trigger.mask) and torch.equal(again.pattern, trigger.pattern)
    assert again.target == trigger.target
    assert (again.shift is None) == (trigger.shift is None)
    assert again.shift is None or torch.equal(again.shift, trigger.shift)


@pytest.mark.parametrize("trigger", [patch(), wave()])
def test_only_the_input_with_the_trigger_is_allowed(trigger):
    constraint, (x, _) = Stamped("t.npz", trigger_text(trigger)), images()
    stamped = trigger.stamped(x, BOX)
    assert isinstance(constraint, Constraint)
    assert constraint.distance(stamped, x).eq(1).all() and constraint.distance(x, x).eq(0).all()
    assert allowed(constraint, stamped, x, BOX).all()
    other = stamped.clone()
    other[:, 0, 0, 0] += 0.1
    assert (
        constraint.distance(other, x).eq(torch.inf).sum() >= len(x) - 1
    )  # one may be at the end of the range
    assert constraint.resized(0.3) is constraint


def test_a_missing_value_stays_missing():
    x, _ = images(2)
    x[0, 0, 5, 5] = torch.nan
    constraint = Stamped("t.npz", trigger_text(patch()))
    stamped = patch().stamped(x, BOX)
    assert constraint.distance(stamped, x).tolist() == [1, 1]


def test_half_precision_is_within_the_tolerance():
    x = images()[0].half()
    constraint = Stamped("t.npz", trigger_text(wave()))
    assert allowed(constraint, wave().stamped(x, BOX), x, BOX).all()


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"target":1}', trigger_text(patch()).replace("eJ", "AA"), "null"]
)
def test_a_damaged_text_is_refused(content):
    with pytest.raises((ValueError, TypeError, KeyError)):
        Stamped("t.npz", content)


def test_the_success_of_a_trigger_is_measured(tmp_path):
    write_trigger(tmp_path / "corner, white.trigger.npz", patch(1))
    threat = f'trigger:"{tmp_path}/corner, white.trigger.npz"'
    result = holdfast.assess(Corner(), images(), threat)
    assert [attack.name for attack in result.evidence.attacks] == ["TriggerStamp"]
    assert result.evidence.threat.goal == 1
    assert result["trigger_success_rate"].value == 1
    assert "100.0 % of 20 images of other classes are assigned to class 1 with the trigger" in str(result)
    assert "adds the trigger in" in result.to_html(tmp_path / "report.html").read_text(encoding="utf-8")
    write_trigger(tmp_path / "wave.npz", wave(0.05))
    unaimed = holdfast.assess(Corner(), images(), f"trigger:{tmp_path}/wave.npz")
    assert unaimed["trigger_success_rate"].value == 0 and unaimed["robust_accuracy"].value == 1


def test_examples_of_the_target_class_are_none_of_the_attack(tmp_path):
    write_trigger(tmp_path / "t.npz", patch(1))
    x, y = images()
    x[:5], y[:5] = patch().stamped(x[:5], BOX), 1
    result = holdfast.assess(Corner(), (x, y), f"trigger:{tmp_path}/t.npz")
    assert result["trigger_success_rate"].n == 15
    with pytest.raises(UsageError, match="all examples have the target class 1 of the trigger"):
        holdfast.assess(
            Corner(), (x[:5], y[:5]), f"trigger:{tmp_path}/t.npz", gates=["trigger_success_rate <= 1"]
        )


def test_misclassified_examples_count_as_well(tmp_path):
    write_trigger(tmp_path / "t.npz", patch(1))
    x, y = images()
    y[:5] = 2  # the model has no such class, and the examples are wrong when clean
    net = torch.nn.Sequential(Corner(), torch.nn.ConstantPad1d((0, 1), -1.0))
    result = holdfast.assess(net, (x, y), f"trigger:{tmp_path}/t.npz", gates=["trigger_success_rate <= 0.1"])
    assert result["clean_accuracy"].value == 0.75 and result.exit_code == 1
    assert result["trigger_success_rate"].value == 1 and result["trigger_success_rate"].n == 20
    assert result["targeted_success_rate"].value == 0.75


def test_without_a_target_any_change_of_the_class_counts(tmp_path):
    write_trigger(tmp_path / "t.npz", patch())
    x, y = images()
    x[:5] = patch().stamped(x[:5], BOX)
    result = holdfast.assess(Corner(), (x, y), f"trigger:{tmp_path}/t.npz")
    assert result["trigger_success_rate"].value == 0.75 and result["trigger_success_rate"].n == 20
    assert "75.0 % of 20 images change their class with the trigger" in str(result)


def test_a_run_with_a_trigger_is_stored_and_another_trigger_refused(tmp_path):
    file, run = tmp_path / "t.npz", tmp_path / "run"
    write_trigger(file, patch(1))
    holdfast.assess(Corner(), images(), f"trigger:{file}", run=run)
    report = holdfast.report(run)
    assert report["trigger_success_rate"].value == 1
    holdfast.verify(run)
    write_trigger(file, wave())
    with pytest.raises(UsageError, match="another content of the file"):
        holdfast.assess(Corner(), images(), f"trigger:{file}", run=run, resume=True)


def test_a_stored_threat_is_read_again(tmp_path):
    write_trigger(tmp_path / "t.npz", patch(1))
    threat = parse_threat(f"trigger:{tmp_path}/t.npz,access=scores").opened()
    assert threat.goal == 1
    assert threat.text == f"trigger:{tmp_path}/t.npz,goal=targeted:1,access=scores"
    assert parse_threat(threat.text).opened() == threat


def test_other_goals_shapes_attacks_and_threats_are_refused(tmp_path):
    file = tmp_path / "t.npz"
    write_trigger(file, patch(1))
    with pytest.raises(UsageError, match="goal is targeted:0, and trigger:.* has the target class 1"):
        holdfast.assess(Corner(), images(), f"trigger:{file},goal=targeted:0")
    write_trigger(tmp_path / "wide.npz", patch(1, (1, 7, 7)))
    with pytest.raises(UsageError, match=r"has the shape \(1, 7, 7\), and the inputs have \(1, 6, 6\)"):
        holdfast.assess(Corner(), images(), f"trigger:{tmp_path}/wide.npz")
    write_trigger(tmp_path / "class.npz", patch(7))
    with pytest.raises(UsageError, match="the target class is 7, but the model has 2 classes"):
        holdfast.assess(Corner(), images(), f"trigger:{tmp_path}/class.npz")
    with pytest.raises(UsageError, match="nothing is searched"):
        holdfast.assess(Corner(), images(), f"trigger:{file}", suite=[PGD()])
    x, y = images()
    batch = Batch(x, y, torch.arange(len(y)))
    with pytest.raises(UsageError, match="and the threat is linf"):
        holdfast.assess(Corner(), images(), "linf:0.1", suite=[TriggerStamp()])
    with pytest.raises(UsageError, match="and the threat is linf"):
        TriggerStamp()(None, batch, ThreatModel(Linf(0.1)), rng=Draws(0))
    with pytest.raises(UsageError, match="the threat 'trigger:' has no file"):
        parse_threat("trigger:")


@pytest.mark.parametrize("ends", [(0.0, 1.0), (0.0, 255.0), (-1.0, 1.0)])
def test_a_trigger_is_stamped_in_the_units_of_the_model(tmp_path, ends):
    low, high = ends
    for made in (patch(1), wave(0.05)):
        write_trigger(tmp_path / "t.npz", replace(made, ends=(0.0, 1.0)))
        trigger = read_trigger(tmp_path / "t.npz")
        unit = torch.rand(3, *made.pattern.shape, generator=torch.Generator().manual_seed(0))
        x = low + unit * (high - low)
        stamped = trigger.stamped(x, Bounds(low, high))
        assert torch.allclose((stamped - low) / (high - low), made.stamped(unit, Bounds()), atol=1e-5)
        constraint = trigger_threat(file=str(tmp_path / "t.npz")).in_bounds(Bounds(low, high))
        assert constraint.distance(stamped, x).tolist() == [1, 1, 1]


def test_a_trigger_of_unknown_units_with_values_outside_the_bounds_is_refused() -> None:
    bright = Trigger(torch.ones(1, 2, 2), torch.full((1, 2, 2), 255.0))
    with pytest.raises(
        UsageError, match="values from 255 to 255, and the model takes values from 0 to 1.*low and high"
    ):
        bright.stamped(torch.zeros(1, 1, 2, 2), Bounds())
