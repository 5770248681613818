"""Smallest lead of a class over another among all rows whose values are in given intervals.

Intervals are pairs of ranks (`Ensemble.ranks`), so that the search is exact whatever the thresholds are. Trees are
first cut to the intervals, and divided into groups without common features, whose smallest sums are added:

- The minimum of a single tree is that of its leaves.
- Trees with the same single feature, such as stumps, are added for each rank of it (Andriushchenko & Hein, "Provably
  robust boosted decision stumps and trees against adversarial attacks", NeurIPS 2019, arXiv:1906.03526).
- The minimum of other trees is searched by Veritas (Devos et al., "Versatile verification of tree ensembles", ICML
  2021, arXiv:2010.13880), until a deadline.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from holdfast.certifiers.trees.ensemble import Ensemble, Floats, Integers

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
    relaxed = lead + sum(min(value for value, _ in _leaves(tree, {}, (low, high))) for tree in hard)
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


def _leaves(tree: _Cut, box: Box, ends: tuple[Integers, Integers]) -> Iterator[tuple[float, Box]]:
    """Yield what each leaf adds, and its box."""
    if not isinstance(tree, _Split):
        yield tree, box
        return
    low, high = box.get(tree.feature) or (int(ends[0][tree.feature]), int(ends[1][tree.feature]))
    yield from _leaves(tree.left, {**box, tree.feature: (low, tree.cut - 1)}, ends)
    yield from _leaves(tree.right, {**box, tree.feature: (tree.cut, high)}, ends)


def _features(tree: _Split, ends: tuple[Integers, Integers]) -> set[int]:
    return {feature for _, box in _leaves(tree, {}, ends) for feature in box}


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
        value, box = min(_leaves(group[0], {}, ends), key=lambda leaf: leaf[0])
        return Worst(value, _nearest(box, row))
    (feature, *others) = set[int]().union(*(_features(tree, ends) for tree in group))
    if others:
        return None
    low, high = int(ends[0][feature]), int(ends[1][feature])
    sums = np.zeros(high - low + 1)
    for tree in group:
        for value, box in _leaves(tree, {}, ends):
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
        + sum(max(abs(value) for value, _ in _leaves(tree, {}, ends)) for tree in trees)
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
