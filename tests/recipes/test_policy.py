"""Learned attack strategies: the attacks, the learning of a policy, and what their recipe stores and reports."""

from dataclasses import replace

import pytest
import torch

from holdfast.attacks.parts.ascent import ascend
from holdfast.attacks.parts.losses import cross_entropy
from holdfast.core.batch import Batch
from holdfast.core.constraints import L1, L2, Linf, allowed
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.training import STATE, without_prefix
from holdfast.recipes import LeagueTraining, PGDTraining, PolicyTraining
from holdfast.recipes.policy import ending_after
from holdfast.recipes.training.attack_policies import (
    ALTERNATIVES,
    EVERY,
    STEPS,
    Played,
    Policy,
    attacked,
    distance,
    features_of,
    in_words,
    steps_of,
)
from holdfast.recipes.training.fit import Saving, Training
from holdfast.recipes.training.recipe import Finished
from holdfast.testing import fakes
from holdfast.testing.recipes import SHORT, same

EPS = 0.05


def problem(n=26):
    return fakes.network(1).requires_grad_(), fakes.labelled(fakes.network(), fakes.examples(n=n))


def trained(recipe, after=None, threat=None, n=26):
    model, data = problem(n)
    return list(recipe(model, data, threat or ThreatModel(Linf(EPS)), rng=Draws(0), after=after))


def every_strategy():
    sizes = [len(alternatives) for _, alternatives in ALTERNATIVES]
    return torch.cartesian_prod(*(torch.arange(size) for size in sizes))


class Counting(Classifier):
    n = 0

    def forward(self, x, ids=None):
        self.n += len(x)
        return super().forward(x, ids)


@pytest.mark.parametrize("constraint", [Linf(EPS), L2(0.3)])
@pytest.mark.parametrize("whole", [False, True])
def test_every_strategy_stays_inside_the_ball_and_makes_as_many_passes_as_it_has_steps(constraint, whole):
    choices = every_strategy()
    model, batch = (
        Counting(fakes.network().net),
        fakes.labelled(fakes.network(1), fakes.examples(n=len(choices))),
    )
    with torch.no_grad():
        clean = model(batch.x)
    model.n = 0
    x_adv = attacked(model, batch, constraint, choices, clean, Draws(0), whole=whole)
    assert allowed(constraint, x_adv, batch.x, model.bounds).all()
    assert model.n == (len(choices) * max(STEPS) if whole else int(steps_of(choices).sum()))
    assert ((x_adv - batch.x).flatten(1).norm(dim=1) > 0).all()
    other = attacked(model, batch, constraint, choices, clean, Draws(0), whole=not whole)
    torch.testing.assert_close(x_adv, other, rtol=0, atol=1e-12)


def test_an_example_is_attacked_as_by_ordinary_gradient_ascent_with_its_strategy():
    model, batch = fakes.network(), fakes.labelled(fakes.network(1), fakes.examples(n=12))
    choices = torch.tensor([[0, 3, 0, 1]]).repeat(12, 1)  # cross-entropy, 7 steps of eps/4, from anywhere
    choices[::2] = torch.tensor([0, 1, 1, 1])  # 2 steps of eps/2
    x_adv = attacked(model, batch, Linf(EPS), choices, model(batch.x).detach(), Draws(0))
    start = Linf(EPS).sample(batch, model.bounds, Draws(0).at("start"))
    for rows, steps, size in ((slice(1, None, 2), 7, 0.25), (slice(0, None, 2), 2, 0.5)):
        expected, _ = ascend(
            model, batch, start, cross_entropy, Linf(EPS), steps=steps, step_size=size * EPS, keep="last"
        )
        torch.testing.assert_close(x_adv[rows], expected[rows], rtol=0, atol=1e-12)


def test_a_new_policy_chooses_all_strategies_equally_often():
    features = features_of(
        torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(4000).long(), 0.5
    )
    policy = Policy.new(Draws(0), features.device)
    for logs in policy.logs(features):
        torch.testing.assert_close(logs.exp(), torch.full_like(logs, 1 / logs.shape[1]))
    drawn = policy._drawn(features, torch.arange(4000), Draws(1))
    for part, (_, alternatives) in zip(drawn.T, ALTERNATIVES, strict=True):
        shares = part.bincount() / 4000
        torch.testing.assert_close(shares, torch.full_like(shares, 1 / len(alternatives)), atol=0.03, rtol=0)


def played(policy, features, seed):
    n = len(features)
    batch = Batch(features, torch.zeros(n).long(), torch.arange(n))
    return Played(batch, features, policy._drawn(features, batch.ids, Draws(seed)), torch.ones(n))


def test_a_policy_learns_to_choose_what_is_rewarded_for_each_kind_of_example():
    """Half of the examples are rewarded for the first loss, and the others for the second one."""
    features = torch.zeros(256, 5)
    features[:128, 0], features[128:, 0] = 1.0, -1.0
    policy = Policy.new(Draws(0), features.device)
    for update in range(150):
        one = played(policy, features, update)
        wanted = (features[:, 0] < 0).long()
        policy.learn(one, (one.choices[:, 0] == wanted).float(), 0.0)
    probabilities = policy.logs(features)[0].exp()
    assert probabilities[:128, 0].mean() > 0.9 and probabilities[128:, 1].mean() > 0.9
    assert (
        float(policy.numbers[0]) > 0.8 and int(policy.numbers[1]) == 150
    )  # the baseline follows the rewards


