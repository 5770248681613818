"""The passes of `fast` and its doubts on few images, which decide how long a small assessment takes."""

import pytest
import torch

import holdfast
from holdfast.io.models.models import open_model

N = 60
PASSES = {"mnist-cnn-hardened": (35_707, 16_434), "mnist-cnn": (34_368, 13_223)}
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


class Misleading(torch.nn.Module):
    """Returns, by the first value of the input, the scores of a robust part with small margins, or of a fragile part
    with large margins and reversed gradients. No gradient is zero.
    """

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(10, 63, generator=torch.Generator().manual_seed(0)) / 8)

    def forward(self, x):
        x = x.flatten(1)
        fragile, rest = torch.sigmoid(50 * (x[:, :1] - 0.5)), x[:, 1:]
        smooth = 0.05 * rest + 0.95 * (3 * rest**2 - 2 * rest**3)
        small = 0.1 * (smooth - 0.5) @ self.weight.T
        near = (rest.detach() - 0.5).abs().amax(1, keepdim=True) < 0.2
        reversed_ = rest.detach() + torch.where(near, -0.05, 1.0) * (rest - rest.detach())
        large = 25 * (reversed_ - 0.5) @ self.weight.T
        return fragile * large + (1 - fragile) * small


def inputs_of_both_parts(net):
    """60 inputs of the robust part and 40 of the fragile one, none of them near a boundary between two classes."""
    g, n = torch.Generator().manual_seed(1), 3000
    signs = net.weight.detach()[torch.randint(10, (n,), generator=g)] > 0
    x = (signs ^ (torch.rand(n, 63, generator=g) < 0.25)).float()
    fragile = torch.arange(n) % 2 == 1
    x[fragile] = 0.42 + 0.16 * x[fragile]
    x = torch.cat([fragile[:, None].float(), x], 1)
    with torch.no_grad():
        logits = net(x)
    margin = logits.topk(2, 1).values.diff(dim=1).abs()[:, 0]
    kept = [
        (part & (margin > margin[part].quantile(share))).nonzero()[:many, 0]
        for part, share, many in ((~fragile, 0.2, 60), (fragile, 0.8, 40))
    ]
    rows = torch.cat(kept)[torch.randperm(100, generator=g)]
    return x[rows].view(-1, 1, 8, 8), logits.argmax(1)[rows]


@pytest.mark.slow
def test_margins_that_mislead_settle_no_doubt():
    """The last waves of the suite have only the robust inputs, so that a random sample must find the fragile ones."""
    net = Misleading()
    result = holdfast.assess(net, inputs_of_both_parts(net), "linf:0.1", bounds=(0, 1))
    assert {"black-box", "noise", "not-exhausted"} <= {
        doubt.name for doubt in result.doubts if doubt.state == "raised"
    }
    assert result["robust_accuracy"].value == pytest.approx(0.6, abs=0.05)
