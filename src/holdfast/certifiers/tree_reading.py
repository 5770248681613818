"""Reads the trees of XGBoost, LightGBM and scikit-learn models into one form."""

import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from holdfast.core.errors import NoBounds
from holdfast.core.model import Classifier
from holdfast.io.models.estimators import Estimator

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


MAX_DEPTH = 500
"""Largest depth of a tree; trees are cut to a region by recursion."""
_CHECKED = 1000
"""Largest number of thresholds next to which both forms of an ensemble are compared."""
_LIGHTGBM_ZERO = float(np.float32(1e-35))
"""`kZeroThreshold` of LightGBM"""
_FORESTS = ("RandomForestClassifier", "ExtraTreesClassifier")
_MONOTONE = ("StandardScaler", "MinMaxScaler", "MaxAbsScaler", "RobustScaler")
"""transformations of scikit-learn by an increasing function of each feature"""
_ACCEPTED = (
    "the trees of XGBoost and LightGBM models are read, and those of DecisionTreeClassifier, "
    f"{', '.join(_FORESTS)}, GradientBoostingClassifier and HistGradientBoostingClassifier of scikit-learn, also "
    f"after {', '.join(_MONOTONE)} in a pipeline"
)

_CATEGORICAL = (
    "a tree of {} has a split by categories, which is not supported; encode categories as one column for each "
    "value, and train again"
)