def test_the_baseline_is_a_moving_mean_and_the_entropy_bonus_makes_a_policy_uniform_again():
    features = torch.zeros(64, 5)
    policy = Policy.new(Draws(0), features.device)
    policy.parameters[-2:] = torch.tensor([2.0, -2.0])
    before = distance(policy, Policy.new(Draws(0), features.device), features)
    for update, reward in enumerate((1.0, 2.0)):
        policy.learn(played(policy, features, update), torch.full((64,), reward), 0.0)
    assert float(policy.numbers[0]) == pytest.approx(0.9 * 1.0 + 0.1 * 2.0)
    for update in range(100):
        policy.learn(played(policy, features, update), torch.full((64,), 2.0), 1.0)
    assert distance(policy, Policy.new(Draws(0), features.device), features) < before / 5


def test_the_gain_of_an_attack_is_the_removed_probability_minus_the_price_of_its_steps():
    batch = Batch(torch.zeros(2, 1), torch.tensor([0, 1]), torch.arange(2))
    one = Played(
        batch, torch.zeros(2, 5), torch.tensor([[0, 0, 0, 0], [0, 4, 0, 0]]), torch.tensor([0.9, 0.8])
    )
    gain = one.gain(torch.zeros(2, 2), 0.01)  # probabilities of 1/2
    torch.testing.assert_close(gain, torch.tensor([0.4 - 0.01, 0.3 - 0.1]))
    assert one.forwards == 2 + 1 + 10


@pytest.mark.parametrize("threat", [ThreatModel(Linf(EPS)), ThreatModel(L2(0.3))])
def test_the_fixed_strategy_is_pgd(threat):
    one = trained(PolicyTraining(strategy="fixed", steps=3, training=SHORT), threat=threat)[-1]
    other = trained(PGDTraining(steps=3, training=SHORT), threat=threat)[-1]
    assert all(torch.equal(one.tensors[name], value) for name, value in other.tensors.items())


@pytest.mark.parametrize("strategy", ["learned", "random", "fixed"])
def test_a_training_ends_after_its_passes_and_counts_them_as_the_engine_does(strategy):
    recipe = PolicyTraining(strategy=strategy, passes=30.0, training=replace(SHORT, batch=4))
    found = trained(recipe)
    made = float(found[-1].tensors[f"{STATE}passes"]) / 26
    assert made == pytest.approx(sum(point.measured["forwards"] for point in found))
    assert made == pytest.approx(30.0, abs=2 * 4 * 15 / 26)  # of two updates
    assert found[-1].share == pytest.approx(1.0)
    resumed = trained(recipe, after=found[0])
    assert same(resumed[-1], found[-1]) and resumed[-1].plans == found[-1].plans


def test_the_first_plan_of_passes_makes_at_least_one_update():
    made = torch.tensor(0.0)
    plan = ending_after(5.0, made, 8.0)
    first = plan(0, 0, 10, None)
    assert (first.end, first.review) == (1, 1)
    made += 100
    assert plan(1, 1, 10, first).end == 1


@pytest.mark.parametrize("recipe", [PolicyTraining(), LeagueTraining(past=1)], ids=["policy", "league"])
def test_a_training_resumes_within_an_epoch_with_its_policies(recipe):
    kept = []
    how = replace(SHORT, batch=2, epochs=2)
    recipe = replace(recipe, training=replace(how, saving=Saving(5, kept.append)))
    whole = trained(recipe)[-1]
    assert {checkpoint.step for checkpoint in kept} >= {5, 10}
    name = next(name for name in whole.tensors if name.endswith("parameters"))
    start = [within.tensors[name] for within in kept]
    assert not torch.equal(start[0], start[-1])  # the policy learned meanwhile
    for within in (kept[0], kept[-1]):
        assert same(trained(recipe, after=within)[-1], whole)


def test_only_the_learned_policy_changes():
    learned, random = (
        trained(PolicyTraining(strategy=strategy, training=replace(SHORT, batch=2)))[-1].tensors
        for strategy in ("learned", "random")
    )
    n_updates = 3 * 13
    assert 0 < learned[f"{STATE}policy.numbers"][1] < 2 * n_updates / EVERY
    assert random[f"{STATE}policy.numbers"][1] == 0
    assert random[f"{STATE}policy.counts"].sum() == learned[f"{STATE}policy.counts"].sum() == 4 * 3 * 26


@pytest.mark.parametrize("recipe", [PolicyTraining(), LeagueTraining()], ids=["policy", "league"])
def test_threats_without_a_ball_of_linf_or_l2_are_refused(recipe):
    with pytest.raises(UsageError, match="trains for the threats linf and l2, and the threat is l1"):
        trained(recipe, threat=ThreatModel(L1(1.0)))


def test_passes_and_a_budget_are_refused_together():
    recipe = PolicyTraining(passes=5.0, training=replace(SHORT, pacing=lambda *where: None))
    with pytest.raises(UsageError, match="passes is 5, and a budget of time is given; expected one of both"):
        trained(recipe)


@pytest.mark.parametrize("strategy", ["learned", "random", "fixed"])
def test_the_follow_up_states_the_strategies_and_the_passes(strategy):
    recipe = PolicyTraining(strategy=strategy, training=Training(epochs=4, batch=4))
    last = trained(recipe)[-1]
    model, data = problem()
    state = without_prefix(last.tensors, STATE)
    finished = Finished(model, model, None, data, data, ThreatModel(Linf(EPS)), Draws(0), state)
    entry, sentence = recipe.follow_up(finished)
    assert entry["passes"] == pytest.approx(float(state["passes"]) / 26)
    assert f"{entry['passes']:.1f} forward passes for each training example" in sentence
    if strategy == "fixed":
        assert "shares" not in entry
        return
    assert all(
        sum(shares[k] for shares in each.values()) == pytest.approx(1)
        for each in entry["shares"].values()
        for k in range(4)
    )
    assert in_words(Policy.of(state, "policy.")) in sentence
