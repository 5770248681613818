"""Randomised smoothing: exact radii of linear models, independence of batches, verdicts, and what is refused."""

import math

import pytest
import torch
from scipy.special import ndtr
from torch import nn

from holdfast.certifiers.protocol import Proofs
from holdfast.certifiers.smoothing import ABSTAINED, Counting, Smoothed, Smoothing, numbered_noise
from holdfast.core.batch import Batch
from holdfast.core.constraints import L1, L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.testing.fakes import LinearOracle

SIGMA = 0.5


def linear(n=60, features=12, seed=0):
    """A linear model of two classes, examples, and their exact distances to its boundary."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(features, generator=draw, dtype=torch.float64)
    oracle = LinearOracle(
        torch.stack((torch.zeros_like(weight), weight)), torch.zeros(2, dtype=torch.float64)
    )
    distance = torch.linspace(0.01, 2.0, n, dtype=torch.float64)
    x = weight / weight.norm() * distance[:, None]
    return oracle.classifier(), Batch(x, torch.ones(n, dtype=torch.int64), torch.arange(n) * 7 + 3), distance


def proofs(model, batch, eps=0.4, **settings):
    how = Smoothing(**{"sigma": SIGMA, "draws": 2_000, **settings})
    return how.ready(model, batch.take(torch.arange(min(len(batch), 4))), ThreatModel(L2(eps)))(batch)


def test_the_noise_is_standard_normal_and_a_function_of_id_and_number():
    ids, numbers = torch.arange(40).repeat_interleave(50), torch.arange(50).repeat(40)
    like = torch.zeros(1, 3, 5, 7, dtype=torch.float64)
    z = numbered_noise(Draws(0), ids, numbers, like)
    assert z.shape == (2000, 3, 5, 7)
    for k, moment in enumerate((0.0, 1.0, 0.0, 3.0), 1):
        assert float((z**k).mean()) == pytest.approx(
            moment, abs=5 * math.sqrt(math.prod(range(1, 2 * k, 2)) / z.numel())
        )
    flat = z.flatten(1)
    assert float((flat[:, :-1] * flat[:, 1:]).mean().abs()) < 5 / math.sqrt(flat.numel())
    assert float((flat[:-1] * flat[1:]).mean().abs()) < 5 / math.sqrt(flat.numel())
    half = flat.shape[1] // 2 + 1  # the two numbers of one pair
    assert float((flat[:, : flat.shape[1] - half] * flat[:, half:]).mean().abs()) < 5 / math.sqrt(
        flat.numel() / 2
    )
    rows = torch.tensor([1999, 3, 700])
    assert torch.equal(numbered_noise(Draws(0), ids[rows], numbers[rows], like), z[rows])
    assert not torch.equal(numbered_noise(Draws(1), ids[rows], numbers[rows], like), z[rows])


def test_no_radius_exceeds_that_of_a_linear_model_and_no_certificate_is_wrong():
    """The smoothed linear model is the linear model, so that its radius is the distance to the boundary."""
    model, batch, distance = linear()
    found = proofs(model, batch)
    assert (found.radius <= distance).all()
    assert not (found.certified & (distance < 0.4)).any()
    assert found.certified[distance > 0.5].all()
    assert torch.equal(found.certified, found.radius >= 0.4)
    assert not found.broken.any()
    exact = 2 * torch.from_numpy(ndtr(((distance - 0.4) / SIGMA).numpy())) - 1
    assert (found.bound <= exact).all()
    assert torch.equal(found.bound >= 0, found.certified)


def test_without_eps_all_draws_are_used_and_radii_are_close_to_exact():
    model, batch, distance = linear()
    found = proofs(model, batch, math.inf, draws=4_000)
    assert not found.certified.any()
    assert (found.work == 4_000).all()
    assert (found.radius <= distance).all()
    middle = (distance > 0.3) & (distance < 1.0)
    assert ((distance - found.radius)[middle] < 0.12).all()


def test_easy_verdicts_take_few_draws():
    model, batch, distance = linear()
    found = proofs(model, batch, draws=10_000)
    assert (found.work <= 10_000).all()
    assert (found.work[distance > 1.4] < 200).all()
    assert found.work.double().mean() < 2_000


def test_a_verdict_does_not_depend_on_the_batch():
    model, batch, _ = linear()
    batch = Batch(batch.x, torch.arange(len(batch)) % 7 // 3 % 2, batch.ids)  # some labels are wrong
    whole = proofs(model, batch)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(1))
    for size in (1, 7):
        found = Proofs.joined([proofs(model, part) for part in batch.take(order).split(size)])
        for name in ("certified", "bound", "work", "broken", "radius", "abstained"):
            assert torch.equal(getattr(found, name), getattr(whole, name)[order]), name


def test_other_seeds_draw_other_noise():
    model, batch, _ = linear()
    assert not torch.equal(proofs(model, batch).radius, proofs(model, batch, seed=1).radius)


def test_a_wrong_label_is_broken_and_an_even_one_abstains():
    model, batch, distance = linear()
    found = proofs(model, batch.labelled(1 - batch.y))
    assert not found.certified.any()
    assert found.broken[distance > 0.4].all()
    assert torch.equal(found.x_adv, batch.x)
    assert (found.radius[found.broken] == 0).all()
    even = proofs(model, batch.at(torch.zeros_like(batch.x)))
    assert not even.certified.any() and not even.broken.any()
    assert even.abstained.all()
    assert (even.radius == 0).all()


def test_an_attacked_input_is_refuted_exactly_if_the_smoothed_classifier_is_wrong_there():
    model, batch, distance = linear()
    ready = Counting(Smoothing(SIGMA), model)
    beyond = batch.x - batch.x / distance[:, None] * 0.6
    refuted = ready.refuted(batch.at(beyond))
    assert refuted[distance < 0.5].all()
    assert not refuted[distance > 0.6].any()
    assert torch.equal(ready.refuted(batch.at(beyond).take(torch.tensor([3, 50]))), refuted[[3, 50]])
    empty = batch.take(torch.arange(0))
    assert len(ready.refuted(empty)) == len(proofs(model, empty).certified) == 0


class Fails(nn.Module):
    """Raises for inputs outside [0, 1], or returns NaN for them."""

    def __init__(self, nan):
        super().__init__()
        self.nan = nan

    def forward(self, x):
        outside = ((x < 0) | (x > 1)).flatten(1).any(1)
        if outside.any() and not self.nan:
            raise ValueError("a pixel is not in [0, 1]")
        logits = torch.stack((torch.zeros_like(x[:, 0]), x.flatten(1).mean(1) - 0.25), 1)
        return logits.masked_fill(outside[:, None], torch.nan)


def test_a_model_that_refuses_noise_is_smoothed_with_clamping():
    batch = Batch(torch.full((3, 40), 0.9), torch.ones(3, dtype=torch.int64), torch.arange(3))
    for nan in (True, False):
        model = Classifier(Fails(nan)).eval()
        with pytest.raises(UsageError, match="clip=True"):
            proofs(model, batch)
        assert proofs(model, batch, clip=True).certified.all()
    with pytest.raises(TargetError, match="not in"):  # on clean inputs as well
        proofs(Classifier(Fails(nan=False)).eval(), batch.at(batch.x + 1))


@pytest.mark.parametrize(
    ("settings", "threat", "message"),
    [
        ({"sigma": 0.0}, L2(0.4), "sigma is 0.0; it must be a positive number"),
        ({"sigma": math.nan}, L2(0.4), "sigma is nan"),
        ({"failure_probability": 0.0}, L2(0.4), "failure_probability is 0.0; it must be between 0 and 1"),
        ({"draws": 0}, L2(0.4), "draws is 0; it must be from 1"),
        ({}, L2(0.0), "eps is 0"),
        ({"draws": 100}, L2(1.0), "draws is 100: .* the radius is at most 0.75.* give draws=301"),
        ({}, L2(30.0), "no number of draws is enough"),
        ({}, Linf(0.1), "threat='l2:0.3465', whose ball contains that of linf:0.1"),
        ({}, L1(0.3), "threat='l2:0.3', whose ball contains that of l1:0.3"),
    ],
)
def test_models_that_cannot_be_certified_are_refused_with_a_remedy(settings, threat, message):
    model, batch, _ = linear()
    with pytest.raises(UsageError, match=message):
        Smoothing(**{"sigma": SIGMA, **settings}).ready(model, batch, ThreatModel(threat))


def test_the_number_of_draws_that_a_refusal_names_is_enough():
    model, batch, _ = linear()
    assert proofs(model, batch.take(torch.tensor([59])), 1.0, draws=301).work.item() <= 301


def test_a_target_class_is_refused():
    model, batch, _ = linear()
    with pytest.raises(UsageError, match="leave goal= out"):
        Smoothing(SIGMA).ready(model, batch, ThreatModel(L2(0.4), goal=1))


def test_a_smoothed_classifier_predicts_abstains_and_certifies():
    model, batch, distance = linear()
    smoothed = Smoothed(model, SIGMA)
    x = torch.cat((batch.x, torch.zeros_like(batch.x[:1])))
    labels, radii = smoothed.certify(x, draws=2_000)
    assert labels[-1] == ABSTAINED and radii[-1] == 0
    assert (labels[:-1][distance > 0.2] == 1).all()
    assert (radii[:-1] <= distance).all()
    predicted = smoothed.predict(x)
    assert predicted[-1] == ABSTAINED
    assert (predicted[:-1][distance > 0.2] == 1).all()
    part = torch.tensor([40, 5])
    assert torch.equal(smoothed.certify(x[part], part, draws=2_000)[1], radii[part])
    with pytest.raises(UsageError, match="sigma is 0"):
        Smoothed(model, 0)
    with pytest.raises(UsageError, match="failure_probability is 1"):
        smoothed.predict(x, failure_probability=1)


def test_as_a_network_it_is_a_smooth_function_whose_gradient_is_that_of_the_mean():
    model, batch, _ = linear(n=5)
    smoothed = Smoothed(model, SIGMA, draws=4)
    x = batch.x.requires_grad_()
    logits = smoothed(x)
    assert torch.allclose(logits.exp().sum(1), torch.ones(5, dtype=torch.float64))
    noise = numbered_noise(smoothed.rng.at("network"), torch.zeros(4, dtype=torch.int64), torch.arange(4), x)
    mean = torch.stack([model(x + SIGMA * one).softmax(1) for one in noise]).mean(0)
    torch.testing.assert_close(logits, mean.log())
    (grad,) = torch.autograd.grad(logits[:, 1].sum(), x)
    (expected,) = torch.autograd.grad(mean.log()[:, 1].sum(), x)
    torch.testing.assert_close(grad, expected)
    assert torch.equal(smoothed(x[2:3]), logits[2:3])
