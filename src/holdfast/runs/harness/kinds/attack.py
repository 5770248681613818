"""Stages that run an attack of the suite on some of the examples, and the fitting of learned attacks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

from holdfast.attacks.parts.random_search import sample_rows
from holdfast.attacks.protocol import (
    Attack,
    Itemised,
    Learned,
    Placed,
    QueryAttack,
    Refitted,
    ThresholdAttack,
    attacked_inputs,
    searched,
)
from holdfast.attacks.suites import LEAST
from holdfast.core.batch import Batch, Lookup, without_missing
from holdfast.core.draws import Draws
from holdfast.core.errors import OTHER_EXAMPLES, UsageError
from holdfast.core.evidence import TRIGGERED, Columns, in_table
from holdfast.core.meter import Metered, Pieces, Spent, margin
from holdfast.core.model import AT_TIMES, Model
from holdfast.core.names import slug
from holdfast.core.outputs import Aim
from holdfast.core.tasks import LEFT, MEASURED
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Ids, Logits, Mask, PerExample
from holdfast.runs.harness.stage import (
    Against,
    Member,
    Outline,
    Stage,
    StageKind,
    Work,
    broken_by_suite,
    certified_in,
    gradients_vanish,
    suite_columns,
)
from holdfast.runs.harness.target import (
    DISTANCES,
    PreparedModel,
    aimed,
    cost_columns,
    digests,
    returned,
    stored_inputs,
    unattacked,
    verdict_of,
    votes,
)
from holdfast.statistics.intervals import balance, median_width, threshold

if TYPE_CHECKING:
    from holdfast.runs.harness.plan import Plan

_CHOOSE = 2  # one in this many examples selects among the fits
_LEAST = 8  # with fewer examples than this, all are used both for fitting and for the selection


class Fit(StageKind):
    """Kind of stage that fits a learned attack on examples outside the evaluation. It has no shards, so a resumed run
    repeats an unfinished fit.
    """

    name = "fit"
    named = r"fit-\d+-.*"
    sharded = False
    of_attack = True

    def stages(self, plan: "Plan") -> list[Stage]:
        """Return an empty list, because `SuiteAttack.stages` inserts the stage that fits an attack before the stage of
        the attack.
        """
        return []

    def due(self, stage: Stage, plan: "Plan", by_stage: Mapping[str, Columns]) -> None:
        """Return None: the stage uses no example of the evaluation, because attacks are fitted on others."""

    def run(self, stage: Stage, work: Work) -> Columns:
        """Fit a learned attack, and return its perturbation and its cost as columns.

        Raises `UsageError` if there is no example to fit on.
        """
        assert stage.member is not None
        attack, rng, target = stage.member.attack, Draws(work.plan.seed).at("stage", stage.name), work.target
        assert isinstance(attack, Learned)
        batch = _examples(attack, work, rng)
        if not len(batch):
            raise UsageError(
                f"there is no example to fit {stage.member.name} to that is not judged", OTHER_EXAMPLES
            )
        queried, batch = (
            target.queried(target.optimised, batch),
            without_missing(batch, target.original.bounds),
        )
        meter = Metered(queried, batch, work.plan.threat)
        with target.repeatable(rng):
            learned, fits, chose = best_fit(attack, meter, batch, work.plan.threat, rng=rng)
        columns = {
            "id": batch.ids,
            "ran": torch.zeros_like(batch.ids, dtype=torch.bool),
            "queries": meter.spent.queries,
            "backwards": meter.spent.backwards,
            "fits": torch.full_like(batch.ids, fits),
            "chose": chose,
            "learned.x": learned.detach(),
        }
        return {name: values.cpu() for name, values in columns.items()}

    def columns(self, clean: Columns) -> dict[str, Tensor]:
        """Return the columns of this stage for the evaluated examples, on which the attack is not fitted."""
        return unattacked(clean)


def fit_stage_of(stage: str) -> str:
    """Return the name of the stage that fits the learned attack of the stage with the name `stage`."""
    return f"fit-{stage}"


def _examples(attack: Learned, work: Work, rng: Draws) -> Batch:
    """The examples to fit an attack to: a random choice of those that are not judged."""
    batch, threat = work.batch, work.plan.threat
    judged = {row.numpy().tobytes() for row in work.clean["digest"]}
    unjudged = [row.numpy().tobytes() not in judged for row in digests(batch)]
    batch = aimed(batch.take(torch.tensor(unjudged, device=batch.ids.device)), threat)
    if batch.target is not None:
        batch = batch.take(batch.y != batch.target)
    return batch.take(rng.at("examples").bits(batch.ids).argsort()[: attack.examples])


def best_fit(
    attack: Learned, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws
) -> tuple[Tensor, int, Mask]:
    """Fit a learned attack several times, and return the best perturbation, the number of fits, and the mask of the
    examples that selected the best one.

    The best fit breaks most of these examples; if several break equally many, it is the one with the lowest mean
    margin.
    """
    fits = attack.fits if isinstance(attack, Refitted) else 1
    if fits == 1:
        return (
            searched(attack.fit, model, batch, threat, rng=rng)[0],
            1,
            torch.zeros_like(batch.ids, dtype=torch.bool),
        )
    drawn = rng.at("choose").bits(batch.ids).argsort()
    n = len(batch) // _CHOOSE
    separate = len(batch) >= _LEAST
    selection_batch = batch.take(drawn[:n].sort().values) if separate else batch
    fit_batch = batch.take(drawn[n:].sort().values) if separate else batch
    assert isinstance(attack, Refitted)
    perturbations = [
        searched(partial(attack.refit, k), model, fit_batch, threat, rng=rng)[0] for k in range(fits)
    ]
    scores = [
        _score(attack.fitted(perturbation), model, selection_batch, threat, rng)
        for perturbation in perturbations
    ]
    chose = torch.zeros_like(batch.ids, dtype=torch.bool)
    chose[drawn[:n] if separate else drawn] = True
    return perturbations[scores.index(max(scores))], fits, chose


def _score(attack: Attack, model: Model, batch: Batch, threat: ThreatModel, rng: Draws) -> tuple[int, float]:
    """Number of examples that a fitted attack breaks, and the negative mean margin over all examples."""
    place = rng.at("chosen")
    if isinstance(attack, Placed):
        x_adv = attack.at_random(model, batch, threat, rng=place)
    else:
        x_adv = attacked_inputs(attack, model, batch, threat, rng=place)
    with torch.no_grad():
        heights = margin(model(x_adv, batch.ids), batch)
    return int((~(heights > 0)).sum()), -float(heights.nan_to_num(-torch.inf).mean())


TESTED = 32
"""Number of certified examples that attacks are run on, as a test of the certificates."""
TEST_QUERIES = 200
"""Largest number of queries of a query attack for each of these examples. With 200, Square breaks 43 of the 46 examples
of two tree ensembles that it breaks with 5,000."""
_PLACES, _BROKEN_AT_RANDOM = "places", "broken_at_random"


class AttackKind(StageKind, Protocol):
    """Base class of the kinds of stages that run an attack on chosen examples."""

    aware: ClassVar[bool] = False
    """whether the attack always uses knowledge of the defence"""

    def ready(self, stage: Stage, by_stage: Mapping[str, Columns]) -> Stage:
        """Return the stage with values from earlier stages: the fitted perturbation of a learned attack, or the
        detector's threshold that the attack evades.

        A stage that needs neither is returned unchanged.
        """
        if stage.member is not None and stage.member.against is not None:
            return replace(stage, aim=aim_of(stage.member.against, by_stage["clean"]))
        learned = learned_for(stage, by_stage)
        return stage if learned is None else with_learned(stage, learned)

    def run(self, stage: Stage, work: Work) -> Columns:
        """Run the attack of the stage on the chosen examples of a shard, and return the columns of all examples of the
        shard.

        A pass outside the suite does not store inputs of examples that the suite has already broken.
        """
        batch, plan, chosen = work.batch, work.plan, work.chosen
        target = work.target
        aware = stage.adaptive or self.aware
        target = replace(
            target,
            optimised=target.view if aware else target.optimised,
            aim=stage.aim,
            surrogate=stage.surrogate,
        )
        missed = batch.ids if work.broken is None else batch.ids[~work.broken.to(batch.ids.device)]
        rng, work = Draws(plan.seed).at("stage", stage.name), replace(work, target=target)
        columns = dict(self.unattacked(stage, work.clean))
        chosen = torch.ones_like(work.clean["correct"]) if chosen is None else chosen
        # the examples that are not attacked count as finished in the progress of the shard
        work.room.progress(int((~chosen).sum()))
        tested = torch.zeros_like(chosen) if work.certified is None else chosen & work.certified
        shortly, first = replace(work, plan=replace(plan, threat=_shortly(stage, plan.threat))), 0
        for rows, group in ((chosen & ~tested, work), (tested, shortly)):
            pieces = Pieces(batch.take(rows), work.room, first)
            for piece in pieces:
                with pieces.attempt():
                    pieces.add(self.piece(stage, group, piece, rng, missed))
            for name, values in pieces.columns().items():
                if not in_table(name):
                    columns[name][rows] = values
                else:
                    columns[name] = torch.cat([columns[name], values]) if name in columns else values
            first += int(rows.sum())
        if plan.threat.constraint.judges_misclassified:
            # the other examples were evaluated as well, but a misclassified one cannot be broken
            columns["success"] &= work.clean["correct"] & work.clean["eligible"]
        return columns

    def piece(self, stage: Stage, work: Work, batch: Batch, rng: Draws, missed: Ids) -> dict[str, Tensor]:
        """Run the attack on one batch, and return as columns the judgement of its inputs by the original model, and its
        cost.

        Of the examples in `missed`, adversarial inputs are stored.
        """
        plan, target, threat = work.plan, work.target, self.threat(work.plan)
        batch = aimed(batch, threat)
        with target.repeatable(rng.at(int(batch.ids[0]))):
            x_adv, spent = returned(stage.attack, threat, target, batch, rng)
            logits, columns = verdict_of(plan, target, batch, x_adv)
            clean = work.clean.get(f"{MEASURED}{LEFT}")
            if clean is not None:
                clean = clean[Lookup(work.clean["id"]).rows(batch.ids.cpu())]
            columns |= stored_inputs(plan, target, batch, x_adv, columns, missed, clean)
            columns |= _at_random(stage, work, threat, batch, rng)
        columns |= {
            **cost_columns(spent),
            **self.further(target, batch, logits, spent),
        }
        return {name: values.cpu() for name, values in columns.items()}

    def further(self, target: PreparedModel, batch: Batch, logits: Logits, spent: Spent) -> dict[str, Tensor]:
        """Return the columns of an attacked batch that this kind has in addition to the verdict, the cost and the
        stored inputs. `logits` are those of the attacked inputs.
        """
        return {**spent.items, "dead": spent.dead}

    def threat(self, plan: "Plan") -> ThreatModel:
        """Return the threat model under which an attack runs."""
        return plan.threat

    def columns(self, clean: Columns) -> dict[str, Tensor]:
        """Return the columns of an attack for examples that were not attacked."""
        return unattacked(clean)

    def unattacked(self, stage: Stage, clean: Columns) -> Columns:
        """Return these columns together with those that the attack of the stage adds."""
        added: tuple[str, ...] = (_PLACES, _BROKEN_AT_RANDOM) if isinstance(stage.attack, Placed) else ()
        added = stage.attack.columns if isinstance(stage.attack, Itemised) else added
        columns = self.columns(clean)
        return columns | {name: torch.zeros_like(columns["queries"]) for name in added}

    def as_if_broken(self, stage: Stage, work: Work) -> Columns:
        """Return the columns that the stage would have if a change of size 0 broke every correct example. They serve to
        check gates before a run.
        """
        unattacked_columns = self.columns(work.clean)
        zeros = {
            name: torch.zeros_like(unattacked_columns[name])
            for name in (*DISTANCES, "score")
            if name in unattacked_columns
        }
        return {**unattacked_columns, **zeros, "success": work.clean["correct"].clone()}


class SuiteAttack(AttackKind):
    """Kind of stage for the attacks of the suite and the adaptive attacks. Each is run on the examples that survive the
    attacks before it.
    """

    name = "attack"
    named = r"\d+-.*"
    in_suite = True
    listed = "attacks"

    def threat(self, plan: "Plan") -> ThreatModel:
        """Return the threat model of the plan, for minimum-norm attacks without a limit eps."""
        return unlimited(plan.threat) if plan.smallest else plan.threat

    def stages(self, plan: "Plan") -> list[Stage]:
        """Return the stages of the attacks of the suite in their order, followed by those of the adaptive attacks.

        A learned attack is preceded by the stage that fits it.
        """
        attacks = [
            stage
            for k, m in enumerate(plan.members, 1)
            for stage in self._waves(plan, f"{k}-{slug(m.name)}", m)
        ]
        first = len(plan.members) + 1
        return [
            *attacks,
            *(
                Stage(f"{k}-{slug(m.name)}", self, m, adaptive=True)
                for k, m in enumerate(plan.adaptive, first)
            ),
        ]

    def _waves(self, plan: "Plan", name: str, member: Member) -> list[Stage]:
        later = 0 if plan.full or plan.smallest else member.waves
        names = (name, *(f"{name}-wave-{wave + 2}" for wave in range(later)))
        fit = [Stage(fit_stage_of(name), Fit(), member)] if isinstance(member.attack, Learned) else []
        return [*fit, *(Stage(stage_name, self, member, names[:k]) for k, stage_name in enumerate(names))]

    def due(self, stage: Stage, plan: "Plan", by_stage: Mapping[str, Columns]) -> Mask:
        """Return the mask of the examples that an attack is run on: the surviving ones or, if the plan requires a full
        measurement, all correct ones.

        An attack with waves starts with the surviving examples of the lowest margins and continues while it succeeds:
        the first wave has 1 / 2^waves of the surviving examples, the second as many, and each later wave twice as many
        as the one before. No wave has fewer than `Member.least` examples, and a wave that breaks none is the last. An
        attack with `Member.after` is not run if that attack broke none. If gradients vanish, margins say little about
        which examples break, so that a wave has at least `LEAST` examples, and no attack is left out.

        Of the examples that earlier stages certified, only a random sample is attacked, once by each attack, and with
        at most `TEST_QUERIES` queries of a query attack.
        """
        clean, stages = by_stage["clean"], plan.stages()
        eligible = clean["correct"] & clean["eligible"]
        if plan.smallest or plan.full:
            return eligible
        certified = certified_in(stages, by_stage)
        surviving, tested = (
            eligible & ~broken_by_suite(stages, by_stage),
            _tested(plan, by_stage["clean"], certified),
        )
        surviving, tested = surviving & ~certified, surviving & tested
        measured = suite_columns(stages, by_stage)
        if stage.adaptive:
            return surviving | tested | eligible & ~certified & (_chance(clean, measured) > AT_TIMES)
        member, waves = stage.member, sum(later.earlier[:1] == (stage.first,) for later in stages)
        assert member is not None
        vanish = gradients_vanish(measured)
        if not vanish and _is_idle(member.after, stages, by_stage):
            return torch.zeros_like(surviving) if stage.earlier else tested
        if not waves:
            return surviving | tested
        earlier = [by_stage[name] for name in stage.earlier]
        if earlier and not earlier[-1]["success"].any():
            return torch.zeros_like(surviving)
        tried = (
            torch.stack([torch.zeros_like(surviving), *(columns["ran"] for columns in earlier)]).any(0)
            & ~certified
        )
        n_first = int((surviving & ~tried).sum() + tried.sum())
        share = math.ceil(n_first / 2 ** (waves - max(len(earlier) - 1, 0)))
        last = len(earlier) == waves
        heights = _heights(clean, measured, goal=plan.threat.goal)
        wave = _lowest(
            surviving & ~tried, heights, n_first if last else max(share, LEAST if vanish else member.least)
        )
        return wave if earlier else wave | tested

    def evidence(
        self, outline: Outline, by_stage: Mapping[str, Columns], worst: Columns
    ) -> Mapping[str, Tensor]:
        """Return columns that single attacks add to the evidence: the distances of each minimum-norm attack, and
        whether each example is correct under each corruption, or changes its class with a trigger.
        """
        added: dict[str, Tensor] = {}
        steps = [step for step in outline.steps if step.kind is self and step.name in by_stage]
        if outline.smallest:
            added |= {f"{step.name}.distance": by_stage[step.name]["distance"] for step in steps}
        if outline.threat.constraint.drawn_at_random:
            added |= {f"{step.settings['name']}.right": by_stage[step.name]["right"] > 0.5 for step in steps}
        if steps and not outline.threat.constraint.measures_robustness:
            stamped = by_stage[steps[0].name]
            reached, moved = (
                ~(stamped["right"] > 0.5),
                stamped["prediction"] != by_stage["clean"]["prediction"],
            )
            added[TRIGGERED] = moved if outline.threat.goal is None else reached
        return added


def _is_idle(attack: str, stages: Sequence[Stage], by_stage: Mapping[str, Columns]) -> bool:
    """Whether the attack with this name has run and broke no example."""
    waves = [stage.name for stage in stages if stage.member is not None and stage.member.name == attack]
    ran = [by_stage[name] for name in waves if name in by_stage]
    return bool(ran) and not any(columns["success"].any() for columns in ran)


def _tested(plan: "Plan", clean: Columns, certified: Mask) -> Mask:
    """The random sample of the certified examples that are attacked as a test of their certificates."""
    tested = torch.zeros_like(certified)
    if certified.any():
        tested[sample_rows(clean, certified, Draws(plan.seed).at("certified"), TESTED)] = True
    return tested


def _shortly(stage: Stage, threat: ThreatModel) -> ThreatModel:
    """Return the threat model with the query budget of a test of certificates, if the stage runs a query attack.

    Attacks that read thresholds have no more candidates than thresholds within eps, which is a short search in any
    case.
    """
    attack = None if stage.member is None else stage.attack
    if not isinstance(attack, QueryAttack) or isinstance(attack, ThresholdAttack):
        return threat
    return replace(threat, queries=min(threat.queries or TEST_QUERIES, TEST_QUERIES))


def _at_random(stage: Stage, work: Work, threat: ThreatModel, batch: Batch, rng: Draws) -> dict[str, Tensor]:
    """The result at one random place of each image, for an attack that chooses among places; else empty."""
    attack, target = stage.attack, work.target
    if not isinstance(attack, Placed):
        return {}
    x_adv = attack.at_random(target.original, batch, threat, rng=rng)
    _, right, _ = votes(target, batch, x_adv, lambda logits: target.judged_logits(logits, batch))
    tried = attack.tried(threat, batch.x.shape[1:])
    return {_PLACES: torch.full_like(batch.ids, tried), _BROKEN_AT_RANDOM: (right <= 0.5).long()}


def unlimited(threat: ThreatModel) -> ThreatModel:
    """Return the threat model with a ball of infinite radius, because minimum-norm attacks search for the smallest
    change.
    """
    return replace(threat, constraint=threat.constraint.resized(torch.inf))


def learned_for(stage: Stage, by_stage: Mapping[str, Columns]) -> Tensor | None:
    """Return the perturbation that was fitted in an earlier stage for the attack of a stage, or None if its attack is
    not a learned one.
    """
    first = fit_stage_of(stage.first)
    return by_stage[first]["learned.x"] if first in by_stage else None


def with_learned(stage: Stage, learned: Tensor) -> Stage:
    """Return a copy of the stage whose attack applies the perturbation that was fitted in an earlier stage."""
    assert stage.member is not None
    attack = stage.member.attack
    assert isinstance(attack, Learned)
    return replace(stage, member=replace(stage.member, attack=attack.fitted(learned)))


def _heights(clean: Columns, measured: Mapping[str, Columns], *, goal: int | None) -> PerExample:
    """The lowest margin reached for each example; the clean margin is included for an untargeted threat model."""
    lowest = clean["margin"] if goal is None else torch.full_like(clean["margin"], torch.inf)
    for columns in measured.values():
        lowest = torch.where(columns["ran"], torch.minimum(lowest, columns["height"]), lowest)
    return lowest


def _chance(clean: Columns, measured: Mapping[str, Columns]) -> Tensor:
    """The lowest share of votes in which each example is correct; 0 or 1 for a deterministic model."""
    lowest = clean["right"]
    for columns in measured.values():
        lowest = torch.where(columns["ran"], torch.minimum(lowest, columns["right"]), lowest)
    return lowest


def _lowest(among: Mask, heights: PerExample, n: int) -> Mask:
    """The `n` examples of lowest margin; the first ones among equals."""
    rows = among.nonzero()[:, 0]
    chosen = torch.zeros_like(among)
    chosen[rows[heights[rows].argsort(stable=True)[:n]]] = True
    return chosen


SOFTNESS = 0.2
"""Width of the transition of the gradient from network to detector, as a fraction of the median margin.

See `Aim.softness`. With a sharp transition, the steps of an attack alternate between the two goals.
"""


def aim_of(against: Against, clean: Columns) -> Aim:
    """Return the weight and the threshold with which an attack evades the detector of a model, computed from the
    detector's scores for clean inputs.
    """
    if not against.weight:
        return Aim(beyond=torch.inf)
    scores, width = clean["score"], median_width(clean["class_margin"])
    beyond = 0.0 if against.rejecting is None else threshold(scores, against.rejecting)
    return Aim(against.weight * balance(scores, width), beyond, SOFTNESS * width)
