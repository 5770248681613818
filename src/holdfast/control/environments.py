"""Environments with many episodes at once: cart-pole and a linear-quadratic regulator in plain torch, and environments
of gymnasium's interface.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from holdfast.core.catalogue import ENVIRONMENTS
from holdfast.core.draws import Draws
from holdfast.core.errors import Install, TargetError, UsageError
from holdfast.core.types import Ids, Mask, PerExample
from holdfast.io.models.factories import error_text


@dataclass(frozen=True)
class Discrete:
    """Actions 0, …, `n` - 1."""

    n: int


@dataclass(frozen=True)
class Box:
    """Vectors between two bounds, each a tensor (d,), which may be infinite."""

    low: Tensor
    high: Tensor

    @property
    def size(self) -> int:
        """Number of values of a vector."""
        return len(self.low)

    def clamp(self, x: Tensor) -> Tensor:
        """Return vectors (n, d) with their values moved into the bounds."""
        return torch.maximum(torch.minimum(x, self.high), self.low)


Actions = Discrete | Box


class Step(NamedTuple):
    """The result of one step in all episodes."""

    observations: Tensor
    """observations after the step (n, d)"""
    rewards: PerExample
    ended: Mask
    """whether an episode has ended; the later steps of its row have no meaning until it is started again"""
    cut: Mask
    """whether an episode has ended because the environment truncated it"""


class Environment(Protocol):
    """Protocol of an environment with n episodes at once, in rows. An episode is a function of its seed and the
    actions.
    """

    limit: int
    """number of steps after which an episode is cut"""

    @property
    def limited(self) -> bool:
        """Whether the environment declares the limit itself."""

    @property
    def together(self) -> int:
        """Number of episodes that take hardly longer at once than one."""

    @property
    def name(self) -> str:
        """Name in messages and reports."""

    @property
    def observations(self) -> Box:
        """Bounds of observations."""

    @property
    def actions(self) -> Actions:
        """Possible actions."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of an observation as policies read it; empty for a vector."""

    @property
    def returns(self) -> tuple[float | None, float | None]:
        """Lowest and highest possible return of an episode, None where it is unknown."""

    def reset(self, seeds: Ids) -> Tensor:
        """Start one episode for each seed (n), and return the observations (n, d)."""

    def restart(self, rows: Mask, seeds: Ids) -> Tensor:
        """Start episodes again in some rows (n), each with its seed (n), and return the observations of all rows."""

    def step(self, actions: Tensor) -> Step:
        """Take a step with actions (n) of `Discrete` or (n, d) of `Box`."""

    def changed(self, factors: Mapping[str, Tensor]) -> "Environment":
        """Return the environment with parameters, such as `mass`, multiplied by a factor for each row (n)."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that can be changed."""


def episode_seeds(rng: Draws, ids: Ids) -> Ids:
    """Return a seed for each id (n), from 0 to 2^31 - 1."""
    return rng.bits(ids).abs() % 2**31


_STARTS = Draws(0).at("control", "starts")


def _without(factors: Mapping[str, Tensor], known: tuple[str, ...], name: str) -> None:
    for key in factors:
        if key not in known:
            expected = (
                ", ".join(known) if known else "no parameters, as for every environment that is not bundled"
            )
            raise UsageError(f"the threat changes the parameter {key!r}; {name} has {expected}")


