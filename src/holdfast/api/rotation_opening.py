"""Converts the settings of `holdfast rotate` to the request of each step: opens the pool, its model and its data."""

from pathlib import Path

from holdfast import rotation
from holdfast.api import hardening, resolve
from holdfast.api.checked_settings import check_settings
from holdfast.api.expecting import range_of_all
from holdfast.api.plans import device_of
from holdfast.api.pooled import refuse_code_in_pool, settings_of_pool
from holdfast.api.reading_settings import OPENED_WITH, items
from holdfast.api.recipe_building import build_recipe, built, functions_in, refuse_unheld, settings_of
from holdfast.api.verb_settings import RotateSettings
from holdfast.core.errors import UsageError
from holdfast.core.remedies import Remedy
from holdfast.io.models.cards import trained_by
from holdfast.recipes.training.fit import Training
from holdfast.recipes.training.recipe import Recipe, facts_of
from holdfast.rotation import AnswersPerPrincipal, Codec, Elapsed, Immunise, LatentDiffusion, Source
from holdfast.rotation.pool.pool import Pool
from holdfast.rotation.steps.admit import AdmitRequest
from holdfast.rotation.steps.collect import CollectRequest
from holdfast.rotation.steps.draw import By, DrawRequest
from holdfast.rotation.steps.rotation_request import RotateRequest, split_examples, trainable_subject
from holdfast.rotation.steps.rotation_run import LoopSettings, RunRequest
from holdfast.rotation.steps.train import TrainRequest
from holdfast.rotation.triggers import Trigger
from holdfast.runs.harden.candidates import Candidate
from holdfast.settings.grammar import parse_every, seconds
from holdfast.settings.naming import AUTO, CARD, SOURCES

_OPENING = (
    "model", "data", *OPENED_WITH, "fit", "threat", "recipe", "source", "initialisation", "seed",
)  # fmt: skip
"""Settings with which the model and the data of a pool are opened again."""


def rotate_request(settings: RotateSettings) -> RotateRequest:
    """Return the properties that all parameter sets of a new rotation pool share, with the opened model and data.

    Raises `UsageError` and `TargetError`.
    """
    range_of_all(settings, "a pool of parameter sets")
    if resolve.unit_of(settings):
        raise UsageError(
            f"the threat {settings.threat} has a unit for each feature, which a pool does not support; scale "
            "the features before, and leave unit= out"
        )
    subject, read_training, _, test, _ = hardening.open_for_hardening(settings)
    training = read_training.first(len(read_training))
    model = subject.model
    threat = settings.threat.opened()
    refuse_unheld(threat)
    if getattr(threat.constraint, "eps", None) == 0:
        raise UsageError(
            f"threat {settings.threat} allows no change, so no set could be judged; give an eps above 0"
        )
    device = device_of(settings.device)
    name = settings.fit or settings.data or ""
    examples = split_examples(training, test, name, model.classes or int(training.y.max()) + 1, settings.seed)
    values = settings.model_dump(mode="json")
    opening = {key: values[key] for key, _, given in items(settings) if given and key in _OPENING}
    return RotateRequest(
        subject=trainable_subject(subject, device, examples),
        threat=threat,
        threat_text=str(settings.threat),
        candidate=_candidate(settings),
        source=_source(settings),
        examples=examples,
        seed=settings.seed,
        begins=settings.initialisation,
        device=device,
        settings=opening,
    )


