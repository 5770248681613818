"""Data sets from Python objects: tensors, arrays, torch loaders and torch datasets."""

import pickle
import random
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image
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

from holdfast.core.batch import UNLABELLED, Batch, Data, array_of_files
from holdfast.core.errors import TargetError, UsageError, data_argument
from holdfast.core.names import kind_of
from holdfast.io.data.arrays import SUPPORTED, Array, Arrays, from_numpy
from holdfast.io.data.data import concatenated
from holdfast.io.data.labels import Numbered, numbered, whole_numbers
from holdfast.io.data.layouts import DeclaredData
from holdfast.io.data.pictures import pixels_of

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


_BATCH = 256
"""Number of items of a dataset that are read at a time."""
_INPUTS = ("pixel_values", "input_values", "image", "img", "x")
"""Entries of batches that are the inputs by default: those of the models and of the data sets of Hugging Face."""
_TOKENS = ("input_ids",)
"""Entries of batches that are ids of tokens, in the data sets of Hugging Face."""
_LABELS = ("labels", "label", "y")
"""Entries of batches that are the labels by default."""

_EXPECTED_PAIRS = "one label for each input was expected: give (x, y), or a loader or dataset of such pairs"
"""end of the messages for inputs without labels"""


def as_data(
    x: object,
    y: object = None,
    *,
    name: str = "data in memory",
    expected: DeclaredData | None = None,
    n: int | None = None,
    entries: tuple[str | None, str | None] = (None, None),
) -> Data:
    """Return a data set made from inputs `x` and labels `y`, or from a loader or dataset of pairs or of mappings. A
    `Data` object is returned unchanged.

    The layout of tensors is preserved, whatever their type, as are the types float32 and float64. numpy arrays are
    interpreted as in an `.npz` file. String labels are class names. A loader is read once, into memory, and only up to
    its first `n` examples if `n` is given. `entries` are the names of the inputs and of the labels in mappings, if they
    are not the usual ones. `expected` declares properties of the data.
    """
    expected = expected or DeclaredData()
    if y is None and isinstance(x, Tensor | np.ndarray) and not expected.needs_labels:
        y, expected = np.full(len(x), UNLABELLED), replace(expected, checks_labels=False)
    if y is None:
        if isinstance(x, Data):
            return _user_defined(x, expected)
        if isinstance(x, Mapping) or (isinstance(x, tuple) and len(x) == 2):
            x, y = _pair(x, entries)
        else:
            x, y = _collected(x, n, entries)
    if y is None:
        raise TargetError(f"the labels are None; {_EXPECTED_PAIRS}")
    inputs = as_array(x, "inputs")
    labels = as_array(y, "labels")
    numbering = (
        Numbered(labels) if expected.task is not None else numbered(whole_numbers(labels), expected, name)
    )
    ids = np.arange(len(inputs), dtype=np.int64)
    resolution = torch.finfo(x.dtype).eps if isinstance(x, Tensor) and x.is_floating_point() else None
    data = from_numpy(
        name,
        inputs,
        numbering.y,
        ids,
        expected,
        class_names=numbering.names,
        preserve=isinstance(x, Tensor),
        resolution=resolution,
    )
    return data.labelled(numbering)


def _user_defined(data: Data, expected: DeclaredData) -> Data:
    """Return a data set of a class that the caller defined, unchanged.

    Raises `UsageError` if a normalisation or a layout is declared, because the class itself reads the examples.
    """
    if expected.normalised is not None or expected.layout is not None:
        raise UsageError(
            f"{data.name} is {kind_of(data)}, whose own method reads the examples, so data_normalised and "
            "layout cannot be applied; give the arrays (x, y)"
        )
    if expected.probe is not None and len(data):
        expected.probe.suit(data.read(0, min(2, len(data))).x)
    return data


def _collected(
    batches: object, n: int | None, entries: tuple[str | None, str | None]
) -> tuple[object, object]:
    """Return the inputs and labels of a loader or a dataset: all, or the batches that contain the first `n`
    examples.
    """
    if isinstance(batches, Tensor | np.ndarray):
        raise TargetError(f"data is {kind_of(batches)} without labels; {_EXPECTED_PAIRS}")
    if isinstance(batches, torch.utils.data.Dataset):
        batches = torch.utils.data.DataLoader(batches, batch_size=_BATCH if n is None else min(n, _BATCH))
    if isinstance(batches, torch.utils.data.DataLoader):
        batches = in_order(batches)
    if not isinstance(batches, Iterable):
        raise TargetError(f"data is {kind_of(batches)}; (x, y), a loader, a dataset or a path was expected")
    xs: list[Tensor] = []
    ys: list[Tensor] = []
    read = 0
    for batch in batches:
        x, y = tensors_in(batch, entries)
        xs.append(x)
        ys.append(y)
        read += len(ys[-1]) if ys[-1].dim() else 1
        if n is not None and read >= n:
            break
    if not xs:
        raise TargetError("the data yield no batch; at least one was expected")
    if {each.shape[ys[0].dim() :] for each in xs} != {xs[0].shape[ys[0].dim() :]}:
        raise TargetError(
            f"the inputs have the shapes {', '.join(map(str, {tuple(each.shape) for each in xs}))}; give inputs of one "
            "shape"
        )
    joined = torch.stack if ys[0].dim() == 0 else torch.cat
    return joined(xs), joined(ys)


