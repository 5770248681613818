"""Certification of tree ensembles under Linf and under the rules of a table."""

import importlib.util
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from holdfast.certifiers.protocol import Proofs, ReadyProver
from holdfast.certifiers.tree_reading import (
    Ensemble,
    Flags,
    Floats,
    Integers,
    TreeModel,
    read_trees,
    refuse_other,
)
from holdfast.core.batch import Batch
from holdfast.core.constraints import Constraint, Linf, allowed
from holdfast.core.errors import Install, NoBounds, Remedy, UsageError
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Inputs
from holdfast.io.models.estimators import Estimator
from holdfast.io.models.trees import TableEstimator
from holdfast.threats.table_rules import Rules
from holdfast.threats.tables import Table

Box = Mapping[int, tuple[int, int]]
"""smallest and largest rank of features; other features are not restricted"""
_FOCAL = 0.1
"""relaxation of the search of Veritas, which searches in the depth first if it is small: on boosted trees of depth 6,
counterexamples were found up to 20 times faster than with its default 0.8, and proofs took the same time"""
_STEPS = 100
"""number of steps of Veritas between two looks at the clock"""
_SLACK = 1e-9
"""relative amount by which limits of Veritas are moved outwards, above the rounding errors of its sums"""


@dataclass(frozen=True)
class _Split:
    """Inner node of a tree that was cut to intervals, where both children can be reached."""

    feature: int
    cut: int
    left: "_Cut"
    right: "_Cut"


_Cut: TypeAlias = _Split | float
"""a tree that was cut to intervals: a split, or what a leaf adds"""


@dataclass(frozen=True)
class Worst:
    """What is known about the smallest lead within the intervals."""

    bound: float
    """lower bound of the lead"""
    ranks: Mapping[int, int] = field(default_factory=dict)
    """ranks of features at which the lead is `bound`, or at most the limit of the search; others are as in the row"""
    attained: bool = True
    """whether `ranks` are those of such a row; otherwise there is only the bound"""
    stopped: bool = False
    """whether the deadline ended the search"""
    work: int = 1
    """number of groups of trees whose minimum was computed"""


def smallest_lead(
    ensemble: Ensemble,
    row: Integers,
    low: Integers,
    high: Integers,
    pair: tuple[int, int],
    limit: float,
    deadline: float,
) -> Worst:
    """Return a lower bound of the lead of the first class of `pair` over the second among all rows with ranks between
    `low` and `high`, with ranks at which it is attained.

    `row` are the ranks of the example, which values keep that need not change. The bound is exact, except that the
    search ends when it is known whether the lead can be at most `limit`, or at the deadline.
    """
    added, lead = ensemble.lead(*pair)
    open_nodes = (ensemble.feature >= 0) & (row >= 0)[ensemble.feature]
    open_nodes &= (low[ensemble.feature] < ensemble.cut) & (ensemble.cut <= high[ensemble.feature])
    undecided = np.logical_or.reduceat(open_nodes, ensemble.roots)
    lead += float(added[ensemble.leaves(row[None])[0][~undecided]].sum())
    trees = []
    for root in ensemble.roots[undecided].tolist():
        cut = _cut(ensemble, added, root, row, (low, high), {})
        if isinstance(cut, _Split):
            trees.append(cut)
        else:
            lead += cut
    groups = _groups(trees, (low, high))
    results = [_minimum(group, row, (low, high)) for group in groups]
    easy = [result for result in results if isinstance(result, Worst)]
    lead += sum(result.bound for result in easy)
    ranks = {feature: rank for result in easy for feature, rank in result.ranks.items()}
    hard = [tree for group, result in zip(groups, results, strict=True) if result is None for tree in group]
    if not hard:
        return Worst(lead, ranks, work=1 + len(groups))
    relaxed = lead + sum(min(value for value, _ in _cut_leaves(tree, {}, (low, high))) for tree in hard)
    if relaxed > limit:
        return Worst(relaxed, attained=False, work=1 + len(groups))
    return _searched(hard, lead, ranks, row, (low, high), limit, deadline, len(groups))


def _cut(
    ensemble: Ensemble, added: Floats, node: int, row: Integers, ends: tuple[Integers, Integers], box: Box
) -> _Cut:
    """Return the part of a tree that rows in the intervals `ends`, and in the box of the path, can reach."""
    feature = int(ensemble.feature[node])
    if feature < 0:
        return float(added[node])
    cut, left, right = int(ensemble.cut[node]), int(ensemble.left[node]), int(ensemble.right[node])
    if row[feature] < 0:  # a missing value stays missing
        return _cut(ensemble, added, left if ensemble.missing_left[node] else right, row, ends, box)
    low, high = box.get(feature) or (int(ends[0][feature]), int(ends[1][feature]))
    if high < cut:
        return _cut(ensemble, added, left, row, ends, box)
    if low >= cut:
        return _cut(ensemble, added, right, row, ends, box)
    below = _cut(ensemble, added, left, row, ends, {**box, feature: (low, cut - 1)})
    above = _cut(ensemble, added, right, row, ends, {**box, feature: (cut, high)})
    return below if below == above and not isinstance(below, _Split) else _Split(feature, cut, below, above)


