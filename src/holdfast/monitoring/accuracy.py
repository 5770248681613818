"""The accuracy on a stream, measured or expected from the confidence, and the reference of a monitor."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from holdfast.core.draws import Draws
from holdfast.core.estimate import Estimate
from holdfast.monitoring.signals import Array, Observed, Observer, Signals
from holdfast.statistics.intervals import CONFIDENCE, clopper_pearson, normal_quantile

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
        _cat([part.confidence for part in parts]),
        _cat([part.y for part in parts]),
        _cat([part.correct for part in parts]),
    )


def _cat(parts: Sequence[NDArray[Any] | None]) -> NDArray[Any] | None:
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
    half = normal_quantile((1 + CONFIDENCE) / 2) * deviation
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
