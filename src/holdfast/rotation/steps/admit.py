"""The step `admit` of a rotation: it tests each candidate against attackers with the stolen sets."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from holdfast.attacks.costs import expected_passes
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Evidence
from holdfast.core.model import Classifier
from holdfast.core.types import Inputs
from holdfast.gates.grammar import Claim, parse
from holdfast.gates.judging import Doubts
from holdfast.reports.words import amount
from holdfast.rotation import Members, canary
from holdfast.rotation.collecting import l1, refuse_foreign, rotated
from holdfast.rotation.pool import NAME_DIGITS, Pool
from holdfast.rotation.rotating_model import CANARIES
from holdfast.rotation.steps.admission_gates import (
    CLAIMABLE,
    IN_A_ROW,
    Admission,
    Family,
    GateResult,
    Judged,
    Measurements,
    gate_results,
    reported,
)
from holdfast.rotation.steps.alternatives import ATTACKS, TransferAttacker
from holdfast.rotation.steps.rotation_request import (
    FIRST,
    OWN,
    PoolStore,
    RotateRequest,
    bases_left,
    state_of,
)
from holdfast.rotation.steps.set_measuring import (
    SAME_DRAW_SETS,
    WHITE,
    Gate,
    NeededExamples,
    SetMeasurements,
    TransferExamples,
    attackers_against,
    exposed_for,
    judged_ranges,
    measured_needs,
    robust_mask,
    set_subject,
    sets_of_same_draw,
    statement,
    widened,
)
from holdfast.runs.assess.expected_time import duration, step_times
from holdfast.runs.assess.request import DescribedModel
from holdfast.runs.engine.progress import Notify, Progress, ignore, silent, stoppable
from holdfast.runs.engine.run import Run
from holdfast.runs.store.columns import content_digest
from holdfast.runs.store.folder import StoredStage

_SIGMAS = 3.0  # standard deviations: few sets that were trained in the same way are beyond
_LEAST_SPREAD = 0.25  # share of the mean norm: half an epoch of immunisation changes biases by a third of it
_LEAST_SIZE = 1e-3  # norm for each parameter, for biases that are still close to zero
_SAME = 1e-6  # share of the mean absolute parameter, for rounding errors


def nonfinite_tensors(weights: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors of a parameter set with infinite or NaN values where the original network has finite
    values.
    """
    return [
        name for name, value in weights.items() if bool((~value.isfinite() & like[name].isfinite()).any())
    ]


def tensor_gate(
    weights: Mapping[str, Tensor],
    known: Sequence[Mapping[str, Tensor]],
    names: Sequence[str],
    *,
    trained_alike: bool,
) -> GateResult:
    """Return the result of the gate that tests the values of a new set's tensors.

    It passes if all values are finite and, for a set that was trained in the same way as the known sets
    (`trained_alike`), each norm is within three standard deviations of their norms.
    """
    bound = "all values finite"
    if trained_alike:
        bound += f", norms within {_SIGMAS:g} standard deviations of those of {len(known)} sets trained in the same way"
    broken = nonfinite_tensors(weights, known[0])
    if broken:
        return GateResult("tensors", None, bound, "fail", f"{broken[0]} contains values that are not finite")
    if not trained_alike:
        return GateResult("tensors", None, bound, "pass", "all values are finite")
    worst, where = max((_sigmas(name, weights, known), name) for name in names)
    estimate = Estimate(worst, worst, worst, len(known))
    reason = f"the norm of {where} differs by {worst:.1f} standard deviations"
    return GateResult("tensors", estimate, bound, "pass" if worst <= _SIGMAS else "fail", reason)


def _sigmas(name: str, weights: Mapping[str, Tensor], known: Sequence[Mapping[str, Tensor]]) -> float:
    norms = torch.stack([weights_of_set[name].double().norm() for weights_of_set in known])
    mean = float(norms.mean())
    spread = float(norms.std()) if len(norms) > 1 else 0.0
    # Sets of few runs have nearly equal norms; without a least spread, rounding would be several standard deviations.
    least_spread = max(_LEAST_SPREAD * mean, _LEAST_SIZE * math.sqrt(weights[name].numel()))
    return abs(float(weights[name].double().norm()) - mean) / max(spread, least_spread)


