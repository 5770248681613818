"""Losses against their closed forms."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from holdfast.attacks.parts.losses import (
    cross_entropy,
    dlr,
    likeliest,
    margin,
    margin_loss,
    probability_margin,
)
from holdfast.core.batch import Batch


def drawn(seed, classes=5, n=8):
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, classes, generator=g, dtype=torch.float64)
    y = torch.randint(classes, (n,), generator=g)
    target = (y + torch.randint(1, classes, (n,), generator=g)) % classes
    return logits, Batch(torch.zeros(n, 1), y, torch.arange(n)), target


SEEDS = st.integers(0, 2**31)


@given(seed=SEEDS)
def test_untargeted_losses_example_by_example(seed):
    logits, batch, _ = drawn(seed)
    for k, (z, y) in enumerate(zip(logits.tolist(), batch.y.tolist(), strict=True)):
        rest = max(v for c, v in enumerate(z) if c != y)
        ordered = sorted(z)
        one, single = logits[k : k + 1], batch.take(torch.tensor([k]))
        assert margin(one, single).item() == pytest.approx(z[y] - rest)
        assert margin_loss(one, single).item() == pytest.approx(rest - z[y])
        assert dlr(one, single).item() == pytest.approx((rest - z[y]) / (ordered[-1] - ordered[-3]), rel=1e-9)
        p = one.softmax(1)[0]
        assert cross_entropy(one, single).item() == pytest.approx(-p[y].log().item())
        others = max(v for c, v in enumerate(p.tolist()) if c != y)
        assert probability_margin(one, single).item() == pytest.approx(others - p[y].item())


@given(seed=SEEDS)
def test_targeted_losses_example_by_example(seed):
    logits, batch, target = drawn(seed)
    aimed = batch.towards(target)
    for k, (z, y, t) in enumerate(zip(logits.tolist(), batch.y.tolist(), target.tolist(), strict=True)):
        rest = max(v for c, v in enumerate(z) if c != t)
        ordered = sorted(z)
        one, single = logits[k : k + 1], aimed.take(torch.tensor([k]))
        assert margin(one, single).item() == pytest.approx(rest - z[t])
        scale = ordered[-1] - (ordered[-3] + ordered[-4]) / 2
        assert dlr(one, single).item() == pytest.approx((z[t] - z[y]) / scale, rel=1e-9)
        assert cross_entropy(one, single).item() == pytest.approx(one.log_softmax(1)[0, t].item())


@given(seed=SEEDS, scale=st.floats(1e-3, 1e3), shift=st.floats(-10, 10))
def test_dlr_does_not_know_the_scale_or_the_offset_of_the_logits(seed, scale, shift):
    logits, batch, target = drawn(seed)
    for goal in (batch, batch.towards(target)):
        torch.testing.assert_close(dlr(scale * logits + shift, goal), dlr(logits, goal), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "classes, aimed, ratio", [(2, False, False), (3, False, True), (3, True, False), (4, True, True)]
)
def test_with_too_few_classes_dlr_is_the_margin(classes, aimed, ratio):
    logits, batch, target = drawn(0, classes)
    goal = batch.towards(target) if aimed else batch
    assert torch.equal(dlr(logits, goal), margin_loss(logits, goal)) != ratio
    assert dlr(logits, goal).isfinite().all()


@given(seed=SEEDS)
def test_every_loss_rises_where_the_attack_gains(seed):
    """A step along its gradient with respect to the logits lowers the margin or leaves it."""
    logits, batch, target = drawn(seed)
    for goal in (batch, batch.towards(target)):
        for loss in (cross_entropy, margin_loss, probability_margin):
            z = logits.clone().requires_grad_()
            (grad,) = torch.autograd.grad(loss(z, goal).sum(), z)
            step = 1e-6 * grad / grad.norm(dim=1, keepdim=True).clamp_min(1e-300)
            assert (margin(logits + step, goal) <= margin(logits, goal) + 1e-12).all(), loss.__name__


def test_constant_logits_give_numbers():
    batch = Batch(torch.zeros(2, 1), torch.tensor([0, 3]), torch.arange(2), torch.tensor([1, 2]))
    for goal in (batch, batch.towards(None)):
        for loss in (cross_entropy, dlr, margin_loss, probability_margin):
            assert loss(torch.ones(2, 5), goal).isfinite().all(), loss.__name__


def test_the_likeliest_wrong_classes_by_hand():
    logits, y = torch.tensor([[1.0, 4.0, 3.0, 2.0], [9.0, 0.0, 5.0, 5.0]]), torch.tensor([1, 0])
    assert likeliest(logits, y, 2).tolist() == [[2, 3], [2, 3]]
    assert likeliest(logits, y, 9).tolist() == [[2, 3, 0], [2, 3, 1]]


def test_cross_entropy_is_that_of_the_label():
    logits, batch, _ = drawn(1)
    torch.testing.assert_close(
        cross_entropy(logits, batch), F.cross_entropy(logits, batch.y, reduction="none")
    )
