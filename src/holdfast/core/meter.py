"""Calls of a model: queries are counted by purpose and the query budget is enforced, and a batch is processed in pieces
that fit into memory.
"""

import ctypes
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from holdfast.core.batch import Batch, Lookup
from holdfast.core.constraints import allowed, extent
from holdfast.core.errors import BudgetSpent, TargetError, UsageError
from holdfast.core.model import Bounds, Model, out_of_memory
from holdfast.core.outputs import refused
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Ids, Inputs, Labels, Logits, PerExample

LOOK = "look"
"""name, in place of a stage, for the examination of the model before the first stage, and for queries that open the
data"""
Kind = Literal["clean", "attacks", "doubts", "judging"]


@dataclass(frozen=True)
class Purpose:
    """Purpose of a query: the stage and shard of a run that make it, and whether it serves the clean pass, an attack, a
    doubt or the final evaluation.
    """

    stage: str = LOOK
    """name of a stage, or `LOOK`"""
    shard: int = 0
    kind: Kind = "clean"


_FIRST = Purpose()
_PURPOSE: ContextVar[Purpose] = ContextVar("purpose", default=_FIRST)


def current() -> Purpose:
    """Return the current purpose of queries. If none was set, it is the first examination of the model."""
    return _PURPOSE.get()


@contextmanager
def purpose(stage: str, shard: int, kind: Kind) -> Iterator[None]:
    """Context manager that sets the purpose of all queries inside it: a stage, a shard and a kind."""
    token = _PURPOSE.set(Purpose(stage, shard, kind))
    try:
        yield
    finally:
        _PURPOSE.reset(token)


@contextmanager
def judging() -> Iterator[None]:
    """Context manager for the final evaluation of attacked inputs, whose queries are then counted as "judging" and no
    longer as "attacks".
    """
    outer = current()
    token = _PURPOSE.set(replace(outer, kind="judging") if outer.kind == "attacks" else outer)
    try:
        yield
    finally:
        _PURPOSE.reset(token)


def margin(logits: Logits, batch: Batch) -> PerExample:
    """Return the margin of each example, which is positive while the example is not broken. Zero (a tie) and NaN count
    as broken.

    Untargeted: the label's logit minus the largest other one. With targets: the largest other logit minus the target's.
    """
    classes = batch.y if batch.target is None else batch.target
    return lead_of(logits, classes) if batch.target is None else -lead_of(logits, classes)


def lead_of(logits: Logits, classes: Labels) -> PerExample:
    """Return for each row of logits the logit of its class in `classes` minus the largest other logit (n)."""
    logit = logits.gather(1, classes[:, None])[:, 0]
    return logit - logits.scatter(1, classes[:, None], -torch.inf).amax(1)


@dataclass(frozen=True)
class Spent:
    """Number of queries, number of computed gradients and first successful query of an attack for each example (n)."""

    queries: Tensor
    """number of evaluations of the model"""
    first_success: Tensor
    """number of the query at which an allowed input first broke the model; 0 if there was none"""
    backwards: Tensor
    """number of gradients that were computed"""
    dead: Tensor
    """whether the first gradient was zero or not finite (bool); False if none was computed"""
    items: Mapping[str, Tensor] = field(default_factory=dict)
    """further columns of an attack that itemises what its parts did"""