def tensors_in(batch: object, entries: tuple[str | None, str | None]) -> tuple[Tensor, Tensor]:
    """Return the inputs and the labels of a batch, which is a pair, or a mapping with names, as tensors."""
    x, y = _pair(batch, entries)
    inputs = torch.from_numpy(pixels_of(x)) if isinstance(x, Image.Image) else torch.as_tensor(x)
    return inputs, torch.as_tensor(y)


def _pair(batch: object, entries: tuple[str | None, str | None]) -> tuple[object, object]:
    """Return the inputs and the labels of a batch, which is a pair, or a mapping with names."""
    if isinstance(batch, Mapping):
        return batch[_entry(batch, entries[0], "x", _INPUTS)], batch[_entry(batch, entries[1], "y", _LABELS)]
    if given := [
        f"{key}={name!r}" for key, name in zip(("x", "y"), entries, strict=True) if name is not None
    ]:
        raise UsageError(
            f"{', '.join(given)} is the name of an entry, but the data yield {kind_of(batch)}, which has no "
            "named entries",
            *(data_argument(part.partition("=")[0]) for part in given),
        )
    if isinstance(batch, Tensor | np.ndarray) or (isinstance(batch, (tuple, list)) and len(batch) == 1):
        raise TargetError(f"the data yield inputs without labels; {_EXPECTED_PAIRS}")
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise TargetError(
            f"the data yield {kind_of(batch)}; pairs (x, y) of a batch, or mappings such as "
            "{'pixel_values': x, 'labels': y}, were expected"
        )
    return batch[0], batch[1]


def _entry(batch: Mapping[str, object], name: str | None, argument: str, usual: tuple[str, ...]) -> str:
    """Return the name of the inputs or of the labels in a batch. Raises `TargetError` if it is not unique."""
    sought_inputs = (name,) if name is not None else (*_INPUTS, *_TOKENS)
    if argument == "x" and next((each for each in sought_inputs if each in batch), None) in _TOKENS:
        raise TargetError(
            f"the batches are mappings with the entries {', '.join(map(str, batch))}. {SUPPORTED}"
        )
    candidates = [each for each in ((name,) if name is not None else usual) if each in batch]
    if len(candidates) == 1:
        return candidates[0]
    what = "inputs" if argument == "x" else "labels"
    sought = repr(name) if name is not None else f"one of {', '.join(usual)}"
    others = candidates or [each for each in batch if each not in (*_INPUTS, *_LABELS)] or list(batch)
    raise TargetError(
        f"the batches are mappings with the entries {', '.join(map(str, batch))}; {sought} was expected as the {what}",
        *(data_argument(argument, str(each)) for each in others[:3]),
    )


_INSPECTED = 1000
"""Number of values whose types an error message states."""


def as_array(values: object, what: str) -> Array:
    """Convert a tensor or a sequence to a numpy array. Half precision is converted to float32.

    Raises `TargetError`, whose message describes the values as `what`, if they are not an array.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        # numpy has no bfloat16, and float16 would round the results of attacks.
        return np.asarray(values.float() if values.dtype in (torch.bfloat16, torch.float16) else values)
    if not isinstance(values, np.ndarray):
        from scipy.sparse import issparse  # late, as few data are sparse

        if issparse(values):
            return _dense(values)
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise TargetError(f"the {what} are rows of different shapes: {error}") from error
    if (
        array.dtype.kind in "SO"
        and isinstance(values, list | tuple)
        and all(isinstance(v, bytes) for v in values)
    ):
        return array_of_files(values)
    if array.ndim and array.dtype.kind in "OT" and all(isinstance(value, str) for value in array.flat):
        return array.astype(str)
    if array.dtype == object or array.ndim == 0:
        kinds = sorted({type(value).__name__ for value in array.flat[:_INSPECTED]}) if array.ndim else []
        of = f" of {' and '.join(kinds)}" if kinds else ""
        raise TargetError(f"the {what} are {kind_of(values)}{of}; numbers, or only texts, were expected")
    return array


def _dense(matrix: Any) -> Array:
    """Convert a sparse matrix to an array of float32. Raises `TargetError` if the array does not fit into memory."""
    try:
        return np.asarray(matrix.astype(np.float32).toarray())
    except MemoryError as error:
        raise TargetError(
            f"the inputs are a sparse matrix of shape {matrix.shape}, which does not fit into memory as an array; give "
            "fewer rows, as in x[:1000]"
        ) from error
