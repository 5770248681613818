"""Opens what an audit of a generator needs: the generator or a file of its samples, its training examples, held-out
examples, and a network whose features are compared.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from holdfast.api import resolve
from holdfast.api.audit_tables import prepared_tables, selection_notes, tables_of
from holdfast.api.auditing.generator import AuditGenerator
from holdfast.api.expecting import first_table, normalisation, notes_of, refuse_other_range, unlabelled
from holdfast.api.plans import device_of
from holdfast.api.references import beside
from holdfast.attacks.parts.substitutes import network_for
from holdfast.audits.audit import AuditRequest, AuditStart, PreparedAudit
from holdfast.audits.generator.audit import (
    GeneratorAudit,
    measure,
    needs_of,
    parts_of,
    refuse_incomparable,
)
from holdfast.core.batch import UNLABELLED, Batch, Data
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import NoSplit, UsageError
from holdfast.core.model import Bounds, Classifier
from holdfast.core.remedies import Placeholder, Remedy
from holdfast.core.threat import ThreatModel
from holdfast.generators.opening import bundled_generators, names_generator, opened_generator
from holdfast.io.data.arrays import Arrays
from holdfast.io.data.layouts import Expected, layout_of_images
from holdfast.io.models.factories import names_code, refuse_without_factory
from holdfast.io.models.generators import OpenedGenerator
from holdfast.io.models.models import bundled_models
from holdfast.recipes import Standard
from holdfast.recipes.training.fit import Training, drawing
from holdfast.rotation.collecting import last_of, rows_of
from holdfast.runs.engine.progress import Notify
from holdfast.settings.groups import DataSource

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
        request, how = prepared_tables(settings, tables, start.command)
    else:
        request, how = opened_audit(settings, start.notify, start.command)
    yield PreparedAudit(request, lambda run: measure(run, how), needs_of(how, settings.gates))


def opened_audit(
    settings: AuditGenerator, notify: Notify, command: str
) -> tuple[AuditRequest, GeneratorAudit]:
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
        return (_trained(batch.to(device), settings, notify) if network is None else network).to(device)

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
        tuple(settings.gates),
        settings.seed,
        str(device),
        command,
        (*selection_notes(settings, len(training)), *notes_of(training, held_out), *source.notes),
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
    if isinstance(source, AuditGenerator):
        opened = partial(resolve.open_expected, source)
    else:
        opened = partial(resolve.open_beside, settings, source)
    if network is not None:
        properties = replace(unlabelled(settings, network, source, first), needs_labels=False)
        return opened(properties)
    properties = Expected(
        class_names=settings.class_names,
        class_order=settings.class_order,
        layout=source.layout,
        normalised=normalisation(settings),
        lenient=True,
        needs_labels=False,
        first=None if first is None else first_table(first),
    )
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


def _trained(training: Batch, settings: AuditGenerator, notify: Notify) -> Classifier:
    """Train the network whose features are compared, on the labels of the training examples."""
    notify(f"training a small network on {len(training):,} examples, whose features are compared")
    return trained_extractor(training, Draws(settings.seed).at("features"))


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