def distance(
    weights: Mapping[str, Tensor], stolen: Mapping[str, Mapping[str, Tensor]], names: Sequence[str]
) -> tuple[float, str]:
    """Return the mean absolute difference between the parameters of a set and those of the nearest stolen set, and the
    name of the stolen set.

    `weights`, and each set of `stolen` by its name, are tensors by name; those with the given `names` are compared. The
    difference is 0 if values are not finite, and infinite if there is no stolen set.
    """
    if not stolen:
        return math.inf, ""
    if not all(bool(weights[name].isfinite().all()) for name in names):
        return 0.0, ""
    distances = l1(_side_by_side([weights], names), _side_by_side([*stolen.values()], names))[0]
    place = int(distances.argmin())
    return float(distances[place]), list(stolen)[place]


def duplicate_gate(
    weights: Mapping[str, Tensor], stolen: Mapping[str, Mapping[str, Tensor]], names: Sequence[str]
) -> GateResult | None:
    """Return a failed gate if a parameter set is equal to a stolen set up to rounding, or None for any other set.

    The sets are equal if their `distance` is at most one millionth of the mean absolute parameter of the tested set.
    `weights`, and each set of `stolen` by its name, are tensors by name; those with the given `names` are compared, and
    their values must be finite.
    """
    difference, name = distance(weights, stolen, names)
    size = sum(float(weights[tensor_name].abs().sum()) for tensor_name in names) / sum(
        weights[tensor_name].numel() for tensor_name in names
    )
    if not stolen or difference > _SAME * size:
        return None
    estimate = Estimate(difference, difference, difference, len(stolen))
    bound, reason = "different from every stolen set", f"it equals the stolen set {name}"
    return GateResult("distance", estimate, bound, "fail", reason)


