"""The updates of a training: its optimiser and learning rate, plans that determine its examples, and data-parallel
processes.
"""

import functools
import importlib
import inspect
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from holdfast.core.errors import Remedy, TargetError, UsageError
from holdfast.core.model import raising
from holdfast.core.names import kind_of
from holdfast.core.training import GROUP, MEMORY, NUMBER, Checkpoint, TrainingPlan, without_prefix

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store


T = TypeVar("T")
_PATIENT = timedelta(days=7)  # timeout: the other processes wait while the first one evaluates
_GROUPS = itertools.count()
"""Numbers of the process groups that this process joins one after another."""


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Context manager that joins the processes that torchrun has started into a process group. It has no effect for a
    single process or if a group exists.
    """
    if started() == 1 or not dist.is_available() or dist.is_initialized():
        yield
        return
    if "RANK" not in os.environ:
        raise UsageError(
            f"WORLD_SIZE is {started()} and RANK is not set, so the number of this process is unknown; start the "
            f"processes with torchrun, or unset WORLD_SIZE"
        )
    if device.type == "cuda":
        torch.cuda.set_device(_local())
    # This import binds the existing group as a default; an optimizer's first step imports it too. A group that was
    # bound is never destroyed, and a thread of it that still releases a tensor aborts the process at exit.
    importlib.import_module("torch.distributed.nn.functional")
    # Each group has keys of its own in the store. With those of an earlier group, a process may connect to addresses
    # of processes that have closed their ports.
    from torch.distributed.distributed_c10d import PrefixStore

    store = PrefixStore(f"training-{next(_GROUPS)}", _store())
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank(),
        world_size=started(),
        timeout=_PATIENT,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


@functools.cache
def _store() -> "Store":
    """Return the store in which the processes of torchrun exchange their addresses. It is opened once, because without
    the agent of torchrun it is part of the first process.
    """
    from torch.distributed.rendezvous import rendezvous

    store: Store = next(rendezvous("env://", timeout=_PATIENT))[0]
    return store


def started() -> int:
    """Return the number of processes that were started for a data-parallel training, according to the process group or
    else to torchrun; 1 without both.
    """
    return dist.get_world_size() if _grouped() else int(os.environ.get("WORLD_SIZE", "1"))


def processes() -> int:
    """Return the number of processes of a data-parallel training that are joined in a process group; 1 without a
    group.
    """
    return dist.get_world_size() if _grouped() else 1


def rank() -> int:
    """Return the rank of this process in a data-parallel training, counted from 0."""
    return dist.get_rank() if _grouped() else int(os.environ.get("RANK", "0"))


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def first() -> bool:
    """Return whether this is the first process of a data-parallel training, which evaluates and writes files for
    all.
    """
    return rank() == 0


def own(device: torch.device) -> torch.device:
    """Return the GPU of this process if torchrun has started several processes and `device` is a GPU. Otherwise
    `device` is returned unchanged.
    """
    return torch.device("cuda", _local()) if device.type == "cuda" and started() > 1 else device


def _local() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def broadcast(value: T) -> T:
    """Return, in every process of a data-parallel training, the value that the first process has passed."""
    if processes() == 1:
        return value
    objects = [value]
    with _connected():
        dist.broadcast_object_list(objects)
    return objects[0]


def match_first(digests: list[str], model: nn.Module) -> None:
    """Give a model the weights that it has in the first process of a data-parallel training. Raises `UsageError` if the
    digests of the data differ from those of the first process.
    """
    if broadcast(digests) != digests:
        raise UsageError(
            "this process has other data than the first one; give all processes the same data in the same order, as "
            "from one file"
        )
    # on the CPU, because the processes may have different devices
    model.load_state_dict(broadcast({name: value.cpu() for name, value in model.state_dict().items()}))


@contextmanager
def _connected() -> Iterator[None]:
    """Context that turns the loss of another process into a `TargetError`."""
    try:
        yield
    except RuntimeError as error:  # which is all that gloo and NCCL raise
        raise TargetError(
            f"this process has lost the connection to the others: {error}. If one of them has ended, its output has "
            f"the reason"
        ) from error


def refuse_few(batch: int) -> None:
    """Raise `UsageError` if a batch of this size has fewer examples than the training has processes."""
    n = processes()
    if batch < n:
        raise UsageError(
            f"a batch of {batch} is too small for {n} processes; start fewer processes",
            Remedy("recipe.training.batch", n * 32),
        )


def share(rows: Tensor) -> Tensor:
    """Return the part of the positions `rows` of a batch that this process of a data-parallel training uses."""
    refuse_few(len(rows))
    return rows[rank() :: processes()]


def mean_factor(n_own: int, n_total: int) -> float:
    """Return the factor for a mean over the `n_own` rows of this process, with which the mean over all processes equals
    the mean over all rows.

    `n_own` is the number of rows of this process.
    """
    return n_own * processes() / n_total


@torch.no_grad()
def average(values: Iterable[Tensor | None]) -> None:
    """Replace each tensor in place by its mean over the processes of a data-parallel training. Integer tensors are
    unchanged.
    """
    if processes() == 1:
        return
    fractions = [value for value in values if value is not None and value.is_floating_point()]
    if not fractions:
        return
    # one message for all tensors; float32, because a sum in half precision loses digits
    concatenated = torch.cat(
        [value.flatten().to(torch.promote_types(value.dtype, torch.float32)) for value in fractions]
    )
    with _connected():
        dist.all_reduce(concatenated)
    concatenated /= processes()
    means = torch.split(concatenated, [value.numel() for value in fractions])
    for value, mean in zip(fractions, means, strict=True):
        value.copy_(mean.view_as(value))


Pacing = Callable[[int, int, int, TrainingPlan | None], TrainingPlan]
"""function that plans the number of updates of a training, from the number of completed updates, that of the current
epoch, the updates of an epoch, and the previous plan"""
_TRAINED = 9.0  # smallest time of training before an evaluation, in multiples of the time of the evaluation


def evaluation_interval(update_s: float, look_s: float, per_epoch: int) -> int:
    """Return the number of updates between two evaluations within a time budget: whole epochs, so that evaluations and
    checkpoints take at most about a tenth of the time.
    """
    epoch_s = max(per_epoch * update_s, 1e-9)
    return per_epoch * max(math.ceil(_TRAINED * look_s / epoch_s), 1)


def most_evaluations(updates_s: float, look_s: float) -> int:
    """Return the largest number of evaluations in the rest of a training whose updates take `updates_s` seconds."""
    return int(updates_s / max(_TRAINED * look_s, 1e-9)) + 1


class Plans:
    """All plans of a training so far, in order. Within a time budget, the number of updates is planned again as the
    training proceeds.
    """

    def __init__(self, epochs: int, per_epoch: int, pacing: Pacing | None) -> None:
        self.per_epoch, self._pacing = per_epoch, pacing
        n_updates = epochs * per_epoch
        self._plans = [TrainingPlan(0, 0.0, n_updates, n_updates)] if pacing is None else []
        self.updates = 0
        """number of completed updates"""

    @property
    def paced(self) -> bool:
        """Whether the training has a time budget, so that its number of updates is planned by the clock."""
        return self._pacing is not None

    @property
    def end(self) -> int:
        """Total number of updates of the training according to the last plan."""
        return self._plans[-1].end

    @property
    def first_end(self) -> int:
        """Total number of updates of the training according to the first plan."""
        return self._plans[0].end

    def resume(self, after: Checkpoint) -> None:
        """Continue the plans of a training from a checkpoint, also if the number of updates in an epoch has changed
        since then.
        """
        self.updates = after.epoch * self.per_epoch + after.step
        if not self.paced or not after.plans:
            return
        self._plans, last = list(after.plans), after.plans[-1]
        if after.updates >= last.end:
            self.updates = after.updates
        elif after.updates != self.updates:  # batches became smaller when memory ran out
            times = self.updates / after.updates
            share, update_s = last.done(after.updates), last.update_s / times
            end = max(round(last.end * times), self.updates + 1)
            at = self.updates
            self._plans.append(
                replace(last, at=at, share=share, end=end, review=end, update_s=update_s, looked=at)
            )

    def ended(self) -> bool:
        """Return whether all planned updates of the training are completed."""
        return bool(self._plans) and self.updates >= self.end

    def evaluated(self) -> bool:
        """Return whether the model is evaluated at the end of the current epoch. Without a time budget it always is,
        and otherwise after the first epoch, if enough updates were made since the last evaluation, and at the end.
        """
        if not self.paced or self.ended():
            return True
        last = self._plans[-1]
        interval = evaluation_interval(last.update_s, last.look_s, self.per_epoch)
        return not last.looked or self.updates - last.looked >= interval

    def due(self) -> bool:
        """Return whether a new plan of the training must be made now, as the last plan requested."""
        return self.paced and self.updates >= self._plans[-1].review

    def review(self, position: int) -> None:
        """Make a new plan of the training after `position` updates of an epoch, if there is a time budget. Several
        processes use the clock of the first one.
        """
        if self._pacing is not None and not self.ended():
            last = self._plans[-1] if self._plans else None
            # two clocks never agree, and all processes must end after the same update
            self._plans.append(broadcast(self._pacing(self.updates, position, self.per_epoch, last)))

    def rewind(self, updates: int, position: int) -> None:
        """Set the number of completed updates of the training back to `updates`, `position` of them in the current
        epoch, because later updates were undone. The used time does not change.

        The number of remaining updates is the same as without going back.
        """
        if self.paced:
            share = self.at(updates).done(updates)
            self.review(position + self.updates - updates)
            n_left = max(self.end - self.updates, 0)
            end = updates + n_left
            plan = replace(
                self._plans[-1], at=updates, share=share, end=end, review=updates + 1, rewound=True
            )
            self._plans.append(plan)
        self.updates = updates

    def at(self, updates: int) -> TrainingPlan:
        """Return the plan of the training that applies after `updates` updates."""
        return next(plan for plan in reversed(self._plans) if plan.at <= updates)

    @property
    def share(self) -> float:
        """Completed fraction of the training, on which the schedules of learning rate and eps depend."""
        return self.at(self.updates).done(self.updates)

    @property
    def kept(self) -> tuple[TrainingPlan, ...]:
        """Plans that a checkpoint of the training contains: all of them if there is a time budget, else none."""
        return tuple(self._plans) if self.paced else ()


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
