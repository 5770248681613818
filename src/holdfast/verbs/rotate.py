"""Python functions for the steps of a rotation of parameter sets, with the names and defaults of the options of
`holdfast rotate`; and the request of each step, which opens the pool, its model and its data.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from holdfast import rotation
from holdfast.core.chain import canonical, digest
from holdfast.core.errors import Remedy, UsageError
from holdfast.core.names import kind_of
from holdfast.recipes.training.fit import Training
from holdfast.recipes.training.recipe import Recipe, facts_of
from holdfast.rotation import AnswersPerPrincipal, Codec, Elapsed, Immunise, LatentDiffusion, Source
from holdfast.rotation.pool import Pool
from holdfast.rotation.rotating_model import Trigger
from holdfast.rotation.steps import admit as admission
from holdfast.rotation.steps import collect as collection
from holdfast.rotation.steps import draw as drawing
from holdfast.rotation.steps import rotation_run as loop
from holdfast.rotation.steps import serving_set
from holdfast.rotation.steps.admission_gates import Admission
from holdfast.rotation.steps.admit import AdmitRequest
from holdfast.rotation.steps.collect import Collected, CollectRequest
from holdfast.rotation.steps.draw import By, Drawn, DrawRequest, TrainRequest, by_named
from holdfast.rotation.steps.rotation_request import (
    RotateRequest,
    TrainedGenerator,
    split_examples,
    trainable_subject,
)
from holdfast.rotation.steps.rotation_run import LoopSettings, Rotated, RunRequest
from holdfast.rotation.steps.serving_set import Exposed, Swapped
from holdfast.runs.documents.stored_runs import new_folder
from holdfast.runs.engine.progress import Notify, Progress, ignore, silent
from holdfast.runs.harden.candidates import Candidate
from holdfast.runs.store.append_log import Head
from holdfast.settings.grammar import AUTO, CARD, SOURCES, parse_every, seconds
from holdfast.verbs import harden
from holdfast.verbs.checked_settings import DataReference, ModelReference, check_settings
from holdfast.verbs.configuration import OPENED_WITH, canonical_settings, given, items
from holdfast.verbs.opening import resolve
from holdfast.verbs.opening.arguments import verb_with
from holdfast.verbs.opening.declared import opened_threat, range_of_all
from holdfast.verbs.opening.models import refuse_code_in_pool, settings_of_pool
from holdfast.verbs.opening.plans import device_of
from holdfast.verbs.opening.recipes import (
    ThreatLike,
    build_recipe,
    built,
    functions_in,
    refuse_unheld,
    settings_of,
    trained_by,
)
from holdfast.verbs.opening.resolve import folder_of
from holdfast.verbs.settings import RotateSettings

__all__ = ["admit", "collect", "draw", "expose", "head", "run", "status", "swap", "train"]


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
    subject, read_training, _, test, _ = harden.open_for_hardening(settings)
    training = read_training.first(len(read_training))
    model = subject.model
    threat = opened_threat(settings)
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
    for key, value, is_given in items(settings):
        expected = stored[key]
        if is_given and key in _OPENING and value != expected:
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


PoolLike = str | Path | Pool
"""Types of the argument `pool`: a pool, or the path of its folder."""
_OF_INPUTS = ("bounds", "mean", "std", "data_normalised")
_OF_GATES = ("gates", "accept_doubts")
_OPENED_AGAIN = ("device", "trust_code", "follow_links")
"""Settings with which a step opens the model of a pool again."""
Options = Mapping[str, Any]
"""Settings by name, with the names that follow `--set codec.` or `--set generator.` on the command line."""


@verb_with(RotateSettings, "budget", "seed", "initialisation", *_OF_INPUTS, "device")
def collect(
    model: str | Path | ModelReference,
    data: str | Path | DataReference,
    threat: ThreatLike = "linf:8/255",
    source: str | Options = "basins",
    recipe: str | Options = "card",
    *,
    fit: str | Path | None = None,
    run: str | Path | None = None,
    resume: bool = False,
    expect_head: str = "",
    notify: Notify = ignore,
    progress: Progress = silent,
    **settings: Any,
) -> Collected:
    """Create or resume a pool: train parameter sets for the architecture of the model on the train split of `data`, and
    surrogate models for transfer attacks.

    `model`, `data` and `fit` are addresses, because a pool stores how its model and data are opened again. Results of
    `holdfast.open_model` and `holdfast.open_data` are addresses with further settings. `source` is the method that
    collects sets, and `recipe` the training method; each is a name, or settings with the name as `use`. `budget` is the
    wall-clock time for all trainings together, as in "20min". `run` is the folder of the pool, by default a new one,
    and `resume` continues the pool in it. `notify` is called with messages. Raises `UsageError` and `TargetError`.
    """
    path = folder_of(run, resume=resume)
    if isinstance(fit, DataReference):
        raise UsageError(
            "fit is a result of open_data, and a pool stores its address only; give the address, whose columns and "
            "arrays have the names of those of the data"
        )
    for name, given_object in (("model", model), ("data", data), ("fit", fit or "")):
        _refuse_object(name, given_object)
    checked = RotateSettings(
        **given(model=model, data=data, threat=threat, source=source, recipe=recipe, fit=fit, **settings)
    )
    path = path or new_folder("rotate", digest(canonical(canonical_settings(checked))))
    request = collect_request(checked, path, resume=resume, expect_head=expect_head)
    return collection.collect(request, notify=notify, progress=progress)


@verb_with(RotateSettings, "codec", "generator", *_OPENED_AGAIN)
def train(
    pool: PoolLike,
    *,
    expect_head: str = "",
    notify: Notify = ignore,
    **settings: Any,
) -> TrainedGenerator:
    """Train the generator of a pool, a codec and a latent diffusion model, on the parameter sets that were collected.

    Settings are mappings, as in `generator={"regulariser": "hinge"}`. The new generator replaces an earlier one. Raises
    `Inconclusive` if encoding and decoding costs more than 0.3 points of accuracy. `trust_code` permits the execution
    of the code that builds the pool's model.
    """
    checked = RotateSettings(**given(**settings))
    request = train_request(checked, _opened(pool, expect_head))
    return drawing.train(request, notify=notify)


@verb_with(RotateSettings, *_OPENED_AGAIN)
def draw(
    pool: PoolLike,
    *,
    sets: int | None = None,
    by: By | None = None,
    immunise: bool | Options = False,
    resume: bool = False,
    expect_head: str = "",
    notify: Notify = ignore,
    **settings: Any,
) -> Drawn:
    """Add `sets` new parameter sets to the pool as candidates, by default eight. A candidate must be admitted before it
    can serve.

    `by` is "generator", the default if the pool has one, or "retraining", which trains from fresh random weights. If
    `immunise` is True, or a mapping of its settings such as `{"share": 0.25}`, each candidate is trained further
    against examples computed on stolen sets; if there are none, on the serving set or the bases. `resume` continues the
    last draw with its settings.
    """
    checked = RotateSettings(**given(**settings, immunise=None if isinstance(immunise, bool) else immunise))
    if sets is not None and (type(sets) is not int or sets < 1):
        raise UsageError(f"sets is {sets!r}; expected a number of candidates of at least 1")
    method = by_named(by)
    request = draw_request(
        checked,
        _opened(pool, expect_head),
        sets=sets,
        by=method,
        immunising=immunise is not False,
        resume=resume,
    )
    return drawing.draw(request, notify=notify)


@verb_with(RotateSettings, *_OF_GATES, "n_judged", *_OPENED_AGAIN)
def admit(
    pool: PoolLike,
    *,
    expect_head: str = "",
    notify: Notify = ignore,
    progress: Progress = silent,
    **settings: Any,
) -> Admission:
    """Judge every candidate of the pool, and every admitted set that was not yet judged against all stolen sets.

    `gates` are conditions in addition to the usual ones. `accept_doubts` maps raised doubts that are accepted to
    reasons. `n_judged` is the number of held-out examples in the first measurement. The result contains the verdict on
    each set; its `exit_code` is 0 if a candidate was admitted and 4 if none was.
    """
    checked = RotateSettings(**given(**settings))
    request = admit_request(checked, _opened(pool, expect_head))
    return admission.admit(request, notify=notify, progress=progress)


def swap(pool: PoolLike, *, why: str = "", unjudged: bool = False, expect_head: str = "") -> Swapped:
    """Make another admitted parameter set, chosen at random, the serving set of the pool, and retire the previous one.
    The reason `why` is recorded in the ledger.

    If `unjudged` is True and no other set waits, a set that was not judged against every stolen set is used. Raises
    `Inconclusive` if no set can serve.
    """
    return serving_set.swap(_opened(pool, expect_head), why, unjudged=unjudged)


def expose(pool: PoolLike, name: str, *, why: str, expect_head: str = "") -> Exposed:
    """Record that an attacker may have the parameter set `name`, with the reason `why`. The set never serves again
    after the next swap.
    """
    return serving_set.expose(_opened(pool, expect_head), name, why)


def status(pool: PoolLike, *, expect_head: str = "") -> dict[str, Any]:
    """Verify every entry of the ledger of a pool, and return the state of the pool and its parameter sets as a
    dictionary.
    """
    return serving_set.status(_opened(pool, expect_head))


def head(pool: PoolLike, *, expect_head: str = "") -> Head:
    """Return the number and the digest of the last entry of the ledger of a pool. Stored outside the pool, they show
    later whether entries were removed.

    If a later step is called with this digest as `expect_head`, it raises `TargetError` when the ledger does not
    contain that entry, as in an older copy of the folder.
    """
    return serving_set.head(_opened(pool, expect_head))


@verb_with(
    RotateSettings, "every", "min_waiting", *_OF_GATES, "n_judged", "codec", "generator", *_OPENED_AGAIN
)
def run(
    pool: PoolLike,
    *,
    by: By | None = None,
    immunise: bool | Options = False,
    once: bool = False,
    expect_head: str = "",
    notify: Notify = ignore,
    progress: Progress = silent,
    **settings: Any,
) -> Rotated:
    """Perform all steps of a rotation: finish the collection of the pool, train a generator if one is needed, and swap
    the serving set whenever a swap is due.

    `every` lists the conditions of a swap, as in `["50q/principal", "24h"]`; a stolen serving set is always replaced.
    `min_waiting` is the number of admitted sets that should wait for the next swaps. The function runs until Ctrl-C. It
    raises `Inconclusive` if no set is admitted and none waits. If `once` is True, it returns as soon as a set serves
    and enough sets wait. On the command line, this step also creates the pool.
    """
    checked = RotateSettings(**given(**settings, immunise=None if isinstance(immunise, bool) else immunise))
    method, opened = by_named(by), _opened(pool, expect_head)
    request = run_request(
        checked,
        opened.path,
        pool=opened,
        by=method,
        immunising=immunise is not False,
        once=once,
        expect_head=expect_head,
    )
    return loop.run(request, notify=notify, progress=progress)


def _opened(pool: PoolLike, expect_head: str) -> Pool:
    """Open a pool, verify every entry of its ledger, and return it. Raises `UsageError` for an object that is no pool
    and no path.
    """
    if not isinstance(pool, str | Path | Pool):
        raise UsageError(f"pool is {kind_of(pool)}; give the path of its folder, as in 'pool/'")
    return Pool.open(pool.path if isinstance(pool, Pool) else Path(pool), expect_head=expect_head)


def _refuse_object(name: str, given_object: object) -> None:
    """Raise `UsageError` for a model or data given as an object; its message states how to give an address."""
    address = given_object
    if isinstance(given_object, ModelReference | DataReference):
        address = getattr(given_object, name)
    if isinstance(address, str | Path):
        return
    example = (
        "a function in a file that returns it, as in net.py:make, or a file such as weights.safetensors"
        if name == "model"
        else "a file with it, as written by numpy.savez('images.npz', x_train=x, y_train=y, x_test=x2, y_test=y2)"
    )
    raise UsageError(
        f"{name} is {kind_of(address)}, and a pool stores the address with which it is opened again; give "
        f"{example}"
    )