@dataclass
class CartPole:
    """Balancing a pole on a cart: `CartPole-v1` of gymnasium.

    Barto, Sutton & Anderson, "Neuronlike adaptive elements that can solve difficult learning control problems", IEEE
    Transactions on Systems, Man, and Cybernetics, 1983. An observation is the position of the cart, its velocity, the
    angle of the pole in radians and its angular velocity; the reward of each step is 1. Action 1 pushes to the right.
    """

    mass: Tensor = field(default_factory=lambda: torch.tensor(0.1, dtype=torch.float64))
    """mass of the pole in kg"""
    length: Tensor = field(default_factory=lambda: torch.tensor(0.5, dtype=torch.float64))
    """half the length of the pole in m"""
    limit: int = 500

    name = "cartpole"
    limited, together = True, 1024
    actions = Discrete(2)
    parameters = ("mass", "length")
    returns = (0.0, 500.0)
    shape = ()
    observations = Box(
        -torch.tensor([4.8, math.inf, 0.41887903, math.inf]),
        torch.tensor([4.8, math.inf, 0.41887903, math.inf]),
    )

    def reset(self, seeds: Ids) -> Tensor:
        """Start episodes in states whose values are uniform from -0.05 to 0.05."""
        return self.begin(0.1 * _STARTS.uniform(seeds, 4, dtype=torch.float64) - 0.05)

    def begin(self, state: Tensor) -> Tensor:
        """Start episodes in given states (n, 4)."""
        self._state = state.double().T.contiguous()
        return self._state.float().T

    def restart(self, rows: Mask, seeds: Ids) -> Tensor:
        """Start episodes again in some rows."""
        starts = 0.1 * _STARTS.uniform(seeds[rows], 4, dtype=torch.float64) - 0.05
        self._state = self._state.index_copy(1, rows.nonzero()[:, 0], starts.T)
        return self._state.float().T

    def step(self, actions: Tensor) -> Step:
        """Push the cart with 10 N for 0.02 s."""
        _, velocity, angle, angular = self._state
        cosine, moment = angle.cos(), self.mass * self.length
        sine, total = angle.sin(), 1.0 + self.mass
        push = (
            torch.where(actions > 0, 10.0, -10.0).double().add_(moment * angular.square() * sine).div_(total)
        )
        turning = (9.8 * sine).sub_(cosine * push)
        turning /= self.length * (4.0 / 3.0 - (self.mass / total) * cosine.square())
        pushing = push.sub_((moment / total) * turning * cosine)
        # one sum of all four values: their derivatives times 0.02 s
        self._state = self._state.add(torch.stack((velocity, pushing, angular, turning)), alpha=0.02)
        ended = (self._state[0].abs() > 2.4) | (self._state[2].abs() > 12 * 2 * math.pi / 360)
        return Step(self._state.float().T, torch.ones(len(ended)), ended, torch.zeros_like(ended))

    def changed(self, factors: Mapping[str, Tensor]) -> "CartPole":
        """Return the environment with another mass or length of the pole in each row."""
        _without(factors, self.parameters, self.name)
        one = torch.ones((), dtype=torch.float64)
        return CartPole(
            self.mass * factors.get("mass", one), self.length * factors.get("length", one), self.limit
        )


@dataclass
class LQR:
    """A point mass with a quadratic cost, which is the linear-quadratic regulator.

    The state is the position and the velocity, and the action the force; each step takes 0.1 s. The reward is
    -(position² + velocity² + 0.1 force²), and an episode has 100 steps. Gaussian noise of standard deviation 0.01 acts
    on the velocity.
    """

    mass: Tensor = field(default_factory=lambda: torch.tensor(1.0))
    limit: int = 100

    name = "lqr"
    limited, together = True, 1024
    parameters = ("mass",)
    returns = (None, 0.0)
    shape = ()
    actions = Box(-torch.full((1,), math.inf), torch.full((1,), math.inf))
    observations = Box(-torch.full((2,), math.inf), torch.full((2,), math.inf))
    transition = ((1.0, 0.1), (0.0, 1.0))
    """matrix of the state of the model"""
    control = ((0.0,), (0.1,))
    """matrix of the force for a mass of 1"""
    weight = 0.1
    """weight of the squared force in the cost"""

    def reset(self, seeds: Ids) -> Tensor:
        """Start episodes in states whose values are uniform from -1 to 1."""
        self._seeds, self._times = seeds, torch.zeros_like(seeds)
        self._state = 2 * _STARTS.at("lqr").uniform(seeds, 2) - 1
        return self._state

    def restart(self, rows: Mask, seeds: Ids) -> Tensor:
        """Start episodes again in some rows."""
        starts = 2 * _STARTS.at("lqr").uniform(seeds, 2) - 1
        self._seeds = torch.where(rows, seeds, self._seeds)
        self._times = torch.where(rows, 0, self._times)
        self._state = torch.where(rows[:, None], starts, self._state)
        return self._state

    def step(self, actions: Tensor) -> Step:
        """Apply the force for 0.1 s."""
        force = actions[:, 0]
        rewards = -(self._state.square().sum(1) + self.weight * force.square())
        places = self._seeds * 1_000_003 + self._times  # an id for each seed and time
        noise = 0.01 * _STARTS.at("lqr", "noise").normal(places, 1)[:, 0]
        position, velocity = self._state.unbind(1)
        self._times = self._times + 1
        self._state = torch.stack(
            (position + 0.1 * velocity, velocity + 0.1 * force / self.mass + noise), dim=1
        )
        never = torch.zeros(len(force), dtype=torch.bool)
        return Step(self._state, rewards, never, never)

    def changed(self, factors: Mapping[str, Tensor]) -> "LQR":
        """Return the environment with another mass in each row."""
        _without(factors, self.parameters, self.name)
        return LQR(self.mass * factors.get("mass", torch.ones(())).float(), self.limit)

    def gain(self) -> Tensor:
        """Return the matrix K (1, 2) of the optimal actions -K x, from the discrete Riccati equation."""
        from scipy.linalg import solve_discrete_are

        a, b = np.array(self.transition), np.array(self.control)
        p = solve_discrete_are(a, b, np.eye(2), self.weight * np.eye(1))
        return torch.from_numpy(np.linalg.solve(self.weight * np.eye(1) + b.T @ p @ b, b.T @ p @ a))


