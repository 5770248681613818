"""One example of a model under a threat, with its counterfactual, which the figures of its explanation share."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Inputs
from holdfast.explanation.counterfactual import Counterfactual
from holdfast.explanation.explained import Cell
from holdfast.explanation.wording import About, plane
from holdfast.runs.harness import Target
from holdfast.threats.domains import TEXT, is_image
from holdfast.threats.tables.table import Table, table_of

_GRID = 28
"""longest side of the attributions whose values are written as CSV"""


@dataclass(frozen=True)
class Case:
    """One example of a model under a threat, with the results that its figures share."""

    target: Target
    batch: Batch
    """the example (1), with the predicted class as its label"""
    label: int
    threat: ThreatModel
    about: About
    baseline: Inputs
    """input (1, *features) from which integrated gradients start, and which replaces occluded values"""
    rng: Draws
    found: Counterfactual

    @property
    def x(self) -> Inputs:
        """The clean input (1, *features)."""
        return self.batch.x

    @property
    def x_adv(self) -> Inputs:
        """The counterfactual that is shown (1, *features); the clean input if none was found."""
        return self.x if self.found.shown is None else self.found.shown

    @property
    def predicted(self) -> str:
        """Name of the class that is predicted for the clean input."""
        return self.about.called(int(self.batch.y[0]))

    @property
    def explained(self) -> str:
        """Name of what attributions explain: the logit of the predicted class, of two classes minus the other one."""
        predicted = int(self.batch.y[0])
        other = f" minus that of {self.about.called(1 - predicted)}" if self.target.classes == 2 else ""
        return f"the logit of {self.predicted}{other}"

    @property
    def becomes(self) -> str:
        """Name of the class that is predicted for the counterfactual."""
        return self.about.called(self.found.predicted)

    @property
    def misclassified(self) -> bool:
        """Whether the predicted class is not the label."""
        return int(self.batch.y[0]) != self.label

    @property
    def is_text(self) -> bool:
        """Whether the inputs are texts."""
        return self.threat.constraint.domain is TEXT

    @property
    def table(self) -> Table | None:
        """The constraint if it has the rules of a table, else None."""
        return table_of(self.threat.constraint)

    @property
    def is_picture(self) -> bool:
        """Whether the inputs are shown as pictures."""
        return is_image(self.x.shape[1:])

    @cached_property
    def noise(self) -> Inputs:
        """The clean input with random noise of the same size as the counterfactual."""
        return random_noise(self)

    @cached_property
    def predicted_of_noise(self) -> int:
        """Class that is predicted for the input with noise."""
        return int(self.target.predicted(self.target.logits(self.noise))[0])


def random_noise(case: Case) -> Inputs:
    """Return the input with random noise of the same distance as the counterfactual, with random signs of the changes
    under constraints that are no balls.
    """
    delta, constraint = case.x_adv - case.x, case.threat.constraint
    bounds = case.target.bare.bounds
    signs = case.rng.at("noise").signs(case.batch.ids, *case.x.shape[1:], dtype=case.x.dtype)
    if constraint.in_input_units:
        size = constraint.distance(case.x_adv, case.x)
        length = constraint.distance(signs, torch.zeros_like(signs))
        return bounds.clamp(case.x + signs * float(size[0] / length[0]))
    if case.table is not None:
        # valid rows alone, as a model may fail for a category that the rules do not list
        budget = case.table.resized(case.found.distance)
        return budget.project(case.x + signs * budget.tensors.unit.to(case.x), case.x, bounds)
    order = case.rng.at("places").uniform(case.batch.ids, case.x[0].numel()).argsort(1)
    mixed = delta.flatten(1).gather(1, order).view_as(delta)
    return bounds.clamp(case.x + signs * mixed)


def grid_rows(planes: Sequence[Tensor]) -> tuple[tuple[Cell, ...], ...]:
    """Rows with the position and the value of each plane, averaged to at most `_GRID` pixels along each side."""
    shown = [plane(each) for each in planes]
    height, width = shown[0].shape
    size = (min(height, _GRID), min(width, _GRID))
    pooled = [adaptive_avg_pool2d(each[None, None].float(), size)[0, 0].tolist() for each in shown]
    return tuple(
        (row, column, *(each[row][column] for each in pooled))
        for row in range(size[0])
        for column in range(size[1])
    )
