"""What became of candidates: of each one, and of all that one call judged."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from holdfast.core.estimate import Estimate
from holdfast.runs.rotate.ruling import Ruling

IN_A_ROW = 5
"""Refusals after which no more candidates are judged: whatever makes them is not what is needed."""
_LOSES = {"clean accuracy", "robust accuracy", "churn"}
_LOSE_LESS = (
    "draw more, or lose less by draw with --set immunise.weight=0.25, or by more epochs of the collection; more "
    "training data judge more surely"
)
_ELSEWHERE = "sets trained from fresh weights resemble none that leaked: holdfast rotate draw POOL --by anew --immunise"
"""What helps where sets only lose too much, and where they are too near to what leaked, or are no sets."""


@dataclass(frozen=True)
class Judged:
    """What became of one candidate, and why."""

    name: str
    verdict: Literal["admitted", "refused"]
    gates: tuple[Ruling, ...]
    why: str
    """what kept it out, or what spoke for it"""
    by: str = ""
    """the gate that kept it out"""
    against: tuple[str, ...] = ()
    """the exposed sets that it was judged against"""
    reported: Mapping[str, Estimate] = field(default_factory=dict)
    """what was measured and decides nothing"""


@dataclass(frozen=True)
class Admission:
    """What one call did."""

    judged: tuple[Judged, ...]
    left: tuple[str, ...]
    """sets that were not judged any more, after so many refusals"""

    @property
    def admitted(self) -> tuple[str, ...]:
        """Names of the sets that may serve now."""
        return tuple(one.name for one in self.judged if one.verdict == "admitted")

    @property
    def exit_code(self) -> int:
        """0 if a set was admitted, else 4."""
        return 0 if self.admitted else 4

    @property
    def kept_out(self) -> str:
        """Why none was admitted, and what helps; empty where one was, or none was judged."""
        if self.admitted or not self.judged:
            return ""
        gates = [each.by for each in self.judged]
        counted = ", ".join(f"{gates.count(gate)} by {gate}" for gate in dict.fromkeys(gates))
        stopped = f" {IN_A_ROW} in a row were, and {len(self.left)} wait unjudged." if self.left else ""
        return (
            f"none of {len(self.judged)} candidates was admitted ({counted}).{stopped} The first: {self.judged[0].why}."
            f" What serves goes on serving; {self.remedy}"
        )

    @property
    def remedy(self) -> str:
        """What helps where sets are refused by these gates."""
        return _LOSE_LESS if _LOSES.issuperset(each.by for each in self.judged) else _ELSEWHERE
