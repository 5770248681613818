"""A model whose parameters are swapped while it serves, so that what leaked of the old ones goes stale.

A request takes hold of one reference, to a network that nothing changes any more, and finishes on it; a swap builds the
next network beside it and replaces that reference. So no batch is answered by two sets, and no request waits or fails.
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
    """Answers that a set gave in one time of service, since they were last collected."""

    name: str
    epoch: int
    principals: Mapping[str, int]
    others: int
    """to callers without a name and to those beyond the bound, all together"""
    final: bool
    """the set was replaced and answers nobody any more"""


@dataclass(eq=False)
class _Book:
    """Answers of one time of service; whoever reads or writes it holds the model's lock."""

    name: str
    epoch: int
    had: dict[str, int] = field(default_factory=dict)
    """by principal, entered before the answer is given, so that nobody gets more by asking twice at once"""
    others: int = 0
    most: int = 0
    under_way: int = 0
    given: dict[str | None, int] = field(default_factory=dict)
    """those not yet collected, entered once they are given"""

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
        """Those answers were written down."""
        for principal, n in given.items():
            self.given[principal] -= n
            if not self.given[principal]:
                del self.given[principal]


@dataclass(frozen=True, eq=False)
class _Serving:
    """What a request holds on to: a network that never changes, and the book with its name and epoch."""

    model: Classifier
    book: _Book


class RotatingModel:
    """A `Model` with the architecture and preprocessing of `model`, and the weights of the set that `current` gives.

    `refresh` asks `current` and swaps. A set must answer `canaries` by the classes that are known of it; anything wrong
    raises, and the set that served goes on. No output tells the epoch.

    With `sticky` a principal keeps the set that it began with until that has given it so many answers, was withdrawn,
    or `kept` later ones have been replaced. Answers are counted by principal: a name that the server gives out, and no
    word of a client's. At most `principals` of them are held, over all sets that are not done and collected; callers
    beyond are counted together, as one, so that a trigger fires too early and never too late, and get the live set.
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
                "no canary inputs were given; expected some that the sets were admitted with, such as 256"
            )
        self._pristine = deepcopy(model).eval().requires_grad_(False)
        self._current, self._canaries = current, canaries.detach().clone()
        self._sticky, self._kept, self._most_names = sticky, kept, principals
        self._lock, self._swapping, self._collecting = (threading.Lock() for _ in range(3))
        self._held: tuple[_Serving, ...] = ()  # replaced, and kept by principals that began with them
        self._ended: list[_Book] = []
        self._names = 0
        self._live = self._ready(current())

    @property
    def bounds(self) -> Bounds:
        """The box that inputs lie in; every set has the same."""
        return self._pristine.bounds

    @property
    def live(self) -> tuple[str, int]:
        """Name and epoch of the live set: for whoever runs the service, and for no client."""
        book = self._live.book
        return book.name, book.epoch

    @property
    def asked(self) -> int:
        """The most answers that one principal got from the live set, or an upper bound of it."""
        return self._live.book.most

    def __call__(self, x: Inputs, ids: Ids | None = None) -> Logits:
        """Logits of the live set, counted for a caller without a name."""
        return self._answered(x, ids, None)

    def answer(self, x: Inputs, *, principal: str) -> Logits:
        """Logits for a principal, all of them by one set; each row counts for an answer. `UsageError` for no text."""
        if not isinstance(principal, str):
            raise UsageError(
                f"{principal!r} is no name of a principal; text was expected, as in principal='alice'"
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
            given = n
        finally:
            with self._lock:
                book.end(principal, n, given)
        return logits

    def _of(self, principal: str | None) -> _Serving:
        """The set that answers a principal: the newest that it has met, while that may answer it."""
        if self._sticky is not None and principal is not None:
            for serving in (self._live, *self._held):
                had = serving.book.had.get(principal)
                if had is not None:
                    return serving if had < self._sticky.most else self._live
        return self._live

    def refresh(self) -> bool:
        """Serve the set that `current` gives now; whether that is another epoch than before.

        Cost: a copy of the network, and a forward of the canaries, beside the requests, which go on.
        """
        with self._swapping:
            wanted, (name, epoch) = self._current(), self.live
            if wanted.epoch == epoch and wanted.name == name:
                return False
            if wanted.epoch <= epoch:
                raise TargetError(
                    f"set {wanted.name!r} is to serve as epoch {wanted.epoch}, where {epoch + 1} or later was "
                    f"expected; see that the ledger it comes from is whole. Set {name!r} serves on"
                )
            try:
                fresh = self._ready(wanted)
            except TargetError as error:
                raise TargetError(f"{error}. Set {name!r} serves on") from error
            with self._lock:
                older = (self._live, *self._held)
                self._live = fresh
                self._hold(older if self._sticky is not None else (), among=older)
            return True

    def _ready(self, wanted: Live) -> _Serving:
        """A set that has answered the canaries: the first forward of a network takes longest, and is over then."""
        model = loaded(self._pristine, wanted.weights, wanted.name)
        refuse_strange(model, self._canaries, wanted.canary, wanted.name)
        return _Serving(model, _Book(wanted.name, wanted.epoch))

    def withdraw(self, name: str) -> None:
        """Let no principal keep a set that was exposed or retired: all of them get the live one from now on."""
        with self._lock:
            if name == self._live.book.name:
                raise UsageError(f"set {name!r} is the live one; swap in another first, then withdraw it")
            self._hold(tuple(one for one in self._held if one.book.name != name), among=self._held)

    def _hold(self, wanted: tuple[_Serving, ...], *, among: tuple[_Serving, ...]) -> None:
        self._held = wanted[: self._kept]
        self._ended += [one.book for one in among if one not in self._held]

    def collected(self, write: Callable[[Answers], object] = lambda answers: None) -> tuple[Answers, ...]:
        """Answers since the last call, epoch by epoch, each told to `write` before it counts as told.

        None is told twice, and none is left out: what `write` raises at, as a ledger on a full disk does, is told
        by the next call. A set that was replaced comes once more when its last request is done, as `final`, and is
        forgotten.
        """
        found = []
        with self._collecting:
            with self._lock:
                over = [book for book in self._ended if not book.under_way]
                books = [*self._ended, *(one.book for one in (self._live, *self._held))]
                told = [(book, dict(book.given)) for book in books if book.given or book in over]
            for book, given in sorted(told, key=lambda each: each[0].epoch):
                answers = _answers(book, given, final=book in over)
                write(answers)
                found.append(answers)
                with self._lock:
                    book.forget(given)
                    if book in over:
                        self._ended.remove(book)
                        self._names -= len(book.had)
        return tuple(found)


def _answers(book: _Book, given: Mapping[str | None, int], *, final: bool) -> Answers:
    principals = {principal: n for principal, n in given.items() if principal is not None}
    return Answers(book.name, book.epoch, principals, given.get(None, 0), final)
