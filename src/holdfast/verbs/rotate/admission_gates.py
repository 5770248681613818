"""Gates of the admission of a parameter set to a pool. They compare the set with reference sets on the same examples,
with confidence intervals.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Evidence
from holdfast.core.types import Mask
from holdfast.gates.grammar import Claim
from holdfast.gates.judging import AtLeast, AtMost, Doubts, Verdict, overall
from holdfast.metrics.attacked import calibration_error
from holdfast.metrics.shares import worst_class
from holdfast.ops.statistics import Support, bonferroni, mean
from holdfast.reports.numbers import percent
from holdfast.verbs.rotate import wording
from holdfast.verbs.rotate.comparing import (
    Loss,
    Worst,
    changed_predictions,
    difference,
    largest_loss,
    points_text,
    robust_mask,
    share_of,
    share_text,
    worst,
)
from holdfast.verbs.rotate.measuring import TransferResult
from holdfast.verbs.rotate.samples import CONFIDENCE, LEAST, Gate, Need, slack
from holdfast.verbs.rotate.samples import tolerance_text as tolerated
from holdfast.verbs.rotate.transfer_examples import Attacker, Attackers

CHURN = 0.03
"""Largest fraction of inputs that a set may classify differently from its reference."""
NOTHING, SEVERAL, FLOOR, STATIC = 1.2, 1.5, 0.05, 0.5
"""Limits for the success rate of attackers with stolen sets.

