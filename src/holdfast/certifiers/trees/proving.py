"""Certification of tree ensembles under Linf, with a misclassified row for each example that is not robust.

Under the rules of a table in which every column that may change only increases, or only decreases, a monotone model
does not change its class, whatever the size of the changes.
"""

import importlib.util
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from holdfast.certifiers.protocol import Proofs, ReadyProver
from holdfast.certifiers.trees.ensemble import Ensemble, Integers
from holdfast.certifiers.trees.monotone import Direction, proved_unchanged
from holdfast.certifiers.trees.reading import TreeModel, read_trees, refuse_other
from holdfast.certifiers.trees.worst import smallest_lead
from holdfast.core.batch import Batch
from holdfast.core.constraints import Constraint, Linf, allowed
from holdfast.core.errors import NoBounds, UsageError
from holdfast.core.model import Classifier
from holdfast.core.remedies import Install, Remedy
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Inputs
from holdfast.io.models.estimators import Estimator
from holdfast.io.models.table_models import TableEstimator
from holdfast.threats.tables.rules import Rules
from holdfast.threats.tables.table import Table

_HALVINGS, _LEAST_HALVINGS = 70, 12
"""largest number of halvings of the interval in which a value with a given rank is searched, since float64 has 53 bits,
and the number after which any such value is accepted"""


@dataclass(frozen=True)
class Trees:
    """Exact worst case of trees, of sums of stumps, and of ensembles by a search with Veritas.

    Andriushchenko & Hein, NeurIPS 2019, arXiv:1906.03526; Devos et al., ICML 2021, arXiv:2010.13880. It proves the
    claim or returns a counterexample if it has enough time, for ensembles of XGBoost, LightGBM and scikit-learn.
    """

    name: ClassVar[str] = "trees"
    timeout_s: float = 60.0
    """time limit for one example in seconds"""

    def ready(self, model: Classifier, sample: Batch, threat: ThreatModel) -> ReadyProver:
        """Read the trees of the model, and compare them with it.

        Raises `NoBounds` for another model, and for one whose trees are not supported; `UsageError` if the constraint
        is not Linf, or Veritas is needed and missing.
        """
        if threat.constraint.name == "table":
            return _under_rules(model, sample, threat.constraint, self.timeout_s)
        if not isinstance(threat.constraint, Linf):
            raise UsageError(
                f"{threat.constraint} cannot be certified for trees; expected a ball of the norm linf",
                Remedy("threat", threat.with_change("linf:0.1")),
            )
        ready = opened_trees(model, sample, threat.constraint, self.timeout_s)
        if not ready.simple and importlib.util.find_spec("veritas") is None:
            raise UsageError(
                "the ensemble has several trees with several features, which are certified with dtai-veritas, and it "
                "is missing",
                Install("trees"),
            )
        return ready


def _under_rules(model: Classifier, sample: Batch, constraint: Constraint, timeout_s: float) -> ReadyProver:
    assert isinstance(constraint, Table)
    return monotone_prover(opened_trees(model, sample, Linf(0.0), timeout_s), constraint.rules)


def opened_trees(model: Classifier, sample: Batch, constraint: Linf, timeout_s: float) -> "TreeProver":
    """Return the prover of a model whose trees were compared with it on the examples of `sample`."""
    tree_model = read_trees(model)
    assert isinstance(model.net, Estimator)
    values = model.net.rows(model.preprocess(sample.x))
    tree_model = refuse_other(tree_model, tree_model.rows(values))
    single = model.preprocess(sample.x).dtype == torch.float32 and not tree_model.steps
    if single:
        tree_model = replace(tree_model, ensemble=tree_model.ensemble.on_grid("float32"))
    return TreeProver(model, tree_model, constraint, timeout_s)