BUNDLED: Mapping[str, Callable[[], Environment]] = dict(zip(ENVIRONMENTS, (CartPole, LQR), strict=True))
"""Environments by name."""

NO_LIMIT = 1000
"""number of steps after which an episode of an environment without a limit is cut"""


class Gymnasium:
    """Episodes of an environment of gymnasium's interface, one object for each row, created by `make`.

    Observations of several axes, such as images, are flattened. Raises `TargetError` for an environment without a seed,
    for rewards or observations that are not finite, and for spaces that are no `Box` or `Discrete`.
    """

    parameters: tuple[str, ...] = ()
    together = 1

    def __init__(self, make: Callable[[], Any], name: str) -> None:
        self.name, self._make = name, make
        self._rows: list[Any] = [make()]
        first = self._rows[0]
        for member in ("reset", "step", "action_space", "observation_space"):
            if not hasattr(first, member):  # an object of another library
                raise TargetError(
                    f"{name} has no {member}; an environment of gymnasium's interface was expected, with reset(seed=), "
                    "step(action), action_space and observation_space"
                )
        space = first.observation_space
        if type(space).__name__ != "Box":
            raise TargetError(
                f"the observations of {name} are {space}; a Box of numbers was expected (wrap it by FlattenObservation)"
            )
        self.shape = tuple(space.shape) if len(space.shape) > 1 else ()
        self.observations = Box(
            *(torch.from_numpy(np.array(end, np.float32)).flatten() for end in (space.low, space.high))
        )
        actions = first.action_space
        if type(actions).__name__ == "Discrete":
            self._offset = int(getattr(actions, "start", 0))
            self.actions: Actions = Discrete(int(actions.n))
        elif type(actions).__name__ == "Box":
            ends = (
                torch.from_numpy(np.array(end, np.float32)).flatten() for end in (actions.low, actions.high)
            )
            self.actions, self._offset = Box(*ends), 0
            self._action_shape = tuple(actions.shape)
        else:
            raise TargetError(f"the actions of {name} are {actions}; Discrete or Box was expected")
        self.returns = _declared(getattr(first, "returns", (None, None)), name)
        spec = getattr(first, "spec", None)
        declared = getattr(spec, "max_episode_steps", None)
        self.limit, self.limited = int(declared or NO_LIMIT), bool(declared)

    def reset(self, seeds: Ids) -> Tensor:
        """Start one episode for each seed."""
        while len(self._rows) < len(seeds):
            self._rows.append(self._make())
        self._ended = torch.zeros(len(seeds), dtype=torch.bool)
        self._seen = self._read([self._started(row, int(seed)) for row, seed in enumerate(seeds)])
        return self._seen.clone()

    def restart(self, rows: Mask, seeds: Ids) -> Tensor:
        """Start episodes again in some rows."""
        chosen = rows.nonzero().flatten().tolist()
        if chosen:
            self._seen[chosen] = self._read([self._started(row, int(seeds[row])) for row in chosen])
            self._ended[chosen] = False
        return self._seen.clone()

    def _started(self, row: int, seed: int) -> Any:
        try:
            started = self._rows[row].reset(seed=seed % 2**31)
        except TypeError as error:
            raise TargetError(
                f"{self.name} does not accept reset(seed=...) ({error}); episodes cannot be repeated without a seed"
            ) from None
        except Exception as error:  # the user's code may raise anything; its message is shown
            raise self._raised("reset", error) from error
        if not isinstance(started, tuple) or len(started) != 2:
            raise TargetError(
                f"reset of {self.name} returned {type(started).__name__}; a pair of the observation and a dictionary "
                "was expected, as in gymnasium"
            )
        return started[0]

    def _raised(self, method: str, error: Exception) -> TargetError:
        return TargetError(
            f"{method} of {self.name} raised {error_text(error, [self.name.rpartition(':')[0]])}"
        )

    def _read(self, observations: list[Any]) -> Tensor:
        """The observations of several rows (n, d). To check them together is several times as fast as one by one."""
        size, values = self.observations.size, [np.array(x, np.float32).ravel() for x in observations]
        wrong = next((x for x in values if len(x) != size), None)
        if wrong is None:
            together = np.stack(values)
            finite = np.isfinite(together).all(1)
            if finite.all():
                return torch.from_numpy(together)
            wrong = together[~finite][0]
        raise TargetError(
            f"{self.name} returned an observation of {len(wrong)} values with {int((~np.isfinite(wrong)).sum())} that "
            f"are not finite; {size} finite values were expected"
        )

    def step(self, actions: Tensor) -> Step:
        """Take a step in the rows whose episode has not ended."""
        rewards, cut = torch.zeros(len(actions)), torch.zeros(len(actions), dtype=torch.bool)
        running = (~self._ended).nonzero().flatten()
        chosen = actions.detach()[running]
        given: Any = (
            (chosen + self._offset).tolist()
            if isinstance(self.actions, Discrete)
            else chosen.numpy().astype(np.float32).reshape(-1, *self._action_shape)
        )
        stepped = [self._stepped(row, action) for row, action in zip(running.tolist(), given, strict=True)]
        if stepped:
            self._seen[running] = self._read([each[0] for each in stepped])
            rewards[running] = torch.tensor([each[1] for each in stepped])
            over, truncated = torch.tensor([each[2:] for each in stepped]).T
            self._ended[running], cut[running] = over | truncated, truncated & ~over
        return Step(self._seen.clone(), rewards, self._ended.clone(), cut)

    def _stepped(self, row: int, action: Any) -> tuple[Any, float, bool, bool]:
        """The observation, the reward, and whether the episode of a row ended or was truncated."""
        try:
            stepped = self._rows[row].step(action)
        except Exception as error:  # as in reset
            raise self._raised("step", error) from error
        if not isinstance(stepped, tuple) or len(stepped) != 5:
            raise TargetError(
                f"step of {self.name} returned {len(stepped) if isinstance(stepped, tuple) else 1} values; the "
                "observation, the reward, whether the episode ended or was truncated, and a dictionary were "
                "expected, as in gymnasium"
            )
        observation, reward, ended, truncated, _ = stepped
        if not math.isfinite(reward):
            raise TargetError(f"{self.name} returned the reward {reward}; finite rewards were expected")
        return observation, float(reward), bool(ended), bool(truncated)

    def changed(self, factors: Mapping[str, Tensor]) -> "Gymnasium":
        """Raise `UsageError`, because parameters are attributes of a single environment."""
        _without(factors, (), self.name)
        return self


