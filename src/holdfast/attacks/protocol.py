"""Protocols of attacks, which have settings, state the access that they need, and are called to perturb inputs."""

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
    """Protocol of an attack: a frozen dataclass whose fields are its settings and whose call is the algorithm.

    An attack does not evaluate its own success; the harness does.
    """

    needs: ClassVar[Access]

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        """Return the perturbed inputs (n, *features); they are inside the constraint if it has an eps."""


@runtime_checkable
class Learned(Attack, Protocol):
    """Protocol of an attack that is fitted once, on examples that are not evaluated, and is then the same for every
    example.

    Calling it raises `UsageError`; `fitted` returns an attack that uses the result of the fit.
    """

    @property
    def examples(self) -> int:
        """Largest number of examples that the attack is fitted on."""

    def fit(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Tensor:
        """Return the result of a fit, such as a perturbation or the values of a patch, as a batch of one."""

    def fitted(self, learned: Tensor) -> Attack:
        """Return the attack that applies `learned`, the result of a fit, to every example."""


@runtime_checkable
class Refitted(Learned, Protocol):
    """Protocol of a fitted attack that depends on random numbers, so that several fits are made and the best one is
    used.
    """

    @property
    def fits(self) -> int:
        """Number of fits; the best one is chosen on examples that no fit has used."""

    def refit(self, k: int, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Tensor:
        """Return the result of fit number `k`, as a batch of one."""


@runtime_checkable
class Placed(Attack, Protocol):
    """Protocol of an attack that makes the same change to each image, at the position where the model's margin is
    lowest.
    """

    def tried(self, threat: ThreatModel, shape: torch.Size) -> int:
        """Return the largest number of positions that are tried in an image of shape (channels, height, width)."""

    def at_random(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        """Return the inputs with the patch or pixels of the attack at one random position of each image.

        The model is not queried.
        """


@runtime_checkable
class QueryAttack(Attack, Protocol):
    """Protocol of an attack whose setting `queries` limits the number of its queries for each example."""

    batched: ClassVar[bool]
    """whether each call of the model queries all remaining examples; otherwise a call may query only some of them"""

    @property
    def queries(self) -> int:
        """Largest number of queries for each example."""


@runtime_checkable
class Enumeration(Attack, Protocol):
    """Protocol of an attack that tries every point of a grid, with all remaining examples in each call of the model."""

    def grid_points(self, constraint: Transformations) -> Sequence[tuple[float, ...]]:
        """Return the points of the grid, each as fractions of the limits of all axes of the constraint."""