class Metered:
    """Wrapper of a model for one attack on one batch. It counts queries and enforces the access and the query budget of
    the threat model.

    A call counts one query for the id of each row. It raises `BudgetSpent` before the model is evaluated if any id has
    no query left. Under a query limit the first success of each example is stored (without an eps, the closest one), so
    that an interrupted attack loses nothing. With access "labels" the logits are one-hot, or NaN where the model's are;
    with "labels" and "scores" they have no gradient. If the model is `graded`, attacks lower a margin that stays
    positive, and the stored input of each example is the one with the lowest margin.
    """

    def __init__(self, model: Model, batch: Batch, threat: ThreatModel, *, graded: bool = False) -> None:
        self._model, self._batch, self._threat = model, batch, threat
        self._lookup = Lookup(batch.ids)
        self._queries = torch.zeros(len(batch), dtype=torch.int64, device=batch.ids.device)
        self._first = torch.zeros_like(self._queries)
        self._backwards = torch.zeros_like(self._queries)
        self._dead = torch.zeros_like(self._queries, dtype=torch.bool)
        self._gradient_seen = False
        self._successes: dict[int, tuple[float, Tensor]] = {}
        self._smallest = threat.constraint.eps == torch.inf
        self._lowest = torch.full_like(self._queries, torch.inf, dtype=torch.float64) if graded else None
        self._last_ids: Ids | None = None
        self._last_rows: tuple[Tensor, Tensor, Labels]
        self._last_clean: Inputs | None = None
        # above the tolerance of `allowed` with a wide margin, so that no allowed input is missed
        self._nearly_eps = threat.constraint.eps * (1 + 1e-3) + 1e-6 * max(1.0, self._extent())

    def _extent(self) -> float:
        return extent(self._threat.constraint, self._batch.x, self.bounds) if len(self._batch) else 0.0

    @property
    def bounds(self) -> Bounds:
        """Lowest and highest valid values of the inputs of the model."""
        return self._model.bounds

    @property
    def spent(self) -> Spent:
        """Numbers of queries and gradients that the attack has used so far for each example."""
        return Spent(self._queries.clone(), self._first.clone(), self._backwards.clone(), self._dead.clone())

    def adversarial(self) -> Inputs:
        """Return the adversarial examples that an attack under a query budget has found so far: the first of each
        example or, without an eps, the closest. Other examples have their clean input.
        """
        x = self._batch.x.clone()
        for row, (_, x_adv) in self._successes.items():
            x[row] = x_adv
        return x

    def __call__(self, x: Inputs, ids: Ids | None = None) -> Logits:
        """Return the logits of `x`, counted as queries of `ids` (if None, all examples of the batch in order)."""
        rows, ones, classes = self._rows_of(x, ids)
        # not in place: if the budget is exceeded, the counts must not change
        earlier, queries = self._queries, self._queries.index_add(0, rows, ones)
        if self._threat.queries is not None and (queries > self._threat.queries).any():
            raise BudgetSpent(f"all {self._threat.queries} queries are used")
        self._queries = queries
        if self._threat.access == "gradients":
            logits = self._model(x, ids)
            if x.requires_grad and not self._gradient_seen:
                self._record_first_gradient(x, logits, rows)
            if logits.requires_grad:
                logits.register_hook(lambda _: self._count_backwards(rows, ones))  # type: ignore[no-untyped-call]
        else:
            with torch.no_grad():
                logits = self._model(x.detach(), ids)
        self._record(x.detach(), logits.detach(), rows, classes, earlier)
        if self._threat.access == "labels":
            labels = torch.nn.functional.one_hot(logits.argmax(1), logits.shape[1]).to(logits.dtype)
            return labels.masked_fill(
                logits.isnan().any(1, keepdim=True), torch.nan
            )  # NaN has no label and counts as broken
        return logits

    def _record_first_gradient(self, x: Inputs, logits: Logits, rows: Tensor) -> None:
        """Record which examples have a zero or non-finite first gradient; all of them if the model cuts the graph."""
        self._gradient_seen = True

        def note(grad: Tensor) -> None:
            flat = grad.flatten(1)
            self._dead[rows] = (flat == 0).all(1) | ~flat.isfinite().all(1)

        if logits.requires_grad:
            x.register_hook(note)  # type: ignore[no-untyped-call]
        else:
            self._dead[rows] = True

    def _count_backwards(self, rows: Tensor, ones: Tensor) -> None:
        self._backwards.index_add_(0, rows, ones)

    def _rows_of(self, x: Inputs, ids: Ids | None) -> tuple[Tensor, Tensor, Labels]:
        """Rows of `ids` in the batch, a one for each, and the class that determines success.

        The result is cached, because an attack usually queries the same rows many times.
        """
        ids = self._batch.ids if ids is None else ids
        if len(x) != len(ids):
            raise UsageError(
                f"{len(x)} inputs have {len(ids)} ids; pass the ids of their rows: model(x, batch.ids)"
            )
        if ids is not self._last_ids:
            try:
                rows = self._lookup.rows(ids)
            except KeyError as strange:
                raise UsageError(
                    f"the id {strange} does not belong to an attacked example; pass the ids of the rows: model(x, "
                    "batch.ids)"
                ) from None
            judge = self._batch.y if self._batch.target is None else self._batch.target
            self._last_ids, self._last_rows = ids, (rows, torch.ones_like(rows), judge[rows])
            self._last_clean = None
        return self._last_rows

    def _record_lowest(self, x: Inputs, logits: Logits, rows: Tensor, classes: Labels) -> None:
        """Keep the allowed inputs with the lowest margins."""
        assert self._lowest is not None
        margins = lead_of(logits, classes).double()
        at = (margins < self._lowest[rows]).nonzero()[:, 0]
        at = at[allowed(self._threat.constraint, x[at], self._batch.x[rows[at]], self.bounds)]
        for k in at.tolist():  # a row may occur several times
            row = int(rows[k])
            if float(margins[k]) < float(self._lowest[row]):
                self._lowest[row], self._successes[row] = margins[k], (0.0, x[k].clone())

    def _record(self, x: Inputs, logits: Logits, rows: Tensor, classes: Labels, earlier: Tensor) -> None:
        """Record the first query that breaks each example with an allowed input; `earlier` are the previous counts."""
        if self._lowest is not None and self._threat.queries is not None:
            self._record_lowest(x, logits, rows, classes)
            return
        label = logits.gather(1, classes[:, None])
        lower = int((logits < label).sum())  # comparisons with NaN are false, so that it counts as broken
        if self._batch.target is None and lower == logits.numel() - len(logits):
            return  # most queries break nothing
        limited, unbroken = self._threat.queries is not None, self._first[rows] == 0
        if not limited and not unbroken.any():
            return
        lead = lead_of(logits, classes)
        margins = lead if self._batch.target is None else -lead
        broken = ~(margins > 0)
        if not broken.any():
            return
        improved = broken & unbroken
        if limited and self._smallest:  # a closer success replaces it, unless its margin is within rounding
            improved |= margins < -100 * torch.finfo(logits.dtype).eps * logits.abs().amax(1)
        at = improved.nonzero()[:, 0]
        if not len(at):
            return
        if self._last_clean is None:
            self._last_clean = self._batch.x[rows]
        constraint, clean = self._threat.constraint, self._last_clean
        # `allowed` is checked only near the ball: minimum-norm attacks break examples outside of it many times
        pair = (x, clean) if len(at) == len(x) else (x[at], clean[at])
        distance = constraint.distance(*pair)
        at, distance = at[distance <= self._nearly_eps], distance[distance <= self._nearly_eps]
        if not len(at):
            return
        legal = allowed(constraint, x[at], clean[at], self.bounds)
        at, distance = at[legal], distance[legal]
        new = at[unbroken[at]]
        n_queries = (earlier[rows] + _occurrence(rows))[new]
        self._first.scatter_reduce_(0, rows[new], n_queries, "amin", include_self=False)
        if limited:
            self._store(x, rows, at, distance)

    def _store(self, x: Inputs, rows: Tensor, at: Tensor, distance: Tensor) -> None:
        """Keep the successful rows `at` of `x`: the first of each example, or the closest without an eps."""
        for k, row, length in zip(at.tolist(), rows[at].tolist(), distance.tolist(), strict=True):
            stored = self._successes.get(row)
            if stored is None or (self._smallest and length < stored[0]):
                self._successes[row] = length, x[k].clone()


