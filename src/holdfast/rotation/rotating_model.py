"""A model whose parameters are swapped while it serves, so that stolen parameter sets become outdated.

Each request uses one reference to a network that is never modified. A swap builds the next network and then replaces
the reference, so that each batch is answered by a single set, and no request waits or fails because of a swap.
"""

import threading
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field

from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Bounds, Classifier
from holdfast.core.types import Ids, Inputs, Logits
from holdfast.rotation.live import Live, loaded, refuse_strange
from holdfast.rotation.triggers import AnswersPerPrincipal


@dataclass(frozen=True)
class Answers:
    """Numbers of requests of each client that a parameter set answered while it served, since the numbers were last
    written to the ledger.
    """

    name: str
    epoch: int
    principals: Mapping[str, int]
    others: int
    """number of answers to callers without a name and to callers beyond the limit of names, in total"""
    final: bool
    """whether the set was replaced and answers no further requests"""


@dataclass(eq=False)
class _Book:
    """Counts of the answers of one epoch of service. Access requires the lock of the model."""

    name: str
    epoch: int
    had: dict[str, int] = field(default_factory=dict)
    """answers by principal, counted before they are given, so that concurrent requests cannot exceed the limit"""
    others: int = 0
    most: int = 0
    under_way: int = 0
    given: dict[str | None, int] = field(default_factory=dict)
    """answers that were given and not yet collected"""

    def begin(self, principal: str | None, n: int) -> None:
        if principal is None:
            self.others += n
        else:
            self.had[principal] = self.had.get(principal, 0) + n
        self.under_way += 1

    def end(self, principal: str | None, n: int, given: int) -> None:
        if principal is None:
            self.others -= n - given
        else:
            self.had[principal] -= n - given
        if given:
            self.given[principal] = self.given.get(principal, 0) + given
            self.most = max(self.most, self.others if principal is None else self.had[principal])
        self.under_way -= 1

    def forget(self, given: Mapping[str | None, int]) -> None:
        """Subtract the answers that were written to the ledger from the counts of answers that are not in it yet."""
        for principal, n in given.items():
            self.given[principal] -= n
            if not self.given[principal]:
                del self.given[principal]


@dataclass(frozen=True, eq=False)
class _Serving:
    """A network that never changes and the counts of its epoch of service. A request keeps a reference to it."""

    model: Classifier
    book: _Book


