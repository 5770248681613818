"""Attacks are as strong on inputs, gradients and logits of any scale, and never leave the threat model by rounding."""

import pytest
import torch
from torch import nn

from cases import ATTACKS, brief
from holdfast.attacks import APGD, FAB, FMN, PGD, CarliniWagner, DeepFool, Square
from holdfast.core.batch import Batch
from holdfast.core.constraints import L0, L1, L2, Linf
from holdfast.core.model import Bounds, Classifier
from holdfast.core.threat import ThreatModel
from holdfast.runs.harness.measure import measure

PER_FEATURE = Bounds(torch.tensor([0.0, -5.0, 0.0, 100.0] * 4), torch.tensor([1.0, 5.0, 1000.0, 101.0] * 4))


def drawn(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


class Last(nn.Module):
    """A linear network of five classes, and what is done to its logits."""

    def __init__(self, features, after=lambda logits: logits):
        super().__init__()
        self.after = after
        self.register_buffer("weight", drawn(features, 5, seed=1) - 0.5)

    def forward(self, x):
        return self.after(x.flatten(1) @ self.weight)


def case_name(case):
    return f"{type(case.attack).__name__}-{type(case.norm(1.0)).__name__}"


@pytest.mark.parametrize("case", ATTACKS, ids=case_name)
@pytest.mark.parametrize("box", ["bytes", "per feature"])
def test_rounding_of_large_inputs_is_not_taken_for_a_breach(case, box):
    if box == "bytes":
        bounds, x = Bounds(0.0, 255.0), (drawn(12, 1, 4, 4) * 256).floor()
    else:
        low, high = PER_FEATURE.like(torch.zeros(1))
        bounds, x = PER_FEATURE, low + drawn(12, 16) * (high - low)
    model, attack = Classifier(Last(16), bounds=bounds), brief(case).attack
    batch = Batch(x, model(x).argmax(1), torch.arange(12))
    for eps in (0.3, 10.1):
        norm = case.norm(max(1.0, round(eps))) if case.norm is L0 else case.norm(eps)
        threat = ThreatModel(norm, access=attack.needs, surrogates=(model,))
        evidence = measure(model, [batch], [attack], threat)
        asked = evidence["queries"] > 0  # an attack that asks nothing succeeds unseen
        assert torch.equal(evidence["first_success"] > 0, evidence["success"] & asked)


@pytest.mark.parametrize("attack", [APGD(steps=10), Square(queries=40)], ids=lambda a: type(a).__name__)
def test_a_large_picture_is_measured_as_exactly_as_a_small_one(attack):
    model = Classifier(nn.Sequential(nn.AdaptiveAvgPool2d(4), Last(48)))
    x = drawn(2, 3, 224, 224)
    for seed in range(3):
        batch = Batch(x, model(x).argmax(1), torch.arange(2))
        measure(model, [batch], [attack], ThreatModel(L2(0.25)), seed=seed)


@pytest.mark.parametrize(
    "attack, norm",
    [
        (PGD(steps=10), L2(0.1)),
        (PGD(steps=10), L1(0.4)),
        (FMN(steps=40), L2(0.1)),
        (FMN(steps=40), Linf(0.03)),
        (FAB(steps=10), L2(0.1)),
        (DeepFool(), L2(0.1)),
        (CarliniWagner(searches=6, steps=40), L2(0.1)),
        (CarliniWagner(searches=6, steps=40), Linf(0.03)),
    ],
    ids=lambda value: str(value).partition("(")[0],
)
def test_the_scale_of_the_logits_does_not_hide_them(attack, norm):
    x = drawn(60, 16)
    y = Last(16)(x).argmax(1)

    def broken(after):
        model = Classifier(Last(16, after))
        return int(
            measure(model, [Batch(x, y, torch.arange(60))], [attack], ThreatModel(norm))["success"].sum()
        )

    plain = broken(lambda logits: logits)
    assert 5 <= plain <= 55
    for scale in (1e-14, 1e18):
        assert abs(broken(lambda logits, scale=scale: logits * scale) - plain) <= 1


@pytest.mark.parametrize("mask", [-torch.inf, -1e9])
@pytest.mark.parametrize("case", [c for c in ATTACKS if c.smallest], ids=case_name)
def test_a_class_that_is_masked_out_does_not_hide_the_others(case, mask):
    x = drawn(20, 16)
    y = Last(16)(x).argmax(1)
    masked = Classifier(Last(16, lambda logits: torch.cat((logits, torch.full_like(logits[:, :2], mask)), 1)))
    batch = Batch(x, y, torch.arange(20))
    evidence = measure(masked, [batch], [case.attack], ThreatModel(case.norm(100.0)))
    assert evidence["success"].double().mean() >= 0.9
