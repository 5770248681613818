"""OARS on models that reject queries similar to earlier ones."""

import pytest
import torch

from holdfast.core.batch import Batch
from holdfast.core.constraints import L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Bounds
from holdfast.core.outputs import REFUSED
from holdfast.core.threat import ThreatModel
from holdfast.guard.detectors.evasion import OARS

SHAPE, N = (1, 8, 8), 4


class Rejecting:
    """A linear model of two classes that rejects a query within `radius` (L2) of an earlier one of the same example."""

    def __init__(self, radius=0.0):
        self.weight = torch.linspace(-1, 1, 64)
        self.bounds, self.radius, self.earlier, self.n_rejected = Bounds(), radius, {}, 0

    def clean(self, x):
        score = (x.flatten(1) - 0.5) @ self.weight + 0.4
        return torch.stack((score, -score), 1)

    def __call__(self, x, ids=None):
        logits = self.clean(x)
        for row, (example, query) in enumerate(zip(ids.tolist(), x.flatten(1), strict=True)):
            earlier = self.earlier.setdefault(example, [])
            if any((query - each).norm() < self.radius for each in earlier):
                logits[row], self.n_rejected = REFUSED, self.n_rejected + 1
            earlier.append(query)
        return logits


def batch(target=None):
    x = 0.5 + 0.02 * torch.randn(N, *SHAPE, generator=torch.Generator().manual_seed(0))
    return Batch(x, torch.zeros(N, dtype=torch.int64), torch.arange(N), target)


CASES = [("square", Linf(0.03), 0.15), ("nes", Linf(0.1), 0.15), ("hop_skip_jump", L2(0.5), 0.02)]


@pytest.mark.parametrize(("base", "constraint", "radius"), CASES)
@pytest.mark.parametrize("rejecting", [False, True])
def test_rejections_are_evaded(base, constraint, radius, rejecting):
    model, data = Rejecting(radius * rejecting), batch()
    x_adv = OARS(base=base, queries=500)(model, data, ThreatModel(constraint), rng=Draws(0))
    assert (constraint.distance(x_adv, data.x) <= constraint.eps * (1 + 1e-5)).all()
    assert (model.clean(x_adv).argmax(1) == 1).float().mean() >= 0.75
    assert bool(model.n_rejected) == rejecting
    assert all(len(queries) <= 500 for queries in model.earlier.values())


@pytest.mark.parametrize(("base", "constraint", "radius"), CASES)
def test_a_model_that_rejects_everything_ends_the_attack(base, constraint, radius):
    model, data = Rejecting(1e9), batch()
    x_adv = OARS(base=base, queries=2000, attempts=20)(model, data, ThreatModel(constraint), rng=Draws(0))
    assert torch.equal(x_adv, data.x) and all(len(queries) < 200 for queries in model.earlier.values())


def test_the_result_is_independent_of_the_batch():
    whole, part = batch(), batch().take(torch.tensor([2]))
    attack, threat = OARS(queries=100), ThreatModel(Linf(0.08))
    together, alone = (attack(Rejecting(0.3), data, threat, rng=Draws(3)) for data in (whole, part))
    assert torch.equal(together[2:3], alone)
