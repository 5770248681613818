"""Judges gates on the confidence intervals of their metrics, and determines the exit code of a command."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from holdfast.core.errors import UsageError
from holdfast.core.estimate import Estimate, Goal
from holdfast.core.evidence import Doubt, Evidence, Looks, Scope
from holdfast.core.names import enumerated
from holdfast.doubts.probing import doubt_test
from holdfast.gates.grammar import SEQUENTIAL, Claim, refused_verdict
from holdfast.metrics.catalogue import estimate as estimate_of
from holdfast.metrics.comparisons import LOSSES, basis, change, improvement
from holdfast.metrics.names import LOWER_BOUNDS, PROVED, ROTATION, UPPER_BOUNDS
from holdfast.metrics.shares import TooFew, too_few
from holdfast.statistics.intervals import confidence_sequence

TrainingVerdict = Literal["improved", "no difference shown", "worse"]


@dataclass(frozen=True)
class Before:
    """The measurement of the given model of a training, and the goal of the recipe."""

    evidence: Evidence
    goal: Goal

    def improvement(self, after: Evidence) -> Estimate:
        """Return the change from the given model to the new one on the same examples, positive if it is better."""
        return improvement(self.goal, change(self.goal.metric, after, self.evidence))


def training_verdict(improvement: Estimate) -> TrainingVerdict:
    """Return the verdict on a training by the interval of the improvement.

    >>> training_verdict(Estimate(0.2, 0.1, 0.3, 100)), training_verdict(Estimate(0.2, -0.1, 0.5, 10))
    ('improved', 'no difference shown')
    """
    if improvement.low > 0:
        return "improved"
    return "worse" if improvement.high < 0 else "no difference shown"


def refuse_goal(recipe: str, goal: Goal) -> None:
    """Raise `UsageError` if the metric that a recipe declares is not known as a difference between two runs."""
    if goal.metric not in LOSSES:
        raise UsageError(
            f"recipe {recipe} declares the goal {goal.metric!r}, whose difference between two models is not known; "
            f"one of {', '.join(LOSSES)} was expected"
        )


Verdict = Literal["pass", "fail", "unclear"]
_NAMED = 10  # classes or groups in a message


@dataclass(frozen=True)
class Doubts:
    """The doubts of a run, and the reasons for which the user accepted some of them."""

    results: tuple[Doubt, ...] = ()
    accepted: Mapping[str, str] = field(default_factory=dict)
    """reason of each accepted doubt, by the name of the doubt"""

    @property
    def open(self) -> tuple[str, ...]:
        """Names of the doubts that were raised and not accepted."""
        return tuple(d.name for d in self.results if d.state == "raised" and d.name not in self.accepted)


@dataclass(frozen=True)
class AtLeast:
    """Gate on a metric that must be at least `bound`. The confidence interval of the metric decides, not its value."""

    bound: float

    def __call__(self, estimate: Estimate, doubts: Doubts) -> Verdict:
        """Return the verdict.

        It is `fail` if the upper end of the interval is below the bound, `pass` if the lower end is at least the bound
        and no doubt is open, and `unclear` otherwise.
        """
        if estimate.high < self.bound:
            return "fail"  # a found adversarial example is a proof, which a doubt cannot change
        return "pass" if estimate.low >= self.bound and not doubts.open else "unclear"


@dataclass(frozen=True)
class AtMost:
    """Gate on a metric that must be at most `bound`. The confidence interval of the metric decides, not its value."""

    bound: float

    def __call__(self, estimate: Estimate, doubts: Doubts) -> Verdict:
        """Return the verdict.

        It is `fail` if the lower end of the interval is above the bound, `pass` if the upper end is at most the bound
        and no doubt is open, and `unclear` otherwise.
        """
        if estimate.low > self.bound:
            return "fail"
        return "pass" if estimate.high <= self.bound and not doubts.open else "unclear"


@dataclass(frozen=True)
class Improved:
    """Gate on the difference between the model after a training and the given one, which must be above zero."""

    def __call__(self, estimate: Estimate, doubts: Doubts) -> Verdict:
        """Return the verdict.

        It is `fail` if the new model is worse, `pass` if it is better and no doubt is open, and `unclear` otherwise.
        """
        outcome = training_verdict(estimate)
        if outcome == "worse":
            return "fail"
        return "pass" if outcome == "improved" and not doubts.open else "unclear"


@dataclass(frozen=True)
class Judgement:
    """A gate, the estimate of its metric with a confidence interval, and its verdict."""

    claim: Claim
    estimate: Estimate
    verdict: Verdict
    open_doubts: tuple[str, ...] = ()
    scope: Scope | None = None
    """which adversarial examples are counted in a comparison of robust accuracies; None for other gates"""
    too_few: TooFew | None = None
    """classes or groups for which the gate has too few examples to pass; None if there are none"""
    looks: Looks | None = None
    """how many examples it took to decide the condition of `until`, for a gate whose interval is valid at every look;
    None for other gates"""

    @property
    def because(self) -> str:
        """One sentence with the measured value, its confidence interval and the reason for the verdict of the gate."""
        estimate, bound = self.estimate, f"{self.claim.bound:g}"
        numbers = (
            f"{estimate.value:.4g}, 95 % interval {estimate.low:.4g} to {estimate.high:.4g}, n = {estimate.n}"
        )
        if self.looks is not None:
            numbers += f" of {self.looks.of}, valid at every look"
        if self.too_few is not None and self.verdict == "unclear":
            return f"{numbers}: {shortage(self.claim.metric, self.too_few.counts, self.too_few.needed)}"
        if self.verdict == "unclear" and self._inside():
            return (
                f"{numbers}: the interval meets {bound}, but doubts are open: {', '.join(self.open_doubts)}"
            )
        relation = {"pass": "all of it meets", "fail": "none of it meets", "unclear": "the interval contains"}
        return f"{numbers}: {relation[self.verdict]} {bound}"

    def __str__(self) -> str:
        return f"{self.verdict}: {self.because}"

    def __bool__(self) -> bool:
        """Return whether the gate passed. An unclear gate has not passed."""
        return self.verdict == "pass"

    def _inside(self) -> bool:
        low, high, bound = self.estimate.low, self.estimate.high, self.claim.bound
        if self.claim.versus == "before":
            return low > bound
        return low >= bound if self.claim.relation == ">=" else high <= bound


def judge(
    claim: Claim,
    evidence: Evidence,
    doubts: Doubts,
    *,
    baseline: Evidence | None = None,
    before: Before | None = None,
) -> Judgement:
    """Return the verdict of one gate on the evidence of a run. Raises `UsageError` with advice if its metric was not
    measured.

    `before` is the measurement of the given model of a training, with which a gate on its verdict compares.
    """
    refuse_rotation(claim)
    if claim.versus == "before":
        if before is None:
            raise refused_verdict(claim.text)
        scope = basis(evidence, before.evidence) if before.goal.metric == "robust_accuracy" else None
        return replace(judged_estimate(claim, before.improvement(evidence), doubts), scope=scope)
    constraint = evidence.threat.constraint
    if claim.eps is not None and claim.decibels != constraint.in_decibels:
        form = "EPSdB, as in @40dB" if constraint.in_decibels else "a number, as in @0.1"
        raise UsageError(f"gate {claim.text!r} cannot be judged: under {constraint} its eps is {form}")
    try:
        measured = estimate_of(claim.metric, evidence, eps=claim.eps, baseline=baseline)
    except UsageError as error:
        raise UsageError(f"gate {claim.text!r} cannot be judged: {error.message}", *error.remedies) from error
    if claim.relation == ">=" and (few := too_few(evidence, claim.metric, claim.bound)) is not None:
        judged = judged_estimate(claim, measured, doubts)
        return replace(judged, verdict="fail" if judged.verdict == "fail" else "unclear", too_few=few)
    scope = basis(evidence, baseline) if claim.metric == "regression" and baseline is not None else None
    looks = evidence.looks if claim.metric in SEQUENTIAL else None
    if looks is None:
        return replace(judged_estimate(claim, measured, doubts), scope=scope)
    # the number of examples depends on what was measured, which an ordinary interval does not allow for
    return replace(judged_estimate(claim, sequential(measured), doubts), looks=looks)


def shortage(metric: str, counts: Mapping[str, int], needed: int | None) -> str:
    """Return the reason why a gate on the worst class or group cannot pass: the number of examples of each with too
    few, and the number that each needs.
    """
    named = [f"{name} ({n})" for name, n in counts.items()]
    more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
    enough = (
        f"each needs {needed} or more, and with fewer the gate cannot pass even if all are robust"
        if needed is not None
        else "no number of examples is enough for this threshold"
    )
    kind = "class" if metric == "worst_class" else "group"
    return f"too few examples of {kind} {', '.join(named[:_NAMED])}{more}; {enough}"


def sequential(estimate: Estimate) -> Estimate:
    """Return the estimate of a share of examples with the interval that is valid at all numbers of examples together,
    so that a run may end as soon as it decides a gate.
    """
    low, high = confidence_sequence(estimate.value * estimate.n, estimate.n)
    return replace(estimate, low=low, high=high)


def judged_estimate(claim: Claim, estimate: Estimate, doubts: Doubts) -> Judgement:
    """Return the verdict of one gate on an estimate of its metric."""
    gate: Improved | AtLeast | AtMost
    if claim.versus == "before":
        gate = Improved()
    else:
        gate = AtLeast(claim.bound) if claim.relation == ">=" else AtMost(claim.bound)
    relevant = _relevant_doubts(claim, doubts)
    return Judgement(claim, estimate, gate(estimate, relevant), relevant.open)


def _relevant_doubts(claim: Claim, doubts: Doubts) -> Doubts:
    """Return the doubts that could invalidate the gate."""
    relevant = (doubt for doubt in doubts.results if depends_on(claim.metric, claim.relation, doubt.name))
    return replace(doubts, results=tuple(relevant))


def depends_on(metric: str, relation: str, doubt: str) -> bool:
    """Return whether a doubt could invalidate a gate on a metric.

    A doubt about the strength of attacks cannot if stronger attacks could only move the metric further inside its
    bound, or do not change it, as they do not change a proof.
    """
    safe = PROVED | (UPPER_BOUNDS if relation == "<=" else LOWER_BOUNDS)
    return metric not in safe or not doubt_test(doubt).of_strength


def refuse_rotation(claim: Claim) -> None:
    """Raise `UsageError` for a gate that compares parameter sets of a pool, because it cannot be judged for a single
    model.
    """
    if claim.versus == "static" or claim.metric in ROTATION:
        raise UsageError(
            f"gate {claim.text!r} is a condition on parameter sets of a pool, and one model is measured here; give it "
            f"to holdfast rotate admit POOL"
        )


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the verdict of all gates together: `fail` if any gate fails, otherwise `unclear` if any is unclear,
    otherwise `pass`.
    """
    if "fail" in verdicts:
        return "fail"
    return "unclear" if "unclear" in verdicts else "pass"


