"""Every remedy that an error names is carried out: the call then completes, or is refused for another reason.

A situation is a call that is refused. Each remedy of its error is applied to the arguments of the call, as a user would
do it, and the call is repeated. `carried_out` records which remedies of the code an error contained, so that
`test_every_remedy_of_the_code_has_a_situation` finds those without one.
"""

import ast
import dataclasses
import importlib
import inspect
import json
import tomllib
from collections.abc import Callable, Mapping
from contextlib import contextmanager, suppress
from functools import cache, partial
from inspect import signature
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import holdfast
from holdfast.attacks import PGD
from holdfast.audits.audit import AuditStart
from holdfast.audits.backdoor_controls import refuse_short
from holdfast.certifiers import register
from holdfast.certifiers.boundary_geometry import boundary_geometry
from holdfast.certifiers.bounds.graph import region_of
from holdfast.certifiers.patch_masks import PatchMasks
from holdfast.certifiers.smoothing import Smoothing
from holdfast.certifiers.vnnlib.deciding import _fitting
from holdfast.certifiers.vnnlib.reading import read_query
from holdfast.cli.app import _COMMANDS, verbs
from holdfast.cli.measure import refuse_code_of_config, refuse_hosts_of_config, refuse_logs_of_config
from holdfast.cli.vnn import _needed, vnn
from holdfast.core.batch import Batch, off_range
from holdfast.core.catalogue import PATCH_MASKS
from holdfast.core.draws import Draws
from holdfast.core.errors import (
    HoldfastError,
    Install,
    Placeholder,
    Remedy,
    TargetError,
    failure_from_json,
    failure_to_json,
    refuse_unmet,
)
from holdfast.core.model import Bounds, Classifier
from holdfast.core.training import refuse_lost
from holdfast.gates.grammar import parse as parse_gate
from holdfast.io.data.arrays import selected_rows
from holdfast.io.data.data import open_data as open_table_file
from holdfast.io.data.labels import MOST_NAMES, class_numbers, matched, numbered_words
from holdfast.io.data.layouts import DeclaredData
from holdfast.io.data.loaders import as_data
from holdfast.io.data.mixed_tables import TableFile, open_mixed
from holdfast.io.data.npz import write_trigger
from holdfast.io.doctor import misfit
from holdfast.io.onnx.reading import _filled
from holdfast.io.remote.payloads import ServerAnswers, Shaped, Template
from holdfast.io.remote.probing import ProbedClassifier
from holdfast.io.remote.served_model import InspectionCounter
from holdfast.io.sandbox.calling import HERE
from holdfast.metrics.catalogue import estimate
from holdfast.recipes import DPSGD, MaskedPatches, PolicyTraining
from holdfast.recipes.lipschitz import order_of
from holdfast.recipes.training.fit import Training
from holdfast.reports.transfer import across_rows
from holdfast.runs.assess.certify import refuse_unprovable
from holdfast.runs.assess.request import DescribedModel
from holdfast.runs.engine.processes import unshared
from holdfast.runs.engine.progress import ignore
from holdfast.runs.harden.held_out import refuse_judged
from holdfast.runs.harden.pace import Pace, too_small
from holdfast.runs.harness.plan import Plan, refuse_unfitted, refuse_what_is_hidden
from holdfast.runs.harness.target import prepared
from holdfast.settings.grammar import seconds
from holdfast.settings.groups import InferenceSource
from holdfast.settings.table_rules import drafted
from holdfast.threats.domains import refuse_no_images
from holdfast.threats.parsing import parse_threat
from holdfast.threats.triggers import Trigger
from holdfast.verbs.adapt_served import refuse_uncalibratable
from holdfast.verbs.assess import estimated as cost_estimated
from holdfast.verbs.audit.backdoor import AuditBackdoor
from holdfast.verbs.audit.extraction import AuditExtraction
from holdfast.verbs.audit.opening_extraction import prepared_extraction
from holdfast.verbs.audit.opening_models import prepared_backdoor
from holdfast.verbs.checked_settings import check_settings
from holdfast.verbs.control import opened as open_episodes
from holdfast.verbs.control import refuse_other_settings
from holdfast.verbs.harden import _refuse_two_limits, _with_denoiser, _with_threat_of_recipe
from holdfast.verbs.monitor import _refuse_data, _refuse_mixed
from holdfast.verbs.opening.arguments import refuse_misspelt
from holdfast.verbs.opening.declared import range_of_all
from holdfast.verbs.opening.guard import guarded_subject
from holdfast.verbs.opening.plans import assess_request, prover
from holdfast.verbs.opening.recipes import CARD, build_recipe, built, refuse_unheld, trained_by
from holdfast.verbs.rotate import _candidate as rotation_recipe
from holdfast.verbs.rotate import loop_settings
from holdfast.verbs.serve_opening import (
    _refuse_numeric,
    _refuse_settings_of_models,
    _shape,
    refuse_forwarded_keys,
    refuse_other_votes,
    server_setup,
)
from holdfast.verbs.settings import Assess, Calibrate, Certify, Harden, Monitor, RotateSettings, Serve
from servers import CLASSES as SERVED_CLASSES
from servers import Server
from servers import examples as served_examples

SOURCE = Path(holdfast.__file__).parent
FOLDER = Path(mkdtemp(prefix="remedies-"))
_MOST = 3
"""Number of remedies that are carried out one after the other."""

torch.manual_seed(0)
X = torch.rand(12, 4)
LINEAR = nn.Linear(4, 3)
Y = LINEAR(X).argmax(1)
PAIR = (X, Y)
IMAGES = torch.rand(8, 1, 6, 6)


@dataclasses.dataclass(frozen=True)
class Situation:
    """A call that is refused."""

    call: Callable[..., Any]
    arguments: Mapping[str, Any]
    """arguments of the call; options of `open_model`, `open_data` and `Ray` are in dictionaries of these names"""
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """values for placeholders, by argument"""
    replaced: tuple[str, ...] = ()
    """arguments that a remedy takes the place of"""
    only: tuple[str, ...] = ()
    """arguments of the remedies that fit the situation, if the others are for another cause"""


def applied(remedy: Remedy, arguments: Mapping[str, Any], situation: Situation) -> dict[str, Any]:
    """The arguments of a call after a remedy was carried out."""
    if "words" in arguments:
        return {"words": _on_command_line(remedy, arguments["words"], situation)}
    changed = {key: value for key, value in arguments.items() if key not in situation.replaced}
    for part in (remedy, *remedy.also):
        place = changed
        if part.function in ("open_model", "open_data", "Ray"):
            place = changed[part.function] = dict(changed.get(part.function, {}))
        *path, name = part.argument.split(".")
        for key in path:
            inside = place.get(key, {})
            place[key] = (
                {"use": inside}
                if isinstance(inside, str)
                else dict(inside)
                if isinstance(inside, Mapping)
                else {}
            )
            place = place[key]
        value = part.value
        if isinstance(value, Placeholder):
            value = situation.values[part.argument]
            value = value() if isinstance(value, Later) else value
        if value is None:
            place.pop(name, None)
        else:
            place[name] = value
    return changed


def _on_command_line(remedy: Remedy, words: tuple[str, ...], situation: Situation) -> tuple[str, ...]:
    """The words of a command line after a remedy was carried out."""
    for part in (remedy, *remedy.also):
        if part.flag in words:
            place = words.index(part.flag)
            words = (*words[:place], *words[place + 2 :])
        value = situation.values[part.argument] if isinstance(part.value, Placeholder) else part.value
        words += dataclasses.replace(part, value=value, also=()).words()
    return words


def refusal(call, arguments) -> HoldfastError | None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(HERE, "limited", True)  # files are read in this process
        try:
            call(**arguments)
        except HoldfastError as error:
            return error
    return None


@contextmanager
def recorded(created: list[tuple[tuple[str, int], Remedy | Install]]):
    """Adds each remedy that is created meanwhile, with the file and the line of the code that creates it."""
    before = {kind: kind.__init__ for kind in (Remedy, Install)}

    def recording(kind):
        def initialise(self, *args, **more):
            before[kind](self, *args, **more)
            frame = inspect.currentframe()
            while frame is not None and not frame.f_code.co_filename.startswith(str(SOURCE)):
                frame = frame.f_back
            if frame is not None:
                created.append(((frame.f_code.co_filename, frame.f_lineno), self))

        return initialise

    for kind in before:
        kind.__init__ = recording(kind)
    try:
        yield
    finally:
        for kind, initialise in before.items():
            kind.__init__ = initialise


@cache
def carried_out(name: str) -> tuple[frozenset[tuple[str, int]], tuple[Remedy | Install, ...]]:
    """Carry out the remedies of a situation, and return them and the places where they were created.

    Remedies with a placeholder for which the situation has no value, and those that it excludes, are not carried out.
    """
    situation, created = SITUATIONS[name](), []
    with recorded(created):
        error = refusal(situation.call, situation.arguments)
    assert error is not None, "nothing is refused"
    assert error.remedies, f"no remedy: {error}"
    fitting = tuple(each for each in error.remedies if _fits(each, situation))
    assert fitting, f"no remedy is carried out: {error}"
    for remedy in fitting:
        _refuse_other_attackers(remedy, situation.arguments)
        _carry_out(remedy, situation, situation.arguments, (error,))
    parts = [part for each in fitting for part in _parts(each)]
    return frozenset(
        place for place, remedy in created if any(_same(remedy, part) for part in parts)
    ), fitting


def _same(first: Remedy | Install, second: Remedy | Install) -> bool:
    """Whether two remedies change the same argument in the same way."""
    if isinstance(first, Install) or isinstance(second, Install):
        return first == second
    return dataclasses.replace(first, reason="", also=()) == dataclasses.replace(second, reason="", also=())


def _parts(remedy: Remedy | Install) -> tuple[Remedy | Install, ...]:
    return (remedy, *remedy.also) if isinstance(remedy, Remedy) else (remedy,)


def _fits(remedy: Remedy | Install, situation: Situation) -> bool:
    if isinstance(remedy, Install):
        return True
    unknown = [
        part
        for part in (remedy, *remedy.also)
        if isinstance(part.value, Placeholder) and part.argument not in situation.values
    ]
    return not unknown and (not situation.only or remedy.argument in situation.only)


def _carry_out(remedy, situation, arguments, errors) -> None:
    if isinstance(remedy, Install):
        return
    changed = applied(remedy, arguments, situation)
    error = refusal(situation.call, changed)
    if error is None:
        return
    assert error.message not in {earlier.message for earlier in errors}, f"{remedy} does not resolve {error}"
    undone = [each for each in error.remedies if isinstance(each, Remedy) and _undoes(each, remedy)]
    assert not undone, f"{error} undoes {remedy}"
    following = error.remedy
    if following is not None and len(errors) < _MOST and _fits(following, situation):
        _carry_out(following, situation, changed, (*errors, error))


def _refuse_other_attackers(remedy: Remedy | Install, arguments: Mapping[str, Any]) -> None:
    """A remedy changes what the attacker may change, but not the access and the queries that were given."""
    given_threat = arguments.get("threat")
    for part in _parts(remedy):
        if isinstance(given_threat, str) and isinstance(part, Remedy) and part.argument == "threat":
            with suppress(HoldfastError):  # a misspelt threat
                before, after = parse_threat(given_threat), parse_threat(str(part.value))
                assert (after.access, after.queries) == (before.access, before.queries), remedy


def _undoes(second: Remedy, first: Remedy) -> bool:
    """Whether a remedy only takes away what another one has given."""
    return (
        second.argument == first.argument
        and second.value is None
        and first.value is not None
        and not second.also
    )


# -- the calls


def given(model, options):
    return holdfast.open_model(model, **options) if options else model


def given_data(data, options):
    return holdfast.open_data(data, **options) if options else data