def _occurrence(rows: Tensor) -> Tensor:
    """For each entry of `rows`, its count among equal entries so far, from 1."""
    order = rows.argsort(stable=True)
    grouped = rows[order]
    begins = torch.searchsorted(grouped, grouped)
    counts = torch.empty_like(rows)
    counts[order] = torch.arange(1, len(rows) + 1, device=rows.device) - begins
    return counts


_LEAD = 1.0  # smallest margin of a rejected input, also before any input of its example was answered


def for_label(logits: Logits, y: Labels, lead: PerExample | float = _LEAD) -> Logits:
    """Return logits (n, classes) in which each input that the server rejected counts as classified with its label `y`,
    with the margin `lead`.
    """
    rows = refused(logits)
    if not rows.any():
        return logits
    label_logits = torch.zeros_like(logits)
    label_logits.scatter_(1, y[:, None], torch.as_tensor(lead, dtype=logits.dtype).expand(len(y))[:, None])
    return torch.where(rows[:, None], label_logits, logits)


class Answering:
    """Wrapper of a served model for an attack on a batch. Inputs that the server rejects get logits with a large
    margin, so that the attack avoids them.

    The margin of a rejected input is the largest margin of any answer for its example so far, so that no attack moves
    there.
    """

    def __init__(self, model: Model, batch: Batch) -> None:
        self._model, self._batch = model, batch
        self._lookup = Lookup(batch.ids)
        self._lead: Tensor | None = None

    @property
    def bounds(self) -> Bounds:
        """Lowest and highest valid values of the inputs of the model."""
        return self._model.bounds

    def __call__(self, x: Inputs, ids: Ids | None = None) -> Logits:
        """Return the logits (n, classes) of the inputs; those of rejected inputs are replaced."""
        rows = self._lookup.rows(self._batch.ids if ids is None else ids)
        logits = self._model(x, ids)
        y = self._batch.y[rows]
        if self._lead is None:
            self._lead = torch.full_like(self._batch.ids, _LEAD, dtype=logits.dtype)
        lead = lead_of(logits, y)  # NaN for a rejected row
        self._lead.scatter_reduce_(0, rows, lead.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0), "amax")
        return for_label(logits, y, self._lead[rows])


