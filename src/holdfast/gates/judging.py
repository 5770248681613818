"""Judging gates on the interval, and the one function that decides the exit code."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from holdfast.core.errors import UsageError
from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Doubt, Evidence, Scope
from holdfast.doubts.names import OF_STRENGTH
from holdfast.gates.grammar import Claim
from holdfast.metrics.catalogue import estimate
from holdfast.metrics.names import LOWER_BOUNDS, ROTATION, UPPER_BOUNDS
from holdfast.metrics.paired import basis

Verdict = Literal["pass", "fail", "unclear"]


@dataclass(frozen=True)
class Doubts:
    """The doubts of a run, and those that a person accepted, each with the reason."""

    found: tuple[Doubt, ...] = ()
    accepted: Mapping[str, str] = field(default_factory=dict)
    """reason by name"""

    @property
    def open(self) -> tuple[str, ...]:
        """Names of the doubts that were raised and not accepted."""
        return tuple(d.name for d in self.found if d.state == "raised" and d.name not in self.accepted)


@dataclass(frozen=True)
class AtLeast:
    """The estimate is at least `bound`, judged on its interval and not on its point value."""

    bound: float

    def __call__(self, estimate: Estimate, doubts: Doubts) -> Verdict:
        """Fail where even the upper end is below; pass where the lower end is not and no doubt is open."""
        if estimate.high < self.bound:
            return "fail"  # a found example is a proof: no doubt rescues it
        return "pass" if estimate.low >= self.bound and not doubts.open else "unclear"


@dataclass(frozen=True)
class AtMost:
    """The estimate is at most `bound`, judged on its interval and not on its point value."""

    bound: float

    def __call__(self, estimate: Estimate, doubts: Doubts) -> Verdict:
        """Fail where even the lower end is above; pass where the upper end is not and no doubt is open."""
        if estimate.low > self.bound:
            return "fail"
        return "pass" if estimate.high <= self.bound and not doubts.open else "unclear"


@dataclass(frozen=True)
class Judgement:
    """A gate with what it was judged on."""

    claim: Claim
    estimate: Estimate
    verdict: Verdict
    open_doubts: tuple[str, ...] = ()
    scope: Scope | None = None
    """which adversarial examples a comparison of robust accuracies counts; None of any other claim"""

    @property
    def because(self) -> str:
        """One sentence: the numbers, and what kept a pass from being one."""
        seen, bound = self.estimate, f"{self.claim.bound:g}"
        numbers = f"{seen.value:.4g}, 95 % interval {seen.low:.4g} to {seen.high:.4g}, n = {seen.n}"
        if self.verdict == "unclear" and self._inside():
            return (
                f"{numbers}: the interval meets {bound}, but doubts are open: {', '.join(self.open_doubts)}"
            )
        word = {"pass": "all of it meets", "fail": "none of it meets", "unclear": "it lies on both sides of"}
        return f"{numbers}: {word[self.verdict]} {bound}"

    def __str__(self) -> str:
        return f"{self.verdict}: {self.because}"

    def __bool__(self) -> bool:
        """Whether it passed; unclear is no pass."""
        return self.verdict == "pass"

    def _inside(self) -> bool:
        low, high, bound = self.estimate.low, self.estimate.high, self.claim.bound
        return low >= bound if self.claim.relation == ">=" else high <= bound


def judge(
    claim: Claim,
    evidence: Evidence,
    doubts: Doubts,
    *,
    baseline: Evidence | None = None,
    confidence: float = 0.95,
) -> Judgement:
    """Judge a claim on the evidence; `UsageError` names what would bring a metric that is absent."""
    refuse_rotation(claim)
    try:
        measured = estimate(claim.metric, evidence, eps=claim.eps, baseline=baseline, confidence=confidence)
    except UsageError as error:
        raise UsageError(f"gate {claim.text!r} cannot be judged: {error}") from error
    gate = AtLeast(claim.bound) if claim.relation == ">=" else AtMost(claim.bound)
    scope = basis(evidence, baseline) if claim.metric == "regression" and baseline is not None else None
    against = _against(claim, doubts)
    return Judgement(claim, measured, gate(measured, against), against.open, scope)


def _against(claim: Claim, doubts: Doubts) -> Doubts:
    """The doubts that could make the claim false: what stronger attacks can only lower stays below an upper bound."""
    safe = UPPER_BOUNDS if claim.relation == "<=" else LOWER_BOUNDS
    if claim.metric not in safe:
        return doubts
    return replace(doubts, found=tuple(doubt for doubt in doubts.found if doubt.name not in OF_STRENGTH))


def refuse_rotation(claim: Claim) -> None:
    """`UsageError` for a claim about sets that take turns, which no run on one model can be judged by."""
    if claim.versus == "static" or claim.metric in ROTATION:
        raise UsageError(
            f"gate {claim.text!r} is about parameter sets that take turns at serving, and one model is measured here; "
            f"give it to holdfast rotate admit POOL"
        )


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """Fail if any failed, else unclear if any is unclear, else pass."""
    if "fail" in verdicts:
        return "fail"
    return "unclear" if "unclear" in verdicts else "pass"


EXIT_CODES: Mapping[Verdict, int] = {"pass": 0, "fail": 1, "unclear": 4}
"""What the command line ends with."""


def exit_code(verdicts: Iterable[Verdict]) -> int:
    """0 if all gates pass or there is none, 1 if any fails, else 4: decided here for every output."""
    return EXIT_CODES[overall(tuple(verdicts))]
