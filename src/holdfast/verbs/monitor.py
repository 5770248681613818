"""Opens a model, a reference and a recorded stream, and compares them: the function behind `holdfast monitor`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from holdfast.core.batch import UNLABELLED, Batch, Data
from holdfast.core.catalogue import SAMPLE_TESTS
from holdfast.core.draws import Draws
from holdfast.core.errors import REFERENCE, Remedy, TargetError, UsageError
from holdfast.guard.detectors.outputs import features_of, layer_before_last_linear
from holdfast.io.data.columns import in_order_of_first
from holdfast.io.data.layouts import DeclaredData
from holdfast.io.data.pictures import Pictures, holds_samples, open_samples
from holdfast.io.remote.probing import ProbedClassifier
from holdfast.monitoring.signals import (
    FEWEST,
    Observed,
    Observer,
    Predictions,
    Reference,
    Signals,
    expected_accuracy,
    joined_predictions,
    joined_samples,
    means,
    measured_accuracy,
)
from holdfast.monitoring.watching import Monitored, Source, test_of, watch
from holdfast.reports.words import percent
from holdfast.runs.assess.preparation import readied
from holdfast.runs.assess.request import DescribedModel
from holdfast.runs.harness.target import PreparedModel
from holdfast.settings.groups import DataSource
from holdfast.verbs.opening.arguments import beside, gradients
from holdfast.verbs.opening.declared import expected, expected_without_model, first_table, notes_of
from holdfast.verbs.opening.plans import device_of
from holdfast.verbs.opening.resolve import open_named, open_source, open_subject
from holdfast.verbs.settings import Monitor

_BATCH = 256
"""Number of samples in one forward pass."""
_LISTED = 6
"""Largest number of features that a note lists."""


@gradients()
def monitored(settings: Monitor) -> Monitored:
    """Compare the stream of the settings with the reference, and return what the tests found."""
    if _samples_of(settings) is not None:
        settings = settings.model_copy(update={"generated": True})
    subject, reference, stream = opened_streams(settings)
    fill = _fill(subject, reference, stream)
    with _watched(settings, subject, reference, fill) as watched:
        return _compared(settings, watched, reference, stream)


def _samples_of(settings: Monitor) -> Path | None:
    """Return the folder of generated samples if the stream is one."""
    folder = Path(settings.data) if isinstance(settings.data, str) else None
    return folder if folder is not None and holds_samples(folder) else None


def opened_streams(settings: Monitor) -> tuple[DescribedModel | None, Data, Data]:
    """Open the model if there is one, the reference and the stream."""
    if settings.reference is None:
        raise UsageError(
            "reference is missing; give examples like those that the model should receive, which it was not trained on",
            REFERENCE,
        )
    _refuse_mixed(settings)
    subject = None if settings.model is None else open_subject(settings)
    if settings.features is not None:
        subject = open_named(settings.features, settings, "features")
    if subject is not None and subject.model.rejects:
        raise UsageError("the model has a detector of its own; monitor the network inside")
    reference = _open(settings, beside(settings, settings.reference), subject)
    folder = _samples_of(settings)
    stream: Data
    if folder is None:
        stream = _open(settings, settings, subject, reference)
    else:
        stream = open_samples(folder, follow_links=settings.follow_links)
    _refuse_data(settings, reference, stream)
    return subject, reference, stream


def _refuse_mixed(settings: Monitor) -> None:
    """Raise `UsageError` for a model of generated samples, and for features of other streams."""
    if settings.generated and settings.model is not None:
        raise UsageError(
            f"the stream consists of generated samples, which have no labels, and model is {settings.model}; to "
            "compare its features, give it as features",
            Remedy("model"),
        )
    if settings.features is not None and not settings.generated:
        raise UsageError(
            f"features is {settings.features}, which is for generated samples; give the network of another stream as "
            "model",
            Remedy("generated", True),
        )


def live_reference(settings: Monitor, *, observer: Observer | None = None) -> Reference:
    """Return the reference of the requests to a server, with the predictions and embeddings of the model if one is
    given. With `observer`, that of an earlier model, whose scales are used again.
    """
    subject = None if settings.model is None else open_subject(settings)
    assert settings.reference is not None
    reference = _open(settings, beside(settings, settings.reference), subject)
    _refuse_short(reference)
    request = in_order_of_first(
        "the input of a request", DeclaredData(first=first_table(reference)), reference.read(0, 1).x.shape[1:]
    )
    notes = (*notes_of(reference), *request)
    labelled = subject is not None and int(reference.read(0, 1).y[0]) != UNLABELLED
    rng = Draws(settings.seed).at("monitor")
    fill = _fill(subject, reference)
    with _watched(settings, subject, reference, fill) as watched:
        seen, layer = joined_samples(list(watched.observed(reference, labelled=labelled))), watched.layer
    if seen.features is not None and len(seen.features) != len(
        seen.x
    ):  # the network calls itself several times
        seen, layer = replace(seen, features=None), None
    return Reference.of(
        seen,
        rng,
        reference.name,
        None if subject is None else subject.model.class_names,
        None if subject is None else str(subject.card["name"]),
        features=_feature_names(subject, reference),
        missing=bool(_missing(reference).any()),
        layer=layer,
        observer=observer,
        notes=(*notes, *_fill_notes(fill)),
    )


def _open(
    settings: Monitor, source: DataSource, subject: DescribedModel | None, first: Data | None = None
) -> Data:
    """Open a stream or a reference, whose labels may be missing. The columns of a table are matched with those of the
    data `first`.
    """
    if subject is not None:
        properties = expected(settings, subject.model, source, first=first)
    else:
        properties = expected_without_model(settings, source, first)
    properties = replace(properties, needs_labels=False, has_threat=False, accepts_missing=True)
    return open_source(settings, source, properties)


def _refuse_data(settings: Monitor, reference: Data, stream: Data) -> None:
    """Raise `UsageError` for data that cannot be compared."""
    if isinstance(stream, Pictures) and stream.classes:
        raise UsageError(
            f"the stream {stream.name} is a folder, which is read class by class and not in the order of time; save "
            "the images in their order as the array x of an .npz file"
        )
    if len(reference) == len(stream) and reference.digest == stream.digest:
        raise UsageError(
            f"the stream {stream.name} has the same samples as the reference {reference.name}; samples that were "
            "recorded later were expected as the stream",
            REFERENCE,
        )
    shapes = [tuple(data.read(0, 1).x.shape[1:]) for data in (reference, stream)]
    if _without_ones(shapes[0]) != _without_ones(
        shapes[1]
    ):  # without a model, grey images may have no channels
        raise UsageError(
            f"inputs of the reference {reference.name} have shape {shapes[0]}, and those of the stream {stream.name} "
            f"have shape {shapes[1]}; inputs of the same shape were expected"
        )
    _refuse_short(reference)
    for name in settings.alarm:
        if len(stream) < (fewest := test_of(name).fewest):
            raise UsageError(
                f"the test {name} needs {fewest} samples, and the stream {stream.name} has {len(stream)}",
                Remedy("alarm", "martingale", reason=", which needs one"),
            )


def _refuse_short(reference: Data) -> None:
    if len(reference) < FEWEST:
        raise UsageError(
            f"the reference {reference.name} has {len(reference)} samples; at least {FEWEST} are needed",
            REFERENCE,
        )


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _batches(data: Data) -> Iterator[Batch]:
    for start in range(0, len(data), _BATCH):
        yield data.read(start, min(start + _BATCH, len(data)))


def _missing(data: Data) -> NDArray[np.float64]:
    """Return the share of missing values of each feature of the samples."""
    counts = torch.zeros(data.read(0, 1).x.numel(), dtype=torch.float64)
    for batch in (
        () if isinstance(data, Pictures) else _batches(data)
    ):  # pictures have none, and take long to read
        counts += batch.x.flatten(1).isnan().sum(0)
    return counts.numpy() / len(data)


def _fill(subject: DescribedModel | None, reference: Data, *others: Data) -> Tensor | None:
    """Return the values of a sample with which the model is called in place of missing ones: the means of the
    reference. None if none are missing, or if the model has finite outputs for all samples with missing values.
    """
    if subject is None:
        return None
    probe = ProbedClassifier(subject.model)
    for data in (reference, *others):
        for batch in () if isinstance(data, Pictures) else _batches(data):
            x = batch.x[batch.x.flatten(1).isnan().any(1)]
            if len(x) and not probe.handles_missing(x):
                everything = reference.read(0, len(reference)).x
                return torch.from_numpy(means(everything)).to(everything).view(everything.shape[1:])
    return None


def _fill_notes(fill: Tensor | None) -> tuple[str, ...]:
    note = (
        "the model has no finite output for samples with missing values, and was called with the means of the "
        "reference in their place"
    )
    return () if fill is None else (note,)


def _feature_names(subject: DescribedModel | None, reference: Data) -> tuple[str, ...] | None:
    """Return the names of the features of the samples, those of the model if the data have none."""
    table = first_table(reference)
    fitted = None if subject is None else subject.model.feature_names
    names = table.columns if table.named else fitted
    shape = reference.read(0, 1).x.shape[1:]
    return names if names is not None and tuple(shape) == (len(names),) else None


@dataclass(frozen=True)
class _Filled:
    """A data set with the values `fill` in place of missing ones."""

    whole: Data
    fill: Tensor

    @property
    def name(self) -> str:
        return self.whole.name

    @property
    def classes(self) -> tuple[str, ...] | None:
        return self.whole.classes

    @property
    def digest(self) -> str:
        return self.whole.digest

    def __len__(self) -> int:
        return len(self.whole)

    def read(self, start: int, stop: int) -> Batch:
        batch = self.whole.read(start, stop)
        return batch.at(torch.where(batch.x.isnan(), self.fill, batch.x))


@dataclass(frozen=True)
class _Watched:
    """A prepared model, and functions that read data with what it returns."""

    subject: DescribedModel | None = None
    target: PreparedModel | None = None
    layer: str | None = None
    features: Callable[[], Tensor] | None = None
    fill: Tensor | None = None
    """values in place of missing ones, with which the model is called; None if it accepts missing values"""
    device: torch.device = torch.device("cpu")
    ignores_labels: bool = False
    """whether labels are not used, because samples of a generator have none"""

    def observed(self, data: Data, *, labelled: bool) -> Iterator[Observed]:
        """Yield the samples of the data in batches, with the outputs of the model."""
        for batch in _batches(data):
            other = (batch.y == UNLABELLED) == labelled
            if self.subject is not None and not self.ignores_labels and other.any():
                raise TargetError(
                    f"row {int(batch.ids[other][0])} of {data.name} has {'no' if labelled else 'a'} label, unlike the "
                    "first row; label all rows, or give the inputs without labels"
                )
            x = batch.x if self.fill is None else torch.where(batch.x.isnan(), self.fill, batch.x)
            logits = None if self.target is None else self.target.logits(x.to(self.device)).cpu()
            features = None if self.features is None else self.features().cpu()
            yield Observed(batch.x, logits, features, batch.y if labelled else None)


@contextmanager
def _watched(
    settings: Monitor, subject: DescribedModel | None, reference: Data, fill: Tensor | None
) -> Iterator[_Watched]:
    """Context manager that prepares the model, and yields it with the layer of its embeddings."""
    if subject is None:
        yield _Watched()
        return
    device = torch.device(device_of(settings.device))
    inspected = reference if fill is None else _Filled(reference, fill)
    with readied(subject, inspected, device) as (target, _):
        watched = _Watched(subject, target, fill=fill, device=device, ignores_labels=settings.generated)
        layer = settings.layer or layer_before_last_linear(target.original.net)
        if layer is None:
            yield watched
            return
        with features_of(target.original.net, layer) as features:
            yield replace(watched, layer=layer, features=features)


def _compared(settings: Monitor, watched: _Watched, reference: Data, stream: Data) -> Monitored:
    known = [
        watched.subject is not None and not settings.generated and int(data.read(0, 1).y[0]) != UNLABELLED
        for data in (reference, stream)
    ]
    seen = joined_samples(list(watched.observed(reference, labelled=known[0])))
    names = None if watched.subject is None else watched.subject.model.class_names
    about = None if watched.subject is None else str(watched.subject.card["name"])
    rng = Draws(settings.seed).at("monitor")
    features, missing = _feature_names(watched.subject, reference), [_missing(reference), _missing(stream)]
    compared = Reference.of(
        seen,
        rng,
        reference.name,
        names,
        about,
        errors=all(known),
        features=features,
        missing=any(shares.any() for shares in missing),
    )
    predictions: list[Predictions] = []
    counted = None
    if settings.generated:
        from holdfast.monitoring.stream_tests import (
            SampleTests,  # late: few streams are samples of a generator
        )

        counted = SampleTests(_complete(seen.x, compared), rng.at("samples"))

    def signals() -> Iterator[Signals]:
        for samples in watched.observed(stream, labelled=known[1]):
            predictions.append(Predictions.of(samples))
            if counted is not None:
                counted.update(_complete(samples.x, compared))
            yield compared.observer(samples if all(known) else replace(samples, y=None))

    results = watch(compared.signals, signals(), settings.seed)
    of_stream, of_reference = joined_predictions(predictions), compared.predictions
    return Monitored(
        Source(stream.name, len(stream), known[1]),
        Source(reference.name, len(reference), known[0]),
        about,
        watched.layer,
        (*settings.alarm, *(SAMPLE_TESTS if counted else ())),
        (*results, *(counted.results() if counted else ())),
        measured_accuracy(of_stream, names),
        measured_accuracy(of_reference, names),
        expected_accuracy(of_reference, of_stream),
        (
            *dict.fromkeys(notes_of(reference, stream)),
            *_missing_notes(missing[0], missing[1], features),
            *_fill_notes(watched.fill),
        ),
    )


def _complete(x: Tensor, reference: Reference) -> Tensor:
    """Return samples with the means of the reference in place of missing values."""
    return torch.from_numpy(reference.observer.inputs.rows(x)).to(x).view(x.shape) if x.isnan().any() else x


def _missing_notes(
    reference: NDArray[np.float64], stream: NDArray[np.float64], names: Sequence[str] | None
) -> tuple[str, ...]:
    """Return the note on the features with missing values, those with the largest change first."""
    order = (-np.abs(stream - reference)).argsort(kind="stable")
    shares = [
        f"{f'feature {k}' if names is None else names[k]} {percent(reference[k])} and {percent(stream[k])}"
        for k in order.tolist()
        if reference[k] or stream[k]
    ]
    more = f", and {len(shares) - _LISTED} more features" if len(shares) > _LISTED else ""
    listed = ", ".join(shares[:_LISTED])
    return (f"missing values in the reference and in the stream: {listed}{more}",) if shares else ()
