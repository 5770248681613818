"""Training of policies and adversaries by PPO, and of the critics of attackers.

Schulman et al., "Proximal Policy Optimization Algorithms", 2017, arXiv:1707.06347. An adversary is trained by the same
function: it acts in an environment whose step contains the attacked policy, and whose rewards have the opposite sign.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Annotated, Self, TypeVar

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from holdfast.control.attackers import (
    Ball,
    ChoosesTarget,
    Critic,
    Directed,
    InBlocks,
    Learned,
    RobustSarsa,
    View,
    episodes,
    towards_target,
)
from holdfast.control.environments import Actions, Box, Discrete, Environment, Step, episode_seeds
from holdfast.control.policies import Network, Policy
from holdfast.core.draws import Draws
from holdfast.core.types import Fraction, Ids, Mask, NonNegative, Positive, Steps

Regulariser = Callable[[nn.Module, Tensor], Tensor]
"""additional loss of a network for observations (n, d)"""
Fit = Callable[["Learner", Mapping[str, Tensor]], None]
"""training of a critic on the steps of an update, before the policy is updated: tensors (t, n, …) by name"""
_Chosen = TypeVar("_Chosen", bound=ChoosesTarget)


@dataclass(frozen=True)
class PPO:
    """Settings of PPO."""

    updates: Steps = 60
    """number of updates, each after `rows` times `horizon` steps"""
    rows: Steps = 128
    """number of episodes at once"""
    horizon: Annotated[int, Ge(2)] = 64
    """steps of each row between two updates"""
    epochs: Steps = 4
    """passes over the steps of an update"""
    batches: Steps = 8
    """batches of a pass"""
    learning_rate: Positive = 2e-3
    """step size of Adam at the beginning"""
    decay: Fraction = 0.1
    """share of the step size to which it decreases linearly"""
    discount: Fraction = 0.99
    smoothing: Fraction = 0.95
    """lambda of the generalised advantage estimate"""
    clip: Positive = 0.2
    entropy: NonNegative = 0.005
    """weight of the entropy"""


@dataclass
class Learner:
    """A policy that is trained, with its value network and its optimiser."""

    network: Network
    value: Network
    log_deviation: nn.Parameter
    """logarithm of the standard deviation of actions that are vectors"""
    actions: Actions
    optimiser: torch.optim.Adam = field(init=False)

    def __post_init__(self) -> None:
        parameters = [*self.network.parameters(), *self.value.parameters(), self.log_deviation]
        self.optimiser = torch.optim.Adam(parameters, lr=1e-3, eps=1e-5)

    def distribution(self, outputs: Tensor) -> torch.distributions.Distribution:
        """Return the distribution of actions for the outputs of the network."""
        if isinstance(self.actions, Discrete):
            return torch.distributions.Categorical(logits=outputs, validate_args=False)
        normal = torch.distributions.Normal(outputs, self.log_deviation.exp(), validate_args=False)
        return torch.distributions.Independent(normal, 1, validate_args=False)

    def policy(self) -> Policy:
        """Return the policy without randomness, as a copy that further training does not change."""
        return Policy(deepcopy(self.network).requires_grad_(False), self.actions)


def new_learner(environment: Environment, rng: Draws, *, scale: Tensor | None = None) -> Learner:
    """Return a policy with random weights. `scale` (d) is the typical size of each value of an observation."""
    d = len(environment.observations.low)
    size = environment.actions.n if isinstance(environment.actions, Discrete) else environment.actions.size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.at("weights").seed)
        network, value = Network(d, size), Network(d, 1)
    with torch.no_grad():
        for net, gain in ((network, 0.01), (value, 1.0)):
            last = net.body[-1]
            assert isinstance(last, nn.Linear)
            last.weight *= gain
            if scale is not None:
                net.scale.copy_(1 / scale.clamp_min(1e-6))
    return Learner(network, value, nn.Parameter(torch.full((size,), -0.5)), environment.actions)


@dataclass(frozen=True)
class Progress:
    """What an update of a training measured."""

    update: int
    of: int
    mean_return: float
    """mean return of the episodes that ended since the last update; NaN if none ended"""


def trained(
    environment: Environment,
    learner: Learner,
    how: PPO,
    rng: Draws,
    *,
    regulariser: Regulariser | None = None,
    critic: Fit | None = None,
    observe: Callable[[Tensor, Learner, int], Tensor] = lambda x, learner, step: x,
    deadline: float = float("inf"),
) -> Iterator[Progress]:
    """Train a policy in place, and yield after each update.

    `observe` changes the observations (n, d) that the policy sees, such as an attacker. The training ends at
    `deadline`, in seconds of `time.monotonic`.
    """
    generator = torch.Generator().manual_seed(rng.at("actions").seed)
    n = how.rows
    seeds = episode_seeds(rng.at("episodes"), torch.arange(n))
    x, ages, returns = environment.reset(seeds), torch.zeros(n, dtype=torch.int64), torch.zeros(n)
    begun, place = n, 0
    for update in range(how.updates):
        if time.monotonic() > deadline:
            return
        for group in learner.optimiser.param_groups:
            group["lr"] = how.learning_rate * (1 - (1 - how.decay) * update / how.updates)
        kept: dict[str, list[Tensor]] = {
            key: [] for key in ("x", "action", "log", "value", "reward", "ended")
        }
        finished: list[Tensor] = []
        for _ in range(how.horizon):
            seen = observe(x, learner, place)
            place += 1
            with torch.no_grad():
                law = learner.distribution(learner.network(seen))
                action = _sampled(law, generator)
                kept["log"].append(law.log_prob(action))
                kept["value"].append(learner.value(seen)[:, 0])
            kept["x"].append(seen)
            kept["action"].append(action)
            step = environment.step(within(environment.actions, action))
            x, ages, returns = step.observations, ages + 1, returns + step.rewards
            ended = step.ended | (ages >= environment.limit)
            with torch.no_grad():  # an episode that is only cut goes on in the estimate
                cut = torch.where(ended & (~step.ended | step.cut), learner.value(x)[:, 0], 0.0)
            kept["reward"].append(step.rewards + how.discount * cut)
            kept["ended"].append(ended)
            if ended.any():
                finished.append(returns[ended])
                fresh = episode_seeds(rng.at("episodes"), torch.arange(begun, begun + n))
                begun += n
                x = environment.restart(ended, fresh)
                ages, returns = ages.masked_fill(ended, 0), returns.masked_fill(ended, 0.0)
        seen = observe(x, learner, place)
        with torch.no_grad():
            last = learner.value(seen)[:, 0]
        steps = {key: torch.stack(each) for key, each in kept.items()}
        if critic is not None:
            critic(learner, steps)
        _update(learner, steps, last, how, generator, regulariser)
        yield Progress(
            update + 1, how.updates, float(torch.cat(finished).mean()) if finished else float("nan")
        )


def _sampled(law: torch.distributions.Distribution, generator: torch.Generator) -> Tensor:
    if isinstance(law, torch.distributions.Categorical):
        return torch.multinomial(law.probs, 1, generator=generator)[:, 0]
    mean, deviation = law.mean, law.stddev
    return mean + deviation * torch.randn(mean.shape, generator=generator)


def within(actions: Actions, action: Tensor) -> Tensor:
    """Return actions with vectors moved to the bounds of an environment; choices are unchanged."""
    return action if isinstance(actions, Discrete) else actions.clamp(action)


def _update(
    learner: Learner,
    kept: Mapping[str, Tensor],
    last: Tensor,
    how: PPO,
    generator: torch.Generator,
    regulariser: Regulariser | None,
) -> None:
    values, rewards, ended = kept["value"], kept["reward"], kept["ended"].float()
    advantages, ahead, following = torch.zeros_like(values), torch.zeros_like(last), last
    for t in reversed(range(len(values))):
        error = rewards[t] + how.discount * following * (1 - ended[t]) - values[t]
        ahead = error + how.discount * how.smoothing * (1 - ended[t]) * ahead
        advantages[t], following = ahead, values[t]
    targets = (advantages + values).flatten()
    x, action, log, flat = (
        kept["x"].flatten(0, 1),
        kept["action"].flatten(0, 1),
        kept["log"].flatten(),
        advantages.flatten(),
    )
    flat = (flat - flat.mean()) / flat.std().clamp_min(1e-6)
    spread = targets.std().clamp_min(1.0).square()
    for _ in range(how.epochs):
        for rows in torch.randperm(len(x), generator=generator).chunk(how.batches):
            law = learner.distribution(learner.network(x[rows]))
            ratio = (law.log_prob(action[rows]) - log[rows]).exp()
            gains = torch.minimum(ratio * flat[rows], ratio.clamp(1 - how.clip, 1 + how.clip) * flat[rows])
            loss = -gains.mean() - how.entropy * law.entropy().mean()
            loss = loss + 0.5 * mse_loss(learner.value(x[rows])[:, 0], targets[rows]) / spread
            if regulariser is not None:
                loss = loss + regulariser(learner.network, x[rows[: max(len(rows) // 4, 1)]])
            learner.optimiser.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(
                [p for group in learner.optimiser.param_groups for p in group["params"]], 0.5
            )
            learner.optimiser.step()


@dataclass
class AgainstPolicy(ABC):
    """Base class of the environments of adversaries, whose step contains the policy, and whose rewards are those of the
    policy with the opposite sign.
    """

    environment: Environment
    policy: Policy
    ball: Ball

    def __post_init__(self) -> None:
        self.name, self.limit = self.environment.name, self.environment.limit
        self.observations, self.parameters = self.environment.observations, self.environment.parameters
        self.returns, self.shape = (None, None), self.environment.shape
        self.limited, self.together = self.environment.limited, self.environment.together
        self.actions = self._choices()

    @abstractmethod
    def _choices(self) -> Actions:
        """Return the actions of the adversary."""

    @abstractmethod
    def _acted(self, actions: Tensor) -> Tensor:
        """Return the actions that the environment gets, and keep the memory of the policy after them."""

    def reset(self, seeds: Ids) -> Tensor:
        """Start one episode for each seed."""
        self._x, self._memory, self._seeds, self._time = (
            self.environment.reset(seeds),
            self.policy.begin(len(seeds)),
            seeds,
            0,
        )
        return self._x

    def restart(self, rows: Mask, seeds: Ids) -> Tensor:
        """Start episodes again in some rows."""
        self._x, self._seeds = self.environment.restart(rows, seeds), torch.where(rows, seeds, self._seeds)
        if self._memory is not None:
            start = self.policy.begin(len(seeds))
            assert start is not None
            self._memory = torch.where(rows[:, None], start, self._memory)
        return self._x

    def step(self, actions: Tensor) -> Step:
        """Take the step of the policy and the adversary."""
        step = self.environment.step(self._acted(actions))
        self._x, self._time = step.observations, self._time + 1
        return step._replace(rewards=-step.rewards)

    def changed(self, factors: Mapping[str, Tensor]) -> Self:
        """Return the environment with other parameters."""
        return replace(self, environment=self.environment.changed(factors))


@dataclass
class Attacked(AgainstPolicy):
    """The environment of an adversary whose actions are target actions for a policy."""

    rng: Draws
    gradient_steps: int = 10

    def _choices(self) -> Actions:
        own = self.policy.actions
        ends = torch.ones(own.size) if isinstance(own, Box) else torch.ones(1)
        return own if isinstance(own, Discrete) else Box(-ends, ends)

    def _acted(self, actions: Tensor) -> Tensor:
        view = View(
            self.policy, self._memory, self.ball, self._seeds, self._time, self.rng, self.gradient_steps
        )
        seen = towards_target(self._x, view, actions)
        with torch.no_grad():
            outputs, self._memory = self.policy(seen, self._memory)
        return self.policy.act(outputs)


def typical(x: Tensor) -> Tensor:
    """Return the root mean square (d) of the values of observations (m, d)."""
    return x.square().mean(0).sqrt().clamp_min(1e-6)


def learned_adversary(
    environment: Environment,
    policy: Policy,
    ball: Ball,
    how: PPO,
    rng: Draws,
    *,
    scale: Tensor,
    deadline: float = float("inf"),
) -> Learned:
    """Return an adversary that PPO trained against a policy.

    It begins with the target actions of the best directed push, because rewards that are equal in every step show
    nothing before an episode ends early. Of this beginning and the networks after every few updates, that with the
    lowest mean return on other training episodes is returned, because updates can also make an adversary weaker.
    """
    attacked = Attacked(environment, policy, ball, rng.at("ascent"))
    learner = new_learner(attacked, rng, scale=scale)
    seeds = episode_seeds(rng.at("imitated"), torch.arange(_IMITATED))
    push = directed_push(environment, policy, ball, seeds, rng)
    x = episodes(environment, policy, push, ball, seeds, rng, keep=True).visited
    _imitate(learner, x, push.target(x, View(policy, None, ball, torch.arange(len(x)), 0, rng)), rng)
    candidates = [_adversary(learner)]
    candidates += [
        _adversary(learner)
        for progress in trained(attacked, learner, how, rng, deadline=deadline)
        if progress.update % _KEPT == 0 or progress.update == how.updates
    ]
    seeds = episode_seeds(rng.at("chosen"), torch.arange(_IMITATED))
    return _strongest(candidates, environment, policy, ball, seeds, rng.at("chosen"))


def _adversary(learner: Learner) -> Learned:
    return Learned(deepcopy(learner.network).requires_grad_(False))


_KEPT = 8
"""number of updates of an adversary after which its network is a candidate"""
_IMITATED = 32
"""number of episodes of the directed push with which a learned adversary begins"""
_SOFT = 0.1
"""share of each target that is spread over all actions, so that the adversary still tries others"""


def _imitate(learner: Learner, x: Tensor, target: Tensor, rng: Draws) -> None:
    """Fit the network of a learner to the targets (m), or (m, a), of an attacker for observations (m, d)."""
    generator = torch.Generator().manual_seed(rng.at("imitation").seed)
    optimiser = torch.optim.Adam(learner.network.parameters(), lr=3e-3)
    for _ in range(_FITTED):
        some = torch.randint(len(x), (min(512, len(x)),), generator=generator)
        outputs = learner.network(x[some])
        if isinstance(learner.actions, Discrete):
            loss = cross_entropy(outputs, target[some], label_smoothing=_SOFT)
        else:
            loss = mse_loss(outputs, target[some])
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()


@dataclass(frozen=True)
class Recorded:
    """The steps of episodes in which some actions were random."""

    x: Tensor
    """observations (m, d)"""
    action: Tensor
    """actions (m), or (m, a)"""
    returns: Tensor
    """discounted sums of the rewards from each step on (m)"""


_EXPLORED, _DISCOUNT = 0.2, 0.97
"""share of random actions, and the discount of the returns, in the episodes from which critics are fitted"""


def recorded(environment: Environment, policy: Policy, seeds: Ids, rng: Draws) -> Recorded:
    """Run one episode for each seed with some random actions, and return its steps."""
    generator = torch.Generator().manual_seed(rng.at("explored").seed)
    x, memory = environment.reset(seeds), policy.begin(len(seeds))
    running = torch.ones(len(seeds), dtype=torch.bool)
    kept: list[tuple[Tensor, Tensor, Tensor, Mask]] = []
    for _ in range(environment.limit):
        with torch.no_grad():
            outputs, memory = policy(x, memory)
        action = policy.act(outputs)
        random = torch.rand(len(seeds), generator=generator) < _EXPLORED
        if isinstance(environment.actions, Discrete):
            other = torch.randint(environment.actions.n, (len(seeds),), generator=generator)
            action = torch.where(random, other, action)
        else:
            noise = torch.randn(action.shape, generator=generator) * (0.1 + action.abs())
            action = environment.actions.clamp(action + random[:, None] * noise)
        step = environment.step(action)
        kept.append((x, action, torch.where(running, step.rewards, 0.0), running.clone()))
        x, running = step.observations, running & ~step.ended
        if not running.any():
            break
    togo, sums = torch.zeros(len(seeds)), []
    for _, _, reward, _ in reversed(kept):
        togo = reward + _DISCOUNT * togo
        sums.append(togo)
    mask = torch.cat([alive for *_, alive in kept])
    columns = [torch.cat(each)[mask] for each in ([k[0] for k in kept], [k[1] for k in kept], sums[::-1])]
    return Recorded(*columns)


def _fitted(net: Network, inputs: Tensor, targets: Tensor, rng: Draws, rows: Tensor | None = None) -> Network:
    """Fit a network to targets (m), with the output `rows` (m) of each row if it has several."""
    generator = torch.Generator().manual_seed(rng.at("batches").seed)
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    centre, spread = targets.mean(), targets.std().clamp_min(1e-3)
    for _ in range(_FITTED):
        some = torch.randint(len(inputs), (min(512, len(inputs)),), generator=generator)
        found = net(inputs[some])
        value = found[:, 0] if rows is None else found.gather(1, rows[some, None])[:, 0]
        loss = mse_loss(value, (targets[some] - centre) / spread)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
    return net.requires_grad_(False)


_FITTED = 500
"""gradient steps with which a critic is fitted"""


def learned_critic(environment: Environment, policy: Policy, seeds: Ids, rng: Draws) -> Critic:
    """Return the attacker that follows a learned value of observations."""
    steps = recorded(environment, policy, seeds, rng)
    value, _ = new_critics(environment, typical(steps.x), rng)
    return Critic(_fitted(value, steps.x, steps.returns, rng.at("value")))


def learned_sarsa(environment: Environment, policy: Policy, seeds: Ids, rng: Draws) -> RobustSarsa:
    """Return the attacker that follows a learned value of actions."""
    steps = recorded(environment, policy, seeds, rng)
    _, action_value = new_critics(environment, typical(steps.x), rng)
    discrete = isinstance(environment.actions, Discrete)
    inputs = steps.x if discrete else torch.cat((steps.x, steps.action), 1)
    rows = steps.action if discrete else None
    return RobustSarsa(_fitted(action_value, inputs, steps.returns, rng.at("sarsa"), rows))


def new_critics(environment: Environment, scale: Tensor, rng: Draws) -> tuple[Network, Network]:
    """Return networks with random weights: of the value of observations, and of that of actions. `scale` (d) is the
    typical size of each value of an observation.
    """
    d, actions = len(scale), environment.actions
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.at("critics").seed)
        value = Network(d, 1)
        shape = (d, actions.n) if isinstance(actions, Discrete) else (d + actions.size, 1)
        action_value = Network(*shape)
    value.scale.copy_(1 / scale)
    action_value.scale[:d].copy_(1 / scale)
    return value, action_value


_MOST_VALUES = 16
"""number of values of an observation up to which the directed push may follow each of them"""


def pushes(environment: Environment) -> list[Directed]:
    """Return the directed pushes: one for each action, and for each value of the observation and pair of actions."""
    actions, d = environment.actions, len(environment.observations.low)
    last = actions.n if isinstance(actions, Discrete) else 2 * actions.size
    tried = [Directed(action, action) for action in range(last)]
    if d <= _MOST_VALUES:
        pairs = [(a, b) for a in range(last) for b in range(last) if a != b]
        if not isinstance(actions, Discrete):
            pairs = [(a, b) for a, b in pairs if a // 2 == b // 2]
        elif actions.n > 3:
            pairs = [(0, last - 1), (last - 1, 0)]
        tried += [Directed(a, b, value) for value in range(d) for a, b in pairs]
    return tried


def directed_push(environment: Environment, policy: Policy, ball: Ball, seeds: Ids, rng: Draws) -> Directed:
    """Return the directed push with the lowest mean return on training episodes."""
    return _strongest(pushes(environment), environment, policy, ball, seeds, rng)


def _strongest(
    attackers: Sequence[_Chosen], environment: Environment, policy: Policy, ball: Ball, seeds: Ids, rng: Draws
) -> _Chosen:
    """The attacker with the lowest mean return on the episodes of the seeds (n). If the environment does not run all of
    them at once, only the better quarter after a few episodes is compared on all.
    """
    n = len(seeds)
    if len(attackers) * n > environment.together and n > _FIRST < len(attackers):
        means = _means(attackers, environment, policy, ball, seeds[:_FIRST], rng)
        attackers = [attackers[k] for k in means.argsort()[: -(-len(attackers) // 4)]]
    return attackers[int(_means(attackers, environment, policy, ball, seeds, rng).argmin())]


_FIRST = 8
"""number of episodes that decide which attackers are compared on all"""


def _means(
    attackers: Sequence[_Chosen], environment: Environment, policy: Policy, ball: Ball, seeds: Ids, rng: Draws
) -> Tensor:
    """The mean return (k) of each attacker on the episodes of the seeds."""
    n = len(seeds)
    at_once = max(environment.together // n, 1)
    means: list[Tensor] = []
    for start in range(0, len(attackers), at_once):
        some = attackers[start : start + at_once]
        returns = episodes(environment, policy, InBlocks(some), ball, seeds.repeat(len(some)), rng).returns
        means.append(returns.view(-1, n).mean(1))
    return torch.cat(means)
