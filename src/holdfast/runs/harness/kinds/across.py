"""Transfer across data sets: perturbations that were computed for inputs of one data set are added to the inputs of
every data set.

Labels are not used: an input is broken if the prediction differs from that for the clean input. Therefore the classes
of another data set need not be those of the model. Each perturbation has a control: the same perturbation with its
pixels permuted, which has the same size in every norm and a random direction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.evidence import Columns, Table
from holdfast.core.meter import Metered, margin
from holdfast.core.pieces import in_pieces
from holdfast.core.types import Inputs, Mask
from holdfast.runs.harness.kinds.transfer import MATRIX, sampled_table
from holdfast.runs.harness.stage import Schedule, Stage, StageKind, Work
from holdfast.runs.harness.target import Target
from holdfast.runs.harness.verdict import returned, unattacked

if TYPE_CHECKING:
    from holdfast.runs.harness.plan import Plan

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

    def due(self, stage: Stage, plan: Schedule, by_stage: Mapping[str, Columns]) -> None:
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
