"""League: two networks are trained against two learned attack policies and against past versions of these, and the
policies against both networks and against past versions of these. The better network is returned.

The population with past versions is that of Vinyals et al., "Grandmaster level in StarCraft II using multi-agent
reinforcement learning", Nature 575, 2019. Differs from the paper: two agents on each side, no exploiters, and opponents
are drawn with equal probability, half of them from the past. The policies are those of the recipe `policy` (Jia et al.,
"LAS-AT: Adversarial Training with Learnable Attack Strategy", CVPR 2022, arXiv:2203.06616).
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.core.batch import Batch, TrainingData
from holdfast.core.checkpoint import AVERAGE, STATE, WEIGHTS, Checkpoint, without_prefix
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Inputs, NonNegative, Steps
from holdfast.recipes.training.attack_policies import Played, Policy, after_update, is_due, refuse_other_norms
from holdfast.recipes.training.cross_play import CrossPlay, most_robust
from holdfast.recipes.training.fit import Training, Turn
from holdfast.recipes.training.learner import Learner, hits, trained
from holdfast.recipes.training.recipe import Finished

SIDES = 2
"""number of policies, and of networks in training"""
_VERSIONS = 10  # versions that are stored in a training
_HELD_OUT, _SHARE = (
    500,
    10,
)  # examples that choose the network: at most so many, and a tenth of the training examples
_MEMBERS, _OTHER, _BEST = "net.members.", "other.", "best"
_ATTACKERS, _PAST, _TAKEN = "attacker.", "past", "taken"


@dataclass(frozen=True)
class LeagueTraining:
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

    def __call__(
        self,
        model: Classifier,
        data: TrainingData,
        threat: ThreatModel,
        *,
        rng: Draws,
        after: Checkpoint | None = None,
    ) -> Iterator[Checkpoint]:
        refuse_other_norms("league", threat)
        n = min(_HELD_OUT, len(data) // _SHARE)
        order = rng.at("held out").bits(data.ids).argsort()
        held_out, rest = data.take(order[: n or len(data)]), data.subset(order[n:].sort().values)
        attackers = [Policy.new(rng.at("attacker", k), data.ids.device) for k in range(SIDES)]
        state = {
            **{
                name: value
                for k in range(SIDES)
                for name, value in attackers[k].state(f"{_ATTACKERS}{k}.").items()
            },
            _PAST: torch.stack([attacker.parameters for attacker in attackers]).repeat(self.past, 1, 1),
            _TAKEN: torch.zeros((), dtype=torch.int64, device=data.ids.device),
        }
        play, how = _Play(self, attackers, state), self.training
        if how.saving is not None:
            save = how.saving.save
            how = replace(how, saving=replace(how.saving, save=lambda within: save(_published(within, 0))))
        checkpoints = trained(
            play.inner,
            play.loss,
            _with_members(model, SIDES + self.past),
            rest,
            threat,
            how,
            rng=rng,
            after=None if after is None else _unpublished(after),
            state=state,
            settle=lambda learner: lambda: play.settle(learner),
            alone=True,
            weighted=True,
        )
        return self._chosen(checkpoints, model, held_out, threat, rng)

    def _chosen(
        self,
        checkpoints: Iterator[Checkpoint],
        model: Classifier,
        held_out: Batch,
        threat: ThreatModel,
        rng: Draws,
    ) -> Iterator[Checkpoint]:
        """Yield the checkpoints, each with the network that is most robust on held-out examples as the new model."""
        for checkpoint in checkpoints:
            state = without_prefix(checkpoint.tensors, STATE)
            attackers = [Policy.of(state, f"{_ATTACKERS}{k}.").to(held_out.x.device) for k in range(SIDES)]
            prefix = (AVERAGE if checkpoint.averaged else WEIGHTS) + _MEMBERS
            networks = [
                _opened(model, without_prefix(checkpoint.tensors, f"{prefix}{k}.")) for k in range(SIDES)
            ]
            play = CrossPlay(held_out, threat, rng.at("cross-play", checkpoint.epoch))
            yield _published(checkpoint, most_robust(play, networks, attackers))

    def follow_up(self, finished: Finished) -> tuple[dict[str, Any], str]:
        """Return the robust accuracy of each network against each policy, also of past ones, and how different the
        policies are.
        """
        state = finished.state
        best, taken = int(state[_BEST]), min(int(state[_TAKEN]), self.past)
        attackers = [Policy.of(state, f"{_ATTACKERS}{k}.") for k in range(SIDES)]
        earlier = [
            [replace(attackers[k], parameters=version[k]) for k in range(SIDES)]
            for version in state[_PAST][:taken]
        ]
        averaged = any(name.startswith(_OTHER + AVERAGE) for name in state)
        prefix = _OTHER + (AVERAGE if averaged else WEIGHTS) + _MEMBERS
        past_prefix = _OTHER + WEIGHTS + _MEMBERS  # a past version is never averaged
        networks = {
            "returned network": finished.new,
            "other network": _opened(finished.given, without_prefix(state, f"{prefix}{SIDES - 1 - best}.")),
            **{
                f"past network {k + 1}": _opened(
                    finished.given, without_prefix(state, f"{past_prefix}{SIDES + k}.")
                )
                for k in range(taken)
            },
        }
        return CrossPlay(finished.test, finished.threat, finished.rng).report(networks, attackers, earlier)


class Members(nn.Module):
    """Several networks, of which one at a time is used."""

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
        """Copy the weights and statistics of one network into another one."""
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
        self._turn: Turn | None = None

    def inner(self, learner: Learner, batch: Batch, turn: Turn) -> Inputs:
        """Return the inputs of a batch after an attack on each network in training, one after the other."""
        self._store(learner, turn)
        self._plays, self._turn, attacked = [], turn, []
        for k in range(SIDES):
            rng = turn.rng.at("network", k)
            current, policy = self._opponent(rng)
            x_adv, played = policy.play(
                _using(learner.frozen, k), batch, learner.threat.constraint, rng,
                done=turn.done, whole=self._whole, count=current is not None,
            )  # fmt: skip
            self._plays.append((current, played))
            attacked.append(x_adv)
        return torch.cat(attacked)

    def loss(self, learner: Learner, batch: Batch, x_adv: Inputs) -> tuple[Tensor, Tensor]:
        """Return the sum of the mean losses of both networks, and the mean of their numbers of correct examples."""
        logits = [_using(learner.net, k)(part) for k, part in enumerate(torch.split(x_adv, len(batch)))]
        self._logits = [each.detach() for each in logits]
        value = torch.stack([learner.mean_cross_entropy(each, batch.y) for each in logits]).sum()
        return value, torch.stack([hits(each, batch.y) for each in logits]).double().mean()

    def settle(self, learner: Learner) -> None:
        """Update the policies after every few updates of the networks: those that attacked, and one of them by an
        attack on a past network.
        """
        assert self._turn is not None
        if not is_due(self._turn):
            return
        recipe, learner = self._recipe, learner.with_current_eps
        for k, (policy, played) in enumerate(self._plays):
            if policy is not None:
                _using(learner.frozen, k)
                ahead, _ = after_update(learner, played.batch, self._turn.rng.at("ahead", k))
                policy.learn(played, played.gain(self._logits[k], recipe.price) + ahead, recipe.entropy)
        if self._taken:
            self._against_past(learner, self._plays[0][1].batch, self._turn)

    def _against_past(self, learner: Learner, batch: Batch, turn: Turn) -> None:
        rng = turn.rng.at("past")
        policy = self._attackers[_drawn(rng.at("policy"), SIDES)]
        place = SIDES + _drawn(rng.at("version"), min(int(self._taken), self._recipe.past))
        model = _using(learner.frozen, place)
        x_adv, played = policy.play(
            model, batch, learner.threat.constraint, rng, done=turn.done, whole=self._whole, count=False
        )
        with torch.no_grad():
            logits = model(x_adv)
        policy.learn(played, played.gain(logits, self._recipe.price), self._recipe.entropy)

    def _opponent(self, rng: Draws) -> tuple[Policy | None, Policy]:
        """The policy that attacks, twice: None and the policy for a past version, which learns nothing."""
        drawn = _drawn(rng.at("opponent"), 2 * SIDES)
        policy, taken = self._attackers[drawn % SIDES], int(self._taken)
        if drawn < SIDES or not taken:
            return policy, policy
        version = _drawn(rng.at("version"), min(taken, self._recipe.past))
        return None, replace(policy, parameters=self._past[version, drawn % SIDES])

    def _store(self, learner: Learner, turn: Turn) -> None:
        """Store versions of the policies, and of one network and then the other one, as the training proceeds."""
        taken = int(self._taken)
        if int(_VERSIONS * turn.done) <= taken:
            return
        place = taken % self._recipe.past
        for k, attacker in enumerate(self._attackers):
            self._past[place, k].copy_(attacker.parameters)
        assert isinstance(learner.net.net, Members)
        learner.net.net.store(taken % SIDES, SIDES + place)
        self._taken += 1


def _drawn(rng: Draws, n: int) -> int:
    return int(rng.integers(torch.zeros(1, dtype=torch.int64), n))


def _using(model: Classifier, k: int) -> Classifier:
    """The model, which uses its network with the number `k` from now on."""
    assert isinstance(model.net, Members)
    model.net.used = k
    return model


def _with_members(model: Classifier, n: int) -> Classifier:
    new = deepcopy(model)
    assert isinstance(new.net, nn.Module)  # other models are not trained
    new.net = Members(new.net, n)
    return new


def _opened(model: Classifier, weights: Mapping[str, Tensor]) -> Classifier:
    """A copy of the model with the given weights of its network, in eval mode."""
    new = deepcopy(model).eval().requires_grad_(False)
    assert isinstance(new.net, nn.Module)
    new.net.load_state_dict(weights)
    return new


def _published(checkpoint: Checkpoint, best: int) -> Checkpoint:
    """The checkpoint with the network `best` under the names of a single network, and the others as state."""
    tensors = {STATE + _BEST: torch.tensor(best)}
    for name, value in checkpoint.tensors.items():
        kind = next((kind for kind in (WEIGHTS, AVERAGE) if name.startswith(kind + _MEMBERS)), None)
        if kind is None:
            tensors[name] = value
        elif name.startswith(f"{kind}{_MEMBERS}{best}."):
            tensors[f"{kind}net.{name.removeprefix(f'{kind}{_MEMBERS}{best}.')}"] = value
        else:
            tensors[STATE + _OTHER + name] = value
    return replace(checkpoint, tensors=tensors)


def _unpublished(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint of all networks, from which the training continues; the inverse of `_published`."""
    best, tensors = int(checkpoint.tensors[STATE + _BEST]), {}
    for name, value in checkpoint.tensors.items():
        kind = next((kind for kind in (WEIGHTS, AVERAGE) if name.startswith(f"{kind}net.")), None)
        if name == STATE + _BEST:
            continue
        if kind is not None:
            tensors[f"{kind}{_MEMBERS}{best}.{name.removeprefix(f'{kind}net.')}"] = value
        else:
            tensors[name.removeprefix(STATE + _OTHER)] = value
    return replace(checkpoint, tensors=tensors)