@dataclass(frozen=True, eq=False)
class TreeProver:
    """The method `trees`, prepared for a model."""

    model: Classifier
    trees: TreeModel
    constraint: Linf
    timeout_s: float

    @property
    def ensemble(self) -> Ensemble:
        """The trees."""
        return self.trees.ensemble

    @cached_property
    def simple(self) -> bool:
        """Whether no search is necessary: there is one tree, or each tree has at most one split."""
        ensemble = self.ensemble
        inner = np.add.reduceat((ensemble.feature >= 0).astype(int), ensemble.roots)
        return len(inner) == 1 or bool((inner <= 1).all())

    def __call__(self, batch: Batch) -> Proofs:
        """Return what is proved about the examples of a batch, with counterexamples.

        Raises `NoBounds` if the trees predict another class than the model for one of the examples.
        """
        with torch.no_grad():
            self.refuse_other_classes(batch)
            low, high = (self.ranks(side) for side in self._box(batch.x))
            rows, ranks = torch.arange(len(batch), device=batch.ids.device), self.ranks(batch.x)
            parts = [
                self._example(batch.take(rows[k : k + 1]), ranks[k], low[k], high[k])
                for k in range(len(batch))
            ]
        return Proofs.joined([Proofs.none(batch.take(rows[:0])), *parts])

    def ranks(self, x: Inputs) -> Integers:
        """Return the ranks of the values of inputs, (n, features)."""
        assert isinstance(self.model.net, Estimator)
        return self.trees.ranks(self.trees.rows(self.model.net.rows(self.model.preprocess(x))))

    def refuse_other_classes(self, batch: Batch) -> None:
        """Raise `NoBounds` if the trees predict another class than the model for one of the examples."""
        predicted = torch.from_numpy(self.ensemble.predictions(self.ranks(batch.x))).to(batch.y)
        scores = self.model(batch.x).double()
        best = scores.amax(1)
        lost = best - scores.gather(1, predicted[:, None])[:, 0]
        wrong = (lost > 1e-4 * (1 + best.abs())).nonzero()[:, 0]
        if len(wrong):
            row = int(wrong[0])
            raise NoBounds(
                f"the trees that were read predict class {int(predicted[row])} for example {int(batch.ids[row])}, and "
                f"the model class {int(scores[row].argmax())}; nothing is proved about it"
            )

    def _box(self, x: Inputs) -> tuple[Inputs, Inputs]:
        """Smallest and largest inputs in the ball, extended by the rounding error of storing them.

        The tolerance of the harness is left out: values of tables are often whole numbers, so that a threshold is
        exactly at the end of the ball, and only inputs beyond it are misclassified. Attacks project onto the ball.
        """
        x64, (low, high) = x.double(), self.model.bounds.like(x)
        eps = self.constraint.eps + torch.finfo(x.dtype).eps * (x64.abs() + self.constraint.eps)
        below, above = (x64 - eps).to(x.dtype), (x64 + eps).to(x.dtype)
        return torch.minimum(torch.maximum(below, low), x), torch.maximum(torch.minimum(above, high), x)

    def _example(self, one: Batch, ranks: Integers, low: Integers, high: Integers) -> Proofs:
        deadline, none = time.perf_counter() + self.timeout_s, Proofs.none(one)
        label, ensemble = int(one.y), self.ensemble
        bound, work, stopped = math.inf, 0, False
        for other in (k for k in range(ensemble.classes) if k != label):
            limit = ensemble.losing(label, other)
            # the first search may end at a lead that is so small that the library rounds it to either side
            for searched in (limit, -limit):
                worst = smallest_lead(ensemble, ranks, low, high, (label, other), searched, deadline)
                work, stopped = work + worst.work, stopped or worst.stopped
                if searched == limit and worst.bound > limit:
                    bound = min(bound, self._margin(worst.bound))
                    break
                bound = -math.inf
                x_adv = self._input(one, ranks, worst.ranks)
                if bool(self.model(x_adv).argmax(1) != one.y) and self._allowed(x_adv, one):
                    found = torch.ones_like(none.broken)
                    return replace(none, x_adv=x_adv, broken=found, work=none.work + work)
        proved = torch.full_like(none.bound, bound)
        return replace(
            none,
            certified=proved > 0,
            bound=proved,
            work=none.work + work,
            stopped=torch.full_like(none.stopped, stopped) & (proved <= 0),
        )

    def _allowed(self, x_adv: Inputs, one: Batch) -> bool:
        return bool(allowed(self.constraint, x_adv, one.x, self.model.bounds))

    def _margin(self, lead: float) -> float:
        """Lower bound of the difference of the logits for a lead that is proved, at least the smallest positive
        number.

        A difference of probabilities is smaller than that of their logarithms.
        """
        return max((lead - self.ensemble.rounding) / self.ensemble.divisor, sys.float_info.min)

    def _input(self, one: Batch, ranks: Integers, wanted: Mapping[int, int]) -> Inputs:
        """Return an input near an example whose values have the wanted ranks, by halving the interval to the end of the
        box in which the rank increases or decreases.
        """
        goal = ranks.copy()
        goal[list(wanted)] = list(wanted.values())
        low, high = self._box(one.x)
        near, change = one.x.clone(), torch.from_numpy(goal - ranks).to(one.x.device).reshape(one.x.shape)
        far = torch.where(change > 0, high, low)

        def reached(x: Tensor) -> Tensor:
            now = torch.from_numpy(self.ranks(x)[0] - goal).to(x.device).reshape(x.shape)
            return torch.where(change > 0, now >= 0, now <= 0)

        for halving in range(_HALVINGS):
            middle = near + (far - near) / 2
            arrived = reached(middle)
            near, far = torch.where(arrived, near, middle), torch.where(arrived, middle, far)
            x_adv = torch.where(change == 0, one.x, far)
            # the end of the box may be outside of the tolerance of the harness by a rounding error
            if (
                halving >= _LEAST_HALVINGS
                and self._allowed(x_adv, one)
                and (self.ranks(x_adv)[0] == goal).all()
            ):
                break
        return x_adv


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
