"""The optimiser of a training and its learning rates, which are named or functions of the user.

The state of the optimiser is part of the checkpoints. That of a scheduler is not: the number of its steps is a function
of the completed fraction of the training, so that a scheduler that was created again takes the same steps.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import raising
from holdfast.core.names import kind_of
from holdfast.core.training import GROUP, MEMORY, NUMBER, TrainingPlan, without_prefix

Rate = Literal["cycle", "cosine", "steps", "flat"]
OwnOptimizer = Callable[[list[nn.Parameter]], Optimizer]
"""function of the user that returns an optimiser of the given parameters"""
OwnSchedule = Callable[[Optimizer, int], LRScheduler]
"""function of the user that returns a scheduler of an optimiser, from the optimiser and the total number of updates"""


def rate(schedule: Rate, done: float) -> float:
    """Return the factor of the largest learning rate in a schedule, after the fraction `done` of the training."""
    if schedule == "cycle":
        return done / 0.3 if done < 0.3 else (1 - done) / 0.7
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if schedule == "steps":
        return 1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01
    return 1.0


_NEGLIGIBLE_LR = 1e-9
_TOLERANCE = 1e-6  # for rounding errors of the completed fraction


class Optimisation:
    """The optimiser of a training, with the schedule of its learning rates.

    A named schedule is a factor of the learning rate of each parameter group. A scheduler of the user is created for
    the number of updates of the first plan. Before each update it takes the steps that are still missing, so that their
    number is the completed fraction of the training times that number.
    """

    def __init__(self, optimizer: Optimizer, schedule: Rate | OwnSchedule, *, is_own: bool) -> None:
        """Create the optimisation. `is_own` states whether a function of the user created the optimiser."""
        self._optimizer, self._schedule, self._is_own = optimizer, schedule, is_own
        self._update = ""
        self._options = [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        self._changed: set[tuple[int, str]] = set()
        """index of the parameter group and name of each number that the optimiser itself has changed"""
        self._scheduler: LRScheduler | None = None
        self._n_steps = 0

    def prepare(self, n_done: int, plan: TrainingPlan, total: int) -> None:
        """Set the learning rates of the next update, after `n_done` updates. `total` is the number of updates of the
        first plan.
        """
        self._update = f"update {n_done + 1:,} of {plan.end:,}"
        if not isinstance(self._schedule, str):
            self._advance(self._schedule, int(total * plan.done(n_done) + _TOLERANCE), total)
            return
        factor = rate(self._schedule, plan.rated(n_done))
        for group, options in zip(self._optimizer.param_groups, self._options, strict=True):
            group["lr"] = options["lr"] * factor

    def _advance(self, schedule: OwnSchedule, n_steps: int, total: int) -> None:
        """Take the steps of the scheduler up to `n_steps`. It is created again if it has taken more steps, as after a
        guard has undone updates.
        """
        if self._scheduler is None or n_steps < self._n_steps:
            numbers = self._numbers()
            for group, options in zip(self._optimizer.param_groups, self._options, strict=True):
                group.update(options)
            self._set({place: numbers[place] for place in self._changed})
            self._scheduler, self._n_steps = scheduler_of(schedule, self._optimizer, total), 0
        if self._n_steps < n_steps:
            with warnings.catch_warnings():
                # steps that are repeated after a resume precede the first update
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
                for n in range(self._n_steps, n_steps):
                    _step(self._scheduler, n + 1, total)
            self._n_steps = n_steps

    def zero_grad(self) -> None:
        """Delete the gradients of the parameters."""
        self._optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Update the parameters by their gradients."""
        if not self._is_own:  # the optimisers of torch change no numbers of their groups
            self._optimizer.step()
            return
        before = self._numbers()
        with raising(
            "the optimiser of the function optimizer",
            f"in {self._update}",
            "correct the function, or use a named optimiser, such as adamw",
        ):
            self._optimizer.step()
        self._changed |= {place for place, value in self._numbers().items() if value != before.get(place)}

    @property
    def lr(self) -> float:
        """Current learning rate of the first parameter group."""
        return float(self._optimizer.param_groups[0]["lr"])

    def tensors(self) -> dict[str, Tensor]:
        """Return the state of the optimiser as tensors by name. Tensors of the optimiser are not copied.

        Raises `TargetError` for state other than tensors and numbers.
        """
        tensors: dict[str, Tensor] = {}
        for index, memory in self._optimizer.state_dict()["state"].items():
            for name, value in memory.items():
                if isinstance(value, Tensor):
                    tensors[f"{MEMORY}{index}.{name}"] = value
                elif isinstance(value, int | float):
                    tensors[f"{NUMBER}{index}.{name}"] = _number(value)
                elif value is not None:
                    raise TargetError(
                        f"the optimiser {type(self._optimizer).__name__} has {kind_of(value)} as its state {name}, "
                        "and a checkpoint contains tensors and numbers only; use an optimiser of torch.optim, such as "
                        "SGD"
                    )
        numbers = self._numbers()
        for place in sorted(self._changed):
            tensors[f"{GROUP}{place[0]}.{place[1]}"] = _number(numbers[place])
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the state of the optimiser from the tensors of a checkpoint."""
        memory: dict[int, dict[str, Any]] = {}
        for (index, key), value in _placed(tensors, MEMORY):
            value = value.cpu() if key == "step" else value  # read without waiting for the device
            memory.setdefault(index, {})[key] = copy_of_tensor(value)
        for (index, key), value in _placed(tensors, NUMBER):
            memory.setdefault(index, {})[key] = value.item()
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": memory})
        numbers = {place: value.item() for place, value in _placed(tensors, GROUP)}
        self._set(numbers)
        self._changed = set(numbers)

    def _numbers(self) -> dict[tuple[int, str], float]:
        """The numbers of all parameter groups."""
        return {
            (index, key): value
            for index, group in enumerate(self._optimizer.param_groups)
            for key, value in group.items()
            if isinstance(value, int | float)
        }

    def _set(self, numbers: Mapping[tuple[int, str], float]) -> None:
        for (index, key), value in numbers.items():
            self._optimizer.param_groups[index][key] = value


def _placed(tensors: Mapping[str, Tensor], first: str) -> Iterator[tuple[tuple[int, str], Tensor]]:
    """The tensors whose names consist of the prefix `first`, an index and a key, with the index and the key."""
    for name, value in without_prefix(tensors, first).items():
        index, _, key = name.partition(".")
        yield (int(index), key), value


def _number(value: float) -> Tensor:
    """A number as a tensor from which `item` returns the same number."""
    kind = torch.bool if isinstance(value, bool) else torch.int64 if isinstance(value, int) else torch.float64
    return torch.tensor(value, dtype=kind)


def copy_of_tensor(value: Tensor) -> Tensor:
    """Return a contiguous copy of a tensor without its graph."""
    return value.detach().clone(memory_format=torch.contiguous_format)


def optimizer_of(make: OwnOptimizer, parameters: Sequence[nn.Parameter]) -> Optimizer:
    """Return the optimiser that a function of the user creates for the parameters of a training.

    Raises `TargetError` if the function raises an exception, and `UsageError` if it returns no optimiser, an optimiser
    of other parameters, or one whose steps need a function that computes the loss.
    """
    with raising("the function optimizer", kind=TargetError):
        optimizer = make(list(parameters))
    if not isinstance(optimizer, Optimizer):
        raise UsageError(
            f"the function optimizer returned {kind_of(optimizer)}; an optimiser of the given parameters was expected, "
            "as in torch.optim.SGD(parameters, lr=0.1)"
        )
    if _requires_arguments(optimizer.step):
        raise UsageError(
            f"the steps of {type(optimizer).__name__} need a function that computes the loss several times, and the "
            "loop computes the loss of an update once; use an optimiser without it, such as torch.optim.SGD"
        )
    given = {id(parameter) for parameter in parameters}
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if own != given:
        raise UsageError(
            f"the optimiser {type(optimizer).__name__} has {len(own - given)} parameters that the function did not "
            f"receive, and lacks {len(given - own)} of the {len(given)} that it received; give it all parameters that "
            "the function receives, which are those of a copy of the network. With train_only fewer are trained"
        )
    return optimizer


def slowed(make: OwnOptimizer) -> OwnOptimizer:
    """Return a function that returns the same optimiser with a learning rate so small that the loss cannot diverge."""

    def slow(parameters: list[nn.Parameter]) -> Optimizer:
        optimizer = make(parameters)
        for group in optimizer.param_groups:
            group["lr"] = _NEGLIGIBLE_LR
        return optimizer

    return slow


def scheduler_of(make: OwnSchedule, optimizer: Optimizer, total: int) -> LRScheduler:
    """Return the scheduler that a function of the user creates for an optimiser and a number of updates.

    Raises `TargetError` if the function raises an exception, and `UsageError` if it returns no scheduler, one of
    another optimiser, or one whose steps need a metric.
    """
    with raising("the function schedule", f"for {total:,} updates", kind=TargetError):
        scheduler = make(optimizer, total)
    if not isinstance(scheduler, LRScheduler):
        raise UsageError(
            f"the function schedule returned {kind_of(scheduler)}; a scheduler of torch.optim.lr_scheduler was expected"
        )
    if isinstance(scheduler, ReduceLROnPlateau) or _requires_arguments(scheduler.step):
        raise UsageError(
            f"the steps of {type(scheduler).__name__} need a metric, and a schedule here is a function of the number "
            "of updates alone; use one such as torch.optim.lr_scheduler.OneCycleLR or CosineAnnealingLR"
        )
    if scheduler.optimizer is not optimizer:
        raise UsageError(
            f"the scheduler {type(scheduler).__name__} belongs to another optimiser; create it for the optimiser that "
            "the function receives"
        )
    return scheduler


def _step(scheduler: LRScheduler, n: int, total: int) -> None:
    """Take the step `n` of a scheduler of the user, which precedes the update `n + 1` of `total`."""
    with raising(
        "the schedule",
        f"in update {n + 1:,} of {total:,}",
        "the function schedule receives the total number of updates, as in OneCycleLR(optimizer, max_lr=0.1, "
        "total_steps=total), and a scheduler takes one step for each update",
    ):
        scheduler.step()


def _requires_arguments(function: Callable[..., object]) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD for each in parameters)
