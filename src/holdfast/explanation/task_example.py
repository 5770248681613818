"""The explanation of one example of a model with another task than classes: what it returned before and after the
strongest attack found, what was lost, and what the attack changed.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from holdfast.attacks.protocol import Learned
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.evidence import Evidence, Table
from holdfast.core.tasks import CLEAN, LEFT, MEASURED
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Inputs
from holdfast.explanation.case import About, Cell, Explained, Figure, distance_text, grid_rows
from holdfast.reports import tasks, tree
from holdfast.reports.curves import class_name
from holdfast.reports.run import example_group
from holdfast.reports.words import capitalized, plain
from holdfast.runs.harness.stage import Member
from holdfast.runs.harness.target import PreparedModel, measured_by_task, returned
from holdfast.threats.stored import threat_for_report

_SIDE = 384
"""longest side of the pictures"""


def explain_task(
    target: PreparedModel,
    batch: Batch,
    threat: ThreatModel,
    about: About,
    members: Sequence[Member],
    *,
    rng: Draws,
    stored: Inputs | None = None,
) -> Explained:
    """Explain what attacks change in the outputs of a model with another task than classes, for one example, `batch`
    (1).

    `stored` is the attacked input (1, *features) of an earlier run, which is shown. Without it, the attacks `members`
    are run, and the input with the lowest score is shown.
    """
    attack, x_adv, outputs = _strongest(target, batch, threat, members, rng, stored)
    evidence = _evidence(target, batch, threat, about, x_adv, outputs)
    lost = float(evidence[f"{CLEAN}{LEFT}"][0] - evidence[f"{MEASURED}{LEFT}"][0])
    example = tasks.examples_of_task(evidence, (), _SIDE)[0]
    change = (
        example.get("change") or f"{example['clean_prediction']} becomes {example['adversarial_prediction']}"
    )
    noun = {"regression": "target", "multilabel": "labels"}.get(example["task"])
    truth = "" if noun is None else f" The {noun} of the data: {example['label']}."
    if lost > 0:
        distance = float(threat.constraint.distance(x_adv, batch.x)[0])
        size = distance_text(threat.constraint, distance, target.original)
        by = f"by {attack}, with a change of {size}" if threat.constraint.is_ball else f"by {attack}"
        sentence = f"{capitalized(change)} ({by}).{truth}"
    else:
        sentence = f"No attack lowers the score of the example ({example['clean_prediction']}).{truth}"
    figures = [_outputs(example, change, evidence, about)]
    if lost > 0 and example["kind"] == "image":
        figures.append(_change(example, batch, x_adv, attack))
    advice = ("Assess more examples (holdfast assess), because one example is no evidence about the model.",)
    title = f"example {int(batch.ids[0])} of {about.data}"
    return Explained(title, sentence, tuple(figures), advice, about.notes, about.facts)


def _strongest(
    target: PreparedModel,
    batch: Batch,
    threat: ThreatModel,
    members: Sequence[Member],
    rng: Draws,
    stored: Inputs | None,
) -> tuple[str, Inputs, Tensor]:
    """The name of the attack that left least of the score, its input (1, *features), and what the model returned."""
    found = [("no attack", batch.x)]
    if stored is not None:
        found.append(("the strongest attack of the run", stored.to(batch.x)))
    # a learned attack is fitted on other examples
    for member in members if stored is None else ():
        if not isinstance(member.attack, Learned):
            attacked = replace(target, surrogate=member.surrogate)
            x_adv, _ = returned(member.attack, threat, attacked, batch, rng.at(member.name))
            found.append((member.name, x_adv))
    task, truth = target.task, batch.truth
    assert task is not None
    assert truth is not None
    judged = [(name, x_adv, target.logits(x_adv)) for name, x_adv in found]
    return min(judged, key=lambda each: float(task.left(each[2], truth)[0]))


def _evidence(
    target: PreparedModel, batch: Batch, threat: ThreatModel, about: About, x_adv: Inputs, outputs: Tensor
) -> Evidence:
    """The evidence of the example alone, with the columns and the gallery that reports show."""
    task, clean, bounds = target.task, target.logits(batch.x), target.original.bounds
    assert task is not None
    assert batch.truth is not None
    before, after = (measured_by_task(target, each, batch) for each in (clean, outputs))
    lead = task.lead(outputs, batch.truth)
    columns = {
        "id": batch.ids,
        "y": batch.y,
        "success": ~(lead > 0),
        "correct": task.lead(clean, batch.truth) > 0,
    }
    columns |= {f"{CLEAN}{name.removeprefix(MEASURED)}": values for name, values in before.items()} | dict(
        after
    )
    gallery = {"id": batch.ids, "x": batch.x, "x_adv": x_adv, "truth": batch.truth}
    gallery |= {"clean": task.shown(clean), "output": task.shown(outputs)}
    return Evidence(
        {name: values.cpu() for name, values in columns.items()},
        threat,
        "",
        (),
        about.seed,
        model={"task": task.card(), "bounds": [bounds.low, bounds.high]},
        data={"classes": about.classes, "features": about.features, "sampling_rate": about.sampling_rate},
        tables={"gallery": Table("example", {name: values.cpu() for name, values in gallery.items()})},
    )


def _outputs(example: dict[str, Any], change: str, evidence: Evidence, about: About) -> Figure:
    """What the model returned before and after the attack, as in the gallery of a report, and the numbers."""
    headings, rows = _rows(example, evidence, about)
    pictures: tuple[tree.Picture, ...] = ()
    blocks: list[tree.Block] = []
    for block in example_group(example, threat_for_report(evidence.threat)).blocks:
        if isinstance(block, tree.Pictures):
            pictures = tuple(block.pictures)
        else:
            blocks.append(block)
    shown = example.get("outputs", {"task": ""})
    if shown["task"] == "segmentation":
        clean, *masks, changes = pictures
        key = tuple((each["name"], each["colour"]) for each in shown["key"])
        attacked = tree.Picture(example["perturbed"], "image after the attack")
        true = tree.Picture(shown["true"], "mask of the data", key=key)
        pictures = (clean, attacked, true, *masks, replace(changes, key=tasks.CHANGES))
    note = tasks.NOTES.get(example["task"], "").strip()
    tabular = shown["task"] != "detection"  # whose table is one of the blocks
    return Figure(
        "outputs",
        change,
        f"{change}.",
        headings,
        rows,
        pictures,
        blocks=tuple(blocks),
        tabular=tabular,
        note=note,
        large=True,
    )


def _rows(
    example: dict[str, Any], evidence: Evidence, about: About
) -> tuple[tuple[str, ...], tuple[tuple[Cell, ...], ...]]:
    """The score of each class, object, number or label before and after the attack."""
    task, card = example["task"], evidence.model["task"]
    rows: list[tuple[Cell, ...]] = []
    if task == "segmentation":
        for k, counts in enumerate(
            zip(*(evidence[f"{kind}pixels"][0].tolist() for kind in (CLEAN, MEASURED)), strict=True)
        ):
            ious = [right / max(said + true - right, 1) for right, said, true in counts]
            if any(map(any, counts)):
                rows.append((class_name(k, about.classes), counts[0][2], *ious, ious[0] - ious[1]))
        rows.sort(key=lambda row: -float(row[4] or 0))
        return ("class", "pixels", "IoU before", "IoU after", "lost"), tuple(rows)
    if task == "detection":
        for number, entry in enumerate(example["outputs"]["objects"], 1):
            scores = [entry[kind] and entry[kind]["score"] for kind in ("before", "after")]
            rows.append((number, entry["name"], *entry["box"], *scores))
        return ("object", "class", "x1", "y1", "x2", "y2", "score before", "score after"), tuple(rows)
    truth, before, after = (evidence.gallery[name][0].tolist() for name in ("truth", "clean", "output"))
    for k, (true, was, now) in enumerate(zip(truth, before, after, strict=True)):
        if task == "multilabel":
            rows.append((class_name(k, about.classes), int(true), was, now))
        else:
            tolerance = card["tolerance"] * (abs(true) if card["relative"] else 1)
            rows.append((f"output {k + 1}", true, tolerance, was, now, abs(was - true), abs(now - true)))
    if task == "multilabel":
        return ("label", "true", "logit before", "logit after"), tuple(rows)
    return ("number", "target", "tolerance", "before", "after", "error before", "error after"), tuple(rows)


def _change(example: dict[str, Any], batch: Batch, x_adv: Inputs, attack: str) -> Figure:
    """The change of each pixel of an image."""
    delta = (x_adv - batch.x)[0]
    share = float((delta.abs().sum(0) > 0).double().mean())
    title = f"The attack changes {100 * share:.0f} % of the pixels"
    pictures = (
        tree.Picture(example["perturbed"], f"image after {attack}"),
        tree.Picture(
            example["difference"], f"its change × {plain(example['amplified'])}; grey means no change"
        ),
    )
    headings = ("row", "column", "input", "change")
    rows = grid_rows((batch.x[0], delta))
    return Figure("change", title, f"{title}.", headings, rows, pictures, large=True)