def reopened(pool: Pool, settings: RotateSettings) -> RotateRequest:
    """Return the properties that all parameter sets of an existing rotation pool share, as stored in its manifest.

    Only the device, `trust_code` and `follow_links` are taken from `settings`, because the manifest is not a command
    line: code runs only if `trust_code` is true. Raises `UsageError` if other settings differ from the manifest.
    """
    refuse_code_in_pool(pool, trust_code=settings.trust_code)
    own_settings = {key: getattr(settings, key) for key in ("device", "trust_code", "follow_links")}
    present = {
        key: value for key, value in {**settings_of_pool(pool), **own_settings}.items() if value is not None
    }
    opening = check_settings(present, str(pool.path), kind=RotateSettings)
    stored = {key: value for key, value, _ in items(opening)}
    for key, value, given in items(settings):
        expected = stored[key]
        if given and key in _OPENING and value != expected:
            raise UsageError(
                f"{key} is {expected} in {str(pool.path)!r}, and {value} was given; leave it out, or create another "
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
    for key, value in functions_in(spec).items():
        raise UsageError(
            f"recipe.training.{key} is {value}, a function; the sets of a pool are trained with named settings only, "
            "because no code is run that the manifest of a pool or the card of a model names",
            Remedy(f"recipe.training.{key}", getattr(Training(), key)),
        )
    recipe = build_recipe(spec)
    refuse_other_network(recipe, str(spec["use"]))
    if facts_of(recipe).keeps_state or facts_of(recipe).needs_teacher:
        raise UsageError(
            f"the recipe {spec['use']} needs another network, further examples or values of its own besides the "
            "weights, and the sets of a pool are trained from weights and examples alone",
            Remedy("recipe", "standard"),
        )
    budget, epochs = settings.budget, settings.recipe.get("training", {}).get("epochs")
    if budget is not None and epochs is not None:
        raise UsageError(
            f"recipe.training.epochs is {epochs}, and the budget is {budget}, "
            f"which determines them; give only one of both"
        )
    return Candidate(str(spec["use"]), recipe, settings_of(recipe))


def refuse_other_network(recipe: Recipe, name: str) -> None:
    """Raise `UsageError` for a recipe whose network is not that of the sets of a pool."""
    if facts_of(recipe).new_network:
        raise UsageError(
            f"the recipe {name} returns another network than the given one, and the sets of a pool have one network",
            Remedy("recipe", "standard"),
        )


def _source(settings: RotateSettings) -> Source:
    """Return the method by which the parameter sets of a rotation pool are trained, as named in the settings."""
    spec = settings.source
    name = str(spec["use"])
    settings_of_source = {key: value for key, value in spec.items() if key != "use"}
    chosen: Source = built(getattr(rotation, SOURCES[name]), settings_of_source, f"source {name}", "source")
    return chosen


def _codec_and_diffusion(settings: RotateSettings) -> tuple[Codec, LatentDiffusion]:
    """Return the parts of the generator in the settings: the codec, which represents each parameter set by a few
    numbers, and the diffusion model of the distribution of these numbers.
    """
    codec: Codec = built(Codec, settings.codec, "codec", "codec")
    return codec, built(LatentDiffusion, settings.generator, "generator", "generator")


def _immunise(settings: RotateSettings, *, immunising: bool) -> Immunise | None:
    """Return the settings of the training against adversarial examples of other sets, if sets are `immunising`."""
    return built(Immunise, settings.immunise, "immunise", "immunise") if immunising else None


def collect_request(
    settings: RotateSettings, path: Path, *, resume: bool = False, expect_head: str = ""
) -> CollectRequest:
    """Return the request for the training of the first parameter sets of a pool, which is created in the folder
    `path`.
    """
    budget_s = None if settings.budget is None else seconds(settings.budget, "budget")
    return CollectRequest(path, rotate_request(settings), resume, budget_s, settings.n_judged, expect_head)


def train_request(settings: RotateSettings, pool: Pool) -> TrainRequest:
    """Return the request for the training of a generator of parameter sets of a pool."""
    return TrainRequest(pool, reopened(pool, settings), *_codec_and_diffusion(settings))


def draw_request(
    settings: RotateSettings,
    pool: Pool,
    *,
    sets: int | None = None,
    by: By | None = None,
    immunising: bool = False,
    resume: bool = False,
) -> DrawRequest:
    """Return the request for new parameter sets of a pool; `immunising` states whether they are immunised."""
    common = reopened(pool, settings)
    return DrawRequest(pool, common, sets, by, _immunise(settings, immunising=immunising), resume)


def admit_request(settings: RotateSettings, pool: Pool) -> AdmitRequest:
    """Return the request for the verdicts on all new parameter sets of a pool."""
    common = reopened(pool, settings)
    return AdmitRequest(pool, common, settings.gates, settings.accept_doubts, settings.n_judged)


def run_request(
    settings: RotateSettings,
    path: Path,
    *,
    pool: Pool | None = None,
    by: By | None = None,
    immunising: bool = False,
    once: bool = False,
    anyway: bool = False,
    resume: bool = False,
    expect_head: str = "",
) -> RunRequest:
    """Return the request for all steps of a rotation in the folder `path`. With an existing `pool`, its model and data
    are opened again; otherwise the pool is created or, with `resume`, continued with the settings.
    """
    loop = loop_settings(settings, by, immunising=immunising, once=once)
    if pool is None:
        collection = collect_request(settings, path, resume=resume, expect_head=expect_head)
    else:
        common = reopened(pool, settings)
        collection = CollectRequest(path, common, True, n_judged=settings.n_judged, expect_head=expect_head)
    return RunRequest(collection, loop, *_codec_and_diffusion(settings), once, anyway)


def loop_settings(settings: RotateSettings, by: By | None, *, immunising: bool, once: bool) -> LoopSettings:
    """Return when sets are swapped and how new ones are produced and judged."""
    triggers = _triggers(settings)
    if not (triggers or once):
        raise UsageError(
            "no condition for swaps is given",
            Remedy("every", ("50q/principal",), repeated=True),
            Remedy("every", ("24h",), repeated=True),
            Remedy("once", True),
        )
    immunise = _immunise(settings, immunising=immunising)
    gates, accepted = settings.gates, settings.accept_doubts
    return LoopSettings(triggers, settings.min_waiting, immunise, by, gates, accepted, settings.n_judged)


def _triggers(settings: RotateSettings) -> tuple[Trigger, ...]:
    """Return the conditions under which the serving set of a rotation is swapped, as listed in the settings."""
    parsed: list[Trigger] = []
    for text in settings.every:
        kind, size = parse_every(text)
        parsed.append(AnswersPerPrincipal(int(size)) if kind == "answers" else Elapsed(size))
    return tuple(parsed)
