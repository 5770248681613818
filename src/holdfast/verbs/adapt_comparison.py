"""Compares a candidate with the served model on inputs that the server samples while it is adapted, so that no single
client decides.
"""

import io
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from holdfast.adaptation.server_state import ServerState, server_state
from holdfast.core.errors import TargetError
from holdfast.guard.guard import GuardPipeline
from holdfast.io.remote.operator_port import Json, OperatorPort
from holdfast.runs.harness.target import PreparedModel

ERROR = 0.01
"""probability with which a candidate is found to be worse by chance, for each kind of fault"""
SHARE = 0.5
"""largest share of the inputs that one of at least three principals counts"""
FEW = 3
"""number of principals from which on a single one decides nothing"""
_MOST = 500
"""number of principals that are compared: those with the most inputs"""

Mask = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Compared:
    """How often each model is at fault on the inputs that count."""

    n: int
    candidate: int
    served: int
    worse: bool
    alone: tuple[str, ...] = ()
    """principals on whose inputs alone the candidate is worse; empty if `worse`"""


def compared(
    principals: Sequence[str], candidate: Mask, served: Mask, *, rows: Mask | None = None
) -> Compared:
    """Compare two models on the same inputs (n), the newest of each principal last. `candidate` and `served` state on
    which inputs the models are at fault.

    Only the inputs in `rows`, such as those with a label, are compared. The principals of the others count as
    principals, so that one whose inputs alone have labels does not decide.
    """
    rows = np.ones(len(principals), bool) if rows is None else rows
    if not rows.any():
        return Compared(0, 0, 0, worse=False)
    names, of = np.unique(np.array(principals), return_inverse=True)
    counts = _counted(of, rows)
    only_candidate, only_served = (
        np.bincount(of[counts & each], minlength=len(names)).astype(np.int64)
        for each in (candidate & ~served, served & ~candidate)
    )
    numbers = np.bincount(of[rows], minlength=len(names))
    # those without compared inputs have no effect, except that there may be so many that a single one decides nothing
    n_present = max(int(np.count_nonzero(numbers)), min(FEW, len(names)))
    present = numbers.argsort(kind="stable")[::-1][: min(n_present, _MOST)]
    worse = _worse(only_candidate[present], only_served[present])
    single = _p_values(only_candidate, only_served) <= ERROR / n_present
    alone = () if worse else tuple(str(name) for name in names[single])
    return Compared(
        int(counts.sum()),
        int(candidate[counts].sum()),
        int(served[counts].sum()),
        worse,
        alone,
    )


def _counted(of: npt.NDArray[np.intp], rows: Mask) -> Mask:
    """Which of the inputs in `rows` count: of a principal that has more than `SHARE` of them, only the newest ones. All
    inputs of fewer than three principals count.
    """
    counts, numbers = rows.copy(), np.bincount(of[rows])
    largest = int(numbers.argmax())
    own = np.flatnonzero(rows & (of == largest))
    most = int(SHARE / (1 - SHARE) * (rows.sum() - len(own)))
    if np.count_nonzero(numbers) >= FEW and len(own) > most:
        counts[own[: len(own) - most]] = False
    return counts


def _worse(only_candidate: Counts, only_served: Counts) -> bool:
    """Whether the candidate is at fault more often, by the numbers of inputs of each principal on which one model
    alone is at fault.
    """
    n = len(only_candidate)
    totals = only_candidate.sum(), only_served.sum()
    if n < FEW:
        sets = [
            np.append(each, total) for each, total in zip((only_candidate, only_served), totals, strict=True)
        ]
        return bool((_p_values(*sets) <= ERROR / (n + 1 if n > 1 else 1)).any())
    # a row for each set: all principals, and all without one; a column for each further principal that is left out
    left = [
        total - np.append(0, each) for each, total in zip((only_candidate, only_served), totals, strict=True)
    ]
    rest = [sums[:, None] - each for sums, each in zip(left, (only_candidate, only_served), strict=True)]
    rejected = _p_values(*rest) <= ERROR / (n + 1)
    rejected[np.arange(n) + 1, np.arange(n)] = True  # it is not in the set
    return bool(rejected.all(1).any())


def _p_values(only_candidate: Counts, only_served: Counts) -> npt.NDArray[np.float64]:
    """Probability of so many faults of the candidate alone, or more, if both models are as often at fault alone."""
    from scipy.special import betainc

    tail = betainc(np.maximum(only_candidate, 1), only_served + 1, 0.5)
    values: npt.NDArray[np.float64] = np.where(only_candidate > 0, tail, 1.0)
    return values


_BATCH = 256
_POLL_S = 0.5
"""seconds between two looks at the server"""
_LONGEST = 200
"""largest number of characters of the name of a client or of a set"""
_NAMED = 5
"""largest number of clients that a note names"""
_FORMS: Mapping[str, tuple[str, int]] = {
    "x": ("f", 2), "y": ("i", 1), "principal": ("U", 1), "age": ("f", 1), "set": ("U", 1), "failed": ("b", 1),
}  # fmt: skip
"""for each array of an answer, its kind of values and its number of dimensions, which for inputs is the least one"""