_T = TypeVar("_T")
PIECE = 256
"""default number of examples in a piece"""
_VALUES = 1 << 20
"""Input values in one batch on a CPU: 256 small images, or a few large ones."""
_ACCELERATED = 1 << 26  # the same on an accelerator, which needs larger batches to be busy


def batch_size_for(features: int, device: str) -> int:
    """Return a batch size for inputs of `features` values on a device. The run halves it if memory runs out."""
    kind = torch.device(device).type
    values, largest = (_VALUES, 256) if kind == "cpu" else (_ACCELERATED, 2048)
    return max(8, min(largest, 1 << max(0, (values // max(features, 1)).bit_length() - 1)))


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of `mallopt` in glibc's malloc.h
_LARGEST_MAPPED = 1 << 25  # to which glibc itself raises the threshold of mapped blocks at most


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Context manager in which the process keeps freed memory for its next allocations, where the C library is glibc.
    On exit, free memory is returned to the operating system.

    Otherwise the activations of a pass may be returned after it, and the next pass has a page fault for each 4 KiB:
    up to a quarter of the CPU time of networks with activations of 10 MB and more.
    """
    try:
        library = ctypes.CDLL(None)
        mallopt, trim = library.mallopt, library.malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, or Windows
        yield
        return
    if not mallopt(_MMAP_THRESHOLD, 1 << 30):  # older versions refuse more than they set themselves
        mallopt(_MMAP_THRESHOLD, _LARGEST_MAPPED)
    mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, _LARGEST_MAPPED)
        mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_MAPPED)
        trim(0)


@dataclass
class Room:
    """Number of examples that are processed at once in a shard. If memory runs out, it is halved for the rest of the
    shard.
    """

    size: int
    known: Mapping[int, int] = field(default_factory=dict)
    """numbers of examples with which an earlier attempt continued, by the row at which memory ran out"""
    halved: Callable[[int, int], None] = field(default=lambda row, size: None)
    """function that is called with the row at which memory ran out and the next size, before that size is tried"""
    progress: Callable[[int], None] = field(default=lambda n: None)
    """function that is called with the number of examples that were just finished"""
    n_broken: int = 0
    """number of finished examples that an attack broke"""

    def enter(self, row: int) -> int:
        """Return the number of examples to process at once from the position `row` of a shard on. It is at most the
        number with which an earlier attempt continued there.
        """
        self.size = min(self.size, self.known.get(row, self.size))
        return self.size

    def halve(self, row: int, n_left: int, error: BaseException) -> None:
        """Halve the number of examples that are processed at once, because memory ran out. An `error` with another
        cause is raised again.

        `n_left` examples, from `row` on, are not processed yet. Raises `TargetError` if memory is too small for one
        example.
        """
        self.size = half_batch(min(self.size, n_left), error)
        self.halved(row, self.size)


def half_batch(size: int, error: BaseException) -> int:
    """Return half of the batch size `size`, with which memory ran out.

    Raises `TargetError` if it is one example, and `error` again if it has another cause than missing memory.
    """
    if not out_of_memory(error):
        raise error
    if size == 1:
        raise no_memory(1, error) from error
    return size // 2


class Pieces:
    """The pieces of a batch that fit into memory, as an iterator, and the columns that are computed from them.

        pieces = Pieces(batch, room)
        for piece in pieces:
            with pieces.attempt():
                pieces.add(compute(piece))
        columns = pieces.columns()

    If memory runs out inside `attempt`, the size of `room` is halved, and the next piece starts at the same example.
    """

    def __init__(self, batch: Batch, room: Room, first: int = 0) -> None:
        """Create the pieces of a batch whose first example is at the row `first` of its shard."""
        self._batch, self._room, self._first = batch, room, first
        self._start, self._stop = 0, 0
        self._done: list[dict[str, Tensor]] = []

    def __iter__(self) -> Iterator[Batch]:
        """Yield the next piece until all examples are processed."""
        n = len(self._batch)
        while self._start < n:
            self._stop = min(self._start + self._room.enter(self._first + self._start), n)
            yield self._batch.take(torch.arange(self._start, self._stop, device=self._batch.ids.device))

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Context manager for processing one piece of a batch. If memory runs out inside it, the size of the next
        pieces is halved; other errors are raised.
        """
        try:
            yield
        # torch reports missing memory as a `RuntimeError`; `halve` raises all other errors again
        except (RuntimeError, MemoryError) as error:
            self._room.halve(self._first + self._start, len(self._batch) - self._start, error)

    def add(self, columns: dict[str, Tensor]) -> None:
        """Append the columns that were computed from the current piece to those of the earlier pieces."""
        self._done.append(columns)
        if "success" in columns:
            self._room.n_broken += int(columns["success"].sum())
        self._room.progress(self._stop - self._start)
        self._start = self._stop

    def columns(self) -> dict[str, Tensor]:
        """Return the columns of all pieces concatenated, in the order of the examples. There are none for an empty
        batch.
        """
        first = self._done[0] if self._done else {}
        return {name: torch.cat([columns[name] for columns in self._done]) for name in first}


def in_pieces(work: Callable[[Batch], dict[str, Tensor]], batch: Batch, room: Room) -> dict[str, Tensor]:
    """Call `work` for pieces of a batch that fit into memory, and return the columns of all pieces, concatenated in the
    order of the examples.
    """
    pieces = Pieces(batch, room)
    for piece in pieces:
        with pieces.attempt():
            pieces.add(work(piece))
    return pieces.columns()


def results_in_pieces(data: Batch, work: Callable[[Batch], _T], size: int = PIECE) -> list[_T]:
    """Call `work` for pieces of at most `size` examples, and return the list of its results in order. If memory runs
    out, the size is halved.

    The result for an example must not depend on the other examples.
    """
    results: list[_T] = []
    room, start = Room(size), 0
    while start < len(data):
        rows = torch.arange(start, min(start + room.size, len(data)), device=data.ids.device)
        try:
            results.append(work(data.take(rows)))
        except (RuntimeError, MemoryError) as error:
            room.halve(start, len(data) - start, error)
            continue
        start += len(rows)
    return results


def in_room(work: Callable[[int], _T], room: Room, row: int, n_left: int) -> _T:
    """Return the result of `work` for as many examples at once as fit into memory. If memory runs out, the number is
    halved and `work` is called again.

    `n_left` examples, from `row` on, are not processed yet. Raises `TargetError` if memory is too small for one
    example.
    """
    while True:
        try:
            return work(room.enter(row))
        except (RuntimeError, MemoryError) as error:
            room.halve(row, n_left, error)


def no_memory(n: int, error: BaseException) -> TargetError:
    """Return the error for memory that is too small for `n` examples, where `n` is the smallest possible batch size."""
    many = "one example" if n == 1 else f"{n} examples"
    way_out = "give it a machine or a device with more, or a smaller model"
    return TargetError(f"memory ran out with {many} at a time ({error}); {way_out}")
