"""The quick input gradient of a convolution with few channels is the gradient, whatever the geometry."""

import pytest
import torch
from torch import nn

from holdfast.attacks.parts.fast_networks import StemConv2d, quicken_stems, quickened
from holdfast.core.model import Classifier

GEOMETRIES = [
    {"kernel_size": 4, "stride": 2, "padding": 1},
    {"kernel_size": (3, 5), "stride": (1, 2), "padding": (0, 2)},
    {"kernel_size": 3, "stride": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 2, "stride": 3, "bias": False},  # some pixels are in no window
]


def drawn(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(channels, **geometry):
    """A frozen convolution and its quick twin, in float64."""
    plain = nn.Conv2d(channels, 5, **geometry).double().requires_grad_(False)
    quick = nn.Conv2d(channels, 5, **geometry).double().requires_grad_(False)
    quick.load_state_dict(plain.state_dict())
    assert quicken_stems(quick)
    assert type(quick) is StemConv2d
    return plain, quick


def slope(layer, x):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(layer(leaf).square().sum(), leaf)[0]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_its_gradient_is_that_of_the_convolution(geometry, channels, layout):
    plain, quick = pair(channels, **geometry)
    x = drawn(7, channels, 11, 12).contiguous(memory_format=layout)
    assert torch.equal(quick(x), plain(x))
    torch.testing.assert_close(slope(quick, x), slope(plain, x), rtol=1e-12, atol=1e-12)


def test_pieces_give_the_gradient_of_the_whole(set_limit):
    plain, quick = pair(3, **GEOMETRIES[0])
    set_limit(
        "holdfast.attacks.parts.fast_networks._COLUMNS", 3 * 16 * 3 * 30
    )  # three examples at a time, then one
    x = drawn(7, 3, 12, 11)
    torch.testing.assert_close(slope(quick, x), slope(plain, x), rtol=1e-12, atol=1e-12)


def test_it_can_be_differentiated_twice():
    _, quick = pair(1, **GEOMETRIES[0])
    x = drawn(2, 1, 6, 6).requires_grad_()
    assert torch.autograd.gradcheck(quick, x)
    assert torch.autograd.gradgradcheck(quick, x)


def test_functional_transforms_pass_through_it():
    plain, quick = pair(2, **GEOMETRIES[0])
    x = drawn(3, 2, 6, 6)
    found, true = (
        torch.func.vmap(torch.func.grad(lambda one, f=f: f(one[None]).sum()))(x) for f in (quick, plain)
    )
    torch.testing.assert_close(found, true)


def test_an_image_without_a_batch_goes_through_the_plain_one():
    plain, quick = pair(1, **GEOMETRIES[0])
    assert torch.equal(quick(drawn(1, 6, 6)), plain(drawn(1, 6, 6)))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(5, 4, 3),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(3, 4, 3, padding="same"),
    ],
)
def test_other_convolutions_are_left_as_they_are(layer):
    assert not quicken_stems(layer.requires_grad_(False))
    assert type(layer) is nn.Conv2d


def test_a_layer_that_learns_is_left_as_it_is():
    assert not quicken_stems(nn.Conv2d(3, 4, 3))


def test_the_copy_for_attacks_has_it_and_the_model_does_not():
    model = Classifier(nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.Flatten()))
    quick, did = quickened(model, drawn(2, 3, 8, 8).float())
    assert type(quick.net[0]) is StemConv2d
    assert type(model.net[0]) is nn.Conv2d
    assert did == ("convolutions of few channels give their input gradient as a matrix product",)


def test_a_weight_that_depends_on_the_input_has_its_part_in_the_gradient():
    plain, quick = pair(1, **GEOMETRIES[0])
    x = drawn(3, 1, 6, 6)

    def by(layer):
        def forward(leaf):
            weight = layer.weight * leaf.mean()
            return torch.func.functional_call(layer, {"weight": weight}, (leaf,))

        return forward

    torch.testing.assert_close(slope(by(quick), x), slope(by(plain), x))


def test_a_weight_that_a_forward_sets_learning_gets_its_gradient():
    _, quick = pair(1, **GEOMETRIES[0])
    quick.requires_grad_(True)
    (grad,) = torch.autograd.grad(quick(drawn(2, 1, 6, 6).requires_grad_()).sum(), quick.weight)
    assert grad.abs().sum() > 0
