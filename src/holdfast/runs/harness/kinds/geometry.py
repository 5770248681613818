"""The stage that measures the geometry of the decision boundary around the first examples, for the report."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.evidence import Columns, Cost, Table
from holdfast.core.model import Classifier
from holdfast.runs.harness.stage import Schedule, Stage, StageKind, Work, table_of_stage
from holdfast.runs.harness.verdict import unattacked

if TYPE_CHECKING:
    from holdfast.core.threat import ThreatModel
    from holdfast.runs.harness.plan import Plan

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

    def due(self, stage: Stage, plan: Schedule, by_stage: Mapping[str, Columns]) -> None:
        """Return None, because the stage has examples of its own: the first ones of the data."""

    def run(self, stage: Stage, work: Work) -> Columns:
        """Measure the geometry around the examples of the stage, and return it as columns of the table."""
        assert work.plan.geometry is not None
        table = work.plan.geometry(work.target.bare, work.batch, work.plan.threat, work.plan.seed)
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
