"""Whether another model is a copy of a model: dataset inference, with networks that are independent of the model.

Maini et al., "Dataset Inference: Ownership Resolution in Machine Learning", ICLR 2021, arXiv:2104.10706: a copy has
larger margins on the training examples of the model than on other examples of the same kind, because the model has.
Differs from the paper: the margin of an example is the logit of the probability of its label, instead of a regression
on distances; and the p-value is at least that of the statistic of the suspect among those of independent networks,
instead of that of one test alone, which accuses independent models too (Szyller et al., "On the Robustness of Dataset
Inference", TMLR 2023, arXiv:2210.13631).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

from holdfast.audits.backdoor_controls import MIN_CONTROLS, Controls, ControlTraining, controls_trained
from holdfast.audits.extraction_copies import logits_in_pieces
from holdfast.audits.finding import AuditVerdict, Finding, Images, Size, StoredSteps, Table
from holdfast.audits.membership_references import LARGEST, scaled_logit
from holdfast.core.batch import Batch
from holdfast.core.errors import UsageError
from holdfast.core.evidence import Columns
from holdfast.core.model import Classifier
from holdfast.core.types import PerExample
from holdfast.reports.words import percent
from holdfast.runs.engine.progress import Notify
from holdfast.runs.engine.run import Run
from holdfast.runs.store.columns import Flag, Form, flag

EXAMPLES = 5000
"""largest number of training examples, and of other examples, that are compared"""
LEVEL = 1e-3
"""p-value below which the suspect is called a copy: an accusation, so that it is smaller than in other audits"""
TRAINING, MARGINS, CONTROLS = "training", "margins", "controls"
"""names of the document about the training of controls, and of the stages with the margins of both models and of the
controls"""


@dataclass(frozen=True)
class OwnershipRequest:
    """What is compared."""

    batch: Batch
    """training examples of the model, and as many others after them"""
    n: int
    """number of each"""
    suspect: Classifier
    controls: Controls | None
    training: ControlTraining | None
    """training of controls; None if they are given or absent"""

    def steps(self) -> tuple[str, ...]:
        """Return the names of the steps in their order."""
        beside = self.controls is not None or self.training is not None
        return (*([TRAINING] if self.training else []), MARGINS, *([CONTROLS] if beside else []))

    def margins(self, model: Classifier) -> tuple[PerExample, Tensor]:
        """Return the margins of a model on all examples, and whether it classifies them correctly."""
        y, logits = self.batch.y.cpu(), logits_in_pieces(model, self.batch.x)
        return scaled_logit(logits, y), (logits.argmax(1) == y).long()


def measure(run: Run, model: Classifier, request: OwnershipRequest, notify: Notify) -> Images:
    """Take the steps of the audit that are not stored in the run.

    Raises `UsageError` for controls that are equal to one another, to the model or to the suspect.
    """
    controls = request.controls
    if request.training is not None:
        outside = request.batch.take(torch.arange(request.n, 2 * request.n, device=request.batch.x.device))
        controls = controls_trained(run, TRAINING, request.training, model, outside, notify)

    def both() -> Columns:
        of_model, of_suspect = request.margins(model), request.margins(request.suspect)
        member = (torch.arange(len(request.batch)) < request.n).long()
        columns = {
            "model": of_model[0],
            "suspect": of_suspect[0],
            "right_model": of_model[1],
            "right": of_suspect[1],
        }
        return {"id": torch.arange(len(request.batch)), "member": member, **columns}

    suspect = run.stage(MARGINS, both).columns["suspect"]
    if controls is None:
        return dict

    def beside() -> Columns:
        found = controls.each(model, request.margins)
        for name, (margins, _) in found.items():
            if torch.equal(margins, suspect):
                raise UsageError(f"the control {name!r} is the suspect itself; remove it from the folder")
        margins, right = (torch.stack(parts) for parts in zip(*found.values(), strict=True))
        return {"id": torch.arange(len(found)), "margin": margins, "right": right}

    run.stage(CONTROLS, beside)
    return dict


def statistic(margins: PerExample, n: int) -> float:
    """Return Welch's t of the margins of the first `n` examples, those that the model was trained on, minus those of
    the others. It does not depend on the scale of the margins.
    """
    inside, outside = margins[:n].double(), margins[n:].double()
    variance = inside.var() / len(inside) + outside.var() / len(outside)
    return float((inside.mean() - outside.mean()) / variance.sqrt().clamp_min(1e-12))


def p_value(value: float, controls: Sequence[float], n: int) -> float:
    """Return the probability that a further independent network has a statistic of at least `value`, as the largest of
    three.

    - The tail of Student's t distribution, if the statistics are normally distributed with the mean and the variance of
      the `controls`.
    - The share of the controls with a statistic of at least `value`: one outlier among them makes no other improbable.
    - The p-value of Welch's test of `n` examples of each kind: networks that were trained on the other examples have
      low statistics, and beside them every independent network would be unusual.
    """
    from scipy.stats import t

    of = torch.tensor(controls, dtype=torch.float64)
    sd = float(of.std()) * math.sqrt(1 + 1 / len(of))
    tail = float(t.sf((value - float(of.mean())) / max(sd, 1e-12), len(of) - 1))
    return max(tail, float((of >= value).double().mean()), float(t.sf(value, n - 1)))


class _Settings(TypedDict):
    suspect: str
    n: Annotated[Size, Field(ge=2)]
    controls: Size
    trained: Flag


def concluded(steps: StoredSteps) -> Finding:
    """Return the finding of an audit of ownership from its stored steps."""
    settings: _Settings = steps.settings(_Settings)
    return _Conclusion(steps, settings["suspect"], settings["n"], settings["controls"]).finding()


@dataclass(frozen=True)
class _Conclusion:
    steps: StoredSteps
    suspect: str
    n: int
    n_controls: int

    @cached_property
    def both(self) -> Columns:
        margin = Form(("m",), low=-LARGEST, high=LARGEST)
        forms = {
            "model": margin,
            "suspect": margin,
            "right": flag("m"),
            "right_model": flag("m"),
            "member": flag("m"),
        }
        columns = self.steps.columns(MARGINS, forms, m=2 * self.n)
        if not torch.equal(columns["member"], (torch.arange(2 * self.n) < self.n).long()):
            raise self.steps.refuse(MARGINS, "other training examples", f"the first {self.n:,}")
        return columns

    @cached_property
    def controls(self) -> Columns | None:
        if not self.n_controls:
            return None
        forms = {"margin": Form(("c", "m"), low=-LARGEST, high=LARGEST), "right": flag("c", "m")}
        if self.n_controls < MIN_CONTROLS:
            raise self.steps.refuse(CONTROLS, f"{self.n_controls} controls", f"at least {MIN_CONTROLS}")
        return self.steps.columns(CONTROLS, forms, c=self.n_controls, m=2 * self.n)

    def finding(self) -> Finding:
        own, of_suspect = (statistic(self.both[name], self.n) for name in ("model", "suspect"))
        accuracy = {name: float((self.both[name] == 1).double().mean()) for name in ("right", "right_model")}
        facts: dict[str, Any] = {"n": self.n, "statistic": of_suspect, "statistic_of_model": own}
        facts |= {
            "accuracy": accuracy["right"],
            "accuracy_of_model": accuracy["right_model"],
            "controls": self.n_controls,
        }
        rows: list[tuple[str, float, float, float | None]] = [
            ("model", own, accuracy["right_model"], None),
            ("suspect", of_suspect, accuracy["right"], None),
        ]
        limits = (
            "Controls that were trained on training examples of the model make the test weaker.",
            "Beside controls that were trained on the other examples, the p-value is that of Welch's test alone.",
            "The controls have the architecture of the model: a suspect of another one may differ for that reason.",
            "A suspect that was trained on the training examples of the model is found too, also if it is no copy.",
            "The p-value assumes that the statistics of independent networks are normally distributed.",
            "A copy with few queries, or of labels alone, reveals less of the training examples, and may not be found.",
        )
        if self.controls is None:
            return Finding(
                "unclear",
                f"no statement about {self.suspect}: there are no independent networks to compare it with",
                ["dataset inference alone accuses independent models too; give controls, or train_controls"],
                facts,
                tables=(self.table(rows),),
                limits=limits,
            )
        others = [statistic(margins, self.n) for margins in self.controls["margin"]]
        p, p_model = (p_value(each, others, self.n) for each in (of_suspect, own))
        alone = [p_value(each, others[:k] + others[k + 1 :], self.n) for k, each in enumerate(others)]
        right = (self.controls["right"] == 1).double().mean(1).tolist()
        rows = [(*row[:3], p_of) for row, p_of in zip(rows, (p, p_model)[::-1], strict=True)]
        rows += [
            (f"control {k + 1}", t, share, q)
            for k, (t, share, q) in enumerate(zip(others, right, alone, strict=True))
        ]
        verdict, reasons = self.judged(p, p_model, alone)
        average = (
            f"the accuracy on all compared examples is {percent(accuracy['right'])} for the suspect, "
            f"{percent(accuracy['right_model'])} for the model, and {percent(sum(right) / len(right))} on average for "
            "the independent networks"
        )
        word = (
            "is a copy of the model, or was trained on its examples"
            if verdict == "flagged"
            else "is not shown to be a copy of the model"
        )
        return Finding(
            verdict,
            f"{self.suspect} {word}: p = {p:.2g} among {self.n_controls} independent networks",
            [*reasons, average],
            {**facts, "p": p, "p_of_model": p_model, "statistics_of_controls": others},
            tables=(self.table(rows),),
            limits=limits,
        )

    def judged(self, p: float, p_model: float, alone: Sequence[float]) -> tuple[AuditVerdict, list[str]]:
        reasons = [
            f"the suspect is called a copy if p is below {LEVEL:g}; for the model itself it is {p_model:.2g}"
        ]
        if unlike := [k + 1 for k, each in enumerate(alone) if each < LEVEL]:
            names = ", ".join(f"control {k}" for k in unlike)
            reasons.append(
                f"{names} would be called a copy too, and may not be independent: the test is weaker"
            )
        if p_model >= LEVEL:
            reasons.insert(
                0,
                "the test does not recognise the model itself, whose margins on its training examples are not unusual",
            )
            return "unclear", reasons
        return ("flagged" if p < LEVEL else "not flagged"), reasons

    def table(self, rows: Sequence[tuple[str, float, float, float | None]]) -> Table:
        shown = [
            (name, round(t, 3), percent(share), "" if p is None else f"{p:.2g}") for name, t, share, p in rows
        ]
        return Table(
            "Margins on training examples of the model and on others",
            ("network", "Welch's t", "accuracy", "p"),
            shown,
            f"{self.n:,} examples of each. A large t states that the margins are larger on the training examples. p is "
            "the probability that an independent network has at least this t; that of a control is among the others.",
        )
