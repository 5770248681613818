"""Python functions that do the same as the commands, with the same names, arguments and results.

Each function accepts a network, a function or an address as its model, and tensors, arrays, a loader or an address as
its data, and converts them once. The functions that it calls accept one type for each parameter.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.config.assess_inputs import AssessInputs, measured
from holdfast.config.attacks import ThreatLike, threat_model, threat_written
from holdfast.config.clusters import Ray, cluster_settings
from holdfast.config.grammar import did_you_mean, parse_threat
from holdfast.config.members import SuiteLike, members_given
from holdfast.config.python_functions import verb_with
from holdfast.config.references import (
    DataLike,
    ModelLike,
    Sources,
    open_data,
    open_model,
)
from holdfast.config.resolve import (
    device_of_model,
    folder_of,
    open_examples,
    open_subject,
    open_surrogates,
    sources_at,
    sources_given,
)
from holdfast.config.settings import (
    Assess,
    Certify,
    Doctor,
    Harden,
    check_settings,
    given,
)
from holdfast.config.starting import DEMO_COMMAND, DIGITS, demo_settings, init, validate
from holdfast.config.values import is_suite
from holdfast.core.errors import UsageError
from holdfast.core.evidence import Evidence
from holdfast.engine.progress import Notify, Progress, ignore, silent
from holdfast.ops.recipe import Recipe
from holdfast.reports.write import check_destination as check_place
from holdfast.sources import data as data_sources
from holdfast.sources.counting import inspection_counter
from holdfast.stored import baseline_evidence
from holdfast.verbs.result import Result

if TYPE_CHECKING:
    from holdfast.checkup import Checkup
    from holdfast.verbs.exhibition import Exhibit
    from holdfast.verbs.hardened import Hardened

__all__ = [
    "assess",
    "carry_out",
    "certify",
    "demo",
    "doctor",
    "exhibition",
    "harden",
    "init",
    "look_over",
    "open_data",
    "open_model",
    "validate",
]


@verb_with(Assess)
def assess(
    model: ModelLike,
    data: DataLike,
    threat: ThreatLike = "linf:8/255",
    suite: SuiteLike | None = None,
    *,
    surrogates: Sequence[ModelLike] = (),
    baseline: Result | Evidence | str | Path | None = None,
    fit: DataLike | None = None,
    across: Sequence[DataLike] = (),
    on: str | Ray = "local",
    run: str | Path | None = None,
    resume: bool = False,
    progress: Progress = silent,
    **settings: Any,
) -> Result:
    """Measure the robust accuracy of a model against a suite of attacks, with confidence intervals and doubts.

    An example is robust if no attack of the suite breaks it. `model` and `data` are objects, addresses, or results of
    `open_model` and `open_data`. `threat` is a string, or a constraint such as `holdfast.Linf(8/255)`. `suite` is the
    name of a suite or of attacks (`"pgd,square"`), an attack, a class of attacks, or a list of these. The default is
    `fast`, or `transfer` for a threat with access=none. `surrogates` are models of the attacker; a `Classifier`
    declares the preprocessing, and `holdfast.skipped` is for skip gradients. `across` lists other data sets with inputs
    of the same shape: perturbations computed on `data` are also evaluated on them, and theirs on `data`. With `certify`
    interval bounds and CROWN come first, and 32 of the examples that they certify are attacked. `fit` contains the
    examples on which learned attacks are fitted, and `baseline` is the run with which gates compare. `on` states where
    `workers` measure: on this machine, or on a Ray cluster (`"ray"`, `"ray://HOST:PORT"`, or a `holdfast.Ray`). If
    `run` is given, all artefacts are stored in that folder, and `resume` continues the run in it.
    """
    checked = check_settings(
        given(
            **settings,
            threat=threat_written(threat, "assess(): threat"),
            suite=suite if is_suite(suite) else None,
            **cluster_settings(on),
        ),
        "assess()",
        kind=Assess,
    )
    sources = sources_given(model, data, checked)
    members = None
    if suite is not None and checked.suite is None:
        members = members_given(suite, threat_model(parse_threat(checked.threat)).constraint)
    inputs = AssessInputs(checked, sources, surrogates, fit, across, members, baseline_evidence(baseline))
    return measured(inputs, folder_of(run, resume=resume), resume=resume, progress=progress)


@verb_with(Certify)
def certify(
    model: ModelLike,
    data: DataLike,
    threat: ThreatLike = "linf:8/255",
    method: str = "auto",
    *,
    baseline: Result | str | Path | None = None,
    on: str | Ray = "local",
    run: str | Path | None = None,
    resume: bool = False,
    progress: Progress = silent,
    **settings: Any,
) -> Result:
    """Prove for each example that no input of the threat model is misclassified, or find one that is.

    Every example is certified, broken or unknown. `method` is `auto`, which runs interval bounds, CROWN, attacks, and
    branch and bound, or one method, which is run with the attacks. CROWN, alpha-CROWN and branch and bound take at most
    `timeout` for each example.
    With `method="smoothing"` the model of the result is the smoothed classifier of `model` with noise of standard
    deviation `sigma`; a verdict takes at most `draws` noisy inputs (10,000 by default), and is wrong with a probability
    of at most `failure_probability` (0.001 by default) for each example. With `clip`, noisy inputs are first clamped to
    the legal range.
    With `geometry`, the report shows the decision boundary around as many examples.
    The attacks are those of the default suite; of the certified examples they are run on 32, or on all with `full`. The
    other arguments are those of `assess`.
    Raises `UnsoundProof` if an attack breaks a certified example, and `UsageError` for a model or a threat model about
    which the method proves nothing.
    """
    cluster = cluster_settings(on)
    checked = check_settings(
        given(
            **settings,
            threat=threat_written(threat, "certify(): threat"),
            method=method,
            cluster_timeout=cluster.pop("timeout", None),
            **cluster,
        ),
        "certify()",
        kind=Certify,
    )
    sources = sources_given(model, data, checked)
    inputs = AssessInputs(checked, sources, (), None, (), None, baseline_evidence(baseline))
    return measured(inputs, folder_of(run, resume=resume), resume=resume, progress=progress)


def carry_out(
    settings: Assess | Certify,
    *,
    run: Path | None,
    resume: bool = False,
    progress: Progress = silent,
    notify: Notify = ignore,
    detail: Notify = ignore,
    command: str = "",
) -> Result:
    """Run an assessment or a certification with the settings of the command line or of a configuration file, and return
    its result.

    The run stores the command line `command`. `detail` is called with messages on single shards.
    """
    inputs = AssessInputs.of(settings, command)
    return measured(inputs, run, resume=resume, progress=progress, notify=notify, detail=detail)


@verb_with(Harden)
def harden(
    model: ModelLike,
    data: DataLike,
    threat: ThreatLike = "linf:8/255",
    recipe: Recipe | str | Mapping[str, Any] = "auto",
    *,
    fit: DataLike | None = None,
    unlabelled: DataLike | None = None,
    surrogates: Sequence[ModelLike] = (),
    baseline: Result | Evidence | str | Path | None = None,
    on: str | Ray = "local",
    run: str | Path | None = None,
    resume: bool = False,
    progress: Progress = silent,
    **settings: Any,
) -> "Hardened":
    """Train a new model that is more robust than `model`, and assess both. The given model is never changed.

    `model` and `data` are objects, addresses, or results of `open_model` and `open_data`. If `data` is an address, its
    train split is used for training and its test split for measurement. If it is an object, it is used for measurement
    and `fit` for training; without `fit`, a tenth of it is held out for measurement. `unlabelled` contains further
    inputs for training, as an address or an object, for recipes that use inputs without labels. `budget` is the
    wall-clock time for the training, as in "10min". The other arguments are those of `assess`, and apply to the
    measurements before and after the training. If `run` is given, all artefacts are stored in that folder, and `resume`
    continues the run in it.
    """
    from holdfast.config import hardening
    from holdfast.verbs import harden as hardens

    checked = check_settings(
        given(
            **settings,
            threat=threat_written(threat, "harden(): threat"),
            recipe=recipe if isinstance(recipe, str | Mapping) else None,
            **cluster_settings(on),
        ),
        "harden()",
        kind=Harden,
    )
    sources = sources_given(model, data, checked)
    folder = folder_of(run, resume=resume)
    subject, training, test, fit_data = hardening.open_for_hardening(sources, fit, unlabelled, recipe)
    request = hardening.harden_request(
        checked,
        sources,
        subject,
        recipe=None if isinstance(recipe, str | Mapping) else recipe,
        surrogates=open_surrogates(surrogates, sources, subject.model),
        baseline=baseline_evidence(baseline),
        training=training,
        excluded=fit_data,
        device=device_of_model(sources, subject, checked.device),
    )
    return hardens.harden(subject, training, test, request, run=folder, resume=resume, progress=progress)


def carry_out_hardening(
    settings: Harden,
    *,
    run: Path,
    resume: bool = False,
    progress: Progress = silent,
    notify: Notify = ignore,
    detail: Notify = ignore,
    command: str = "",
) -> "Hardened":
    """Train a more robust model with the settings of the command line or of a configuration file, and return it with
    both assessments.

    `command` is the command line that repeats the run; the run stores it.
    """
    from holdfast.config import hardening
    from holdfast.verbs import harden as hardens

    sources = sources_at(settings)
    subject, training, test, fit_data = hardening.open_for_settings(settings, sources)
    request = hardening.harden_request(
        settings,
        sources,
        subject,
        surrogates=open_surrogates(settings.surrogates, sources, subject.model),
        baseline=baseline_evidence(settings.baseline),
        training=training,
        excluded=fit_data,
        command=command,
    )
    return hardens.harden(
        subject, training, test, request,
        run=run, resume=resume, progress=progress, notify=notify, detail=detail,
    )  # fmt: skip


def demo(
    folder: str | Path = "holdfast-demo", *, progress: Progress = silent, notify: Notify = ignore
) -> Result:
    """Assess a bundled model on bundled data, without a network connection, and write `report.html` and `report.json`
    to `folder`.

    The model is a bundled network, and the data are real images of digits. `notify` is called with the expected time.
    """
    paths = [Path(folder) / name for name in ("report.html", "report.json")]
    for path in paths:
        # before the run, so that it does not end without its reports
        check_place(path)
    result = carry_out(demo_settings(), run=None, progress=progress, notify=notify, command=DEMO_COMMAND)
    for path in paths:
        result.write(path)
    return result


def exhibition(
    *, n: int = 500, only: Sequence[str] = (), shown: "Callable[[Exhibit], None]" = lambda exhibit: None
) -> "tuple[Exhibit, ...]":
    """Build each model of the gallery, whose gradients are masked on purpose, and measure it on the first `n` bundled
    images of digits.

    `shown` is called with each result as soon as it is known. `only` lists the names of the models to build; if it is
    empty, all are built. Raises `UsageError` for an unknown name.
    """
    from holdfast.gallery import ITEMS
    from holdfast.verbs.exhibition import exhibits

    names = [item.name for item in ITEMS]
    for name in only:
        if name not in names:
            raise UsageError(f"there is no {name!r} in the gallery{did_you_mean(name, names)}")
    items = [item for item in ITEMS if not only or item.name in only]
    training = data_sources.open_data(DIGITS, split="train")
    digits = training.read(0, len(training))
    built = []
    for exhibit in exhibits(digits, data_sources.open_data(DIGITS, n=n), items):
        shown(exhibit)
        built.append(exhibit)
    return tuple(built)


@verb_with(Doctor)
def doctor(model: ModelLike, data: DataLike, **settings: Any) -> "Checkup":
    """Check within seconds whether a model and its data fit together, and return findings about common mistakes, which
    are printed as `holdfast doctor` prints them.

    `model` and `data` are objects, addresses, or results of `open_model` and `open_data`.
    """
    checked = check_settings(given(**settings), "doctor()", kind=Doctor)
    return _findings(sources_given(model, data, checked))


def look_over(settings: Doctor) -> "Checkup":
    """Check a model and its data for common mistakes, with the settings of the command line or of a configuration file,
    and return the findings.
    """
    return _findings(sources_at(settings))


def _findings(sources: Sources) -> "Checkup":
    from holdfast.checkup import Checkup, examine

    subject = open_subject(sources)
    inspection_counter(subject.model)
    return Checkup(examine(subject.model, open_examples(sources, subject.model, lenient=True)))