def _cut_leaves(tree: _Cut, box: Box, ends: tuple[Integers, Integers]) -> Iterator[tuple[float, Box]]:
    """Yield what each leaf adds, and its box."""
    if not isinstance(tree, _Split):
        yield tree, box
        return
    low, high = box.get(tree.feature) or (int(ends[0][tree.feature]), int(ends[1][tree.feature]))
    yield from _cut_leaves(tree.left, {**box, tree.feature: (low, tree.cut - 1)}, ends)
    yield from _cut_leaves(tree.right, {**box, tree.feature: (tree.cut, high)}, ends)


def _features(tree: _Split, ends: tuple[Integers, Integers]) -> set[int]:
    return {feature for _, box in _cut_leaves(tree, {}, ends) for feature in box}


def _groups(trees: Sequence[_Split], ends: tuple[Integers, Integers]) -> list[list[_Split]]:
    """Return the trees in groups, so that trees of different groups have no common feature."""
    groups: list[tuple[set[int], list[_Split]]] = []
    for tree in trees:
        features, members = _features(tree, ends), [tree]
        apart = []
        for group in groups:
            if group[0] & features:
                features, members = features | group[0], [*group[1], *members]
            else:
                apart.append(group)
        groups = [*apart, (features, members)]
    return [members for _, members in groups]


def _minimum(group: Sequence[_Split], row: Integers, ends: tuple[Integers, Integers]) -> Worst | None:
    """Return the smallest sum of a group that is one tree or has one feature; None for another group."""
    if len(group) == 1:
        value, box = min(_cut_leaves(group[0], {}, ends), key=lambda leaf: leaf[0])
        return Worst(value, _nearest(box, row))
    (feature, *others) = set[int]().union(*(_features(tree, ends) for tree in group))
    if others:
        return None
    low, high = int(ends[0][feature]), int(ends[1][feature])
    sums = np.zeros(high - low + 1)
    for tree in group:
        for value, box in _cut_leaves(tree, {}, ends):
            begin, end = box[feature]
            sums[begin - low : end - low + 1] += value
    best = np.flatnonzero(sums == sums.min()) + low
    return Worst(float(sums.min()), {feature: int(best[np.abs(best - row[feature]).argmin()])})


def _nearest(box: Box, row: Integers) -> dict[int, int]:
    return {feature: min(max(int(row[feature]), low), high) for feature, (low, high) in box.items()}


def _searched(
    trees: Sequence[_Split],
    lead: float,
    ranks: Mapping[int, int],
    row: Integers,
    ends: tuple[Integers, Integers],
    limit: float,
    deadline: float,
    work: int,
) -> Worst:
    """Search with Veritas whether the sum of the trees and `lead` can be at most `limit`."""
    import veritas

    ensemble = veritas.AddTree(1, veritas.AddTreeType.REGR)
    for tree in trees:
        _copy_into(ensemble.add_tree(), 0, tree)
    # Veritas maximises, so that leaves are negated; an output of at least `wanted` is a lead of at most `limit`
    wanted = lead - limit
    wanted -= _SLACK * (
        abs(lead)
        + abs(limit)
        + sum(max(abs(value) for value, _ in _cut_leaves(tree, {}, ends)) for tree in trees)
    )
    config = veritas.Config(veritas.HeuristicType.MAX_OUTPUT)
    config.ignore_state_when_worse_than = wanted
    config.stop_when_num_solutions_exceeds = 1
    config.stop_when_optimal = True
    config.focal_eps = _FOCAL
    search = config.get_search(ensemble)
    reason = search.step_for(max(deadline - time.perf_counter(), 0.0), _STEPS)
    if search.num_solutions():
        box = {
            feature: (
                max(int(ends[0][feature]), 0 if interval.lo_is_unbound() else math.ceil(interval.lo)),
                int(ends[1][feature]) if interval.hi_is_unbound() else math.ceil(interval.hi) - 1,
            )
            for feature, interval in search.get_solution(0).box().items()
        }
        found = lead - float(search.get_solution(0).output)
        return Worst(min(found, limit), {**ranks, **_nearest(box, row)}, work=1 + work)
    if reason == veritas.StopReason.NO_MORE_OPEN:
        return Worst(math.nextafter(limit, math.inf), attained=False, work=1 + work)
    return Worst(-math.inf, attained=False, stopped=True, work=1 + work)


