"""The reference of a monitor: its signals, the scales of each signal, and the predictions of the model on it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from holdfast.core.draws import Draws
from holdfast.monitoring.accuracy import Predictions
from holdfast.monitoring.signals import Observed, Observer, Signals

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
