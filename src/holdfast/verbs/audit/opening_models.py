"""Opens the model, the data and the controls of `holdfast audit backdoor`, and the network and the data of `holdfast
audit poison`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from holdfast.audits.audit import AuditRequest, AuditStart, PreparedAudit
from holdfast.audits.backdoor import CLEAN, BackdoorRequest, images_of, measure, refuse_other_shape, suspect
from holdfast.audits.backdoor_controls import Controls, ControlTraining, SizeCache
from holdfast.audits.backdoor_triggers import STRIP, measured, refuse_one_class
from holdfast.audits.finding import Images, StoredSteps
from holdfast.audits.poison import images_of as poison_images
from holdfast.audits.poison import write_suspects
from holdfast.audits.poison_steps import EPOCHS, PoisonRequest, Train, refuse_unscorable, scored, with_trusted
from holdfast.audits.poison_steps import measure as measure_poison
from holdfast.core.batch import Batch, Data
from holdfast.core.chain import canonical, digest
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import Need, Remedy, UsageError
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.training import Checkpoint
from holdfast.io.data.npz import write_trigger
from holdfast.io.data_catalogue import cache_folder
from holdfast.recipes import Standard
from holdfast.recipes.training.fit import Training
from holdfast.reports.write import refuse_unwritable
from holdfast.rotation.collecting import last_of, with_fresh_weights
from holdfast.runs.assess.preparation import readied
from holdfast.runs.engine.identity import code_digest
from holdfast.runs.engine.run import Run
from holdfast.runs.harden.attempt_training import refuse_untrainable
from holdfast.settings.grammar import seconds
from holdfast.settings.groups import ExampleSelection
from holdfast.verbs.audit.backdoor import AuditBackdoor
from holdfast.verbs.audit.poison import AuditPoison
from holdfast.verbs.opening.arguments import beside
from holdfast.verbs.opening.declared import ends, expected, notes_of, refuse_other_range
from holdfast.verbs.opening.plans import device_of
from holdfast.verbs.opening.resolve import (
    open_beside,
    open_examples,
    open_seeded,
    open_train_split,
    open_training_examples,
    random_instead,
    selection_or,
)
from holdfast.verbs.settings import AuditVerb

_CONTROL = Standard(
    training=Training(epochs=100_000, lr=1e-3, weight_decay=0.0, schedule="flat", averaging="none")
)
"""Training of a control: Adam on the cross-entropy with a constant learning rate, which does not depend on the number
of epochs. The audit ends it."""


@contextmanager
def prepared_backdoor(settings: AuditBackdoor, start: AuditStart) -> Iterator[PreparedAudit]:
    """Open the model and the data of an audit, and yield it."""
    if settings.controls is not None and settings.train_controls is not None:
        raise UsageError("give controls, or train_controls, and not both", Remedy("train_controls"))
    subject = open_seeded(settings)
    model = subject.model
    if model.rejects:
        raise UsageError("the model has a detector of its own; audit the network inside")
    refuse_untrainable(model)
    data = open_examples(settings, model, selection=selection_or(settings, ExampleSelection(sample=CLEAN)))
    stream = None if settings.stream is None else _stream(settings, model, data)
    if stream is not None:
        refuse_other_range(data, stream)
    device = torch.device(device_of(settings.device))
    batch = data.read(0, len(data))
    refuse_one_class(batch.y, *random_instead(settings))
    with readied(subject, data, device) as (target, _):
        request = BackdoorRequest(batch.to(device), target.classes, stream=stream, seed=settings.seed)
    request = _with_controls(request, settings, model, batch)
    request = replace(request, sizes=_cache(model, data, request))

    compared = (
        {} if request.controls is None else {"controls": digest(canonical(list(request.controls.digests)))}
    )
    trained = {} if request.training is None else {"training": request.training.folder.name}
    streamed = (
        {} if stream is None else {"stream": {"name": stream.name, "digest": stream.digest, "n": len(stream)}}
    )
    about = AuditRequest(
        "backdoor",
        {
            "inversion": vars(request.inversion),
            "train_controls": settings.train_controls,
            "classes": request.classes,
            "controls": request.n_controls,
            "stream": stream is not None,
            "class_names": None if model.class_names is None else list(model.class_names),
        },
        {**subject.card, "digest": subject.digest},
        {"name": data.name, "digest": data.digest, "n": len(data), **compared, **trained, **streamed},
        request.steps(),
        seed=settings.seed,
        device=str(device),
        notes=(*subject.notes, *notes_of(data, stream)),
        writes=settings.trigger_out is not None,
    )

    def audit(run: Run) -> Images:
        with readied(subject, data, device):
            measure(run, model, request, start.notify)
        trigger = suspect(measured(StoredSteps(about.manifest(), run.store)))
        if settings.trigger_out is not None:
            write_trigger(Path(settings.trigger_out), replace(trigger, ends=ends(model.bounds)))
        return lambda: images_of(batch, trigger, model.bounds)

    yield PreparedAudit(about, audit, _needs(settings, batch, stream))


def _needs(settings: AuditBackdoor, batch: Batch, stream: Data | None) -> tuple[Need, ...]:
    """Return what the later steps of the audit need."""
    needs = []
    if stream is not None:
        needs.append(Need(STRIP, partial(refuse_other_shape, batch, stream)))
    if settings.trigger_out is not None:
        needs.append(Need("trigger_out", partial(refuse_unwritable, Path(settings.trigger_out))))
    return tuple(needs)


def _stream(settings: AuditBackdoor, model: Classifier, first: Data) -> Data:
    source = beside(settings, settings.stream)
    properties = expected(settings, model, source, lenient=True, first=first)
    return open_beside(settings, source, replace(properties, needs_labels=False))


def _with_controls(
    request: BackdoorRequest, settings: AuditBackdoor, model: Classifier, batch: Batch
) -> BackdoorRequest:
    """Return the request with the controls of the settings, or with their training."""
    if settings.controls is not None:
        return replace(request, controls=controls_in(settings.controls))
    if settings.train_controls is None:
        return request
    examples, extent = _training_examples(settings, model, batch)
    training = control_training(settings, settings.train_controls, model, examples, extent)
    return replace(request, training=training)


def controls_in(folder: object) -> Controls:
    """Return the controls in a folder. Raises `UsageError` if it is none, or contains too few or equal networks."""
    if not isinstance(folder, str | Path) or not Path(folder).is_dir():
        raise UsageError(f"controls is {folder!r}; expected a folder with weights of control networks")
    return Controls.of_folder(Path(folder))


def control_training(
    settings: AuditVerb, duration: str, model: Classifier, examples: Batch, extent: Sequence[object]
) -> ControlTraining:
    """Return the training of controls on examples, at most for a duration. `extent` identifies the examples."""

    def epochs(number: int, after: Checkpoint | None) -> Iterator[Checkpoint]:
        rng = Draws(settings.seed).at("control", number)
        initial = with_fresh_weights(model, rng.at("begin"), "own")
        yield from _CONTROL(initial, examples, ThreatModel(Linf(0.0)), rng=rng.at("training"), after=after)

    identity = [code_digest(), architecture(model), extent, settings.seed]
    folder = cache_folder() / "controls" / digest(canonical(identity))[:16]
    return ControlTraining(epochs, seconds(duration, "train_controls"), folder)


def _training_examples(settings: AuditBackdoor, model: Classifier, batch: Batch) -> tuple[Batch, list[str]]:
    """Return the examples on which controls are trained, and what identifies them: the train split, or the data without
    the examples of the audit.
    """
    train = open_train_split(settings, model, selection=ExampleSelection())
    if train is not None:
        return train.read(0, len(train)), [train.digest]
    everything = open_examples(settings, model, selection=ExampleSelection())
    rest = everything.read(0, len(everything))
    rest = rest.take(~torch.isin(rest.ids, batch.ids))
    if not len(rest):
        raise UsageError(
            f"all {len(batch)} examples are those of the audit, and none are left to train controls on; give data with "
            "a train split, or networks that were trained on clean data (controls)",
            Remedy("train_controls"),
        )
    return rest, [everything.digest, "rest"]


def architecture(model: Classifier) -> list[object]:
    """Return what identifies the architecture of a model: its layers, and the names and shapes of its weights."""
    shapes = [[name, list(value.shape)] for name, value in model.state_dict().items()]
    return [str(model.net), shapes, str(model.mean), str(model.std), str(model.bounds)]


def _cache(model: Classifier, data: Data, request: BackdoorRequest) -> SizeCache:
    """Return the file with the trigger sizes of controls that were measured with the same settings."""
    identity = [code_digest(), architecture(model), data.digest, vars(request.inversion), request.seed]
    return SizeCache(cache_folder() / "controls" / f"{digest(canonical(identity))}.json")


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
            measure_poison(run, request, training(model), start.notify)
        result = scored(StoredSteps(about.manifest(), run.store))
        if settings.suspects is not None:
            write_suspects(Path(settings.suspects), result, model.class_names)
        return lambda: poison_images(request.batch, result, model.bounds)

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
