"""The audit of attributes: whether the answers of a model reveal a column of a table that it does not return, better
than an imputer that was trained without the model.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import one_hot
from typing_extensions import TypedDict

from holdfast.audits.finding import Finding, Images, Size, StoredSteps, Table
from holdfast.audits.membership_references import needed
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import Remedy, TargetError, UsageError, data_argument
from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Columns
from holdfast.core.types import Inputs, Mask, PerExample
from holdfast.reports.words import percent
from holdfast.runs.engine.run import Run
from holdfast.runs.store.columns import Form, whole
from holdfast.statistics.intervals import (
    CONFIDENCE,
    Support,
    bonferroni,
    bootstrap,
    largest,
    paired_difference,
    proportion,
)

ANSWERS = "attributes"
"""name of the stage with the probabilities that each attacker gives to the values of the attribute"""
ACCURACY, RATE = "attribute_accuracy_gain", "attribute_tpr_gain_at_1_percent"
"""names of the metrics"""
FPR = 0.01
"""false-positive rate of the attacker at which holders of a value are found"""
_IMPUTER, _QUERIES, _SEEN = "imputer", "queries", "seen"
_NAMES = {
    _IMPUTER: "imputer without the model",
    _QUERIES: "queries to the model",
    _SEEN: "queries, and the answer to the record",
}
_MOST_VALUES, _FEWEST = 20, 50
"""largest number of values of an attribute, and smallest number of records of a value among known ones or targets"""
_PIECE = 1024
_CLOSE = 1e-6
"""largest difference of log-probabilities of equal answers"""

Ask = Callable[[Inputs], Tensor]
"""function from inputs (n, features) to logits (n, classes)"""


@dataclass(frozen=True)
class AttributeAudit:
    """The records of the audit, and the sensitive attribute of each."""

    records: Batch
    attribute: Tensor
    """(n,) index of the value of each record"""
    values: Sequence[str]
    """values of the attribute as text"""
    known: int
    """number of records whose attribute the attacker knows"""
    place: int | None
    """position of the attribute among the inputs of the model; None if it is no input"""
    seed: int

    def inputs(self) -> Tensor:
        """The input (k,) of the model for each value of the attribute. Raises `UsageError` unless each value has one
        input and no two have the same.
        """
        assert self.place is not None
        column = self.records.x[:, self.place]
        inputs = [torch.unique(column[self.attribute == value]) for value in range(len(self.values))]
        if any(len(each) != 1 for each in inputs) or len(torch.unique(torch.cat(inputs))) != len(self.values):
            raise UsageError(
                "the values of the sensitive column do not correspond to the numbers that the model gets for it; "
                "expected one number for each value"
            )
        return torch.cat(inputs)

    def split(self) -> tuple[Tensor, Tensor]:
        """Positions of the records whose attribute is known, and of those that are attacked, drawn by the seed."""
        order = Draws(self.seed).at("attributes").bits(self.records.ids.cpu()).argsort()
        return order[: self.known].sort().values, order[self.known :].sort().values

    def refuse_unusable(self, name: str) -> None:
        """Raise `UsageError` for an attribute with which no attack can be compared. `name` is that of its column."""
        counts = self.attribute.bincount(minlength=len(self.values))
        if len(self.values) < 2:
            raise UsageError(
                f"the sensitive column {name!r} has the one value {self.values[0]!r}, so that nothing can be inferred; "
                "expected two values or more"
            )
        if len(self.values) > _MOST_VALUES:
            raise UsageError(
                f"the sensitive column {name!r} has {len(self.values):,} values; at most {_MOST_VALUES} were expected: "
                "give a column with ranges in place of numbers"
            )
        pairs = torch.unique(torch.stack((self.attribute, self.records.y.cpu()), 1), dim=0)
        if len(self.values) == len(pairs) == len(torch.unique(pairs[:, 1])):
            raise UsageError(
                f"the sensitive column {name!r} is the label, which the attacker knows; give another column"
            )
        if self.known >= len(self.records):
            raise UsageError(
                f"known is {self.known:,}, and there are {len(self.records):,} records; expected fewer, so that others "
                "remain to be attacked",
                *self._half(),
            )
        parts = torch.stack(self._counts())
        fewest = int(parts.min())
        if fewest < _FEWEST:
            value = int(parts.min(0).values.argmin())
            part = int(parts[:, value].argmin())
            raise UsageError(
                f"only {fewest} of the {int(parts[part].sum()):,} {('known', 'attacked')[part]} records have the value "
                f"{self.values[value]!r} of {name}, and {int(counts[value]):,} of all; at least {_FEWEST} known and "
                f"{_FEWEST} attacked ones were expected: join rare values, leave them out, or give more records",
                *self._half(),
            )

    def refuse_left_out(self, model: Ask, name: str) -> None:
        """Raise `UsageError` if the model accepts records only without the column `name`."""
        record = self.records.x[:1]
        try:
            model(record)
        except TargetError as error:
            assert self.place is not None
            other = torch.cat((record[:, : self.place], record[:, self.place + 1 :]), 1)
            with suppress(TargetError):
                model(other)
                raise UsageError(
                    f"the model has {other.shape[1]} inputs, and the table has {record.shape[1]} columns of numbers "
                    f"with {name!r}, which is no input",
                    data_argument("drop", (name,), repeated=True),
                ) from error
            raise

    def _counts(self) -> list[Tensor]:
        """Numbers (values,) of the known records and of the attacked ones by their value."""
        return [self.attribute[rows].bincount(minlength=len(self.values)) for rows in self.split()]

    def _half(self) -> tuple[Remedy, ...]:
        """The remedy to know half of the records, if this leaves enough of each value."""
        half = len(self.records) // 2
        enough = min(int(part.min()) for part in replace(self, known=half)._counts()) >= _FEWEST
        return (Remedy("known", half),) if enough else ()


def measure(run: Run, ask: Ask, how: AttributeAudit) -> Images:
    """Train the imputer and the attackers on the known records, and store what they say about the others."""

    def measured() -> Columns:
        known, attacked = how.split()
        inputs = features_of(ask, how)
        predicted = {
            name: _predicted(x[known.numpy()], how.attribute[known], x[attacked.numpy()], how)
            for name, x in inputs.items()
        }
        return {"id": how.records.ids[attacked].cpu(), "attribute": how.attribute[attacked], **predicted}

    run.stage(ANSWERS, measured)
    return dict


def features_of(ask: Ask, how: AttributeAudit) -> Mapping[str, np.ndarray[Any, Any]]:
    """Return what each attacker knows of each record, as arrays (n, features) by the name of the attacker.

    All know the other columns and the label. An attacker who can query the model knows its log-probabilities for the
    record; if the attribute is an input, those for each value that it may have (Fredrikson et al., USENIX Security
    2014). One who has also seen the answer to the true record compares it with these.
    """
    x, y, k = how.records.x, how.records.y, len(how.values)
    label = one_hot(y - y.min()).cpu()
    if how.place is None:
        other, asked = x, [_answers(ask, x)]
    else:
        other = torch.cat((x[:, : how.place], x[:, how.place + 1 :]), 1)
        asked = [_answers(ask, _with(x, how.place, value)) for value in how.inputs()]
    plain = torch.cat((other.cpu().double(), label.double()), 1)
    knowledge = {_IMPUTER: plain, _QUERIES: torch.cat((plain, *asked), 1)}
    if how.place is not None:
        answers = torch.stack(asked, 1)  # (n, k, classes), of which one is the answer to the true record
        true = answers[torch.arange(len(y)), how.attribute]
        equal = ((answers - true[:, None]).abs().amax(2) <= _CLOSE).double()
        knowledge[_SEEN] = torch.cat((knowledge[_QUERIES], equal.view(-1, k)), 1)
    return {name: each.numpy() for name, each in knowledge.items()}


def _with(x: Inputs, place: int, value: Tensor) -> Inputs:
    changed = x.clone()
    changed[:, place] = value
    return changed


def _answers(ask: Ask, x: Inputs) -> Tensor:
    """Log-probabilities (n, classes) as float64; labels alone are a log-probability of 0 for one class."""
    with torch.no_grad():
        return torch.cat(
            [ask(piece).double().log_softmax(1).clamp(-100).cpu() for piece in torch.split(x, _PIECE)]
        )


def _predicted(
    x: np.ndarray[Any, Any], attribute: Tensor, others: np.ndarray[Any, Any], how: AttributeAudit
) -> Tensor:
    """Probabilities (n, k) of the values for other records, by boosted trees that are trained on known ones."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    seed = Draws(how.seed).at("imputer").seed
    learner = HistGradientBoostingClassifier(learning_rate=0.05, early_stopping=True, random_state=seed)
    learner.fit(x, attribute.numpy())
    return torch.from_numpy(learner.predict_proba(others))