@dataclass(frozen=True, eq=False)
class TreeModel:
    """A tree ensemble, and how rows of the wrapped model become rows of the ensemble."""

    ensemble: Ensemble
    scores: Callable[[Any], Any]
    """function of the library that returns the scores of rows (n, features), without link function"""
    shifted: bool = False
    """whether the library adds a base score, which is determined when both are compared"""
    steps: tuple[Any, ...] = ()
    """increasing transformations of each feature that precede the ensemble"""

    zero: float = 0.0
    """size up to which the library treats values as zeros"""

    def rows(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return rows of the ensemble for rows of the wrapped model."""
        for step in self.steps:
            values = step.transform(values)
        return np.asarray(values).astype(self.ensemble.width)

    def ranks(self, rows: NDArray[Any]) -> Integers:
        """Return the ranks of rows of the ensemble."""
        return self.ensemble.ranks(np.where(np.abs(rows) <= self.zero, 0.0, rows))


class _Tree(NamedTuple):
    """Nodes of one tree of a library, with thresholds from which on a row goes to the right child."""

    feature: NDArray[Any]
    threshold: Floats
    missing_left: NDArray[Any]
    left: NDArray[Any]
    right: NDArray[Any]
    value: Floats
    """(nodes, outputs)"""


def _quiet(method: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a method of scikit-learn without its warnings, such as that an array has no names of features."""

    def called(rows: NDArray[Any]) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return method(rows)

    return called


def has_trees(model: Classifier) -> bool:
    """Return whether a model is an ensemble of trees, or a tree, of a supported library."""
    source = _source(model)
    return source is not None and _kind(source[-1]) != ""


def read_trees(model: Classifier) -> TreeModel:
    """Return the trees of a model. Raises `NoBounds` for another model, and for trees with unsupported splits."""
    steps = _source(model)
    kind = "" if steps is None else _kind(steps[-1])
    if steps is None or not kind:
        name = model.net.name if isinstance(model.net, Estimator) else type(model.net).__name__
        raise NoBounds(f"the model is {name}, whose trees cannot be read; {_ACCEPTED}")
    for step in steps[:-1]:
        if type(step).__name__ not in _MONOTONE:
            raise NoBounds(f"the step {type(step).__name__} of the pipeline is not supported; {_ACCEPTED}")
    return replace(_READERS[kind](steps[-1]), steps=tuple(steps[:-1]))


def inner_values(model: Classifier) -> tuple[Tensor, ...]:
    """Return for each feature the sorted values of inputs in the middle between two adjacent thresholds."""
    tree_model = read_trees(model)
    cuts = tree_model.ensemble.cuts
    longest = max(len(each) for each in cuts)
    middles = np.full((max(longest - 1, 1), len(cuts)), np.nan)
    for feature, each in enumerate(cuts):
        middles[: max(len(each) - 1, 0), feature] = each[:-1] + np.diff(each) / 2
    for step in reversed(tree_model.steps):
        middles = step.inverse_transform(middles)
    values = torch.from_numpy(middles)
    std, mean = (None if each is None else each.double().cpu() for each in (model.std, model.mean))
    values = values if std is None else values * std
    values = values if mean is None else values + mean
    return tuple(column[column.isfinite()] for column in values.unbind(1))


def refuse_other(tree_model: TreeModel, rows: NDArray[Any]) -> TreeModel:
    """Return the tree model with its base score, and with the difference from the library that was accepted as `slack`.

    Raises `NoBounds` if its scores differ from those of the library, on the rows (n, features) of the ensemble or next
    to thresholds.
    """
    ensemble = tree_model.ensemble
    rows = np.concatenate((rows, _next_to_thresholds(ensemble, rows)))
    given = np.asarray(tree_model.scores(rows), dtype=np.float64).reshape(len(rows), -1)
    computed = ensemble.scores(tree_model.ranks(rows)) / ensemble.divisor
    if given.shape == computed.shape:
        if tree_model.shifted:
            base = np.median(given - computed, axis=0)
            ensemble, computed = replace(ensemble, base=base), computed + base
        difference = float(np.abs(computed - given).max())
        rounding = ensemble.rounding_of_sums / ensemble.divisor
        accepted = rounding + 1e-6 * (1 + float(np.abs(given).max()))
        if difference <= rounding:  # a base score that was computed has a rounding error as well
            exact = not tree_model.shifted or (ensemble.smallest_difference > 0 and difference == 0)
            slack = 0.0 if exact else ensemble.rounding_of_sums
            return replace(tree_model, ensemble=replace(ensemble, slack=slack))
        if difference <= accepted:  # each of the two scores of a lead may differ by this
            return replace(tree_model, ensemble=replace(ensemble, slack=2 * accepted * ensemble.divisor))
    raise NoBounds(
        f"the trees that were read give other scores than the model on {len(rows)} rows, as those of a model with an "
        f"initial estimator or weights of trees do; {_ACCEPTED}"
    )


def _next_to_thresholds(ensemble: Ensemble, rows: NDArray[Any]) -> NDArray[Any]:
    """Return copies of the rows in which one value is a threshold, or the largest number below it."""
    inner = np.flatnonzero((ensemble.feature >= 0) & np.isfinite(ensemble.threshold))
    chosen = inner[np.linspace(0, len(inner) - 1, min(len(inner), _CHECKED)).astype(int)]
    at = ensemble.threshold[chosen].astype(rows.dtype)
    copies = np.tile(rows[np.arange(len(chosen)) % len(rows)], (2, 1))
    values = np.concatenate((at, np.nextafter(at, np.asarray(-np.inf, rows.dtype))))
    copies[np.arange(len(copies)), np.tile(ensemble.feature[chosen], 2)] = values
    finite: NDArray[Any] = copies[np.isfinite(values)]
    return finite


def _source(model: Classifier) -> tuple[Any, ...] | None:
    """Return the steps of the pipeline that a model wraps, or the only estimator; None for another model."""
    if not isinstance(model.net, Estimator) or model.net.interface.source is None:
        return None
    source = model.net.interface.source
    if _library(source) == "sklearn" and type(source).__name__ == "Pipeline":
        return tuple(step for _, step in source.steps if step not in (None, "passthrough"))
    return (source,)


def _library(source: Any) -> str:
    return type(source).__module__.partition(".")[0]


def _kind(source: Any) -> str:
    """Return the key of the reader of an object, or an empty string."""
    library, name = _library(source), type(source).__name__
    if library == "sklearn":
        return name if name in _READERS else ""
    known = {"xgboost": ("Booster", "XGBClassifier"), "lightgbm": ("Booster", "LGBMClassifier")}
    return library if name in known.get(library, ()) else ""


def _assembled(trees: Sequence[_Tree], features: int, width: Width, **kind: Any) -> Ensemble:
    """Return trees as one list of nodes. `kind` are further fields of the ensemble."""
    if not trees:
        raise NoBounds("the model has no trees, so that it predicts the same class for every input")
    sizes = [len(tree.feature) for tree in trees]
    roots = np.cumsum([0, *sizes[:-1]])
    nodes = _Tree(*(np.concatenate(side) for side in zip(*trees, strict=True)))
    inner, first = nodes.feature >= 0, np.repeat(roots, sizes)
    ensemble = Ensemble(
        nodes.feature.astype(np.int64),
        np.where(inner, nodes.threshold, 0.0),
        nodes.missing_left.astype(bool),
        nodes.left.astype(np.int64) + first,
        nodes.right.astype(np.int64) + first,
        np.where(inner[:, None], 0.0, nodes.value),
        roots,
        np.zeros(nodes.value.shape[1]),
        features,
        width,
        **kind,
    )
    if _depth(ensemble) > MAX_DEPTH:
        raise NoBounds(
            f"a tree has more than {MAX_DEPTH} levels; limit the depth of the trees, and train again"
        )
    return ensemble


def _in_column(values: NDArray[Any], output: int, outputs: int) -> Floats:
    """Return values (nodes,) as a column of a matrix (nodes, outputs) of zeros."""
    matrix = np.zeros((len(values), outputs))
    matrix[:, output] = values
    return matrix


def _depth(ensemble: Ensemble) -> int:
    """Return the number of levels of the deepest tree, or `MAX_DEPTH` + 1 if it is larger or a node is repeated."""
    nodes = ensemble.roots
    for depth in range(MAX_DEPTH + 1):
        nodes = nodes[ensemble.feature[nodes] >= 0]
        if not len(nodes):
            return depth
        if len(nodes) > len(ensemble.feature):  # nodes are their own descendants
            break
        nodes = np.concatenate((ensemble.left[nodes], ensemble.right[nodes]))
    return MAX_DEPTH + 1


def _read_xgboost(source: Any) -> TreeModel:
    """Trees of a `Booster`, or of an `XGBClassifier`, as they are in its JSON form."""
    from holdfast.io.models.trees import margins

    booster = source
    if type(source).__name__ == "XGBClassifier":
        if not math.isnan(source.missing):
            raise NoBounds(f"missing values of the XGBClassifier are {source.missing}; NaN was expected")
        booster = source.get_booster()
        best = booster.attributes().get(
            "best_iteration"
        )  # of early stopping, to which predictions are limited
        booster = booster if best is None else booster[: int(best) + 1]
    learner = json.loads(booster.save_raw("json"))["learner"]
    kind = learner["gradient_booster"]["name"]
    if kind != "gbtree":
        raise NoBounds(f"the booster of XGBoost is {kind}; gbtree was expected")
    outputs, model = (
        max(1, int(learner["learner_model_param"]["num_class"])),
        learner["gradient_booster"]["model"],
    )
    trees = []
    for tree, output in zip(model["trees"], model["tree_info"], strict=True):
        if int(tree["tree_param"]["size_leaf_vector"]) > 1:
            raise NoBounds(
                "a tree of XGBoost has leaves for several outputs; one tree per output was expected"
            )
        if any(tree["split_type"]):
            raise NoBounds(_CATEGORICAL.format("XGBoost"))
        left, right, feature, to_left = (
            np.array(tree[key])
            for key in ("left_children", "right_children", "split_indices", "default_left")
        )
        # a threshold, or the value of a leaf
        values = np.array(tree["split_conditions"], dtype=np.float32).astype(np.float64)
        feature = np.where(left < 0, -1, feature)
        trees.append(_Tree(feature, values, to_left, left, right, _in_column(values, output, outputs)))
    ensemble = _assembled(trees, booster.num_features(), "float32", sums="float32")
    return TreeModel(ensemble, lambda rows: margins(booster, (0, 0), rows), shifted=True)


def _read_lightgbm(source: Any) -> TreeModel:
    """Trees of a `Booster`, or of an `LGBMClassifier`, as they are in its JSON form."""
    booster = source.booster_ if type(source).__name__ == "LGBMClassifier" else source
    dump = booster.dump_model()
    outputs = int(dump["num_tree_per_iteration"])
    trees = [
        _lightgbm_tree(tree["tree_structure"], place % outputs, outputs)
        for place, tree in enumerate(dump["tree_info"])
    ]
    slope = re.search(r"sigmoid:(\S+)", str(dump.get("objective", "")))
    divisor = (len(trees) / outputs if dump["average_output"] else 1.0) / (float(slope[1]) if slope else 1.0)
    ensemble = _assembled(trees, booster.num_feature(), "float64", divisor=divisor)
    return TreeModel(
        ensemble, lambda rows: booster.predict(rows, raw_score=True) / divisor, zero=_LIGHTGBM_ZERO
    )


def _lightgbm_tree(structure: dict[str, Any], output: int, outputs: int) -> _Tree:
    nodes, children = [structure], list[tuple[int, int]]()
    for node in nodes:  # which grows
        if "split_feature" not in node:
            children.append((-1, -1))
            continue
        if node["decision_type"] != "<=":
            raise NoBounds(_CATEGORICAL.format("LightGBM"))
        if node["missing_type"] == "Zero":
            raise NoBounds("LightGBM treats zeros as missing values; zero_as_missing=False was expected")
        children.append((len(nodes), len(nodes) + 1))
        nodes += [node["left_child"], node["right_child"]]

    def column(key: str, absent: float) -> NDArray[Any]:
        return np.array([node.get(key, absent) for node in nodes])

    threshold = column("threshold", 0.0).astype(np.float64)
    # without a branch for missing values, they are compared as zeros
    to_left = np.where(column("missing_type", 0) == "None", threshold >= 0, column("default_left", False))
    left, right = np.array(children).T
    value = _in_column(column("leaf_value", 0.0), output, outputs)
    beyond = rounded_up(threshold, "float64", beyond=True)
    return _Tree(column("split_feature", -1), beyond, to_left, left, right, value)


def _sklearn_tree(tree: Any, value: Floats) -> _Tree:
    return _Tree(
        np.where(tree.children_left < 0, -1, tree.feature),
        rounded_up(tree.threshold, "float32", beyond=True),
        np.asarray(tree.missing_go_to_left),
        tree.children_left,
        tree.children_right,
        value,
    )


def _read_forest(source: Any) -> TreeModel:
    """Trees of a decision tree or a forest, whose leaves are probabilities."""
    members = [source] if type(source).__name__ == "DecisionTreeClassifier" else source.estimators_
    values = [member.tree_.value[:, 0, :] for member in members]
    trees = [
        _sklearn_tree(member.tree_, value / value.sum(1, keepdims=True))
        for member, value in zip(members, values, strict=True)
    ]
    ensemble = _assembled(trees, source.n_features_in_, "float32", divisor=float(len(trees)))
    return TreeModel(ensemble, _quiet(source.predict_proba))


def _read_gradient_boosting(source: Any) -> TreeModel:
    stages, rate = source.estimators_, source.learning_rate
    trees = [
        _sklearn_tree(tree.tree_, _in_column(rate * tree.tree_.value[:, 0, 0], output, len(stage)))
        for stage in stages
        for output, tree in enumerate(stage)
    ]
    ensemble = _assembled(trees, source.n_features_in_, "float32")
    return TreeModel(ensemble, _quiet(source.decision_function), shifted=True)


def _read_histograms(source: Any) -> TreeModel:
    trees = []
    for stage in source._predictors:
        for output, predictor in enumerate(stage):
            nodes = predictor.nodes
            if nodes["is_categorical"].any():
                raise NoBounds(_CATEGORICAL.format("HistGradientBoostingClassifier"))
            feature = np.where(nodes["is_leaf"], -1, nodes["feature_idx"])
            threshold = rounded_up(nodes["num_threshold"], "float64", beyond=True)
            value = _in_column(nodes["value"], output, len(stage))
            to_left, left, right = (nodes[key] for key in ("missing_go_to_left", "left", "right"))
            trees.append(_Tree(feature, threshold, to_left, left, right, value))
    ensemble = _assembled(trees, source.n_features_in_, "float64")
    return TreeModel(ensemble, _quiet(source.decision_function), shifted=True)


_READERS: dict[str, Callable[[Any], TreeModel]] = {
    "xgboost": _read_xgboost,
    "lightgbm": _read_lightgbm,
    "DecisionTreeClassifier": _read_forest,
    **dict.fromkeys(_FORESTS, _read_forest),
    "GradientBoostingClassifier": _read_gradient_boosting,
    "HistGradientBoostingClassifier": _read_histograms,
}
