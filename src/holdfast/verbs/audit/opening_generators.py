"""Opens what an audit of a generator or of a synthetic table needs: the generator or a file of its samples, its
training examples, and held-out ones.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from holdfast.attacks.parts.substitutes import network_for
from holdfast.audits.audit import AuditRequest, AuditStart, PreparedAudit
from holdfast.audits.generator.audit import (
    GeneratorAudit,
    measure,
    needs_of,
    parts_of,
    refuse_incomparable,
)
from holdfast.audits.generator.copies import TablePart
from holdfast.core.batch import UNLABELLED, Batch, Data
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import NoSplit, Placeholder, Remedy, UsageError
from holdfast.core.model import Bounds, Classifier
from holdfast.core.threat import ThreatModel
from holdfast.generators.networks import bundled_generators, names_generator, opened_generator
from holdfast.io.data.arrays import Arrays, selected_rows
from holdfast.io.data.layouts import layout_of_images
from holdfast.io.data.mixed_tables import MixedTables, TableFile, open_mixed
from holdfast.io.data.tables import SUFFIXES
from holdfast.io.models.factories import names_code, refuse_without_factory
from holdfast.io.models.generators import OpenedGenerator
from holdfast.io.models.models import bundled_models
from holdfast.recipes import Standard
from holdfast.recipes.training.fit import Training, drawing
from holdfast.rotation.collecting import last_of, rows_of
from holdfast.runs.engine.progress import Notify
from holdfast.settings.groups import DataSource
from holdfast.verbs.audit.generator import AuditGenerator
from holdfast.verbs.opening import resolve
from holdfast.verbs.opening.arguments import beside
from holdfast.verbs.opening.declared import expected_without_model, notes_of, refuse_other_range, unlabelled
from holdfast.verbs.opening.plans import device_of

_EPOCHS, _BATCH = 8, 128  # of the network that is trained for the features


@dataclass(frozen=True)
class _Source:
    name: str
    digest: str
    draw: Callable[[], Tensor]
    notes: tuple[str, ...]
    generator: OpenedGenerator | None = None


@contextmanager
def prepared_generator(settings: AuditGenerator, start: AuditStart) -> Iterator[PreparedAudit]:
    """Open the generator and the data of an audit, and yield it."""
    if settings.held_out is not None and (tables := tables_of(settings)) is not None:
        request, how = prepared_tables(settings, tables)
    else:
        request, how = opened_audit(settings, start.notify)
    yield PreparedAudit(request, lambda run: measure(run, how), needs_of(how, settings.gates))


def opened_audit(settings: AuditGenerator, notify: Notify) -> tuple[AuditRequest, GeneratorAudit]:
    """Open the generator and the data, and return the request and what the audit compares."""
    if settings.held_out is None:
        raise UsageError(
            "held_out is missing: copies are found by comparison with examples that the generator was not trained on",
            Remedy("held_out", Placeholder("DATA")),
        )
    subject = (
        None if settings.features is None else resolve.open_named(settings.features, settings, "features")
    )
    network = None if subject is None else subject.model.eval()
    training = _of_split(settings, "train", network)
    held_out = _opened(settings, beside(settings, settings.held_out), network, training)
    refuse_other_range(training, held_out)
    batch, source = training.read(0, len(training)), _source(settings, network, training)
    device, rng = torch.device(device_of(settings.device)), Draws(settings.seed)

    @cache
    def extractor() -> Classifier:
        if network is not None:
            return network.to(device)
        notify(f"training a small network on {len(batch):,} examples, whose features are compared")
        return trained_extractor(batch.to(device), Draws(settings.seed).at("features")).to(device)

    how = GeneratorAudit(
        _of_condition(batch, settings.condition),
        rows_of(
            _of_condition(held_out.read(0, len(held_out)), settings.condition),
            len(held_out),
            rng.at("held-out"),
        ),
        settings.samples,
        source.draw,
        extractor,
        device,
        rng.at("parts"),
        source.generator,
        parts_of(settings.latent, settings.condition),
    )
    refuse_incomparable(how)
    if network is None:
        _refuse_unlabelled(batch)
    about: dict[str, Any] = {"name": training.name, "digest": training.digest, "n": len(training)}
    about["held_out"] = {"name": held_out.name, "digest": held_out.digest, "n": len(held_out)}
    request = AuditRequest(
        "generator",
        {
            "samples": settings.samples,
            "features": None if subject is None else subject.card,
            "latent": settings.latent,
            "condition": settings.condition,
        },
        {"name": source.name, "digest": source.digest},
        about,
        how.steps,
        seed=settings.seed,
        device=str(device),
        notes=(*selection_notes(settings, len(training)), *notes_of(training, held_out), *source.notes),
    )
    return request, how


def refuse_condition(condition: int | None, name: str, classes: int | None) -> None:
    """Raise `UsageError` if the generator does not have the class."""
    if condition is None:
        return
    if classes is None:
        raise UsageError(
            f"condition is {condition}, and {name} is not a conditional generator with `classes`",
            Remedy("condition"),
        )
    if condition >= classes:
        raise UsageError(
            f"condition is {condition}, and {name} has {classes} classes; a class from 0 to {classes - 1} was expected"
        )


def _of_condition(data: Batch, condition: int | None) -> Batch:
    """The examples whose label is the condition, or all without one."""
    if condition is None:
        return data
    found = data.take(data.y == condition)
    if not len(found):
        raise UsageError(f"condition is {condition}, and no example of the data has this label")
    return found


def _opened(
    settings: AuditGenerator, source: DataSource, network: Classifier | None, first: Data | None = None
) -> Data:
    """Open examples whose labels may be missing, in the layout that the network of the features takes. The columns of a
    table are matched with those of the data `first`.
    """
    opened = partial(resolve.open_source, settings, source)
    if network is not None:
        properties = replace(unlabelled(settings, network, source, first), needs_labels=False)
        return opened(properties)
    properties = expected_without_model(settings, source, first)
    data = opened(properties)
    if not isinstance(data, Arrays) or data.reading.stored != "asis" or data.x.ndim not in (3, 4):
        return data
    return opened(replace(properties, layout=layout_of_images(data.x)))


def _of_split(settings: AuditGenerator, split: str, network: Classifier | None) -> Data:
    """Open the training examples: the split, or all examples if the data have one split only."""
    if isinstance(settings.data, str) and settings.split is None:
        with suppress(NoSplit):
            return _opened(settings, settings.model_copy(update={"split": split}), network)
    return _opened(settings, settings, network)


def _source(settings: AuditGenerator, network: Classifier | None, training: Data) -> _Source:
    """The generator, or the file of its samples."""
    given = settings.model
    if isinstance(given, str) and not (names_code(given) or names_generator(given)):
        refuse_without_factory(given)
        if given in bundled_models():
            raise UsageError(
                f"{given} is a bundled classifier, and a generator was expected; bundled generators are "
                f"{', '.join(bundled_generators())}"
            )
        refuse_condition(settings.condition, given, None)
        samples = _opened(settings, beside(settings, given), network, training)
        refuse_other_range(training, samples)
        # a random sample, because a file may be sorted by class
        everything = samples.read(0, len(samples))
        stored = rows_of(everything, settings.samples, Draws(settings.seed).at("samples"))
        return _Source(samples.name, samples.digest, lambda: stored.x, notes_of(samples))
    generator = opened_generator(given)
    refuse_condition(settings.condition, generator.name, generator.classes)
    draw = partial(generator.samples, settings.samples, settings.seed, settings.condition)
    return _Source(generator.name, generator.digest, draw, generator.notes(settings.seed), generator)


def _refuse_unlabelled(training: Batch) -> None:
    """Raise `UsageError` if the training examples have no labels."""
    if bool((training.y == UNLABELLED).any()):
        raise UsageError(
            "the training examples have no labels, with which a network for the features could be trained; give a "
            "network that was trained on such data, as in features=net.pt,arch=net.py:make"
        )


def trained_extractor(training: Batch, rng: Draws) -> Classifier:
    """Return a small network that is trained on examples and their labels."""
    with drawing(rng.at("begin")):
        net = network_for(training.example_shape, int(training.y.max()) + 1)
        net(training.x[:2].cpu())  # gives the lazy layer its size
    low, high = float(training.x.min()), float(training.x.max())
    recipe = Standard(training=Training(epochs=_EPOCHS, batch=_BATCH, weight_decay=0.0, averaging="none"))
    untrained = Classifier(net, bounds=Bounds(low, high)).to(training.x.device)
    return last_of(recipe, untrained, training, ThreatModel(Linf(0.0)), rng.at("training"))


_TRAINING, _SAMPLES, _HELD_OUT = range(3)


@dataclass(frozen=True)
class OpenedTables:
    """The training rows, the synthetic table and the held-out rows."""

    names: tuple[str, ...]
    tables: MixedTables

    def about(self, place: int) -> dict[str, Any]:
        """Return the name and the digest of a table."""
        rows, columns = self.tables.rows[place], repr(self.tables.columns).encode()
        content = hashlib.sha256(columns + rows.contiguous().numpy().tobytes()).hexdigest()
        return {"name": self.names[place], "digest": content}


def tables_of(settings: AuditGenerator) -> OpenedTables | None:
    """Return the tables of an audit, or None if the samples or the data are not tables, or if the features of a network
    are compared.
    """
    sources = (
        settings,
        beside(settings, settings.model),
        beside(settings, settings.held_out),
    )
    given = [source.data for source in sources]
    if settings.features is not None or settings.x is not None:
        return None
    if not all(isinstance(data, str) and data.endswith(SUFFIXES) for data in given):
        return None
    usual = ("train", None, "test")
    files = [_file(source, split) for source, split in zip(sources, usual, strict=True)]
    return OpenedTables(tuple(map(str, given)), open_mixed(files, settings.drop))


def _file(source: DataSource, usual: str | None) -> TableFile:
    return TableFile(Path(str(source.data)), source.split, usual, source.separator, source.header)


def prepared_tables(settings: AuditGenerator, opened: OpenedTables) -> tuple[AuditRequest, GeneratorAudit]:
    """Return the request of the audit of a synthetic table, and what it compares."""
    tables, rng = opened.tables.selected(_TRAINING, _chosen(settings, opened)), Draws(settings.seed)
    opened = replace(opened, tables=tables)
    training, samples, held_out = (_batch(x) for x in tables.encoded(_TRAINING))
    # a random sample, because a file may be sorted
    names = tuple(column.name for column in tables.columns)
    chosen = rows_of(samples, settings.samples, rng.at("samples"))
    others = rows_of(held_out, len(held_out), rng.at("held-out"))
    how = GeneratorAudit(
        training,
        others,
        settings.samples,
        lambda: chosen.x,
        None,
        torch.device("cpu"),
        rng.at("parts"),
        None,
        (TablePart(names, tables), *parts_of(settings.latent, settings.condition)),
        (tables.rows[_SAMPLES][chosen.ids], tables.rows[_TRAINING], tables.rows[_HELD_OUT][others.ids]),
    )
    refuse_incomparable(how)
    about = opened.about(_TRAINING) | {"n": len(training)}
    about["held_out"] = opened.about(_HELD_OUT) | {"n": len(held_out)}
    request = AuditRequest(
        "generator",
        {
            "samples": settings.samples,
            "features": None,
            "drop": list(settings.drop),
            "latent": settings.latent,
            "condition": settings.condition,
            "columns": list(names),
        },
        opened.about(_SAMPLES),
        about,
        how.steps,
        seed=settings.seed,
        notes=(*tables.notes, *selection_notes(settings, len(training))),
    )
    return request, how


def _chosen(settings: AuditGenerator, opened: OpenedTables) -> NDArray[np.int64]:
    """Return the numbers of the training rows that the settings select."""
    n_rows, name = len(opened.tables.rows[_TRAINING]), opened.names[_TRAINING]
    return selected_rows(n_rows, n=settings.n, sample=settings.sample, seed=settings.seed, name=name)


def selection_notes(settings: AuditGenerator, n: int) -> tuple[str, ...]:
    """Return the note on an audit that knows only `n` of the training examples."""
    if not settings.selects:
        return ()
    return (f"only {n:,} training examples were selected, and copies of the other ones are not found",)


def _batch(x: torch.Tensor) -> Batch:
    return Batch(x, torch.full((len(x),), UNLABELLED), torch.arange(len(x)))