EXIT_CODES: Mapping[Verdict, int] = {"pass": 0, "fail": 1, "unclear": 4}
"""Exit code of the command line for each verdict."""


def exit_code(verdicts: Iterable[Verdict]) -> int:
    """Return the exit code of a command for the verdicts of its gates: 0 if all pass or there are none, 1 if any fails,
    otherwise 4.
    """
    return EXIT_CODES[overall(tuple(verdicts))]


AS_A0, LITTLE, HALF, NOTHING = 1.2, 0.05, 0.5, 0.8
"""Limits of the effects. Slowed: with confidence, the success is at most `HALF` of that of the white-box attack.
Stopped: slowed, and with confidence at most `AS_A0` times the success of A0; or with confidence at most `LITTLE`.
Unclear: the interval contains half of the white-box success. A0 and A5 are not affected by swaps. If A1 achieves
`NOTHING` of the white-box success or more, rotation does not protect from thefts."""
EFFECTS = {
    "stopped": "stopped",
    "slowed": "slowed",
    "unclear": "unclear because there are too few inputs",
    "not affected": "not affected",
}
Json = dict[str, Any]


def with_effects(rows: Sequence[Mapping[str, Any]], white_box: Mapping[str, Any] | None = None) -> list[Json]:
    """Add the effect of the rotation, such as stopped or slowed, to the measured success rate of each attacker.

    `white_box` is the success of an attacker's attacks with the serving set; if it is None, that of A5 is used.
    """
    shares = {row["attacker"]: row["share"] for row in rows}
    white, none = (white_box or shares["A5"])["value"], shares["A0"]["value"]
    return [{**row, "effect": _effect(row["attacker"], row["share"], white, none)} for row in rows]