class _Settings(TypedDict):
    attribute: str
    values: Annotated[list[str], Field(min_length=2, max_length=_MOST_VALUES)]
    known: Annotated[Size, Field(ge=1)]
    is_input: bool
    attribute_digest: str


@dataclass(frozen=True)
class _Predictions:
    """What the attackers predict for the attacked records."""

    attribute: Tensor
    by: Mapping[str, Tensor]
    """probabilities (n, k) by the name of the attacker"""

    def right(self, name: str) -> Mask:
        return self.by[name].argmax(1) == self.attribute

    def gain(self, name: str, confidence: float = CONFIDENCE) -> Estimate:
        return paired_difference(self.right(name), self.right(_IMPUTER), confidence)

    def rate_gain(self, name: str, value: int, confidence: float) -> Estimate:
        """The gain in the rate at which the holders of a value are found. Its interval resamples the records, so that
        it covers the choice of both thresholds.
        """
        holds = self.attribute == value
        scores = [self.by[each][:, value] for each in (name, _IMPUTER)]

        def difference(rows: Tensor) -> PerExample:
            first, second = (_rates(score[rows], holds[rows]) for score in scores)
            return first - second

        return bootstrap(difference, len(holds), confidence, support=Support(-1.0, 1.0))


def _rates(scores: Tensor, holds: Tensor) -> PerExample:
    """Share of the holders of a value that are found in each resample, whose scores and holders are (resamples, n)."""
    others = (~holds).sum(1, keepdim=True)
    ranks = (FPR * others + 1e-9).long()
    highest = scores.masked_fill(holds, -1.0).topk(int(ranks.max()) + 1).values
    found = (scores > highest.gather(1, ranks)) & holds
    return found.sum(1) / holds.sum(1).double()


