"""The league: two networks and two policies, their past versions, the choice among the networks, and the cross-play."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from holdfast.attacks.parts.ascent import descend
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.training import AVERAGE, STATE, WEIGHTS, without_prefix
from holdfast.recipes import LeagueTraining
from holdfast.recipes.league import SIDES, Members, _published, _unpublished, cross_play, most_robust
from holdfast.recipes.training.attack_policies import Policy
from holdfast.recipes.training.recipe import Finished
from holdfast.testing import fakes
from holdfast.testing.recipes import SHORT, same

THREAT = ThreatModel(Linf(0.05))
RECIPE = LeagueTraining(past=2, training=replace(SHORT, batch=2, epochs=3))


def data(n=26):
    return fakes.labelled(fakes.network(), fakes.examples(n=n))


def trained(recipe=RECIPE):
    return list(recipe(fakes.network(1).requires_grad_(), data(), THREAT, rng=Draws(0)))


@pytest.fixture(scope="module")
def last():
    return trained()[-1]


def test_a_checkpoint_has_the_names_of_one_network_and_all_networks_are_restored_from_it(last):
    names = set(fakes.network(1).state_dict())
    assert set(without_prefix(last.tensors, WEIGHTS)) == set(without_prefix(last.tensors, AVERAGE)) == names
    everything = _unpublished(last)
    assert len(without_prefix(everything.tensors, WEIGHTS)) == (SIDES + 2) * len(names)
    for best in range(SIDES):
        assert same(_unpublished(_published(everything, best)), everything)


def test_the_networks_and_the_policies_differ_and_past_versions_are_kept(last):
    weights = without_prefix(_unpublished(last).tensors, f"{WEIGHTS}net.members.")
    name = next(iter(fakes.network(1).net.state_dict()))
    members = [weights[f"{k}.{name}"] for k in range(SIDES + 2)]
    assert len({tuple(member.flatten().tolist()) for member in members}) == len(members)
    state = without_prefix(last.tensors, STATE)
    assert not torch.equal(state["attacker.0.parameters"], state["attacker.1.parameters"])
    assert state["past"].shape == (2, SIDES, len(state["attacker.0.parameters"]))
    assert not torch.equal(state["past"][0], state["past"][1]) and int(state["taken"]) > 2


def test_past_networks_are_not_trained():
    members = Members(nn.Linear(2, 2), SIDES + 1)
    assert [member.weight.requires_grad for member in members.members] == [True, True, False]
    with torch.no_grad():
        members.members[1].weight.fill_(3.0)
    members.store(1, SIDES)
    members.used = SIDES
    assert torch.equal(members(torch.eye(2)), members.members[1](torch.eye(2)))


def flat_network(slope):
    """Two classes by the mean of the inputs, with labels as in `examples_of`."""

    class Mean(nn.Module):
        def forward(self, x):
            z = slope * (x.flatten(1)[:, 0] - 0.5)
            return torch.stack((-z, z), 1)

    return Classifier(Mean()).eval()


def test_the_network_that_is_more_robust_on_held_out_examples_is_chosen():
    batch = data(40)
    batch = replace(batch, y=(batch.x.flatten(1)[:, 0] > 0.5).long())
    attackers = [Policy.new(Draws(k), batch.x.device) for k in range(SIDES)]
    right, wrong = flat_network(4.0), flat_network(-4.0)
    assert most_robust([right, wrong], attackers, batch, THREAT, Draws(0)) == 0
    assert most_robust([wrong, right], attackers, batch, THREAT, Draws(0)) == 1


def test_the_cross_play_and_the_choices_are_reported(last):
    state = without_prefix(last.tensors, STATE)
    new = fakes.network(1)
    last.put_into(new)
    finished = Finished(fakes.network(1), new, None, data(), data(60), THREAT, Draws(0), state)
    entry, sentence = RECIPE.follow_up(finished)
    assert entry["columns"] == ["policy 1", "policy 2", "past policies", "PGD-20"]
    assert list(entry["cross_play"]) == [
        "returned network",
        "other network",
        "past network 1",
        "past network 2",
    ]
    assert all(
        len(row) == 4 and all(0 <= share <= 1 for share in row) for row in entry["cross_play"].values()
    )
    start = THREAT.constraint.sample(finished.test, new.bounds, finished.rng.at("pgd"))
    _, margins = descend(new, finished.test, start, THREAT.constraint, steps=20, reach=2.5)
    assert entry["cross_play"]["returned network"][3] == pytest.approx(float((margins > 0).double().mean()))
    assert f"cross-play on {entry['n']} test examples" in sentence and "choices at last, policy 1" in sentence
    (table,) = entry["tables"]
    assert table["columns"] == ["network", *entry["columns"]] and len(table["rows"]) == 4


@pytest.mark.parametrize("shifted", [False, True])
def test_policies_that_converge_to_one_strategy_are_reported(shifted):
    one, other = (Policy.new(Draws(k), torch.device("cpu")) for k in range(SIDES))
    if shifted:
        other.parameters[-2:] = torch.tensor([2.0, -2.0])
    for policy in (one, other):
        policy.counts.add_(1)
    rows = {"returned network": [0.5, 0.25, None, 0.0]}
    entry, sentence = cross_play(rows, [one, other], fakes.network(1), data())
    assert entry["converged"] is not shifted
    assert ("converged to one strategy" in sentence) is not shifted
    assert "returned network 50.0 %, 25.0 %, –, 0.0 %" in sentence
