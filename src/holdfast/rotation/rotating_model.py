"""A model whose parameters are swapped while it answers, and the conditions of a swap."""

import hashlib
import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from holdfast.core.errors import TargetError, UsageError
from holdfast.core.estimate import Estimate
from holdfast.core.model import Bounds, Classifier, Model, refuse_lazy
from holdfast.core.names import kind_of
from holdfast.core.types import Count, Ids, Inputs, Labels, Logits, NonNegative, Positive, Steps
from holdfast.rotation.collecting import Weights, refuse_foreign
from holdfast.statistics.intervals import proportion


@dataclass(frozen=True)
class Counters:
    """State of the serving set that decides whether a swap is due: its answers, its time of service, alarms, and
    whether it is assumed to be stolen.
    """

    answers: Count = 0
    """largest number of answers to one principal"""
    served_s: NonNegative = 0.0
    """seconds since it began to serve"""
    alarm: str | None = None
    """reason of an alarm since the set began to serve; None if there was no alarm"""
    exposure: str | None = None
    """reason to assume that the set was stolen; None if there is no reason"""


Trigger = Callable[[Counters], str]
"""function of the state of the serving set that returns the reason to swap, or an empty string if there is none"""


@dataclass(frozen=True)
class AnswersPerPrincipal:
    """Trigger of a swap after one client got `most` answers from the serving set, written as `50q/principal` in
    settings.
    """

    most: Steps

    def __call__(self, reading: Counters) -> str:
        if reading.answers < self.most:
            return ""
        return f"one principal got {reading.answers} answers from the set, of at most {self.most}"


@dataclass(frozen=True)
class Elapsed:
    """Trigger of a swap after a set has served for `period_s` seconds, written as `24h` in settings."""

    period_s: Positive

    def __call__(self, reading: Counters) -> str:
        if reading.served_s < self.period_s:
            return ""
        return f"the set has served for {reading.served_s:g} s, of at most {self.period_s:g}"


def alarmed(reading: Counters) -> str:
    """Return the reason to swap if there was an alarm while the set served, such as that of a detector of query
    attacks; otherwise an empty string.
    """
    return "" if reading.alarm is None else f"alarm: {reading.alarm}"


def exposed(reading: Counters) -> str:
    """Return the reason to swap if the serving set is assumed to be stolen; otherwise an empty string."""
    return "" if reading.exposure is None else f"listed as stolen: {reading.exposure}"


def due_triggers(triggers: Sequence[Trigger], reading: Counters) -> tuple[str, ...]:
    """Return the reasons of all triggers whose condition for a swap is met, in the order of the triggers, or an empty
    tuple.
    """
    return tuple(why for trigger in triggers if (why := trigger(reading)))


class Watch:
    """Decides when a swap of the serving set is due: evaluates triggers, and records alarms and the beginning of
    service.

    `clock` returns seconds that never decrease, such as `time.monotonic`. `served_s` is the number of seconds for which
    the set had already served; after a restart it is read from the ledger. All methods are thread-safe.
    """

    def __init__(
        self, triggers: Sequence[Trigger], clock: Callable[[], float], *, served_s: float = 0.0
    ) -> None:
        self._triggers, self._clock, self._lock = tuple(triggers), clock, threading.Lock()
        self._began_s, self._raised = clock() - served_s, Counters()

    def alarm(self, why: str) -> None:
        """Record an alarm about the serving set, with its reason `why`. The next swap clears it."""
        with self._lock:
            self._raised = replace(self._raised, alarm=why)

    def expose(self, why: str) -> None:
        """Record that the serving set may be stolen, with the reason `why`. The next swap clears it."""
        with self._lock:
            self._raised = replace(self._raised, exposure=why)

    def swapped(self) -> None:
        """Record that another parameter set serves from now on, which clears alarms and restarts the
        time of service.
        """
        with self._lock:
            self._began_s, self._raised = self._clock(), Counters()

    def due(self, answers: int) -> tuple[str, ...]:
        """Return all reasons for a swap of the serving set at this time, or an empty tuple if no swap is due.

        `answers` is the largest number of answers to one principal from the serving set, as in
        `RotatingModel.most_answers`.
        """
        with self._lock:
            reading = replace(self._raised, answers=answers, served_s=self._clock() - self._began_s)
        return due_triggers(self._triggers, reading)


