"""League: two networks are trained against two learned attack policies and against past versions of these, and the
policies against both networks and against past versions of these. The better network is returned.

The population with past versions is that of Vinyals et al., "Grandmaster level in StarCraft II using multi-agent
reinforcement learning", Nature 575, 2019. Differs from the paper: two agents on each side, no exploiters, and opponents
are drawn with equal probability, half of them from the past. The policies are those of the recipe `policy` (Jia et al.,
"LAS-AT: Adversarial Training with Learnable Attack Strategy", CVPR 2022, arXiv:2203.06616).
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from holdfast.attacks.parts.ascent import descend
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.meter import margin, results_in_pieces
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.training import AVERAGE, STATE, WEIGHTS, Checkpoint, without_prefix
from holdfast.core.types import Inputs, Mask, NonNegative, Steps
from holdfast.recipes.training import attack_policies as policies
from holdfast.recipes.training.attack_policies import Played, Policy
from holdfast.recipes.training.fit import Training, Update
from holdfast.recipes.training.learner import Learner, Loop, hits
from holdfast.recipes.training.recipe import Finished, LossRecipe

SIDES = 2
"""number of policies, and of networks in training"""
_VERSIONS = 10  # versions that are stored in a training
_HELD_OUT, _SHARE = (
    500,
    10,
)  # examples that choose the network: at most so many, and a tenth of the training examples
_MEMBERS, _ALL, _BEST = "net.members.", "all.", "best"
_POLICY, _PAST, _TAKEN = "attacker.{}.", "past", "taken"
_PGD_STEPS = 20  # as in the evaluation of a checkpoint
_REPORTED = 300  # test examples in the matrix on the card
_CONVERGED = 0.1  # distance of two policies up to which they count as one strategy


@dataclass(frozen=True)
class LeagueTraining(LossRecipe):
    """Trains two networks against two learned attack policies, in which each side also meets past versions of the
    other one, and returns the network that is more robust on held-out examples.
    """

    past: Steps = 3
    """number of past versions of the networks and of the policies that are kept; the oldest one is replaced"""
    price: NonNegative = 0.01
    """price of one gradient step of an attack, in probability of the label"""
    entropy: NonNegative = 0.01
    """weight of the entropy of the strategies, which is added to the mean reward"""
    training: Training = field(default_factory=Training)

    keeps_state: ClassVar[bool] = True

    in_one_process: ClassVar[bool] = True
    weights_classes: ClassVar[bool] = True

    def prepared(self, loop: Loop) -> Loop:
        """Return the training of the population, whose more robust network is the new model."""
        policies.refuse_other_norms("league", loop.threat)
        data, model, how = loop.data, loop.model, self.training
        n = min(_HELD_OUT, len(data) // _SHARE)
        order = loop.rng.at("held out").bits(data.ids).argsort()
        held_out, rest = data.take(order[: n or len(data)]), data.subset(order[n:].sort().values)
        attackers = [Policy.new(loop.rng.at("attacker", k), data.ids.device) for k in range(SIDES)]
        state = {
            _PAST: torch.stack([attacker.parameters for attacker in attackers]).repeat(self.past, 1, 1),
            _TAKEN: torch.zeros((), dtype=torch.int64, device=data.ids.device),
        }
        for k, attacker in enumerate(attackers):
            state |= attacker.state(_POLICY.format(k))
        if how.saving is not None:
            save = how.saving.save
            how = replace(how, saving=replace(how.saving, save=lambda within: save(_published(within, 0))))
        population = deepcopy(model)
        assert isinstance(model.net, nn.Module)  # other models are not trained
        population.net = Members(model.net, SIDES + self.past)
        play = _Play(self, attackers, state)

        def chosen(checkpoint: Checkpoint) -> Checkpoint:
            networks = _networks(model, checkpoint.tensors, range(SIDES))
            own = loop.rng.at("cross-play", checkpoint.epoch)
            return _published(checkpoint, most_robust(networks, attackers, held_out, loop.threat, own))

        return replace(
            loop,
            model=population,
            data=rest,
            how=how,
            after=None if loop.after is None else _unpublished(loop.after),
            inner=play.inner,
            loss=play.loss,
            state=state,
            settle=lambda learner: partial(play.settle, learner),
            published=chosen,
        )

    def follow_up(self, finished: Finished) -> tuple[dict[str, Any], str]:
        """Return the robust accuracy of each network against each policy, also of past ones, and how different the
        policies are.
        """
        state, test = finished.state, finished.test.first(_REPORTED)
        best, taken = int(state[_BEST]), min(int(state[_TAKEN]), self.past)
        attackers = [Policy.of(state, _POLICY.format(k)) for k in range(SIDES)]
        earlier = [
            replace(attackers[k], parameters=version[k])
            for version in state[_PAST][:taken]
            for k in range(SIDES)
        ]
        rest = (SIDES - 1 - best, *range(SIDES, SIDES + taken))
        others = _networks(finished.given, without_prefix(state, _ALL), rest)
        names = ("returned network", "other network", *(f"past network {k + 1}" for k in range(taken)))
        rows = {}
        for name, model in zip(names, (finished.new, *others), strict=True):
            groups = ([attackers[0]], [attackers[1]], earlier, [None])
            rows[name] = [_accuracy(model, group, test, finished.threat, finished.rng) for group in groups]
        return cross_play(rows, attackers, finished.new, test)


class Members(nn.Module):
    """Network that contains `n` copies of a network, and computes its outputs with the copy whose index is in `used`.

    The first two copies are trained. The others store earlier states of them, and their parameters are frozen.
    """

    def __init__(self, net: nn.Module, n: int) -> None:
        super().__init__()
        self.members = nn.ModuleList(deepcopy(net) for _ in range(n))
        for past in self.members[SIDES:]:
            past.requires_grad_(False)
        self.used = 0

    def forward(self, *inputs: Tensor, **named: Tensor) -> object:
        """Return the outputs of the network in use."""
        return self.members[self.used](*inputs, **named)

    @torch.no_grad()
    def store(self, source: int, place: int) -> None:
        """Copy the parameters and buffers of the network with the index `source` into that with the index `place`."""
        values = self.members[source].state_dict()
        for name, value in self.members[place].state_dict().items():
            value.copy_(values[name])


class _Play:
    """Attacks in a league, and what the policies learn from them."""

    def __init__(self, recipe: LeagueTraining, attackers: list[Policy], state: Mapping[str, Tensor]) -> None:
        self._recipe, self._attackers = recipe, attackers
        self._past, self._taken = state[_PAST], state[_TAKEN]
        self._whole = recipe.training.attack_statistics == "batch"
        self._plays: list[tuple[Policy | None, Played]] = []
        self._logits: list[Tensor] = []
        self._update: Update | None = None

    def inner(self, learner: Learner, batch: Batch, update: Update) -> Inputs:
        """Return the inputs of a batch after an attack on each network in training, one after the other."""
        self._store(learner, update)
        self._plays, self._update, attacked = [], update, []
        for k in range(SIDES):
            rng = update.rng.at("network", k)
            current, policy = self._opponent(rng)
            x_adv, played = policy.play(
                _using(learner.frozen, k), batch, learner.threat.constraint, rng,
                done=update.done, whole=self._whole, count=current is not None,
            )  # fmt: skip
            self._plays.append((current, played))
            attacked.append(x_adv)
        return torch.cat(attacked)

    def loss(self, learner: Learner, batch: Batch, x_adv: Inputs) -> tuple[Tensor, Tensor]:
        """Return the sum of the mean losses of both networks, and the mean of their numbers of correct examples."""
        parts = enumerate(torch.split(x_adv, len(batch)))
        logits = [_using(learner.net, k)(part) for k, part in parts]
        self._logits = [each.detach() for each in logits]
        value = torch.stack([learner.mean_cross_entropy(each, batch.y) for each in logits]).sum()
        return value, torch.stack([hits(each, batch.y) for each in logits]).double().mean()

    def settle(self, learner: Learner) -> None:
        """Update the policies after every few updates of the networks: those that attacked, and one of them by an
        attack on a past network.
        """
        assert self._update is not None
        if not policies.is_due(self._update):
            return
        recipe, update, learner = self._recipe, self._update, learner.with_current_eps
        for k, (policy, played) in enumerate(self._plays):
            if policy is not None:
                _using(learner.frozen, k)
                ahead, _ = policies.after_update(learner, played.batch, update.rng.at("ahead", k))
                policy.learn(played, played.gain(self._logits[k], recipe.price) + ahead, recipe.entropy)
        if self._taken:
            self._against_past(learner, self._plays[0][1].batch, update)

    def _against_past(self, learner: Learner, batch: Batch, update: Update) -> None:
        rng = update.rng.at("past")
        policy = self._attackers[_drawn(rng.at("policy"), SIDES)]
        model = _using(learner.frozen, SIDES + self._version(rng))
        x_adv, played = policy.play(
            model, batch, learner.threat.constraint, rng, done=update.done, whole=self._whole, count=False
        )
        with torch.no_grad():
            gain = played.gain(model(x_adv), self._recipe.price)
        policy.learn(played, gain, self._recipe.entropy)

    def _opponent(self, rng: Draws) -> tuple[Policy | None, Policy]:
        """The policy that learns from an attack, and the policy that makes it. A past version does not learn."""
        drawn = _drawn(rng.at("opponent"), 2 * SIDES)
        policy = self._attackers[drawn % SIDES]
        if drawn < SIDES or not self._taken:
            return policy, policy
        return None, replace(policy, parameters=self._past[self._version(rng), drawn % SIDES])

    def _version(self, rng: Draws) -> int:
        return _drawn(rng.at("version"), min(int(self._taken), self._recipe.past))

    def _store(self, learner: Learner, update: Update) -> None:
        """Store versions of the policies, and of one network and then the other one, as the training proceeds."""
        taken = int(self._taken)
        if int(_VERSIONS * update.done) > taken:
            place = taken % self._recipe.past
            self._past[place] = torch.stack([attacker.parameters for attacker in self._attackers])
            assert isinstance(learner.net.net, Members)
            learner.net.net.store(taken % SIDES, SIDES + place)
            self._taken += 1


def most_robust(
    networks: Sequence[Classifier], attackers: Sequence[Policy], batch: Batch, threat: ThreatModel, rng: Draws
) -> int:
    """Return the position of the network that is correct on most examples under PGD and all policies together."""
    shares = [_accuracy(model, [None, *attackers], batch, threat, rng) or 0.0 for model in networks]
    return shares.index(max(shares))


def _accuracy(
    model: Classifier, attackers: Sequence[Policy | None], batch: Batch, threat: ThreatModel, rng: Draws
) -> float | None:
    """Share of the examples that are correct, clean and under each policy; None for PGD. None without attackers."""

    def surviving(part: Batch) -> Mask:
        constraint, margins = threat.constraint, []
        for policy in attackers:
            if policy is None:
                start = constraint.sample(part, model.bounds, rng.at("pgd"))
                steps, reach = _PGD_STEPS, policies.REACH
                margins.append(descend(model, part, start, constraint, steps=steps, reach=reach)[1])
            else:
                x_adv, _ = policy.play(model, part, constraint, rng, done=1.0, count=False)
                margins += [margin(model(x), part).detach() for x in (part.x, x_adv)]
        return torch.stack(margins).amin(0) > 0

    if not attackers:
        return None
    return float(torch.cat(results_in_pieces(batch, surviving)).double().mean())


def cross_play(
    rows: Mapping[str, Sequence[float | None]], attackers: Sequence[Policy], returned: Classifier, test: Batch
) -> tuple[dict[str, Any], str]:
    """Return the entry of the card with the robust accuracies of a league, one row for each network, and a sentence."""
    columns = ["policy 1", "policy 2", "past policies", f"PGD-{_PGD_STEPS}"]
    with torch.no_grad():
        features = policies.features_of(returned(test.x), test.y, 1.0)
    apart = policies.distance(attackers[0], attackers[1], features)
    cells = {
        name: ["–" if share is None else f"{100 * share:.1f} %" for share in shares]
        for name, shares in rows.items()
    }
    title = f"cross-play on {len(test):,} test examples, robust accuracy"
    entry = {
        "n": len(test),
        "columns": columns,
        "cross_play": dict(rows),
        "distance": apart,
        "converged": apart <= _CONVERGED,
        "policies": [policies.distribution(attacker) for attacker in attackers],
        "tables": [
            {
                "title": title,
                "columns": ["network", *columns],
                "rows": [[name, *cells[name]] for name in rows],
            }
        ],
    }
    found = f"the distance of the policies is {apart:.2f}"
    if apart <= _CONVERGED:
        found += ", so that they have converged to one strategy, and the second one adds nothing"
    matrix = "; ".join(f"{name} {', '.join(each)}" for name, each in cells.items())
    words = "; ".join(
        f"policy {k + 1}: {policies.in_words(attacker)}" for k, attacker in enumerate(attackers)
    )
    return entry, f"{title} against {', '.join(columns)}: {matrix}; {found}; choices at last, {words}"


def _drawn(rng: Draws, n: int) -> int:
    return int(rng.integers(torch.zeros(1, dtype=torch.int64), n))


def _using(model: Classifier, k: int) -> Classifier:
    """The model, which uses its network with the number `k` from now on."""
    assert isinstance(model.net, Members)
    model.net.used = k
    return model


def _networks(model: Classifier, tensors: Mapping[str, Tensor], numbers: Sequence[int]) -> list[Classifier]:
    """Copies of the model with the weights of networks of a checkpoint: averaged ones, except for past versions."""
    averaged = any(name.startswith(AVERAGE) for name in tensors)
    copies = [deepcopy(model).eval().requires_grad_(False) for _ in numbers]
    for copied, k in zip(copies, numbers, strict=True):
        kind = AVERAGE if averaged and k < SIDES else WEIGHTS
        assert isinstance(copied.net, nn.Module)
        copied.net.load_state_dict(without_prefix(tensors, f"{kind}{_MEMBERS}{k}."))
    return copies


def _published(checkpoint: Checkpoint, best: int) -> Checkpoint:
    """The checkpoint with the network `best` under the names of a single network, and all networks as state."""
    tensors = {}
    for name, value in checkpoint.tensors.items():
        kind, is_member, rest = name.partition(_MEMBERS)
        tensors[f"{STATE}{_ALL}{name}" if is_member else name] = value
        if is_member and rest.startswith(f"{best}."):
            tensors[f"{kind}net.{rest.removeprefix(f'{best}.')}"] = value.clone()
    return replace(checkpoint, tensors={**tensors, STATE + _BEST: torch.tensor(best)})


def _unpublished(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint of all networks, from which the training continues."""
    single = (f"{WEIGHTS}net.", f"{AVERAGE}net.", STATE + _BEST)
    tensors = {
        name.removeprefix(STATE + _ALL): value
        for name, value in checkpoint.tensors.items()
        if not name.startswith(single)
    }
    return replace(checkpoint, tensors=tensors)
