"""What masks a gradient is found and named; what honest networks are made of is left alone."""

import pytest
import torch
from torch import nn

import holdfast
from holdfast.attacks.parts.feature_search import masking
from holdfast.io.models.architectures import ARCHITECTURES
from hooks import hooks_of


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def head():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 4))


X = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "stage, name",
    [
        (torch.Tensor.detach, "0"),
        (lambda x: (x > 0.5).to(x.dtype), "0"),
        (lambda x: x + 0.005 * torch.sin(4000 * x), "0"),
    ],
    ids=["cut", "switches", "ripples"],
)
def test_a_stage_without_a_correct_gradient_is_found(stage, name):
    found = masking(nn.Sequential(Function(stage), head()), X)
    assert [way.name for way in found.replacements] == [name]
    assert not found.steps
    assert found.descriptions == ("0 (Function) by the identity",)


def test_roundings_are_found_in_the_middle_of_a_forward():
    class Rounding(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = head()

        def forward(self, x):
            return self.inner((8 * x).round() / 8)

    found = masking(Rounding(), X)
    assert found.steps
    assert not found.replacements
    assert found.descriptions == ("every rounding by the identity",)


def test_a_saturated_softmax_is_found():
    class Times(nn.Module):
        def forward(self, x):
            return 1e4 * x

    assert [way.name for way in masking(nn.Sequential(head(), Times(), nn.Softmax(1)), X).replacements] == [
        "2"
    ]


def test_what_is_declared_is_taken_and_not_looked_into():
    declared = holdfast.through(Function(torch.Tensor.detach), torch.tanh)
    found = masking(nn.Sequential(declared, head()), X)
    assert [(way.name, way.stand_in) for way in found.replacements] == [("0", torch.tanh)]
    assert found.descriptions == ("0 (Function) by the stand-in that it declares",)


@pytest.mark.parametrize(
    "net",
    [
        head(),
        nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.5), head(), nn.Softmax(1)).eval(),
        nn.Sequential(
            nn.Conv2d(1, 4, 3, 1, 1), nn.GELU(), nn.MaxPool2d(3, 1, 1), nn.Flatten(), nn.Linear(256, 4)
        ),
        nn.Sequential(Function(lambda x: x + 0.1 * torch.randn_like(x)), head()),
        ARCHITECTURES["resnet"](channels=1, classes=4, width=4).eval(),
    ],
    ids=["plain", "norm", "pooled", "noisy", "residual"],
)
def test_networks_without_masking_have_no_stage_to_replace(net):
    assert not masking(net, X)


def test_the_search_for_masking_changes_nothing():
    net = nn.Sequential(Function(torch.Tensor.detach), head())
    before = torch.random.get_rng_state()
    masking(net, X)
    assert (torch.random.get_rng_state() == before).all()
    assert not hooks_of(net)