def assessed(model=LINEAR, data=PAIR, open_model=(), open_data=(), **arguments):
    return holdfast.assess(
        given(model, dict(open_model)),
        given_data(data, dict(open_data)),
        **{"threat": "linf:0.01", "suite": "quick", "doubts": False, **arguments},
    )


def planned(open_model=(), **arguments):
    """The plan of an assessment, without a run."""
    return assess_request(check_settings({"threat": "linf:0.01", **arguments}, "", kind=Assess))


def attacked(**arguments):
    return holdfast.attack(LINEAR, X, Y, **{"threat": "linf:0.01", **arguments})


def opened(model=LINEAR, data=PAIR, open_model=(), open_data=(), **arguments):
    """The model and the examples, without a run."""
    return Assess(
        model=given(model, dict(open_model)), data=given_data(data, dict(open_data)), **arguments
    ).open()


def opened_by_names(data, open_data=()):
    """A table of a model that was fitted on three named columns."""
    options = dict(open_data)
    options["drop"] = tuple(options.get("drop", ()))
    return open_table_file(data, **options, expected=DeclaredData(feature_names=("a", "b", "c")))


def hidden(model_access="gradients", surrogates=(), fit=None, **arguments):
    """A plan, after what the attacker does not see is taken from it."""
    plan = planned(**arguments).plan
    threat = dataclasses.replace(plan.threat, surrogates=tuple(map(Classifier, surrogates)))
    plan = dataclasses.replace(plan, threat=threat)
    refuse_unfitted(refuse_what_is_hidden(plan, model_access), fit=fit is not None)


class Sorted(nn.Module):
    """A layer without bounds."""

    def forward(self, x):
        return x + 0 * x.sort(1).values


def certified(model=LINEAR, threat="linf:0.01", method="ibp", verb="certify", *, certify=False, **options):
    """Prepare a method of certification for a model."""
    if verb == "assess" and not certify:
        return
    settings = check_settings({"threat": threat, "method": method, **options}, "", kind=Certify)
    at, sample = settings.threat.opened(), Batch(X, Y, torch.arange(len(X)))
    with prepared(model if isinstance(model, Classifier) else Classifier(model), sample) as target:
        if method == "smoothing":
            own = {f.name for f in dataclasses.fields(Smoothing)}
            smoothing = Smoothing(**{key: value for key, value in options.items() if key in own})
            smoothing.ready(target.original, sample, at)
        elif "on" not in settings.threat.change.limits:  # proofs about embeddings need a model of texts
            refuse_unprovable(Plan((), at, proofs=(prover(method),)), target, sample, verb)


def certified_patches(threat="patch:2x2", method="auto", masks=None):
    """Prepare the masks of a certification for images."""
    settings = check_settings({"threat": threat, "method": method, "masks": masks}, "", kind=Certify)
    masks = PatchMasks() if settings.masks is None else PatchMasks(settings.masks)
    if settings.chosen_method == PATCH_MASKS:
        masks_of_images(settings.threat.opened(), masks)


def masks_of_images(threat, masks):
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)))
    return masks.ready(model, Batch(IMAGES, torch.arange(8) % 3, torch.arange(8)), threat)


def certified_texts(**arguments):
    texts = ["a b c d e f g h i j"] * 2
    return holdfast.certify(
        lambda texts: [[0.0, 1.0]] * len(texts),
        (texts, [1, 0]),
        **{"threat": "text:edits=1,words=1", **arguments},
    )


def logistic():
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression().fit(X.numpy(), Y.numpy())


def forest():
    from sklearn.ensemble import RandomForestClassifier

    from holdfast.io.models.adapting import adapted

    wrapped = adapted(RandomForestClassifier(3, random_state=0).fit(X.numpy(), Y.numpy()))
    return Classifier(wrapped.net, access="scores", output=wrapped.output)


def certified_without_veritas(**arguments):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("importlib.util.find_spec", lambda name: None)
        certified(**arguments)


def verified(**arguments):
    """The arguments of a certification, without a run."""
    refuse_misspelt("certify", signature(holdfast.certify).parameters, (), arguments)


def hardened(**arguments):
    """The arguments of a hardening, without a run."""
    refuse_misspelt("harden", signature(holdfast.harden).parameters, (), arguments)


def convolutional():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))


def baseline():
    return assessed(suite="pgd")


def trained(model=None, data=None, recipe="pgd", threat="linf:0.01", surrogates=()):
    spec = {"use": recipe} if isinstance(recipe, str) else dict(recipe)
    spec["training"] = {"epochs": 1, "batch": 8, **spec.get("training", {})}
    model = model or Classifier(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))
    model = model if isinstance(model, Classifier) else Classifier(model)
    batch = data or Batch(X, Y, torch.arange(len(X)))
    at = dataclasses.replace(parse_threat(threat).opened(), surrogates=tuple(map(Classifier, surrogates)))
    return list(build_recipe(spec)(model, batch, at, rng=Draws(0)))


def taught(recipe):
    """A training by a recipe that needs a teacher, which is opened if it is named."""
    named = build_recipe({"use": recipe} if isinstance(recipe, str) else recipe)
    batch = Batch(X, Y, torch.arange(len(X)))
    model, teacher = (Classifier(nn.Sequential(nn.Flatten(), nn.Linear(4, 3))) for _ in range(2))
    if getattr(named, "teacher", ""):
        named = named.taught_by(teacher)
    next(iter(named(model, batch, parse_threat("linf:0.01").opened(), rng=Draws(0))))


def of_images(recipe):
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)))
    trained(model, Batch(IMAGES, torch.arange(8) % 3, torch.arange(8)), recipe)


def samples_file():
    """The path of a file with generated images, of which one is a test image."""
    path = FOLDER / "samples.npz"
    np.savez(path, x=IMAGES.numpy(), y=np.arange(8) % 3)
    return str(path)


def with_samples(recipe):
    """Read the file of generated images of a recipe, and compare it with a test image."""
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)))
    further = build_recipe(recipe).further_examples(model)
    if further is not None:
        refuse_judged(further, as_data(IMAGES[:1], torch.zeros(1, dtype=torch.int64)), further.first(0))


def centred():
    """A network whose outputs depend on the mean of the batch."""

    class Centred(nn.Linear):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    return Centred(4, 3)


def paced(budget=None):
    """A private training, within a time if there is a budget."""
    pacing = None if budget is None else lambda *_: None
    recipe = DPSGD(training=Training(epochs=1, batch=8, pacing=pacing))
    recipe._refuse_unsound(Batch(X, Y, torch.arange(len(X))))


def privacy(model=LINEAR, **arguments):
    x = torch.rand(240, 4)
    settings = {"train": lambda x, y, seed: nn.Linear(4, 3), "epsilon": 2, "device": "cpu", **arguments}
    return holdfast.audit.privacy(model, (x, LINEAR(x).argmax(1)), **settings)


def attributes(**arguments):
    x = torch.rand(240, 4)
    frame = pd.DataFrame(x.numpy(), columns=list("abcd")).assign(
        y=LINEAR(x).argmax(1).numpy(), of=[0.0, 1.0] * 120
    )
    settings = {"sensitive": "of", "device": "cpu", **arguments}
    holdfast.audit.attributes(nn.Linear(5, 3), holdfast.open_data(frame, label="y"), **settings)


def reconstructed(net=LINEAR, **arguments):
    settings = {"batch_size": (1,), "batches": 1, "steps": 1, "device": "cpu", **arguments}
    holdfast.audit.reconstruct(net, (torch.rand(8, 4), torch.arange(8) % 3), **settings)


def shared_gradient():
    """The path of a gradient of the network, in a file."""
    path = Path(mkdtemp()) / "gradient.safetensors"
    save_file({name: torch.ones_like(weight) for name, weight in LINEAR.named_parameters()}, path)
    return str(path)


