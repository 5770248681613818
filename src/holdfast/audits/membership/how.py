"""What an audit of membership audits, and the halves of the data that its networks are trained on."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from holdfast.audits.membership.references import halves
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.types import Mask


@dataclass(frozen=True)
class Design:
    """Which examples are members of which networks, and what is compared."""

    n: int
    """number of examples"""
    networks: int
    """number of reference networks, or of networks that are targets in turn"""
    fpr: float
    seed: int
    members: int | None = None
    """number of the first examples, those that the model was trained on; None if a training procedure is audited"""
    groups: Mapping[str, Mask] = field(default_factory=dict)
    """members of each group, by name, as a mask of the examples"""

    @property
    def rng(self) -> Draws:
        """Random numbers of the audit."""
        return Draws(self.seed).at("membership")

    @property
    def member(self) -> Mask:
        """Mask of the training examples of the model, or of the first network."""
        return self.inside()[0] if self.members is None else self.places < self.members

    @property
    def places(self) -> Tensor:
        """Positions of the examples, by which random numbers are drawn; ids may occur in two data sets."""
        return torch.arange(self.n)

    def inside(self) -> Tensor:
        """Return which examples each network is trained on."""
        return halves(self.places, self.networks, self.rng)

    def null(self) -> Tensor:
        """Return other halves, which no network was trained on."""
        return halves(self.places, max(self.networks, 2), self.rng.at("null"))


@dataclass(frozen=True)
class MembershipAudit:
    """What is audited, and how."""

    design: Design
    examples: Batch
    classes: int
    together: int = 2
    """number of networks that one shard trains; an even number"""
    epochs: int = 1
    """number of times that progress is reported for each network"""

    @property
    def shards(self) -> tuple[tuple[int, int], ...]:
        """For each shard, its first network and the network after its last one."""
        networks = self.design.networks
        firsts = range(0, networks, self.together)
        return tuple((first, min(first + self.together, networks)) for first in firsts)
