"""Builds the content of `run.json`, which identifies a run, and the command line that repeats it."""

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any, cast

import torch

from holdfast.attacks.suites import SUITES
from holdfast.core.batch import Data
from holdfast.core.catalogue import RECIPES, load, names
from holdfast.core.chain import canonical, digest
from holdfast.core.estimate import Goal
from holdfast.core.meter import batch_size_for
from holdfast.core.names import exact
from holdfast.doubts.answering import BUDGET
from holdfast.gates.grammar import look_sizes
from holdfast.gates.judging import Judgement
from holdfast.io.doctor import spread_examples
from holdfast.io.models.factories import function_digest, names_code
from holdfast.io.remote.probing import NO_GRADIENT
from holdfast.io.remote.served_model import Served
from holdfast.recipes.training.recipe import facts_of
from holdfast.reports.words import strict
from holdfast.runs.assess.measuring import shards_of
from holdfast.runs.assess.preparation import model_digest, small_eps_note, wide_bounds_note
from holdfast.runs.assess.request import AssessRequest, DescribedModel, HardenRequest
from holdfast.runs.documents.record import (
    DOUBTS,
    DataCard,
    Division,
    Manifest,
    Other,
    Settings,
    outline_to_json,
)
from holdfast.runs.engine.identity import code_digest, hardware, repeatable, versions
from holdfast.runs.harness.plan import Plan
from holdfast.runs.harness.target import PreparedModel
from holdfast.threats.stored import threat_from_json

_ADDRESS = re.compile(r"[\w./@][\w./:@+=-]*")
"""Address of a model or of data that is shown: one word that no program reads as an option."""
_SUITE = re.compile(r"([\w-]+)@\d+")
"""Name and version of a whole suite, without `--only` and `--skip`."""
_SWITCHES = {"full": "--full", "keep_adversarial": "--save-adversarial"}
_OPTIONS_OF_KINDS = {"curve": "--curve", "quick-proof": "--certify"}
"""options of `assess` that add a stage, by the kind of the stage"""
_OPENED_WITH = (
    "label",
    "drop",
    "split",
    "x",
    "y",
    "separator",
    "bits",
    "layout",
    "bounds",
    "mean",
    "std",
    "model_output",
    "classes",
    "class_names",
    "class_order",
    "sampling_rate",
    "input_shape",
)
"""settings with which model and data are opened again and that run no code, which the command states"""


_LARGEST = 2**53
"""whole numbers below it are floats"""


def command_of(manifest: Mapping[str, Any], gates: Sequence[Judgement] = ()) -> str:
    """Return the command line of a run of `assess`, `certify` or `harden`, and "" for a run of another verb.

    `manifest` is the content of `run.json`, and `gates` are the judged gates. A placeholder, such as MODEL, stands for
    what `run.json` does not state in one word, and for a model that runs code when it is opened. Options that it does
    not contain, such as a guard, are missing.
    """
    verb = manifest.get("verb")
    if verb not in ("assess", "certify", "harden"):
        return ""
    config = manifest["config"]
    words = ["holdfast", verb, _address(manifest["model"], "MODEL"), _address(manifest["data"], "DATA")]
    members = manifest["model"].get("members", ())
    words += [word for card in members for word in ("--member", _address(card, "MODEL"))]
    words += _opening(manifest.get("opening", {}))
    words += ["--threat", threat_from_json(config["threat"]).text]
    if config.get("recipe") in names("recipes"):
        words += ["--recipe", config["recipe"], *_recipe_settings(config)]
    for key, option in (("budget_s", "--budget"), ("assess_budget_s", "--assess-budget")):
        if isinstance(config.get(key), int | float):
            words += [option, f"{config[key]:g}s"]
    if verb != "certify":  # which has no options for its attacks
        words += _attacks(manifest)
    if isinstance(manifest["data"].get("n"), int):
        option = "--sample" if manifest["data"].get("sampled") is True else "-n"
        words += [option, str(manifest["data"]["n"])]
    groups = manifest["data"].get("groups")
    if groups is not None:
        words += ["--groups", _address({"name": groups["column"]}, "NAME")]
    words += [option for key, option in _SWITCHES.items() if config.get(key) is True]
    words += ["--no-examples"] if config.get("examples") is False else []
    if isinstance(config.get("time_budget_s"), int | float):
        words += ["--time-budget", f"{config['time_budget_s']:g}s"]
    if isinstance(config.get("seed"), int) and config["seed"]:
        words += ["--seed", str(config["seed"])]
    until = config.get("until")
    words += [] if until is None else ["--until", until]
    for gate in gates:
        words += [] if gate.claim.text == until else ["--gate", gate.claim.text]
    return shlex.join(words)


