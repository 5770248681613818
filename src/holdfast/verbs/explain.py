"""The function `holdfast.explain`, which explains why an input breaks a model, and where a model is fragile."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from holdfast.attacks.parts.images import MeanView, averaged_views
from holdfast.audits.audit import is_audit
from holdfast.core.batch import Batch, Data
from holdfast.core.draws import Draws
from holdfast.core.errors import Remedy, TargetError, UsageError
from holdfast.core.model import Classifier
from holdfast.core.tasks import Task
from holdfast.explanation.case import About, Explained, Measured
from holdfast.explanation.example import explain_example
from holdfast.explanation.task_example import explain_task
from holdfast.explanation.whole_model import explain_model
from holdfast.io.data.data import selected
from holdfast.io.models.factories import names_code
from holdfast.io.models.models import WEIGHTS
from holdfast.io.models.weights import digest_of_weights
from holdfast.reports.words import sentences
from holdfast.runs.assess.preparation import model_digest, readied
from holdfast.runs.assess.request import DescribedModel
from holdfast.runs.assess.result import Result
from holdfast.runs.documents.record import consistent
from holdfast.runs.documents.stored_runs import open_run
from holdfast.runs.harness.target import PreparedModel
from holdfast.runs.store.files import MANIFEST
from holdfast.runs.store.folder import read_manifest
from holdfast.settings.grammar import transform_text
from holdfast.threats.domains import is_image
from holdfast.verbs.attack import inputs_and_data
from holdfast.verbs.checked_settings import composed
from holdfast.verbs.configuration import OPENED_WITH, given
from holdfast.verbs.opening.arguments import DataLike, ModelLike, beside, gradients, verb_with
from holdfast.verbs.opening.declared import (
    expected,
    is_of_clips,
    notes_of,
    opened_threat,
    with_found_properties,
)
from holdfast.verbs.opening.plans import device_of, task_members
from holdfast.verbs.opening.recipes import ThreatLike
from holdfast.verbs.opening.resolve import open_examples, open_expected, open_subject, open_train_split
from holdfast.verbs.settings import Assess, Certify, Explain

_EXAMPLES = 100
"""examples by which a model is explained, unless the settings state another number"""
_MOST = 500
"""largest number of examples by which a model is explained"""
_VIEWS = 8
"""transformations over which a model with random transformations of its inputs is averaged"""
_TRAINING = 2000
"""training examples that are compared"""


@verb_with(Explain)
def explain(
    model: ModelLike, x: DataLike = None, y: object = None, threat: ThreatLike = "linf:8/255", **settings: Any
) -> Explained:
    """Explain why the prediction of a model for one example changes, or where the model is fragile.

    `x` (n, …) and `y` (n) are the examples and their labels, as in `attack`; `y` is omitted for a loader, an address or
    a result of `holdfast.open_data`. With `index`, the example with this row number is explained, and otherwise the
    model. `model` may also be the folder of a finished run, whose model and data are then opened by their addresses.
    `threat` states which changes are allowed.

    The result has a sentence and figures with their numbers, and `write("why.html")` writes it. Raises `TargetError` if
    the model has changed since the run in `from_run`.
    """
    data = None if x is None else inputs_and_data(x, y)[1]
    of_run = _is_run(model) or settings.get("from_run") is not None
    own = {} if of_run and threat == "linf:8/255" else {"threat": threat}
    return explained(Explain(**given(model=model, data=data, **own, **settings)))


def _is_run(model: object) -> bool:
    return isinstance(model, str | Path) and (Path(model) / MANIFEST).is_file()


def _is_audit(path: Path) -> bool:
    return (path / MANIFEST).is_file() and is_audit(path)


def explained_run(settings: Assess | Certify, result: Result, index: int | None) -> Explained:
    """Explain the example or the model of a run whose settings are known."""
    keys = settings.model_fields_set & Explain.model_fields.keys() - {"examples"}  # nothing is stored here
    own = {key: getattr(settings, key) for key in keys}
    with gradients():
        return explained(Explain(**{**own, "index": index, "output": []}), result)


@gradients()
def explained(settings: Explain, result: Result | None = None) -> Explained:
    """Explain the example or the model of the settings, or an episode of a policy. `result` is the run that they belong
    to.
    """
    if result is None and isinstance(settings.model, str | Path) and _is_audit(Path(settings.model)):
        from holdfast.explanation.episode import explain_episode  # late, as few models are policies

        for name in sorted(settings.model_fields_set - {"model", "output"}):
            raise UsageError(
                f"{name} is {getattr(settings, name)!r}, and {str(settings.model)!r} is a run with a policy, whose "
                "stored episode is explained",
                Remedy(name),
            )
        return explain_episode(Path(settings.model))
    settings, run = _with_run(settings) if result is None else (settings, result)
    with _opened(settings, run) as (subject, data, target):
        limits = opened_threat(settings)
        device = next(subject.model.parameters(), torch.empty(0)).device
        rng = Draws(settings.seed).at("explain")
        batch = (_some(data, _MOST, settings) if settings.index is None else _row(data, settings.index)).to(
            device
        )
        if subject.model.task is not None:
            _refuse_of_classes(settings, subject.model.task, data)
        train = None if settings.index is None else _train(settings, subject.model, data)
        about = About(
            str(subject.card["name"]),
            data.name,
            limits.text,
            tuple(data.classes or subject.model.class_names or ()),
            tuple(subject.model.feature_names or getattr(data, "features", None) or ()),
            settings.seed,
            subject.digest,
            (
                *_notes(settings, target, len(batch), len(data)),
                *(sentences(note) for note in notes_of(data, train)),
            ),
            settings.examples,
            getattr(data, "sampling_rate", None),
        )
        with target.repeatable(rng):
            if subject.model.task is not None:
                members = task_members(limits, subject.model.task, subject.model.access)
                same = run is not None and run.evidence.threat.text == limits.text
                stored = _shown(run, int(batch.ids[0])) if same else None
                return explain_task(target, batch, limits, about, members, rng=rng, stored=stored)
            if settings.index is None:
                return explain_model(target, batch, limits, about, rng=rng, measured=_measured(run, data))
            return explain_example(
                target,
                batch,
                limits,
                about,
                rng=rng,
                baseline=_baseline(data, batch, settings),
                stored=_stored(run, settings.index),
                train=None if train is None else _some(train, _TRAINING, settings).to(device),
                checkpoints=_checkpoints(settings, device),
            )


def _refuse_of_classes(settings: Explain, task: Task, data: Data) -> None:
    """Raise `UsageError` for what is explained of models of classes only."""
    if settings.index is None:
        raise UsageError(
            f"a model of {task.name} is explained by one of its examples",
            Remedy("index", int(data.read(0, 1).ids[0])),
        )
    for name in ("train", "checkpoints"):
        if getattr(settings, name):
            raise UsageError(f"{name} is for models of classes, and this is one of {task.name}", Remedy(name))


def _some(data: Data, n: int, settings: Explain) -> Batch:
    """Return at most `n` examples, chosen at random by the seed, because a file may be sorted by class."""
    some = selected(data, n=None, sample=n, seed=settings.seed)
    return some.read(0, len(some))


def _notes(settings: Explain, target: PreparedModel, used: int, n: int) -> tuple[str, ...]:
    """What limits the explanation of a model or an example, apart from its figures."""
    notes = []
    if settings.index is None and used < n:
        notes.append(f"Only {used} of {n:,} examples, chosen at random by the seed, were used.")
    if not settings.examples:
        notes.append("Pictures and words of examples are left out, as requested.")
    if isinstance(target.original.net, MeanView):
        notes.append(
            "The model transforms its inputs at random. The mean of its class probabilities over "
            f"{_VIEWS} random transformations, which are the same for all inputs, is explained instead."
        )
    if target.randomised:
        notes.append("The outputs of the model are random, and each pass of the model is another draw.")
    return tuple(notes)


def _with_run(settings: Explain) -> tuple[Explain, Result | None]:
    """The settings with the model, the data and the threat of a run, and the run."""
    given_as_model = _is_run(settings.model)
    folder = settings.model if given_as_model else settings.from_run
    if folder is None:
        if settings.model_fields_set.isdisjoint(("n", "sample")) and settings.index is None:
            settings = settings.model_copy(update={"sample": _EXAMPLES})
        return settings, None
    run, manifest = open_run(Path(folder)), read_manifest(Path(folder))
    _refuse_votes(manifest, str(folder), run.evidence.threat.text)
    update: dict[str, Any] = {"from_run": str(folder)}
    with consistent(Path(folder)):
        if "threat" not in settings.model_fields_set:
            update["threat"] = run.evidence.threat
        if settings.model_fields_set.isdisjoint(("n", "sample")):
            key = "sample" if manifest["data"].get("sampled") else "n"
            update |= {key: manifest["data"]["n"], "seed": settings.seed or manifest["seed"]}
        if settings.data is None:
            update["data"] = str(manifest["data"]["name"])
        models = (manifest["model"], *manifest["model"].get("members", ()))
        named = [(str(each["name"]), each.get("how")) for each in models]
        opening = {
            key: value
            for key, value in manifest.get("opening", {}).items()
            if key in {*OPENED_WITH, "groups"} and key not in settings.model_fields_set
        }
        if given_as_model and names_code(str(opening.get("arch", ""))):
            del opening["arch"]
    update |= opening
    if given_as_model:
        update |= _address(named, manifest["verb"], str(folder))
    own = {key: getattr(settings, key) for key in settings.model_fields_set}
    try:
        return Explain(**{**own, **update}), run
    except UsageError as error:
        raise TargetError(
            f"the run {str(folder)!r} states a model or data that cannot be opened: {error.message}"
        ) from error


def _refuse_votes(manifest: Mapping[str, Any], folder: str, threat: str) -> None:
    """Raise `UsageError` for a run about the votes of a model, which a certification by smoothing or masks makes."""
    model = manifest["model"]
    if (votes := model.get("masked") or model.get("smoothed")) is not None:
        command = shlex.join(["holdfast", "explain", votes["base"], manifest["data"]["name"], "-t", threat])
        raise UsageError(
            f"the run {folder!r} is about a {model['name']}, and votes are not explained; explain the model on which "
            f"they are based: {command}"
        )


def _address(named: Sequence[tuple[str, object]], verb: str, folder: str) -> dict[str, Any]:
    """The settings with the address of the model of a run, of a hardening the folder with the new model, and with those
    of its members. `named` are their names, and how each was opened. A run folder may come from someone else, so that
    no code is run by it.
    """
    (name, _), *members = named
    if any(how == "python" or names_code(address) for address, how in named):
        hardened = f" (of {folder}/{WEIGHTS}, the architecture as arch)" if verb == "harden" else ""
        raise UsageError(
            f"the model of the run {folder!r} is {name!r}, which is not opened from a run folder, because code would "
            f"be executed or its weights are not in a file; give the model{hardened} and the data, and the run as "
            "from_run (--from-run on the command line)"
        )
    if verb == "harden":
        return {"model": folder}
    # a member as a mapping, because its address would otherwise be read for options such as arch
    return {"model": name, "members": [{"model": address} for address, _ in members]}


@contextmanager
def _opened(settings: Explain, run: Result | None) -> Iterator[tuple[DescribedModel, Data, PreparedModel]]:
    """The model, the data and the prepared model. Raises `TargetError` if they are not those of the run."""
    seen_through = {} if run is None else run.evidence.model.get("seen_through", {})
    transform = transform_text(seen_through) or None
    subject = open_subject(settings, transform=transform)
    data = open_examples(settings, subject.model)
    subject = with_found_properties(subject, (), data)
    device = torch.device(device_of(settings.device))
    with readied(subject, data, device) as (target, _):
        if run is not None:
            net, known = subject.model.net, subject
            if run.training is not None and isinstance(net, nn.Module):
                known = replace(subject, digest=digest_of_weights(net.state_dict()))  # as harden does
            _refuse_changed(run, model_digest(known, target), data)
        if transform is None:
            yield subject, data, target
            return
        mean = replace(subject, model=averaged_views(subject.model, _VIEWS, settings.seed))
        with readied(mean, data, device) as (steady, _):
            yield mean, data, steady  # whose outputs are the same in every call


def _refuse_changed(run: Result, model: str, data: Data) -> None:
    """Raise `TargetError` if the model or the examples are not those of the run."""
    stored = run.about["hashes"]
    for name, now in (("model", model), ("data", data.digest)):
        if stored[name] != now:
            raise TargetError(
                f"the {name} opened now ({now[:12]}) differs from the {name} of the run "
                f"({stored[name][:12]}), so the results of the run do not belong to it; give the {name} of the run, "
                "with the options that it was opened with, or leave the run out"
            )


def _row(data: Data, index: int) -> Batch:
    """The example with a row number."""
    opened: list[int] = []
    for start in range(0, len(data), 1000):
        batch = data.read(start, min(start + 1000, len(data)))
        opened += batch.ids.tolist()
        rows = (batch.ids == index).nonzero()[:, 0]
        if len(rows):
            return batch.take(rows[:1])
    nearest = min(opened, key=lambda row: abs(row - index))
    raise UsageError(
        f"index is {index}, and the {len(data):,} examples of {data.name} that were opened have other row numbers, "
        f"from {min(opened)} to {max(opened)}",
        Remedy("index", nearest),
    )


def _baseline(data: Data, batch: Batch, settings: Explain) -> torch.Tensor | None:
    """The median of each column of a table, or the silence of a clip, which integrated gradients start from; None for
    other inputs.
    """
    if is_of_clips(settings):
        return torch.zeros_like(batch.x)
    if is_image(batch.x.shape[1:]) or batch.x.dim() != 2:
        return None
    rows = _some(data, 1000, settings).x
    return rows.nanmedian(0, keepdim=True).values.to(batch.x)


def _stored(run: Result | None, index: int) -> torch.Tensor | None:
    """The adversarial input of an example that a run stored."""
    if run is None or not run.adversarial:
        return None
    rows = (run.adversarial["id"] == index).nonzero()[:, 0]
    return run.adversarial["x"][rows[:1]] if len(rows) else None


def _shown(run: Result | None, index: int) -> torch.Tensor | None:
    """The attacked input of an example that a run stored, or shows in its report."""
    stored = _stored(run, index)
    if stored is not None or run is None or "id" not in run.evidence.gallery:
        return stored
    rows = (run.evidence.gallery["id"] == index).nonzero()[:, 0]
    return run.evidence.gallery["x_adv"][rows[:1]] if len(rows) else None


def _measured(run: Result | None, data: Data) -> Measured:
    groups = getattr(data, "groups", None)
    if run is None:
        return Measured(groups=groups)
    broken = run.evidence["broken_by"] >= 0 if "broken_by" in run.evidence else None
    return Measured(
        run.evidence["id"],
        broken,
        run.adversarial.get("id"),
        run.adversarial.get("x"),
        {doubt.name: doubt.state for doubt in run.doubts},
        groups,
    )


def _train(settings: Explain, model: Classifier, first: Data) -> Data | None:
    """Open the training examples, whose columns are matched with those of the data `first`."""
    if settings.train is None:
        return None
    source = beside(settings, settings.train)
    opened = composed(Explain, settings, source).model_copy(update={"n": None, "sample": None})
    properties = expected(opened, model, source, first=first)
    return open_train_split(opened, model, first) or open_expected(opened, properties)


def _checkpoints(settings: Explain, device: torch.device) -> list[Classifier]:
    models = [
        open_subject(settings.model_copy(update={"model": checkpoint})).model
        for checkpoint in settings.checkpoints
    ]
    return [model.to(device).eval().requires_grad_(requires_grad=False) for model in models]
