"""The finding of the audit of a model, from its measurements."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from holdfast.audits.backdoor.audit import Measured, Settings, Streamed, measured
from holdfast.audits.backdoor.controls import LEVEL
from holdfast.audits.backdoor.inversion import abnormality
from holdfast.audits.finding import AuditVerdict, Finding, Picture, Table, in_unit_range
from holdfast.audits.stored_steps import StoredSteps
from holdfast.core.batch import Batch
from holdfast.core.model import Bounds
from holdfast.core.triggers import Trigger

NATURAL = 0.5
"""Median success on the controls from which on a trigger is a natural feature of its class: it does not need a
backdoor. On MNIST, planted triggers reached at most 0.1 and the smallest triggers of clean networks 0.54 to 0.98."""
_TRIGGER = "trigger"
_LISTED = 20
"""Number of inputs of a stream that the report lists."""

_SEARCHED = (
    "Only triggers that change the same values of every input are searched. Warped inputs, triggers that depend on the "
    "input, and backdoors that were trained against this search are not found."
)
_UNDETECTABLE = "Backdoors exist that no test of inputs and outputs can detect."
_UNCOMPARED = (
    "Without control networks the sizes cannot be judged. The index exceeds 2 on clean networks too: it is not a "
    "p-value, because the spread of so few classes is not known well."
)
_TRAINED_OTHERWISE = (
    "p holds for a clean network that was trained like the controls. If the model was trained on other data or in "
    "another way, a small p may have this reason."
)


def suspect(measured: Measured) -> Trigger:
    """Return the trigger of the class that is most unusual: that of the smallest ratio to the controls, or without
    controls the smallest one.
    """
    return measured.inverted.trigger(_label(measured))


def _label(measured: Measured) -> int:
    inverted, compared = measured.inverted, measured.compared
    return int(inverted.classes[inverted.size.argmin()]) if compared is None else compared.rank.label


def concluded(steps: StoredSteps) -> Finding:
    """Return the finding of an audit from its stored steps."""
    finding = finding_of(measured(steps), steps.settings(Settings)["class_names"])
    return replace(finding, pictures=steps.pictures(finding.pictures))


def finding_of(measured: Measured, names: Sequence[str] | None = None) -> Finding:
    """Return the finding of an audit from its measurements. `names` are those of the classes."""
    verdict, headline, reasons = _verdict(measured, names)
    compared, streamed = measured.compared, measured.streamed
    place = measured.inverted.classes.tolist().index(_label(measured))
    facts: dict[str, Any] = {
        "class": _label(measured),
        "size": float(measured.inverted.size[place]),
        "success": float(measured.inverted.success[place]),
        "index": float(abnormality(measured.inverted.size)[place]),
        "accuracy": measured.accuracy,
        "examples": measured.examples,
        "sizes": measured.inverted.size.tolist(),
    }
    if compared is not None:
        facts |= {
            "p": compared.rank.p,
            "ratio": compared.rank.ratio,
            "ratios_of_controls": list(compared.rank.of_controls),
            "controls": len(compared.accuracies),
            "largest_difference_of_accuracy": _largest_difference(measured),
            "success_on_controls": median(compared.transfer),
        }
    tables = [_classes(measured, names)]
    if streamed is not None:
        n_suspect = int(streamed.suspect.sum())
        facts |= {"stream": len(streamed.ids), "stream_suspect": n_suspect, "threshold": streamed.threshold}
        reasons = (*reasons, _of_stream(streamed))
        tables.append(_inputs(streamed))
    limits = (_SEARCHED, _UNDETECTABLE, *(() if compared is None else (_TRAINED_OTHERWISE,)))
    return Finding(
        verdict,
        headline,
        reasons,
        facts,
        tables=tables,
        pictures=_pictures(measured, names),
        limits=limits,
    )


def _verdict(measured: Measured, names: Sequence[str] | None) -> tuple[AuditVerdict, str, tuple[str, ...]]:
    label, compared = _label(measured), measured.compared
    named = _named(label, names)
    place = measured.inverted.classes.tolist().index(label)
    index = float(abnormality(measured.inverted.size)[place])
    size = f"The smallest trigger of class {named} has the size {float(measured.inverted.size[place]):.1f}"
    success = f"and succeeds on {100 * float(measured.inverted.success[place]):.1f} % of clean examples"
    if compared is None:
        return (
            "unclear",
            "there are no control networks with which the triggers can be compared",
            (f"{size} {success}; its index is {index:.1f}.", _UNCOMPARED),
        )
    rank, n = compared.rank, len(compared.accuracies)
    transfer = median(compared.transfer)
    smaller = sum(ratio <= rank.ratio for ratio in rank.of_controls)
    relative = (
        f"Relative to the triggers of this class in the controls it is {rank.ratio:.2f}; the smallest ratio of the "
        f"controls is {min(rank.of_controls):.2f}."
    )
    apart = 100 * _largest_difference(measured)
    reasons = (
        f"{size} {success}. {relative}",
        f"{smaller} of {n} controls have as small a ratio: p = {rank.p:.3f}, flagged at {LEVEL} or less.",
        f"On the controls, the trigger succeeds on {100 * transfer:.1f} % of the examples (median).",
        f"The clean accuracies of model and controls differ by at most {apart:.1f} points.",
        f"The index is {index:.1f}. It exceeds 2 on clean networks too, and is not used.",
    )
    if rank.p > LEVEL:
        return "not flagged", f"no trigger is unusually small among those of {n} control networks", reasons
    if transfer >= NATURAL:
        text = f"the search found class {named} itself: its trigger is a natural feature, which the controls have too"
        return "unclear", text, reasons
    text = f"class {named} has a trigger that is smaller than expected from all {n} control networks"
    if smaller:
        text = f"class {named} has a trigger that is smaller than expected from {n - smaller} of {n} control networks"
    return "flagged", text, reasons


def _largest_difference(measured: Measured) -> float:
    assert measured.compared is not None
    return max(abs(each - measured.accuracy) for each in measured.compared.accuracies.values())


def _named(label: int, names: Sequence[str] | None) -> str:
    if names is None or label >= len(names) or names[label] == str(label):
        return str(label)
    return f"{label} ({names[label]})"


def _classes(measured: Measured, names: Sequence[str] | None) -> Table:
    inverted, compared = measured.inverted, measured.compared
    index = abnormality(inverted.size).tolist()
    rows = []
    for place, label in enumerate(inverted.classes.tolist()):
        cells = (
            _named(label, names),
            float(inverted.size[place]),
            float(inverted.success[place]),
            index[place],
        )
        ratio = () if compared is None else (compared.rank.ratios[place],)
        rows.append((*cells, *ratio))
    return Table(
        "Smallest trigger of each class",
        ("class", "size", "success", "index", *(() if compared is None else ("ratio to controls",))),
        rows,
        "The size is the sum of the mask, that is the number of values that are replaced. The index is that of Neural "
        "Cleanse. A ratio is relative to the controls and to the other classes, 1 if the size is as usual.",
    )


def _of_stream(streamed: Streamed) -> str:
    n, k = len(streamed.ids), int(streamed.suspect.sum())
    return (
        f"STRIP: {k} of {n} inputs of the stream have an entropy below {streamed.threshold:.3f}; of clean inputs 1 % "
        "have. This does not change the verdict."
    )


def _inputs(streamed: Streamed) -> Table:
    order = streamed.entropy.argsort(stable=True)[:_LISTED]
    rows = [
        (int(streamed.ids[row]), float(streamed.entropy[row]), "yes" if streamed.suspect[row] else "no")
        for row in order
    ]
    return Table(
        "Inputs of the stream with the lowest entropy",
        ("row", "entropy", "suspect"),
        rows,
        "Mean entropy of the predictions under other images. It is low if something in the input decides the class.",
    )


def _pictures(measured: Measured, names: Sequence[str] | None) -> tuple[Picture, ...]:
    named = _named(_label(measured), names)
    captions = ("trigger", "mask", "clean example", f"with trigger, predicted as {named}")
    return (Picture(_TRIGGER, f"The smallest trigger of class {named}", captions),)


def images_of(batch: Batch, trigger: Trigger, bounds: Bounds) -> dict[str, Tensor]:
    """Return the images of a trigger: its pattern, its mask, and an example without and with it."""
    x = batch.x[batch.y != trigger.target][:1].cpu()
    if x.dim() != 4:
        return {}
    low, high = bounds.like(x)
    shown = (torch.stack([trigger.pattern, x[0], trigger.stamped(x, bounds)[0]]) - low) / (high - low)
    mask = trigger.mask.expand(x.shape[1:])
    images = torch.stack([mask * shown[0], mask, shown[1], shown[2]])
    return {_TRIGGER: in_unit_range(images, 0.0, 1.0)}
