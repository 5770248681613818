"""Protocols of attacks: settings, the access that is needed, and a call that returns inputs."""

from collections.abc import Sequence
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.transformations import Transformations
from holdfast.core.types import Access, Inputs


@runtime_checkable
class Attack(Protocol):
    """A frozen dataclass whose fields are the settings and whose call is the algorithm, without an evaluation."""

    needs: ClassVar[Access]

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        """Return perturbed inputs (n, *features), inside the constraint if it has an eps."""


@runtime_checkable
class Learned(Attack, Protocol):
    """An attack that is fitted once, on examples that are not evaluated, and then is the same for every example.

    Calling it raises `UsageError`; `fitted` returns the attack with the result of the fit.
    """

    @property
    def examples(self) -> int:
        """Largest number of examples that it is fitted on."""

    def fit(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Tensor:
        """Return the result of a fit, as a batch of one."""

    def fitted(self, learned: Tensor) -> Attack:
        """Return the attack that applies the result to every example."""


@runtime_checkable
class Refitted(Learned, Protocol):
    """A fitted attack that depends on random numbers, so that several fits are made and the best is used."""

    @property
    def fits(self) -> int:
        """Number of fits; the best is chosen on examples that no fit used."""

    def refit(self, k: int, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Tensor:
        """Return the result of fit `k`, as a batch of one."""


@runtime_checkable
class Placed(Attack, Protocol):
    """An attack that applies the same change at the worst position of each image."""

    def tried(self, threat: ThreatModel, shape: torch.Size) -> int:
        """Largest number of positions that are tried in an image of this shape (channels, height, width)."""

    def at_random(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        """Return the inputs with the change at one random position of each, without queries of the model."""


@runtime_checkable
class QueryAttack(Attack, Protocol):
    """An attack whose setting `queries` limits its queries for each example."""

    batched: ClassVar[bool]
    """whether each call queries all remaining examples; otherwise a call queries some of them"""

    @property
    def queries(self) -> int:
        """Largest number of queries for one example."""


@runtime_checkable
class Enumeration(Attack, Protocol):
    """An attack that tries every point of a grid, with all remaining examples in each call."""

    def grid_points(self, constraint: Transformations) -> Sequence[tuple[float, ...]]:
        """Return the points of the grid as shares of the limits."""