@dataclass(frozen=True, eq=False)
class Samples:
    """Sampled inputs that reached the model, the newest of each client last."""

    x: Tensor
    """inputs (n, *shape)"""
    y: "np.ndarray[Any, np.dtype[np.int64]]"
    """classes that were reported to the server; -1 if there is none"""
    principals: Sequence[str]
    """pseudonyms of the clients"""
    ages_s: "np.ndarray[Any, np.dtype[np.float64]]"
    sets: "np.ndarray[Any, np.dtype[np.str_]]"
    """names of the sets of the processes that received the inputs"""
    failed: Mask
    """whether the model failed in these processes"""

    def at(self, rows: Mask) -> "Samples":
        """Return some of the inputs."""
        return Samples(
            self.x[torch.from_numpy(rows)], self.y[rows], _at(self.principals, rows), self.ages_s[rows],
            self.sets[rows], self.failed[rows],
        )  # fmt: skip

    @property
    def few(self) -> bool:
        """Whether there are so few clients that each of them decides."""
        return len(set(self.principals)) < FEW

    def newer(self, age_s: float) -> "Samples":
        """Return the inputs of the last `age_s` seconds."""
        return self.at(self.ages_s <= age_s)


def read_samples(content: bytes, shape: Sequence[int], url: str) -> Samples:
    """Return the samples in an answer of a server. Raises `TargetError` for any other content. The arrays are not
    compressed, so that they are not larger than the answer.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("it is compressed")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in _FORMS}
        n = len(found["x"])
        for name, (kind, dims) in _FORMS.items():
            values = found[name]
            odd = values.ndim != dims and name != "x"
            if values.dtype.kind != kind or odd or values.ndim < dims or len(values) != n:
                raise ValueError(f"{name} has {values.dtype} values of the shape {values.shape}")
            if kind == "f" and not np.isfinite(values).all():
                raise ValueError(f"{name} is not finite")
            if kind == "U" and values.dtype.itemsize > 4 * _LONGEST:
                raise ValueError(f"{name} has names of more than {_LONGEST} characters")
        if n and found["x"].shape[1:] != tuple(shape):
            raise ValueError(
                f"the inputs have the shape {found['x'].shape[1:]}, and expected is {tuple(shape)}"
            )
    except (ValueError, LookupError, TypeError, OSError, EOFError, zipfile.BadZipFile, MemoryError) as error:
        raise TargetError(
            f"{url}/samples did not answer with samples ({error}); give the URL of your server"
        ) from error
    x = torch.from_numpy(found["x"].astype(np.float32)) if n else torch.empty(0, *shape)
    return Samples(
        x, found["y"].astype(np.int64), [str(name) for name in found["principal"]], found["age"].astype(np.float64),
        found["set"], found["failed"],
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Answers:
    """What a model answers: the predicted class of each input, whether it fails, and whether its guard flags it."""

    predicted: "np.ndarray[Any, np.dtype[np.int64]]"
    failed: Mask
    flagged: Mask | None
    """None without a guard"""


@dataclass(frozen=True)
class Side:
    """One of the models: the context manager of its target, and its guard without the query detector."""

    target: Callable[[], AbstractContextManager[PreparedModel]]
    guard: Callable[[], GuardPipeline | None] | None = None
    """function that opens the guard; None if what it flags is not compared"""

    def answers(self, x: Tensor) -> _Answers:
        """Return what the model answers to inputs, whatever else is in their batch."""
        guard = None if self.guard is None else self.guard()
        with ExitStack() as stack, torch.no_grad():
            target = stack.enter_context(self.target())
            inputs = x if guard is None or guard.defence is None else guard.defence(x)
            logits = _logits(target, inputs)
            right = logits.isfinite().all(1)
            flagged = None if guard is None else torch.zeros(len(x), dtype=torch.bool)
            if guard is not None and flagged is not None:
                for rows in torch.split(right.nonzero().flatten(), _BATCH):
                    seen = guard.observation(inputs[rows], logits[rows], network=target.logits)
                    for name, scores in guard.detected(seen).items():
                        flagged[rows] |= scores > guard.rules[name].threshold
        return _Answers(
            logits.argmax(1).numpy(), ~right.numpy(), None if flagged is None else flagged.numpy()
        )


def _logits(target: PreparedModel, x: Tensor) -> Tensor:
    """Return the logits (n, classes) of inputs, which are NaN where the model raises an error."""
    parts, waiting = [], list(torch.split(x, _BATCH))
    while waiting:
        part = waiting.pop(0)
        try:
            parts.append(target.logits(part).detach().float())
        except Exception:  # noqa: BLE001 - of the model, which may be any code
            if len(part) > 1:  # the input that causes the error must not fail the others
                waiting = [*torch.split(part, 1), *waiting]
            else:
                parts.append(torch.full((1, 1), torch.nan))
    classes = max(part.shape[1] for part in parts)
    return torch.cat([part.expand(-1, classes) for part in parts])


@dataclass(eq=False)
class LivePairs:
    """Comparison of the candidate with the served model on sampled inputs."""

    port: OperatorPort
    of: Literal["model", "pool"]
    """what the server serves"""
    shape: Sequence[int]
    candidate: Side
    served: Side
    name: str
    """name of the set of the candidate"""

    def _status(self) -> ServerState:
        return server_state(self.port, self.of)

    def sample(self) -> Samples:
        """Return the inputs that the server has sampled."""
        return read_samples(self.port.read("/samples"), self.shape, self.port.url)

    def watched(self, duration_s: float, fault_of: Callable[[ServerState], str]) -> Json:
        """Compare both models on the inputs of the next seconds, and return the facts, with why the candidate is worse
        as `ends`. `fault_of` returns from the state of the server why the time is over earlier.

        Failures of the model are looked at at once, because clients see them.
        """
        status = self._status()
        begun, refused, seen, fault = time.monotonic(), self._refused(status), self._failures(status), ""
        while not fault and time.monotonic() < begun + duration_s:
            status = self._status()
            fault = fault_of(status)
            if not fault and (failures := self._failures(status)) > seen:
                seen = failures
                sample = self.sample().newer(time.monotonic() - begun)
                fault = "; ".join(self._failing(sample.at(sample.failed), few=sample.few)[0])
            time.sleep(_POLL_S)
        facts = self.compared(self.sample().newer(time.monotonic() - begun))
        facts["refused"] = max(0, self._refused(self._status()) - refused)
        return {**facts, "ends": fault} if fault else facts

    def _failures(self, status: ServerState) -> int:
        return int(status["sets"].get(self.name, {}).get("model_failures", 0))

    @staticmethod
    def _refused(status: ServerState) -> int:
        return int(sum(counts.get("refused", 0) for counts in status["sets"].values()))

    def compared(self, samples: Samples) -> Json:
        """Return the facts about samples, with why the candidate is worse as `ends`, and with notes on what a single
        client alone shows.
        """
        facts: Json = {"pairs": len(samples.principals), "principals": len(set(samples.principals))}
        if not samples.principals:
            return facts
        candidate, served = self.candidate.answers(samples.x), self.served.answers(samples.x)
        facts["equal_predictions"] = float((candidate.predicted == served.predicted).mean())
        faults, notes = self._failing(samples, candidate, served, few=samples.few)
        sound = ~(candidate.failed | served.failed)
        labelled = sound & (samples.y >= 0)
        wrong = [each.predicted != samples.y for each in (candidate, served)]
        compare = (
            {"wrong": ("it misclassified {} of {} labelled inputs", labelled, *wrong)}
            if labelled.any()
            else {}
        )
        if candidate.flagged is not None and served.flagged is not None:
            flags = candidate.flagged, served.flagged
            compare = {"flagged": ("the guard flagged {} of {} inputs", sound, *flags), **compare}
        for kind, (text, rows, ours, theirs) in compare.items():
            found = compared(samples.principals, ours, theirs, rows=rows)
            facts |= {f"{kind}_candidate": found.candidate, f"{kind}_served": found.served}
            shown = f"{text.format(found.candidate, found.n)}, and for the served model {found.served}"
            if found.worse:
                faults.append(shown)
            elif found.alone:
                notes.append(f"{shown}; clearly more only those of {_clients(found.alone)}")
        facts["labelled"] = int(labelled.sum())
        return facts | ({"notes": notes} if notes else {}) | ({"ends": "; ".join(faults)} if faults else {})

    def _failing(
        self,
        samples: Samples,
        candidate: _Answers | None = None,
        served: _Answers | None = None,
        *,
        few: bool,
    ) -> tuple[list[str], list[str]]:
        """Return why the candidate fails where the served model does not, and notes on what one client alone shows. Of
        `few` clients, one is enough.
        """
        faults, notes = list[str](), list[str]()
        if not samples.principals:
            return faults, notes
        candidate = candidate or self.candidate.answers(samples.x)
        served = served or self.served.answers(samples.x)
        if n := int((candidate.failed & ~served.failed).sum()):
            faults.append(
                f"it fails on {n} of {len(samples.principals)} inputs on which the served model does not"
            )
        # a failure that does not depend on the input, such as one of a device
        elsewhere = samples.failed & ~candidate.failed & ~served.failed
        ours = samples.sets == self.name
        here, there = (set(_at(samples.principals, elsewhere & each)) for each in (ours, ~ours))
        if len(here) > len(there):
            text = f"its process failed on inputs of {_clients(sorted(here))} on which no model fails here"
            (faults if few or len(here) > 1 else notes).append(text)
        return faults, notes


def _at(names: Sequence[str], rows: Mask) -> list[str]:
    return [name for name, chosen in zip(names, rows.tolist(), strict=True) if chosen]


def _clients(names: Sequence[str]) -> str:
    """Some clients by their pseudonyms as text."""
    shown = ", ".join(name or "all without a key" for name in names[:_NAMED])
    return f"the client {shown}" if len(names) == 1 else f"{len(names)} clients ({shown})"
