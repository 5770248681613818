"""Wraps estimators of tables by the rules of the table: they get the columns and the categories of their training."""

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from holdfast.core.errors import TargetError, UsageError
from holdfast.io.models.estimators import Adapted, Array, Estimator, EstimatorInterface, Form
from holdfast.threats.tables.rules import Rules


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
