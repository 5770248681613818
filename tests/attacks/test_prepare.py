"""Quicker copies compute the same, or are not made."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from holdfast.attacks.parts import fast_networks
from holdfast.attacks.parts.fast_networks import agrees, quickened
from holdfast.core.model import Classifier

FOLDED = "batch norm is folded into the layer before it"
LAST = "convolutions run channels last"
STEM = "convolutions of few channels give their input gradient as a matrix product"


def seeded(*layers, seed=0):
    """The layers with random weights and random statistics, in eval mode."""
    g = torch.Generator().manual_seed(seed)
    net = nn.Sequential(*layers)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=g) + 0.1)
    return net.eval()


def images(n=4, channels=3):
    return torch.rand(n, channels, 8, 8, generator=torch.Generator().manual_seed(1))


def norms(model):
    return [m for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]


def strided():
    """Convolutions with strides, so that the channels stay where they are."""
    return [
        nn.Conv2d(3, 4, 3, 2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 6),
        nn.BatchNorm1d(6),
    ]


def test_folding_computes_the_same_and_leaves_the_model_alone():
    model = Classifier(seeded(*strided()), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3)).requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = images()
    quick, did = quickened(model, x)
    assert did == (FOLDED, STEM)
    assert norms(quick) == [] and len(norms(model)) == 2
    for inputs in (x, images(7) * 3 - 1):
        torch.testing.assert_close(quick(inputs), model(inputs), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(w.requires_grad for w in model.parameters())
    assert not any(w.requires_grad for w in quick.parameters())


def test_folding_is_exact_in_float64():
    model = Classifier(seeded(*strided()).double())
    x = images().double()
    quick, did = quickened(model, x)
    assert did == (FOLDED, STEM)
    assert (quick(x) - model(x)).abs().max() <= 1e-12 * model(x).abs().max()


def test_gradients_of_the_copy_are_those_of_the_model():
    model = Classifier(seeded(*strided()).double())
    x = images().double()
    found = []
    for m in (model, quickened(model, x)[0]):
        leaf = x.clone().requires_grad_()
        found += torch.autograd.grad(m(leaf)[:, 0].sum(), leaf)
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


class Columns(nn.Module):
    """Convolutions along the height, over inputs of a width."""

    def __init__(self, width):
        super().__init__()
        self.width = width
        self.layers = seeded(nn.Conv2d(1, 8, (5, 1), (2, 1), (1, 0)), nn.ReLU(), nn.Conv2d(8, 4, (3, 1)))

    def forward(self, x):
        return self.layers(x.flatten(1).unflatten(1, (1, -1, self.width))).flatten(1)


def test_convolutions_of_columns_run_along_the_width_only_where_maps_have_width_one():
    x = images(channels=1).double()
    for width in (1, 2):
        model = Classifier(Columns(width).double())
        quick, did = quickened(model, x)
        assert ("convolutions of maps of width 1 run along the width" in did) == (width == 1)
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        results = [m(leaf) for m, leaf in zip((model, quick), leaves, strict=True)]
        slopes = [
            torch.autograd.grad(r[:, 0].sum(), leaf)[0] for r, leaf in zip(results, leaves, strict=True)
        ]
        for pair in (results, slopes):
            torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-9)


class UsedTwice(nn.Module):
    """What the convolution returns goes to the norm and past it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, 2), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        return (self.norm(y) + y).flatten(1)


class SharedNorm(nn.Module):
    """One norm behind two layers."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.norm = nn.Conv2d(3, 3, 3, 2), nn.Conv2d(3, 3, 1, 2), nn.BatchNorm2d(3)

    def forward(self, x):
        return torch.cat((self.norm(self.one(x)).flatten(1), self.norm(self.two(x)).flatten(1)), 1)


class Functional(nn.Module):
    """Something happens between the layer and the norm that no module shows."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, 2), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.conv(x).relu()).flatten(1)


@pytest.mark.parametrize("net", [UsedTwice, SharedNorm, Functional])
def test_where_folding_would_change_the_logits_it_is_left_out(net):
    model = Classifier(seeded(net()))
    x = images()
    quick, did = quickened(model, x)
    assert FOLDED not in did
    assert len(norms(quick)) == 1
    torch.testing.assert_close(quick(x), model(x))


def test_a_norm_without_statistics_is_kept():
    net = seeded(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten())
    x = images()
    quick, _ = quickened(Classifier(net), x)
    torch.testing.assert_close(quick(x), Classifier(net)(x))


def test_channels_last_computes_the_same():
    net = seeded(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, padding=1),
        nn.Flatten(),
        nn.Linear(256, 5),
    )
    model, x = Classifier(net), images()
    quick, did = quickened(model, x)
    assert did == (LAST, STEM)
    assert quick.net[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert model.net[0].weight.is_contiguous()
    torch.testing.assert_close(quick(x), model(x), rtol=1e-4, atol=1e-4)


def test_strided_convolutions_stay_as_they_are():
    assert quickened(Classifier(seeded(nn.Conv2d(3, 4, 3, 2), nn.Flatten())), images())[1] == (STEM,)


class Uncopied(nn.Module):
    def __deepcopy__(self, memo):
        raise TypeError("it holds a lock")

    def forward(self, x):
        return x.flatten(1)


def test_a_model_that_cannot_be_copied_is_attacked_as_it_is():
    model = Classifier(Uncopied())
    quick, did = quickened(model, images())
    assert quick is model
    assert did == ("the model cannot be copied, so it is attacked as it is",)


def test_a_function_is_attacked_as_it_is():
    model = Classifier(lambda x: x.flatten(1))
    assert quickened(model, images()) == (model, ())


def test_agreement_is_relative_to_the_largest_logit_and_handles_nan():
    one = torch.tensor([[100.0, 0.0, torch.nan]])
    assert agrees(one, torch.tensor([[100.0, 0.009, torch.nan]]))
    assert not agrees(one, torch.tensor([[100.0, 0.011, torch.nan]]))
    assert not agrees(one, torch.tensor([[100.0, 0.0, 0.0]]))


class ReadsItsNorm(nn.Module):
    """The forward asks the norm itself, which is gone once it is folded."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, 2), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.conv(x)).flatten(1) + 0 * self.norm.weight.sum()


def parametrised(change):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.Flatten())
    change(net[0])
    return net.eval()


@pytest.mark.parametrize(
    "net",
    [
        ReadsItsNorm().eval(),
        parametrised(nn.utils.parametrizations.weight_norm),
        parametrised(nn.utils.parametrizations.spectral_norm),
        parametrised(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)),
    ],
    ids=["reads its norm", "weight norm", "spectral norm", "pruned"],
)
def test_what_a_network_does_not_survive_is_left_out(net):
    model = Classifier(net).requires_grad_(False)
    x = images()
    quick, did = quickened(model, x)
    assert FOLDED not in did
    torch.testing.assert_close(quick(x), model(x))


class LyingGradient(nn.Conv2d):
    """As a convolution, but its gradient is another one's."""

    def forward(self, x):
        return super().forward(x.detach()) + super().forward(2 * x) - super().forward(2 * x.detach())


def test_a_step_that_changes_the_gradient_is_left_out(monkeypatch):
    def lie(model, x):
        copied = Classifier(nn.Sequential(LyingGradient(3, 4, 3, 2), nn.Flatten()))
        copied.load_state_dict(model.state_dict())
        return copied

    monkeypatch.setattr(fast_networks, "_STEPS", (("a lie", lie),))
    model = Classifier(nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.Flatten())).requires_grad_(False)
    assert quickened(model, images())[1] == ()
