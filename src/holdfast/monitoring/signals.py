"""Signals: the numbers of each sample that the tests of a stream compare with those of a reference.

A view is a group of columns: the inputs, the embeddings (features of an inner layer) and the predictions (probabilities
of the classes). A view with more than 32 features is reduced to their mean, their standard deviation and 16 random
projections. These do not depend on the data, so that reference and stream remain exchangeable. Rabanser, Günnemann &
Lipton, "Failing loudly: an empirical study of methods for detecting dataset shift", NeurIPS 2019, arXiv:1810.11953,
compare such reductions. A series is a single column: the distance of the input, the share of its missing values, the
confidence, and the error. In the other columns, missing values are replaced by the means of the reference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from holdfast.core.draws import Draws
from holdfast.core.types import Inputs, Labels, Logits

Array = NDArray[np.float64]

FEATURES = 32
"""Largest number of features of a view that are compared one by one."""
PROJECTIONS = 16
"""Number of random projections of a view with more features."""
DISTANCE, MISSING, CONFIDENCE, ERROR = "distance", "missing values", "confidence", "error"
"""Names of the series: distance of the input from the centre of the reference, share of its values that are missing,
largest probability of a class, and whether the predicted class is wrong."""
INPUTS, EMBEDDINGS, PREDICTIONS = "inputs", "embeddings", "predictions"
"""Names of the views."""


@dataclass(frozen=True)
class Observed:
    """Consecutive samples with what a model returned for them."""

    x: Inputs
    """inputs (n, *features)"""
    logits: Logits | None = None
    """outputs of the model (n, classes); None without a model"""
    features: Tensor | None = None
    """outputs of an inner layer (n, d); None if there are none"""
    y: Labels | None = None
    """classes (n,); None if they are unknown"""

    def take(self, rows: Tensor) -> "Observed":
        """Return some of the samples."""
        parts = (self.logits, self.features, self.y)
        return Observed(self.x[rows], *(None if part is None else part[rows] for part in parts))


def joined_samples(parts: Sequence[Observed]) -> Observed:
    """Return the samples of several batches, one after another."""
    return Observed(
        torch.cat([part.x for part in parts]),
        _cat([part.logits for part in parts]),
        _cat([part.features for part in parts]),
        _cat([part.y for part in parts]),
    )


def _cat(parts: Sequence[Tensor | None]) -> Tensor | None:
    known = [part for part in parts if part is not None]
    return torch.cat(known) if known else None


@dataclass(frozen=True)
class Signals:
    """Signals of consecutive samples, in standard deviations of the reference. The first columns are series."""

    names: tuple[str, ...]
    """name of each column"""
    values: Array
    """signals (n, columns)"""
    views: Mapping[str, slice]
    """columns of each view by its name"""

    def __len__(self) -> int:
        return len(self.values)

    @property
    def n_series(self) -> int:
        """Number of columns that are series."""
        return min((columns.start or 0 for columns in self.views.values()), default=len(self.names))

    def at(self, rows: "slice | NDArray[np.int64]") -> "Signals":
        """Return the signals of some of the samples."""
        return Signals(self.names, self.values[rows], self.views)

    def view_of(self, column: int) -> str:
        """Return the name of the view to which a column belongs, or its own name if it is a series."""
        views = (name for name, columns in self.views.items() if columns.start <= column < columns.stop)
        return next(views, self.names[column])

    def only(self, columns: slice, *views: str) -> "Signals":
        """Return the signals of some columns, which are a view if its name is given, and else series."""
        values = self.values[:, columns]
        return Signals(self.names[columns], values, {view: slice(values.shape[1]) for view in views})


def joined(parts: Sequence[Signals]) -> Signals:
    """Return the signals of several batches, one after another."""
    return Signals(parts[0].names, np.concatenate([part.values for part in parts]), parts[0].views)


@dataclass(frozen=True)
class InputColumns:
    """How the values of inputs are named and filled."""

    means: Array
    """value (features) in place of missing values: the mean of the others in the reference"""
    features: Sequence[str] | None
    """name of each feature; None if they have none"""
    missing: bool
    """whether the share of missing values is a signal"""

    def rows(self, x: Inputs) -> Array:
        """Return the values (n, features) of inputs without missing ones."""
        rows = flat(x)
        return np.where(np.isnan(rows), self.means, rows)

    def name(self, feature: int) -> str:
        """Return the name of a feature in signals."""
        return f"feature {feature}" if self.features is None else self.features[feature]


def means(x: Inputs) -> Array:
    """Return the mean (features) of the values of each feature that are not missing; 0 if all are."""
    rows = flat(x)
    present = ~np.isnan(rows)
    mean: Array = np.where(present, rows, 0.0).sum(0) / present.sum(0).clip(1)
    return mean


def flat(part: Tensor) -> Array:
    """Return the values (n, d) of a tensor (n, ...)."""
    rows: Array = part.detach().cpu().double().flatten(1).numpy()
    return rows


@dataclass(frozen=True)
class Observer:
    """Function from samples to their signals. The centre and the scale of each column were estimated on a part of the
    reference with which the stream is not compared.
    """

    projections: Mapping[str, Array]
    """random projections (16, features) of each view with more than 32 features"""
    centre: Array
    scale: Array
    distance: tuple[float, float]
    """mean and standard deviation of the distance"""
    inputs: InputColumns

    @classmethod
    def fitted(
        cls, fit: Observed, rng: Draws, *, features: Sequence[str] | None = None, missing: bool = False
    ) -> "Observer":
        """Return an observer whose scales are those of the samples `fit`. `features` are the names of their features,
        and `missing` states whether values may be missing, so that their share is a signal.
        """
        inputs = InputColumns(means(fit.x), features, missing)
        projections = {
            name: rng.at(name).normal(torch.arange(PROJECTIONS), rows.shape[1], dtype=torch.float64).numpy()
            for name, rows in _rows(fit, inputs).items()
            if rows.shape[1] > FEATURES
        }
        _, values, views = _columns(fit, projections, inputs)
        scale = values.std(0)
        scale[scale == 0] = 1.0
        centre = values.mean(0)
        distance = _distance((values - centre) / scale, views)
        return cls(projections, centre, scale, (float(distance.mean()), float(distance.std()) or 1.0), inputs)

    def __call__(self, samples: Observed) -> Signals:
        """Return the signals of samples."""
        names, values, views = _columns(samples, self.projections, self.inputs)
        scaled = (values - self.centre) / self.scale
        distance = (_distance(scaled, views) - self.distance[0]) / self.distance[1]
        moved = {name: slice(columns.start + 1, columns.stop + 1) for name, columns in views.items()}
        return Signals((DISTANCE, *names), np.column_stack([distance, scaled]), moved)


def _distance(scaled: Array, views: Mapping[str, slice]) -> Array:
    """Root mean square (n,) of the scaled columns of the inputs."""
    distance: Array = np.sqrt((scaled[:, views[INPUTS]] ** 2).mean(1))
    return distance


def _rows(samples: Observed, inputs: InputColumns) -> dict[str, Array]:
    """The features (n, d) of each view."""
    rows = {INPUTS: inputs.rows(samples.x)}
    if samples.features is not None:
        rows[EMBEDDINGS] = flat(samples.features)
    if samples.logits is not None:
        rows[PREDICTIONS] = flat(samples.logits.double().softmax(1))
    return rows


def _columns(
    samples: Observed, projections: Mapping[str, Array], inputs: InputColumns
) -> tuple[tuple[str, ...], Array, dict[str, slice]]:
    """Names and values of all columns but the distance, and the columns of each view."""
    names, parts, views = [], [], {}
    if inputs.missing:
        names.append(MISSING)
        parts.append(np.isnan(flat(samples.x)).mean(1))
    if samples.logits is not None:
        probabilities = samples.logits.detach().cpu().double().softmax(1)
        names.append(CONFIDENCE)
        parts.append(probabilities.max(1).values.numpy())
        if samples.y is not None:
            names.append(ERROR)
            parts.append((probabilities.argmax(1) != samples.y.cpu()).double().numpy())
    for view, rows in _rows(samples, inputs).items():
        start = len(names)
        if view in projections:
            projected = rows @ projections[view].T
            parts += [rows.mean(1), rows.std(1), *projected.T]
            names += [f"{view}: mean", f"{view}: deviation"]
            names += [f"{view}: projection {k}" for k in range(len(projections[view]))]
        else:
            parts += list(rows.T)
            word = "class" if view == PREDICTIONS else "feature"
            own = [inputs.name(k) if view == INPUTS else f"{word} {k}" for k in range(rows.shape[1])]
            names += [f"{view}: {name}" for name in own]
        views[view] = slice(start, len(names))
    return tuple(names), np.column_stack(parts), views
