"""The common form of the tree ensembles of all libraries: arrays of nodes, and scores that are sums over trees."""

import sys
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]
Width = Literal["float32", "float64"]
"""data type in which a library compares values with thresholds"""

_UNIT = {"float32": 2.0**-24, "float64": 2.0**-53}
"""largest relative rounding error of one operation"""


def rounded_up(thresholds: Floats, width: Width, *, beyond: bool = False) -> Floats:
    """Return for each threshold the smallest number of a data type that is at least as large, or that is larger if
    `beyond` is true.
    """
    with np.errstate(over="ignore"):
        near = thresholds.astype(width)
        short = near <= thresholds if beyond else near < thresholds
        up: Floats = np.where(short, np.nextafter(near, np.asarray(np.inf, width)), near).astype(np.float64)
    return up


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Trees whose leaves are added to `base`, which gives the scores of the classes. One list contains all nodes.

    A row goes to the right child of a node if its value of `feature` is at least `threshold`, and to the child of
    `missing_left` if the value is NaN.
    """

    feature: Integers
    """feature that a node compares, (nodes,); -1 for a leaf"""
    threshold: Floats
    missing_left: Flags
    left: Integers
    right: Integers
    value: Floats
    """what a leaf adds to the scores, (nodes, outputs); one output is the score of class 1, which is compared with 0"""
    roots: Integers
    """root of each tree"""
    base: Floats
    """scores (outputs,) without trees"""
    features: int
    """number of features of a row"""
    width: Width
    """data type in which values are compared"""
    sums: Width = "float64"
    """data type in which the library adds the leaves"""
    divisor: float = 1.0
    """number by which the library divides the sums, such as the number of trees of a forest"""
    slack: float = 0.0
    """difference between a lead and that of the library that the comparison of both accepted beyond rounding errors"""

    @property
    def classes(self) -> int:
        """Number of classes."""
        return max(2, int(self.value.shape[1]))

    @cached_property
    def cuts(self) -> tuple[Floats, ...]:
        """Sorted thresholds of each feature, without repetitions."""
        order = np.argsort(self.feature, kind="stable")
        ends = np.searchsorted(self.feature[order], np.arange(self.features + 1))
        return tuple(np.unique(self.threshold[order[begin:end]]) for begin, end in pairwise(ends))

    @cached_property
    def cut(self) -> Integers:
        """Rank from which a row goes to the right child of a node: one more than the place of its threshold in
        `cuts`.
        """
        ranks = np.zeros(len(self.feature), dtype=np.int64)
        for feature in np.unique(self.feature[self.feature >= 0]):
            nodes = self.feature == feature
            ranks[nodes] = np.searchsorted(self.cuts[feature], self.threshold[nodes]) + 1
        return ranks

    @cached_property
    def smallest_difference(self) -> float:
        """Lower bound of the difference of two scores that are not equal, if the library adds the leaves without
        rounding because they are whole numbers, or because there is one tree; 0 otherwise.
        """
        if self.base.any() or self.slack:
            return 0.0
        if (self.value == np.round(self.value)).all():
            return 1.0
        return 2 * sys.float_info.min if len(self.roots) == 1 else 0.0

    def ranks(self, rows: NDArray[Any]) -> Integers:
        """Return for each value of the rows (n, features) the number of thresholds that it reaches; -1 if it is
        missing. All inputs with equal ranks have equal scores.
        """
        columns = [np.searchsorted(cuts, rows[:, k], "right") for k, cuts in enumerate(self.cuts)]
        ranks = np.stack(columns, 1) if columns else np.zeros(rows.shape, dtype=np.int64)
        return np.where(np.isnan(rows), -1, ranks)

    def leaves(self, ranks: Integers) -> Integers:
        """Return the leaf of each tree that rows with the given ranks reach, (n, trees)."""
        nodes = np.repeat(self.roots[None], len(ranks), 0)
        rows = np.arange(len(ranks))[:, None]
        while (inner := self.feature[nodes] >= 0).any():
            rank = ranks[rows, self.feature[nodes]]
            to_left = np.where(rank < 0, self.missing_left[nodes], rank < self.cut[nodes])
            nodes = np.where(inner, np.where(to_left, self.left[nodes], self.right[nodes]), nodes)
        return nodes

    def scores(self, ranks: Integers) -> Floats:
        """Return the sums of the leaves with `base`, (n, outputs)."""
        scores: Floats = self.base + self.value[self.leaves(ranks)].sum(1)
        return scores

    def lead(self, label: int, other: int) -> tuple[Floats, float]:
        """Return what each node adds to the lead of a class over another, (nodes,), and the lead without trees."""
        if self.value.shape[1] == 1:
            sign = 1.0 if label == 1 else -1.0
            return sign * self.value[:, 0], sign * float(self.base[0])
        return self.value[:, label] - self.value[:, other], float(self.base[label] - self.base[other])

    def predictions(self, ranks: Integers) -> Integers:
        """Return the class with the largest score of each row; of equal scores the first."""
        scores = self.scores(ranks)
        if scores.shape[1] == 1:
            return (scores[:, 0] > 0).astype(np.int64)
        return np.asarray(scores.argmax(1), dtype=np.int64)

    @property
    def rounding(self) -> float:
        """Bound of the difference between a lead of one class over another and that which the library computes."""
        return 0.0 if self.smallest_difference else self.rounding_of_sums + self.slack

    @cached_property
    def rounding_of_sums(self) -> float:
        """Bound of the rounding errors of a lead, if it is a sum of numbers that are not whole."""
        largest = np.maximum.reduceat(np.abs(self.value).max(1), self.roots)
        size = 2 * (float(np.abs(self.base).max()) + float(largest.sum()))
        return 2 * (len(self.roots) + 4) * (_UNIT[self.sums] + _UNIT["float64"]) * size + 1e-12

    def losing(self, label: int, other: int) -> float:
        """Return the largest lead of a class over another with which the library may not predict it.

        Of equal scores the first determines the class.
        """
        step = self.smallest_difference
        if not step:
            return self.rounding
        return -step / 2 if label < other else step / 2

    def on_grid(self, width: Width) -> "Ensemble":
        """Return the same ensemble for rows whose values are numbers of the data type `width`.

        Thresholds between which there is no such number become one, so that every rank is that of some row.
        """
        return replace(self, threshold=np.where(self.feature >= 0, rounded_up(self.threshold, width), 0.0))
