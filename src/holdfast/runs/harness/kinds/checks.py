"""Stages beside the suite: checks of an adaptive attack, geometry of the boundary, and detectors of queries."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from holdfast.attacks.parts.random_search import sample_rows
from holdfast.attacks.protocol import Itemised
from holdfast.attacks.suites import is_possible
from holdfast.core.batch import Batch, Lookup, without_missing
from holdfast.core.constraints import Constraint, extent
from holdfast.core.draws import Draws
from holdfast.core.evidence import METHOD_STATES, Columns, Cost, MethodState, Table
from holdfast.core.meter import Spent, margin
from holdfast.core.model import VOTES, Classifier
from holdfast.core.names import slug
from holdfast.core.outputs import SAME, change
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Ids, Inputs, Mask
from holdfast.runs.harness.kinds.attack import AttackKind
from holdfast.runs.harness.stage import Stage, StageKind, Work, table_of_stage
from holdfast.runs.harness.target import (
    PreparedModel,
    aimed,
    cost_columns,
    returned,
    stored_inputs,
    unattacked,
    verdict_of,
    votes,
)

if TYPE_CHECKING:
    from holdfast.runs.harness.plan import Plan

CHECKED = 32
"""largest number of correct examples on which the checks are made"""
PARTS = 3
"""the checks of an example use at most this part of the passes that the attack has"""
_SIZES = 3  # larger values of eps
_SHARES = {"box": 4, "labels": 4, "larger": 2 * _SIZES}  # parts of the passes of the checks
_FROM_NOTHING = ("margin", "expectation", "square")  # methods that use no other example


class AnswerChecks(AttackKind):
    """Kind of stage that runs the adaptive search with the whole box, with larger eps and from labels only, on a sample
    of the correct examples. Adversarial examples from labels count in the verdict.
    """

    name = "answer-checks"
    named = r"answer-checks-.*"
    title = "the label search of the checks of {}"
    lost = "the checks of the adaptive attack are"
    sampled = True
    aware = True

    def stages(self, plan: "Plan") -> list[Stage]:
        """Return a stage for each adaptive attack that consists of several methods."""
        searches = [member for member in plan.adaptive if isinstance(member.attack, Itemised)]
        return [Stage(f"{self.name}-{slug(m.name)}", self, m, adaptive=True) for m in searches]

    def due(self, stage: Stage, plan: "Plan", by_stage: Mapping[str, Columns]) -> Mask:
        """Return the mask of a random sample of the correct examples."""
        clean = by_stage["clean"]
        due = torch.zeros_like(clean["correct"])
        eligible = clean["correct"] & clean["eligible"]
        due[sample_rows(clean, eligible, Draws(plan.seed).at(self.name), CHECKED)] = True
        return due

    def unattacked(self, stage: Stage, clean: Columns) -> Columns:
        """Return the columns of an attack, and those of the checks, for examples that were not checked."""
        columns = self.columns(clean)
        names = ("survived", "searched", "box", "larger", "agrees", "changed", "chooses")
        return columns | {name: torch.zeros_like(columns["queries"]) for name in names}

    def run(self, stage: Stage, work: Work) -> Columns:
        """Check the attack on the chosen examples of a shard, and return the columns of all its examples."""
        self_columns = super().run(stage, work)
        assert work.chosen is not None
        return dict(self_columns) | {"agrees": torch.where(work.chosen, self_columns["agrees"], -1)}

    def piece(self, stage: Stage, work: Work, batch: Batch, rng: Draws, missed: Ids) -> dict[str, Tensor]:
        """Make the checks on one batch; `missed` are the examples that survived all attacks."""
        plan, target, threat = work.plan, work.target, work.plan.threat
        batch = aimed(batch, threat)
        survived = torch.isin(batch.ids, missed)
        with target.repeatable(rng.at(int(batch.ids[0]))):
            fresh = threat.constraint.sample(
                without_missing(batch, target.original.bounds), target.original.bounds, rng.at("fresh")
            )
            before = target.logits(fresh)
            x_adv, spent = self.attacked(stage, work, batch, replace(threat, access="labels"), rng, "labels")
            _, columns = verdict_of(plan, target, batch, x_adv)
            box, of_box = self.survivors(stage, work, batch, rng)
            larger, of_larger = self.larger(stage, work, batch.take(survived), rng)
            agrees = self.agrees(target, batch, threat, rng)
            changed = self.changed(work, batch, fresh, before)
        by_row = torch.zeros_like(batch.ids)
        columns |= {
            "survived": survived.long(),
            "searched": by_row + _was_run(spent, "run"),
            "box": box.long() if _was_run(of_box, "run", "dropped") else by_row - 1,
            "larger": by_row.index_copy(0, survived.nonzero()[:, 0], larger),
            "agrees": agrees,
            "changed": changed.long(),
            "chooses": by_row + self.chooses(target, batch, threat),
            **cost_columns(spent),
            "dead": spent.dead,
            **stored_inputs(plan, target, batch, x_adv, columns, missed),
        }
        for name in ("queries", "backwards"):
            columns[name] = columns[name] + getattr(of_box, name)
            columns[name][survived] += of_larger[name]
        return {name: values.cpu() for name, values in columns.items()}

    def attacked(
        self, stage: Stage, work: Work, batch: Batch, threat: ThreatModel, rng: Draws, what: str
    ) -> tuple[Inputs, Spent]:
        """Run the attack of the stage with a part of its passes under another threat model, in the box without the
        methods that start from other examples, since these are adversarial there.
        """
        settings: Any = stage.attack
        passes = max(1, settings.passes // PARTS // _SHARES[what])
        methods = settings.methods
        if what == "labels":
            alone = is_possible("black-box", threat.constraint, "labels")
            methods = ("labels",) if alone else ("stand-in",)
        if what == "box":
            methods = tuple(name for name in methods if name in _FROM_NOTHING)
        attack = replace(settings, passes=passes, methods=methods)
        return returned(attack, threat, work.target, batch, rng.at(what))

    def survivors(self, stage: Stage, work: Work, batch: Batch, rng: Draws) -> tuple[Mask, Spent]:
        """Return which examples survive if every valid input is allowed."""
        target, threat = work.target, work.plan.threat
        box = resized(threat, extent(threat.constraint, batch.x, target.original.bounds))
        x_adv, spent = self.attacked(stage, work, batch, box, rng, "box")
        return right(target, batch, x_adv), spent

    def larger(self, stage: Stage, work: Work, batch: Batch, rng: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Return for each example that survives the number of the first larger eps that breaks it, 0 if none does. The
        search ends with the first eps after which enough of them are broken.
        """
        from holdfast.doubts.answering import LARGER, larger_sizes  # only for runs with adaptive attacks

        threat, number = work.plan.threat, torch.zeros_like(batch.ids)
        cost = {"queries": torch.zeros_like(batch.ids), "backwards": torch.zeros_like(batch.ids)}
        if not len(batch):
            return number, cost
        for k, eps in enumerate(
            larger_sizes(threat.constraint, batch, work.target.original.bounds, _SIZES), 1
        ):
            x_adv, spent = self.attacked(stage, work, batch, resized(threat, eps), rng.at(k), "larger")
            cost = {name: count + getattr(spent, name) for name, count in cost.items()}
            number[(number == 0) & ~right(work.target, batch, x_adv)] = k
            if (number > 0).double().mean() >= LARGER:
                break
        return number, cost

    def agrees(self, target: PreparedModel, batch: Batch, threat: ThreatModel, rng: Draws) -> Tensor:
        """Return 1 for each example of which the gradient predicts the effect of a step, 0 for the others, and -1
        without gradients.
        """
        from holdfast.doubts.answering import agreeing  # only for runs with adaptive attacks

        if not threat.gives("gradients"):
            return torch.full_like(batch.ids, -1)
        filled = without_missing(batch, target.original.bounds)
        draws = VOTES if target.randomised else 1
        return agreeing(target.queried(target.optimised, batch), filled, threat.constraint, rng, draws).long()

    def chooses(self, target: PreparedModel, batch: Batch, threat: ThreatModel) -> bool:
        """Return whether the model chooses among outcomes without a gradient, such as the entries of a codebook."""
        from holdfast.attacks.parts.feature_search import features_of  # only for runs with adaptive attacks

        if not threat.gives("gradients"):
            return False
        filled = without_missing(batch, target.original.bounds)
        features = features_of(target.queried(target.optimised, batch), filled)
        return features is not None and features.chooses

    def changed(self, work: Work, batch: Batch, fresh: Inputs, before: Tensor) -> Mask:
        """Return which examples have an input whose output differs from an earlier one: the clean input, or a new input
        that was queried before the checks.
        """
        target = work.target
        if target.randomised:
            return torch.zeros_like(batch.ids, dtype=torch.bool)
        clean = work.clean["margin"][Lookup(work.clean["id"]).rows(batch.ids.cpu())].to(batch.x)
        logits = target.logits(batch.x)
        now = margin(target.judged_logits(logits, batch), batch)
        largest = logits.abs().amax().clamp_min(1e-12)
        return (change(before, target.logits(fresh)) > SAME) | ((now - clean).abs() > SAME * largest)


