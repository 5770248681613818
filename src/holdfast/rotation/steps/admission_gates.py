"""Gates of the admission of a parameter set to a pool, and the verdicts of an admission."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Evidence
from holdfast.core.types import Mask
from holdfast.gates import judging
from holdfast.gates.grammar import Claim
from holdfast.gates.judging import AtLeast, AtMost, Doubts, Verdict, overall
from holdfast.metrics.predictions import calibration_error
from holdfast.metrics.shares import worst_class
from holdfast.reports.words import percent
from holdfast.rotation.steps.set_measuring import (
    CONFIDENCE,
    LEAST,
    Attacker,
    Attackers,
    Gate,
    Loss,
    NeededExamples,
    TransferResult,
    Worst,
    changed_predictions,
    difference,
    largest_loss,
    points_text,
    robust_mask,
    share_of,
    share_text,
    slack,
    worst,
)
from holdfast.rotation.steps.set_measuring import tolerance_text as tolerated
from holdfast.statistics.intervals import Support, bonferroni, mean

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
Family = Literal["transfer", "white-box", "same draw", ""]
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


def not_applicable(name: str, why: str) -> GateResult:
    """Return the result of a gate that passes because it compares with something that does not exist."""
    return GateResult(name, None, "not applicable", "pass", why)


@dataclass(frozen=True)
class Measurements:
    """All measurements of a parameter set and of its reference sets on the same examples, from which the gates of its
    admission are judged.
    """

    attackers: Attackers
    transferred: TransferResult
    white: Evidence
    transferred_same_draw: TransferResult | None
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
    needs: Mapping[Gate, NeededExamples] = field(default_factory=dict)
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
            least_tolerance = LEAST[gate]
            return least_tolerance, f"at most {tolerated(least_tolerance)} less than {_BETTER} are allowed"
        return need.tolerance, (
            f"at most {tolerated(need.tolerance)} less than {_BETTER} are allowed, widened from "
            f"{tolerated(need.least)}, which needs {need.needed:,} held-out examples, but there are {need.n_held_out:,}"
        )

    @property
    def static(self) -> Estimate:
        """Success rate of white-box attacks on the serving set. If no set serves, it is the mean over all bases."""
        shares = [share_of(~robust_mask(evidence)[evidence["correct"]]) for evidence in self.before_white]
        low, value, high = (
            sum(getattr(evidence, end) for evidence in shares) / len(shares)
            for end in ("low", "value", "high")
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
    def same_draw(self) -> Worst | None:
        """Highest success rate of an attacker with other sets generated in the same draw, or None if there are no such
        sets.
        """
        attacker = self.attackers.same_draw
        if attacker is None or self.transferred_same_draw is None:
            return None
        return worst(self.transferred_same_draw, [attacker], self.confidence("same draw"))

    @property
    def clean_loss(self) -> Loss:
        """Clean accuracy that the set loses relative to the better of its reference sets."""
        incumbents, bases = (
            [evidence["correct"] for evidence in references] for references in (self.before, self.bases)
        )
        return self._loss(incumbents, bases, self.transferred.evidence["correct"], "transfer")

    @property
    def robust_loss(self) -> Loss:
        """Robust accuracy under white-box attacks that the set loses relative to the better of its reference sets."""
        incumbents, bases = (
            [robust_mask(evidence) for evidence in references]
            for references in (self.before_white, self.bases_white)
        )
        return self._loss(incumbents, bases, robust_mask(self.white), "white-box")

    def _loss(self, incumbents: Sequence[Mask], bases: Sequence[Mask], mask: Mask, family: Family) -> Loss:
        references = {"the serving set": incumbents} if self.serves else {}
        return largest_loss({**references, "the bases": bases}, mask, self.confidence(family))

    @property
    def churn(self) -> Estimate:
        """Fraction of inputs that the set classifies differently from the reference set."""
        changed = [changed_predictions(evidence, self.transferred.evidence) for evidence in self.before]
        return difference(changed, confidence=self.confidence("transfer"))


def gate_results(
    measurements: Measurements, doubts: Doubts, claims: Sequence[Claim]
) -> tuple[GateResult, ...]:
    """Return the results of all gates in the admission of one parameter set.

    `doubts` are the doubts of the white-box attacks on this set that were not raised for its references. `claims` are
    additional gates.
    """
    return (
        _clean(measurements),
        _robust(measurements, doubts),
        *_thefts(measurements),
        _churn(measurements),
        _odd_gradients(measurements, doubts.accepted),
        *(_additional_gate(claim, measurements, doubts) for claim in claims),
    )


def reported(measurements: Measurements) -> dict[str, Estimate]:
    """Return the measurements of a set that are reported but not used by any gate, such as its calibration error, by
    name.
    """
    estimates = {
        "white_box_success": share_of(~robust_mask(measurements.white)[measurements.white["correct"]]),
        "static_white_box_success": measurements.static,
        "worst_class": worst_class(measurements.white),
        "calibration_error": calibration_error(measurements.transferred.evidence),
    }
    surrogates_only = worst(measurements.transferred, [measurements.attackers.nothing])
    transfers = {"transfer_of_nothing": surrogates_only, "sibling_transfer": measurements.same_draw}
    return estimates | {name: result.estimate for name, result in transfers.items() if result is not None}


def _clean(measurements: Measurements) -> GateResult:
    loss, reference = measurements.clean_loss.estimate, measurements.clean_loss.reference
    limit, bound = measurements.tolerance("clean accuracy")
    reason = f"{points_text(loss)} than that of {reference}"
    return GateResult("clean accuracy", loss, bound, AtMost(limit)(loss, NO_DOUBTS), reason, "transfer")


def _robust(measurements: Measurements, doubts: Doubts) -> GateResult:
    loss, reference = measurements.robust_loss.estimate, measurements.robust_loss.reference
    limit, bound = measurements.tolerance("robust accuracy")
    verdict = AtMost(limit)(loss, doubts)
    reason = f"under PGD-20 and APGD {points_text(loss)} than that of {reference}"
    if verdict == "unclear" and loss.high <= limit:
        reason += f", and doubts are open: {', '.join(doubts.open)}"
        return GateResult("robust accuracy", loss, bound, verdict, reason)
    return GateResult("robust accuracy", loss, bound, verdict, reason, "white-box")


def _thefts(measurements: Measurements) -> tuple[GateResult, ...]:
    single, several = measurements.transfer, measurements.ensemble
    if single is None:
        reason = "no set is listed as stolen"
        return not_applicable("theft", reason), not_applicable("ensemble theft", reason)
    gates = [
        _against_surrogates("theft", single, measurements, measurements.attackers.nothing, NOTHING),
        _of_static(single, measurements),
    ]
    if several is None or measurements.attackers.evenly is None:
        reason = "only one set is listed as stolen"
        return (*gates, not_applicable("ensemble theft", reason))
    return (
        *gates,
        _against_surrogates("ensemble theft", several, measurements, measurements.attackers.evenly, SEVERAL),
    )


def _against_surrogates(
    gate: str, theft: Worst, measurements: Measurements, attacker: Attacker, times: float
) -> GateResult:
    """A theft gate: the success rate is at most `FLOOR`, or at most `times` that of a surrogate-only attacker."""
    surrogates_only = worst(measurements.transferred, [attacker])
    assert surrogates_only is not None
    verdict = _within_multiple(theft, surrogates_only, times, FLOOR, measurements.confidence("transfer"))
    bound = (
        f"at most {percent(FLOOR)} is allowed, or {times:g} times the {percent(surrogates_only.estimate.value)} of "
        f"{surrogates_only.by}"
    )
    return GateResult(gate, theft.estimate, bound, verdict, theft.description, "transfer")


def _within_multiple(
    theft: Worst, surrogates_only: Worst, times: float, floor: float, confidence: float
) -> Verdict:
    """Whether every attack breaks at most `floor`, or at most `times` what a surrogate-only attacker breaks.

    Both limits are tested with the upper ends of confidence intervals.
    """
    verdicts: list[Verdict] = []
    for place, broken in enumerate(theft.broken):
        alone, joint = share_of(broken, confidence), bonferroni(confidence, len(theft.broken))
        if alone.high <= floor or _excess(broken, surrogates_only.broken[0], times, confidence).high <= 0:
            verdicts.append("pass")
        elif place == 0 and share_of(broken, joint).low > floor:
            is_within = _excess(broken, surrogates_only.broken[0], times, joint).low <= 0
            verdicts.append("unclear" if is_within else "fail")
        else:
            verdicts.append("unclear")
    return overall(verdicts)


def _excess(broken: Mask, surrogates_only: Mask, times: float, confidence: float) -> Estimate:
    """Fraction of `broken` minus `times` the fraction of `surrogates_only`, with an interval, on the same inputs."""
    return mean(broken.double() - times * surrogates_only.double(), confidence, support=Support(-times, 1.0))


def _of_static(theft: Worst, measurements: Measurements) -> GateResult:
    """A theft gate: success is at most half of the white-box success, or close to that of a surrogate-only attacker.

    The second condition is for sets so robust that surrogates do nearly as well as the sets themselves; without it,
    none would pass.
    """
    gate, static = "theft of static", measurements.static
    surrogates_only = worst(measurements.transferred, [measurements.attackers.nothing])
    if not static.value:
        return not_applicable(gate, "white-box attacks on the serving set break nothing")
    assert surrogates_only is not None
    half, limit = STATIC * static.value, judging.NOTHING * static.value
    halved = AtMost(half)(theft.estimate, NO_DOUBTS)
    against_surrogates = _within_multiple(
        theft, surrogates_only, NOTHING, 0.0, measurements.confidence("transfer")
    )
    either = {halved, overall([against_surrogates, AtMost(limit)(theft.estimate, NO_DOUBTS)])}
    verdict = next(verdict_of_kind for verdict_of_kind in _BEST_FIRST if verdict_of_kind in either)
    bound = (
        f"at most {percent(half)} is allowed, {STATIC:g} times the success of white-box attacks on the serving set "
        f"({percent(static.value)}), or {NOTHING:g} times the {percent(surrogates_only.estimate.value)} of "
        f"{surrogates_only.by} and at most {percent(limit)}"
    )
    return GateResult(gate, theft.estimate, bound, verdict, theft.description, "transfer")


def _churn(measurements: Measurements) -> GateResult:
    changes_of_bases = [
        float(changed_predictions(first_base, second_base).double().mean())
        for first_base, second_base in combinations(measurements.bases, 2)
    ]
    limit = CHURN
    if changes_of_bases:
        usual, need = sum(changes_of_bases) / len(changes_of_bases), measurements.needs.get("clean accuracy")
        room = 0.0 if need is None else slack(usual, need.n_held_out, need.looks)
        limit = max(CHURN, _MORE * usual, usual + room)
    changed = measurements.churn
    if not measurements.serves:
        reason = f"{share_text(changed)} of inputs have another predicted class than by the bases"
        return GateResult("churn", changed, "not limited before a set serves", "pass", reason)
    bound = f"at most {percent(limit)} is allowed, " + (
        "1.5 times the difference between bases, or what sets of equal quality need"
        if limit > CHURN
        else "independent of the difference between bases"
    )
    reason = f"{share_text(changed)} of inputs have another predicted class than by the serving set"
    return GateResult("churn", changed, bound, AtMost(limit)(changed, NO_DOUBTS), reason, "transfer")


def _odd_gradients(measurements: Measurements, accepted: Mapping[str, str]) -> GateResult:
    """A gate against masked gradients: the set is easier to break, mostly by examples from sets of the same draw.

    More examples cannot decide it; the user may accept it.
    """
    gate, same_draw, theft = "odd-gradients", measurements.same_draw, measurements.transfer
    bound = f"at most {_ODD:g} times is allowed, or a set that is not easier to break than the sets before"
    if same_draw is None or theft is None:
        reason = "there is no set of the same draw, or no stolen set, to compare"
        return GateResult(gate, None, bound, "pass", reason)
    before = [robust_mask(evidence) for evidence in measurements.before_white]
    loss = difference(before, robust_mask(measurements.white), measurements.confidence("white-box"))
    # Prevents a division by zero if the examples from stolen sets break nothing: then one broken example is assumed.
    least_share = 1 / max(theft.estimate.n, 1)
    times = same_draw.estimate.value / max(theft.estimate.value, least_share)
    value = Estimate(times, times, times, same_draw.estimate.n)
    reason = (
        f"examples from sets of the same draw break {times:.1f} times as many as those from stolen sets, and "
        f"robust accuracy is {points_text(loss)}"
    )
    if loss.low <= 0 or times <= _ODD:
        return GateResult(gate, value, bound, "pass", reason)
    if gate in accepted:
        return GateResult(gate, value, bound, "pass", f"{reason}; accepted: {accepted[gate]}")
    return GateResult(gate, value, bound, "unclear", reason)


def _additional_gate(claim: Claim, measurements: Measurements, doubts: Doubts) -> GateResult:
    thefts: Mapping[str, tuple[Worst | None, Family]] = {
        "transfer_success": (measurements.transfer, "transfer"),
        "ensemble_transfer": (measurements.ensemble or measurements.transfer, "transfer"),
        "sibling_transfer": (measurements.same_draw, "same draw"),
    }
    if claim.metric in thefts:
        theft, family = thefts[claim.metric]
        if theft is None:
            return _vacuous(claim)
        bound = claim.bound * (measurements.static.value if claim.versus == "static" else 1.0)
        return _judged(claim, theft.estimate, theft.description, family, bound)
    estimates: Mapping[str, tuple[Callable[[], Estimate], Family]] = {
        "clean_accuracy": (
            lambda: share_of(
                measurements.transferred.evidence["correct"], measurements.confidence("transfer")
            ),
            "transfer",
        ),
        "robust_accuracy": (
            lambda: share_of(robust_mask(measurements.white), measurements.confidence("white-box")),
            "white-box",
        ),
        "churn": (lambda: measurements.churn, "transfer"),
        "clean_accuracy_drop": (lambda: measurements.clean_loss.estimate, "transfer"),
    }
    measured, family = estimates[claim.metric]
    estimate = measured()
    relevant_doubts = doubts if claim.metric == "robust_accuracy" else NO_DOUBTS
    return _judged(claim, estimate, f"it is {share_text(estimate)}", family, claim.bound, relevant_doubts)


CLAIMABLE = (
    "transfer_success", "ensemble_transfer", "sibling_transfer", "clean_accuracy", "robust_accuracy", "churn",
    "clean_accuracy_drop",
)  # fmt: skip
"""Metrics that may be used in additional gates on a set."""


def _vacuous(claim: Claim) -> GateResult:
    if claim.metric == "sibling_transfer":
        needed, reason = "two sets of the same draw are needed", "there is no other set of the same draw"
        return GateResult(claim.text, None, needed, "unclear", reason)
    return not_applicable(claim.text, "no set is listed as stolen")


def _judged(
    claim: Claim, estimate: Estimate, reason: str, family: Family, bound: float, doubts: Doubts = NO_DOUBTS
) -> GateResult:
    gate, word = (AtLeast(bound), "least") if claim.relation == ">=" else (AtMost(bound), "most")
    return GateResult(
        claim.text, estimate, f"at {word} {bound:.4g} is required", gate(estimate, doubts), reason, family
    )


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