def _opening(settings: Mapping[str, Any]) -> list[str]:
    """Return the options with which model and data are opened. Values that are not text or numbers are left out."""
    words = []
    for name in _OPENED_WITH:
        given = settings.get(name)
        values = given if isinstance(given, list) else [] if given is None else [given]
        texts = [_text(value) for value in values]
        if not all(text and text.isprintable() for text in texts):
            continue
        if texts and name != "drop":  # which is one option for each column
            texts = [",".join(texts)]
        # as one word, because a value may begin with a hyphen
        words += [f"--{name.replace('_', '-')}={text}" for text in texts]
    constants = settings.get("constants", {})
    if isinstance(constants, Mapping):
        words += [
            f"--constant={name}={exact(value)}" for name, value in constants.items() if name.isprintable()
        ]
    return [*words, "--no-header"] if settings.get("header") is False else words


def _text(value: object) -> str:
    """Return a value of an option as text, or "" if it has another type or no float represents it."""
    if isinstance(value, str):
        return value
    is_number = isinstance(value, float) or (type(value) is int and abs(value) < _LARGEST)
    return exact(float(value)) if is_number else ""  # type: ignore[arg-type]


def _recipe_settings(config: Mapping[str, Any]) -> list[str]:
    """Return the options for the settings of the recipe that are not its defaults."""
    name = config["recipe"]
    given, cls = config.get("settings", {}).get(name), load("recipes", name, type)
    if not isinstance(given, Mapping) or any(field.default is field.default_factory for field in fields(cls)):
        return []
    usual = cls(**(RECIPES[name].settings if name in RECIPES else {}))
    return [word for text in _changed(given, usual, "recipe") for word in ("--set", text)]


def _changed(given: Mapping[str, Any], usual: Any, path: str) -> list[str]:
    """Return `PATH=VALUE` for each given setting that is not that of the object `usual`."""
    texts = []
    for field in fields(usual):
        value, default = given.get(field.name), getattr(usual, field.name)
        if isinstance(value, Mapping) and is_dataclass(default):
            texts += _changed(value, default, f"{path}.{field.name}")
        elif field.name in given and isinstance(value, bool | int | float | str | list) and value != default:
            text = value if isinstance(value, str) else json.dumps(value)
            texts.append(f"{path}.{field.name}={'FILE.py:NAME' if names_code(text) else text}")
    return texts


def _attacks(manifest: Mapping[str, Any]) -> list[str]:
    """Return the options for the attacks and the doubts of a run."""
    config = manifest["config"]
    named = _SUITE.fullmatch(config["suite"])
    words = ["--suite", named[1] if named and named[1] in SUITES else "ATTACKS"]
    surrogates = [card for card in manifest.get("surrogates", ()) if not card.get("member")]
    for option, cards in (
        ("--surrogate", surrogates),
        ("--across", manifest.get("other_data", ())),
    ):
        words += [word for card in cards for word in (option, _address(card, option[2:].upper()))]
    steps = config.get("stages", ())
    if any(step.get("adaptive") is True for step in steps):
        words.append("--adaptive")
        if isinstance(config.get("adaptive_budget"), int):
            words += ["--adaptive-budget", str(config["adaptive_budget"])]
    kinds = {step.get("kind") for step in steps}
    words += [option for kind, option in _OPTIONS_OF_KINDS.items() if kind in kinds]
    words += ["--baseline", "RUN"] if "baseline" in kinds else []
    return [*words, "--no-doubts"] if config.get("doubts") == "none" else words


def _address(card: Mapping[str, Any], placeholder: str) -> str:
    """Return the name of a model or of data if it can be its address, and otherwise the placeholder."""
    name = card.get("name")
    shown = isinstance(name, str) and _ADDRESS.fullmatch(name) is not None and not names_code(name)
    return str(name) if shown and card.get("how") != "python" else placeholder


_SAMPLE = 64
"""Number of examples from which the range of the inputs is estimated."""