def _side_by_side(sets: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> Members:
    return Members.of([{name: weights[name] for name in names} for weights in sets], range(len(sets)))


_SAMPLE, _BATCH = 8, 250  # examples on which passes are timed, and batch size of transfer attacks
_CRAFTED = 160
"""Gradients of all transfer attacks for each example and source; see `TransferAttacker.crafted`."""


@dataclass(frozen=True)
class ExpectedTime:
    """Lower and upper estimate of the seconds of a run."""

    least_s: float
    most_s: float

    def __str__(self) -> str:
        """Return the range as text.

        >>> str(ExpectedTime(2, 190))
        'about 2 s to 3.2 min'
        """
        texts = [duration(max(seconds, 1)) for seconds in (self.least_s, self.most_s)]
        return f"about {' to '.join(dict.fromkeys(texts))}"


def admission_time(
    common: RotateRequest, sizes: tuple[int, int, int], sets: int, references: int, stolen: int
) -> ExpectedTime:
    """Estimate how long it takes to judge `sets` parameter sets.

    `sizes` are the first numbers of held-out examples for transfer attacks, white-box attacks and attacks from the same
    draw; `references` is the number of sets that the candidates are compared with, and `stolen` the largest number of
    stolen sets. The least time is that of an admission whose transfer examples are stored and whose gates are clear on
    the first examples, and the most that of one that computes all of them on all held-out examples.
    """
    held_out = common.held_out
    sample = held_out.take(torch.arange(min(_SAMPLE, len(held_out)), device=held_out.ids.device))
    steps = step_times(common.model, common.threat, sample, _BATCH)
    forward_s, gradient_s = (step.of(_BATCH) / _BATCH for step in (steps.query, steps.gradient))
    passes = [expected_passes(member.attack, common.threat, common.model.classes or 2) for member in WHITE]
    white_s = sum(steps.of(each, _BATCH) for each in passes) / _BATCH

    def judging(transfer: int, white: int, same_draw: int) -> float:
        attackers = 2 + stolen
        each = len(ATTACKS) * attackers * transfer * forward_s + white * white_s
        return each + _CRAFTED * SAME_DRAW_SETS * same_draw * gradient_s

    n = len(held_out)
    several = 2 * min(stolen, OWN) if stolen > 1 else 0
    once = _CRAFTED * n * (OWN + stolen + several) * gradient_s + references * n * white_s
    least = sets * judging(*(min(size, n) for size in sizes))
    return ExpectedTime(least, once + sets * judging(n, n, n))


CANARY_INPUTS = "canaries"
"""Name of the file of the pool with the canary inputs."""
_WHITE, _SAME_DRAW = 2, 10
"""Divisors of the first number of examples: for white-box attacks, which are slowest, and for attacks from sets
generated in the same draw, which decide no gate."""
_FAMILIES: Mapping[Family, str] = {
    "transfer": "transfer attacks",
    "white-box": "white-box attacks",
    "same draw": "attacks from sets of the same draw",
}


@dataclass(frozen=True)
class AdmitRequest:
    """The pool whose candidates are judged, and the settings of the gates and measurements."""

    pool: Pool
    common: RotateRequest
    """the settings that all sets of the pool share"""
    claims: Sequence[str] = ()
    """gates in addition to the default ones, as text"""
    accepted: Mapping[str, str] = field(default_factory=dict)
    """accepted doubts by name, with reasons"""
    n_judged: int = FIRST
    """number of held-out examples on which each set is judged first"""
    transfer_attacker: TransferAttacker = field(default_factory=TransferAttacker)
    until_admitted: bool = False
    """whether the call ends as soon as one candidate is admitted"""
    only: str = ""
    """name of the candidate that is judged; empty for all sets that wait to be judged"""


def admit(
    request: AdmitRequest,
    *,
    again: str = "",
    notify: Notify = ignore,
    progress: Progress = silent,
    is_step: bool = False,
) -> Admission:
    """Judge every candidate of a pool, starting with the one farthest from the stolen sets, and record the verdicts in
    the ledger.

    Admitted sets that do not serve yet are judged again if a set was stolen after their admission. The call ends after
    five refusals in a row. The expected time is stated, unless the admission `is_step` of a rotation, which states the
    time of all its steps. `again` states how a stopped call is resumed. Raises `UsageError` if there is no candidate,
    a gate cannot be judged, or another process admits sets.
    """
    pool = request.pool
    again = again or f"finished steps are stored; resume with: holdfast rotate admit {pool.shown}"
    claims = tuple(map(parsed_claim, request.claims))
    with stoppable(again) as stopper, pool.alone_at("admit"), request.common.enough_threads():
        examples = TransferExamples(pool, request.common, request.transfer_attacker, notify)
        measuring = SetMeasurements(pool, examples, progress, again)
        run = Run((CANARY_INPUTS,), PoolStore(pool=pool), stopper=stopper, progress=progress)
        admitting = _Admitting(
            measuring, run, claims, request.accepted, request.n_judged, notify, request.only
        )
        if not admitting.waiting:
            raise UsageError(
                f"{str(pool.path)!r} contains no candidate; generate some with holdfast rotate draw {pool.shown}"
            )
        if notify is not ignore and not is_step:
            notify(admitting.expected_time())
        judged: list[Judged] = []
        refused_in_a_row = 0
        while refused_in_a_row < IN_A_ROW and admitting.waiting:
            verdict = admitting.next_verdict()
            if not admitting.record(verdict):
                continue
            judged.append(verdict)
            refused_in_a_row = 0 if verdict.verdict == "admitted" else refused_in_a_row + 1
            notify(f"{verdict.name} {verdict.verdict}: {verdict.why}")
            if request.until_admitted and verdict.verdict == "admitted":
                break
        return Admission(tuple(judged), admitting.waiting)


def parsed_claim(text: str) -> Claim:
    """Return a gate in addition to the default ones. Raises `UsageError` for a metric that an admission does not
    measure.
    """
    claim = parse(text)
    if claim.metric not in CLAIMABLE or claim.eps is not None:
        raise UsageError(
            f"gate {text!r}: an admission can test {', '.join(CLAIMABLE)}, at the eps of the pool; for other "
            "metrics use holdfast assess"
        )
    return claim


@dataclass
class _Admitting:
    """The measurements and verdicts of one call of `admit`."""

    measuring: SetMeasurements
    run: Run
    claims: tuple[Claim, ...]
    accepted: Mapping[str, str]
    n_judged: int
    notify: Notify
    only: str = ""
    _weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def pool(self) -> Pool:
        """The pool whose candidates are judged."""
        return self.measuring.pool

    @property
    def request(self) -> RotateRequest:
        """The settings that all parameter sets of the pool share."""
        return self.measuring.transfer_examples.request

    def expected_time(self) -> str:
        """Return a message with the expected time of the admission."""
        waiting = self.waiting
        expected = admission_time(
            self.request,
            first_sizes(self.n_judged),
            len(waiting),
            len(self._bases) + len(self._incumbents),
            max(len(exposed_for(self.pool, name)) for name in waiting),
        )
        return (
            f"expected total time: {expected} for {amount(len(waiting), 'sets')}, depending on how many examples the "
            "gates need, and on which examples of attackers are already stored"
        )

    def next_verdict(self) -> Judged:
        """Judge the next parameter set: one whose tensors do not match the model, or else the set that is farthest from
        the stolen sets.
        """
        waiting = self.waiting
        # A set with tensors of another shape has no distance, so these sets are refused first.
        foreign = [verdict for verdict in map(self._foreign, waiting) if verdict is not None]
        return foreign[0] if foreign else self._judged(max(waiting, key=self._distance))

    @property
    def waiting(self) -> tuple[str, ...]:
        """Names of the candidates, and of admitted sets that were judged before a later theft was reported."""
        names = (*self.pool.candidates, *self.pool.unjudged)
        return tuple(name for name in names if name == self.only) if self.only else names

    def _foreign(self, name: str) -> Judged | None:
        """The refusal of a set whose tensors do not match the model; None if they match."""
        try:
            refuse_foreign({**self.weights(name)}, _shapes(self.request.model), f"set {name!r}")
        except TargetError as error:
            gate = GateResult("tensors", None, "those of the model", "fail", error.message)
            return Judged(name, "refused", (gate,), gate.description, gate.name)
        return None

    def _judged(self, name: str) -> Judged:
        weights, exposed = self.weights(name), self._exposed(name)
        # A set of `adapt` was trained further by a recipe of its own, which may change its norms.
        trained_alike = self.pool.about(name).get("by") != "adapt"
        tensors = tensor_gate(weights, self._known, self._names, trained_alike=trained_alike)
        refused: GateResult | None = tensors
        if tensors.verdict != "fail":
            refused = duplicate_gate(weights, self._weights_by_name(exposed), self._names)
        if refused is not None:
            return Judged(name, "refused", (refused,), refused.description, refused.name, exposed)
        n_examples = dict(self._first)
        n_held = len(self.request.held_out)
        while True:
            n_examples = {family: min(size, n_held) for family, size in n_examples.items()}
            measurements = self._measurements(name, exposed, n_examples)
            gates = (tensors, *gate_results(measurements, self._doubts(measurements), self.claims))
            unclear = {
                gate.family
                for gate in gates
                if gate.verdict == "unclear" and gate.family and n_examples[gate.family] < n_held
            }
            if not unclear or any(gate.verdict == "fail" for gate in gates):
                break
            self.notify(
                f"{name}: unclear for {', '.join(_FAMILIES[family] for family in sorted(unclear))}; measuring "
                "again with twice as many examples"
            )
            n_examples = {
                family: 2 * size if family in unclear else size for family, size in n_examples.items()
            }
        decisive = next(
            (gate for verdict in ("fail", "unclear") for gate in gates if gate.verdict == verdict), None
        )
        measured = exposed, reported(measurements)
        if decisive is None:
            return Judged(name, "admitted", gates, self._reason(gates), "", *measured)
        suffix = " (unclear on all held-out examples)" if decisive.verdict == "unclear" else ""
        return Judged(name, "refused", gates, f"{decisive.description}{suffix}", decisive.name, *measured)

    def record(self, judged: Judged) -> bool:
        """Record the verdict on a parameter set in the ledger. Return whether it was recorded.

        It is not recorded if the set already serves, or if another set was stolen in the meantime and must be
        considered. The bases of an admitted set are listed as stolen before the set is admitted, so that a kill
        cannot omit them.
        """
        fingerprint = ""
        if judged.verdict == "admitted":
            fingerprint = canary(self.request.of_set(self.pool, judged.name), self._canaries)
        with self.run.stopper.finishing(), self.pool.ledger.alone():
            member = self.pool.ledger.member(judged.name)
            if member.state not in ("candidate", "admitted"):
                self.notify(
                    f"note: {judged.name} is {member.state} already, so the verdict {judged.verdict} is not recorded: "
                    f"{judged.why}"
                )
                return False
            if judged.verdict == "refused":
                self.pool.refuse(judged.name, judged.why)
                return True
            if set(judged.against) != set(self._exposed(judged.name)):
                self.notify(
                    f"{judged.name}: another set was listed as stolen in the meantime, so this one is judged again"
                )
                return False
            for base in map(self.pool.ledger.member, member.bases):
                if base.exposed is None and not base.deleted:
                    reason = f"{judged.name}, which was generated from it, was admitted"
                    self.pool.expose(base.name, reason, automatic=True)
            # Read again, because the bases were listed as stolen just before.
            against = exposed_for(self.pool, judged.name)
            self.pool.admit(judged.name, judged.why, canary=fingerprint, against=against)
        return True

    def _reason(self, gates: Sequence[GateResult]) -> str:
        """The reason for an admission, with widened tolerances."""
        named_gates = ("clean accuracy", "theft", "ensemble theft")
        reasons = [f"{gate.name}: {gate.why}" for gate in gates if gate.name in named_gates]
        return "; ".join([*reasons, *widened(self._needs.values())])

    # --- measurements

    def _measurements(self, name: str, exposed: tuple[str, ...], n: Mapping[Family, int]) -> Measurements:
        subject, first = self._subject(name), self._first
        same_draw = sets_of_same_draw(self.pool, name, self._finite)
        attackers = attackers_against(self.measuring.transfer_examples, name, exposed, same_draw)
        compared = (attackers.nothing, *attackers.one, attackers.several, attackers.evenly)
        measured = [*dict.fromkeys(attacker for attacker in compared if attacker is not None)]
        transferred = self.measuring.transferred(subject, measured, n["transfer"], first=first["transfer"])
        transferred_same_draw = None
        if attackers.same_draw is not None:
            transferred_same_draw = self.measuring.transferred(
                subject, [attackers.same_draw], n["same draw"], first=first["same draw"]
            )
        return Measurements(
            attackers,
            transferred,
            self._white((subject,), n["white-box"])[0],
            transferred_same_draw,
            self._clean(self._incumbents, n["transfer"]),
            self._white(self._incumbents, n["white-box"]),
            self._clean(self._bases, n["transfer"]),
            self._white(self._bases, n["white-box"]),
            self.pool.serving is not None,
            self._looks,
            self._needs,
        )

    def _clean(self, subjects: Sequence[DescribedModel], n: int) -> tuple[Evidence, ...]:
        return tuple(self.measuring.clean(subject, n, first=self._first["transfer"]) for subject in subjects)

    def _white(self, subjects: Sequence[DescribedModel], n: int) -> tuple[Evidence, ...]:
        return tuple(self.measuring.white(subject, n, first=self._first["white-box"]) for subject in subjects)

    @cached_property
    def _first(self) -> dict[Family, int]:
        """First number of examples of each kind of measurement."""
        transfer, white, same_draw = first_sizes(self.n_judged)
        return {"transfer": transfer, "white-box": white, "same draw": same_draw}

    @cached_property
    def _looks(self) -> dict[Family, int]:
        """Largest number of times that each kind of measurement is made; each time, the number of
        examples is doubled.
        """
        return {
            family: len(judged_ranges(len(self.request.held_out), first))
            for family, first in self._first.items()
        }

    @cached_property
    def _needs(self) -> dict[Gate, NeededExamples]:
        """Sample sizes that the gates on accuracy need, estimated from the differences between bases and surrogates."""
        n = len(self.request.held_out)
        first_sizes = {family: min(size, n) for family, size in self._first.items()}
        references = [*self._bases, *self._surrogates]
        clean = [evidence["correct"] for evidence in self._clean(references, first_sizes["transfer"])]
        white = self._white(references[: max(len(self._bases), 2)], first_sizes["white-box"])
        needs = measured_needs(clean, [robust_mask(evidence) for evidence in white], n, self.n_judged)
        if any(need.widened for need in needs):
            self.notify(f"note: {statement(needs, self.n_judged, planned=False)}")
        return {need.gate: need for need in needs}

    def _doubts(self, measurements: Measurements) -> Doubts:
        """The doubts of the candidate that were not raised for all sets that it is compared with."""
        raised = [
            {doubt.name for doubt in evidence.doubts if doubt.state == "raised"}
            for evidence in measurements.before_white
        ]
        raised_for_all = set.intersection(*raised)
        return Doubts(
            tuple(doubt for doubt in measurements.white.doubts if doubt.name not in raised_for_all),
            self.accepted,
        )

    @cached_property
    def _bases(self) -> tuple[DescribedModel, ...]:
        """The bases; if they were deleted, the surrogates, which are trained in the same way."""
        return tuple(map(self._subject, bases_left(self.pool))) or self._surrogates

    @cached_property
    def _surrogates(self) -> tuple[DescribedModel, ...]:
        subjects = []
        for model in self.measuring.transfer_examples.own:
            sha = content_digest(state_of(model))
            subjects.append(set_subject(self.request, f"own-{sha[:NAME_DIGITS]}", sha, model))
        return tuple(subjects)

    @cached_property
    def _incumbents(self) -> tuple[DescribedModel, ...]:
        """The serving set; if there is none, the bases."""
        serving = self.pool.serving
        return self._bases if serving is None else (self._subject(serving.name),)

    def _subject(self, name: str) -> DescribedModel:
        sha = self.pool.ledger.member(name).digest
        return set_subject(self.request, name, sha, self.request.of_set(self.pool, name))

    @cached_property
    def _canaries(self) -> Inputs:
        """The canary inputs, stored encrypted in the pool."""
        x = self.request.held_out.x
        stored = self.run.step(CANARY_INPUTS, lambda: StoredStage({"x": x[:CANARIES].cpu()}))
        return stored.columns["x"].to(x)

    # --- weights

    def weights(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a parameter set of the pool from a cache."""
        if name not in self._weights:
            self._weights[name] = self.pool.weights(name)
        return self._weights[name]

    def _finite(self, name: str) -> bool:
        """Whether a set has finite parameters, so that it can be attacked."""
        return not nonfinite_tensors(self.weights(name), state_of(self.request.model))

    @cached_property
    def _names(self) -> list[str]:
        return rotated(self.request.model)

    @cached_property
    def _known(self) -> list[Mapping[str, Tensor]]:
        """The parameters of bases and surrogates, for the usual range of norms."""
        subjects = {subject.digest: subject for subject in (*self._bases, *self._surrogates)}
        return [state_of(subject.model) for subject in subjects.values()]

    def _exposed(self, name: str) -> tuple[str, ...]:
        return tuple(stolen for stolen in exposed_for(self.pool, name) if self._finite(stolen))

    def _distance(self, name: str) -> float:
        return distance(self.weights(name), self._weights_by_name(self._exposed(name)), self._names)[0]

    def _weights_by_name(self, names: Sequence[str]) -> dict[str, Mapping[str, Tensor]]:
        return {name: self.weights(name) for name in names}


def first_sizes(n_judged: int) -> tuple[int, int, int]:
    """Return on how many held-out examples a set is first judged by transfer attacks, by white-box attacks, and by
    attacks from sets of the same draw.
    """
    return n_judged, max(n_judged // _WHITE, 1), max(n_judged // _SAME_DRAW, 1)


def _shapes(model: Classifier) -> dict[str, Tensor]:
    """Tensors with the names, shapes and types of the model, in which infinity marks that any value is allowed."""
    return {
        name: torch.full_like(value, torch.inf) if value.is_floating_point() else value
        for name, value in state_of(model).items()
    }