def concluded(steps: StoredSteps) -> Finding:
    """Return how much better the attackers infer the attribute than the imputer."""
    settings = steps.settings(_Settings)
    values = settings["values"]
    share = Form(("n", "k"), low=0, high=1)
    forms = {"attribute": whole("n", high=len(values) - 1), _IMPUTER: share, _QUERIES: share}
    if settings["is_input"]:
        forms[_SEEN] = share
    columns = steps.columns(ANSWERS, forms, k=len(values))
    attribute = columns["attribute"].long()
    if int(attribute.bincount(minlength=len(values)).min()) < _FEWEST:
        raise steps.refuse(
            ANSWERS, "values with too few records", f"at least {_FEWEST} records of each value"
        )
    return _finding(
        settings, _Predictions(attribute, {name: columns[name] for name in _NAMES if name in columns})
    )


def _finding(settings: _Settings, predicted: _Predictions) -> Finding:
    name, values, n = settings["attribute"], settings["values"], len(predicted.attribute)
    measured = [
        value for value in range(len(values)) if int((predicted.attribute != value).sum()) >= needed(FPR)
    ]
    confidence = bonferroni(CONFIDENCE, 1 + len(measured))  # of the accuracy, and of the rate of each value
    rates = {value: predicted.rate_gain(_QUERIES, value, confidence) for value in measured}
    gains = {each: predicted.gain(each, confidence) for each in predicted.by if each != _IMPUTER}
    gain = gains[_QUERIES]
    revealed = [value for value, rate in rates.items() if rate.low > 0]
    accuracy = {each: proportion(predicted.right(each)) for each in predicted.by}
    counts = predicted.attribute.bincount(minlength=len(values))
    majority = int(counts.argmax())
    metrics = {ACCURACY: gain}
    if rates:
        metrics[RATE] = largest(list(rates.values()))
    reasons = [
        f"{percent(int(counts[majority]) / n)} of the records have the most frequent value, {values[majority]}",
        *(
            f"at {100 * FPR:g} % false positives, queries find {percent(rates[value].value)} more of the records "
            f"with the value {values[value]} than the imputer ({_points(rates[value])})"
            for value in revealed
        ),
    ]
    if settings["is_input"]:
        reasons.append(
            f"{name} is an input of the model: an attacker who has also seen the answer to the true record infers it "
            f"for {percent(accuracy[_SEEN].value)} ({_points(gains[_SEEN])})"
        )
    return Finding(
        "flagged" if gain.low > 0 or revealed else "not flagged",
        f"with queries to the model, {name} is inferred for {percent(accuracy[_QUERIES].value)} of {n:,} records, and "
        f"by the imputer without it for {percent(accuracy[_IMPUTER].value)} ({_points(gain)})",
        reasons,
        {
            "attribute": name,
            "attribute_is_input": settings["is_input"],
            "known": settings["known"],
            "attacked": n,
            "majority": int(counts[majority]) / n,
            "accuracy": {each: estimate.value for each, estimate in accuracy.items()},
            "accuracy_gain": {each: vars(estimate) for each, estimate in gains.items()},
            "tpr_gain_at_1_percent": {values[value]: vars(rate) for value, rate in rates.items()},
        },
        metrics,
        tables=(
            _attackers(accuracy, gains),
            _by_value(values, predicted),
            *((_by_rate(values, predicted, rates),) if rates else ()),
        ),
        limits=_limits(settings, [values[value] for value in range(len(values)) if value not in rates]),
    )


