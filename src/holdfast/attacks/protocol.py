"""What every attack is: settings, the access it needs, and a call that returns inputs."""

from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs


@runtime_checkable
class Attack(Protocol):
    """A frozen dataclass whose fields are the settings and whose call is the algorithm; it never judges itself."""

    needs: ClassVar[Access]

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        """Perturbed inputs (n, *features), inside the constraint where it has an eps."""


@runtime_checkable
class Learned(Attack, Protocol):
    """An attack that is learned once, on examples that are never judged, and then the same for every example.

    Its own call refuses; `fitted` gives the attack that what was learned makes.
    """

    @property
    def examples(self) -> int:
        """How many examples it is learned on at most."""

    def fit(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Tensor:
        """What is learned, as a batch of one."""

    def fitted(self, learned: Tensor) -> Attack:
        """The attack that does it to every example."""


@runtime_checkable
class Refitted(Learned, Protocol):
    """A learned attack that depends on its random draws, so that several fits are made and the best is taken."""

    @property
    def fits(self) -> int:
        """How many fits are made; the best is chosen on examples that no fit has seen."""

    def refit(self, k: int, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Tensor:
        """What fit `k` of them learns, as a batch of one."""


@runtime_checkable
class Placed(Attack, Protocol):
    """An attack that puts the same change at the place of each image that is worst for the model."""

    def tried(self, threat: ThreatModel, shape: torch.Size) -> int:
        """At how many places of an image of this shape (channels, height, width) it is tried, at most."""

    def at_random(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        """The inputs with the change at one random place of each, whatever the model says of it."""