def assess_manifest(
    subject: DescribedModel,
    data: Data,
    request: AssessRequest,
    plan: Plan,
    target: PreparedModel,
    shape: tuple[int, ...],
    *,
    served: Served | None = None,
    stored: Mapping[str, Any] | None = None,
) -> Manifest:
    """Return the manifest of an assessment. `shape` is the shape of one input.

    `stored` is the manifest of the run in the folder, if there is one: a resumed run uses the batch size of its first
    attempt.
    """
    config = _config(request, plan, target) | _groups_identity(data)
    digests = {
        "config": digest(canonical(config)),
        "model": model_digest(subject, target),
        "data": data.digest,
        "code": code_digest(),
    }
    return Manifest(
        request.verb,
        digests,
        cast(Settings, config),
        strict({**subject.card, "outputs": target.classes, "randomised": target.randomised}),
        cast(DataCard, _data_card(data, shape) | _sampled(request)),
        _notes(subject, data, request, plan, target, shape),
        list(target.details),
        [_identity(surrogate) for surrogate in request.surrogates],
        [{"name": dataset.name, "digest": dataset.digest, "n": len(dataset)} for dataset in request.across],
        versions(),
        hardware(torch.device(request.device)),
        plan.seed,
        work_of(len(data), request, plan, shape, served=served, stored=stored),
        dict(request.opening),
    )


def work_of(
    n: int,
    request: AssessRequest,
    plan: Plan,
    shape: tuple[int, ...],
    *,
    served: Served | None = None,
    stored: Mapping[str, Any] | None = None,
) -> Division:
    """Return how a run on `n` examples is divided: the shards, the batch size and the names of the stages."""
    divided = request.time_budget_s is not None or request.workers is not None
    size = request.batch_size or batch_size_for(math.prod(shape), request.device)
    if request.batch_size is None and served is not None:
        size = max(size, served.at_once)  # so that one batch fills all parallel requests
    if stored is not None:
        size = stored["plan"]["batch_size"]
    stages, shard_size = plan.stages(), min(request.shard_size, size) if divided else request.shard_size
    ends = (n,) if request.until is None else look_sizes(n)
    return Division(
        tuple(
            (first + start, first + stop)
            for first, end in pairwise((0, *ends))
            for start, stop in shards_of(end - first, shard_size)
        ),
        size,
        [
            *(stage.name for stage in stages if not stage.adaptive),
            DOUBTS,
            *(stage.name for stage in stages if stage.adaptive),
        ],
    )


def harden_manifest(
    subject: DescribedModel,
    digests: list[str],
    test: Data,
    request: HardenRequest,
    plan: Mapping[str, Any],
    machine: str,
) -> dict[str, Any]:
    """Return the content of `run.json` of a hardening.

    `plan` contains the attempts. `digests` are those of the test examples and of the training examples. `machine`
    describes the hardware.
    """
    constraint = request.threat.constraint
    surrogates = request.assessment.surrogates
    declared = {item.name: facts_of(item.recipe).goal for item in request.candidates}
    goals = {name: vars(goal) for name, goal in declared.items() if goal != Goal()}
    config = strict(
        {
            "recipe": request.name,
            "settings": {item.name: item.settings for item in request.candidates},
            **({"goals": goals} if goals else {}),
            "threat": {
                "norm": type(constraint).__name__,
                "eps": constraint.eps,
                **({"limits": dict(constraint.limits)} if constraint.limits else {}),
                **({"unit": request.threat.unit} if request.threat.unit else {}),
            },
            "suite": request.assessment.plan.suite,
            "surrogates": {f"{k} {item.card['name']}": item.digest for k, item in enumerate(surrogates, 1)},
            **({} if request.control is None else {"control": request.control.digest}),
            **({} if request.teacher is None else {"teacher": request.teacher.digest}),
            "budget_s": request.budget_s,
            **({} if request.assess_budget_s is None else {"assess_budget_s": request.assess_budget_s}),
            "seed": request.seed,
            **_functions(request),
            **({"train_only": list(request.train_only)} if request.train_only else {}),
            **_without_examples(request.assessment.plan),
            **_groups_identity(test),
        }
    )
    return {
        "verb": "harden",
        "digests": {
            "config": digest(canonical(config)),
            "model": subject.digest,
            "data": digest(canonical(digests)),
            "code": code_digest(),
        },
        "config": config,
        "model": strict(dict(subject.card)),
        "data": {"name": test.name, "n": len(test), **_sampled(request.assessment), **_groups(test)},
        "versions": versions(),
        "hardware": machine,
        "seed": request.seed,
        "plan": dict(plan),
        **({"opening": dict(request.assessment.opening)} if request.assessment.opening else {}),
    }


