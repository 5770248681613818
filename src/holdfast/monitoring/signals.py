"""Signals, the numbers of each example that the tests of a stream compare, and the accuracy on a stream with and
without labels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from holdfast.core.draws import Draws
from holdfast.core.estimate import Estimate
from holdfast.core.types import Inputs, Labels, Logits
from holdfast.statistics.intervals import CONFIDENCE as INTERVAL_CONFIDENCE
from holdfast.statistics.intervals import clopper_pearson, normal_quantile

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


_BINS = 10

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Predictions:
    """Predictions of a model on consecutive samples; each array has the shape (n,)."""

    confidence: Array | None
    """largest probability of a class; None without a model"""
    y: NDArray[np.int64] | None
    """classes of the samples; None if they are unknown"""
    correct: Bools | None
    """whether the predicted class is that of the sample; None without a model or the classes"""

    @classmethod
    def of(cls, samples: Observed) -> "Predictions":
        """Return the predictions of samples."""
        if samples.logits is None:
            return cls(None, None, None)
        best = samples.logits.detach().cpu().double().softmax(1).max(1)
        if samples.y is None:
            return cls(best.values.numpy(), None, None)
        y = samples.y.cpu()
        return cls(best.values.numpy(), y.numpy(), (best.indices == y).numpy())


def joined_predictions(parts: Sequence[Predictions]) -> Predictions:
    """Return the predictions on several batches, one after another."""
    return Predictions(
        _joined([part.confidence for part in parts]),
        _joined([part.y for part in parts]),
        _joined([part.correct for part in parts]),
    )


def _joined(parts: Sequence[NDArray[Any] | None]) -> NDArray[Any] | None:
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if known else None


@dataclass(frozen=True)
class ClassError:
    """Share of the samples of a class that are misclassified."""

    name: str
    error: Estimate


@dataclass(frozen=True)
class Accuracy:
    """Accuracy and calibration on samples with labels."""

    accuracy: Estimate
    calibration_error: float
    """mean difference of confidence and accuracy over ten bins of the confidence"""
    errors: tuple[ClassError, ...]
    """error of each class that occurs"""


def measured_accuracy(predictions: Predictions, names: Sequence[str] | None) -> Accuracy | None:
    """Return the accuracy on samples; None without a model or their classes."""
    confidence, y, correct = predictions.confidence, predictions.y, predictions.correct
    if confidence is None or y is None or correct is None:
        return None
    errors = tuple(
        ClassError(names[label] if names else str(label), _share(~correct[y == label]))
        for label in np.unique(y).tolist()
    )
    return Accuracy(_share(correct), _calibration_error(confidence, correct), errors)


def expected_accuracy(reference: Predictions, stream: Predictions) -> Estimate | None:
    """Return the accuracy that is expected on a stream without its labels, with an approximate 95 % interval for the
    accuracy of these samples if the confidence is as reliable as on the reference.

    The interval combines the binomial noise of the stream with that of the accuracy on the reference, on which the
    confidence is calibrated.

    Returns None without a model or labels of the reference.
    """
    if reference.confidence is None or reference.correct is None or stream.confidence is None:
        return None
    probabilities = isotonic(reference.confidence, reference.correct, stream.confidence)
    value, n = float(probabilities.mean()), len(probabilities)
    deviation = float(np.sqrt((probabilities * (1 - probabilities)).sum())) / n
    half = normal_quantile((1 + INTERVAL_CONFIDENCE) / 2) * deviation
    known = _share(reference.correct)
    low, high = np.hypot(half, known.value - known.low), np.hypot(half, known.high - known.value)
    return Estimate(value, max(value - float(low), 0.0), min(value + float(high), 1.0), n)


def isotonic(confidence: Array, correct: Bools, new: Array) -> Array:
    """Return the probabilities that predictions with the confidences `new` are correct, by the isotonic regression of
    correct predictions on the confidence. Equal confidences are one level, and adjacent levels whose means decrease are
    pooled.
    """
    levels, places = np.unique(confidence, return_inverse=True)
    n_of = np.bincount(places)
    blocks: list[tuple[float, int, int]] = []  # mean, number of samples and number of levels
    for right, n_samples in zip(np.bincount(places, correct).tolist(), n_of.tolist(), strict=True):
        mean, size, width = right / n_samples, n_samples, 1
        while blocks and blocks[-1][0] >= mean:
            before, n, n_levels = blocks.pop()
            mean, size, width = (mean * size + before * n) / (size + n), size + n, width + n_levels
        blocks.append((mean, size, width))
    fitted = np.repeat([mean for mean, _, _ in blocks], [width for _, _, width in blocks])
    return np.asarray(np.interp(new, levels, fitted))


def _share(mask: Bools) -> Estimate:
    """Share of samples for which `mask` is true, with its interval."""
    k, n = int(mask.sum()), len(mask)
    return Estimate(k / n, *clopper_pearson(k, n), n)


def _calibration_error(confidence: Array, correct: Bools) -> float:
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    sums = np.zeros(_BINS)
    np.add.at(sums, bins, confidence - correct)
    return float(np.abs(sums).sum() / len(confidence))


_FITTED_SHARE = 4
"""One of so many samples of the reference is used to estimate scales, and the others are compared."""
FEWEST = 134
"""Smallest number of samples of the reference: without those for the scales, 100 remain."""


@dataclass(frozen=True)
class Reference:
    """What a stream is compared with."""

    name: str
    n: int
    shape: Sequence[int]
    """shape of one sample"""
    observer: Observer
    signals: Signals
    """signals of the samples that were not used for the scales"""
    predictions: Predictions
    """of all samples"""
    class_names: Sequence[str] | None = None
    model: str | None = None
    """name of the model; None if only the inputs are compared"""
    layer: str | None = None
    """name of the layer of the embeddings; None without embeddings"""
    n_features: int = 0
    """number of features of an embedding"""
    notes: tuple[str, ...] = ()
    """notes on the samples and on how requests are compared with them"""

    @classmethod
    def of(
        cls,
        seen: Observed,
        rng: Draws,
        name: str,
        class_names: Sequence[str] | None,
        model: str | None,
        *,
        errors: bool = False,
        features: Sequence[str] | None = None,
        missing: bool = False,
        layer: str | None = None,
        observer: Observer | None = None,
        notes: tuple[str, ...] = (),
    ) -> "Reference":
        """Return the reference of samples. `errors` states whether it is a signal if the model is wrong, which needs
        the labels of each sample of the stream. `features` and `missing` are those of `Observer.fitted`. `layer` is the
        source of the embeddings. With `observer`, its scales are used and none are estimated.
        """
        order = rng.at("reference").uniform(torch.arange(len(seen.x)), dtype=torch.float64).argsort()
        fit, rest = order.tensor_split([len(order) // _FITTED_SHARE])
        samples = seen if errors else replace(seen, y=None)
        observer = observer or Observer.fitted(
            samples.take(fit), rng.at("projections"), features=features, missing=missing
        )
        return cls(
            name,
            len(seen.x),
            seen.x.shape[1:],
            observer,
            observer(samples.take(rest)),
            Predictions.of(seen),
            class_names,
            model,
            layer,
            0 if seen.features is None else seen.features.shape[1],
            notes,
        )