class RotatingModel:
    """A model that serves one parameter set at a time. The function `current` returns the set that should serve, to
    which `refresh` swaps.

    `refresh` calls `current` and swaps. A new set must match its fingerprint on `canaries`. On any error an exception
    is raised, and the old set continues to serve. No output of the model reveals the epoch.

    With `sticky`, a principal is answered by the same set until it got that many answers, the set was withdrawn, or
    `kept` later sets have been replaced. Answers are counted by principal, a name that the server assigns and that no
    client chooses. At most `principals` names are stored, over all sets that are in use or not yet collected. Further
    callers are counted together as one and are answered by the live set, so a trigger may fire too early, but never too
    late.
    """

    def __init__(
        self,
        model: Classifier,
        current: Callable[[], Live],
        canaries: Inputs,
        *,
        sticky: AnswersPerPrincipal | None = None,
        kept: int = 8,
        principals: int = 100_000,
    ) -> None:
        if not len(canaries):
            raise UsageError(
                "no canary inputs were given; expected those that the sets were admitted with, such as 256 inputs"
            )
        # a copy, so that changes of the given model cannot reach a serving set
        self._pristine = deepcopy(model).eval().requires_grad_(False)
        self._current, self._canaries = current, canaries.detach().clone()
        self._sticky, self._kept, self._most_names = sticky, kept, principals
        self._lock, self._swapping, self._collecting = (threading.Lock() for _ in range(3))
        self._previous: tuple[_Serving, ...] = ()  # replaced sets that principals still use
        self._ended: list[_Book] = []
        self._names = 0
        self._live = self._ready(current())

    @property
    def bounds(self) -> Bounds:
        """Lowest and highest valid input values, which are equal for all parameter sets."""
        return self._pristine.bounds

    @property
    def live(self) -> tuple[str, int]:
        """Name of the serving set, and number of sets that have served so far. They are for the operator of the service
        and must not be shown to clients.
        """
        book = self._live.book
        return book.name, book.epoch

    @property
    def most_answers(self) -> int:
        """Largest number of answers that a single client got from the serving set, or an upper bound on it."""
        return self._live.book.most

    def __call__(self, x: Inputs, ids: Ids | None = None) -> Logits:
        """Return the logits of the live set for `x`; the answers are counted for a caller without a name."""
        return self._answered(x, ids, None)

    def answer(self, x: Inputs, *, principal: str) -> Logits:
        """Return the logits of the inputs `x` for the client `principal`, all from one parameter set. Each row counts
        as one answer.

        Raises `UsageError` if `principal` is not a string.
        """
        if not isinstance(principal, str):
            raise UsageError(
                f"{principal!r} is not the name of a principal; text was expected, as in principal='alice'"
            )
        return self._answered(x, None, principal)

    def _answered(self, x: Inputs, ids: Ids | None, principal: str | None) -> Logits:
        n, given = len(x), 0
        with self._lock:
            serving = self._of(principal)
            book = serving.book
            if principal is not None and principal not in book.had:
                if self._names < self._most_names:
                    self._names += 1
                else:
                    principal = None
            book.begin(principal, n)
        try:
            logits: Logits = serving.model(x, ids)
            # an exception of the model leaves 0, and `end` then takes the counted answers back
            given = n
        finally:
            with self._lock:
                book.end(principal, n, given)
        return logits

    def _of(self, principal: str | None) -> _Serving:
        """The set that answers a principal: its most recent set up to the limit of answers, else the live set."""
        if self._sticky is not None and principal is not None:
            for serving in (self._live, *self._previous):
                n_answers = serving.book.had.get(principal)
                if n_answers is not None:
                    return serving if n_answers < self._sticky.most else self._live
        return self._live

    def refresh(self) -> bool:
        """Swap to the parameter set that the function `current` returns, and return whether another set serves from now
        on.

        Raises `TargetError` if the set is unusable; the old set then continues to serve. Cost: a copy of the network
        and a forward pass of the canaries, while requests continue.
        """
        with self._swapping:
            next_live, (name, epoch) = self._current(), self.live
            if next_live.epoch == epoch and next_live.name == name:
                return False
            if next_live.epoch <= epoch:
                raise TargetError(
                    f"set {next_live.name!r} has epoch {next_live.epoch}, but {epoch + 1} or later was expected; check "
                    f"the ledger with holdfast verify. Set {name!r} still serves"
                )
            try:
                # outside the lock of requests: loading takes long, and requests must not wait
                fresh = self._ready(next_live)
            except TargetError as error:
                raise error.ended(f"set {name!r} still serves") from error
            with self._lock:
                older = (self._live, *self._previous)
                self._live = fresh
                self._keep(older if self._sticky is not None else (), among=older)
            return True

    def _ready(self, live: Live) -> _Serving:
        """Load a set and test it on the canaries. This also makes the first forward pass, which is the slowest."""
        model = loaded(self._pristine, live.weights, live.name)
        refuse_strange(model, self._canaries, live.canary, live.name)
        return _Serving(model, _Book(live.name, live.epoch))

    def withdraw(self, name: str) -> None:
        """Stop the use of the stolen or replaced set `name`. All clients get answers from the serving set from now on.

        Raises `UsageError` if it is the live set.
        """
        with self._lock:
            if name == self._live.book.name:
                raise UsageError(f"set {name!r} is the live set; swap to another set before you withdraw it")
            self._keep(
                tuple(serving for serving in self._previous if serving.book.name != name),
                among=self._previous,
            )

    def _keep(self, serving_sets: tuple[_Serving, ...], *, among: tuple[_Serving, ...]) -> None:
        self._previous = serving_sets[: self._kept]
        self._ended += [serving.book for serving in among if serving not in self._previous]

    def collected(self, write: Callable[[Answers], object] = lambda answers: None) -> tuple[Answers, ...]:
        """Return the numbers of answers that clients got from each parameter set since the previous call, and call
        `write` with each of them.

        No answer is counted twice or lost: if `write` raises an exception, such as for a full disk, the next call
        returns the same answers again. A replaced set is returned once more, with `final`, when its last request is
        done, and is then removed.
        """
        collected = []
        with self._collecting:
            with self._lock:
                finished = [book for book in self._ended if not book.under_way]
                books = [*self._ended, *(serving.book for serving in (self._live, *self._previous))]
                counts = [(book, dict(book.given)) for book in books if book.given or book in finished]
            for book, given in sorted(counts, key=lambda entry: entry[0].epoch):
                answers = _answers(book, given, final=book in finished)
                # before the counts are reduced, so that an error of `write` loses no answer
                write(answers)
                collected.append(answers)
                with self._lock:
                    book.forget(given)
                    if book in finished:
                        self._ended.remove(book)
                        self._names -= len(book.had)
        return tuple(collected)


def _answers(book: _Book, given: Mapping[str | None, int], *, final: bool) -> Answers:
    principals = {principal: n for principal, n in given.items() if principal is not None}
    return Answers(book.name, book.epoch, principals, given.get(None, 0), final)