def _was_run(spent: Spent, *states: MethodState) -> bool:
    """Return whether a method of an adaptive search reached one of these states."""
    wanted = {METHOD_STATES.index(state) for state in states}
    reached = (values for name, values in spent.items.items() if name.endswith(".state"))
    return any(bool(wanted & set(values.tolist())) for values in reached)


def resized(threat: ThreatModel, eps: float) -> ThreatModel:
    """Return the threat model with another eps."""
    constraint: Constraint = threat.constraint.resized(eps)
    return replace(threat, constraint=constraint)


def right(target: PreparedModel, batch: Batch, x: Inputs) -> Mask:
    """Return which inputs the model classifies correctly in most of its votes."""
    _, share, _ = votes(target, batch, x, lambda logits: target.judged_logits(logits, batch))
    return share > 0.5


GEOMETRY = "geometry"
"""Name of the stage, and of its table in the evidence."""


class Geometer(Protocol):
    """Protocol of a function that measures the geometry around examples: a frozen dataclass that can be pickled."""

    @property
    def n(self) -> int:
        """Number of examples that are measured, from the start of the data."""

    def __call__(self, model: Classifier, batch: Batch, threat: "ThreatModel", seed: int) -> Table:
        """Return the geometry around the examples of a batch as a table of the evidence, with one row for each."""


