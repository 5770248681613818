"""The finding of an audit of membership: its verdict, tables, curve and most exposed examples."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.audits.finding import AuditVerdict, Curve, Finding, Line, Picture, Table, in_unit_range
from holdfast.audits.membership import references, scores
from holdfast.audits.membership.references import Design
from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Columns
from holdfast.core.types import Inputs, Mask, PerExample
from holdfast.reports.numbers import percent

METRIC = "membership_tpr_at_1_percent"
METRIC_FPR = 0.01
_RATES = (0.001, 0.01, 0.1)
_WEAK = ("loss", "label only")
"""attacks that need no reference networks; that they find nothing is no result"""
_SHOWN, _POINTS = 12, 41
_EXPOSED = "exposed"


@dataclass(frozen=True)
class Results:
    """What an audit measured."""

    scores: Sequence[Mapping[str, PerExample]]
    """for each target, the scores of each attack by name, the headline first"""
    members: Sequence[Mask]
    columns: Columns
    """the stored score of each example"""
    null_auc: float
    """area under the curve of the headline on halves that nobody trained on"""
    blind_auc: float
    """area under the curve of a classifier without the model"""
    accuracy: float
    """accuracy of the targets on the examples that they were trained on"""
    other_accuracy: float
    tail: float | None
    labels: bool
    """whether the targets give labels only"""
    probabilities: bool
    """whether the targets give probabilities that are used as logits"""
    rounded: bool

    @property
    def headline(self) -> str:
        """Name of the attack whose rate is the result."""
        return next(iter(self.scores[0]))

    def rate(self, attack: str, fpr: float) -> Estimate:
        """Return the true-positive rate of an attack: the mean of several targets, or that of the only one."""
        if len(self.scores) == 1:
            return scores.tpr_of_one(self.scores[0][attack], self.members[0], fpr)
        return scores.mean_of_networks(self._of_each(attack, fpr))

    def auc(self, attack: str) -> float:
        """Return the mean area under the curve of an attack."""
        values = [scores.auc(s[attack], m) for s, m in zip(self.scores, self.members, strict=True)]
        return sum(values) / len(values)

    def mean_rate(self, attack: str, fpr: float) -> float:
        """Return the mean true-positive rate of an attack over the targets."""
        values = self._of_each(attack, fpr)
        return sum(values) / len(values)

    def _of_each(self, attack: str, fpr: float) -> list[float]:
        return [scores.tpr(s[attack], m, fpr) for s, m in zip(self.scores, self.members, strict=True)]


def finding_of(how: Design, results: Results, notes: Sequence[str]) -> Finding:
    """Return the finding: `flagged` if members are found more often than the false-positive rate, `unclear` if a
    control fails, or if a weak attack finds nothing.
    """
    rate = results.rate(results.headline, how.fpr)
    n_members = int(results.members[0].sum())
    n_others = how.n - n_members
    verdict, reasons = _judged(how, results, rate, references.width(n_members, n_others))
    metrics = {}
    if n_others >= scores.needed(METRIC_FPR):
        metrics[METRIC] = results.rate(results.headline, METRIC_FPR)
    subject = "the training procedure" if how.members is None else "the model"
    headline = (
        f"an attacker ({results.headline}) finds {percent(rate.value)} of the training examples of {subject} "
        f"({percent(rate.low)} to {percent(rate.high)}) at a false-positive rate of {_percent(how.fpr)}"
    )
    if failed := _failed_control(results, references.width(n_members, n_others)):
        headline = f"{failed}, so that no rate is stated"
    return Finding(
        verdict,
        headline,
        [*reasons, f"each target has {n_members:,} members and {n_others:,} non-members"],
        _facts(how, results, rate, n_members, n_others),
        metrics,
        (_attacks(how, results, n_others), *_exposed(results), *_by_group(how, results)),
        _pictures(results),
        (_curve(results, n_others),),
        _limits(how, results, notes),
    )


def _judged(how: Design, results: Results, rate: Estimate, width: float) -> tuple[AuditVerdict, list[str]]:
    allowed = f"allowed: {0.5 - width:.2f} to {0.5 + width:.2f}"
    reasons = [
        f"without the model, members and non-members are told apart with an AUC of {results.blind_auc:.3f}, {allowed}",
        f"on halves that nobody trained on, the attack has an AUC of {results.null_auc:.3f}, {allowed}",
        f"the accuracy is {percent(results.accuracy)} on members and {percent(results.other_accuracy)} on non-members",
    ]
    verdict: AuditVerdict = "flagged" if rate.low > how.fpr else "not flagged"
    if verdict == "not flagged" and results.headline in _WEAK:
        verdict = "unclear"
        reasons.insert(
            0, f"{results.headline} finds few members of most models, also of those that reveal many"
        )
    if failed := _failed_control(results, width):
        verdict = "unclear"
        reasons.insert(0, f"{failed}, so that the rates do not measure membership")
    return verdict, reasons


def _failed_control(results: Results, width: float) -> str:
    """State which control failed; empty if none did."""
    if abs(results.null_auc - 0.5) > width:
        return "the attack finds members where there are none"
    return "members and non-members differ in kind" if abs(results.blind_auc - 0.5) > width else ""


def _facts(how: Design, results: Results, rate: Estimate, n_members: int, n_others: int) -> dict[str, object]:
    return {
        "audited": "procedure" if how.members is None else "model",
        "networks": how.networks,
        "references_of_each_target": how.networks - 2 if how.members is None else how.networks,
        "targets": len(results.scores),
        "members": n_members,
        "non_members": n_others,
        "fpr": how.fpr,
        "attack": results.headline,
        "tpr": rate.value,
        "tpr_low": rate.low,
        "tpr_high": rate.high,
        "attacks": {
            name: {"auc": results.auc(name), "tpr": results.mean_rate(name, how.fpr)}
            for name in results.scores[0]
        },
        "blind_auc": results.blind_auc,
        "null_auc": results.null_auc,
        "accuracy_members": results.accuracy,
        "accuracy_non_members": results.other_accuracy,
        "tail_estimate": results.tail,
        "labels_only": results.labels,
        "undeclared_probabilities": results.probabilities,
        "rounded": results.rounded,
    }


def _attacks(how: Design, results: Results, n_others: int) -> Table:
    shown = sorted({*_RATES, how.fpr})

    def cell(attack: str, fpr: float) -> str:
        if n_others < scores.needed(fpr):
            return f"needs {scores.needed(fpr):,} non-members"
        return percent(results.mean_rate(attack, fpr))

    note = "TPR is the share of the training examples that are found. The first attack is the result, chosen before."
    if results.tail is not None:
        note += f" The tail of the losses predicts that attacks with reference networks find {percent(results.tail)}."
    return Table(
        "Attacks",
        ("attack", "AUC", *(f"TPR at {_percent(fpr)} FPR" for fpr in shown)),
        [
            (name, round(results.auc(name), 3), *(cell(name, fpr) for fpr in shown))
            for name in results.scores[0]
        ],
        note,
    )


def _most_exposed(columns: Columns) -> list[int]:
    """Places of the members that are found most often, those with the largest scores first, without those that are not
    found.
    """
    score = torch.where(columns["trainings"] > 0, columns["score"], -torch.inf)
    by_score = score.argsort(descending=True, stable=True)
    often = torch.nan_to_num(columns["found"], nan=-1.0)[by_score].argsort(descending=True, stable=True)
    return [int(place) for place in by_score[often][:_SHOWN] if columns["found"][place] > 0]


def _exposed(results: Results) -> list[Table]:
    columns, places = results.columns, _most_exposed(results.columns)
    several = len(results.scores) > 1
    table = Table(
        "Most exposed training examples",
        ("row", "label", "found", "score as a member", *(["score otherwise"] if several else [])),
        [
            (
                int(columns["row"][k]),
                int(columns["label"][k]),
                percent(float(columns["found"][k]), 0),
                round(float(columns["score"][k]), 2),
                *([round(float(columns["score_outside"][k]), 2)] if several else []),
            )
            for k in places
        ],
        "Found is the share of the networks trained on the example in which it is found. The folder of the run has the "
        "scores of all examples.",
    )
    return [table] if places else []


def _by_group(how: Design, results: Results) -> list[Table]:
    columns = results.columns
    masks = dict(how.groups) or {
        str(label): columns["label"] == label for label in torch.unique(columns["label"]).tolist()
    }
    rows: list[tuple[str, int, str]] = []
    for name, mask in masks.items():
        inside = mask & (columns["trainings"] > 0)
        if inside.any():
            weights = columns["trainings"][inside].double()
            share = float((columns["found"][inside] * weights).sum() / weights.sum())
            rows.append((name, int(inside.sum()), percent(share)))
    title, heading = ("Groups", "group") if how.groups else ("Classes", "class")
    return [Table(title, (heading, "training examples", "found"), rows)]


def _pictures(results: Results) -> list[Picture]:
    columns, places = results.columns, _most_exposed(results.columns)
    captions = [
        f"row {int(columns['row'][k])}, label {int(columns['label'][k])}, found "
        f"{percent(float(columns['found'][k]), 0)}"
        for k in places
    ]
    return [Picture(_EXPOSED, "The most exposed training examples", captions)] if places else []


def images_of(x: Inputs, columns: Columns) -> dict[str, Tensor]:
    """Return the images of the most exposed training examples."""
    return {_EXPOSED: in_unit_range(x[_most_exposed(columns)], float(x.min()), float(x.max()))}


def _curve(results: Results, n_others: int) -> Curve:
    least = 10 ** math.ceil(math.log10(1 / n_others))
    grid = [10 ** (math.log10(least) * (1 - k / (_POINTS - 1))) for k in range(_POINTS)]
    usable = [fpr for fpr in grid if fpr * n_others >= 1]
    names = dict.fromkeys((results.headline, "loss" if not results.labels else results.headline))
    lines = [Line(name, [(fpr, results.mean_rate(name, fpr)) for fpr in usable]) for name in names]
    return Curve(
        "Share of the training examples that are found",
        "false-positive rate",
        "true-positive rate",
        [*lines, Line("chance", [(fpr, fpr) for fpr in usable])],
        least,
        f"Below {scores.EXPECTED / n_others:.2g}, fewer than {scores.EXPECTED} false positives are expected.",
    )


def _limits(how: Design, results: Results, notes: Sequence[str]) -> list[str]:
    limits = [
        "A low rate is no proof of privacy: other attacks may find more. Only differential privacy bounds them."
    ]
    if how.members is None:
        limits.append(
            "The networks are trained on half of the data each; a network of all data may leak less."
        )
    elif not how.networks:
        limits.append(
            "No reference networks were used. Attacks with them usually find many more training examples: give "
            "references and train."
        )
    subject = "The networks give" if how.members is None else "The model gives"
    if results.labels:
        limits.append(
            f"{subject} labels only, so that only the attack on labels was measured; attacks that query many changed "
            "copies of an example find more."
        )
    if results.probabilities:
        limits.append(
            f"{subject} probabilities, which were used as logits, and this distorts the scores of the attacks; repeat "
            "the audit with the setting model_output: probability."
        )
    if results.rounded:
        limits.append(
            "Many examples have equal probabilities, as after rounding, which hides members from attacks on "
            "probabilities and not from others; audit the model before rounding."
        )
    return [*limits, *notes]


def _percent(rate: float) -> str:
    return f"{100 * rate:.3g} %"
