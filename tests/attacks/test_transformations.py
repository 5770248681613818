"""Transformations of images against what they must be in closed form."""

import pytest
import torch

from holdfast.attacks.parts.images import flowed, reached, seen_through, transformed
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Bounds, Classifier
from holdfast.testing.fakes import examples, network
from holdfast.threats.transformations import Colour, Spatial

BOX = Bounds()
X = examples(0, n=3, shape=(3, 8, 8)).x


def amounts(**given):
    return {name: torch.full((len(X),), float(value), dtype=X.dtype) for name, value in given.items()}


def shown(**given):
    return transformed(X, amounts(**given), BOX)


@pytest.mark.parametrize("name", ["rotate", "shift_x", "scale", "perspective_x", "hue", "contrast", "blur"])
def test_nothing_changes_nothing(name):
    assert torch.equal(shown(**{name: 0}), X)


def test_a_quarter_turn_is_exact():
    torch.testing.assert_close(shown(rotate=90), torch.rot90(X, -1, (2, 3)))


def test_a_shift_by_whole_pixels_moves_them_and_brings_in_the_lower_side():
    moved = shown(shift_x=2, shift_y=-1)
    torch.testing.assert_close(moved[:, :, :-1, 2:], X[:, :, 1:, :-2])
    assert (moved[:, :, -1] == 0).all()
    assert (moved[:, :, :, :2] == 0).all()
    below = transformed(X, amounts(shift_x=2), Bounds(-1.0, 1.0))
    assert (below[:, :, :, :2] == -1).all()


def test_twice_as_large_shows_the_middle():
    large = shown(scale=1)
    assert large.shape == X.shape
    inner = torch.nn.functional.interpolate(X, scale_factor=2, mode="bilinear")[:, :, 4:12, 4:12]
    torch.testing.assert_close(large[:, :, 1:-1, 1:-1], inner[:, :, 1:-1, 1:-1])


def test_colours():
    grey = X.mean(1, keepdim=True).expand_as(X)
    for name in ("hue", "saturation"):
        torch.testing.assert_close(transformed(grey, amounts(**{name: 0.7}), BOX), grey, atol=1e-5, rtol=0)
    torch.testing.assert_close(shown(brightness=0.2), (X + 0.2).clamp(0, 1))
    pale = shown(saturation=-1)
    torch.testing.assert_close(pale[:, 0], pale[:, 2], atol=1e-5, rtol=0)
    flat = shown(contrast=-1)
    torch.testing.assert_close(flat, X.flatten(1).mean(1).view(-1, 1, 1, 1).expand_as(X))


def test_a_blur_keeps_the_mean_of_a_flat_image_and_each_example_has_its_own():
    flat = torch.full_like(X, 0.4)
    torch.testing.assert_close(transformed(flat, amounts(blur=2), BOX), flat)
    each = {"blur": torch.tensor([0.0, 1.0, 2.0], dtype=X.dtype)}
    spread = transformed(X, each, BOX).flatten(1).std(1) / X.flatten(1).std(1)
    assert spread[0] == 1
    assert spread[0] > spread[1] > spread[2]


@pytest.mark.parametrize("constraint", [Spatial(30, 2, 0.2), Colour(90, 0.5, 0.2, 0.5)])
def test_has_the_gradient_that_differences_show(constraint):
    place = 0.6 * Draws(0).uniform(torch.arange(3), len(constraint.axes), dtype=X.dtype) + 0.05
    place.requires_grad_()
    inner = 0.3 + 0.3 * X  # away from the sides of the box
    (grad,) = torch.autograd.grad(reached(inner, place, constraint, BOX).square().sum(), place)
    for axis in range(place.shape[1]):
        step = torch.zeros_like(place)
        step[:, axis] = 1e-6
        high, low = (reached(inner, place + sign * step, constraint, BOX) for sign in (1, -1))
        slope = (high.square() - low.square()).flatten(1).sum(1) / 2e-6
        torch.testing.assert_close(grad[:, axis], slope, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("constraint", [Spatial(30, 2, 0.2), Colour(90, 0.5, 0.2, 0.5)])
def test_has_a_gradient_where_nothing_changes_yet(constraint):
    place = torch.zeros(3, len(constraint.axes), dtype=X.dtype, requires_grad=True)
    image = reached(X, place, constraint, BOX)
    assert torch.equal(image, X)
    (grad,) = torch.autograd.grad(image.square().sum(), place)
    assert (grad != 0).all()


def test_a_flow_takes_each_pixel_from_where_it_points_and_no_farther_than_the_side():
    flow = torch.zeros(3, 2, 8, 8, dtype=X.dtype)
    assert torch.equal(flowed(X, flow, BOX), X)
    flow[:, 0, :, 2], flow[:, 1, :, 3], flow[:, 0, :, 7] = 2, -1, 3
    bent = flowed(X, flow, BOX)
    torch.testing.assert_close(bent[..., 2], X[..., 4])
    torch.testing.assert_close(bent[:, :, 1:, 3], X[:, :, :-1, 3])
    torch.testing.assert_close(bent[:, :, 0, 3], X[:, :, 0, 3])
    torch.testing.assert_close(bent[..., 7], X[..., 7])
    assert torch.equal(bent[..., 4:7], X[..., 4:7])


def test_a_flow_has_a_gradient_where_nothing_moves_yet():
    flow = torch.zeros(3, 2, 8, 8, dtype=X.dtype, requires_grad=True)
    (grad,) = torch.autograd.grad(flowed(X, flow, BOX).square().sum(), flow)
    assert (grad != 0).flatten(1).any(1).all()


def test_is_refused_where_there_is_no_image_or_no_colour():
    with pytest.raises(UsageError, match="needs images"):
        Spatial(rotate=3).refuse_unfit(torch.zeros(2, 5))
    with pytest.raises(UsageError, match="three channels"):
        Colour(hue=3).refuse_unfit(torch.zeros(2, 1, 5, 5))


def test_no_threat_bends_and_moves_at_once():
    with pytest.raises(UsageError, match="as in spatial:flow=1.5"):
        Spatial(shift=1, flow=1.5)
    with pytest.raises(UsageError, match="at most 0.9"):
        Spatial(scale=1.0)


def test_a_model_seen_through_changes_draws_anew_each_time_and_stays_differentiable():
    model = network(shape=(3, 8, 8))
    behind = seen_through(model, {"rotate": 20.0, "shift": 1.0, "blur": 1.0, "noise": 0.1, "brightness": 0.2})
    assert isinstance(behind, Classifier)
    x = X.clone().requires_grad_()
    first, again = behind(x), behind(x)
    assert (first != again).any(1).all()
    (grad,) = torch.autograd.grad(first.sum(), x)
    assert grad.isfinite().all()
    assert (grad != 0).any()
