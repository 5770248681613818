"""The check of shapes at run time, which `conftest.py` applies to whatever a test runs."""

import pytest
import torch

from holdfast.core.types import Inputs, Labels, Logits, PerExample
from holdfast.testing.shapes import checked, unchecked, watching


@checked
def picked(logits: Logits, y: Labels) -> PerExample:
    return logits.gather(1, y[:, None])[:, 0]


@checked
def flattened(x: Inputs) -> PerExample:
    return x.flatten()


def test_right_shapes_pass():
    assert picked(torch.rand(3, 4), torch.zeros(3).long()).shape == (3,)
    assert flattened(torch.rand(5)).shape == (5,)


@pytest.mark.parametrize(
    "logits, y",
    [
        (torch.rand(3, 4), torch.zeros(2).long()),
        (torch.rand(3, 4), torch.zeros(3)),
        (torch.rand(3, 4, 1), torch.zeros(3).long()),
        (torch.zeros(3, 4).long(), torch.zeros(3).long()),
    ],
)
def test_wrong_sizes_and_kinds_are_named(logits, y):
    with pytest.raises(TypeError, match="picked: (logits|y) is torch"):
        picked(logits, y)


def test_a_wrong_result_is_named():
    with pytest.raises(TypeError, match="flattened: return is"):
        flattened(torch.rand(2, 2))


def test_checks_are_suspended_until_the_end_of_the_block():
    with unchecked():
        flattened(torch.rand(2, 2))
    with pytest.raises(TypeError, match="flattened: return is"):
        flattened(torch.rand(2, 2))


def test_watching_ends():
    from holdfast.attacks.parts import losses

    before = losses.margin_loss
    with watching("holdfast.attacks.parts"):
        assert losses.margin_loss is not before
    assert losses.margin_loss is before
