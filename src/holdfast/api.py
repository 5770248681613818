"""The Python twins of the commands: the same names, the same arguments, the same results.

They take what a caller has in hand (a network, a function or an address; tensors, arrays, a loader or an address) and
normalise it once; below them every parameter has one type.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from holdfast.attacks.protocol import Attack
from holdfast.checkup import Finding, examine
from holdfast.config import hardening, ordering
from holdfast.config.attacks import checked
from holdfast.config.grammar import nearest
from holdfast.config.settings import AssessSettings, HardenSettings, check
from holdfast.config.starting import DEMO_COMMAND, DIGITS, demo_settings, init, validate
from holdfast.core.batch import Data
from holdfast.core.errors import UsageError
from holdfast.core.evidence import Evidence
from holdfast.core.model import Classifier
from holdfast.gallery import ITEMS
from holdfast.reports.write import check as check_place
from holdfast.runs import assess as assessing
from holdfast.runs.comparison import Comparison
from holdfast.runs.exhibition import Exhibit, exhibits
from holdfast.runs.hardening import Hardened, harden
from holdfast.runs.index import open_run
from holdfast.runs.order import Order, Progress, Subject, silent
from holdfast.runs.result import Result
from holdfast.runs.selection import selected
from holdfast.sources.data import open_data
from holdfast.sources.memory import as_data
from holdfast.store.verify import Verified
from holdfast.store.verify import verify as verify_folder

__all__ = [
    "assess",
    "carry_out",
    "compare",
    "demo",
    "doctor",
    "exhibition",
    "init",
    "look_over",
    "rehearse",
    "report",
    "validate",
    "verify",
]

Numbers = Sequence[float]
ModelLike = nn.Module | Callable[[Tensor], Tensor] | str | Path
"""A network, a function from inputs to logits, or an address as on the command line."""
DataLike = Any
"""`(x, y)` as tensors or arrays, a loader or dataset of pairs, a `Data`, or an address."""


def assess(
    model: ModelLike,
    data: DataLike,
    threat: str = "linf:8/255",
    suite: str | Sequence[Attack] | None = None,
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
    bounds: Numbers | None = None,
    mean: Numbers | None = None,
    std: Numbers | None = None,
    classes: int | None = None,
    arch: str | None = None,
    model_args: Mapping[str, str] | None = None,
    allow_hosts: Sequence[str] = (),
    headers: Sequence[str] = (),
    http_request: str | None = None,
    http_response: str | None = None,
    http_labels: bool = False,
    http_max_rows: int = 64,
    http_timeout: str = "30s",
    http_retries: int = 5,
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
    """How robust a model is, honestly: the worst case over a suite of attacks, with intervals and doubts.

    Without a `suite` it is `fast`, or `transfer` where the threat says access=none. `surrogates` are models of the
    attacker's own, a `Classifier` where their preprocessing is to be said, `holdfast.skipped` for skip gradients.
    `across` lists other data of the same shape, which changes are carried to and from. With `run` everything is kept in
    that folder, and `resume` goes on with it. A network in hand stays on its device.
    """
    settings = _settings("assess()", locals())
    opening = partial(_brought, model, data, surrogates, settings)
    subject, given, seconds = opening()
    order = _order(suite, baseline, settings, subject, _device(model, subject, settings))
    learned = _fit(fit, data, settings, subject.model, order)
    order = replace(order, fit=learned, surrogates=seconds, across=_others(across, settings, subject.model))
    place = None if run is None else Path(run)
    return assessing.assess(
        subject, given, order, run=place, resume=resume, progress=progress, opening=opening
    )


def carry_out(
    settings: AssessSettings,
    *,
    run: Path | None,
    resume: bool = False,
    progress: Progress = silent,
    command: str = "",
) -> Result:
    """`assess` as the command line and a configuration file ask for it; `command` is how to repeat it."""
    opening = partial(ordering.opened, settings)
    subject, data, surrogates = opening()
    baseline, target = _evidence(settings.baseline), subject.model.access
    order = ordering.order(settings, baseline=baseline, target=target, command=command)
    fit = ordering.opened_fit(settings, subject.model, order.plan)
    across = ordering.opened_across(settings, subject.model)
    order = replace(order, fit=fit, surrogates=surrogates, across=across)
    return assessing.assess(subject, data, order, run=run, resume=resume, progress=progress, opening=opening)


def carry_out_hardening(
    settings: HardenSettings,
    *,
    run: Path,
    resume: bool = False,
    progress: Progress = silent,
    command: str = "",
) -> Hardened:
    """`harden` as the command line and a configuration file ask for it; `command` is how to repeat it."""
    subject, training, test = hardening.opened(settings)
    wish = hardening.wish(settings, subject, command=command)
    return harden(subject, training, test, wish, run=run, resume=resume, progress=progress)


def demo(folder: str | Path = "holdfast-demo", *, progress: Progress = silent) -> Result:
    """The main job on a bundled network and real data, offline: writes `report.html` and `report.json` in a folder."""
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
    """The gallery of masked models, each built and measured on the first `n` bundled digits, and then `shown`.

    `only` names some of them.
    """
    known = [item.name for item in ITEMS]
    for name in only:
        if name not in known:
            raise UsageError(f"there is no {name!r} in the gallery{nearest(name, known)}")
    items = [item for item in ITEMS if not only or item.name in only]
    training = open_data(DIGITS, split="train")
    digits = training.read(0, len(training))
    found = []
    for exhibit in exhibits(digits, open_data(DIGITS, n=n), items):
        shown(exhibit)
        found.append(exhibit)
    return tuple(found)


def rehearse(settings: AssessSettings, n: int) -> tuple[Result, int]:
    """The run on its first `n` examples, kept nowhere, and how many examples it would have in all."""
    subject, data, surrogates = ordering.opened(settings)
    asked = ordering.order(settings, baseline=_evidence(settings.baseline), target=subject.model.access)
    fit = ordering.opened_fit(settings, subject.model, asked.plan)
    across = ordering.opened_across(settings, subject.model)
    order = replace(asked, gates=(), workers=None, fit=fit, surrogates=surrogates, across=across)
    few = selected(data, n=min(n, len(data)), sample=None, seed=settings.seed)
    return assessing.assess(subject, few, order), len(data)


def doctor(
    model: ModelLike,
    data: DataLike,
    *,
    n: int | None = None,
    split: str | None = None,
    label: str | None = None,
    drop: Sequence[str] = (),
    bounds: Numbers | None = None,
    mean: Numbers | None = None,
    std: Numbers | None = None,
    classes: int | None = None,
    arch: str | None = None,
    model_args: Mapping[str, str] | None = None,
    allow_hosts: Sequence[str] = (),
    headers: Sequence[str] = (),
    http_request: str | None = None,
    http_response: str | None = None,
    http_labels: bool = False,
    http_max_rows: int = 64,
    http_timeout: str = "30s",
    http_retries: int = 5,
    trust_code: bool = False,
) -> tuple[Finding, ...]:
    """The usual mistakes between a model and its data, found in seconds."""
    settings = _settings("doctor()", locals())
    subject = _subject(model, settings)
    return examine(subject.model, _data(data, settings, subject.model, lenient=True))


def look_over(settings: AssessSettings) -> tuple[Finding, ...]:
    """`doctor` as the command line and a configuration file ask for it."""
    subject = ordering.opened_subject(settings)
    return examine(subject.model, ordering.opened_data(settings, subject.model, lenient=True))


def compare(first: Result | str | Path, second: Result | str | Path) -> Comparison:
    """What changed from the first run to the second, over the examples that both hold."""
    return Comparison(_result(first), _result(second))


def report(run: str | Path) -> Result:
    """The result that a finished run left in its folder."""
    return open_run(Path(run))


def verify(run: str | Path) -> Verified:
    """Whether a run folder still is what its chain says; `TargetError` names the first thing that is not."""
    return verify_folder(Path(run))


def _settings(where: str, arguments: Mapping[str, Any]) -> AssessSettings:
    """The arguments that are settings, checked as those of a file are; what a caller holds in hand is no setting."""
    said = {name: arguments[name] for name in AssessSettings.model_fields if arguments.get(name) is not None}
    for name in ("model", "data", "fit", "suite", "baseline"):
        if isinstance(said.get(name), str | Path):
            said[name] = str(said[name])
        else:
            said.pop(name, None)
    for name in ("surrogates", "across"):
        said.pop(name, None)
    return check(said, where, kind=AssessSettings)


def _order(
    suite: str | Sequence[Attack] | None,
    baseline: Result | Evidence | str | Path | None,
    settings: AssessSettings,
    subject: Subject,
    device: str | None,
) -> Order:
    attacks = None if suite is None or isinstance(suite, str) else _attacks(suite)
    return ordering.order(
        settings,
        attacks=attacks,
        baseline=_evidence(baseline),
        device=device,
        target=subject.model.access,
    )


def _attacks(suite: object) -> tuple[Attack, ...]:
    expected = (
        "expected the name of one suite, or a list of attacks such as [holdfast.attacks.PGD(steps=100)]"
    )
    attacks = tuple(suite) if isinstance(suite, Iterable) else ()
    if not attacks:
        raise UsageError(f"suite is {suite!r}; {expected}")
    for attack in attacks:
        if isinstance(attack, type):
            raise UsageError(
                f"suite holds the class {attack.__name__}; give an attack of it: {attack.__name__}()"
            )
        if not isinstance(attack, Attack):
            raise UsageError(f"suite holds {attack!r}; {expected}")
    return tuple(checked(attack) for attack in attacks)


def _brought(
    model: ModelLike, data: DataLike, surrogates: object, settings: AssessSettings
) -> tuple[Subject, Data, tuple[Subject, ...]]:
    subject = _subject(model, settings)
    seconds = _surrogates(surrogates, settings, subject.model)
    return subject, _data(data, settings, subject.model), seconds


def _subject(model: ModelLike, settings: AssessSettings) -> Subject:
    if isinstance(model, str | Path):
        return ordering.opened_subject(settings)
    if not callable(model):
        raise UsageError(
            f"model is a {type(model).__name__}; expected a network, a function from inputs to logits, or an address"
        )
    return ordering.given_subject(model, settings)


def _surrogates(given: object, settings: AssessSettings, target: Classifier) -> tuple[Subject, ...]:
    """Models in hand, and addresses as the command line takes them."""
    if not isinstance(given, list | tuple):
        raise UsageError(
            f"surrogates is a {type(given).__name__}; give a list of models, as in surrogates=[net]"
        )
    subjects = []
    for each in given:
        if isinstance(each, str | Path):
            said = check({"surrogates": [str(each)]}, "assess()", kind=AssessSettings).surrogates[0]
            subjects.append(ordering.opened_surrogate(said, settings, target))
        elif callable(each):
            subjects.append(ordering.given_surrogate(each, target))
        else:
            raise UsageError(
                f"surrogates holds a {type(each).__name__}; give networks, functions or addresses"
            )
    return tuple(subjects)


def _data(data: DataLike, settings: AssessSettings, model: Classifier, *, lenient: bool = False) -> Data:
    if isinstance(data, str | Path):
        return ordering.opened_data(settings, model, lenient=lenient)
    _refuse_address_words(settings)
    given = as_data(data, classes=model.classes, bounds=model.bounds, lenient=lenient)
    return selected(given, n=settings.n, sample=settings.sample, seed=settings.seed)


def _fit(
    fit: DataLike | None, data: DataLike, settings: AssessSettings, model: Classifier, order: Order
) -> Data | None:
    """What attacks are learned on, as an address or in hand."""
    if fit is None or isinstance(fit, str | Path):
        return ordering.opened_fit(settings, model, order.plan, in_hand=not isinstance(data, str | Path))
    given = as_data(fit, classes=model.classes, bounds=model.bounds)
    return selected(given, n=None, sample=ordering.examples_to_fit(order.plan) or 1, seed=settings.seed)


def _others(given: object, settings: AssessSettings, model: Classifier) -> tuple[Data, ...]:
    """Data sets that changes are carried to and from, as addresses or in hand."""
    if isinstance(given, tuple) and not given:
        return ()
    if not isinstance(given, list):
        raise UsageError(
            f"across is a {type(given).__name__}; give a list of data sets, as in across=['mnist-mini']"
        )
    return tuple(
        ordering.opened_other(str(each), settings, model)
        if isinstance(each, str | Path)
        else as_data(each, bounds=model.bounds)
        for each in given
    )


def _refuse_address_words(settings: AssessSettings) -> None:
    """What picks from a file or a catalogue has nothing to pick from in data that a caller holds."""
    said = [f"{name}={value!r}" for name in ("split", "label", "drop") if (value := getattr(settings, name))]
    if said:
        raise UsageError(
            f"{', '.join(said)} cannot be meant for data in hand: it is for an address, such as table.csv; "
            f"choose the rows and columns before, and leave it out"
        )


def _device(model: ModelLike, subject: Subject, settings: AssessSettings) -> str | None:
    """Where a caller's own network is, unless it is told where to go."""
    weight = next(subject.model.parameters(), None)
    if isinstance(model, str | Path) or settings.device != "auto" or weight is None:
        return None
    return str(weight.device)


def _evidence(run: Result | Evidence | str | Path | None) -> Evidence | None:
    return run if run is None or isinstance(run, Evidence) else _result(run).evidence


def _result(run: Result | str | Path) -> Result:
    return run if isinstance(run, Result) else open_run(Path(run))
