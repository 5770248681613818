"""Builds the content of `run.json`, which contains all values that identify a run and its results."""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, cast

import torch

from holdfast.core.batch import Data
from holdfast.core.chain import canonical, digest
from holdfast.core.goal import Goal
from holdfast.core.pieces import batch_size_for
from holdfast.doubts.answering import BUDGET
from holdfast.io.doctor import spread_examples
from holdfast.io.functions import function_digest
from holdfast.io.remote.probing import NO_GRADIENT
from holdfast.io.remote.served_model import Served
from holdfast.recipes.training.recipe import facts_of
from holdfast.reports.numbers import strict
from holdfast.runs.assess.measuring import shards_of
from holdfast.runs.assess.preparation import model_digest, small_eps_note, wide_bounds_note
from holdfast.runs.assess.request import AssessRequest, HardenRequest, Subject
from holdfast.runs.engine.identity import code_digest, hardware, versions
from holdfast.runs.engine.resuming import repeatable
from holdfast.runs.harness.plan import Plan
from holdfast.runs.harness.target import Target
from holdfast.runs.stored.record import DOUBTS, DataCard, Division, Manifest, Other, Settings, outline_to_json

_SAMPLE = 64
"""Number of examples from which the range of the inputs is estimated."""


def assess_manifest(
    subject: Subject,
    data: Data,
    request: AssessRequest,
    plan: Plan,
    target: Target,
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
    stages = plan.stages()
    return Division(
        shards_of(n, min(request.shard_size, size) if divided else request.shard_size),
        size,
        [
            *(stage.name for stage in stages if not stage.adaptive),
            DOUBTS,
            *(stage.name for stage in stages if stage.adaptive),
        ],
    )


def harden_manifest(
    subject: Subject,
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


def _config(request: AssessRequest, plan: Plan, target: Target) -> dict[str, Any]:
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
        **({} if plan.trials is None else {"trials": plan.trials.identity}),
    }


def _without_examples(plan: Plan) -> dict[str, bool]:
    return {} if plan.shown else {"examples": False}


def _sampled(request: AssessRequest) -> dict[str, bool]:
    return {"sampled": True} if request.sampled else {}


def _data_card(data: Data, shape: tuple[int, ...]) -> dict[str, Any]:
    """Name, digest, size, shape, classes and features of the data."""
    card = {"name": data.name, "digest": data.digest, "n": len(data), "shape": shape, "classes": data.classes}
    features = getattr(data, "features", None)
    return {**strict(card if features is None else {**card, "features": features}), **_groups(data)}


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
    subject: Subject, data: Data, request: AssessRequest, plan: Plan, target: Target, shape: tuple[int, ...]
) -> list[str]:
    """Notes on model, data and threat model that a reader needs before the numbers."""
    bounds = target.bare.bounds
    small = small_eps_note(plan.threat.constraint, bounds, math.prod(shape))
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
    notes = (*dict.fromkeys(notes_of_data), *target.notes, *small, *wide, *unknown, *hidden)
    return [*subject.notes, *cut, *surrogates, *notes]


def _identity(surrogate: Subject) -> Other:
    """Name, origin and digest of a surrogate model, and whether it is a member of the model."""
    name, how = (str(surrogate.card.get(key, "")) for key in ("name", "how"))
    identity: Other = {"name": name, "how": how, "digest": surrogate.digest}
    return {**identity, "member": True} if surrogate.card.get("member") else identity