def _copy_into(target: Any, node: int, tree: _Cut) -> None:
    """Copy a tree with negated leaves below a node of a tree of Veritas."""
    if not isinstance(tree, _Split):
        target.set_leaf_value(node, -tree)
        return
    target.split(node, tree.feature, float(tree.cut))
    _copy_into(target, target.left(node), tree.left)
    _copy_into(target, target.right(node), tree.right)


Direction = Literal[1, -1]
"""1 for a score that does not decrease when a feature increases, -1 for one that does not increase"""


def monotone_in(ensemble: Ensemble, features: Sequence[int], direction: Direction, class_index: int) -> bool:
    """Return whether every tree proves that the score of a class is monotone in each of the features.

    With one output, the score is that of the class minus that of the other one. The test is exact for each tree: leaves
    that differ only in the feature are compared. A sum of trees may be monotone although one of the trees is not, which
    is not proved. A missing value stays missing.
    """
    single = ensemble.value.shape[1] == 1
    added = ensemble.lead(class_index, 1 - class_index)[0] if single else ensemble.value[:, class_index]
    return _all_monotone(ensemble, added * direction, features)


def proved_unchanged(
    ensemble: Ensemble, ranks: Integers, features: Sequence[int], direction: Direction = 1
) -> Flags:
    """Return for each row, given by its ranks (`Ensemble.ranks`), whether its class is proved to stay the same when the
    features increase by any amounts, or decrease with a `direction` of -1.

    It is proved if the lead of the predicted class over each other one does not decrease.
    """
    predictions, scores = ensemble.predictions(ranks), ensemble.scores(ranks)
    if scores.shape[1] == 1:
        scores = np.concatenate((np.zeros_like(scores), scores), 1)
    proved = np.zeros(len(ranks), dtype=np.bool_)
    for label in np.unique(predictions).tolist():
        others = [other for other in range(ensemble.classes) if other != label]
        leads = (ensemble.lead(label, other)[0] * direction for other in others)
        if all(_all_monotone(ensemble, added, features) for added in leads):
            lead = scores[:, label] - scores[:, others].max(1)
            # the sums of the changed row are rounded as well
            firm = lead >= 0 if ensemble.smallest_difference else lead > ensemble.rounding
            proved |= (predictions == label) & firm
    return proved


def _all_monotone(ensemble: Ensemble, added: Floats, features: Sequence[int]) -> bool:
    return all(_does_not_decrease(ensemble, added, int(root), features) for root in ensemble.roots)


def _does_not_decrease(ensemble: Ensemble, added: Floats, root: int, features: Sequence[int]) -> bool:
    """Return whether what one tree adds does not decrease when any of the features increases."""
    leaves = list(_reachable_leaves(ensemble, root, {}))
    used = sorted({feature for _, box in leaves for feature in box})
    if not set(used) & set(features):
        return True
    value = added[[leaf for leaf, _ in leaves]]
    apart = np.zeros((len(leaves), len(leaves)), dtype=np.int64)
    boxes = {}
    for feature in used:
        everything = (0, len(ensemble.cuts[feature]), True)
        low, high, missing = map(
            np.array, zip(*(box.get(feature, everything) for _, box in leaves), strict=True)
        )
        common = np.maximum(low[:, None], low) <= np.minimum(high[:, None], high)
        separate = ~(common | (missing[:, None] & missing))
        apart += separate
        boxes[feature] = low, high, separate
    for feature in set(used) & set(features):
        low, high, separate = boxes[feature]
        present = low <= high
        increases = (low[:, None] < high) & present[:, None] & present
        if (increases & (apart == separate) & (value[:, None] > value)).any():
            return False
    return True


def _reachable_leaves(
    ensemble: Ensemble, node: int, box: Mapping[int, tuple[int, int, bool]]
) -> Iterator[tuple[int, Mapping[int, tuple[int, int, bool]]]]:
    """Yield the leaves of a tree that rows can reach, with the smallest and the largest rank of each feature on the
    path, and whether it may be missing.
    """
    feature, cut = int(ensemble.feature[node]), int(ensemble.cut[node])
    if feature < 0:
        yield node, box
        return
    low, high, missing = box.get(feature, (0, len(ensemble.cuts[feature]), True))
    to_left = bool(ensemble.missing_left[node])
    for child, side in (
        (int(ensemble.left[node]), (low, min(high, cut - 1), missing and to_left)),
        (int(ensemble.right[node]), (max(low, cut), high, missing and not to_left)),
    ):
        if side[0] <= side[1] or side[2]:
            yield from _reachable_leaves(ensemble, child, {**box, feature: side})


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
