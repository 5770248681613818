"""Several processes that train one network: each takes its share of every batch, and the gradients are averaged.

They are those that torchrun starts, and talk through torch.distributed. What is drawn belongs to an example and not to
a process, so that any number of them trains the weights of one, up to the order of sums; but for batch norm, whose
statistics are those of a share, and are averaged, and for dropout, which each process draws on its own.
"""

import importlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from holdfast.core.errors import TargetError, UsageError

T = TypeVar("T")
_PATIENT = timedelta(days=7)  # the others wait while the first judges


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Within it the processes that torchrun started know each other; alone, or in a group that is there, nothing."""
    if started() == 1 or not dist.is_available() or dist.is_initialized():
        yield
        return
    if "RANK" not in os.environ:
        raise UsageError(
            f"WORLD_SIZE is {started()} and RANK is not set, so nobody knows which process this is; start them with "
            f"torchrun, or unset WORLD_SIZE"
        )
    if device.type == "cuda":
        torch.cuda.set_device(_local())
    # torch binds the group that is there as a default when it imports this, as an optimizer's first step does; such a
    # group is never taken down, and a thread of it that still lets go of a tensor aborts the process as it ends
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_PATIENT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def started() -> int:
    """How many processes there are, by the group that is there or else by torchrun; 1 without them."""
    return dist.get_world_size() if _grouped() else int(os.environ.get("WORLD_SIZE", "1"))


def processes() -> int:
    """How many train together."""
    return dist.get_world_size() if _grouped() else 1


def rank() -> int:
    """Which of them this is."""
    return dist.get_rank() if _grouped() else int(os.environ.get("RANK", "0"))


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def first() -> bool:
    """Whether this is the one that judges and writes."""
    return rank() == 0


def own(device: torch.device) -> torch.device:
    """The GPU of this process, where torchrun started several; any other device as it is."""
    return torch.device("cuda", _local()) if device.type == "cuda" and started() > 1 else device


def _local() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def broadcast(value: T) -> T:
    """The value of the first process, in all of them."""
    if processes() == 1:
        return value
    held = [value]
    with _heard():
        dist.broadcast_object_list(held)
    return held[0]


@contextmanager
def _heard() -> Iterator[None]:
    """Within it the loss of another process is no error of this one."""
    try:
        yield
    except RuntimeError as error:  # which is all that gloo and NCCL raise
        raise TargetError(
            f"this process no longer hears the others: {error}. Where one of them has ended, its own message says why"
        ) from error


def refuse_few(batch: int) -> None:
    """`UsageError` where a batch of that size leaves a process without an example."""
    n = processes()
    if batch < n:
        raise UsageError(
            f"a batch of {batch} is too small for {n} processes; give a larger one, as in "
            f"--set recipe.training.batch={n * 32}, or start fewer"
        )


def share(rows: Tensor) -> Tensor:
    """The part of the rows of a batch that falls to this process."""
    refuse_few(len(rows))
    return rows[rank() :: processes()]


def worth(mine: int, all_of_them: int) -> float:
    """What the mean over a share is multiplied with, so that the mean over the processes is that over all rows."""
    return mine * processes() / all_of_them


@torch.no_grad()
def average(values: Iterable[Tensor | None]) -> None:
    """Make each tensor the mean over the processes, in place; what holds no fractions is left as it is."""
    if processes() == 1:
        return
    fractions = [value for value in values if value is not None and value.is_floating_point()]
    if not fractions:
        return
    whole = torch.cat(
        [value.flatten().to(torch.promote_types(value.dtype, torch.float32)) for value in fractions]
    )
    with _heard():
        dist.all_reduce(whole)
    whole /= processes()
    means = torch.split(whole, [value.numel() for value in fractions])
    for value, mean in zip(fractions, means, strict=True):
        value.copy_(mean.view_as(value))
