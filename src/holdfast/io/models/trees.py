"""Wraps XGBoost and LightGBM models and other estimators of tables as torch modules."""

import hashlib
import importlib.util
import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from holdfast.core.batch import CLASSIFIERS_ONLY
from holdfast.core.errors import TargetError, UsageError, importing
from holdfast.io.models.estimators import Adapted, Array, Estimator, EstimatorInterface, Form, as_model
from holdfast.io.models.weights import read_once
from holdfast.io.sandbox.calling import read_under_limits
from holdfast.io.sandbox.lightgbm_files import header_of, unreadable_lightgbm
from holdfast.io.sandbox.sandbox_main import Limits
from holdfast.io.sandbox.trees import best_iteration, damaged, first_line
from holdfast.threats.table_rules import Rules

MAX_BYTES = 2**30
"""Largest number of bytes of a file; a booster of 10,000 deep trees has some hundred megabytes."""
LIMITS = Limits(copies=8, spare_bytes=2**30)
"""Limits of the process that first loads a file; JSON needs memory for eight copies."""
_XGBOOST = frozenset(
    {"binary:logistic", "binary:logitraw", "binary:hinge", "multi:softmax", "multi:softprob"}
)
"""Training objectives of boosters whose margins are logits of classes."""


def adapted_booster(booster: Any) -> Adapted:
    """Return an XGBoost classifier wrapped as a model. The untransformed outputs of XGBoost are the logits of the
    classes.

    Raises `TargetError` for another objective.
    """
    return _adapted(booster, hashlib.sha256(bytes(booster.save_raw("ubj"))).hexdigest(), None)


def open_booster(path: Path) -> tuple[Adapted, str]:
    """Return the XGBoost model in a `.json` or `.ubj` file wrapped as a torch module, and the SHA-256 of the file.

    If `XGBClassifier` wrote the file after early stopping, trees after the best iteration are not used, as in
    `XGBClassifier`.
    """
    content, xgboost = _tested(path, "XGBoost", "xgboost", "trees")
    booster = xgboost.Booster()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns about files of another version
            booster.load_model(bytearray(content))
        last_iteration = best_iteration(booster)
        adapted = _adapted(booster, hashlib.sha256(content).hexdigest(), last_iteration)
    except xgboost.core.XGBoostError as error:
        raise damaged(path, str(error)) from error
    return adapted, hashlib.sha256(content).hexdigest()


def _tested(path: Path, library: str, package: str, parser: str) -> tuple[bytes, Any]:
    """Return the content of a file that a separate process has loaded without harm, and the package that reads it."""
    content = read_once(path, "model", max_bytes=MAX_BYTES)
    module = importing(package, f"{str(path)!r} is a model of {library}, and {package} is missing", "trees")
    with read_under_limits(parser, path, LIMITS, content=content):
        return content, module


def _refuse_objective(objective: str, known: Sequence[str]) -> None:
    """Raise `TargetError` for a training objective with which the raw scores are no logits of classes."""
    if objective not in known:
        raise TargetError(
            f"the booster has the objective {objective or 'of its own'}; one of {', '.join(known)} was expected. "
            f"{CLASSIFIERS_ONLY}; for a classifier with another objective, give a function from inputs to logits"
        )


def _adapted(booster: Any, digest: str, last_iteration: int | None) -> Adapted:
    learner = json.loads(booster.save_config())["learner"]
    objective, parameters = learner["objective"]["name"], learner["learner_model_param"]
    _refuse_objective(objective, sorted(_XGBOOST))
    if int(parameters.get("num_target", 1)) > 1:
        raise TargetError(
            f"the booster predicts {parameters['num_target']} labels per example, but one was expected; train it on "
            "one label"
        )
    classes = max(int(parameters["num_class"]), 2)
    interface = EstimatorInterface(
        "Booster",
        partial(margins, booster, (0, 0 if last_iteration is None else last_iteration + 1)),
        features=booster.num_features(),
        dtype=np.float32,
        kind="logit",
        source=booster if last_iteration is None else booster[: last_iteration + 1],
    )
    names = booster.feature_names
    return replace(
        as_model(interface, digest), classes=classes, feature_names=None if names is None else tuple(names)
    )


def margins(booster: Any, iterations: tuple[int, int], rows: Any) -> Array:
    """Return the logits (n, classes) of the rows, an array or a pandas frame, or those (n,) of class 1. Raises
    `XGBoostError` with one line.
    """
    import xgboost

    # a frame has names and categories of its own
    declared = (
        {"feature_names": booster.feature_names, "feature_types": booster.feature_types}
        if isinstance(rows, np.ndarray)
        else {}
    )
    try:
        matrix = xgboost.DMatrix(rows, **declared, enable_categorical=True)
        margins: Array = booster.predict(matrix, output_margin=True, iteration_range=iterations)
    except xgboost.core.XGBoostError as error:
        raise type(error)(first_line(str(error))) from error
    return margins


_LIGHTGBM = ("binary", "multiclass", "multiclassova")
"""Training objectives of boosters whose raw scores are logits of classes."""


