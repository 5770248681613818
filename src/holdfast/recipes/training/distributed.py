"""Data-parallel training: each process trains on a part of every batch, and the gradients are averaged.

The processes are started by torchrun and communicate through torch.distributed. Random numbers depend on the example
and not on the process, so that any number of processes trains the same weights up to the order of sums. There are two
exceptions: batch norm uses the statistics of the part of each process, which are averaged, and dropout has its own
random numbers in each process.
"""

import functools
import importlib
import itertools
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from holdfast.core.errors import TargetError, UsageError
from holdfast.core.remedies import Remedy

if TYPE_CHECKING:  # builds of torch without torch.distributed have no stores
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
