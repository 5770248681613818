"""Order of the examples of a torch loader, and a source of examples that are read by index, possibly in worker
processes.
"""

import pickle
import random
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from holdfast.core.batch import Batch, Data
from holdfast.core.errors import TargetError
from holdfast.io.data.arrays import Arrays
from holdfast.io.data.selection import concatenated

_OPTIONS = ("num_workers", "prefetch_factor", "timeout", "multiprocessing_context", "persistent_workers")
"""Options of a loader that determine how fast its examples are read, and not which they are."""
_NUMPY_SEEDS = 2**32
LOCAL: Mapping[str, Any] = MappingProxyType({"num_workers": 0})
"""Options of a source that is read in this process."""


def index_order(data: object) -> Sequence[int] | None:
    """Return the indices of the examples of a torch data set or loader, in ascending order of the sampler's own list,
    or None if the examples cannot be read by index in another order.

    Samplers that shuffle all examples are replaced. One that repeats or weights them cannot be.
    """
    if isinstance(data, Dataset):
        return None if isinstance(data, IterableDataset) else range(_size(data))
    if not isinstance(data, DataLoader) or isinstance(data.dataset, IterableDataset):
        return None
    if type(data.batch_sampler) is not BatchSampler:  # also of a data set that returns whole batches
        return None
    sampler = data.sampler
    if type(sampler) is SubsetRandomSampler:
        return list(sampler.indices)
    if type(sampler) is DistributedSampler:
        return range(_size(data.dataset))
    if type(sampler) is RandomSampler:
        whole = not sampler.replacement and len(sampler) == len(sampler.data_source)
        return range(len(sampler)) if whole else None
    return range(len(sampler)) if type(sampler) is SequentialSampler else None


def _size(dataset: Any) -> int:
    return len(dataset)


def tensors_of(data: object) -> tuple[Tensor, ...] | None:
    """Return the inputs and labels of a `TensorDataset`, or of a loader that reads all of it in the usual way, or
    None.
    """
    usual = not isinstance(data, DataLoader) or data.collate_fn is default_collate
    dataset = data.dataset if isinstance(data, DataLoader) else data
    if not usual or type(dataset) is not TensorDataset or len(dataset.tensors) != 2:
        return None
    return dataset.tensors if index_order(data) == range(len(dataset)) else None


def in_order(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return a loader of the same examples that does not shuffle them, if its order can be replaced; else `loader`
    itself.
    """
    order = index_order(loader)
    if order is None or type(loader.sampler) is SequentialSampler or not isinstance(loader.batch_size, int):
        return loader
    size = loader.batch_size
    batches = [list(order[start : start + size]) for start in range(0, len(order), size)]
    return DataLoader(
        loader.dataset,
        batch_sampler=batches,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
        **options_of(loader),
    )


def options_of(data: object) -> dict[str, Any]:
    """Return the options of a loader that concern its worker processes; those of a data set are none."""
    return {name: getattr(data, name) for name in _OPTIONS} if isinstance(data, DataLoader) else dict(LOCAL)


class Source:
    """A torch data set whose examples are read by index, in any order, with the worker processes of a loader."""

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        collate: Callable[[list[Any]], Any] = default_collate,
        options: Mapping[str, Any] = LOCAL,
        begin: Callable[[int], None] | None = None,
        seeded: bool = False,
    ) -> None:
        """Create a source of the examples of `dataset`. `begin` is called at the start of a worker.

        With `seeded`, the random numbers of Python, numpy and torch are seeded before each example is read.
        """
        self._dataset, self._collate = dataset, collate
        self._options, self._begin, self.seeded = options, begin, seeded
        self._order = _Order()
        self._loader = self._new_loader()

    def _new_loader(self) -> DataLoader[Any]:
        generator = torch.Generator()  # so that torch's global generator is not used
        generator.seed()  # so that random changes of unseeded examples differ between two readings
        return DataLoader(
            _Seeded(self._dataset) if self.seeded else self._dataset,
            batch_sampler=self._order,
            collate_fn=self._collate,
            worker_init_fn=partial(_begin_worker, self._begin),
            generator=generator,
            **self._options,
        )

    @contextmanager
    def reading(self, batches: Iterable[tuple[Sequence[int], Sequence[int]]]) -> Iterator[Iterator[Any]]:
        """Context manager that yields an iterator over the collated examples of each batch, which is given by indices
        and keys. The key of an example seeds its random numbers.

        Worker processes read ahead, and end with the context, unless the options let them persist.
        """
        # another list, because an iterator of an earlier reading may still refer to its own
        self._order.batches = [
            list(zip(indices, keys, strict=True)) if self.seeded else list(indices)
            for indices, keys in batches
        ]
        iterator = self._begun()
        ended = False
        try:
            yield iterator
            ended = True
        finally:
            # explicitly, because the traceback of an exception refers to the iterator
            if isinstance(iterator, _MultiProcessingDataLoaderIter) and not (
                ended and self._loader.persistent_workers
            ):
                iterator._shutdown_workers()
                self._loader = self._new_loader()

    def _begun(self) -> Iterator[Any]:
        """An iterator over the next batches. Raises `TargetError` if worker processes cannot be started with the data
        set and the functions of the loader.
        """
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", "Got pickle error", UserWarning
                )  # the error below says more
                return iter(self._loader)
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            if not self._loader.num_workers:
                raise
            raise TargetError(
                f"the worker processes of the loader cannot be started, because its data set or one of its functions "
                f"cannot be pickled: {error}. Define its class, collate_fn and worker_init_fn at the top level of a "
                "module, or create the loader with multiprocessing_context='fork'"
            ) from error


class _Order:
    """The batches that a loader reads next, as lists of the indices of their examples."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []

    def __iter__(self) -> Iterator[list[Any]]:
        return iter(self.batches)


def _begin_worker(begin: Callable[[int], None] | None, number: int) -> None:
    """Prepare a worker process. It ignores Ctrl-C, because the main process ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if begin is not None:
        begin(number)


class _Seeded(Dataset[Any]):
    """A data set whose indices are pairs of an index and the key with which random numbers are seeded for it."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset = dataset

    def __getitems__(self, places: list[tuple[int, int]]) -> list[Any]:
        read_together = getattr(self._dataset, "__getitems__", None)
        with _global_generators_kept():
            if read_together is None or isinstance(self._dataset, Subset):
                return [self._read(index, key) for index, key in places]
            _seed(places[0][1])  # a data set that reads a batch at once may have no other way
            examples: list[Any] = read_together([index for index, _ in places])
            return examples

    def _read(self, index: int, key: int) -> Any:
        _seed(key)
        return self._dataset[index]


def _seed(key: int) -> None:
    """Seed the global random generators that data sets use."""
    torch.default_generator.manual_seed(key)
    random.seed(key)
    np.random.seed(key % _NUMPY_SEEDS)  # noqa: NPY002


@contextmanager
def _global_generators_kept() -> Iterator[None]:
    """Context manager that restores the states of the global random generators on exit."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng([]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


class RowsOfData(Dataset[Any]):
    """The examples of a `Data` object as a torch data set that returns several of them as one batch."""

    def __init__(self, data: Data) -> None:
        self.data = data

    def __getitems__(self, rows: list[int]) -> Batch:
        data = self.data
        if isinstance(data, Arrays):
            return data.taken(rows).read(0, len(rows))
        return concatenated([data.read(row, row + 1) for row in rows])


def unchanged(batch: Any) -> Any:
    """Return a batch as it is; the collation of batches that need none."""
    return batch
