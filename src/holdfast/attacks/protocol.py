"""Protocols of attacks. An attack is an object with settings and a declared access, which is called to perturb a batch
of inputs.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.constraints import Coordinates
from holdfast.core.draws import Draws
from holdfast.core.model import Bounds, Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Ids, Inputs, Logits

if TYPE_CHECKING:
    from holdfast.threats.transformations import Transformation

T = TypeVar("T")


@runtime_checkable
class Attack(Protocol):
    """Protocol of an attack: a frozen dataclass whose fields are the settings of the attack and whose `__call__` is its
    algorithm.

    An attack does not evaluate its own success; the harness does.
    """

    needs: ClassVar[Access]

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        """Return the perturbed inputs (n, *features); they are inside the constraint if it has an eps."""


class AtCoordinates:
    """Wrapper of a model that attacks query with points of the coordinates of a constraint."""

    def __init__(self, model: Model, coordinates: Coordinates) -> None:
        self._model, self.coordinates = model, coordinates

    @property
    def bounds(self) -> Bounds:
        """Range of the coordinates."""
        return self.coordinates.bounds

    def __call__(self, x: Inputs, ids: Ids | None = None) -> Logits:
        """Return the logits of the inputs at the points `x`."""
        return self._model(self.coordinates.inputs(x, ids), ids)


def searched(
    search: Callable[..., T], model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws
) -> tuple[T, Coordinates | None]:
    """Return the result of an attack or of its fit in the coordinates of the constraint, and these coordinates if they
    are not the values of the inputs.
    """
    coordinates = threat.constraint.coordinates(batch, model.bounds)
    if coordinates is None:
        return search(model, batch, threat, rng=rng), None
    surrogates = tuple(AtCoordinates(surrogate, coordinates) for surrogate in threat.surrogates)
    moved = replace(threat, constraint=coordinates.constraint, surrogates=surrogates)
    points = search(AtCoordinates(model, coordinates), coordinates.batch, moved, rng=rng)
    return points, coordinates


def attacked_inputs(
    attack: "Attack", model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws
) -> Inputs:
    """Return the inputs of an attack, which searches in the coordinates of the constraint."""
    points, coordinates = searched(attack, model, batch, threat, rng=rng)
    return points if coordinates is None else coordinates.inputs(points, batch.ids).detach()


@runtime_checkable
class Learned(Attack, Protocol):
    """Protocol of an attack that is fitted once, on examples that are not used for the evaluation, and then makes the
    fitted change to every example.

    Calling it raises `UsageError`; `fitted` returns an attack that uses the result of the fit.
    """

    @property
    def examples(self) -> int:
        """Largest number of examples that the attack is fitted on."""

    def fit(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Tensor:
        """Fit the attack on a batch and return the result, such as a perturbation or the values of a patch, with a
        first dimension of size 1.
        """

    def fitted(self, learned: Tensor) -> Attack:
        """Return an attack that applies `learned`, the result of a fit, to every example."""


@runtime_checkable
class Refitted(Learned, Protocol):
    """Protocol of a fitted attack whose result depends on random numbers, so that it is fitted several times and the
    best result is used.
    """

    @property
    def fits(self) -> int:
        """Number of times that the attack is fitted. The best result is chosen on examples that no fit has used."""

    def refit(self, k: int, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Tensor:
        """Fit the attack with the random numbers of fit number `k`, and return the result with a first dimension of
        size 1.
        """


@runtime_checkable
class Placed(Attack, Protocol):
    """Protocol of an attack that makes the same change, such as a patch, to each image at the position where the margin
    is lowest.
    """

    def tried(self, threat: ThreatModel, shape: torch.Size) -> int:
        """Return the largest number of positions at which the attack tries its change in an image of shape (channels,
        height, width).
        """

    def at_random(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        """Return the inputs with the change of the attack, such as a patch, at one random position of each image.

        The model is not queried.
        """


@runtime_checkable
class Itemised(Attack, Protocol):
    """Protocol of an attack that consists of several methods, and returns for each example what each of them did.

    It has the settings `passes`, the largest number of forward and backward passes for each example, and `methods`.
    """

    columns: ClassVar[tuple[str, ...]]
    """names of the columns"""

    @property
    def passes(self) -> int:
        """Largest number of forward and backward passes for each example."""

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods that are run."""

    def itemised(
        self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws
    ) -> tuple[Inputs, dict[str, Tensor]]:
        """Return the perturbed inputs, and int64 columns (n) with what each method did."""


@runtime_checkable
class QueryAttack(Attack, Protocol):
    """Protocol of an attack that has a setting `queries`, the largest number of queries for each example."""

    batched: ClassVar[bool]
    """whether each call of the model queries all remaining examples; otherwise a call may query only some of them"""

    @property
    def queries(self) -> int:
        """Largest number of queries that the attack makes for each example."""


@runtime_checkable
class ThresholdAttack(Attack, Protocol):
    """Protocol of an attack that uses the thresholds of a tree ensemble if they can be read."""

    def reading(self, inner_values: Sequence[Tensor]) -> Attack:
        """Return the attack on a tree ensemble whose thresholds are known.

        `inner_values` has a tensor for each feature: one value of each interval between successive thresholds, in
        ascending order, so that the attack need not search for the intervals.
        """

    def without_reading(self) -> Attack:
        """Return the attack for an attacker who gets scores only."""


@runtime_checkable
class Enumeration(Attack, Protocol):
    """Protocol of an attack that tries every point of a grid of transformations; each call of the model tries one point
    on all examples that are not yet broken.
    """

    def grid_points(self, constraint: "Transformation") -> Sequence[tuple[float, ...]]:
        """Return the points of the grid that the attack tries. A point has one number for each parameter, such as
        rotation or horizontal shift, as a fraction of its limit.
        """
