"""What a Python caller holds in hand or names, taken once into what a run is given: settings, model, data, attacks."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from holdfast.attacks.protocol import Attack
from holdfast.config import expecting, ordering
from holdfast.config.attacks import checked
from holdfast.config.settings import AssessSettings, S, check
from holdfast.core.batch import Data
from holdfast.core.errors import UsageError
from holdfast.core.model import Classifier
from holdfast.runs.order import Order, Subject
from holdfast.runs.selection import selected
from holdfast.sources.adapting import accepted
from holdfast.sources.estimators import Predictor
from holdfast.sources.memory import as_data

Numbers = Sequence[float]
ModelLike = nn.Module | Callable[[Tensor], Tensor] | Predictor | str | Path
"""A network, a function from inputs to logits, an estimator, or an address as on the command line."""
DataLike = Any
"""`(x, y)` as tensors or arrays, a loader or dataset of pairs, a `Data`, or an address."""


def settings_said(where: str, arguments: Mapping[str, Any], kind: type[S]) -> S:
    """The arguments that are settings, checked as those of a file are; what a caller holds in hand is no setting."""
    said = {name: arguments[name] for name in kind.model_fields if arguments.get(name) is not None}
    for name in ("model", "data", "fit", "unlabelled", "suite", "baseline"):
        if isinstance(said.get(name), str | Path):
            said[name] = str(said[name])
        else:
            said.pop(name, None)
    for name in ("surrogates", "across"):
        said.pop(name, None)
    if not isinstance(said.get("recipe", ""), str | Mapping):
        del said["recipe"]
    return check(said, where, kind=kind)


def brought(
    model: ModelLike, data: DataLike, surrogates: object, settings: AssessSettings
) -> tuple[Subject, Data, tuple[Subject, ...]]:
    """The model, the examples and the surrogates, each in hand or at an address."""
    subject = subject_of(model, settings)
    seconds = surrogates_of(surrogates, settings, subject.model)
    given = data_of(data, settings, subject.model)
    return expecting.fitting(subject, seconds, given), given, seconds


def subject_of(model: ModelLike, settings: AssessSettings) -> Subject:
    """The model, in hand or at an address."""
    if isinstance(model, str | Path):
        return ordering.opened_subject(settings)
    if not accepted(model):
        raise UsageError(
            f"model is a {type(model).__name__}; expected a network, a function from inputs to logits, an estimator, "
            "or an address"
        )
    return ordering.given_subject(model, settings)


def surrogates_of(given: object, settings: AssessSettings, target: Classifier) -> tuple[Subject, ...]:
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
        elif accepted(each):
            subjects.append(ordering.given_surrogate(each, settings, target))
        else:
            raise UsageError(
                f"surrogates holds a {type(each).__name__}; give networks, functions or addresses"
            )
    return tuple(subjects)


def data_of(data: DataLike, settings: AssessSettings, model: Classifier, *, lenient: bool = False) -> Data:
    """The examples, in hand or at an address; `lenient` takes those that do not fit the model, too."""
    if isinstance(data, str | Path):
        return ordering.opened_data(settings, model, lenient=lenient)
    _refuse_address_words(settings)
    known = expecting.expected(settings, model, lenient=lenient)
    given = as_data(data, expected=known, n=settings.n if settings.sample is None else None)
    return selected(given, n=settings.n, sample=settings.sample, seed=settings.seed)


def fit_of(
    fit: DataLike | None, data: DataLike, settings: AssessSettings, model: Classifier, order: Order
) -> Data | None:
    """What attacks are learned on, as an address or in hand."""
    if fit is None or isinstance(fit, str | Path):
        return ordering.opened_fit(settings, model, order.plan, in_hand=not isinstance(data, str | Path))
    given = as_data(fit, expected=expecting.expected(settings, model))
    return selected(given, n=None, sample=ordering.examples_to_fit(order.plan) or 1, seed=settings.seed)


def others_of(given: object, settings: AssessSettings, model: Classifier) -> tuple[Data, ...]:
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
        else as_data(each, expected=expecting.unlabelled(settings, model))
        for each in given
    )


def attacks_of(suite: object) -> tuple[Attack, ...]:
    """A list of attacks in hand, each with its settings checked."""
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


def device_of(model: ModelLike, subject: Subject, settings: AssessSettings) -> str | None:
    """Where a caller's own network is, unless it is told where to go."""
    weight = next(subject.model.parameters(), None)
    if isinstance(model, str | Path) or settings.device != "auto" or weight is None:
        return None
    return str(weight.device)


def _refuse_address_words(settings: AssessSettings) -> None:
    """What picks from a file or a catalogue has nothing to pick from in data that a caller holds."""
    said = [f"{name}={value!r}" for name in ("split", "label", "drop") if (value := getattr(settings, name))]
    if said:
        raise UsageError(
            f"{', '.join(said)} cannot be meant for data in hand: it is for an address, such as table.csv; "
            f"choose the rows and columns before, and leave it out"
        )
