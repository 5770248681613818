"""Opens the network and the data of `holdfast audit poison`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from holdfast.api.auditing.poison import AuditPoison
from holdfast.api.expecting import expected, notes_of
from holdfast.api.plans import device_of
from holdfast.api.references import beside
from holdfast.api.resolve import open_beside, open_seeded, open_training_examples, random_instead
from holdfast.audits.audit import AuditRequest, AuditStart, PreparedAudit
from holdfast.audits.finding import Images, StoredSteps
from holdfast.audits.poison.audit import (
    EPOCHS,
    PoisonRequest,
    Train,
    measure,
    refuse_unscorable,
    scored,
    with_trusted,
)
from holdfast.audits.poison.conclusion import images_of, write_suspects
from holdfast.core.batch import Batch
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.needs import Need
from holdfast.core.threat import ThreatModel
from holdfast.recipes import Standard
from holdfast.recipes.training.fit import Training
from holdfast.reports.write import refuse_unwritable
from holdfast.rotation.collecting import last_of, with_fresh_weights
from holdfast.runs.assess.preparation import readied
from holdfast.runs.engine.run import Run
from holdfast.runs.harden.attempt_training import refuse_untrainable

_BATCH, _SMALLEST_BATCH, _UPDATES = 128, 8, 50
"""Largest and smallest batch size, and the number of updates of an epoch that a small set has if possible."""


@contextmanager
def prepared_poison(settings: AuditPoison, start: AuditStart) -> Iterator[PreparedAudit]:
    """Open the model and the data of an audit, and yield it."""
    subject = open_seeded(settings)
    model = subject.model
    refuse_untrainable(model)
    data, split_notes = open_training_examples(settings, model)
    batch = data.read(0, len(data))
    refuse_unscorable(batch, *random_instead(settings))
    request, compared, notes = PoisonRequest(batch, 0, settings.seed), {}, [*subject.notes, *split_notes]
    if settings.clean is not None:
        source = beside(settings, settings.clean)
        clean = open_beside(settings, source, expected(settings, model, source, first=data))
        notes += notes_of(clean)
        request = with_trusted(batch, clean.read(0, len(clean)), *random_instead(settings))
        request = replace(request, seed=settings.seed)
        compared = {"clean": {"name": clean.name, "digest": clean.digest, "n": len(clean)}}
        if request.n < len(batch):
            notes.append(f"{len(batch) - request.n} examples are among the trusted ones, and were left out")
    device = torch.device(device_of(settings.device))
    request = replace(request, batch=request.batch.to(device))

    def audit(run: Run) -> Images:
        with readied(subject, data, device):
            measure(run, request, training(model), start.notify)
        result = scored(StoredSteps(about.manifest(), run.store))
        if settings.suspects is not None:
            write_suspects(Path(settings.suspects), result, model.class_names)
        return lambda: images_of(request.batch, result, model.bounds)

    about = AuditRequest(
        "poison",
        {"epochs": EPOCHS, "class_names": None if model.class_names is None else list(model.class_names)},
        {**subject.card, "digest": subject.digest},
        {"name": data.name, "digest": data.digest, "n": len(data), **compared},
        request.steps(),
        seed=settings.seed,
        device=str(device),
        notes=notes,
        writes=settings.suspects is not None,
    )
    suspects = settings.suspects
    needs = () if suspects is None else (Need("suspects", partial(refuse_unwritable, Path(suspects))),)
    yield PreparedAudit(about, audit, needs)


def training(model: Classifier) -> Train:
    """Return the function that trains a copy of a network with fresh weights."""

    def train(batch: Batch, rng: Draws) -> Classifier:
        size = min(_BATCH, max(_SMALLEST_BATCH, len(batch) // _UPDATES))
        recipe = Standard(training=Training(epochs=EPOCHS, batch=size, weight_decay=0.0, averaging="none"))
        initial = with_fresh_weights(model, rng.at("begin"), "own")
        return last_of(recipe, initial, batch, ThreatModel(Linf(0.0)), rng.at("training"))

    return train
