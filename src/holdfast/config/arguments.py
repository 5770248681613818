"""Converts arguments of the Python functions to the settings, the model, the data and the attacks of a run."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from holdfast.config import expecting, ordering
from holdfast.config.attacks import threat_said
from holdfast.config.served import refuse_unserved
from holdfast.config.settings import AssessSettings, S, check_settings
from holdfast.config.values import is_suite
from holdfast.core.batch import Data
from holdfast.core.constraints import Constraint
from holdfast.core.errors import UsageError
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.sources.adapting import accepted
from holdfast.sources.data import noting_fewer
from holdfast.sources.estimators import Predictor
from holdfast.sources.expected import Expected
from holdfast.sources.frames import is_frame, open_frame
from holdfast.sources.memory import as_data
from holdfast.sources.selection import selected
from holdfast.verbs.request import AssessRequest, Subject

Numbers = Sequence[float]
ModelLike = nn.Module | Callable[[Tensor], Tensor] | Predictor | str | Path
"""A network, a function from inputs to logits, an estimator, or an address as on the command line."""
ThreatLike = str | Constraint | ThreatModel
"""A threat as text, a constraint such as `holdfast.Linf(8/255)`, or a threat model without surrogates."""
DataLike = Any
"""`(x, y)` as tensors or arrays, a loader or dataset of pairs, a `Data`, or an address."""


def settings_said(where: str, arguments: Mapping[str, Any], kind: type[S]) -> S:
    """Return the arguments that are settings, validated like those of a file.

    Models and data given as objects are left out.
    """
    settings = {name: arguments[name] for name in kind.model_fields if arguments.get(name) is not None}
    if "threat" in settings:
        settings["threat"] = threat_said(settings["threat"], f"{where}: threat")
    if not is_suite(settings.get("suite")):
        settings.pop("suite", None)
    for name in ("model", "data", "fit", "unlabelled", "baseline"):
        if isinstance(settings.get(name), str | Path):
            settings[name] = str(settings[name])
        else:
            settings.pop(name, None)
    for name in ("surrogates", "across"):
        settings.pop(name, None)
    if not isinstance(settings.get("recipe", ""), str | Mapping):
        del settings["recipe"]
    return check_settings(settings, where, kind=kind)


def given_all(
    model: ModelLike, data: DataLike, surrogates: object, settings: AssessSettings
) -> tuple[Subject, Data, tuple[Subject, ...]]:
    """Return the model, the examples and the surrogates, each given as an object or an address."""
    subject = subject_of(model, settings)
    seconds = surrogates_of(surrogates, settings, subject.model)
    given = data_of(data, settings, subject.model)
    return expecting.with_found_properties(subject, seconds, given), given, seconds


def subject_of(model: ModelLike, settings: AssessSettings) -> Subject:
    """Return the model, given as an object or an address."""
    if isinstance(model, str | Path):
        return ordering.opened_subject(settings)
    if not accepted(model):
        raise UsageError(
            f"model is a {type(model).__name__}; expected a network, a function from inputs to logits, an estimator, "
            "or an address"
        )
    subject = ordering.given_subject(model, settings)
    refuse_unserved(settings, subject.model)
    return subject


def surrogates_of(given: object, settings: AssessSettings, target: Classifier) -> tuple[Subject, ...]:
    """Return the surrogates, given as objects or as addresses in the form of the command line."""
    if not isinstance(given, list | tuple):
        raise UsageError(
            f"surrogates is a {type(given).__name__}; give a list of models, as in surrogates=[net]"
        )
    subjects = []
    for each in given:
        if isinstance(each, str | Path):
            described = check_settings(
                {"surrogates": [str(each)]}, "assess()", kind=AssessSettings
            ).surrogates[0]
            subjects.append(ordering.opened_surrogate(described, settings, target))
        elif accepted(each):
            subjects.append(ordering.given_surrogate(each, settings, target))
        else:
            raise UsageError(
                f"surrogates contains a {type(each).__name__}; give networks, functions or addresses"
            )
    return tuple(subjects)


def data_of(data: DataLike, settings: AssessSettings, model: Classifier, *, lenient: bool = False) -> Data:
    """Return the examples, given as an object or an address.

    With `lenient`, examples that do not fit the model are accepted too.
    """
    if isinstance(data, str | Path):
        return ordering.opened_data(settings, model, lenient=lenient)
    known = expecting.expected(settings, model, lenient=lenient)
    if is_frame(data):
        _refuse_address_words(settings, "x", "y")
        rows: dict[str, Any] = {"n": settings.n, "sample": settings.sample, "seed": settings.seed}
        given: Data = open_frame(
            data, label=settings.label, drop=settings.drop, split=settings.split, **rows, expected=known
        )
    else:
        _refuse_address_words(settings, "split", "label", "drop", "x", "y")
        whole = as_data(data, expected=known, n=settings.n if settings.sample is None else None)
        given = selected(whole, n=settings.n, sample=settings.sample, seed=settings.seed)
    return noting_fewer(given, settings.n or settings.sample)


def held(data: DataLike, settings: AssessSettings, expected: Expected) -> Data:
    """Return all examples of another data set that is given as an object."""
    if is_frame(data):
        return open_frame(data, label=settings.label, drop=settings.drop, expected=expected)
    return as_data(data, expected=expected)


def fit_data(
    fit: DataLike | None, data: DataLike, settings: AssessSettings, model: Classifier, order: AssessRequest
) -> Data | None:
    """Return the examples on which attacks are learned, given as an address or an object. None if none are needed."""
    if fit is None or isinstance(fit, str | Path):
        return ordering.opened_fit(settings, model, order.plan, in_hand=not isinstance(data, str | Path))
    given = held(fit, settings, expecting.expected(settings, model))
    return selected(given, n=None, sample=ordering.examples_to_fit(order.plan) or 1, seed=settings.seed)


def others_of(given: object, settings: AssessSettings, model: Classifier) -> tuple[Data, ...]:
    """Return the data sets of the transfer between data sets, given as addresses or objects."""
    if isinstance(given, tuple) and not given:
        return ()
    if not isinstance(given, list):
        raise UsageError(
            f"across is a {type(given).__name__}; give a list of data sets, as in across=['mnist-mini']"
        )
    return tuple(
        ordering.opened_other(str(each), settings, model)
        if isinstance(each, str | Path)
        else held(each, settings, expecting.unlabelled(settings, model))
        for each in given
    )


def device_of_model(model: ModelLike, subject: Subject, settings: AssessSettings) -> str | None:
    """Return the device of a network given as an object, or None if the settings determine the device."""
    weight = next(subject.model.parameters(), None)
    if isinstance(model, str | Path) or settings.device != "auto" or weight is None:
        return None
    return str(weight.device)


def _refuse_address_words(settings: AssessSettings, *names: str) -> None:
    """Raise `UsageError` for settings that select from a file or a catalogue, if the data are an object."""
    words = [f"{name}={value!r}" for name in names if (value := getattr(settings, name))]
    if words:
        raise UsageError(
            f"{', '.join(words)} is not possible for data given as a Python object: it is for an address, such as "
            f"table.csv; select the rows and columns before, and leave it out"
        )


def folder_of(run: str | Path | None, *, resume: bool) -> Path | None:
    """Return the folder of a run. Raises `UsageError` if a run is to be resumed and no folder is given."""
    if resume and run is None:
        raise UsageError("resume=True continues a run; give its folder, as in run='runs/h1'")
    return None if run is None else Path(run)
