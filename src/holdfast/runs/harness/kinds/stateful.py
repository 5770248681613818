"""The stage that measures a stateful query detector: query-based attacks on the first examples with it and without."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.evidence import Columns, Cost, Table
from holdfast.runs.harness.stage import Schedule, Stage, StageKind, Work, table_of_stage
from holdfast.runs.harness.target import Target
from holdfast.runs.harness.verdict import unattacked

if TYPE_CHECKING:
    from holdfast.core.threat import ThreatModel
    from holdfast.runs.harness.plan import Plan

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

    def __call__(self, target: Target, batch: Batch, threat: "ThreatModel", seed: int) -> Table:
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

    def due(self, stage: Stage, plan: Schedule, by_stage: Mapping[str, Columns]) -> None:
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