def _declared(returns: Any, name: str) -> tuple[float | None, float | None]:
    """The attribute `returns` of an environment as its lowest and highest return."""
    try:
        low, high = (None if end is None else float(end) for end in returns)
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    if any(end is not None and not math.isfinite(end) for end in (low, high)) or (
        low is not None and high is not None and low > high
    ):
        raise TargetError(
            f"the attribute returns of {name} is {returns!r}; a pair of the lowest and the highest return of an "
            "episode was expected, with None for an unknown one"
        )
    return low, high


def registered(name: str) -> Gymnasium:
    """Return an environment of gymnasium by its id, such as `Acrobot-v1`."""
    try:
        import gymnasium
    except ModuleNotFoundError:
        raise UsageError(
            f"the environment {name!r} is not bundled ({', '.join(BUNDLED)}) and needs gymnasium",
            Install("control"),
        ) from None
    try:
        gymnasium.spec(name)
    except gymnasium.error.Error as error:
        raise UsageError(
            f"there is no environment {name!r}: {error}; give one of {', '.join(BUNDLED)}, a registered id of "
            "gymnasium, or file.py:make"
        ) from None
    try:
        return Gymnasium(lambda: gymnasium.make(name), name)
    except gymnasium.error.Error as error:  # such as a missing simulator
        raise UsageError(f"gymnasium cannot create {name!r}: {error}") from None


def ignores_seed(environment: Environment) -> bool:
    """Return whether episodes of one seed and the same actions differ, so that returns cannot be repeated."""
    first, second = _traced(environment), _traced(environment)
    return not torch.equal(first[0], first[1]) or not torch.equal(first, second)


_COMPARED = 16
"""number of steps in which episodes of one seed are compared"""


def _traced(environment: Environment) -> Tensor:
    """The observations and rewards of the first steps of two episodes of one seed (2, m)."""
    traced = [environment.reset(torch.tensor([1, 1]))]
    actions = environment.actions
    action = (
        torch.zeros(2, dtype=torch.int64)
        if isinstance(actions, Discrete)
        else actions.clamp(torch.zeros(2, actions.size))
    )
    for _ in range(_COMPARED):
        step = environment.step(action)
        traced += [step.observations, step.rewards[:, None], step.ended[:, None]]
        if bool(step.ended.any()):
            break
    return torch.cat([part.double() for part in traced], 1)