def _effect(attacker: str, share: Mapping[str, Any] | None, white: float, none: float) -> str:
    if share is None:
        return "not measured"
    if attacker in ("A0", "A5"):
        return "not affected"
    half = share["high"] <= HALF * white
    if share["high"] <= LITTLE or (half and share["high"] <= AS_A0 * none):
        return "stopped"
    if half:
        return "slowed"
    return "unclear" if share["low"] <= HALF * white else "not affected"


def protection_verdict(rows: Sequence[Mapping[str, Any]], white_box: Mapping[str, Any] | None = None) -> str:
    """Return one or two sentences that state how well the rotation protects against each attacker."""
    by = {row["attacker"]: row for row in rows}
    stolen_share, white = by["A1"]["share"], white_box or by["A5"]["share"]
    by_effect = {effect: [row["attacker"] for row in rows if row["effect"] == effect] for effect in EFFECTS}
    parts = [
        f"{enumerated(attackers)} {'is' if len(attackers) == 1 else 'are'} {text}"
        for effect, text in EFFECTS.items()
        if (attackers := by_effect[effect])
    ]
    text = f"against the serving set, {'; '.join(parts)}"
    if not white["value"]:
        return (
            "white-box attacks on the serving set break nothing, so the effect of a theft cannot be measured; "
            f"{text}"
        )
    if (
        stolen_share is not None
        and stolen_share["value"] >= NOTHING * white["value"]
        and by["A1"]["effect"] == "not affected"
    ):
        return (
            f"no protection: an attack on one stolen set breaks {100 * stolen_share['value']:.1f} %, an attack on the "
            f"serving set {100 * white['value']:.1f} %; {text}"
        )
    return text