def adapted_lightgbm(booster: Any) -> Adapted:
    """Return a LightGBM booster that was trained to classify, wrapped as a model. Its raw scores are the logits of the
    classes.

    Raises `TargetError` for another objective.
    """
    text = str(booster.model_to_string())
    kind, *settings = header_of(text).get("objective", "").split() or [""]
    _refuse_objective(kind, _LIGHTGBM)
    classes = max(int(booster.num_model_per_iteration()), 2)
    slope = re.search(r"sigmoid:(\S+)", " ".join(settings))
    factor = 1.0 if slope is None else float(slope[1])
    interface = EstimatorInterface(
        "Booster",
        partial(_raw_scores, booster, factor),
        features=booster.num_feature(),
        dtype=np.float64,
        kind="logit",
        source=booster,
    )
    names = tuple(booster.feature_name())
    automatic = names == tuple(f"Column_{place}" for place in range(len(names)))
    adapted = as_model(interface, hashlib.sha256(text.encode()).hexdigest())
    return replace(adapted, classes=classes, feature_names=None if automatic else names)


def open_lightgbm(path: Path) -> tuple[Adapted, str]:
    """Return the LightGBM model in a `.txt` file wrapped as a torch module, and the SHA-256 of the file."""
    content, lightgbm = _tested(path, "LightGBM", "lightgbm", "lightgbm_files")
    try:
        booster = lightgbm.Booster(model_str=content.decode())
    except lightgbm.basic.LightGBMError as error:
        raise unreadable_lightgbm(path, str(error)) from error
    return adapted_lightgbm(booster), hashlib.sha256(content).hexdigest()


def _raw_scores(booster: Any, factor: float, rows: Array) -> Array:
    """Return the logits (n, classes) of the rows, or those (n,) of class 1."""
    return factor * np.asarray(booster.predict(rows, raw_score=True))


class TableEstimator(Estimator):
    """An estimator whose inputs are rows in the order of the rules of a table.

    If the table has categories, it is called with a pandas frame in which they have their values, as in training.
    """

    fitted_on: ClassVar[str] = "these features, and on all values of categories in the rules"

    def __init__(
        self, interface: EstimatorInterface, digest: str, rules: Rules, fitted: Sequence[str] | None
    ) -> None:
        super().__init__(interface, digest)
        self.rules = rules
        self.order = [rules.places[name] for name in fitted or rules.names]
        """position in the rules of each column that the estimator was fitted on"""

    def rows(self, x: Tensor) -> Array:
        """Return the inputs with the columns in the order in which the estimator was fitted."""
        return super().rows(x)[:, self.order]

    def _forms(self) -> tuple[Form, ...]:
        return ("frame",) if self.rules.categories else super()._forms()

    def _in_form(self, rows: Array, form: Form) -> Any:
        if form != "frame":
            return super()._in_form(rows, form)
        import pandas as pd

        columns = {}
        for values, place in zip(rows.T, self.order, strict=True):
            name = self.rules.names[place]
            categories = self.rules.categories.get(name)
            columns[name] = values if categories is None else _category(values, categories)
        return pd.DataFrame(columns, copy=False)

    def _compared(self, x: Tensor) -> Tensor:
        if not self.rules.categories:
            return super()._compared(x)
        # there is no midpoint of two categories; an attacker may state each value, and the estimator must know it
        stated = [x]
        for name, values in self.rules.categories.items():
            if self.rules.mutable(name):
                rows = x[:1].repeat(len(values), 1)
                rows[:, self.rules.places[name]] = torch.arange(len(values)).to(x)
                stated.append(rows)
        return torch.cat(stated)


def _category(codes: Array, values: Sequence[str]) -> Any:
    """Return the positions of values as a pandas category. Values that are numbers are numbers in the frame, too."""
    import pandas as pd

    whole = np.where(np.isnan(codes), -1, codes).astype(np.int64)
    return pd.Categorical.from_codes(whole, categories=_as_read(values))


def _as_read(values: Sequence[str]) -> list[Any]:
    """Return the values as pandas reads them from a file: as truth values, integers or floats if all are such."""
    if {*values} <= {"True", "False"}:
        return [value == "True" for value in values]
    for kind in (int, float):
        try:
            numbers = [kind(value) for value in values]
        except ValueError:
            continue
        if len({*numbers}) == len(numbers):
            return numbers
    return list(values)


def adapted_to_table(adapted: Adapted, rules: Rules) -> Adapted:
    """Return a model of another library that gets the rows of a table by its rules. Networks and functions do not
    change: they get the positions of categories.

    Raises `TargetError` if it was fitted on other columns.
    """
    net = adapted.net
    if not isinstance(net, Estimator) or isinstance(net, TableEstimator):
        return replace(adapted, feature_names=rules.names)
    if rules.categories and importlib.util.find_spec("pandas") is None:
        raise UsageError(
            f"the {net.name} gets categories in a frame of pandas, which is not installed; install it with pip install "
            "pandas"
        )
    fitted = adapted.feature_names
    if fitted is not None and {*fitted} != {*rules.names}:
        missing = [name for name in fitted if name not in rules.columns]
        extra = [name for name in rules.names if name not in fitted]
        raise TargetError(
            f"the {net.name} was fitted on {len(fitted)} columns, and the rules "
            + " and ".join(
                part
                for part in (
                    f"lack {', '.join(map(repr, missing[:6]))}" if missing else "",
                    f"have {', '.join(map(repr, extra[:6]))} beside them" if extra else "",
                )
                if part
            )
            + "; list the columns of the training"
        )
    table_net = TableEstimator(net.interface, net.digest, rules, fitted)
    return replace(adapted, net=table_net, feature_names=rules.names)
