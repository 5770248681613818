"""Stages of transfer: between models, and of perturbations across data sets."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from holdfast.attacks.parts.random_search import sample_rows
from holdfast.attacks.transfer import Transfer
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.evidence import Columns, Table
from holdfast.core.meter import Metered, margin
from holdfast.core.model import Model
from holdfast.core.pieces import in_pieces
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Ids, Inputs, Logits, Mask
from holdfast.runs.harness.kinds.attack import AttackKind
from holdfast.runs.harness.stage import Member, Stage, StageKind, Work, evaluations
from holdfast.runs.harness.target import Target
from holdfast.runs.harness.verdict import aimed, cost_columns, returned, stored_inputs, unattacked, verdict_of

if TYPE_CHECKING:
    from holdfast.runs.harness.plan import Plan

MATRIX = Member("Transfer", Transfer(reach=2.5, diversity=0.5, neighbours=0))
"""Attack that computes the examples of the transfer matrix and of the transfer across data sets."""
MATRIX_ROWS = 500
"""Largest number of examples in the transfer matrix, and of each data set in the transfer across data sets.

With this number, a fraction is known to 4.5 percentage points.
"""
_COLUMNS = ("id", "right", "wrong")


class TransferMatrix(AttackKind):
    """Kind of stage that measures, on a sample of the examples, how attacks transfer between the target and the
    surrogates.
    """

    name = "transfer"
    named = "transfer"
    title = "the transfer matrix"
    lost = "the transfer matrix is"
    sampled = True

    def stages(self, plan: "Plan") -> list[Stage]:
        """Return the stage that measures the transfer between models, if the plan contains it."""
        return [Stage("transfer", self, MATRIX)] if plan.matrix else []

    def due(self, stage: Stage, plan: "Plan", by_stage: Mapping[str, Columns]) -> Mask:
        """Return the mask of a random sample of the examples. With a target class, the sample contains only examples of
        other classes.
        """
        clean, goal = by_stage["clean"], plan.threat.goal
        chosen = torch.zeros_like(clean["correct"])
        among = torch.ones_like(chosen) if goal is None else clean["y"] != goal
        chosen[sample_rows(clean, among, Draws(plan.seed).at("stage", stage.name), MATRIX_ROWS)] = True
        return chosen

    def piece(self, stage: Stage, work: Work, batch: Batch, rng: Draws, missed: Ids) -> dict[str, Tensor]:
        """Compute adversarial examples for one batch on each source model, and return as columns which of the models
        each of them breaks.

        The judgement of an example is that of the input from the first source that breaks the target.
        """
        plan, target = work.plan, work.target
        batch, threat = aimed(batch, plan.threat), replace(plan.threat, queries=None)
        metered = Metered(target.queried(target.quick, batch), batch, threat)

        def correct_by_model(x: Inputs, target_logits: Logits) -> Tensor:
            with torch.no_grad():
                surrogate_logits = [model(x, batch.ids) for model in threat.surrogates]
            return torch.stack(
                [margin(logits, batch) > 0 for logits in (target_logits, *surrogate_logits)], 1
            )

        wrong, columns, x_best = [], dict[str, Tensor](), batch.x
        with target.repeatable(rng.at(int(batch.ids[0]))):
            right = correct_by_model(batch.x, target.logits(batch.x))
            for models in makers(metered, threat):
                x_adv, _ = returned(stage.attack, replace(threat, surrogates=models), target, batch, rng)
                logits, judged = verdict_of(plan, target, batch, x_adv)
                wrong.append(~correct_by_model(x_adv, target.judged_logits(logits, batch.y)))
                replaced = judged["success"]
                # the first source gives the columns of all examples, later ones only those that still survive
                replaced = replaced & ~columns["success"] if columns else torch.ones_like(replaced)
                x_best = torch.where(replaced.view(-1, *[1] * (x_adv.dim() - 1)), x_adv, x_best)
                columns = {
                    name: torch.where(replaced, judged[name], columns.get(name, judged[name]))
                    for name in judged
                }
        columns |= {
            **cost_columns(metered.spent),
            **stored_inputs(plan, batch, x_best, columns["success"], missed),
            "transfer.id": batch.ids,
            "transfer.right": right,
            "transfer.wrong": torch.stack(wrong, 1),
        }
        return {name: values.cpu() for name, values in columns.items()}

    def as_if_broken(self, stage: Stage, work: Work) -> Columns:
        """Return the columns that the stage would have if all models agreed with the target and every example broke all
        of them. They serve to check gates before a run.
        """
        clean, threat = work.clean, work.plan.threat
        models, right = 1 + len(threat.surrogates), clean["correct"][:, None]
        wrong = right[:, None].expand(-1, len(makers(work.target.quick, threat)), models)
        table = {"transfer.id": clean["id"], "transfer.right": right.expand(-1, models)}
        return {**super().as_if_broken(stage, work), **table, "transfer.wrong": wrong}

    def judged(self, columns: Columns, *, randomised: bool) -> int:
        """Return the number of forward passes with which the examples of the transfer matrix were judged.

        Each example is judged once clean, and once for each set of source models.
        """
        if "transfer.wrong" not in columns:
            return super().judged(columns, randomised=randomised)
        sources = columns["transfer.wrong"].shape[1]
        return int(columns["ran"].sum()) * (1 + sources * evaluations(randomised=randomised))

    def tables(self, by_stage: Mapping[str, Columns]) -> Mapping[str, Table]:
        """Return the table of the evidence that contains the results of the transfer between models."""
        return sampled_table(by_stage, "transfer", "example", _COLUMNS)


def sampled_table(
    by_stage: Mapping[str, Columns], stage: str, unit: str, names: tuple[str, ...]
) -> dict[str, Table]:
    """Return a table of the evidence with the results of a stage that was run on a sample of the examples, by the name
    of the stage.

    Returns an empty dictionary if the stage was not run or not finished.
    """
    columns = by_stage.get(stage, {})
    sampled = {name: columns[f"{stage}.{name}"] for name in names if f"{stage}.{name}" in columns}
    return {stage: Table(unit, sampled)} if sampled else {}


def makers(target: Model, threat: ThreatModel) -> list[tuple[Model, ...]]:
    """Return the models, or sets of models, on which the adversarial examples of the transfer matrix are computed.

    These are the target alone, if gradients are allowed, each surrogate alone and, if there are several, all
    surrogates.
    """
    target_alone, single_surrogates = (
        [(target,)] if threat.gives("gradients") else [],
        [(model,) for model in threat.surrogates],
    )
    return [*target_alone, *single_surrogates, *([threat.surrogates] if len(single_surrogates) > 1 else [])]


_IMAGE = 4  # dimensions of a batch of images (n, channels, height, width)


class AcrossSets(StageKind):
    """Kind of stage that transfers perturbations between data sets. It uses the same number of inputs from each data
    set, paired by row.
    """

    name = "across"
    named = "across"
    sharded = False
    lost = "the transfer between data sets is"
    sampled = True

    def stages(self, plan: "Plan") -> list[Stage]:
        """Return the stage that transfers perturbations between data sets, if the plan contains it."""
        return [Stage("across", self, MATRIX)] if plan.across else []

    def due(self, stage: Stage, plan: "Plan", by_stage: Mapping[str, Columns]) -> None:
        """Return None, because the transfer between data sets is measured on all of their inputs."""

    def run(self, stage: Stage, work: Work) -> Columns:
        """Transfer perturbations between data sets, and return as columns which inputs each perturbation breaks.

        The masks `across.turned` and `across.control`, (n, source, destination), state which inputs were broken by a
        perturbation and by its control. The other columns are costs.
        """
        first_set = work.batch
        pairs = replace(first_set, ids=torch.arange(len(first_set), device=first_set.ids.device))
        return in_pieces(
            lambda piece: _transferred(stage, work, [data_set.take(piece.ids) for data_set in work.sets]),
            pairs,
            work.room,
        )

    def columns(self, clean: Columns) -> dict[str, Tensor]:
        """Return the columns of this stage for examples that are not in the data sets of the transfer."""
        return unattacked(clean)

    def judged(self, columns: Columns, *, randomised: bool) -> int:
        """Return the number of forward passes with which the transfer between data sets was judged.

        The inputs of each data set are judged once clean, and once with each perturbation and with each control.
        """
        if "across.turned" not in columns:
            return super().judged(columns, randomised=randomised)
        sets = columns["across.turned"].shape[1]
        return int(columns["ran"].sum()) * sets * (1 + 2 * sets)

    def tables(self, by_stage: Mapping[str, Columns]) -> Mapping[str, Table]:
        """Return the table of the evidence that contains the results of the transfer between data sets."""
        return sampled_table(by_stage, "across", "input of each data set", ("turned", "control"))


def paired(batch: Batch, seed: int, place: int) -> Batch:
    """Return the examples of a data set in a random order, in which they are paired with those of other data sets."""
    rng = Draws(seed).at("across", place)
    return batch.take(rng.uniform(batch.ids, 1, dtype=torch.float64)[:, 0].argsort(stable=True))


def _transferred(stage: Stage, work: Work, sets: Sequence[Batch]) -> dict[str, Tensor]:
    plan, target = work.plan, work.target
    rng, threat = Draws(plan.seed).at("stage", stage.name), replace(plan.threat, queries=None)
    project, bounds = threat.constraint.project, target.bare.bounds
    turned: list[Tensor] = []
    control: list[Tensor] = []
    queries = backwards = torch.zeros_like(sets[0].ids)
    with target.repeatable(rng.at(int(sets[0].ids[0]))):
        sets = [replace(source, y=target.logits(source.x)[:, : target.classes].argmax(1)) for source in sets]
        for place, source in enumerate(sets):
            metered = Metered(target.queried(target.quick, source), source, threat)
            makers = (metered,) if threat.gives("gradients") else threat.surrogates
            x_adv, _ = returned(
                stage.attack, replace(threat, surrogates=makers), target, source, rng.at(place)
            )
            change = x_adv - source.x
            permuted = _permuted(change, source, rng.at("control", place))
            for delta, masks in ((change, turned), (permuted, control)):
                moved = [
                    (destination, project(destination.x + delta, destination.x, bounds))
                    for destination in sets
                ]
                masks.append(torch.stack([_turned(target, destination, x) for destination, x in moved], 1))
            queries, backwards = queries + metered.spent.queries, backwards + metered.spent.backwards
    columns = {
        "id": sets[0].ids,
        "ran": torch.ones_like(sets[0].ids, dtype=torch.bool),
        "queries": queries,
        "backwards": backwards,
        "across.turned": torch.stack(turned, 1),
        "across.control": torch.stack(control, 1),
    }
    return {name: values.cpu() for name, values in columns.items()}


def _permuted(change: Inputs, batch: Batch, rng: Draws) -> Inputs:
    """Each perturbation with its places in random order; the channels of a pixel stay together."""
    spread = change.flatten(2) if change.dim() == _IMAGE else change.flatten(1)[:, None]
    order = rng.uniform(batch.ids, spread.shape[2]).argsort(1)
    return spread.gather(2, order[:, None].expand_as(spread)).view_as(change)


def _turned(target: Target, batch: Batch, x: Inputs) -> Mask:
    return ~(margin(target.judged_logits(target.logits(x), batch.y), batch) > 0)
