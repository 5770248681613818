"""Certification of tree ensembles under the rules of a table in which every column that may change only increases, or
only decreases: a monotone model does not change its class, whatever the size of the changes.
"""

import sys
from dataclasses import dataclass

import numpy as np
import torch

from holdfast.certifiers.protocol import Proofs
from holdfast.certifiers.trees.monotone import Direction, proved_unchanged
from holdfast.certifiers.trees.proving import TreeProver
from holdfast.core.batch import Batch
from holdfast.core.errors import UsageError
from holdfast.io.models.table_models import TableEstimator
from holdfast.threats.tables.rules import Rules


@dataclass(frozen=True, eq=False)
class MonotoneProver:
    """The method `trees` for rules of a table, prepared for a model."""

    prover: TreeProver
    features: tuple[int, ...]
    """columns that may change, in the order in which the model was fitted"""
    direction: Direction

    def __call__(self, batch: Batch) -> Proofs:
        """Return which examples keep their class under all changes that the rules allow."""
        with torch.no_grad():
            self.prover.refuse_other_classes(batch)
            ranks = self.prover.ranks(batch.x)
        ensemble, none = self.prover.ensemble, Proofs.none(batch)
        unchanged = torch.from_numpy(proved_unchanged(ensemble, ranks, self.features, self.direction))
        right = torch.from_numpy(np.asarray(ensemble.predictions(ranks))).to(batch.y) == batch.y
        certified = unchanged.to(right.device) & right
        bound = torch.full_like(none.bound, sys.float_info.min).where(certified, none.bound)
        return Proofs(certified, bound, none.work + 1, none.stopped, batch.x, none.broken)


def monotone_prover(prover: TreeProver, rules: Rules) -> MonotoneProver:
    """Return the prover for the rules. Raises `UsageError` if columns may change in both directions."""
    changing = {name: rules.columns[name].change for name in rules.names if rules.mutable(name)}
    directions = set(changing.values())
    if len(directions) > 1 or directions == {"any"}:
        name = next(
            name for name, change in changing.items() if change not in ("up", "down") or len(directions) > 1
        )
        raise UsageError(
            f"under rules, trees are certified if all columns that may change only increase, or only decrease, and "
            f"{name!r} has change: {changing[name]}; a threat such as linf:0.01,unit=range allows all changes of a size"
        )
    net = prover.model.net
    order = net.order if isinstance(net, TableEstimator) else range(len(rules.names))
    features = tuple(place for place, at in enumerate(order) if rules.names[at] in changing)
    return MonotoneProver(prover, features, 1 if directions == {"up"} else -1)
