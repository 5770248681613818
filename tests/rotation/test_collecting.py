"""Collections: where sets come from, what they share, and what is refused."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Classifier
from holdfast.rotation import Basins, LowRank, Members, Seeds, Subset, collect, put, weights_of
from holdfast.rotation.collecting import (
    apart,
    l1,
    nearest_sets,
    trained_from_fresh_weights,
    with_fresh_weights,
)
from rotation.problem import accuracy, examples, network, task

SOURCES = [
    (Seeds(3), 1),
    (Basins(seeds=2, sets=3, every=2), 3),
    (Subset(("5.",), sets=2, updates=8), 1),
    (LowRank(rank=2, sets=2, updates=30), 1),
]


@pytest.mark.slow
def test_every_source_gives_sets_that_work_and_the_same_for_the_same_seed():
    held = examples(1)
    for source, each in SOURCES:
        job, before = task(), network()
        members = collect(source, job, rng=Draws(0))
        again = collect(source, job, rng=Draws(0))
        assert all(torch.equal(members.tensors[name], again.tensors[name]) for name in members.tensors)
        assert members.basins.tolist() == [run for run in range(source.runs) for _ in range(each)]
        assert (l1(members, members) + torch.eye(len(members)) > 1e-6).all()
        for value, known in zip(job.model.parameters(), before.parameters(), strict=True):
            assert torch.equal(value, known)  # the given model stays as it is
        if not isinstance(source, (Subset, LowRank)):  # whose model was never trained
            found = [accuracy(put(job.model, members.one(k)), held) for k in range(len(members))]
            assert min(found) > 0.9, source


@pytest.mark.slow
def test_sets_of_one_run_are_neighbours_and_those_of_two_are_strangers():
    members = collect(Basins(seeds=3, sets=3, every=2), task(), rng=Draws(0))
    assert members.basins.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    distances = l1(members, members)
    same = members.basins[:, None] == members.basins
    assert 3 * distances[same].max() < distances[~same].min()
    between = l1(members.bases(), members.bases())
    assert apart(members) == pytest.approx((between.sum() / 6).item())
    far, whose = nearest_sets(members, members.bases())
    assert whose.tolist() == members.basins.tolist()
    assert far.max() < distances[~same].min()


def test_an_average_of_the_tail_resumes():
    short = collect(Basins(seeds=1, sets=2, every=2), task(epochs=1), rng=Draws(0))
    long = collect(Basins(seeds=1, sets=4, every=2), task(epochs=1), rng=Draws(0))
    for name, value in short.tensors.items():
        torch.testing.assert_close(long.tensors[name][:2], value)


def test_an_average_of_the_tail_has_the_given_number_of_updates_on_little_data():
    job = task()
    small = replace(job, data=examples(n=100))  # three batches of 32
    counted = []

    class Counted(type(job.tail)):
        def loss(self, learner, batch, x_adv):
            counted.append(len(batch))
            return super().loss(learner, batch, x_adv)

    few = replace(small, tail=Counted(training=job.tail.training))
    for source, sets, updates in (
        (Basins(seeds=1, sets=2, every=7), 2, 14),
        (Subset(("7.",), sets=9, updates=10), 1, 10),  # of a run
    ):
        counted.clear()
        assert len(list(source(job.model, few, rng=Draws(0)))) == sets
        assert counted == [32] * updates


def test_a_part_leaves_the_rest_as_it_was():
    job = task()
    members = collect(Subset(("5.", "7."), sets=2, updates=4), job, rng=Draws(0))
    assert list(members.tensors) == ["5.weight", "5.bias", "7.weight", "7.bias"]
    new = put(job.model, members.one(1))
    assert torch.equal(new.net[0].weight, job.model.net[0].weight)
    assert torch.equal(new.net[5].weight, members.tensors["5.weight"][1])
    with pytest.raises(
        UsageError, match=r"no parameter's name begins with 'head\.'; the model has 0\.weight"
    ):
        collect(Subset(("head.",)), job, rng=Draws(0))


def test_a_kick_has_its_rank_and_its_size():
    job = task()
    kicked = next(LowRank(rank=2, kick=0.5, sets=1, updates=1, lr=1e-9)(job.model, job, rng=Draws(0)))
    added = kicked.net[5].weight - job.model.net[5].weight
    assert torch.linalg.matrix_rank(added, atol=1e-4) == 2
    assert (added.norm() / job.model.net[5].weight.norm()).item() == pytest.approx(0.5, rel=1e-3)


def test_batch_norm_is_read_by_its_parameters():
    job = task(norm=True)
    model = trained_from_fresh_weights(job, Draws(0))
    strange = put(job.model, weights_of(model), job.data)
    assert accuracy(strange, examples(1)) > 0.9
    first = strange.net[0](job.data.x[:500])
    torch.testing.assert_close(strange.net[1].running_mean, first.mean((0, 2, 3)), atol=1e-5, rtol=0)
    assert strange.net[1].momentum == 0.1
    assert not strange.training
    with pytest.raises(UsageError, match="the model has batch norm, .* give training inputs"):
        put(job.model, weights_of(model))


def test_weights_begin_anew_by_the_rules_of_the_layers():
    model = network()
    one, other = with_fresh_weights(model, Draws(1), "own"), with_fresh_weights(model, Draws(2), "own")
    assert torch.equal(with_fresh_weights(model, Draws(1), "own").net[0].weight, one.net[0].weight)
    assert not torch.equal(other.net[0].weight, one.net[0].weight)

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 64))

        def forward(self, x):
            return x.flatten(1) @ self.weight.T

    with pytest.raises(
        TargetError, match="net is Own, whose weights cannot be initialised again; .* reset_parameters"
    ):
        with_fresh_weights(Classifier(Own()), Draws(1), "own")


def test_a_layer_with_constants_alone_needs_no_new_weights():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 4)
            self.register_buffer("mean", torch.full((64,), 0.5))

        def forward(self, x):
            return self.layer(x.flatten(1) - self.mean)

    new = with_fresh_weights(Classifier(Shifted()), Draws(1), "own").net
    assert torch.equal(new.mean, torch.full((64,), 0.5)) and new.layer.weight.any()


def test_weights_begin_as_large_as_he_has_them():
    model = network()
    large, own = with_fresh_weights(model, Draws(1), "he").net, with_fresh_weights(model, Draws(1), "own").net
    for layer, gain in ((5, 2), (7, 1)):  # the last layer has half the variance
        wanted = (gain / large[layer].in_features) ** 0.5
        assert large[layer].weight.std().item() == pytest.approx(wanted, rel=0.25)
        assert own[layer].weight.std() < 0.75 * large[layer].weight.std()
    assert torch.equal(large[5].bias, own[5].bias), "everything else is drawn by each layer's own rule"


def test_what_does_not_belong_together_is_refused():
    one = weights_of(network())
    with pytest.raises(UsageError, match="there are no parameter sets"):
        Members.of([], [])
    with pytest.raises(TargetError, match=r"parameter set 2 lacks '7\.bias', so it has another architecture"):
        Members.of([one, {name: value for name, value in one.items() if name != "7.bias"}], [0, 1])
    with pytest.raises(TargetError, match=r"has 7\.bias of shape \(3,\) .*, but \(4,\)"):
        Members.of([one, {**one, "7.bias": one["7.bias"][:3]}], [0, 1])
    with pytest.raises(TargetError, match=r"NaN or infinite values in 7\.bias: its training diverged"):
        Members.of([one, {**one, "7.bias": one["7.bias"] * torch.nan}], [0, 1])
    with pytest.raises(
        UsageError, match=r"the set contains 1\.running_mean, which is a buffer; .* rotation\.loaded"
    ):
        put(network(norm=True), network(norm=True).net.state_dict(), examples())
    with pytest.raises(TargetError, match=r"the parameter set has '9\.weight'"):
        put(network(), {"9.weight": torch.zeros(1)})


def test_sets_are_taken_and_joined():
    members = collect(Seeds(3), task(epochs=1), rng=Draws(0))
    some = members.take(torch.tensor([2, 0]))
    assert some.basins.tolist() == [2, 0]
    both = members.joined(replace(some, basins=some.basins + 3))
    assert len(both) == 5
    assert torch.equal(both.one(3)["7.bias"], members.one(2)["7.bias"])
    assert len(members.joined(some.take(torch.tensor([], dtype=torch.long)))) == 3
    other = replace(some, tensors={**some.tensors, "7.bias": some.tensors["7.bias"][:, :3]})
    with pytest.raises(TargetError, match=r"other parameter sets has 7\.bias of shape \(3,\) .*, but \(4,\)"):
        members.joined(other)
    assert members.parameters == sum(value.numel() for value in weights_of(network()).values())