def refuse_faster(triggers: Sequence[Trigger], made_in_s: float, *, answers_per_s: float = 0.0) -> None:
    """Raise `UsageError` if triggers require swaps more often than new parameter sets can be produced.

    `made_in_s` is the time in seconds to produce one admitted set, including the time for sets that were refused; a
    stock of waiting sets only delays the shortage. `answers_per_s` is the rate limit of one principal; without one (0),
    a trigger that counts answers is not tested.
    """
    for trigger in triggers:
        match trigger:
            case Elapsed(period_s) if period_s < made_in_s:
                raise UsageError(
                    f"a swap is due every {period_s:g} s, but it takes {made_in_s:.3g} s to produce an admitted "
                    f"set: the pool would run empty. Swap every {math.ceil(made_in_s)}s or less often, or produce "
                    "sets faster"
                )
            case AnswersPerPrincipal(most) if most < made_in_s * answers_per_s:
                raise UsageError(
                    f"a swap is due after {most} answers to a principal, which at {answers_per_s:g} answers a "
                    f"second is every {most / answers_per_s:.3g} s, but it takes {made_in_s:.3g} s to produce an "
                    "admitted set: the pool would run empty. Swap after "
                    f"{math.ceil(made_in_s * answers_per_s)}q/principal or more, lower the rate limit, or produce "
                    "sets faster"
                )


CANARIES = 256
"""default number of canary inputs on which a parameter set is tested before it serves"""

_CLEAR = 2**-7
"""smallest difference of the two largest logits, relative to the largest absolute logit, that rounding cannot
reverse: bfloat16 has a precision of 8 bits"""
_AT_ONCE = 64  # canaries in one forward pass, small so that requests are not delayed
_KNOWN = re.compile(r"([0-9a-f]{64})(?:/(\d+(?:,\d+)*))?")  # digest of the classes, / and inputs left out


@dataclass(frozen=True, eq=False)
class Live:
    """The parameter set that should serve, with its name, the number of sets that have served so far, and the
    fingerprint of its predictions.
    """

    name: str
    epoch: int
    """number of sets that have served so far, including this one; it increases with each swap"""
    weights: Weights
    """state dict of the network: parameters, and buffers such as the statistics of batch norm"""
    canary: str
    """return value of `canary` for this set at its admission"""


def loaded(model: Classifier, weights: Weights, name: str) -> Classifier:
    """Return a frozen copy of the model in eval mode with the parameters and buffers of a set.

    Raises `TargetError` if the set `name` does not have exactly the tensors of the network, in shape and type, or if
    it contains a value that is not finite. Neither the model nor the weights are changed.
    """
    refuse_foreign(weights, _state(model), f"set {name!r}")
    copied = deepcopy(model).eval().requires_grad_(False)
    assert isinstance(copied.net, nn.Module)
    # by address, since a copy that shares storage is still another tensor object
    addresses = {value.data_ptr() for value in _state(model).values() if value.numel()}
    if any(value.data_ptr() in addresses for value in _state(copied).values()):
        raise TargetError(
            "a copy of the model shares its weights, so a swap would change the serving model; let its "
            "__deepcopy__ copy them"
        )
    copied.net.load_state_dict(weights)
    for tensor_name, value in _state(copied).items():
        if not torch.equal(value, weights[tensor_name].to(value.device)):
            raise TargetError(
                f"set {name!r} contains values of {tensor_name} that the network did not keep: the network shares "
                "that tensor with another name, for which the set contains other values; write the set from the state "
                "dict of one network"
            )
    return copied


