"""Assesses parameter sets of a pool on ranges of the held-out examples, and compares them with confidence
intervals.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from holdfast.attacks.apgd import APGD
from holdfast.attacks.pgd import PGD
from holdfast.attacks.protocol import Attack
from holdfast.core.batch import Batch, Lookup
from holdfast.core.chain import canonical, digest
from holdfast.core.draws import Draws
from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Doubt, Evidence
from holdfast.core.model import Classifier, Model
from holdfast.core.names import slug
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Mask
from holdfast.io.data.arrays import Arrays
from holdfast.metrics.shares import robust
from holdfast.reports.words import percent, strict
from holdfast.rotation.pool import Pool
from holdfast.rotation.steps.alternatives import TransferAttacker
from holdfast.rotation.steps.rotation_request import EVERY, FIRST, MOST, RotateRequest, surrogates
from holdfast.runs.assess.assess import assess
from holdfast.runs.assess.request import AssessRequest, DescribedModel
from holdfast.runs.engine.identity import code_digest
from holdfast.runs.engine.progress import Notify, Progress, ignore, silent
from holdfast.runs.harness.plan import Plan, settings
from holdfast.runs.harness.stage import Member
from holdfast.runs.store.files import make_private
from holdfast.runs.store.folder import read_chain, read_stage
from holdfast.statistics.intervals import (
    Support,
    bonferroni,
    mean,
    normal_quantile,
    paired_difference,
    proportion,
)

Kind = Literal["A0", "A1", "A2", "A3"]
SAME_DRAW_SETS = 4
"""Number of sets of an attacker that has sets generated in the same draw."""


@dataclass(frozen=True)
class Attacker:
    """An attacker of a rotation, with the parameter sets or surrogates on which it computes transfer examples."""

    kind: Kind
    sources: tuple[str, ...]
    """names of sets of the pool; for A0 a text with the number of surrogates, such as `own 4`"""

    @property
    def name(self) -> str:
        """Name of the attacker in columns and reports, with the sets that it has."""
        source = self.sources[0] if len(self.sources) == 1 else f"{len(self.sources)} sets"
        return f"{self.kind} {source}"


@dataclass(frozen=True)
class Prepared:
    """An attack that returns transfer examples that were computed before. It finds them by the ids of the inputs and
    does not query the model.
    """

    attacker: str
    sources: str
    """the models on which the examples were computed"""
    attack: Attack
    """the attack that computed the examples"""
    given: Callable[[Batch], Inputs]

    needs: ClassVar[Access] = "none"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        return self.given(batch)


@dataclass
class TransferExamples:
    """Computes the transfer examples of attackers, and stores them encrypted in the pool, so that each is computed only
    once.

    If the number of inputs grows, only the new inputs are attacked.
    """

    pool: Pool
    request: RotateRequest
    transfer_attacker: TransferAttacker = field(default_factory=TransferAttacker)
    notify: Notify = ignore
    _cache: dict[tuple[Attacker, int, int], dict[str, Inputs]] = field(default_factory=dict)
    """examples by attacker and range of the held-out inputs, for each attack"""
    _own: list[Classifier] = field(default_factory=list)

    @property
    def own(self) -> list[Classifier]:
        """Surrogate models of the surrogate-only attacker."""
        self._own = self._own or surrogates(self.pool, self.request)
        return self._own

    def surrogate_only(self, size: int | None = None) -> Attacker:
        """Return the surrogate-only attacker with `size` surrogates, or with all surrogates if `size` is None."""
        return Attacker("A0", (f"own {len(self.own) if size is None else min(size, len(self.own))}",))

    def members(self, attacker: Attacker, start: int, stop: int) -> list[Member]:
        """Return the attacks of an attacker as members of a suite, with transfer examples for the held-out inputs from
        `start` to `stop` - 1.

        The examples of all attacks are computed when they are first used; for a run whose results are stored, none is
        computed.
        """
        sources = " ".join(attacker.sources)
        return [
            Member(
                f"{attacker.name} {name}",
                Prepared(attacker.name, sources, attack, self._given(attacker, name, start, stop)),
            )
            for name, attack in self.transfer_attacker.attacks.items()
        ]

    def _given(self, attacker: Attacker, name: str, start: int, stop: int) -> Callable[[Batch], Inputs]:
        lookup = Lookup(self.request.examples.held_out.ids[start:stop].cpu())

        def stored(batch: Batch) -> Inputs:
            examples = self._of(attacker, start, stop)[name]
            return examples[lookup.rows(batch.ids.cpu())].to(batch.x)

        return stored

    def _of(self, attacker: Attacker, start: int, stop: int) -> dict[str, Inputs]:
        """The examples of an attacker for some inputs, by attack, cached."""
        key = (attacker, start, stop)
        if key not in self._cache:
            some = self.request.held_out.take(torch.arange(start, stop))
            constraint, bounds = self.request.threat.constraint, self.request.model.bounds
            self._cache[key] = {
                name: constraint.project(some.x + change.to(some.x), some.x, bounds).cpu()
                for name, change in self._changes(attacker, some, start).items()
            }
        return self._cache[key]

    def _changes(self, attacker: Attacker, some: Batch, start: int) -> dict[str, Tensor]:
        """The perturbations of an attacker in half precision, from the pool if they are stored there."""
        about = digest(
            canonical(strict([code_digest(), len(some), self._attack_settings, self.request.about()]))
        )
        place = digest(canonical([attacker.kind, *attacker.sources, start]))[:16]
        stored = self.pool.kept(f"made_{place}")
        if stored is not None and stored.about["of"] == about:
            return stored.columns
        self.notify(
            f"{attacker.name}: examples of {len(some):,} inputs by {', '.join(self.transfer_attacker.attacks)}"
        )
        rng = Draws(self.request.seed).at("thief", attacker.kind, *attacker.sources)
        examples = self.transfer_attacker.crafted(self._models(attacker), some, self.request.threat, rng=rng)
        changes = {name: (x - some.x).half().cpu() for name, x in examples.items()}
        if attacker.kind != "A3":  # these sets differ for each candidate
            self.pool.keep(f"made_{place}", changes, {"of": about})
        return changes

    @property
    def _attack_settings(self) -> dict[str, Any]:
        return {name: settings(attack) for name, attack in self.transfer_attacker.attacks.items()}

    def _models(self, attacker: Attacker) -> Sequence[Classifier]:
        if attacker.kind == "A0":
            return self.own[: int(attacker.sources[0].removeprefix("own "))]
        return [self.request.of_set(self.pool, name) for name in attacker.sources]


@dataclass(frozen=True)
class Attackers:
    """All attackers against which a candidate of a pool is judged."""

    nothing: Attacker
    one: tuple[Attacker, ...]
    """attackers with one stolen set each"""
    several: Attacker | None
    """attacker with several stolen sets; None if fewer than two sets are stolen"""
    evenly: Attacker | None
    """surrogate-only attacker with as many surrogates as the attacker `several` has sets"""
    same_draw: Attacker | None
    """attacker with other sets of the same draw; None if there are none"""


def attackers_against(
    transfer_examples: TransferExamples, name: str, exposed: Sequence[str], same_draw: Sequence[str]
) -> Attackers:
    """Return the attackers against which the parameter set `name` is judged. `exposed` are the stolen sets, and the
    most recently stolen one is last.
    """
    own_models = len(transfer_examples.own)
    last = tuple(exposed[-own_models:])
    several = Attacker("A2", last) if len(last) > 1 else None
    return Attackers(
        transfer_examples.surrogate_only(),
        tuple(Attacker("A1", (name_of_set,)) for name_of_set in exposed),
        several,
        None if several is None else transfer_examples.surrogate_only(len(last)),
        Attacker("A3", tuple(same_draw[:SAME_DRAW_SETS])) if same_draw else None,
    )


def exposed_for(pool: Pool, name: str) -> tuple[str, ...]:
    """Return the names of the sets that an attacker is assumed to have when the parameter set `name` serves.

    These are its bases and the stolen sets; the most recently stolen set is last.
    """
    members = {member.name: member for member in pool.ledger.members}
    listed = [exposure.name for exposure in pool.ledger.exposed()]
    unlisted = [candidate_name for candidate_name in members[name].bases if candidate_name not in listed]
    return tuple(
        candidate_name
        for candidate_name in (*unlisted, *listed)
        if candidate_name != name and not members[candidate_name].deleted
    )


def sets_of_same_draw(pool: Pool, name: str, usable: Callable[[str], bool]) -> tuple[str, ...]:
    """Return the names of the other parameter sets generated in the same draw, in their order. An attacker with the
    generator could generate such sets as well.

    Refused sets are included, so that the result does not depend on the order in which sets are judged. Only sets for
    which `usable` returns true are included.
    """
    drawing = pool.about(name).get("drawing")
    if drawing is None:
        return ()
    return tuple(
        member.name
        for member in pool.ledger.members
        if member.name != name
        and not member.deleted
        and pool.about(member.name).get("drawing") == drawing
        and usable(member.name)
    )


FOLDER = "admission"
WHITE = (Member("PGD-20", PGD(steps=20)), Member("APGD", APGD()))
"""The white-box attacks with which the robust accuracy of a set is measured."""
_TAG = 8  # hex digits that distinguish runs with other attacks, code or settings


@dataclass(frozen=True)
class TransferResult:
    """Results of all transfer attacks on a parameter set."""

    evidence: Evidence
    """evidence whose worst case is over all attacks of all attackers"""
    broken: Mapping[tuple[Attacker, str], Mask]
    """for each attacker and attack, the mask (n) of the broken examples"""


def set_subject(request: RotateRequest, name: str, sha: str, model: Classifier) -> DescribedModel:
    """Return a parameter set as a model that can be assessed. `sha` is the digest of the set."""
    card = {key: value for key, value in request.subject.card.items() if key != "files"}
    return DescribedModel(model, sha, {**card, "name": name, "digest": sha})


@dataclass
class SetMeasurements:
    """Assesses parameter sets of a pool, and caches the evidence."""

    pool: Pool
    transfer_examples: TransferExamples
    progress: Progress = silent
    again: str = ""
    """command that resumes a stopped run"""
    _known: dict[tuple[str, str, int], Evidence] = field(default_factory=dict)

    def white(self, of: DescribedModel, n: int, *, first: int) -> Evidence:
        """Return the evidence of a parameter set under white-box attacks, for the first `n` held-out examples.

        `first` is the size of the first range; see `judged_ranges`.
        """
        return self._cached(of, "white-box", WHITE, n, first)

    def clean(self, of: DescribedModel, n: int, *, first: int) -> Evidence:
        """Return the evidence of a parameter set on clean inputs, for the first `n` held-out examples."""
        return self._cached(of, "clean", (), n, first)

    def transferred(
        self, subject: DescribedModel, attackers: Sequence[Attacker], n: int, *, first: int
    ) -> TransferResult:
        """Test a parameter set with the transfer examples of each attacker for the first `n` held-out examples, and
        return the results.
        """
        kinds = "-".join(sorted({attacker.kind.lower() for attacker in attackers}))
        evidence, broken = [], []
        for start, stop in judged_ranges(n, first):
            members = [
                member
                for attacker in attackers
                for member in self.transfer_examples.members(attacker, start, stop)
            ]
            evidence_of_range, path = self._piece(subject, kinds, members, start, stop)
            evidence.append(evidence_of_range)
            broken.append(_broken_in(path, members))
        keys = [
            (attacker, attack)
            for attacker in attackers
            for attack in self.transfer_examples.transfer_attacker.attacks
        ]
        by_key = {key: torch.cat([piece[place] for piece in broken]) for place, key in enumerate(keys)}
        return TransferResult(joined_evidence(evidence), by_key)

    def _cached(
        self, subject: DescribedModel, kind: str, members: Sequence[Member], n: int, first: int
    ) -> Evidence:
        key = (subject.digest, kind, n)
        if key not in self._known:
            pieces = [self._piece(subject, kind, members, *piece)[0] for piece in judged_ranges(n, first)]
            self._known[key] = joined_evidence(pieces)
        return self._known[key]

    def _piece(
        self, subject: DescribedModel, kind: str, members: Sequence[Member], start: int, stop: int
    ) -> tuple[Evidence, Path]:
        request = self.transfer_examples.request
        threat = replace(request.threat, access="gradients", queries=None, surrogates=())
        plan = Plan(
            tuple(members), threat, request.seed, full=kind not in ("white-box", "clean"), shown=False
        )
        stages = plan.outline(request.model.classes or 0).steps
        tag = digest(canonical([self._base, strict(stages)]))[:_TAG]
        of_set = self.pool.path / FOLDER / str(subject.card["name"])
        run = of_set / f"{kind}-{start}-{stop}-{tag}"
        for folder in (of_set.parent, of_set):
            make_private(folder)
        order = AssessRequest(plan, device=request.device)
        result = assess(
            subject,
            self._rows(start, stop),
            order,
            run=run,
            resume=True,
            progress=self.progress,
            again=self.again,
        )
        return result.evidence, run

    def _rows(self, start: int, stop: int) -> Arrays:
        """Held-out examples `start` to `stop`, with their row numbers in the training data as ids."""
        examples, rows = self.transfer_examples.request.examples, slice(start, stop)
        x, y, ids = (
            value[rows].cpu().numpy()
            for value in (examples.held_out.x, examples.held_out.y, examples.held_out.ids)
        )
        return Arrays(f"held-out examples {start + 1} to {stop} of {examples.name}", x, y, ids)

    @cached_property
    def _base(self) -> str:
        """Digest of the code and of the settings of the pool; runs with another digest are not reused."""
        return digest(canonical(strict([code_digest(), self.transfer_examples.request.about()])))


def judged_ranges(n: int, first: int) -> list[tuple[int, int]]:
    """Return the ranges (start, stop) into which `n` examples are divided for the judging of a parameter set. The first
    range has `first` examples.

    Each later range has as many examples as all ranges before it.
    """
    stops = [0, min(first, n)]
    while stops[-1] < n:
        stops.append(min(2 * stops[-1], n))
    return list(pairwise(stops))


def _broken_in(path: Path, members: Sequence[Member]) -> list[Mask]:
    """For each attack, which examples it broke, read from its stage of the run."""
    chain, masks = read_chain(path, repair=False), []
    for place, member in enumerate(members, 1):
        stage = read_stage(path, chain, f"{place}-{slug(member.name)}")
        assert stage is not None
        masks.append(stage.columns["success"])
    return masks


def joined_evidence(pieces: Sequence[Evidence]) -> Evidence:
    """Join the evidence of several runs on consecutive examples. The model and the attacks of all runs must be the
    same.
    """
    columns = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0].columns}
    doubts: dict[str, Doubt] = {}
    for doubt in (doubt for piece in pieces for doubt in piece.doubts):
        if doubt.name not in doubts or doubt.state == "raised":
            doubts[doubt.name] = doubt
    return replace(pieces[0], columns=columns, doubts=tuple(doubts.values()))


Gate = Literal["clean accuracy", "robust accuracy"]
CONFIDENCE = 0.95
"""Joint confidence of the intervals of a gate over all times that it is judged."""
POWER = 0.8
"""Probability that a set that is as good as its reference passes a gate."""
LEAST: Mapping[Gate, float] = {"clean accuracy": 0.01, "robust accuracy": 0.02}
"""Largest loss of accuracy that each gate tolerates if enough examples are held out, as a fraction."""
PLANNED: Mapping[Gate, float] = {"clean accuracy": 0.03, "robust accuracy": 0.1}
"""Expected fraction of examples on which only one of two models trained by the same recipe is correct.

