"""Certification against changes of the training set, for ensembles that the recipe `partitions` trained.

Levine & Feizi, "Deep Partition Aggregation: Provable Defense against General Poisoning Attacks", ICLR 2021,
arXiv:2006.14768. An added or removed training example changes at most one vote. A class c with n votes stays ahead of
another class with m votes until the difference is used up, two votes for each change; of classes with equal votes the
smaller one is predicted.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.certifiers.protocol import Proofs, ReadyProver
from holdfast.core.batch import Batch
from holdfast.core.errors import NoBounds, Remedy, UsageError
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.io.models.composed import Ensemble
from holdfast.threats.triggers import TrainingSet


@dataclass(frozen=True)
class PartitionVotes:
    """Counts the votes of an ensemble whose members were trained on disjoint parts of the training set.

    It proves for each example how many added and removed training examples do not change the prediction.
    """

    name: ClassVar[str] = "partitions"
    radii: ClassVar[bool] = True

    def ready(self, model: Classifier, sample: Batch, threat: ThreatModel) -> ReadyProver:
        """Return the prover of a model, which proves nothing if the recipe `partitions` did not train it.

        Raises `UsageError` for a threat model other than changes of the training set.
        """
        if not isinstance(threat.constraint, TrainingSet):
            raise UsageError(
                f"partitions certifies changes of the training set, and the threat is {threat.constraint}",
                Remedy("threat", "training-set:20"),
            )
        net = model.net
        if not (isinstance(net, Ensemble) and net.is_trained):
            return Proofs.none
        return VoteProver(model, net, threat.constraint.changes)


@dataclass(frozen=True, eq=False)
class VoteProver:
    """The method `partitions`, prepared for a model."""

    model: Classifier
    ensemble: Ensemble
    changes: int

    def __call__(self, batch: Batch) -> Proofs:
        """Return what the votes prove about the examples of a batch."""
        with torch.no_grad():
            votes = self.ensemble.votes(self.model.preprocess(batch.x))
        radius = unchanged_under(votes)
        # only an example that the votes classify correctly is certified
        radius = torch.where(votes.argmax(1) == batch.y, radius, -1).double()
        none = Proofs.none(batch)
        return replace(
            none,
            certified=radius >= self.changes,
            radius=radius.clamp_min(0),
            work=torch.full_like(none.work, len(self.ensemble.members)),
        )


def unchanged_under(votes: Tensor) -> Tensor:
    """Return the largest number of added and removed training examples under which the class with the most votes stays
    the same, for votes (n, classes).

    >>> unchanged_under(torch.tensor([[5, 3, 0], [3, 5, 0], [4, 4, 0]])).tolist()
    [1, 0, 0]
    """
    best = votes.argmax(1, keepdim=True)  # the first of equal ones
    smaller = torch.arange(votes.shape[1], device=votes.device) < best
    rival = (votes + smaller).scatter(1, best, -1).amax(1)
    return (votes.gather(1, best)[:, 0] - rival).div(2, rounding_mode="floor")


def refuse_unpartitioned(model: Classifier) -> None:
    """Raise `NoBounds` for a model that the recipe `partitions` did not train."""
    net = model.net
    if not (isinstance(net, Ensemble) and net.is_trained):
        kind = "is an ensemble that was not trained so" if isinstance(net, Ensemble) else "is none"
        raise NoBounds(
            "changes of the training set are certified for ensembles that holdfast harden trains with --recipe "
            f"partitions, and the model {kind}"
        )
