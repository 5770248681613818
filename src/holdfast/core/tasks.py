"""Tasks: what a model returns, if not one score for each class, and how its outputs are compared with the truth."""

from collections.abc import Mapping
from typing import Any, ClassVar, Final, Protocol

from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.names import TaskName
from holdfast.core.types import Inputs, PerExample

LEFT: Final = "left"
"""name of the measurement with the share of the score of each example that is left, from 0 to 1"""
MEASURED: Final = "task."
"""prefix of the columns of a task: of one attack in a stage, and of the worst case in the evidence"""
CLEAN: Final = "clean."
"""prefix of the columns of a task for clean inputs in the evidence"""


class Task(Protocol):
    """Protocol of what a model returns. Its fields are JSON values, so that a run stores them.

    `outputs` are the outputs of the model as one tensor (n, *values), and `truth` (n, *truth) is what they are compared
    with, as in the data.
    """

    name: ClassVar[TaskName]
    noun: ClassVar[str]
    """what has a score, in the singular, such as `image`"""

    @property
    def surrogates(self) -> tuple[str, ...]:
        """Names of the losses that attacks can maximise, the default first."""

    @property
    def correct_if(self) -> str:
        """Condition under which an example counts as correct, for reports."""

    def read(self, returned: object, x: Inputs) -> Tensor:
        """Return what the network returned for inputs `x` (n, *features) as one tensor (n, *values), with its gradient.

        Raises `TargetError` for outputs of another task.
        """

    def refuse(self, outputs: Tensor, batch: Batch, name: str) -> None:
        """Raise `TargetError` if the outputs do not fit the truth or the inputs of a batch of the data `name`, such as
        unknown classes.
        """

    def lead(self, outputs: Tensor, truth: Tensor) -> PerExample:
        """Return a number for each example that is positive if the example counts as correct."""

    def left(self, outputs: Tensor, truth: Tensor) -> PerExample:
        """Return the score of each example, from 0 to 1, which attacks lower. NaN counts as 0."""

    def loss(self, outputs: Tensor, truth: Tensor, surrogate: str) -> PerExample:
        """Return a differentiable loss of each example, which is larger if the outputs are worse."""

    def measured(self, outputs: Tensor, truth: Tensor) -> Mapping[str, Tensor]:
        """Return the columns from which the metrics are computed, (n, *sizes) each, by name."""

    def shown(self, outputs: Tensor) -> Tensor:
        """Return what a report shows of outputs (n, *values), such as the class of each pixel."""

    def card(self) -> Mapping[str, Any]:
        """Return the fields as JSON values, from which `holdfast.tasks.catalogue.task_of` creates the task again."""
