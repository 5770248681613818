"""Compares what the server counted for a candidate with what it counted for the served model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.statistics.intervals import independent_difference

FEWEST = 100
"""Number of inputs of the candidate below which shares are not compared."""
_CONFIDENCE = 0.98
"""Confidence of the two-sided interval of a difference, so that its lower end has an error of 1 %."""


@dataclass(frozen=True)
class Counts:
    """What the server counted for one parameter set since the canary began."""

    requests: int = 0
    inputs: int = 0
    model_failures: int = 0
    flagged: int = 0
    labelled: int = 0
    wrong: int = 0

    @classmethod
    def of(cls, sets: Mapping[str, Mapping[str, Any]], name: str) -> "Counts":
        """Return the counts of a set in the state of the server."""
        counts = sets.get(name, {})
        return cls(**{key: int(counts.get(key, 0)) for key in cls.__dataclass_fields__})


def failures(candidate: Counts, served: Counts) -> str:
    """Return that the candidate fails on a larger share of the requests than the served model; empty otherwise."""
    if candidate.model_failures * max(served.requests, 1) > served.model_failures * candidate.requests:
        return (
            f"it failed on {candidate.model_failures} of {candidate.requests} requests, and the served model on "
            f"{served.model_failures} of {served.requests}"
        )
    return ""


def regression(candidate: Counts, served: Counts) -> str:
    """Return why the candidate is worse than the served model on live requests; empty if it is not clearly worse.

    The error of 1 % holds for one look at the end; with many looks it would be several times as large.
    """
    if text := failures(candidate, served):
        return text
    if candidate.inputs >= FEWEST <= served.inputs:
        text = _larger(candidate.flagged, candidate.inputs, served.flagged, served.inputs)
        if text:
            return f"the guard flagged {text} inputs"
    if candidate.labelled and served.labelled:
        text = _larger(candidate.wrong, candidate.labelled, served.wrong, served.labelled)
        if text:
            return f"it misclassified {text} labelled inputs"
    return ""


def _larger(k: int, n: int, other_k: int, other_n: int) -> str:
    difference = independent_difference(min(k, n), n, min(other_k, other_n), other_n, _CONFIDENCE)
    if difference.low <= 0:
        return ""
    return f"{k} of {n}, and for the served model {other_k} of {other_n},"