The success rate may be at most `NOTHING` times that of a surrogate-only attacker for one stolen set, and at most
`SEVERAL` times for several stolen sets. A success rate up to `FLOOR` is always allowed. In addition, the success rate
may be at most the fraction `STATIC` of the success rate of white-box attacks on the reference. Alternatively, it may be
at most `NOTHING` times that of a surrogate-only attacker, if it is below the limit above which rotation gives no
protection.
"""
_MORE = 1.5  # multiple of the difference between bases, which leaves room for the width of an interval
_ODD = 3.0  # ratio of the success of examples from sets of the same draw to that of examples from stolen sets
_BETTER = "the better of the serving set and the bases"
Family = Literal["transfer", "white-box", "siblings", ""]
"""Name of the measurement that is repeated with more examples if the gate is unclear."""
NO_DOUBTS = Doubts()
_BEST_FIRST: tuple[Verdict, ...] = ("pass", "unclear", "fail")


@dataclass(frozen=True)
class GateResult:
    """Result of one gate in the admission of a parameter set."""

    name: str
    """name of the gate"""
    estimate: Estimate | None
    """the measured value; None if nothing was measured"""
    bound: str
    """the limit, as text"""
    verdict: Verdict
    why: str
    """reason for the verdict: the measured values, as text"""
    family: Family = ""

    @property
    def description(self) -> str:
        """The gate, its measured result and its limit as text."""
        return f"{self.name}: {self.why}; {self.bound}"


@dataclass(frozen=True)
class Measurements:
    """All measurements of a parameter set and of its reference sets on the same examples, from which the gates of its
    admission are judged.
    """

    attackers: Attackers
    transferred: TransferResult
    white: Evidence
    siblings: TransferResult | None
    before: tuple[Evidence, ...]
    """evidence on clean inputs: of the serving set or, if no set serves, of each base"""
    before_white: tuple[Evidence, ...]
    bases: tuple[Evidence, ...]
    """evidence on clean inputs of each base"""
    bases_white: tuple[Evidence, ...]
    serves: bool
    """whether a set serves; if so, it is the first reference"""
    looks: Mapping[Family, int] = field(default_factory=dict)
    """for each measurement, the largest number of times that its gates are judged, with more examples each time; by
    default 1"""
    needs: Mapping[Gate, Need] = field(default_factory=dict)
    """number of examples that each gate needs; if there are fewer, its tolerance is widened"""

    def confidence(self, family: Family) -> float:
        """Return the confidence level of each interval, corrected for the repeated judging of a gate on more and more
        examples (Bonferroni).
        """
        return bonferroni(CONFIDENCE, self.looks.get(family, 1))

    def tolerance(self, gate: Gate) -> tuple[float, str]:
        """Return how much accuracy a set may lose to pass a gate, as a fraction, and a description of the limit."""
        need = self.needs.get(gate)
        if need is None or not need.widened:
            least = LEAST[gate]
            return least, f"at most {tolerated(least)} less than {_BETTER} are allowed"
        return need.tolerance, (
            f"at most {tolerated(need.tolerance)} less than {_BETTER} are allowed, widened from "
            f"{tolerated(need.least)}, which needs {need.needed:,} held-out examples, but there are {need.n_held_out:,}"
        )

    @property
    def static(self) -> Estimate:
        """Success rate of white-box attacks on the serving set. If no set serves, it is the mean over all bases."""
        shares = [share_of(~robust_mask(one)[one["correct"]]) for one in self.before_white]
        low, value, high = (
            sum(getattr(one, end) for one in shares) / len(shares) for end in ("low", "value", "high")
        )
        return Estimate(value, low, high, shares[0].n)

    @property
    def transfer(self) -> Worst | None:
        """Highest success rate of an attacker with one stolen set, or None if no set is stolen."""
        return worst(self.transferred, self.attackers.one, self.confidence("transfer"))

    @property
    def ensemble(self) -> Worst | None:
        """Success rate of the best attack of an attacker with several stolen sets, or None if fewer than two sets are
        stolen.
        """
        several = self.attackers.several
        if several is None:
            return None
        return worst(self.transferred, [several], self.confidence("transfer"))

    @property
    def sibling(self) -> Worst | None:
        """Highest success rate of an attacker with other sets generated in the same draw, or None if there are no such
        sets.
        """
        them = self.attackers.siblings
        if them is None or self.siblings is None:
            return None
        return worst(self.siblings, [them], self.confidence("siblings"))

    @property
    def clean_loss(self) -> Loss:
        """Clean accuracy that the set loses relative to the better of its reference sets."""
        before, bases = ([one["correct"] for one in them] for them in (self.before, self.bases))
        return self._loss(before, bases, self.transferred.evidence["correct"], "transfer")

    @property
    def robust_loss(self) -> Loss:
        """Robust accuracy under white-box attacks that the set loses relative to the better of its reference sets."""
        before, bases = ([robust_mask(one) for one in them] for them in (self.before_white, self.bases_white))
        return self._loss(before, bases, robust_mask(self.white), "white-box")

    def _loss(self, before: Sequence[Mask], bases: Sequence[Mask], after: Mask, family: Family) -> Loss:
        against = {"the serving set": before} if self.serves else {}
        return largest_loss({**against, "the bases": bases}, after, self.confidence(family))

    @property
    def churn(self) -> Estimate:
        """Fraction of inputs that the set classifies differently from the reference set."""
        changed = [changed_predictions(one, self.transferred.evidence) for one in self.before]
        return difference(changed, confidence=self.confidence("transfer"))


def gate_results(seen: Measurements, doubts: Doubts, claims: Sequence[Claim]) -> tuple[GateResult, ...]:
    """Return the results of all gates in the admission of one parameter set.

    `doubts` are the doubts of the white-box attacks on this set that were not raised for its references. `claims` are
    additional gates.
    """
    return (
        _clean(seen),
        _robust(seen, doubts),
        *_thefts(seen),
        _churn(seen),
        _odd_gradients(seen, doubts.accepted),
        *(_claimed(claim, seen, doubts) for claim in claims),
    )


def reported(seen: Measurements) -> dict[str, Estimate]:
    """Return the measurements of a set that are reported but not used by any gate, such as its calibration error, by
    name.
    """
    estimates = {
        "white_box_success": share_of(~robust_mask(seen.white)[seen.white["correct"]]),
        "static_white_box_success": seen.static,
        "worst_class": worst_class(seen.white),
        "calibration_error": calibration_error(seen.transferred.evidence),
    }
    nothing = worst(seen.transferred, [seen.attackers.nothing])
    those = {"transfer_of_nothing": nothing, "sibling_transfer": seen.sibling}
    return estimates | {name: one.estimate for name, one in those.items() if one is not None}


def _clean(seen: Measurements) -> GateResult:
    loss, reference = seen.clean_loss.estimate, seen.clean_loss.reference
    most, bound = seen.tolerance("clean accuracy")
    why = f"clean accuracy is {points_text(loss)} lower than that of {reference}"
    return GateResult("clean accuracy", loss, bound, AtMost(most)(loss, NO_DOUBTS), why, "transfer")


def _robust(seen: Measurements, doubts: Doubts) -> GateResult:
    loss, reference = seen.robust_loss.estimate, seen.robust_loss.reference
    most, bound = seen.tolerance("robust accuracy")
    verdict = AtMost(most)(loss, doubts)
    why = f"robust accuracy under PGD-20 and APGD is {points_text(loss)} lower than that of {reference}"
    if verdict == "unclear" and loss.high <= most:
        why += f", and doubts are open: {', '.join(doubts.open)}"
        return GateResult("robust accuracy", loss, bound, verdict, why)
    return GateResult("robust accuracy", loss, bound, verdict, why, "white-box")


def _thefts(seen: Measurements) -> tuple[GateResult, ...]:
    one, several = seen.transfer, seen.ensemble
    if one is None:
        why = "no set is listed as stolen"
        return tuple(
            GateResult(gate, None, "not applicable", "pass", why) for gate in ("theft", "ensemble theft")
        )
    gates = [
        _beside_surrogates("theft", one, seen, seen.attackers.nothing, NOTHING),
        _of_static(one, seen),
    ]
    if several is None or seen.attackers.evenly is None:
        why = "only one set is listed as stolen"
        return (*gates, GateResult("ensemble theft", None, "not applicable", "pass", why))
    return (*gates, _beside_surrogates("ensemble theft", several, seen, seen.attackers.evenly, SEVERAL))


def _beside_surrogates(
    gate: str, theft: Worst, seen: Measurements, attacker: Attacker, times: float
) -> GateResult:
    """A theft gate: the success rate is at most `FLOOR`, or at most `times` that of a surrogate-only attacker."""
    nothing = worst(seen.transferred, [attacker])
    assert nothing is not None
    verdict = _hardly_more(theft, nothing, times, FLOOR, seen.confidence("transfer"))
    bound = (
        f"at most {percent(FLOOR)} is allowed, or {times:g} times the {percent(nothing.estimate.value)} of "
        f"{nothing.by}"
    )
    return GateResult(gate, theft.estimate, bound, verdict, theft.description, "transfer")


def _hardly_more(theft: Worst, nothing: Worst, times: float, floor: float, each: float) -> Verdict:
    """Whether every attack breaks at most `floor`, or at most `times` what a surrogate-only attacker breaks.

    Both limits are tested with the upper ends of confidence intervals.
    """
    verdicts: list[Verdict] = []
    for place, broken in enumerate(theft.broken):
        alone, joint = share_of(broken, each), bonferroni(each, len(theft.broken))
        if alone.high <= floor or _excess(broken, nothing.broken[0], times, each).high <= 0:
            verdicts.append("pass")
        elif place == 0 and share_of(broken, joint).low > floor:
            less = _excess(broken, nothing.broken[0], times, joint).low <= 0
            verdicts.append("unclear" if less else "fail")
        else:
            verdicts.append("unclear")
    return overall(verdicts)


def _excess(broken: Mask, nothing: Mask, times: float, confidence: float) -> Estimate:
    """Fraction of `broken` minus `times` the fraction of `nothing`, with an interval, on the same inputs."""
    return mean(broken.double() - times * nothing.double(), confidence, support=Support(-times, 1.0))


def _of_static(theft: Worst, seen: Measurements) -> GateResult:
    """A theft gate: success is at most half of the white-box success, or close to that of a surrogate-only attacker.

    The second condition is for sets so robust that surrogates do nearly as well as the sets themselves; without it,
    none would pass.
    """
    gate, static, nothing = "theft of static", seen.static, worst(seen.transferred, [seen.attackers.nothing])
    if not static.value:
        return GateResult(
            gate, None, "not applicable", "pass", "white-box attacks on the serving set break nothing"
        )
    assert nothing is not None
    half, most = STATIC * static.value, wording.NOTHING * static.value
    halved = AtMost(half)(theft.estimate, NO_DOUBTS)
    beside = _hardly_more(theft, nothing, NOTHING, 0.0, seen.confidence("transfer"))
    either = {halved, overall([beside, AtMost(most)(theft.estimate, NO_DOUBTS)])}
    verdict = next(one for one in _BEST_FIRST if one in either)
    bound = (
        f"at most {percent(half)} is allowed, {STATIC:g} times the success of white-box attacks on the serving set "
        f"({percent(static.value)}), or {NOTHING:g} times the {percent(nothing.estimate.value)} of {nothing.by} "
        f"and at most {percent(most)}"
    )
    return GateResult(gate, theft.estimate, bound, verdict, theft.description, "transfer")


def _churn(seen: Measurements) -> GateResult:
    among = [
        float(changed_predictions(one, other).double().mean()) for one, other in combinations(seen.bases, 2)
    ]
    most = CHURN
    if among:
        usual, need = sum(among) / len(among), seen.needs.get("clean accuracy")
        room = 0.0 if need is None else slack(usual, need.n_held_out, need.looks)
        most = max(CHURN, _MORE * usual, usual + room)
    changed = seen.churn
    if not seen.serves:
        why = f"{share_text(changed)} of inputs have another predicted class than by the bases"
        return GateResult("churn", changed, "not limited before a set serves", "pass", why)
    bound = f"at most {percent(most)} is allowed, " + (
        "1.5 times the difference between bases, or what sets of equal quality need"
        if most > CHURN
        else "independent of the difference between bases"
    )
    why = f"{share_text(changed)} of inputs have another predicted class than by the serving set"
    return GateResult("churn", changed, bound, AtMost(most)(changed, NO_DOUBTS), why, "transfer")


def _odd_gradients(seen: Measurements, accepted: Mapping[str, str]) -> GateResult:
    """A gate against masked gradients: the set is easier to break, mostly by examples from sets of the same draw.

    More examples cannot decide it; the user may accept it.
    """
    gate, bound = (
        "odd-gradients",
        f"at most {_ODD:g} times is allowed, or a set that is not easier to break than the sets before",
    )
    sibling, theft = seen.sibling, seen.transfer
    if sibling is None or theft is None:
        return GateResult(
            gate, None, bound, "pass", "there is no set of the same draw, or no stolen set, to compare"
        )
    confidence = seen.confidence("white-box")
    easier = difference([robust_mask(one) for one in seen.before_white], robust_mask(seen.white), confidence)
    least = 1 / max(theft.estimate.n, 1)
    times = sibling.estimate.value / max(theft.estimate.value, least)
    value = Estimate(times, times, times, sibling.estimate.n)
    why = (
        f"examples from sets of the same draw break {times:.1f} times as many as those from stolen sets, and "
        f"robust accuracy is {points_text(easier)} lower"
    )
    if easier.low <= 0 or times <= _ODD:
        return GateResult(gate, value, bound, "pass", why)
    if gate in accepted:
        return GateResult(gate, value, bound, "pass", f"{why}; accepted: {accepted[gate]}")
    return GateResult(gate, value, bound, "unclear", why)


def _claimed(claim: Claim, seen: Measurements, doubts: Doubts) -> GateResult:
    thefts: Mapping[str, tuple[Worst | None, Family]] = {
        "transfer_success": (seen.transfer, "transfer"),
        "ensemble_transfer": (seen.ensemble or seen.transfer, "transfer"),
        "sibling_transfer": (seen.sibling, "siblings"),
    }
    if claim.metric in thefts:
        theft, family = thefts[claim.metric]
        if theft is None:
            return _vacuous(claim)
        bound = claim.bound * (seen.static.value if claim.versus == "static" else 1.0)
        return _judged(claim, theft.estimate, theft.description, family, bound)
    plain: Mapping[str, tuple[Callable[[], Estimate], Family]] = {
        "clean_accuracy": (
            lambda: share_of(seen.transferred.evidence["correct"], seen.confidence("transfer")),
            "transfer",
        ),
        "robust_accuracy": (
            lambda: share_of(robust_mask(seen.white), seen.confidence("white-box")),
            "white-box",
        ),
        "churn": (lambda: seen.churn, "transfer"),
        "clean_accuracy_drop": (lambda: seen.clean_loss.estimate, "transfer"),
    }
    measured, family = plain[claim.metric]
    estimate = measured()
    about = doubts if claim.metric == "robust_accuracy" else NO_DOUBTS
    return _judged(claim, estimate, f"it is {share_text(estimate)}", family, claim.bound, about)


CLAIMABLE = (
    "transfer_success", "ensemble_transfer", "sibling_transfer", "clean_accuracy", "robust_accuracy", "churn",
    "clean_accuracy_drop",
)  # fmt: skip
"""Metrics that may be used in additional gates on a set."""


def _vacuous(claim: Claim) -> GateResult:
    if claim.metric == "sibling_transfer":
        return GateResult(
            claim.text,
            None,
            "two sets of the same draw are needed",
            "unclear",
            "there is no other set of the same draw",
        )
    return GateResult(claim.text, None, "not applicable", "pass", "no set is listed as stolen")


def _judged(
    claim: Claim, estimate: Estimate, why: str, family: Family, bound: float, doubts: Doubts = NO_DOUBTS
) -> GateResult:
    gate, word = (AtLeast(bound), "least") if claim.relation == ">=" else (AtMost(bound), "most")
    return GateResult(
        claim.text, estimate, f"at {word} {bound:.4g} is required", gate(estimate, doubts), why, family
    )