class GeometryTable(StageKind):
    """Kind of stage that measures the geometry of the decision boundary: distances, Lipschitz constants and slices."""

    name = GEOMETRY
    named = GEOMETRY
    sharded = False
    lost = "the geometry of the decision boundary is"
    sampled = True

    def stages(self, plan: "Plan") -> list[Stage]:
        """Return the stage that measures the geometry, if the plan contains it."""
        return [] if plan.geometry is None else [Stage(GEOMETRY, self)]

    def due(self, stage: Stage, plan: "Plan", by_stage: Mapping[str, Columns]) -> None:
        """Return None, because the stage has examples of its own: the first ones of the data."""

    def run(self, stage: Stage, work: Work) -> Columns:
        """Measure the geometry around the examples of the stage, and return it as columns of the table."""
        assert work.plan.geometry is not None
        table = work.plan.geometry(work.target.original, work.batch, work.plan.threat, work.plan.seed)
        ids = work.batch.ids.cpu()
        columns = {"id": ids, "ran": torch.ones_like(ids, dtype=torch.bool)}
        return columns | {f"{GEOMETRY}.{name}": values for name, values in table.columns.items()}

    def columns(self, clean: Columns) -> dict[str, Tensor]:
        """Return the columns of this stage for examples whose geometry is not measured."""
        return unattacked(clean)

    def cost(self, columns: Columns, *, randomised: bool) -> Cost:
        """Return no forward passes: they are not counted, and attack no example of the run."""
        return Cost()

    def tables(self, by_stage: Mapping[str, Columns]) -> Mapping[str, Table]:
        """Return the table of the evidence with the geometry; none if the stage was not run or not finished."""
        return table_of_stage(GEOMETRY, by_stage)


STATEFUL = "stateful"
"""Name of the stage, and of its table in the evidence."""


class Trials(Protocol):
    """Protocol of a function that attacks examples with and without a query detector: a frozen dataclass that can be
    pickled.
    """

    @property
    def n(self) -> int:
        """Number of examples that are attacked, from the start of the data."""

    @property
    def identity(self) -> Mapping[str, object]:
        """Everything that changes the result, as plain values for the manifest of a run."""

    def __call__(self, target: PreparedModel, batch: Batch, threat: "ThreatModel", seed: int) -> Table:
        """Return one row for each example that is correct when clean."""


class StatefulTable(StageKind):
    """Kind of stage that measures a stateful query detector with attacks that do and do not know it."""

    name = STATEFUL
    named = STATEFUL
    sharded = False
    lost = "the evaluation of the query detector is"
    sampled = True

    def stages(self, plan: "Plan") -> list[Stage]:
        """Return the stage that evaluates the query detector, if the plan contains it."""
        return [] if plan.trials is None else [Stage(STATEFUL, self)]

    def due(self, stage: Stage, plan: "Plan", by_stage: Mapping[str, Columns]) -> None:
        """Return None, because the stage has examples of its own: the first ones of the data."""

    def run(self, stage: Stage, work: Work) -> Columns:
        """Attack the examples of the stage, and return the results as columns of the table."""
        assert work.plan.trials is not None
        table = work.plan.trials(work.target, work.batch, work.plan.threat, work.plan.seed)
        ids = work.batch.ids.cpu()
        columns = {"id": ids, "ran": torch.ones_like(ids, dtype=torch.bool)}
        return columns | {f"{STATEFUL}.{name}": values for name, values in table.columns.items()}

    def columns(self, clean: Columns) -> dict[str, Tensor]:
        """Return the columns of this stage for examples that it does not attack."""
        return unattacked(clean)

    def cost(self, columns: Columns, *, randomised: bool) -> Cost:
        """Return no forward passes: they are reported in the table."""
        return Cost()

    def tables(self, by_stage: Mapping[str, Columns]) -> Mapping[str, Table]:
        """Return the table of the evidence with the results; none if the stage was not run or not finished."""
        return table_of_stage(STATEFUL, by_stage)
