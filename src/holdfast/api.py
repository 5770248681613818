"""Python functions equivalent to the commands, with the same names, arguments and results.

They accept a network, a function or an address as model, and tensors, arrays, a loader or an address as data, and
convert these once. Functions below this module have one type for each parameter.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from holdfast.checkup import Finding, examine
from holdfast.config import hardening, ordering
from holdfast.config.arguments import (
    DataLike,
    ModelLike,
    Numbers,
    ThreatLike,
    data_of,
    device_of_model,
    fit_data,
    folder_of,
    given_all,
    others_of,
    settings_said,
    subject_of,
    surrogates_of,
)
from holdfast.config.attacked import attackers
from holdfast.config.attacks import threat_model
from holdfast.config.grad_mode import gradients
from holdfast.config.grammar import did_you_mean, parse_threat
from holdfast.config.members import SuiteLike, members_given
from holdfast.config.rehearsing import rehearse, rehearse_served
from holdfast.config.settings import AssessSettings, HardenSettings
from holdfast.config.starting import DEMO_COMMAND, DIGITS, demo_settings, init, validate
from holdfast.core.errors import UsageError
from holdfast.core.evidence import Evidence
from holdfast.core.outputs import OutputKind
from holdfast.core.types import Layout
from holdfast.engine.progress import Notify, Progress, ignore, silent
from holdfast.gallery import ITEMS
from holdfast.ops.recipe import Recipe
from holdfast.reports.write import check_destination as check_place
from holdfast.sources.counting import look_at
from holdfast.sources.data import open_data
from holdfast.sources.expected import ClassOrder
from holdfast.store.verify import Verified
from holdfast.store.verify import verify as verify_folder
from holdfast.verbs import assess as assessing
from holdfast.verbs import harden as hardens
from holdfast.verbs.comparison import Comparison
from holdfast.verbs.exhibition import Exhibit, exhibits
from holdfast.verbs.hardened import Hardened
from holdfast.verbs.request import AssessRequest, Subject
from holdfast.verbs.result import Result
from holdfast.verbs.served import journaled
from holdfast.verbs.stored_runs import open_run

__all__ = [
    "assess",
    "carry_out",
    "compare",
    "demo",
    "doctor",
    "exhibition",
    "harden",
    "init",
    "look_over",
    "rehearse",
    "rehearse_served",
    "report",
    "validate",
    "verify",
]


@gradients()
def assess(
    model: ModelLike,
    data: DataLike,
    threat: ThreatLike = "linf:8/255",
    suite: SuiteLike | None = None,
    *,
    surrogates: Sequence[ModelLike] = (),
    gates: Sequence[str] = (),
    baseline: Result | Evidence | str | Path | None = None,
    accept_doubts: Mapping[str, str] | None = None,
    seed: int = 0,
    n: int | None = None,
    sample: int | None = None,
    split: str | None = None,
    fit: DataLike | None = None,
    across: Sequence[DataLike] = (),
    transform: str | None = None,
    label: str | None = None,
    drop: Sequence[str] = (),
    x: str | None = None,
    y: str | None = None,
    bounds: Numbers | None = None,
    mean: Numbers | None = None,
    std: Numbers | None = None,
    data_normalised: tuple[Numbers, Numbers] | str | None = None,
    layout: Layout | None = None,
    model_output: OutputKind | None = None,
    classes: int | None = None,
    class_names: Sequence[str] | str | None = None,
    class_order: ClassOrder | None = None,
    arch: str | None = None,
    model_args: Mapping[str, str] | None = None,
    input_shape: Sequence[int] | None = None,
    allow_hosts: Sequence[str] = (),
    headers: Sequence[str] = (),
    http_request: str | None = None,
    http_response: str | None = None,
    http_labels: bool = False,
    http_max_rows: int = 64,
    http_timeout: str = "30s",
    http_retries: int = 5,
    http_concurrency: int = 1,
    http_rate: str | None = None,
    max_queries: int | None = None,
    on_refused: Literal["reject", "stop"] = "reject",
    keep_answers: bool = False,
    trust_code: bool = False,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    curve: bool = False,
    full: bool = False,
    doubts: bool = True,
    adaptive: bool = False,
    save_adversarial: bool = False,
    time_budget: str | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    device: str = "auto",
    run: str | Path | None = None,
    resume: bool = False,
    progress: Progress = silent,
) -> Result:
    """Measure how robust a model is: the worst case over a suite of attacks, with intervals and doubts.

    `threat` is text, or a constraint such as `holdfast.Linf(8/255)`. `suite` names a suite or attacks (`"pgd,square"`),
    or is an attack, a class of attacks, or a list of these. The default is `fast`, or `transfer` for a threat with
    access=none. `surrogates` are models of the attacker; a `Classifier` declares the preprocessing, and
    `holdfast.skipped` is for skip gradients. `across` lists other data of the same shape, to which perturbations are
    transferred and from which they come. With `run` all artefacts are stored in that folder, and `resume` continues the
    run. A network given as an object stays on its device.
    """
    settings = settings_said("assess()", locals(), AssessSettings)
    place = folder_of(run, resume=resume)
    opening = partial(given_all, model, data, surrogates, settings)
    with journaled(place, resume=resume, keep=keep_answers):
        subject, given, seconds = opening()
        order = _order(suite, baseline, settings, subject, device_of_model(model, subject, settings))
        learned = fit_data(fit, data, settings, subject.model, order)
        others = others_of(across, settings, subject.model)
        order = replace(order, fit=learned, surrogates=seconds, across=others)
        return assessing.assess(
            subject, given, order, run=place, resume=resume, progress=progress, opening=opening
        )


def carry_out(
    settings: AssessSettings,
    *,
    run: Path | None,
    resume: bool = False,
    progress: Progress = silent,
    notify: Notify = ignore,
    command: str = "",
) -> Result:
    """Run `assess` for the command line or a configuration file; `command` is the command that repeats it."""
    opening = partial(ordering.open_all, settings)
    with journaled(run, resume=resume, keep=settings.keep_answers):
        subject, data, surrogates = opening()
        baseline, target = _evidence(settings.baseline), subject.model.access
        order = ordering.order(settings, baseline=baseline, target=target, command=command)
        fit = ordering.opened_fit(settings, subject.model, order.plan)
        across = ordering.opened_across(settings, subject.model)
        order = replace(order, fit=fit, surrogates=surrogates, across=across, attackers=attackers(settings))
        return assessing.assess(
            subject, data, order, run=run, resume=resume, progress=progress, opening=opening, notify=notify
        )


@gradients()
def harden(
    model: ModelLike,
    data: DataLike,
    threat: ThreatLike = "linf:8/255",
    recipe: Recipe | str | Mapping[str, Any] = "auto",
    *,
    budget: str | None = None,
    fit: DataLike | None = None,
    unlabelled: DataLike | None = None,
    suite: str | Sequence[str] | None = None,
    surrogates: Sequence[ModelLike] = (),
    gates: Sequence[str] = (),
    baseline: Result | Evidence | str | Path | None = None,
    accept_doubts: Mapping[str, str] | None = None,
    seed: int = 0,
    n: int | None = None,
    sample: int | None = None,
    split: str | None = None,
    label: str | None = None,
    drop: Sequence[str] = (),
    x: str | None = None,
    y: str | None = None,
    bounds: Numbers | None = None,
    mean: Numbers | None = None,
    std: Numbers | None = None,
    data_normalised: tuple[Numbers, Numbers] | str | None = None,
    layout: Layout | None = None,
    model_output: OutputKind | None = None,
    classes: int | None = None,
    class_names: Sequence[str] | str | None = None,
    class_order: ClassOrder | None = None,
    arch: str | None = None,
    model_args: Mapping[str, str] | None = None,
    trust_code: bool = False,
    doubts: bool = True,
    adaptive: bool = False,
    batch_size: int | None = None,
    workers: int | None = None,
    device: str = "auto",
    run: str | Path | None = None,
    resume: bool = False,
    progress: Progress = silent,
) -> Hardened:
    """Train a new model that is more robust, and measure both. The given model is never changed.

    If `data` is an address, its train split is used for training and its test split for measurement. If it is an
    object, it is used for measurement and `fit` for training; without `fit` a tenth of it is held out for measurement.
    `unlabelled` are more inputs for training, as an address or an object, for recipes that learn without labels.
    `budget` is time for the training, as in "10min". With `run` all is stored in that folder; `resume` continues it.
    """
    settings = settings_said("harden()", locals(), HardenSettings)
    place = folder_of(run, resume=resume)
    subject, training, test, whole = hardening.given_for_hardening(model, data, fit, unlabelled, settings)
    request = hardening.harden_request(
        settings,
        subject,
        recipe=None if isinstance(recipe, str | Mapping) else recipe,
        surrogates=surrogates_of(surrogates, settings, subject.model),
        baseline=_evidence(baseline),
        training=training,
        excluded=whole,
        device=device_of_model(model, subject, settings),
    )
    return hardens.harden(subject, training, test, request, run=place, resume=resume, progress=progress)


def carry_out_hardening(
    settings: HardenSettings,
    *,
    run: Path,
    resume: bool = False,
    progress: Progress = silent,
    notify: Notify = ignore,
    command: str = "",
) -> Hardened:
    """Run `harden` for the command line or a configuration file; `command` is the command that repeats it."""
    subject, training, test, whole = hardening.open_for_hardening(settings)
    request = hardening.harden_request(
        settings,
        subject,
        surrogates=ordering.opened_surrogates(settings, subject.model),
        baseline=_evidence(settings.baseline),
        training=training,
        excluded=whole,
        command=command,
    )
    return hardens.harden(
        subject, training, test, request, run=run, resume=resume, progress=progress, notify=notify
    )


def demo(folder: str | Path = "holdfast-demo", *, progress: Progress = silent) -> Result:
    """Run `assess` on a bundled network and real data, offline. Writes `report.html` and `report.json` in a folder."""
    places = [Path(folder) / name for name in ("report.html", "report.json")]
    for place in places:
        check_place(place)
    result = carry_out(demo_settings(), run=None, progress=progress, command=DEMO_COMMAND)
    for place in places:
        result.write(place)
    return result


def exhibition(
    *, n: int = 500, only: Sequence[str] = (), shown: Callable[[Exhibit], None] = lambda exhibit: None
) -> tuple[Exhibit, ...]:
    """Build and measure each masked model of the gallery on the first `n` bundled digits, and pass it to `shown`.

    `only` selects some of them by name.
    """
    names = [item.name for item in ITEMS]
    for name in only:
        if name not in names:
            raise UsageError(f"there is no {name!r} in the gallery{did_you_mean(name, names)}")
    items = [item for item in ITEMS if not only or item.name in only]
    training = open_data(DIGITS, split="train")
    digits = training.read(0, len(training))
    built = []
    for exhibit in exhibits(digits, open_data(DIGITS, n=n), items):
        shown(exhibit)
        built.append(exhibit)
    return tuple(built)


@gradients()
def doctor(
    model: ModelLike,
    data: DataLike,
    *,
    n: int | None = None,
    split: str | None = None,
    label: str | None = None,
    drop: Sequence[str] = (),
    x: str | None = None,
    y: str | None = None,
    bounds: Numbers | None = None,
    mean: Numbers | None = None,
    std: Numbers | None = None,
    data_normalised: tuple[Numbers, Numbers] | str | None = None,
    layout: Layout | None = None,
    model_output: OutputKind | None = None,
    classes: int | None = None,
    class_names: Sequence[str] | str | None = None,
    class_order: ClassOrder | None = None,
    arch: str | None = None,
    model_args: Mapping[str, str] | None = None,
    input_shape: Sequence[int] | None = None,
    allow_hosts: Sequence[str] = (),
    headers: Sequence[str] = (),
    http_request: str | None = None,
    http_response: str | None = None,
    http_labels: bool = False,
    http_max_rows: int = 64,
    http_timeout: str = "30s",
    http_retries: int = 5,
    http_concurrency: int = 1,
    http_rate: str | None = None,
    trust_code: bool = False,
) -> tuple[Finding, ...]:
    """Find common mistakes in the combination of a model and its data, in seconds."""
    settings = settings_said("doctor()", locals(), AssessSettings)
    subject = subject_of(model, settings)
    look_at(subject.model)
    return examine(subject.model, data_of(data, settings, subject.model, lenient=True))


def look_over(settings: AssessSettings) -> tuple[Finding, ...]:
    """Run `doctor` with settings of the command line or a configuration file."""
    subject = ordering.opened_subject(settings)
    look_at(subject.model)
    return examine(subject.model, ordering.opened_data(settings, subject.model, lenient=True))


def compare(first: Result | str | Path, second: Result | str | Path) -> Comparison:
    """Return the changes from the first run to the second, on the examples that both have."""
    return Comparison(_result(first), _result(second))


def report(run: str | Path) -> Result:
    """Return the result of a finished run from its folder."""
    return open_run(Path(run))


def verify(run: str | Path) -> Verified:
    """Check whether a run folder matches its chain. Raises `TargetError` for the first difference."""
    return verify_folder(Path(run))


def _order(
    suite: SuiteLike | None,
    baseline: Result | Evidence | str | Path | None,
    settings: AssessSettings,
    subject: Subject,
    device: str | None,
) -> AssessRequest:
    members = None
    if suite is not None and settings.suite is None:
        members = members_given(suite, threat_model(parse_threat(settings.threat)).constraint)
    order = ordering.order(
        settings,
        members=members,
        baseline=_evidence(baseline),
        device=device,
        target=subject.model.access,
    )
    return replace(order, attackers=attackers(settings))


def _evidence(run: Result | Evidence | str | Path | None) -> Evidence | None:
    return run if run is None or isinstance(run, Evidence) else _result(run).evidence


def _result(run: Result | str | Path) -> Result:
    return run if isinstance(run, Result) else open_run(Path(run))