def _functions(request: HardenRequest) -> dict[str, dict[str, str]]:
    """Digests of the functions of the user in the recipes, such as an optimiser, if there are any."""
    digests = {
        f"{item.name}.training.{name}": function_digest(function)
        for item in request.candidates
        for name, function in item.recipe.training.functions.items()
    }
    return {"functions": digests} if digests else {}


def about_run(command: str) -> dict[str, Any]:
    """Return the time of creation and the command line of a run, which may differ between two equal runs."""
    return {"created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), "command": repeatable(command)}


def _config(request: AssessRequest, plan: Plan, target: PreparedModel) -> dict[str, Any]:
    """The settings of the run that can change a number."""
    surrogates = [_identity(surrogate) for surrogate in request.surrogates]
    return {
        **outline_to_json(plan.outline(target.classes)),
        "full": plan.full,
        "keep_adversarial": plan.keep_adversarial,
        **_without_examples(plan),
        "doubts": plan.doubts,
        "batch_size": request.batch_size,
        "shard_size": request.shard_size,
        "time_budget_s": request.time_budget_s,
        "fit": None if request.fit is None else request.fit.digest,
        "surrogates": {f"{place} {item['name']}": item["digest"] for place, item in enumerate(surrogates, 1)},
        "across": {f"{place} {item.name}": item.digest for place, item in enumerate(request.across, 1)},
        **({} if plan.adaptive_budget == BUDGET else {"adaptive_budget": plan.adaptive_budget}),
        **({} if plan.geometry is None else {"geometry": plan.geometry.n}),
        **({} if request.until is None else {"until": request.until.text}),
        **({} if plan.trials is None else {"trials": plan.trials.identity}),
    }


def _without_examples(plan: Plan) -> dict[str, bool]:
    return {} if plan.shown else {"examples": False}


def _sampled(request: AssessRequest) -> dict[str, bool]:
    return {"sampled": True} if request.sampled else {}


def _data_card(data: Data, shape: tuple[int, ...]) -> dict[str, Any]:
    """Name, digest, size, shape, classes, features and sampling rate of the data."""
    card = {"name": data.name, "digest": data.digest, "n": len(data), "shape": shape, "classes": data.classes}
    stated = {key: getattr(data, key, None) for key in ("features", "sampling_rate")}
    known = {key: value for key, value in stated.items() if value is not None}
    return {**strict({**card, **known}), **_groups(data)}


def _groups(data: Data) -> dict[str, Any]:
    """The groups of the examples, if the data have some."""
    groups = getattr(data, "groups", None)
    return {} if groups is None else {"groups": groups.to_json()}


def _groups_identity(data: Data) -> dict[str, Any]:
    """The column and the digest of the groups for the settings that identify a run."""
    return {
        name: {"column": groups["column"], "digest": digest(canonical(groups))}
        for name, groups in _groups(data).items()
    }


def _notes(
    subject: DescribedModel,
    data: Data,
    request: AssessRequest,
    plan: Plan,
    target: PreparedModel,
    shape: tuple[int, ...],
) -> list[str]:
    """Notes on model, data and threat model that a reader needs before the numbers."""
    bounds = target.original.bounds
    attacked = target.original.attacked_bounds
    small = small_eps_note(plan.threat.constraint, attacked, math.prod(shape))
    wide = (
        ()
        if plan.threat.constraint.domain is not None
        else wide_bounds_note(spread_examples(data, _SAMPLE).x, bounds)
    )
    surrogates = [
        f"the surrogate {surrogate.card.get('name', '')}: {note}"
        for surrogate in request.surrogates
        for note in surrogate.notes
    ]
    unknown = plan.threat.constraint.notes(bounds)
    notes_of_data = [
        note for each in (data, request.fit, *request.across) for note in getattr(each, "notes", ())
    ]
    climbing = any(member.attack.needs == "gradients" for member in plan.members)
    cut = (NO_GRADIENT,) if subject.model.cut and climbing else ()
    hidden = () if plan.shown else ("the run stores no examples, so that reports show none",)
    notes = (
        *dict.fromkeys(notes_of_data),
        *target.notes,
        *small,
        *wide,
        *unknown,
        *hidden,
        *request.notes,
    )
    return [*subject.notes, *cut, *surrogates, *notes]


def _identity(surrogate: DescribedModel) -> Other:
    """Name, origin and digest of a surrogate model, and whether it is a member of the model."""
    name, how = (str(surrogate.card.get(key, "")) for key in ("name", "how"))
    identity: Other = {"name": name, "how": how, "digest": surrogate.digest}
    return {**identity, "member": True} if surrogate.card.get("member") else identity