def _state(model: Classifier) -> dict[str, Tensor]:
    """Tensors that a set must have. Raises `TargetError` if the model has none, or state that is not a tensor."""
    state = model.net.state_dict() if isinstance(model.net, nn.Module) else {}
    if not state:
        raise TargetError("the model has no parameters to swap; give a network, as in net.py:make")
    refuse_lazy(model)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TargetError(
                f"{name} of the model is {kind_of(value)}, but a set contains tensors only; store the "
                "result of get_extra_state in buffers, with register_buffer"
            )
    return dict(state)


def canary(model: Model, x: Inputs) -> str:
    """Return a fingerprint of a parameter set: the SHA-256, in hex, of the classes that it predicts for the fixed
    inputs `x`.

    Classes are used because logits differ between machines in their last digits, while damaged or wrong parameters
    change predictions. Canaries whose two largest logits are too close for rounding are excluded, and their indices
    follow a slash: `5f…c0/17,203`. Raises `TargetError` if more than half of them are excluded.
    """
    logits = _logits(model, x)
    largest = logits.topk(2, 1).values
    close = (largest[:, 0] - largest[:, 1] <= _CLEAR * logits.abs().amax(1)).nonzero()[:, 0].tolist()
    if 2 * len(close) > len(x):
        raise TargetError(
            f"the set classifies {len(x) - len(close)} of {len(x)} canary inputs clearly; at least half of them "
            "were expected; give inputs similar to those of its training"
        )
    suffix = f"/{','.join(map(str, close))}" if close else ""
    return _digest(logits.argmax(1), close) + suffix


def refuse_strange(model: Model, x: Inputs, stored: str, name: str) -> None:
    """Raise `TargetError` if the classes that a parameter set predicts for fixed inputs do not match its stored
    fingerprint `stored`.
    """
    fingerprint = _KNOWN.fullmatch(stored)
    if fingerprint is None:
        raise TargetError(
            f"set {name!r} has the canary {stored!r}; expected 64 hex digits, as rotation.canary returns them"
        )
    close = [int(place) for place in (fingerprint[2] or "").split(",") if place]
    if 2 * len(close) > len(x):
        raise TargetError(
            f"set {name!r} has a canary that excludes {len(close)} of {len(x)} inputs; at most half were expected; "
            "admit the set again"
        )
    digest = _digest(_logits(model, x).argmax(1), close)
    if digest != fingerprint[1]:
        raise TargetError(
            f"the classes that set {name!r} predicts for the {len(x)} canary inputs have the digest "
            f"{digest[:12]}…, but {fingerprint[1][:12]}… was expected: its weights, the canary inputs or the "
            "preprocessing are not those of its admission. Restore those, or admit the set again"
        )


@torch.no_grad()
def _logits(model: Model, x: Inputs) -> Logits:
    logits = torch.cat([model(part) for part in torch.split(x, _AT_ONCE)])
    broken = ~logits.isfinite().all(1)
    if broken.any():
        raise TargetError(
            f"the logits of {int(broken.sum())} of {len(x)} canary inputs are NaN or infinite; finite logits were "
            "expected; leave the set out"
        )
    return logits


def _digest(classes: Labels, excluded: Sequence[int]) -> str:
    excluded_set = set(excluded)
    text = ",".join(str(k) for place, k in enumerate(classes.tolist()) if place not in excluded_set)
    return hashlib.sha256(text.encode()).hexdigest()


@torch.no_grad()
def churn(first: Model, second: Model, x: Inputs) -> Estimate:
    """Return the fraction of inputs for which two models predict different classes, with an interval of at least 95 %
    coverage.
    """
    return proportion(
        torch.cat([first(part).argmax(1) != second(part).argmax(1) for part in torch.split(x, _AT_ONCE)])
    )


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
