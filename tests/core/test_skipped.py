"""Skip gradients: the same outputs to the bit, and of each branch's gradient the share that was asked for."""

import pytest
import torch
from torch import nn

import holdfast
from holdfast.core.errors import UsageError
from holdfast.core.model import Classifier

X = torch.rand(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Block(nn.Module):
    """x plus a linear branch, added in place as many libraries do; `ends` hands its input on, as dropout may."""

    def __init__(self, seed):
        super().__init__()
        self.branch = nn.Linear(4, 4, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.branch.weight.copy_(torch.rand(4, 4, generator=torch.Generator().manual_seed(seed)))
        self.ends = nn.Identity()

    def forward(self, x):
        out = self.ends(self.branch(x))
        out += x
        return out


class Straight(Block):
    def forward(self, x):
        return x + self.ends(x)


def blocks():
    return nn.Sequential(Block(1), Block(2))


def slope(net):
    leaf = X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(net(leaf).sum(), leaf)
    return grad


@pytest.mark.parametrize("pattern", ["*.branch", "*.ends", "[01].branch"])
@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0])
def test_each_branch_keeps_its_share_of_the_gradient(pattern, decay):
    net = blocks()
    first, second = (torch.eye(4) + decay * block.branch.weight.detach() for block in net)
    torch.testing.assert_close(
        slope(holdfast.skipped(net, pattern, decay=decay)), (second @ first).sum(0).expand(5, 4)
    )


def test_a_branch_that_is_named_is_alone_in_it():
    net = blocks()
    first, second = (
        torch.eye(4) + 0.5 * net[0].branch.weight.detach(),
        torch.eye(4) + net[1].branch.weight.detach(),
    )
    torch.testing.assert_close(slope(holdfast.skipped(net, "0.branch")), (second @ first).sum(0).expand(5, 4))


def test_the_skip_connection_keeps_its_gradient_where_the_branch_hands_its_input_on():
    torch.testing.assert_close(
        slope(holdfast.skipped(Straight(1), "ends", decay=0.25)), torch.full_like(X, 1.25)
    )


def test_logits_and_weights_of_the_network_are_unchanged():
    net = blocks()
    plain = slope(net)
    preferring = holdfast.skipped(net, "*.branch", decay=0.2)
    assert torch.equal(preferring(X), net(X))
    assert not torch.equal(slope(preferring), plain)
    assert torch.equal(slope(net), plain)
    with torch.no_grad():
        assert torch.equal(preferring(X), net(X))


def test_a_pattern_for_nothing_shows_what_there_is():
    with pytest.raises(
        UsageError, match=r"'layer\*.bn2'; it has \*, \*.branch, \*.ends. Name the last module"
    ):
        holdfast.skipped(blocks(), "layer*.bn2")


@pytest.mark.parametrize(
    "net, decay, said",
    [
        (torch.sin, 0.5, "got a builtin_function_or_method"),
        (blocks(), 1.5, "decay is 1.5"),
        (blocks(), -1.0, "from 0 to 1"),
    ],
    ids=["no network", "more", "less"],
)
def test_what_is_no_network_and_what_is_no_share_is_refused(net, decay, said):
    with pytest.raises(UsageError, match=said):
        holdfast.skipped(net, "*", decay=decay)


def test_the_end_of_a_branch_is_a_tensor():
    net = nn.Sequential(nn.LSTM(4, 2, dtype=torch.float64))
    with pytest.raises(UsageError, match="module 0 returns a tuple"):
        Classifier(holdfast.skipped(net, "0"))(X)


def test_a_branch_that_the_network_never_calls_is_refused():
    net = blocks()
    net.aside = nn.ReLU()
    net.forward = lambda x: x + net[0].branch(x)
    assert holdfast.skipped(net, "*.branch")(X).shape == X.shape
    with pytest.raises(UsageError, match=r"does not call aside .an exported program"):
        Classifier(holdfast.skipped(net, "aside"))(X)


def test_an_exported_program_has_names_and_no_branches():
    program = torch.export.export(blocks(), (X,)).module()
    with pytest.raises(UsageError, match=r"does not call 0.branch, 1.branch"):
        Classifier(holdfast.skipped(program, "*.branch"))(X)
