"""Alignment: another order of the units is the same network, and one that was shuffled is found again."""

import pytest
import torch
from torch import nn

from benchmarks.alignment import aligned, all_aligned, hidden, permuted
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError
from holdfast.core.model import Classifier
from holdfast.rotation import Members, put, weights_of
from rotation.problem import examples, network


@pytest.mark.parametrize("norm", [False, True])
def test_an_order_changes_no_output_and_is_found_again(norm):
    model, data = network(norm=norm), examples()
    layers = hidden(model)
    assert [layer.units for layer in layers] == [6, 8, 12]
    orders = [torch.randperm(layer.units, generator=torch.Generator().manual_seed(1)) for layer in layers]
    known = weights_of(model)
    shuffled = permuted(known, layers, orders)
    assert not torch.equal(shuffled["0.weight"], known["0.weight"])
    whole, other = put(model, known, data), put(model, shuffled, data)
    torch.testing.assert_close(other(data.x), whole(data.x), atol=1e-5, rtol=0)
    back = aligned(shuffled, known, layers, rng=Draws(0))
    for name, value in known.items():
        assert torch.equal(back[name], value), name


def test_aligning_strangers_brings_them_nearer_and_changes_no_output():
    one, other = network(1), network(2)
    members = Members.of([weights_of(one), weights_of(other)], [0, 1])
    found = all_aligned(members, one, examples(), rng=Draws(0))

    def apart(sets):
        return sum((value[0] - value[1]).square().sum() for value in sets.tensors.values())

    assert apart(found) < apart(members)
    data = examples()
    torch.testing.assert_close(put(one, found.one(1))(data.x), other(data.x), atol=1e-5, rtol=0)


def test_what_is_no_sequence_is_refused():
    with pytest.raises(TargetError, match=r"1 is Softmax, but alignment supports only sequences"):
        hidden(Classifier(nn.Sequential(nn.Linear(4, 4), nn.Softmax(1), nn.Linear(4, 2))))
    with pytest.raises(TargetError, match=r"the network is Residual, but alignment supports"):
        hidden(Classifier(Residual(nn.Linear(4, 4), nn.Linear(4, 4))))
    twice = nn.Linear(4, 4)
    with pytest.raises(
        TargetError, match=r"net\.2 is a layer that occurs twice|2 is a layer that occurs twice"
    ):
        hidden(Classifier(nn.Sequential(twice, nn.ReLU(), twice)))


class Residual(nn.Sequential):
    """A sequence by its class and none by what it does."""

    def forward(self, x):
        for layer in self:
            x = x + layer(x)
        return x


def test_outputs_that_change_are_refused():
    def tokens(seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            rows = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))
            return Classifier(nn.Sequential(nn.Flatten(1, 2), rows), classes=4)

    one, other = tokens(1), tokens(2)
    members = Members.of([weights_of(one), weights_of(other)], [0, 1])
    with pytest.raises(
        TargetError, match="aligning set 2 changes its outputs by up to .* but no change was expected"
    ):
        all_aligned(members, one, examples(), rng=Draws(0))