These values are used before any training; an admission measures the actual ones.
"""
MEASURED_LATER = (
    "On how many examples equal sets differ is measured in the admission, and the gates may then need more"
)
"""Reason why a number that was computed before any training may be too small."""
_PART: Mapping[Gate, int] = {
    "clean accuracy": 1,
    "robust accuracy": 2,
}  # the divisors of the first number of examples in an admission


@dataclass(frozen=True)
class NeededExamples:
    """Number of examples that one gate of an admission needs, and its tolerance with the available examples."""

    gate: Gate
    changed: float
    """fraction of examples on which exactly one of two equally good sets is correct"""
    n_held_out: int
    """number of held-out examples"""
    looks: int
    """largest number of times that the gate is judged, with more examples each time"""

    @property
    def least(self) -> float:
        """Accuracy that a set may lose at this gate, as a fraction, if enough examples are held out."""
        return LEAST[self.gate]

    @property
    def needed(self) -> int:
        """Number of examples with which a set as good as its reference passes the gate at the smallest tolerance with
        high probability.
        """
        return math.ceil(self.changed * (_reach(self.looks) / self.least) ** 2)

    @property
    def tolerance(self) -> float:
        """Accuracy that a set may lose at this gate, as a fraction. It is larger than the smallest tolerance if there
        are too few examples.
        """
        return max(self.least, _reach(self.looks) * math.sqrt(self.changed / max(self.n_held_out, 1)))

    @property
    def widened(self) -> bool:
        """Whether the tolerance of the gate is widened, because there are fewer examples than needed."""
        return self.tolerance > self.least

    @property
    def description(self) -> str:
        """The gate, its tolerance and its number of needed examples as text."""
        text = f"{self.gate} within {tolerance_text(self.least)} needs {self.needed:,} examples"
        return f"{text}, so it allows {tolerance_text(self.tolerance)}" if self.widened else text


def looks(n_held_out: int, judged: int, gate: Gate) -> int:
    """Return the largest number of times that a gate is judged for one parameter set, each time on more held-out
    examples.

    `n_held_out` is the number of held-out examples, and `judged` the number on which a set is judged first.
    """
    return len(judged_ranges(n_held_out, max(judged // _PART[gate], 1)))


def slack(changed: float, n: int, looks: int) -> float:
    """Return by how much the fraction of changed predictions of a set may exceed its expected value by chance, if the
    set is as good as its reference.

    `n` is the number of examples.
    """
    return _reach(looks) * math.sqrt(changed * (1 - changed) / max(n, 1))


def _reach(looks: int) -> float:
    """Number of standard errors in the tolerance that an equal set passes with probability `POWER`."""
    return normal_quantile((1 + bonferroni(CONFIDENCE, looks)) / 2) + normal_quantile(POWER)


def planned_needs(n_held_out: int, judged: int = FIRST) -> tuple[NeededExamples, ...]:
    """Estimate before any training how many held-out examples each accuracy gate of an admission needs."""
    return tuple(
        NeededExamples(gate, share, n_held_out, looks(n_held_out, judged, gate))
        for gate, share in PLANNED.items()
    )


def measured_needs(
    clean: Sequence[Mask], white: Sequence[Mask], n_held_out: int, judged: int
) -> tuple[NeededExamples, ...]:
    """Compute how many held-out examples each accuracy gate of an admission needs, from the examples that similar sets
    classify correctly.

    `clean` contains the mask (n) of each set on clean inputs, and `white` the mask (n) under white-box attacks.
    """
    shares: Mapping[Gate, float] = {"clean accuracy": changed(clean), "robust accuracy": changed(white)}
    return tuple(
        NeededExamples(gate, share, n_held_out, looks(n_held_out, judged, gate))
        for gate, share in shares.items()
    )


def changed(right: Sequence[Mask]) -> float:
    """Return the fraction of examples on which exactly one of two parameter sets is correct, averaged over all pairs.
    It is 0 for fewer than two sets.
    """
    pairs = [
        float((first_mask != second_mask).double().mean())
        for first_mask, second_mask in combinations(right, 2)
    ]
    return sum(pairs) / len(pairs) if pairs else 0.0


def sufficient(needs: Sequence[NeededExamples], judged: int) -> int:
    """Return the smallest number of held-out examples with which no gate is widened.

    With more examples a gate may be judged more often, and then needs more of them.
    """
    n = 0
    while (more := max(replace(need, looks=looks(n, judged, need.gate)).needed for need in needs)) > n:
        n = more
    return n


def statement(needs: Sequence[NeededExamples], judged: int, *, planned: bool) -> str:
    """Return a message with the number of held-out examples that the gates need, the available number, and by how much
    a shortage widens the tolerances of the gates.
    """
    need, n_held_out, about = sufficient(needs, judged), needs[0].n_held_out, "at least " if planned else ""
    details = "; ".join(
        f"{need_of_gate.description}, since equal sets differ on {about}{100 * need_of_gate.changed:.1f} % of them"
        for need_of_gate in needs
    )
    text = f"the gates need {about}{need:,} held-out examples, and there are {n_held_out:,} ({details})"
    if planned:
        text += f". {MEASURED_LATER}"
    if n_held_out >= need:
        return text
    remedy = f"with {about}{EVERY * need:,} training examples, of which one in {EVERY} is held out, they would not be"
    return f"{text}. Tolerances are widened; {remedy if need <= MOST else f'at most {MOST:,} are held out'}"


def widened(needs: Iterable[NeededExamples]) -> list[str]:
    """Return a list with a note on widened tolerances of the gates. It is empty if enough examples are held out."""
    texts = [f"{need.gate} to {tolerance_text(need.tolerance)}" for need in needs if need.widened]
    return [f"tolerances were widened: {', '.join(texts)}"] if texts else []


def tolerance_text(share: float) -> str:
    """Return a tolerance, which is given as a fraction, as text in percentage points."""
    number = f"{100 * share:.2g}"
    return f"{number} point" if number == "1" else f"{number} points"


@dataclass(frozen=True)
class Loss:
    """Accuracy that a parameter set loses relative to the better of two references: the serving set, and the mean of
    the bases.

    If only the serving set were the reference, small losses could add up over several swaps.
    """

    estimate: Estimate
    """lost accuracy; the interval is for the larger of both losses"""
    reference: str
    """name of the better reference"""


def largest_loss(before: Mapping[str, Sequence[Mask]], after: Mask, confidence: float) -> Loss:
    """Return the largest loss of accuracy relative to several reference sets. `after` is the mask of the correct
    examples of a set, and `before` contains those of the references.
    """
    losses = {name: difference(masks, after, confidence) for name, masks in before.items()}
    reference = max(losses, key=lambda name: losses[name].value)
    joint = bonferroni(confidence, len(before))
    low = max(difference(masks, after, joint).low for masks in before.values())
    value, high = losses[reference].value, max(loss.high for loss in losses.values())
    return Loss(Estimate(value, min(low, value), high, losses[reference].n), reference)


@dataclass(frozen=True)
class Worst:
    """The highest success rate among several attacks on a parameter set, and the attack that achieves it."""

    estimate: Estimate
    """fraction of the correctly classified inputs that are broken; the interval is for the largest
    of all success rates"""
    by: str
    """description of the attacker and its attack"""
    broken: tuple[Mask, ...]
    """for each attack, the mask of the correctly classified inputs that it broke; the most
    successful attack is first"""

    @property
    def description(self) -> str:
        """The highest success rate and its attack as text."""
        return f"examples of {self.by} break {share_text(self.estimate)}"


def worst(
    transferred: TransferResult, attackers: Sequence[Attacker], confidence: float = CONFIDENCE
) -> Worst | None:
    """Return the highest success rate over all transfer attacks of the given attackers, or None if there are no
    attackers.

    The upper end of the interval is the highest of all upper ends, which is above the largest success rate with the
    given confidence. The lower ends are corrected for the number of attacks (Bonferroni).
    """
    right = transferred.evidence["correct"]
    masks = {key: mask[right] for key, mask in transferred.broken.items() if key[0] in attackers}
    if not masks:
        return None
    shares = {key: share_of(mask, confidence) for key, mask in masks.items()}
    order = sorted(masks, key=lambda key: -shares[key].value)
    low = max(share_of(mask, bonferroni(confidence, len(masks))).low for mask in masks.values())
    highest, high = shares[order[0]], max(share.high for share in shares.values())
    attacker, attack = order[0]
    return Worst(
        Estimate(highest.value, min(low, highest.value), high, highest.n),
        f"{attacker.name} by {attack}",
        tuple(masks[key] for key in order),
    )


def robust_mask(white: Evidence) -> Mask:
    """Return the mask of the examples that are robust to the white-box attacks."""
    return robust(white, "robust_accuracy")


def changed_predictions(one: Evidence, other: Evidence) -> Mask:
    """Return the mask of the inputs that two parameter sets classify differently."""
    different: Mask = one["prediction"] != other["prediction"]
    return different


def share_of(mask: Mask, confidence: float = CONFIDENCE) -> Estimate:
    """Return the fraction of true entries of a mask with a confidence interval. For an empty mask the interval is 0 to
    1.
    """
    return proportion(mask, confidence) if len(mask) else Estimate(0.0, 0.0, 1.0, 0)


def difference(before: Sequence[Mask], after: Mask | None = None, confidence: float = CONFIDENCE) -> Estimate:
    """Return the mean fraction of true entries of the masks in `before`, minus the fraction in `after`, with a
    confidence interval. All masks have the same examples.

    If `after` is None, nothing is subtracted.
    """
    if len(before) == 1:
        only = before[0]
        return share_of(only, confidence) if after is None else paired_difference(only, after, confidence)
    values: Tensor = torch.stack([mask.double() for mask in before]).mean(0)
    if after is None:
        return mean(values, confidence)
    return mean(values - after.double(), confidence, support=Support(-1.0, 1.0))


def share_text(estimate: Estimate) -> str:
    """Return a fraction with its confidence interval and its sample size as text."""
    return (
        f"{percent(estimate.value)} ({percent(estimate.low)} to {percent(estimate.high)}, n = {estimate.n:,})"
    )


def points_text(estimate: Estimate) -> str:
    """Return a loss as text: how many percentage points an accuracy is lower, or higher if the loss is negative, with
    the confidence interval and the sample size.

    >>> points_text(Estimate(0.021, 0.004, 0.038, 500)), points_text(Estimate(-0.009, -0.021, 0.003, 500))
    ('2.1 points lower (0.4 to 3.8, n = 500)', '0.9 points higher (-0.3 to 2.1, n = 500)')
    """
    low, value, high = (100 * end for end in (estimate.low, estimate.value, estimate.high))
    direction = "lower"
    if value < 0:
        low, value, high, direction = -high, -value, -low, "higher"
    return f"{value:.1f} points {direction} ({low:.1f} to {high:.1f}, n = {estimate.n:,})"
