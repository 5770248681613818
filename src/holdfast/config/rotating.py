"""Converts settings of a rotation to the inputs of its steps: the request of a pool, its model, data and triggers."""

import json

from holdfast import rotation
from holdfast.config import hardening, ordering
from holdfast.config.attacks import threat_model
from holdfast.config.grammar import parse_every, parse_threat, seconds
from holdfast.config.naming import AUTO, CARD, SOURCES
from holdfast.config.pooled import refuse_code_in_pool, said_of
from holdfast.config.recipes import build_recipe, built, refuse_unheld, settings_of
from holdfast.config.settings import RotateSettings, check_settings
from holdfast.core.errors import UsageError
from holdfast.rotation import AnswersPerPrincipal, Codec, Elapsed, Immunise, LatentDiffusion, Source
from holdfast.rotation.triggers import Trigger
from holdfast.sources.cards import trained_by
from holdfast.store.pool import Pool
from holdfast.verbs.candidates import Candidate
from holdfast.verbs.rotate.request import RotateRequest, split_examples, trainable_subject

_OPENING = (
    "model", "data", "arch", "model_args", "bounds", "mean", "std", "data_normalised", "layout",
    "model_output", "classes", "class_names", "class_order", "split", "label", "drop", "x", "y", "fit", "threat",
    "recipe", "source", "begins", "seed",
)  # fmt: skip
"""Settings with which the model and the data of a pool are opened again."""


def rotate_request(settings: RotateSettings) -> RotateRequest:
    """Return the settings that all sets of a pool share, with the opened model and data.

    Raises `UsageError` and `TargetError`.
    """
    if settings.n or settings.sample:
        raise UsageError(
            "sets are trained on the whole train split, of which a fifth is held out to judge them; leave -n and "
            "--sample out"
        )
    subject, training, _, test = hardening.open_for_hardening(settings)
    model = subject.model
    threat = threat_model(parse_threat(settings.threat))
    refuse_unheld(threat)
    if getattr(threat.constraint, "eps", None) == 0:
        raise UsageError(
            f"threat {settings.threat} allows no change, so no set could be judged; give an eps above 0"
        )
    device = ordering.device_of(settings.device)
    name = settings.fit or settings.data or ""
    examples = split_examples(training, test, name, model.classes or int(training.y.max()) + 1, settings.seed)
    opening = json.loads(settings.model_dump_json(include=set(_OPENING), exclude_unset=True))
    return RotateRequest(
        subject=trainable_subject(subject, device, examples),
        threat=threat,
        threat_text=settings.threat,
        candidate=_candidate(settings),
        source=source(settings),
        examples=examples,
        seed=settings.seed,
        begins=settings.begins,
        device=device,
        settings=opening,
    )


def reopened(pool: Pool, settings: RotateSettings) -> RotateRequest:
    """Return the request with which an existing pool was created, from its manifest.

    Only `device` and the trust in code come from the settings.

    Code runs only if the settings trust it, because the manifest is not a command line. Settings that differ from the
    manifest raise `UsageError`.
    """
    refuse_code_in_pool(pool, trust_code=settings.trust_code)
    stored = {**said_of(pool), "device": settings.device, "trust_code": settings.trust_code}
    present = {key: value for key, value in stored.items() if value is not None}
    opening = check_settings(present, str(pool.path), kind=RotateSettings)
    for key in _OPENING:
        given, expected = getattr(settings, key), getattr(opening, key)
        if key in settings.model_fields_set and given != expected:
            raise UsageError(
                f"{key} is {expected} in {str(pool.path)!r}, and {given} was given; leave it out, or create another "
                f"pool with holdfast rotate collect"
            )
    request = rotate_request(opening)
    request.refuse_other(pool)
    return request


def _candidate(settings: RotateSettings) -> Candidate:
    """Return the recipe in the settings: a named one, or that of the model's card with changes, or `standard`."""
    spec = dict(settings.recipe)
    if spec["use"] == AUTO:
        raise UsageError(
            "recipe auto selects a recipe for a single training, and all sets of a pool have the same one; name a "
            "recipe, or card"
        )
    if spec["use"] == CARD:
        card = trained_by(str(settings.model)) or {"use": "standard"}
        given_settings = {key: value for key, value in spec.items() if key != "use"}
        training = {**card.get("training", {}), **given_settings.pop("training", {})}
        spec = {**card, **given_settings, **({"training": training} if training else {})}
    recipe = build_recipe(spec)
    if settings.budget is not None and "epochs" in settings.recipe.get("training", {}):
        raise UsageError(
            f"recipe.training.epochs is {settings.recipe['training']['epochs']}, and the budget is {settings.budget}, "
            f"which determines them; give only one of both"
        )
    return Candidate(str(spec["use"]), recipe, settings_of(recipe))


def budget_s(settings: RotateSettings) -> float | None:
    """Budget of a collection in seconds; None for the recipe's own epochs."""
    return None if settings.budget is None else seconds(settings.budget, "budget")


def source(settings: RotateSettings) -> Source:
    """Return the source of the parameter sets."""
    spec = settings.source
    name = str(spec["use"])
    settings_of_source = {key: value for key, value in spec.items() if key != "use"}
    chosen: Source = built(getattr(rotation, SOURCES[name]), settings_of_source, f"source {name}", "source")
    return chosen


def codec(settings: RotateSettings) -> Codec:
    """Return the codec, which represents sets by a few numbers."""
    return built(Codec, settings.codec, "codec", "codec")


def diffusion(settings: RotateSettings) -> LatentDiffusion:
    """Return the generator, which learns the distribution of those numbers."""
    return built(LatentDiffusion, settings.generator, "generator", "generator")


def immunise(settings: RotateSettings) -> Immunise:
    """Return the training of a set against adversarial examples of other sets."""
    return built(Immunise, settings.immunise, "immunise", "immunise")


def triggers(settings: RotateSettings) -> tuple[Trigger, ...]:
    """Return the triggers of swaps."""
    parsed: list[Trigger] = []
    for text in settings.every:
        kind, size = parse_every(text)
        parsed.append(AnswersPerPrincipal(int(size)) if kind == "answers" else Elapsed(size))
    return tuple(parsed)
