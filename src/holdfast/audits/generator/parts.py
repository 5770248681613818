"""What a part of the audit of a generator is, such as its sensitivity or a search for a backdoor: a stage of the run
that measures, and a function that concludes from what is stored.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from holdfast.audits.finding import Finding
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Columns
from holdfast.io.models.generators import OpenedGenerator
from holdfast.reports.numbers import percent
from holdfast.runs.store.columns import Form


@dataclass(frozen=True)
class Context:
    """What a part may look at."""

    samples: Tensor
    """samples of the generator (n, *features), in the space of the training examples"""
    training: Batch
    held_out: Batch
    generator: OpenedGenerator | None
    """None for a file of samples"""
    device: torch.device
    rng: Draws
    """random numbers of the part"""


def shown(estimate: Estimate) -> tuple[str, str]:
    """Return the texts of an estimate and of its interval for a table."""
    return f"{estimate.value:.3g}", f"{estimate.low:.3g} to {estimate.high:.3g}"


def share_and_range(estimate: Estimate) -> tuple[str, str]:
    """Return the texts of the estimate of a share and of its interval for a table."""
    return percent(estimate.value), f"{percent(estimate.low)} to {percent(estimate.high)}"


class Part(Protocol):
    """Protocol of a part of the audit."""

    @property
    def name(self) -> str:
        """Name of the stage of the run."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics of the finding."""

    @property
    def title(self) -> str:
        """What the part measures, for the table of the parts that do not apply."""

    def missing(self, context: Context) -> str:
        """Return what the generator or the data lack, as in `decode(z)`; empty if the part applies."""

    def measure(self, context: Context) -> Columns:
        """Measure, and return the columns that are stored. The column `id` numbers the rows."""

    def forms(self) -> Mapping[str, Form]:
        """Return the forms of the columns from which the finding is computed."""

    def concluded(self, columns: Columns) -> Finding:
        """Return the finding of stored columns. Its verdict is `flagged` if the part alone suffices to flag the
        generator, and `unclear` if its measurement is not enough to decide. Its headline is a clause that follows that
        of the audit, or empty. It computes nothing that takes long.
        """

    def images(self, columns: Columns, context: Context) -> Mapping[str, Tensor]:
        """Return the images of the pictures of the finding by name, in the range of the training examples."""