def _limits(settings: _Settings, unmeasured: Sequence[str]) -> tuple[str, ...]:
    """What the audit does not show. `unmeasured` are the values without a rate."""
    few = (
        f"The rate at {100 * FPR:g} % false positives was not measured for {', '.join(unmeasured)}: it needs "
        f"{needed(FPR):,} attacked records with other values."
    )
    return (
        (
            f"Imputer and attackers are the same learner, trained on the same {settings['known']:,} records whose "
            f"{settings['attribute']} is known, and know the other columns and the label of the attacked ones."
        ),
        "Another learner, or one with more known records, may infer more from the same answers.",
        *((few,) if unmeasured else ()),
    )


def _points(gain: Estimate) -> str:
    return f"{100 * gain.low:+.1f} to {100 * gain.high:+.1f} points"


def _attackers(accuracy: Mapping[str, Estimate], gains: Mapping[str, Estimate]) -> Table:
    rows = [
        (_NAMES[name], percent(estimate.value), _points(gains[name]) if name in gains else "")
        for name, estimate in accuracy.items()
    ]
    return Table(
        "Attackers",
        ("knowledge", "accuracy", "above the imputer"),
        rows,
        "All know the other columns and the label of a record. The intervals and those of the rates hold together at "
        "95 %.",
    )


def _by_value(values: Sequence[str], predicted: _Predictions) -> Table:
    rows: list[tuple[str | int, ...]] = []
    for value, text in enumerate(values):
        holds = predicted.attribute == value
        imputed, queried = (predicted.right(each)[holds] for each in (_IMPUTER, _QUERIES))
        shares = [percent(float(each.double().mean())) for each in (imputed, queried)]
        rows.append((text, int(holds.sum()), *shares, _points(paired_difference(queried, imputed))))
    return Table(
        "Values",
        ("value", "records", "imputer", "queries", "difference"),
        rows,
        "Shares of the records with a value for which the value is inferred. Each interval has 95 %.",
    )


def _by_rate(values: Sequence[str], predicted: _Predictions, rates: Mapping[int, Estimate]) -> Table:
    rows = []
    for value, rate in rates.items():
        holds = (predicted.attribute == value)[None]
        shares = [float(_rates(predicted.by[each][None, :, value], holds)) for each in (_IMPUTER, _QUERIES)]
        rows.append((values[value], *map(percent, shares), _points(rate)))
    return Table(
        "Found at 1 % false positives",
        ("value", "imputer", "queries", "difference"),
        rows,
        "Shares of the records with a value that are found while 1 % of the others are mistaken for them. The "
        "intervals hold together with that of the accuracy at 95 %.",
    )
