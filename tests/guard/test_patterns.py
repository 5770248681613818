"""Attacks with coarse patterns: the fit finds the signs of a linear model, and rejected patterns are changed."""

import pytest
import torch

from holdfast.core.batch import Batch
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Bounds
from holdfast.core.outputs import REFUSED
from holdfast.core.threat import ThreatModel
from holdfast.guard.detectors.evasion import CoarsePatterns
from holdfast.guard.detectors.outputs import Mahalanobis, Observation

EPS, N = 0.1, 3


class Linear:
    """A model of two classes that is linear in the content of an image, and rejects what `rejects` returns."""

    def __init__(self, rejects=lambda x: torch.zeros(len(x), dtype=torch.bool)):
        self.bounds, self.rejects, self.queries = Bounds(), rejects, []
        self.weight = torch.zeros(1, 28, 28)
        self.weight[:, 12:16, 8:20] = torch.tensor([1.0, -1.0, 1.0]).repeat_interleave(4)
        self.lead = 0.9 * EPS * float(self.weight.abs().sum())

    def __call__(self, x, ids=None):
        self.queries.extend(x)
        score = ((x - image()) * self.weight).flatten(1).sum(1) + self.lead
        return torch.stack((score, -score), 1).masked_fill(self.rejects(x)[:, None], REFUSED)


def image():
    x = torch.zeros(1, 1, 28, 28)
    x[..., 12:16, 8:20] = 0.5
    return x


def attacked(model, **settings):
    batch = Batch(image().repeat(N, 1, 1, 1), torch.zeros(N, dtype=torch.int64), torch.arange(N))
    x_adv = CoarsePatterns(**settings)(model, batch, ThreatModel(Linf(EPS)), rng=Draws(0))
    assert ((x_adv - batch.x).abs() <= EPS * (1 + 1e-5)).all()
    return (x_adv != batch.x).flatten(1).any(1)


@pytest.mark.parametrize("search", ["fit", "population"])
def test_the_signs_that_lower_the_margin_are_found(search):
    model = Linear()
    assert attacked(model, search=search, queries=400).all()
    assert len(model.queries) < 100 * N


@pytest.mark.parametrize("search", ["fit", "population"])
def test_only_the_adaptive_attack_leaves_the_background_as_it_is(search):
    def rejects(x):
        return x[:, 0, :8].flatten(1).any(1)

    assert not attacked(Linear(rejects), search=search, attempts=50).any()
    assert attacked(Linear(rejects), search=search, adaptive=True, queries=400).all()


@pytest.mark.parametrize("search", ["fit", "population"])
def test_a_model_that_rejects_everything_ends_the_attack(search):
    model = Linear(lambda x: torch.ones(len(x), dtype=torch.bool))
    assert not attacked(model, search=search, adaptive=True, attempts=30).any()
    assert len(model.queries) < 45 * N


def test_coarse_patterns_are_far_from_benign_images_with_a_constant_background():
    generator = torch.Generator().manual_seed(0)
    benign = torch.zeros(600, 1, 28, 28)
    benign[..., 7:21, 7:21] = torch.rand(600, 1, 14, 14, generator=generator)
    y = torch.arange(600) % 2

    def seen(x):
        return Observation(x, torch.zeros(len(x), 2))

    detector = Mahalanobis(on="inputs", shrinkage=0.001).fit(seen(benign[:300]), y[:300])
    model = Linear()
    attacked(model, queries=30)
    changes = torch.stack(model.queries) - image()
    patterns = benign[300 : 300 + len(changes)] + changes
    threshold = detector(seen(benign[300:])).max()
    assert (detector(seen(patterns.clamp(0, 1))) > threshold).all()
    assert detector.needs == ("fit",)
