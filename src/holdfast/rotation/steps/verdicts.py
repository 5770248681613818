"""Verdicts of an admission: the verdict on each candidate, and all verdicts of one call of the step `admit`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from holdfast.core.estimate import Estimate
from holdfast.rotation.steps.admission_gates import GateResult

IN_A_ROW = 5
"""Number of refusals in a row after which no more candidates are judged, since the way they are
produced is unsuitable."""
_LOSES = {"clean accuracy", "robust accuracy", "churn"}
_LOSE_LESS = (
    "draw more sets, or reduce the loss with --set immunise.weight=0.25 in draw or with more epochs in the "
    "collection; more training data give narrower intervals"
)
_ELSEWHERE = (
    "train sets from fresh weights, which are independent of stolen sets: holdfast rotate draw POOL --by retraining "
    "--immunise"
)
"""Advice if sets only lose too much accuracy, and if they are too similar to stolen sets or implausible."""


@dataclass(frozen=True)
class Judged:
    """The verdict on one candidate of a pool, admitted or refused, with the results of its gates."""

    name: str
    verdict: Literal["admitted", "refused"]
    gates: tuple[GateResult, ...]
    why: str
    """the reason of the refusal or admission"""
    by: str = ""
    """name of the gate that refused the candidate"""
    against: tuple[str, ...] = ()
    """names of the stolen sets against which the candidate was judged"""
    reported: Mapping[str, Estimate] = field(default_factory=dict)
    """measurements that are reported but used by no gate"""


@dataclass(frozen=True)
class Admission:
    """All verdicts of one call of the step `admit` of a rotation."""

    judged: tuple[Judged, ...]
    left: tuple[str, ...]
    """names of the sets that were not judged because too many sets were refused"""

    @property
    def admitted(self) -> tuple[str, ...]:
        """Names of the parameter sets that were admitted."""
        return tuple(judged.name for judged in self.judged if judged.verdict == "admitted")

    @property
    def exit_code(self) -> int:
        """Exit code of the command line: 0 if a set was admitted, else 4."""
        return 0 if self.admitted else 4

    @property
    def kept_out(self) -> str:
        """Reason why no parameter set was admitted, with advice. It is empty if one was admitted or none was judged."""
        if self.admitted or not self.judged:
            return ""
        gates = [judged.by for judged in self.judged]
        counted = ", ".join(f"{gates.count(gate)} by {gate}" for gate in dict.fromkeys(gates))
        stopped = (
            f" {IN_A_ROW} in a row were refused, and {len(self.left)} are not judged yet."
            if self.left
            else ""
        )
        return (
            f"none of {len(self.judged)} candidates was admitted ({counted}).{stopped} The first: "
            f"{self.judged[0].why}. The serving set is not changed; {self.remedy}"
        )

    @property
    def remedy(self) -> str:
        """Advice for the case that no parameter set was admitted. It depends on the gates that refused the sets."""
        return _LOSE_LESS if _LOSES.issuperset(judged.by for judged in self.judged) else _ELSEWHERE