def generator_audited(**arguments):
    """An audit of a generator that returns other points of the same kind."""
    points = [torch.rand(400, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    generator = SimpleNamespace(sample=lambda n, seed: points[2][:n])
    y = (points[0][:, 0] > 0.5).long()
    holdfast.audit.generator(generator, (points[0], y), samples=400, device="cpu", **arguments)


def poor():
    """A network that predicts few of the labels `Y`."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    with torch.no_grad():
        net[1].weight.copy_(-LINEAR.weight)
        net[1].bias.copy_(-LINEAR.bias)
    return net


def answered(answer, rows=2, *, shaped=False, open_model=()):
    """The scores or classes in the answer of a server."""
    options = dict(open_model)
    names, classes = options.get("class_names"), options.get("classes")
    if names is not None and classes is None:
        classes = len(names)
    labels = classes if options.get("http_labels") else None
    path = options.get("http_response")
    form = Shaped("x", output=path) if shaped else Template.of('{"x": $x}', path)
    expected = None if options.get("http_labels") else classes
    answers = ServerAnswers(
        form,
        labels=labels,
        names=names,
        declared=options.get("model_output") is not None,
        masked=str,
        expected=expected,
    )
    n = options.get("http_max_rows", rows)
    given_answer = answer(n) if callable(answer) else answer
    return answers.read(given_answer, torch.zeros(n, 4))


# -- files


@cache
def file(name: str) -> str:
    """The path of a file or a folder of examples or of a model."""
    path = FOLDER / name
    if name.endswith(".csv"):
        tables = {
            "table.csv": "a,b,c,d,name,label\n0.1,0.2,0.3,0.4,u,0\n0.5,0.6,0.7,0.8,v,1\n",
            "numbers.csv": "a,b,c,d,label\n0.1,0.2,0.3,0.4,0\n0.5,0.6,0.7,0.8,1\n",
            "unlabelled.csv": "a,b,c,d\n0.1,0.2,0.3,0.4\n0.5,0.6,0.7,0.8\n",
            "identifiers.csv": "id,a,label\nu,1,0\nv,2,1\nw,3,1\n",
            "texts.csv": "name,other,label\nu,x,0\nv,y,1\n",
            "unscaled.csv": "a,b,c,d,label\n0.1,20,3,40,0\n0.5,60,7,80,1\n",
            "no-header.csv": "0.1,0.2,0.3,0.4,0\n0.5,0.6,0.7,0.8,1\n",
            "groups.csv": "a,b,c,d,sex,label\n0.1,0.2,0.3,0.4,f,0\n0.5,0.6,0.7,0.8,m,1\n",
            "classes.csv": "a,b,c,d,label\n0.1,0.2,0.3,0.4,1\n0.5,0.6,0.7,0.8,2\n0.5,0.6,0.7,0.8,10\n",
        }
        path.write_text(tables[name])
    elif name == "rules.json":
        path.write_text(json.dumps({"columns": {name: {"min": 0, "max": 1} for name in "abcd"}}))
    elif name == "t.npz":
        np.savez(path, mask=np.ones(4), pattern=np.zeros(4))
    elif name == "bounds.json":
        path.write_text('{"a": [0, 1]}')
    elif name == "one.npz":
        np.savez(path, x=X.numpy(), y=Y.numpy())
    elif name == "groups.npz":
        np.savez(path, x=X.numpy(), y=Y.numpy(), sex=np.arange(12) % 2)
    elif name == "other-labels.npz":
        np.savez(path, x=X.numpy(), targets=Y.numpy())
    elif name == "named.npz":
        np.savez(path, images=X.numpy(), targets=Y.numpy())
    elif name == "grey.npz":
        np.savez(path, x=np.random.default_rng(0).random((6, 6, 6), np.float32), y=np.arange(6) % 3)
    elif name == "square.npz":
        np.savez(path, x=np.random.default_rng(0).random((6, 3, 3, 3), np.float32), y=np.arange(6) % 3)
    elif name == "images":
        from PIL import Image

        for label in ("cat", "dog"):
            (path / label).mkdir(parents=True)
            for k in range(3):
                Image.fromarray(np.full((6, 6), 40 * k, np.uint8)).save(path / label / f"{k}.png")
    elif name == "linked":
        path.mkdir()
        for label in ("cat", "dog"):
            (path / label).symlink_to(Path(file("images")) / label)
    elif name == "weights.pt":
        torch.save(LINEAR.state_dict(), path)
    elif name == "net.py":
        path.write_text(
            "from torch import nn\n\ndef make():\n    return nn.Linear(4, 3)\n\n\ndef sized(n: int):\n"
            "    return nn.Linear(4, n)\n"
        )
    elif name == "guard.yaml":
        holdfast.init(path, guard=True)
    elif name == "guard-of-files.yaml":
        path.write_text("inputs: {kind: files, shape: [9]}\nrules: {energy: {}}\n")
    elif name == "carded.safetensors":
        path.write_bytes(b"")
        path.with_name(CARD).write_text("{}")
    elif name == "query.vnnlib":
        declared = "(declare-const X_0 Real)(declare-const Y_0 Real)"
        path.write_text(f"{declared}(assert (<= X_0 1))(assert (>= X_0 0))(assert (<= Y_0 0))")
    elif name == "holdfast.yaml":
        path.write_text("seed: 0")
    elif name == "whole.pt":
        torch.save(LINEAR, path)
    return str(path)


# -- models


class Scores(nn.Module):
    """A network whose forward is a function."""

    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(4, 3), function

    def forward(self, x):
        return self.function(self.linear, x)


def of(function):
    return Scores(function).eval()


def saved_in_place(linear, x):
    h = torch.sigmoid(linear(x))
    y = h * h
    h += 1
    return y


def only_four(linear, x):
    assert len(x) <= 4
    return linear(x)


def of_erfc():
    """A network with a function of which bounds are known, and no Lipschitz constant."""
    register("aten.erfc", torch.erfc, 1.0)
    return of(lambda f, x: torch.erfc(f(x)))


def in_range(linear, x):
    if bool((x < 0).any() | (x > 1).any()):
        raise ValueError("inputs from 0 to 1 were expected")
    return linear(x)


def trigger_file() -> str:
    """The path of a file with a trigger."""
    write_trigger(FOLDER / "found.npz", Trigger(torch.ones(1, 2, 2), torch.ones(1, 2, 2), 0))
    return str(FOLDER / "found.npz")


def settled(threat, recipe):
    """The settings of a hardening, which are refused for threats of no recipe."""
    refuse_unheld(parse_threat(threat).opened(), recipe)
    return build_recipe({"use": "pgd" if recipe == "auto" else recipe})


@dataclasses.dataclass(frozen=True)
class Inside:
    value: int = 1


@dataclasses.dataclass(frozen=True)
class Part:
    value: int
    inside: Inside = Inside()


def built_part(part):
    return built(Part, part, "the part", "part")


def gained(threat, recipe):
    """The norm of the gains of a recipe, of which some need one."""
    return recipe != "lipschitz" or order_of(parse_threat(threat).opened().constraint)


def recipe_of(recipe):
    return build_recipe(recipe)


def code_of_config(surrogates=()):
    """A configuration whose surrogate is code."""
    settings = check_settings({"surrogates": [{"model": "net.py:make"}]}, "", kind=Assess)
    refuse_code_of_config(settings, {"config": "holdfast.yaml", "surrogates": surrogates})


def functions_of_config(recipe=()):
    """A configuration with a function in the recipe, and the settings of the recipe on the command line."""
    content = {"recipe": {"use": "pgd", "training": {"optimizer": "optim.py:make"}}}
    typed = dict(recipe).get("training", {})
    sets = tuple(f"recipe.training.{key}={value}" for key, value in typed.items())
    refuse_code_of_config(check_settings(content, "", kind=Harden), {"config": "holdfast.yaml", "sets": sets})


def log_of_config(log=()):
    settings = check_settings({"log": ["csv:a.csv", "mlflow:https://h/"]}, "", kind=Harden)
    refuse_logs_of_config(settings, {"config": "holdfast.yaml", "log": log})


def denoised(recipe):
    batch = Batch(X, Y, torch.arange(len(X)))
    return _with_denoiser(
        DescribedModel(Classifier(LINEAR), ""),
        {"use": recipe, **({"sigma": 0.1} if "nois" in recipe else {})},
        batch,
        0,
    )


def estimated(metric, baseline=None):
    return estimate(metric, assessed(suite="pgd").evidence, baseline=baseline)


def across_metric(across=()):
    return across_rows(assessed(suite="pgd", across=across).evidence)


def plan_of_detector(threat):
    detector = holdfast.with_detector(LINEAR, lambda x: x.sum(1), 9.0)
    return assessed(model=detector, threat=threat, suite="fog" if threat.startswith("corruptions") else "pgd")


def normalised_data():
    """Inputs and labels of a network that expects the normalisation of MNIST."""
    x = 0.26 * torch.rand(60, 4)
    return x, (x.mean(1) <= 0.1307).long()


def halves():
    """Inputs, and whether their mean is below a half."""
    x = torch.rand(60, 4)
    return x, (x.mean(1) <= 0.5).long()


def rows_of_images():
    """Images whose first channel is last, and their labels."""
    x = torch.rand(60, 3, 3, 3)
    return x, (x[..., 0].mean((1, 2)) <= 0.5).long()


def misfitting(model, data, open_data=()):
    """The finding about data that an assessment raises as a doubt."""
    x, y = data
    if dict(open_data).get("layout") == "hwc":
        x = x.movedim(-1, 1)
    finding, _ = misfit(Classifier(model), Batch(x, y, torch.arange(len(x))), 32)
    if finding is not None:
        raise TargetError(finding.message, *finding.remedies)


def two_classes(values):
    return torch.stack((values, -values), 1)


def many_words(open_data=()):
    """Labels that are rather ids than classes."""
    if not dict(open_data).get("label"):
        n = MOST_NAMES + 1
        numbered_words(list(map(str, range(n))), np.arange(n), DeclaredData(), "data")


def declared_names(open_model=()):
    names = dict(open_model).get("class_names")
    return matched(("cat", "dog"), DeclaredData(class_names=names, names_declared=names is not None))


def guarded(open_model=()):
    model = Classifier(LINEAR)
    model.remote = True
    if guard := dict(open_model).get("guard"):
        guarded_subject(DescribedModel(model, ""), guard)


def bounded(threat, geometry=None):
    if geometry:
        boundary_geometry(Classifier(LINEAR), Batch(X[:1], Y[:1], Y[:1]), parse_threat(threat).opened(), 0)


def fitting(network=()):
    """The networks of a query."""
    files = dict(network)
    query = read_query(Path(file("query.vnnlib")))
    declared = dataclasses.replace(query.networks[0], name="net")
    _needed(dataclasses.replace(query, version="2.0", networks=(declared,)), {name: name for name in files})


def decided(networks=()):
    query = read_query(Path(file("query.vnnlib")))
    declared = dataclasses.replace(query.networks[0], name="net")
    network = SimpleNamespace(input_shape=declared.input.shape, output_shape=declared.output.shape)
    with suppress(AttributeError):
        _fitting(declared, dict.fromkeys(dict(networks), network))


def with_free_sizes(open_model=()):
    onnx = pytest.importorskip("onnx")
    value = onnx.helper.make_tensor_value_info("x", 1, ["N", 3, "H", "W"])
    _filled((None, 3, None, None), dict(open_model).get("input_shape"), value, Path("m.onnx"))


def commanded(words):
    (vnn if words[0] == "verify" and words[1].endswith(".vnnlib") else verbs).main(
        list(words), prog_name="holdfast", standalone_mode=False
    )


def raised(error):
    raise error


def numbered_classes(names=("1", "10", "2"), classes=3, *, remote=False, open_model=()):
    options = dict(open_model)
    if options.get("http_labels"):
        return None
    declared, probed = options.get("class_names"), Classifier(LINEAR)
    probed.remote = remote
    expected = DeclaredData(
        class_names=None if declared is None else tuple(declared),
        names_declared=declared is not None,
        class_order=options.get("class_order"),
        probe=ProbedClassifier(probed) if remote else None,
    )
    return class_numbers(list(names), expected, classes, "data", "class folders")


def of_layouts():
    """A network that accepts images (3, 3, 3) in each order of the axes."""
    return nn.Sequential(nn.Flatten(), nn.Linear(27, 3))


def of_signals():
    """A network that accepts grey images and signals of six values."""
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 3))


def examined(model, data=PAIR, suite="", open_data=(), **arguments):
    """The first finding of `doctor` that names a remedy, as an error; none once a suite is chosen for it."""
    if suite:
        return
    for finding in holdfast.doctor(model, given_data(data, dict(open_data)), **arguments):
        if finding.remedies:
            raise TargetError(finding.message, *finding.remedies)


def named(n, open_model=()):
    """The finding of `doctor` about `n` examples with text labels, whose order is c, a, b."""
    y = np.arange(n) % 3
    model = holdfast.open_model(lambda x: 9 * x, **dict(open_model))
    examined(model, (torch.eye(3)[y], np.array(["c", "a", "b"])[y]))


def swapped():
    """An archive whose inputs are called y and whose labels are called x."""
    np.savez(FOLDER / "swapped.npz", x=Y.numpy(), y=X.numpy())
    return str(FOLDER / "swapped.npz")


SHIFTED = torch.rand(60, 4)
CENTRED = of(lambda f, x: 50 * (x - 0.5) @ torch.eye(4)[:, :3])


def server(*script):
    """A server that stays until the tests end."""
    return Server(script)


def served_data():
    return served_examples(6)


def labelled(open_model=()):
    """Labels of a served model, of which one is beyond its scores."""
    options = dict(open_model)
    if not options.get("http_labels"):
        raise off_range(0, 4, 3, "data", remote=True)


def inspected(open_model=()):
    counter = InspectionCounter(4)
    counter.totals.refused = 1
    counter.sending(dict(open_model).get("http_max_rows", 64))


def served(**arguments):
    return check_settings(arguments, "", kind=Serve)


def monitored_samples(**arguments):
    _refuse_mixed(check_settings(arguments, "", kind=Monitor))


def monitored(reference=None, n=60, **arguments):
    """The checks of a stream and a reference, without the tests."""
    settings = check_settings(arguments, "", kind=Monitor)
    if reference is None:
        holdfast.monitor(X, None)
    _refuse_data(
        settings,
        as_data((reference, torch.zeros(len(reference)))),
        as_data((X[:1].repeat(n, 1), torch.zeros(n))),
    )


def rotated(**arguments):
    return check_settings(arguments, "", kind=RotateSettings)


def clustered(model=None, **arguments):
    """The options of a cluster."""
    options = {**arguments, **arguments.pop("Ray", {})}
    options.pop("Ray", None)
    settings = check_settings({"model": model, **options}, "", kind=Assess)
    settings.refuse_unusable_cluster()
    return settings.ray_options(arguments.get("device", "cpu"))


SITUATIONS: dict[str, Callable[[], Situation]] = {}


def situation(
    name: str, call, values: Mapping[str, Any] | None = None, replaced=(), only=(), **arguments
) -> None:
    """Add a situation. An argument of type `Later` is created when the situation is built."""

    def built() -> Situation:
        evaluated = {key: value() if isinstance(value, Later) else value for key, value in arguments.items()}
        return Situation(call, evaluated, {**VALUES, **(values or {})}, tuple(replaced), tuple(only))

    assert name not in SITUATIONS, name
    SITUATIONS[name] = built


@dataclasses.dataclass(frozen=True)
class Later:
    """An argument that is created when its situation is built."""

    create: Callable[[], Any]

    def __call__(self):
        return self.create()


def member_examples(n, seed):
    x = torch.rand(n, 4, generator=torch.Generator().manual_seed(seed))
    return x, LINEAR(x).argmax(1)


def membership_audited(model=LINEAR, data=None, **arguments):
    holdfast.audit.membership(
        model, data or member_examples(240, 0), **{"fpr": 0.1, "epochs": 1, "device": "cpu", **arguments}
    )


def sorted_by_class(n):
    """Examples of two classes, one after the other."""
    x, _ = member_examples(n, 0)
    return x, torch.arange(n) * 2 // n


def backdoor_audited(controls=None, train_controls=None, data=None, **settings):
    """The audit of a network, prepared and not run: its controls are given, trained or none."""
    settings = AuditBackdoor(
        model=LINEAR,
        data=data or member_examples(40, 0),
        controls=controls,
        train_controls=train_controls,
        **settings,
    )
    with prepared_backdoor(settings, AuditStart(None, resume=False, notify=ignore)) as audit:
        refuse_unmet(audit.needs)
        return audit


def extraction_prepared(model=LINEAR, data="members", **settings):
    """The audit of extraction, prepared and not run."""
    data = member_examples(40, 0) if data == "members" else data
    given = {"model": model, "data": data, "queries": "10", **settings}
    settings = check_settings(
        {name: value for name, value in given.items() if value is not None}, "", kind=AuditExtraction
    )
    with prepared_extraction(settings, AuditStart(None, resume=False, notify=ignore)) as audit:
        return audit


def candidate_calibrated(n=None, sample=None):
    """The calibration of a guard for a candidate, as a test before it is trained."""
    guard = Path(mkdtemp()) / "guard.yaml"
    guard.write_text("inputs: {shape: [4], low: 0, high: 1}\nfalse_positives: 0.05\nrules: {energy: {}}\n")
    settings = Calibrate(model=LINEAR, data=member_examples(60, 0), guard=str(guard))
    settings.run()
    refuse_uncalibratable(settings.model_copy(update={"n": n, "sample": sample}))


def of_policies(**arguments):
    """The settings of an assessment of a policy, and the policy and its environment, without a run."""
    given = {"model": lambda x: x[:, :1], "data": "cartpole", "threat": "observations:linf:0.1"}
    settings = check_settings({**given, **arguments}, "", kind=Assess)
    refuse_other_settings(settings)
    open_episodes(settings)


def policy_estimated(*, dry_run=False, **arguments):
    """The cost of an assessment of a policy if it is a dry run, and its settings otherwise."""
    given = {"model": lambda x: x[:, :1], "data": "cartpole", "threat": "observations:linf:0.1"}
    settings = check_settings({**given, **arguments}, "", kind=Assess)
    if dry_run:
        cost_estimated(settings)


def of_environment(**arguments):
    """The settings of an assessment in a bundled environment, without a run."""
    check_settings({"model": LINEAR, "data": "cartpole", **arguments}, "", kind=Assess)


@cache
def run_of_policy():
    """The folder of a finished run with a policy."""
    episode = {"model": lambda x: x[:, :1], "data": "cartpole", "threat": "parameters:mass=0.1", "n": 2}
    folder = Path(mkdtemp()) / "run"
    Assess(**episode).run(folder)
    return folder


def episode_explained(**arguments):
    """The explanation of a stored run with a policy."""
    holdfast.explain(run_of_policy(), **arguments)


def policy_hardened(**arguments):
    """The settings of a hardening of a policy or a classifier, without a run."""
    check_settings({"model": LINEAR, "data": PAIR, "budget": "1min", **arguments}, "", kind=Harden)


def explained(index=None, **settings):
    holdfast.explain(LINEAR, *member_examples(20, 0), "linf:0.1", index=index, **settings)


def number_explained(index=1, **settings):
    """The explanation of an example of a regression."""
    net = nn.Linear(4, 1)
    x = torch.rand(5, 4)
    y = net(x)[:, 0].detach()
    holdfast.explain(net, x, y, "linf:0.1", tolerance="1", index=index, **settings)


def short_control_training(train_controls="1s"):
    refuse_short(seconds(train_controls, ""), epoch_s=0.2, n=20)


def served_membership(train=None, **arguments):
    x, y = served_examples(120)
    model = holdfast.open_model((address := server()).url(), allow_hosts=[address.host])
    outside = (x + 0.01, y)
    membership_audited(model, (x, y), train=train, non_members=outside, references=2, **arguments)


VALUES: dict[str, Any] = {
    "fit": (torch.rand(12, 4), Y),
    "surrogates": [nn.Linear(4, 3)],
    "members": [LINEAR, nn.Linear(4, 3)],
    "sigma": 0.02,
    "class_names": ["a", "b", "c"],
    "classes": 3,
    "recipe.others": "l2:0.1",
    "sampling_rate": 8000,
}

situation("a setting that policies do not have", of_policies, suite="quick")
situation("a policy on a GPU", of_policies, device="cuda")
situation("the cost of a policy", policy_estimated, dry_run=True)
situation("an environment under a norm", of_environment, threat="linf:0.1")
situation("an example of a policy", episode_explained, index=3)
situation("an architecture without weights of a policy", of_policies, arch="net.py:make")
situation(
    "a recipe for policies under a norm", policy_hardened, threat="linf:0.1", recipe={"use": "robust-policy"}
)
situation(
    "a recipe for classifiers of a policy",
    policy_hardened,
    threat="observations:linf:0.1",
    recipe={"use": "pgd"},
)
situation("a room without a sampling rate", opened, transform="room=1,shift=0.1s")
situation("a row number beyond the data", explained, index=50)
situation("an example that is not shown", explained, index=3, examples=False)
situation("a regression without an example", number_explained, index=None)
situation("training examples of a regression", number_explained, train=PAIR)

# arguments of the Python functions
for misspelt, function, more in (
    ("eps=0.01", assessed, {}),
    ("gate='clean_accuracy >= 0'", assessed, {}),
    ("attack='pgd'", assessed, {}),
    ("attacks=PGD(steps=2)", assessed, {}),
    ("steps=3", assessed, {}),
    ("steps=3", verified, {}),
    ("attack='pgd'", verified, {}),
    ("attack='pgd'", hardened, {}),
    ("steps=3", hardened, {}),
    ("suite='pgd'", attacked, {}),
    ("eps=0.01", attacked, {}),
    ("norm='l2'", assessed, {}),
    ("norm='linf'", assessed, {"threat": "linf:0.01"}),
    ("attacks=['pgd']", attacked, {}),
    ("time_limit=20", assessed, {}),
    ("epochs=3", hardened, {}),
):
    key, _, text = misspelt.partition("=")
    value = eval(text, {"PGD": PGD})
    if key == "suite" or function is attacked:
        more = {**more, key: value}
    situation(
        f"{function.__name__} {' '.join((misspelt, *more.values()) if key == 'norm' else (misspelt,))}",
        function,
        {
            "suite": PGD(steps=2) if key == "attacks" else {"use": "pgd", "steps": 3},
            "recipe": {"use": "pgd", "steps": 3}
            if key == "steps"
            else {"use": "pgd", "training": {"epochs": 3}},
        },
        replaced=(key,),
        **{**more, key: value},
    )

# planning
situation("curve without a norm", planned, threat="corruptions:3", suite="corruptions", curve=True)
situation(
    "gate against no run", assessed, {"baseline": Later(baseline)}, gates=["regression <= 0.1 vs baseline"]
)
situation("a baseline without adversarial examples", assessed, suite="pgd", baseline=Later(baseline))
STORED = Later(lambda: assessed(threat="linf:0.5", suite="pgd", save_adversarial=True))
for name, settings in {
    "a baseline of an attacker with more access": {
        "threat": "linf:0.5,access=scores,queries=9",
        "suite": "square",
    },
    "a baseline of other data": {"data": (X / 2, Y), "threat": "linf:0.5", "suite": "pgd"},
    "a baseline under another norm": {"threat": "l2:0.5", "suite": "pgd"},
    "a baseline of the smallest change": {"threat": "linf", "suite": "minimum-norm"},
}.items():
    situation(name, assessed, baseline=STORED, **settings)
situation("certify of the smallest change", planned, threat="linf:0.1", suite="minimum-norm", certify=True)
situation("adaptive without doubts", planned, adaptive=True, doubts=False)
situation("adaptive of the smallest change", planned, threat="l2:0.1", suite="minimum-norm", adaptive=True)
situation("adaptive without eps", planned, threat="l2", suite="minimum-norm", adaptive=True)
situation("a budget without adaptive attacks", planned, adaptive_budget=100)
situation("all adversarial examples and none", planned, save_adversarial=True, examples=False)
situation("no eps", planned, threat="l2")
situation("no eps with scores", planned, threat="l2,access=scores,queries=9")
situation("certify scores without eps", planned, threat="linf,access=scores,queries=9", certify=True)
situation("a corruption under a norm", planned, attacks=[{"use": "Corruption", "name": "fog"}])
situation("an attack under corruptions", planned, threat="corruptions:3", suite="pgd")
situation("an attack under a trigger", planned, threat=Later(lambda: f"trigger:{file('t.npz')}"), suite="pgd")
situation(
    "trusted examples of another shape",
    holdfast.audit.poison,
    data=(IMAGES, torch.arange(8) % 2),
    model=nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4, 2)),
    clean=(IMAGES[:, :, :4], torch.arange(8) % 2),
)
situation(
    "trusted examples of other classes",
    holdfast.audit.poison,
    data=PAIR,
    model=LINEAR,
    clean=(X[Y.eq(Y[0])], Y[Y.eq(Y[0])]),
)
situation("the first examples of a sorted file", backdoor_audited, data=sorted_by_class(40), n=15)
situation("audited examples that are trusted", holdfast.audit.poison, data=PAIR, model=LINEAR, clean=PAIR)
situation("members of another model", planned, model="mnist-cnn", members=[LINEAR, LINEAR])
situation("an ensemble of one", planned, model="ensemble:", members=[LINEAR])
situation(
    "an architecture of an ensemble", planned, model="ensemble:", members=[LINEAR, LINEAR], arch="net.py:make"
)
situation(
    "inputs of an ensemble",
    opened,
    model="ensemble:",
    open_model={"members": [LINEAR, LINEAR], "input_shape": (4,)},
)
situation("no suite of corruptions", planned, threat="corruptions:3", suite="rand")
situation("no suite on texts", planned, threat="text:edits=1,words=1", suite="rand")
situation("no such device", planned, device="cuda:99")
situation("certify under no norm", planned, threat="l0:1", certify=True)
situation("certify without eps", planned, threat="linf", suite="minimum-norm", certify=True)
situation("certify eps 0", planned, threat="linf:0", certify=True)
situation("an adaptive attack by name", planned, replaced=["suite"], suite="EOT")

for key, value in (("ship", ["a.py"]), ("mixed_nodes", True)):
    situation(f"{key} of a local run", planned, **{key: value})
situation("a cluster without workers", clustered, on="ray")
situation("a guard on a cluster", lambda **on: Assess(guard="guard.yaml", workers=2, **on), on="ray")
situation("a size as a threat", attacked, threat=0.1)
situation(
    "a shape of a network that is trained",
    lambda open_model=(): holdfast.Harden(model=given("net.onnx", dict(open_model))),
    open_model={"input_shape": (4,)},
)

# the model and its outputs
unit = torch.linspace(0.1, 0.9, 12)
situation("one number", opened, model=lambda x: x[:, :1], data=(X, Y.clamp_max(1)))
situation(
    "no probability",
    assessed,
    model=lambda x: x[:, :1] * 9,
    open_model={"model_output": "probability"},
    data=(X, Y.clamp_max(1)),
)
situation("other classes", assessed, open_model={"classes": 4})
NUMPY = of(lambda f, x: f(torch.from_numpy(x.numpy())).numpy())
situation("numpy inside", assessed, n=2, model=NUMPY, suite="pgd")
situation(
    "numpy inside one attack", assessed, n=2, model=NUMPY, threat="l2:0.1,queries=9", suite="pgd,square"
)
situation("small batches", assessed, model=Later(lambda: Classifier(of(only_four))))
situation("the channels last", opened, model=Later(convolutional), data=(IMAGES.movedim(1, -1), Y[:8]))

# the data
situation(
    "beyond the bounds",
    opened,
    {"data_normalised": ([0.5], [2.0])},
    data=(torch.cat((X, 5 * X)) - 1, Y.repeat(2)),
)
situation("beyond other bounds", opened, data=(X * 90, Y), bounds=(0, 2))
situation(
    "bytes",
    opened,
    {"data_normalised": ([0.5], [0.5])},
    data=(IMAGES * 200, Y[:8] * 0),
    model=nn.Sequential(nn.Flatten(), nn.Linear(36, 3)),
)
situation(
    "samples of audio",
    opened,
    model=nn.Sequential(nn.Flatten(), nn.Linear(6, 3)),
    data=((X[:, None, :].repeat(1, 1, 2)[..., :6] * 9000 - 4500).to(torch.int16), Y),
)
situation("pixels declared as normalised", opened, data=(X, Y), data_normalised=([0.5], [0.2]))
situation("normalised on another scale", opened, data=(X * 2 - 1, Y), data_normalised=([127.5], [127.5]))
situation("split of one set", opened, data=Later(lambda: file("one.npz")), open_data={"split": "val"})
situation("no arrays", opened, {"x": "images", "y": "targets"}, data=Later(lambda: file("named.npz")))
situation("labels of another name", opened, {"y": "targets"}, data=Later(lambda: file("other-labels.npz")))
situation(
    "one array",
    opened,
    {"x": "images", "y": "targets"},
    data=Later(lambda: file("named.npz")),
    open_data={"x": "images"},
)
situation(
    "split of arrays",
    opened,
    data=Later(lambda: file("named.npz")),
    open_data={"x": "images", "y": "targets", "split": "test"},
)
situation("drop of arrays", opened, data=Later(lambda: file("one.npz")), open_data={"drop": ["a"]})
situation(
    "arrays of a table",
    opened,
    {"label": "label"},
    data=Later(lambda: file("numbers.csv")),
    open_data={"x": "a", "y": "b"},
)
situation(
    "separator of arrays",
    opened,
    data=Later(lambda: file("one.npz")),
    open_data={"separator": ";"},
)
situation("entries of a mapping", opened, data={"images": X, "targets": Y})
situation("entries of a pair", opened, data=[(X, Y)], open_data={"x": "images"})
situation(
    "features with different ranges",
    lambda data, threat="linf:0.05", bounds=None, open_data=(): (
        parse_threat(threat),
        opened(data=data, open_data=open_data, **({} if bounds is None else {"bounds": bounds})),
    ),
    {"bounds": ([0] * 4, [100] * 4)},
    only=("bounds",),
    data=Later(lambda: file("unscaled.csv")),
    open_data={"label": "label"},
)
situation(
    "units with narrow bounds",
    assessed,
    {"bounds": ([0] * 4, [100] * 4)},
    bounds=([0] * 4, [10] * 4),
    data=Later(lambda: file("unscaled.csv")),
    open_data={"label": "label"},
    threat="linf:0.05,unit=range",
)
situation(
    "the name of a file as bounds",
    lambda bounds: check_settings({"bounds": bounds}, "", kind=Serve),
    bounds=Later(lambda: file("bounds.json")),
)
situation("a misspelt label", opened, data=Later(lambda: file("numbers.csv")), open_data={"label": "labl"})
situation(
    "more columns than the model's, without a header",
    opened_by_names,
    {"drop": ["3"]},
    data=Later(lambda: file("no-header.csv")),
    open_data={"label": "4", "header": False},
)
situation(
    "bounds of each feature of a server",
    lambda bounds: range_of_all(check_settings({"bounds": bounds}, "", kind=Serve), "a server"),
    bounds=([0, 0, 0, 0], [1, 2, 3, 4]),
)
situation("a model of generated samples", monitored_samples, generated=True, model="mnist-cnn")
situation("features of other samples", monitored_samples, features="mnist-cnn")
situation("no reference", monitored, {"reference": torch.rand(200, 4)})
situation("a stream shorter than a window", monitored, reference=torch.rand(400, 4), alarm="ks")
situation("no device of torch", planned, device="mps")
situation("no label", opened, {"label": "label"}, data=Later(lambda: file("numbers.csv")))
TEXTS = {"model": lambda texts: torch.rand(len(texts), 2), "threat": "text:edits=1,words=1"}
situation("bounds of texts", opened, **TEXTS, data=(["a", "b"], [0, 1]), bounds=(0, 2))
for name, column in (("two columns of texts", None), ("texts that are labels", "label")):
    situation(
        name,
        opened,
        {"x": "name"},
        **TEXTS,
        data=Later(lambda: file("texts.csv")),
        open_data={"label": "label", **({"x": column} if column else {})},
    )
situation(
    "a recipe under rules of a table",
    settled,
    threat=Later(lambda: f"table:{file('rules.json')}"),
    recipe="mart",
)
situation("partitions under a norm", settled, threat="linf:0.1", recipe="partitions")
situation("another recipe for training sets", settled, threat="training-set:2", recipe="pgd")
situation(
    "a budget of partitions",
    lambda **arguments: _with_threat_of_recipe(Harden(model=LINEAR, data=PAIR, **arguments)),
    recipe="partitions",
    budget="1min",
)
situation("a learned strategy under l1", trained, recipe="policy", threat="l1:1")
situation(
    "a budget and a number of passes",
    lambda budget=None: _refuse_two_limits(budget, PolicyTraining(passes=5.0)),
    budget="1min",
)
situation(
    "partitions in a pool",
    lambda recipe: rotation_recipe(RotateSettings(model="mnist-cnn", recipe=recipe)),
    recipe={"use": "partitions"},
)
situation("a suite for training sets", planned, threat="training-set:2", suite="fast")
situation(
    "a suite for partitions",
    lambda **arguments: assess_request(Harden(model=LINEAR, data=PAIR, threat="training-set:2", **arguments)),
    suite="fast",
)
situation("an attack for training sets", attacked, threat="training-set:2", attack=PGD(steps=2))
situation("partitions certify no norm", certified, method="partitions")
situation(
    "a column of identifiers",
    lambda drop: drafted(Path(file("identifiers.csv")), "label", tuple(drop), None),
    drop=(),
)
situation(
    "a synthetic table without the column of labels",
    lambda drop: open_mixed(
        [TableFile(Path(file(name))) for name in ("numbers.csv", "unlabelled.csv")], drop
    ),
    drop=(),
)
situation("text columns", opened, data=Later(lambda: file("table.csv")), open_data={"label": "label"})
situation(
    "columns in one",
    opened,
    data=Later(lambda: file("table.csv")),
    open_data={"label": "label", "drop": ["name,a"]},
)
situation(
    "a column that the rules do not list",
    opened,
    data=Later(lambda: file("table.csv")),
    open_data={"label": "label"},
    threat=Later(lambda: f"table:{file('rules.json')}"),
)
situation(
    "label dropped",
    opened,
    data=Later(lambda: file("numbers.csv")),
    open_data={"label": "label", "drop": ["label"]},
)
situation(
    "split of a table",
    opened,
    data=Later(lambda: file("numbers.csv")),
    open_data={"label": "label", "split": "val"},
)
flat_images = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
situation(
    "split of a folder",
    opened,
    model=flat_images,
    data=Later(lambda: file("images")),
    open_data={"split": "val"},
)
situation("links out of a folder", opened, model=flat_images, data=Later(lambda: file("linked")))
situation(
    "layout of a folder",
    opened,
    model=flat_images,
    data=Later(lambda: file("images")),
    open_data={"layout": "hwc"},
)
situation(
    "normalised folder",
    opened,
    model=flat_images,
    data=Later(lambda: file("images")),
    data_normalised=([0.5], [0.5]),
)
situation(
    "other names",
    opened,
    {"class_names": ["cat", "dog"]},
    model=flat_images,
    data=Later(lambda: file("images")),
    open_model={"class_names": ["ant", "bee"]},
)
situation(
    "fewer folders",
    opened,
    {"class_names": ["ant", "cat", "dog"]},
    model=nn.Sequential(nn.Flatten(), nn.Linear(36, 3)),
    data=Later(lambda: file("images")),
)

# attacks and access
situation("no gradients", hidden, model_access="scores", suite="standard")
situation("no gradients for one attack", hidden, threat="linf:0.01,access=scores", suite="pgd,square")
situation("no gradients for a curve", hidden, threat="linf:0.01,access=scores", suite="square", curve=True)
situation("no gradients in attack", attacked, threat="linf:0.5,access=scores,queries=20", attack="pgd")
situation("no access", hidden, threat="linf:0.01,access=none", suite="pgd")
situation("no surrogate", hidden, threat="linf:0.01", suite="transfer")
situation("examples for no learned attack", hidden, fit=PAIR)
situation("no examples for a learned attack", hidden, suite="universal")
images = {"model": Later(convolutional), "data": (IMAGES, Y[:8]), "n": 2}
situation(
    "surrogates under corruptions",
    assessed,
    threat="corruptions:3",
    suite="fog",
    surrogates=[LINEAR],
    **images,
)
situation(
    "surrogates under rotations",
    assessed,
    threat="spatial:rotate=10",
    suite="grid-search",
    surrogates=[LINEAR],
    **images,
)
situation("across without a norm", assessed, threat="linf", suite="fmn", across=[PAIR])
situation("across with a condition that ends a run", assessed, until="robust_accuracy >= 0.4", across=[PAIR])
situation(
    "a baseline with a condition that ends a run",
    assessed,
    threat="linf:0.5",
    suite="pgd",
    until="robust_accuracy >= 0.4",
    baseline=STORED,
)
situation("across towards a class", assessed, threat="linf:0.01,goal=targeted:1", across=[PAIR])
situation(
    "across without gradients",
    assessed,
    threat="linf:0.5,access=scores,queries=20",
    suite="square",
    across=[PAIR],
)
for eps in ("8", "25.5,access=scores", "300"):
    situation(f"eps {eps} beyond the bounds", assessed, suite="fgsm,square", threat=f"linf:{eps}")
for threat in ("linf=0.01", "l2,0.5,access=scores", "8/255", "linf:eps=0.01"):
    situation(f"the threat {threat}", lambda threat: planned(threat=threat, suite="square"), threat=threat)
situation("a threat that is a number", assessed, threat=0.01)
situation("a time without a unit", planned, time_budget=20)
situation(
    "time of a server without a unit",
    lambda open_model: holdfast.open_model("http://model.example", **open_model),
    open_model={"http_timeout": "20"},
)
situation("a gate that is no list", planned, gates="clean_accuracy >= 0")
for gate in (
    "attacked_f1 >= 0",
    "adversarial_radius >= 0",
    "robust_accuracy@0.3 >= 0",
    "certified_accuracy >= 0",
    "targeted_success_rate <= 1",
    "transfer_success <= 1",
    "suite_robust_accuracy >= 0",
):
    situation(
        f"gate {gate}",
        assessed,
        gates=[gate],
        **(
            {"threat": "linf", "suite": "fmn"}
            if "suite" in gate
            else {"suite": "pgd", "threat": "linf:0.5", "n": 2}
        ),
    )


# certification
torch.manual_seed(0)  # a network on which smoothing certifies examples
sorting = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), Sorted(), nn.Linear(4, 3))
situation("no bounds under linf", certified, model=sorting)
situation("no bounds under l2", certified, model=sorting, threat="l2:0.02")
situation("no bounds in assess", certified, model=sorting, verb="assess", certify=True)
RULES = Later(lambda: f"table:{file('rules.json')}")
situation("a network under rules", certified, threat=RULES)
situation("a network under rules in assess", certified, threat=RULES, verb="assess", certify=True)
situation("smoothing under linf", certified, method="smoothing", sigma=0.1, draws=500)
situation("smoothing under l0", certified, method="smoothing", sigma=0.1, draws=500, threat="l0:1")
situation("smoothing without sigma", certified, method="smoothing", threat="l2:0.02")
situation("smoothing with few draws", certified, method="smoothing", threat="l2:0.2", sigma=0.05, draws=20)
situation(
    "smoothing of a model with a range",
    certified,
    model=of(in_range),
    method="smoothing",
    threat="l2:0.02",
    sigma=0.1,
)
situation("sigma of another method", certified, method="ibp", sigma=0.1)
situation(
    "geometry of a regression",
    holdfast.certify,
    model=lambda x: x.mean(1, keepdim=True),
    data=(X, X.mean(1, keepdim=True)),
    threat="linf:0.01",
    tolerance="1",
    geometry=1,
)
MASKS = (np.full((4, 1, 8, 8), 0.4, np.float32), np.zeros((4, 8, 8), np.int64))


MEANS = (X, 0.1 + X.mean(1, keepdim=True))


def mean_of(x):
    return 0.1 + x.mean(1, keepdim=True)


def shades(x):
    return torch.cat((0.5 - x, x - 0.5), 1)


BOXES = np.array([[[2.0, 2.0, 6.0, 6.0, 0.0, 0.0]]] * 4, np.float32)


def one_box(x):
    scores = x[:, 0, 2:6, 2:6].mean((1, 2))
    box, label = torch.tensor([[2.0, 2.0, 6.0, 6.0]]), torch.zeros(1)
    return [{"boxes": box, "scores": each[None], "labels": label} for each in scores]


situation(
    "other attacks on patches beside objects",
    holdfast.assess,
    model=one_box,
    data=(MASKS[0], BOXES),
    task="detection",
    threat="patch:2x2,at=beside",
    suite="PGD",
    doubts=False,
)
situation(
    "masks that move", holdfast.assess, model=shades, data=MASKS, threat="spatial:rotate=5", doubts=False
)
situation(
    "a tolerance of masks", holdfast.assess, model=shades, data=MASKS, task="segmentation", tolerance="1"
)
situation("a regression without tolerance", holdfast.assess, model=mean_of, data=MEANS, task="regression")
situation(
    "a share of a target of 0",
    holdfast.assess,
    model=mean_of,
    data=(MEANS[0], MEANS[1] * 0),
    tolerance="10%",
    threat="linf:0.01",
)
situation("geometry of smoothing", certified, method="smoothing", threat="l2:0.02", sigma=0.1, geometry=1)
situation("lipschitz in float32", certified, method="lipschitz", threat="l2:0.02", arithmetic="float32")
situation("geometry in float32", certified, arithmetic="float32", geometry=1)
situation(
    "trees in float32",
    lambda **given: holdfast.certify(
        forest().net.interface.source, (X, Y), "linf:0.01", examples=False, **given
    ),
    arithmetic="float32",
)
situation(
    "geometry of an estimator",
    lambda **given: holdfast.certify(logistic(), (X, Y), "linf:0.01", "crown", examples=False, **given),
    geometry=1,
)
situation("masking of embeddings", certified, method="masking", threat="l2:0.1,on=embeddings,words=1")
situation("one mask for all places", certified_patches, masks=1)
situation("bounds for patches", certified_patches, method="crown")
situation("masks of patches under linf", certified_patches, method="patch-masks", threat="linf:0.1")
situation(
    "masks of patches under l2",
    lambda threat: masks_of_images(parse_threat(threat).opened(), PatchMasks(2)),
    threat="l2:0.1",
)
situation("proofs against patches beside attacks", planned, threat="patch:2x2", certify=True)
situation("bounds under edits of texts", certified_texts)
situation("bounds of a network for texts", certified_texts, method="crown")
situation("masks that keep too many words", certified_texts, method="masking", keep=0.6)
situation("bounds of trees", certified, model=Later(forest), method="crown", threat="linf:0.1")
situation("suite of trees under l2", planned, suite="trees", threat="l2:1")
situation("trees under l2", certified, model=Later(forest), method="trees", threat="l2:0.1")
situation("trees without veritas", certified_without_veritas, model=Later(forest), method="trees")
situation("lipschitz under linf", certified, method="lipschitz")
situation("no gain", certified, method="lipschitz", threat="l2:0.02", model=Later(of_erfc))
situation(
    "bounds of patches",
    lambda threat: region_of(X, parse_threat(threat).opened().constraint, Bounds()),
    threat="l0:1",
)

# training
ball = Batch(X, Y, torch.arange(len(X)))
situation(
    "no gradient of the input",
    trained,
    model=of(lambda f, x: f(x.detach())),
    recipe="gradient-regularisation",
)
situation(
    "gain of a parametrised weight",
    trained,
    recipe="lipschitz",
    model=Later(lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))),
)
situation(
    "mixed labels",
    trained,
    recipe={"use": "mart", "training": {"cutmix": 1.0}},
    model=Later(convolutional),
    data=Batch(IMAGES, Y[:8], torch.arange(8)),
)
situation("mixed images in atta", trained, recipe={"use": "atta", "training": {"cutmix": 1.0}})
situation(
    "own augmentation in atta",
    trained,
    recipe={"use": "atta", "training": {"augment": lambda x, y, generator: x}},
)
situation(
    "weights without labels", trained, recipe={"use": "vat", "training": {"class_weights": [1.0, 2.0, 1.0]}}
)
situation(
    "own optimiser in a rotation",
    lambda recipe: rotation_recipe(RotateSettings(model="mnist-cnn", recipe=recipe)),
    recipe={"use": "standard", "training": {"optimizer": "optim.py:make"}},
)
situation("no labels", trained, data=Batch(X, torch.where(torch.arange(12) > 6, -1, Y), torch.arange(12)))
situation(
    "infinite loss",
    lambda recipe: refuse_lost(torch.tensor([recipe["training"]["lr"]]) * 1e38, 0, recipe["training"]["lr"]),
    recipe={"training": {"lr": 10.0}},
)
situation("no other norms", trained, recipe={"use": "multi-norm", "others": ()})
situation("foreign norms", trained, recipe={"use": "multi-norm", "others": "l0:1"})
situation("a large delta", trained, recipe={"use": "dp-sgd", "delta": 0.5})
situation("gradients of a batch", trained, model=Later(centred), recipe="dp-sgd")
situation("privacy within a time", paced, budget="1min")
situation("privacy of no training", privacy, {"train": lambda x, y, seed: nn.Linear(4, 3)}, train=None)
situation("privacy without a claim", privacy, {"epsilon": 2}, epsilon=None, canaries=100)
situation("no sensitive column", attributes, {"sensitive": "of"}, sensitive=None)
situation("few known records", attributes, known=60)
situation("large batches", reconstructed, batch_size=(1, 16))
situation("no batch is small enough", reconstructed, batch_size=(16,))
situation("clipping without noise", reconstructed, {"noise": 1.0}, clip=1.0)
situation("noise without clipping", reconstructed, {"clip": 1.0}, noise=1.0)
situation(
    "clipping with batch normalisation",
    reconstructed,
    net=nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)),
    clip=1.0,
    noise=1.0,
)
situation("clipping of a given gradient", reconstructed, gradient=Later(shared_gradient), clip=1.0, noise=1.0)
situation("few canaries", privacy, canaries=10)
situation("more canaries than half of the examples", privacy, epsilon=4, canaries=100)
situation("a delta that hides all guesses", privacy, delta=0.05, canaries=100, canary="random")
situation("canaries of most examples", privacy, canaries=150)
situation("ensemble of one", trained, recipe="ensemble")
situation("no teacher", taught, {"recipe.teacher": "mnist-cnn"}, recipe="rslad")
situation("generated rows", trained, recipe="generated")
situation(
    "a collapsed generator",
    of_images,
    recipe={"use": "generated", "generator": 0.0, "training": {"batch": 8}},
)
situation(
    "a policy beside an augmentation",
    of_images,
    recipe={"use": "augment-policy", "training": {"augment": "shift"}},
)
situation(
    "a search for an own optimiser",
    of_images,
    recipe={"use": "tune", "training": {"optimizer": lambda weights: torch.optim.SGD(weights, 0.1)}},
)
situation("a search beside a warm-up", of_images, recipe={"use": "tune", "training": {"warmup": 0.5}})
situation("generated test images", with_samples, recipe={"use": "generated", "samples": samples_file()})
situation("help of a poor model", trained, model=Later(poor), recipe="hat")

# the answers of servers
ROWS = [{"a": 0.5, "b": 0.3, "c": 0.2}] * 2
TOP = [[{"label": "a", "score": 0.9}, {"label": "b", "score": 0.1}]] * 2
situation("a label", answered, answer=["a", "b"])
situation("labels without names", answered, answer=["a", "b"], open_model={"http_labels": True, "classes": 3})
situation(
    "other labels",
    answered,
    answer=["a", "z"],
    values={"class_names": ["a", "y", "z"]},
    open_model={"http_labels": True, "class_names": ["a", "b", "c"]},
)
situation("scores by name", answered, answer=ROWS)
situation(
    "scores by other names",
    answered,
    only=["class_names"],
    answer=ROWS,
    open_model={"class_names": ["a", "b", "d"]},
)
situation(
    "the best classes",
    answered,
    only=["http_labels"],
    answer=TOP,
    open_model={"class_names": ["a", "b", "c"]},
)
situation("the best classes without names", answered, only=["http_labels"], answer=TOP)
situation(
    "the best classes in a field",
    answered,
    only=["http_labels"],
    answer={"p": TOP, "scores": [[0.1, 0.2, 0.3]] * 2},
    open_model={"http_response": "p", "class_names": ["a", "b", "c"]},
)
situation(
    "the best classes of one row",
    answered,
    only=["http_labels"],
    answer=TOP[0],
    rows=1,
    open_model={"class_names": ["a", "b", "c"]},
)
situation("an axis too many", answered, {"http_response": "*.0"}, answer=[[[0.1, 0.2, 0.3]]] * 2)
situation("one row in the answer", answered, answer=lambda n: [[0.1, 0.2, 0.3]])
situation(
    "no row in the answer",
    answered,
    rows=1,
    answer={"scores": [[0.1, 0.2]], "x": [[0.1], [0.2]]},
    open_model={"http_response": "x"},
    values={"http_response": "scores"},
)
situation("class numbers", answered, only=["http_labels", "model_output"], answer=[1, 2])
situation(
    "class numbers beyond the classes",
    answered,
    answer=[1, 4],
    open_model={"http_labels": True, "classes": 3},
    values={"class_names": ["1", "4", "5"]},
)
situation(
    "scores for labels",
    answered,
    only=["http_labels", "http_response"],
    answer=[[0.1, 0.2, 0.7]] * 2,
    open_model={"http_labels": True, "classes": 3},
)
situation(
    "more scores",
    answered,
    only=["http_response"],
    answer={"scores": [[0.1, 0.2, 0.7]] * 2, "n": [1, 1]},
    open_model={"http_response": "n", "model_output": "logit", "classes": 3},
    values={"http_response": "scores"},
)
situation(
    "classes for scores",
    answered,
    only=["http_labels"],
    answer=[[1], [2]],
    open_model={"model_output": "logit", "classes": 3},
)
situation(
    "no such place",
    answered,
    answer={"scores": [[0.1, 0.2]] * 2},
    open_model={"http_response": "none"},
    values={"http_response": "scores"},
)
situation(
    "no numbers",
    answered,
    answer={"scores": [[0.1, 0.2]] * 2, "x": [{}]},
    open_model={"http_response": "x"},
    values={"http_response": "scores"},
)
TENSOR = {"outputs": [{"name": "p", "datatype": "FP32", "shape": [2, 3], "data": [0.1] * 6}]}
situation("another output", answered, shaped=True, answer=TENSOR, open_model={"http_response": "q"})


# gates and recipes in settings
situation("no reason", planned, {"accept_doubts": {"noise": "a reason"}}, accept_doubts={"noise": " "})
situation("a threat of no recipe", settled, threat="l0:3", recipe="auto")
situation("a threat of few recipes", settled, threat="patch:3x3", recipe="pgd")
situation("masked patches of numbers", settled, threat="linf:0.1", recipe="masked-patches")
situation(
    "masked patches under a norm",
    lambda threat: MaskedPatches().check(parse_threat(threat).opened()),
    threat="linf:0.1",
)
situation("a recipe of no trigger", settled, threat=f"trigger:{trigger_file()}", recipe="pgd")
situation("masked words of numbers", settled, threat="linf:0.1", recipe="masked-words")
situation("a recipe of no text", settled, threat="text:edits=1,words=2", recipe="pgd")
situation(
    "controls given twice",
    backdoor_audited,
    {"train_controls": None},
    controls=".",
    train_controls="1min",
)
situation(
    "a time of controls without a unit", backdoor_audited, train_controls="60", data=member_examples(2100, 0)
)
situation(
    "a time of controls that is a number", backdoor_audited, train_controls=2.5, data=member_examples(2100, 0)
)
situation(
    "a stream of another shape",
    backdoor_audited,
    {"stream": None},
    stream=(torch.zeros(9, 3), torch.zeros(9, dtype=torch.int64)),
)
situation("fewer queries than classes", extraction_prepared, queries="1,5", n=20)
situation("no inputs to send", extraction_prepared, {"pool": member_examples(40, 1)}, data=None)
situation(
    "a pool of test examples",
    extraction_prepared,
    {"pool": member_examples(40, 1)},
    pool=Later(member_examples(40, 0)[0].numpy),
)
situation(
    "a pool of another shape", extraction_prepared, n=20, pool=Later(lambda: np.zeros((9, 3), np.float32))
)
for name in ("controls", "train_controls"):
    situation(f"{name} without a suspect", extraction_prepared, **{name: "1min"})
situation(
    "controls of a suspect given twice",
    extraction_prepared,
    suspect=Later(lambda: nn.Linear(4, 3)),
    pool=Later(lambda: member_examples(40, 1)),
    controls="1min",
    train_controls="1min",
)
situation(
    "a guard beside a suspect",
    extraction_prepared,
    suspect=Later(lambda: nn.Linear(4, 3)),
    pool=Later(lambda: member_examples(40, 1)),
    guard="guard.yaml",
)
situation(
    "a suspect without training examples",
    extraction_prepared,
    {"data": member_examples(40, 0)},
    suspect=Later(lambda: nn.Linear(4, 3)),
    data=None,
    pool=Later(lambda: member_examples(40, 1)),
)
situation(
    "a suspect without other examples",
    extraction_prepared,
    {"pool": member_examples(40, 1)},
    suspect=Later(lambda: nn.Linear(4, 3)),
)
situation(
    "a suspect with equal examples",
    extraction_prepared,
    {"pool": member_examples(40, 1)},
    suspect=Later(lambda: nn.Linear(4, 3)),
    pool=Later(lambda: member_examples(40, 0)),
)
situation("too few inputs for a candidate", candidate_calibrated, n=15)
situation("too small a sample for a candidate", candidate_calibrated, sample=15)
situation("too little time for controls", short_control_training, train_controls="1s")
situation("no examples for controls", backdoor_audited, {"train_controls": None}, train_controls="1min")
situation(
    "a repair without a trigger",
    settled,
    {"threat": f"trigger:{trigger_file()}"},
    threat="linf:0.1",
    recipe="repair",
)
situation("no such recipe of a card", lambda recipe: build_recipe({"use": recipe}), recipe="standrad")
situation("a setting without a value", built_part, {"part.value": 1}, part={})
situation("bounds in training", trained, model=sorting, recipe="ibp")
situation("certified training under l2", trained, recipe="ibp", threat="l2:0.1")
situation("gain under l0", gained, threat="l0:1", recipe="lipschitz")
situation("a denoiser of tables", denoised, recipe="denoised")
situation(
    "metric of two runs", estimated, {"baseline": Later(lambda: baseline().evidence)}, metric="regression"
)
situation(
    "a gate of two runs",
    lambda gate, baseline=None: None if baseline else parse_gate(gate),
    {"baseline": True},
    gate="regression <= 0.1",
)
situation(
    "attacks under corruptions",
    lambda threat="corruptions:3", suite="pgd": (
        None
        if suite == "corruptions"
        else PGD(steps=1)(Classifier(LINEAR), Batch(X, Y, Y), parse_threat(threat).opened(), rng=Draws(0))
    ),
)
situation("corruptions and a detector", plan_of_detector, threat="corruptions:3")
situation(
    "no access at all", hidden, {"surrogates": [LINEAR]}, threat="linf:0.01,access=none", suite="square"
)
situation("across, of a run without", across_metric, {"across": [PAIR]})
situation(
    "a worst group of a run without groups",
    lambda groups=None: estimate("worst_group", assessed(suite="pgd", groups=groups).evidence),
    {"groups": np.arange(12) % 2},
)
situation("groups of an object", opened, groups="sex")
situation("one group", opened, groups=np.zeros(12))
situation("groups of a folder", opened, data=Later(lambda: file("images")), groups="sex")
for table, more in (("groups.csv", {"label": "label"}), ("groups.npz", {})):
    for misspelt_group in ("sxe", "unknown"):
        situation(
            f"groups {misspelt_group} of {table}",
            opened,
            {"groups": "sex"},
            data=Later(partial(file, table)),
            open_data=more,
            groups=misspelt_group,
        )
situation(
    "budget of one update",
    lambda budget: None if budget != "0.1s" else raised(too_small("pgd", 0.1, Pace(1.0, 1), 0.1)),
    budget="0.1s",
)
situation(
    "budget of one epoch",
    lambda budget, *, anyway=False: (
        raised(too_small("pgd", 9.0, Pace(1.0, 10), 0.1)) if budget == "9s" and not anyway else None
    ),
    budget="9s",
)

# more of the data and the models
situation(
    "n and sample",
    lambda n=None, sample=None: selected_rows(9, n=n, sample=sample, seed=0, name="data"),
    n=3,
    sample=3,
)
situation("ambiguous classes", numbered_classes, {"class_names": ["1", "2", "10"]})
situation(
    "more folders than classes of a server",
    numbered_classes,
    {"class_names": ["cat", "dog"]},
    names=("cat", "dog", "emu"),
    classes=2,
    remote=True,
)
situation(
    "an argument of a factory",
    opened,
    {"model_args": {"n": "3"}},
    model=Later(lambda: f"{file('net.py')}:sized"),
)
situation(
    "weights without a network",
    opened,
    {"arch": Later(lambda: f"{file('net.py')}:make")},
    model=Later(lambda: file("weights.pt")),
)
situation(
    "no such architecture",
    opened,
    {"arch": Later(lambda: f"{file('net.py')}:make")},
    model=Later(lambda: file("weights.pt")),
    open_model={"arch": "resnett"},
)
situation(
    "a network twice", opened, model=Later(lambda: f"{file('net.py')}:make"), open_model={"arch": "mlp"}
)
situation("a whole model", opened, model=Later(lambda: file("whole.pt")))
situation(
    "a whole model and a network",
    opened,
    model=Later(lambda: file("whole.pt")),
    open_model={"trust_code": True, "arch": "mlp"},
)
situation(
    "a shape of no ONNX",
    opened,
    model=Later(lambda: f"{file('net.py')}:make"),
    open_model={"input_shape": (4,)},
)
IN_12_BITS = ((4095 * IMAGES[:, 0]).numpy().astype(np.uint16), np.zeros(8, np.int64))
OF_IMAGES = of(lambda f, x: x.flatten(1)[:, :3])
situation("pixels without their bits", opened, model=OF_IMAGES, data=IN_12_BITS)
situation("pixels of more bits", opened, model=OF_IMAGES, data=IN_12_BITS, open_data={"bits": 10})
situation(
    "bits of floats", opened, model=OF_IMAGES, data=(IMAGES.numpy(), Y[:8].numpy()), open_data={"bits": 12}
)
situation("layout of a table", opened, data=(X.numpy(), Y.numpy()), open_data={"layout": "chw"})
situation(
    "no layout",
    opened,
    {"layout": "chw"},
    model=nn.Sequential(nn.Flatten(), nn.Linear(7, 3)),
    data=Later(lambda: file("square.npz")),
)
situation("two layouts", opened, model=Later(of_layouts), data=Later(lambda: file("square.npz")))
situation(
    "grey images or signals",
    opened,
    model=Later(of_signals),
    data=Later(lambda: file("grey.npz")),
    open_data={"layout": "hwc"},
)
situation(
    "an existing file",
    lambda path, force=False: holdfast.init(path, force=force),
    path=Later(lambda: file("holdfast.yaml")),
)

# doctor
FAILING, CUT = of(saved_in_place), of(lambda f, x: f(x.detach()))
for name, model, data, more in (
    ("a random model", of(lambda f, x: f(x) + torch.rand(3)), PAIR, {}),
    ("a cut gradient", CUT, (X, CUT(X).argmax(1)), {}),
    ("a failing gradient", FAILING, (X, FAILING(X).argmax(1)), {}),
    ("wide bounds", LINEAR, PAIR, {"bounds": (0, 255)}),
    ("bytes to 255", nn.Linear(4, 3), (X * 255, Y), {}),
):
    situation(
        f"doctor: {name}", examined, {"data_normalised": ([0.5], [0.5])}, model=model, data=data, **more
    )

# servers
situation("no allowed host", opened, model=Later(lambda: server().url()), data=Later(served_data))
situation(
    "a literal key",
    opened,
    only=["headers"],
    model=Later(lambda: server().url()),
    data=Later(served_data),
    open_model={"allow_hosts": ("127.0.0.1",), "headers": ("X-A: secret",)},
)
situation(
    "a header without a name",
    opened,
    only=["headers"],
    model=Later(lambda: server().url()),
    data=Later(served_data),
    open_model={"allow_hosts": ("127.0.0.1",), "headers": ("secret",)},
)
situation(
    "another service",
    opened,
    model=Later(lambda: server().url("/predict")),
    data=Later(served_data),
    open_model={"allow_hosts": ("127.0.0.1",)},
)
LABELS = {
    "allow_hosts": ("127.0.0.1",),
    "http_labels": True,
    "http_request": '{"instances": $x}',
    "http_response": "classes",
}
situation(
    "labels without classes",
    opened,
    {"class_names": ["cat", "dog", "emu"]},
    model=Later(lambda: server().url("/classify")),
    data=Later(served_data),
    open_model=LABELS,
)
situation(
    "classes and names",
    opened,
    model=Later(lambda: server().url("/classify")),
    data=Later(served_data),
    open_model={**LABELS, "classes": 2, "class_names": ["cat", "dog", "emu"]},
)
situation(
    "a slow server",
    assessed,
    model=Later(lambda: server(503).url()),
    data=Later(served_data),
    open_model={"allow_hosts": ("127.0.0.1",), "http_retries": 0},
    suite="black-box",
    threat="linf:0.01,queries=5",
)
situation("more labels than scores", labelled)
situation("too many rows of an inspection", inspected, {"http_max_rows": 2})
situation(
    "workers of a server",
    assessed,
    model=Later(lambda: server().url()),
    data=Later(served_data),
    open_model={"allow_hosts": ("127.0.0.1",)},
    workers=2,
    suite="black-box",
    threat="linf:0.01,queries=5",
)

# serve, rotate and clusters
situation("a public host without keys", served, {"keys": "keys.json"}, host="0.0.0.0")
situation(
    "a password in an address",
    served,
    {"keys": "keys.json"},
    replaced=["proxy"],
    proxy="http://a:b@127.0.0.1:9",
)
situation(
    "a model at a URL",
    lambda model=None, proxy=None: server_setup(served(**({"proxy": proxy} if proxy else {}), model=model)),
    replaced=["model"],
    model="http://127.0.0.1:9/v2/models/m",
)
situation("a vote over masks under a norm", served, masked_vote="linf:0.1")
situation("masks without a vote", served, masks=4)
situation(
    "a vote over masks beside a monitor",
    lambda **more: refuse_other_votes(served(**more), of_pool=False),
    masked_vote="patch:4x4",
    monitor="mnist-mini",
)
situation(
    "no input shape",
    lambda open_model=(): _shape(Serve(model=given(file("weights.pt"), dict(open_model))), "numbers"),
    {"input_shape": (4,)},
)
situation(
    "no largest length",
    lambda open_model=(): _shape(Serve(model=given(file("weights.pt"), dict(open_model))), "texts"),
    {"input_shape": (4,)},
)
situation(
    "settings of numbers for files",
    lambda **more: _refuse_numeric(served(model="net.py:make", **more), "files"),
    sampling_rate=8000,
    masked_vote="patch:4x4",
)
situation(
    "forwarded keys",
    lambda upstream_headers=(), forward_headers=(), keys=None: refuse_forwarded_keys(
        served(
            proxy="http://127.0.0.1:9",
            upstream_headers=list(upstream_headers),
            forward_headers=list(forward_headers),
            keys=keys,
        )
    ),
    replaced=["forward_headers"],
    forward_headers=["authorization"],
    keys="keys.json",
)
situation(
    "a model beside a proxy",
    lambda **more: _refuse_settings_of_models(served(proxy="http://127.0.0.1:9", **more)),
    classes=3,
    arch="mlp",
)
situation(
    "no swaps",
    lambda every=(), once=False: loop_settings(rotated(every=list(every)), None, immunising=False, once=once),
)
situation("a pool on a cluster", rotated, on="ray")
for name in ("tune", "league", "prune", "augment-policy", "policy", "rslad"):
    situation(f"{name} in a pool", lambda **more: rotation_recipe(rotated(**more)), recipe=name)
situation("a recipe for generators in a pool", rotated, recipe="robust-gan")
situation("a pool assessed on a cluster", clustered, model="rotating:pool", on="ray", workers=2)
situation("no GPU for workers", clustered, Ray={"gpus_per_worker": 0.0}, on="ray", workers=2, device="cuda")


# the command line
situation("code of a configuration", code_of_config, only=["surrogates"])
situation("functions of a configuration", functions_of_config, only=["recipe.training.optimizer"])
situation("a server for the log in a configuration", log_of_config)
for key, text in (("allow_hosts", "model.example"), ("headers", "X-A: env:TOKEN")):
    situation(
        f"{key} of a configuration",
        lambda key=key, text=text, **flags: refuse_hosts_of_config(InferenceSource(**{key: [text]}), flags),
    )
situation(
    "certify a server",
    commanded,
    {"threat": "l2:0.1"},
    words=Later(lambda: ("certify", "http://h/v2/models/m", file("one.npz"))),
)
situation("an empty head", commanded, words=("rotate", "status", "pool", "--expect-head", ""))
situation("nothing to serve", commanded, {"proxy": "http://127.0.0.1:9/x/y"}, words=("serve",))
situation(
    "no network of a query",
    commanded,
    {"network": "net=missing.onnx"},
    words=Later(lambda: ("verify", file("query.vnnlib"))),
)
situation(
    "pickled models",
    lambda workers=None: raised(unshared(TypeError("a lambda"))) if workers else None,
    workers=2,
)

situation(
    "parts as one value",
    recipe_of,
    {f"recipe.training.{name}": 1 for name in ("epochs", "batch", "lr")},
    recipe={"use": "pgd", "training": 3},
)
situation(
    "doctor: a missing normalisation",
    examined,
    model=lambda x: two_classes(x.mean(1)),
    data=Later(normalised_data),
)
situation(
    "doctor: another layout",
    misfitting,
    model=lambda x: two_classes(x[:, 0].mean((1, 2)) - 0.5),
    data=Later(rows_of_images),
)
situation(
    "doctor: a network of bytes", examined, model=lambda x: two_classes(x.mean(1) - 127.5), data=Later(halves)
)
situation("swapped arrays", opened, data=Later(swapped))
situation("doctor: class names in another order", named, n=60)
situation("doctor: too few examples for the order", named, {"class_names": ("c", "a", "b")}, n=12)
situation("a suite under a norm", hidden, suite="corruptions")
situation("transfer under rotations", hidden, threat="spatial:rotate=10", suite="transfer")
situation(
    "corruptions of tables",
    lambda threat: threat.startswith("corr") and refuse_no_images(X),
    threat="corruptions:3",
)
situation("answers of no server", opened, open_model={"keep_answers": True})
situation("a split of an object", opened, open_data={"split": "val", "label": "y"})
situation("a network of an object", opened, open_model={"arch": "mlp"})
situation("words of ids", many_words, {"label": "label"})
situation("declared names", declared_names, open_model={"class_names": ("ant", "bee")})
situation("a guard of files", guarded, open_model=Later(lambda: {"guard": file("guard-of-files.yaml")}))
situation("a guard of a server", guarded, open_model=Later(lambda: {"guard": file("guard.yaml")}))
situation("geometry of l0", bounded, threat="l0:1", geometry=1)
situation("no file of a network", fitting, {"network": {"net": 1}})
situation("no network to decide", decided, {"networks": {"net": 1}})
situation("free sizes", with_free_sizes, {"input_shape": (3, 8, 8)})
situation("membership of a model alone", membership_audited, {"non_members": member_examples(120, 1)})
situation("an odd number of references", membership_audited, references=5)
situation(
    "workers without networks", membership_audited, {"non_members": member_examples(120, 1)}, workers=1,
    non_members=member_examples(120, 1),
)  # fmt: skip
HELD_OUT = (torch.rand(400, 6, generator=torch.Generator().manual_seed(1)), torch.zeros(400).long())
situation("a generator without held-out examples", generator_audited, {"held_out": HELD_OUT})
situation("a condition of a generator without classes", generator_audited, condition=1, held_out=HELD_OUT)
situation("few non-members", membership_audited, references=4, fpr=0.01)
situation(
    "references of a server",
    served_membership,
    {"train": lambda x, y, seed: nn.Linear(x.shape[1], SERVED_CLASSES)},
)
situation("a damaged card", lambda recipe=None: None if recipe else trained_by(file("carded.safetensors")))


@pytest.mark.parametrize("name", SITUATIONS)
def test_a_remedy_works(name):
    carried_out(name)


def known_options() -> set[str]:
    """All options of the command line."""
    commands, options = [verbs.get_command(click.Context(verbs), name) for name in _COMMANDS], set()
    while commands:
        command = commands.pop()
        options |= {
            name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)
        }
        commands += getattr(command, "commands", {}).values()
    return options


def all_remedies() -> list[Remedy | Install]:
    return [each for name in SITUATIONS for each in carried_out(name)[1]]


def test_remedies_have_options_of_the_command_line():
    known = known_options()
    parts = [part for each in all_remedies() if isinstance(each, Remedy) for part in _parts(each)]
    flags = {word for part in parts for word in (part.flag, *part.words()[:1]) if "." not in part.argument}
    assert flags - known <= PYTHON_ONLY, flags - known


PYTHON_ONLY = {"--attack", "--steps", "--network", "--norm"}
"""arguments that only a function of the Python interface has"""


def test_remedies_survive_the_way_between_processes():
    for remedy in all_remedies():
        error = HoldfastError("a message", remedy)
        assert str(failure_from_json(json.loads(json.dumps(failure_to_json(error))), {})) == str(error)


def test_extras_that_are_named_exist():
    extras = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    calls = [
        call
        for path in SOURCE.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if _is(call, "Install")
    ]
    named = {call.args[0].value for call in calls if isinstance(call.args[0], ast.Constant)}
    assert named and named <= set(extras)


@cache
def trees() -> dict[Path, ast.Module]:
    """The code of the package, for the files that contain a remedy."""
    texts = {path: path.read_text() for path in SOURCE.rglob("*.py")}
    return {path: ast.parse(text) for path, text in texts.items() if "Remedy(" in text or "Install(" in text}


def _is(node: ast.AST, *names: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names


def sites() -> dict[tuple[str, int, int], tuple[int, str, str]]:
    """Places in the code that create remedies: the file, the first line and the column, with the last line, the name of
    the function around it and the source.
    """
    places = {}
    for path, tree in trees().items():
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for node in ast.walk(tree):
            if _is(node, "Remedy"):
                around = [each.name for each in functions if each.lineno <= node.lineno <= each.end_lineno]
                places[str(path), node.lineno, node.col_offset] = (
                    node.end_lineno,
                    around[-1] if around else "",
                    ast.unparse(node),
                )
    return places


def constants() -> dict[tuple[str, int], Remedy]:
    """Remedies that are constants of modules, by their place."""
    found = {}
    for path, tree in trees().items():
        for node in tree.body:
            if isinstance(node, ast.Assign) and any(_is(inner, "Remedy") for inner in ast.walk(node.value)):
                module = ".".join(("holdfast", *path.relative_to(SOURCE).with_suffix("").parts))
                value = getattr(importlib.import_module(module.removesuffix(".__init__")), node.targets[0].id)
                found |= {(str(path), line): value for line in range(node.lineno, node.end_lineno + 1)}
    return found


def test_every_remedy_of_the_code_has_a_situation():
    reached = {place for name in SITUATIONS for place in carried_out(name)[0]}
    parts = [part for each in all_remedies() for part in _parts(each) if isinstance(part, Remedy)]
    of_constants, missing = constants(), []
    for (file_name, line, _), (last, function, text) in sites().items():
        constant = of_constants.get((file_name, line))
        listed = constant if isinstance(constant, tuple) else (constant,)
        if constant is not None:
            known = any(_same(part, inner) for each in listed for inner in _parts(each) for part in parts)
        else:
            known = any((file_name, number) in reached for number in range(line, last + 1))
        if not known:
            missing.append(f"{Path(file_name).relative_to(SOURCE)}:{function}: {text}")
    unexplained = [each for each in missing if not any(each.startswith(start) for start in NOT_BUILT)]
    assert not unexplained, "\n".join(unexplained)


NOT_BUILT = {
    "audits/generator/hardening.py:_updates": "a training whose updates are timed, which takes longer when it is tried",
    "verbs/opening/models.py": "a pool, whose trainings take minutes",
    "core/errors.py": "the class itself, and constants that other files use",
    "runs/engine/ray_": "a cluster",
    "runs/assess/executors.py": "a cluster",
    "recipes/atta.py:prepared": "examples that are read by index and larger than memory",
    "verbs/harden.py:_with_unlabelled": "examples that are read by index",
    "recipes/training/optimisation.py": "several processes that train together",
    "recipes/training/learner.py:_refuse_foreign: Remedy('recipe', 'pgd')": "several processes that train together",
    "runs/harden/pace.py:smaller": "several processes that train together",
    "rotation/steps/": "a pool, whose trainings take minutes; tests/runs/test_rotate.py has them",
    "runs/documents/stored_runs.py": "a run that was stopped; tests/runs/test_assess.py continues one",
    "io/sandbox/tables.py": "labels of ten million characters",
    "verbs/serve_opening.py:_refuse_other_rate": "a folder of transformers, which is an extra",
    "verbs/serve_opening.py:refuse_other_guard": "an upstream server",
    "server/": "a server with workers; tests/server has them",
}
"""Files, functions or remedies that a test cannot reach, with the reason."""
