"""The loop under the gradient attacks, and who keeps its best."""

import itertools
import math

import pytest
import torch
from torch import nn

from holdfast.attacks.parts.ascent import ascend, cosine, flat, gradient
from holdfast.attacks.parts.losses import Best, cross_entropy, margin, margin_loss
from holdfast.core.batch import Batch
from holdfast.core.constraints import L2, Linf
from holdfast.core.meter import Metered
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.testing.fakes import examples, labelled, network

MODEL = network()
BATCH = labelled(MODEL, examples())
BALL = Linf(0.04)


def climbed(steps, **options):
    return ascend(MODEL, BATCH, BATCH.x, margin_loss, BALL, steps=steps, step_size=0.01, **options)


def test_the_best_point_is_returned_with_its_margin():
    x, height = climbed(8)
    torch.testing.assert_close(margin(MODEL(x), BATCH), height)
    assert (height <= margin(MODEL(BATCH.x), BATCH)).all()


def test_more_steps_never_raise_the_margin():
    heights = [climbed(steps, drop=False)[1] for steps in (1, 2, 5, 9)]
    for shorter, longer in itertools.pairwise(heights):
        assert (longer <= shorter).all()


def test_the_last_point_is_the_end_of_the_path():
    x, _ = climbed(1, keep="last")
    step = 0.01 * gradient(MODEL, BATCH, margin_loss)[0].sign()
    torch.testing.assert_close(x, BALL.project(BATCH.x + step, BATCH.x, MODEL.bounds))


@pytest.mark.parametrize("keep, forwards", [("best", 6), ("last", 5)])
def test_the_stated_cost_is_the_measured_cost(keep, forwards):
    meter = Metered(MODEL, BATCH, ThreatModel(BALL))
    ascend(meter, BATCH, BATCH.x, cross_entropy, BALL, steps=5, step_size=0.001, drop=False, keep=keep)
    assert (meter.spent.queries == forwards).all()
    assert (meter.spent.backwards == 5).all()


def test_broken_examples_leave_and_surviving_examples_remain():
    meter = Metered(MODEL, BATCH, ThreatModel(BALL))
    _, height = ascend(meter, BATCH, BATCH.x, margin_loss, BALL, steps=10, step_size=0.01)
    queries = meter.spent.queries
    assert (height <= 0).any() and (height > 0).any()
    assert (queries[height > 0] == 11).all()
    assert torch.equal(queries[height <= 0], meter.spent.first_success[height <= 0])


def test_dropping_changes_no_verdict():
    assert torch.equal(climbed(10)[1] > 0, climbed(10, drop=False)[1] > 0)


def test_schedules_have_one_length():
    for steps in (1, 7, 40):
        assert sum(flat(k, steps) for k in range(steps)) == steps
        assert sum(cosine(k, steps) for k in range(steps)) == pytest.approx(
            steps + 1
        )  # twice at the start, never zero
        assert cosine(0, steps) == 2 and cosine(steps, steps) == pytest.approx(0)


def test_momentum_moves_the_input_where_the_gradient_vanishes():
    class Step(nn.Module):
        """A slope up to 0.5 that is flat beyond."""

        def forward(self, x):
            z = x.clamp_max(0.5).sum(1)
            return torch.stack((1 - z, z - 1), 1)

    batch = Batch(torch.full((1, 1), 0.45), torch.zeros(1).long(), torch.zeros(1).long())
    model = Classifier(Step())
    ends = [
        ascend(
            model, batch, batch.x, margin_loss, Linf(1.0), steps=3, step_size=0.1, momentum=m, keep="last"
        )[0].item()
        for m in (0.0, 1.0)
    ]
    assert ends == pytest.approx([0.55, 0.75])


def test_the_gradient_is_zero_where_the_graph_is_cut():
    cut = Classifier(lambda x: torch.stack(((x.sum((1, 2, 3)) > 9).double(), x.new_zeros(len(x))), 1))
    grad, logits = gradient(cut, BATCH, margin_loss)
    assert torch.equal(grad, torch.zeros_like(BATCH.x)) and logits.shape == (21, 2)


def test_best_takes_only_what_is_lower_and_nan_is_lowest():
    batch = Batch(torch.zeros(3, 1), torch.zeros(3).long(), torch.tensor([5, 3, 9]))
    best = Best(batch)
    assert best.surviving.tolist() == [0, 1, 2]
    lower = best.offer(batch, torch.full((3, 1), 0.1), torch.tensor([2.0, -1.0, 1.0]))
    assert lower.all() and best.surviving.tolist() == [0, 2]
    some = batch.take(torch.tensor([2, 0]))
    lower = best.offer(some, torch.full((2, 1), 0.2), torch.tensor([math.nan, 3.0]))
    assert lower.tolist() == [True, False]
    assert best.x.flatten().tolist() == pytest.approx([0.1, 0.1, 0.2])
    assert best.margin.tolist() == [2.0, -1.0, -math.inf]
    assert torch.equal(batch.x, torch.zeros(3, 1))


def test_a_path_that_ends_higher_keeps_its_best():
    """A step far too long leaves the valley again; the lowest point on the way is returned."""

    class Valley(nn.Module):
        def forward(self, x):
            z = (x - 0.5).abs().sum(1) + 0.1
            return torch.stack((z, torch.zeros_like(z)), 1)

    batch = Batch(torch.full((1, 1), 0.2), torch.zeros(1).long(), torch.zeros(1).long())
    x, height = ascend(Classifier(Valley()), batch, batch.x, margin_loss, L2(1.0), steps=2, step_size=0.29)
    assert x.item() == pytest.approx(0.49) and height.item() == pytest.approx(0.11)


def test_a_gradient_that_is_no_number_leaves_the_input_a_number():
    batch = Batch(torch.full((2, 3), 0.5), torch.tensor([0, 1]), torch.arange(2))
    model = Classifier(lambda x: torch.stack(((x.sum(1) - 1.5).sqrt(), x[:, 0]), 1))
    grad, _ = gradient(model, batch, margin_loss)
    assert grad.isfinite().all()
    x, _ = ascend(model, batch, batch.x, margin_loss, Linf(0.1), steps=3, step_size=0.05)
    assert x.isfinite().all()


def test_a_gradient_that_is_one_number_for_all_features_is_taken():
    model = Classifier(lambda x: torch.stack((x.flatten(1).sum(1), x.flatten(1).mean(1)), 1))
    grad, _ = gradient(model, examples(), cross_entropy)
    assert grad.unique().numel() <= 2 * len(examples()) and (grad.abs() > 0).all()


def test_a_gradient_that_is_no_number_is_zero():
    def rooted(x):
        z = (x - x.detach()).flatten(1)[:, 0].sqrt()  # its slope at zero is infinite
        return torch.stack((z + x[:, 0, 0, 0] * 0, x[:, 0, 0, 1]), 1)

    grad, _ = gradient(Classifier(rooted), examples(), margin_loss)
    assert grad.isfinite().all()
    assert (grad[:, 0, 0, 0] == 0).all() and (grad[:, 0, 0, 1] != 0).all()
