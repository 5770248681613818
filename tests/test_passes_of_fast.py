"""The passes of `fast` and its doubts on few images, which decide how long a small assessment takes."""

import pytest
import torch

import holdfast
from holdfast.io.models.models import open_model

N = 60
PASSES = {"mnist-cnn-hardened": (27_568, 14_991), "mnist-cnn": (29_972, 12_566)}
"""forward and backward passes of the whole run by network, recorded when the suite was last changed"""


@pytest.mark.slow
@pytest.mark.parametrize("network", PASSES)
def test_fast_takes_at_most_a_tenth_more_passes_than_recorded(network):
    result = holdfast.assess(network, "mnist-mini", "linf:0.1", n=N)
    forwards, backwards = PASSES[network]
    spent = result.evidence.cost
    assert 0.9 * forwards <= spent.forwards <= 1.1 * forwards
    assert 0.9 * backwards <= spent.backwards <= 1.1 * backwards
    assert not [doubt.name for doubt in result.doubts if doubt.state == "raised"]


class Rounded(torch.nn.Module):
    """Rounds its inputs, so that no gradient reaches them."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net((8 * x).round() / 8)


@pytest.mark.slow
def test_fast_raises_the_doubts_about_a_network_without_gradients_on_few_images():
    net = Rounded(open_model("mnist-cnn").model.net)
    result = holdfast.assess(net, "mnist-mini", "linf:0.1", n=N, bounds=(0, 1))
    raised = {doubt.name for doubt in result.doubts if doubt.state == "raised"}
    assert {"zero-gradient", "black-box", "whole-box"} <= raised
