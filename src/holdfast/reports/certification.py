"""The report's table of a certification: how many examples each method certified, broke or left undecided."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from holdfast.core.batch import decoded
from holdfast.core.catalogue import PATCH_MASKS, TREES, Arithmetic
from holdfast.core.evidence import Cost, Evidence, ProofRecord
from holdfast.metrics.shares import certified_accuracy
from holdfast.reports.curves import estimate_to_json, settings_group
from holdfast.reports.tree import Block, Paragraph, Section, Table
from holdfast.reports.words import (
    amount,
    count_text,
    interval,
    label,
    percent,
    plain,
    seconds_text,
    shown,
    strict,
    uncapitalized,
)

Json = dict[str, Any]

ATTACKS, OTHER = "attacks", "other passes"
"""Names of the rows for the attacks of the suite, and for probes and other passes that broke examples."""


def certification(evidence: Evidence, constraint: str) -> Json | None:
    """Return the results of a certification for the summary of a run, or None if nothing was to be certified.

    `constraint` is the set of allowed inputs as text, such as `linf:0.1`.
    """
    if not evidence.proofs:
        return None
    correct, certified = evidence["correct"], evidence["certified"]
    n, misclassified = len(evidence), int((~correct).sum())
    broken = int((~correct | evidence["success"]).sum())
    n_certified = int(certified.sum())
    statistical = _statistical(evidence)
    return {
        "constraint": constraint,
        "n": n,
        "certified": n_certified,
        "broken": broken,
        "misclassified": misclassified,
        "unknown": n - n_certified - broken,
        "attacked_certified": int((certified & evidence["attacked"]).sum()),
        "rows": list(_rows(evidence, n - misclassified, broken - misclassified)),
        "statistical": statistical,
        "undefined": _undefined(evidence),
        "arithmetic": next((record.arithmetic for record in evidence.proofs if record.arithmetic), None),
        **_curve(evidence),
    }


def _undefined(evidence: Evidence) -> list[Json]:
    """The operations whose domain the bounds of unknown examples leave, with the numbers of these examples."""
    if "undefined" not in evidence.tables:
        return []
    table = evidence.tables["undefined"].columns
    unknown = evidence["correct"] & ~evidence["success"] & ~evidence["certified"]
    texts = decoded(table["operation"][torch.isin(table["id"], evidence["id"][unknown])])
    return [{"operation": text, "examples": count} for text, count in sorted(Counter(texts).items())]


_CHANGES = (1, 10, 20, 40)
"""Numbers of changes of the training set for which reports show the certified accuracy, besides that of the threat."""


def _curve(evidence: Evidence) -> Json:
    """The certified accuracy for several numbers of changes of the training set, and the largest number against which
    at least half of the examples are certified. Nothing for other threats.
    """
    eps = 0 if evidence.threat.constraint.changes_inputs else int(evidence.threat.constraint.eps)
    if not eps:
        return {}
    radii = evidence["certified_radius"]
    curve = [
        {"changes": n, "certified_accuracy": estimate_to_json(certified_accuracy(evidence, eps=n))}
        for n in sorted({*_CHANGES, eps})
    ]
    median = radii.sort(descending=True).values[(len(radii) + 1) // 2 - 1]
    return {"training_set": {"curve": curve, "median": int(median)}}


def _statistical(evidence: Evidence) -> Json | None:
    """What is to be known about certificates that have a failure probability; None if there are none."""
    records = [record for record in evidence.proofs if "failure_probability" in record.settings]
    if not records:
        return None
    (record,) = records
    alpha = float(record.settings["failure_probability"])
    return {
        "method": record.name,
        "model": str(evidence.model.get("name", "")),
        **{name: record.settings[name] for name in ("sigma", "keep", "mask") if name in record.settings},
        "draws": int(record.settings["draws"]),
        "failure_probability": alpha,
        "any_failure_probability": min(1.0, alpha * record.tried),
        "tried": record.tried,
        "mean_draws": record.work / record.tried if record.tried else 0.0,
        "abstained": int((evidence["abstained"] & ~evidence["success"]).sum()),
        "contradicted": evidence["id"][evidence["contradicted"]].tolist(),
    }


def _rows(evidence: Evidence, undecided: int, broken: int) -> Iterator[Json]:
    """The rows in the order in which the methods ran, with the number of undecided examples after each.

    `undecided` is the number of correct examples, and `broken` that of all that are broken later.
    """
    broke = {record.stage: record.broke for record in evidence.passes}
    n_attacked = int(evidence["attacked"].sum())
    by_attacks = int(((evidence["broken_by"] >= 0) & (evidence["broken_by"] < len(evidence.attacks))).sum())
    early = [record for record in evidence.proofs if not record.after_attacks]
    late = [record for record in evidence.proofs if record.after_attacks]
    # a statistical certificate that an attack contradicts counts as broken by the attack
    contradicted = int(evidence["contradicted"].sum()) if "contradicted" in evidence else 0
    for record in early:
        if "failure_probability" in record.settings:
            record = replace(record, certified=record.certified - contradicted)
        undecided -= record.certified + broke.get(record.stage, 0)
        yield _row(record, broke.get(record.stage, 0), undecided)
    if evidence.attacks:
        undecided -= by_attacks
        cost = sum((record.cost for record in evidence.attacks), Cost())
        yield _row(replace(_NO_METHOD, name=ATTACKS, tried=n_attacked, cost=cost), by_attacks, undecided)
    for record in late:
        undecided -= record.certified + broke.get(record.stage, 0)
        yield _row(record, broke.get(record.stage, 0), undecided)
    elsewhere = broken - by_attacks - sum(broke.get(record.stage, 0) for record in evidence.proofs)
    if elsewhere:
        unknown = {"tried": None, "seconds": None, "cpu_seconds": None}
        yield _row(replace(_NO_METHOD, name=OTHER), elsewhere, undecided - elsewhere) | unknown


_NO_METHOD = ProofRecord("", "", {}, 0, 0, 0, 0, 0, 0, Cost())
"""record of a row that is no method"""


def _row(record: ProofRecord, broken: int, undecided: int) -> Json:
    return {
        "name": record.name,
        "stage": record.stage,
        "tried": record.tried,
        "certified": record.certified,
        "broken": broken,
        "undecided": undecided,
        "seconds": strict(record.cost.wall_s),
        "cpu_seconds": strict(record.cost.cpu_s),
        "seconds_per_example": record.cost.wall_s / record.tried if record.tried else None,
        "settings": strict(record.settings),
        "confirmed": record.confirmed,
        "stopped": record.stopped,
        "subproblems": record.work,
        "batch": record.batch,
    }


def _statistical_lines(statistical: Mapping[str, Any] | None, noun: str) -> list[str]:
    """Sentences about the failure probability, abstentions and contradictions of statistical certificates."""
    if statistical is None:
        return []
    alpha, together = statistical["failure_probability"], statistical["any_failure_probability"]
    tried, contradicted = statistical["tried"], statistical["contradicted"]
    lines = [
        f"the certificates are about the {statistical['model']}; each verdict of {statistical['method']} is wrong "
        f"with a probability of at most {plain(alpha)}, "
        + (
            f"and any of the {count_text(tried)} with at most {plain(together)}"
            if together < 1
            else f"and of the {count_text(tried)} at most {plain(alpha * tried)} are wrong on average"
        )
    ]
    if statistical["abstained"]:
        lines.append(
            f"the draws do not show the prediction for {amount(statistical['abstained'], noun)}; more --draws may"
        )
    if contradicted:
        ids = ", ".join(map(str, contradicted))
        lines.append(
            f"certificate and attack contradict each other for {amount(len(contradicted), noun)} (id {ids}), as their "
            "failure probabilities allow; these count as broken"
        )
    return lines


def _training_set_lines(training_set: Mapping[str, Any], noun: str) -> list[str]:
    """Sentences about certificates against changes of the training set."""
    shares = [
        f"{point['changes']}: {percent(point['certified_accuracy']['value'])} "
        f"({interval('certified_accuracy', point['certified_accuracy'])})"
        for point in training_set["curve"]
    ]
    return [
        f"certified accuracy by the number of training examples that are added or removed: {', '.join(shares)}",
        f"half of the {noun} are certified against {training_set['median']} or more",
        "a replaced training example counts twice, and a changed label once",
        "the certificates hold if the recipe partitions trained the model on the training set that its file names",
    ]


def section(summary: Mapping[str, Any]) -> Section:
    """Return the section of a certification: the table from the clean pass to the sums over all methods, and sentences
    about it.
    """
    results = summary["certification"]
    n, misclassified = results["n"], results["misclassified"]
    rows = [("no attack", count_text(n), "–", *map(count_text, (misclassified, n - misclassified)), "–", "–")]
    rows += [
        (
            row["name"],
            "–" if row["tried"] is None else count_text(row["tried"]),
            "–" if row["name"] in (ATTACKS, OTHER) else count_text(row["certified"]),
            count_text(row["broken"]),
            count_text(row["undecided"]),
            _time(row["seconds"]),
            _time(row["seconds_per_example"]),
        )
        for row in results["rows"]
    ]
    total = sum(row["seconds"] or 0.0 for row in results["rows"])
    counts = (count_text(results[name]) for name in ("certified", "broken", "unknown"))
    rows.append(("all", count_text(n), *counts, _time(total), _time(total / n if n else None)))
    headings = ("method", "tried", "certified", "broken", "undecided", "time", "time each")
    title = f"certification: {amount(n, summary['noun'])}, {results['constraint']}"
    table = Table(headings, rows, title, extra=frozenset({1, 6}), depth="notebook")
    lead = (
        "an example is certified if it is proved that no input of the threat model is misclassified, broken if one is "
        "known, and otherwise unknown. Each method is run on the examples that are still undecided"
    )
    if summary["model"].get("task") is not None:
        from holdfast.tasks.catalogue import task_of  # late: most runs are of classes

        task = task_of(summary["model"]["task"])
        lead = (
            f"an {task.noun} is certified if it is proved that {task.correct_if} for every input of the threat model, "
            "broken if an input is known for which it is not, and otherwise unknown"
        )
    methods = [row for row in results["rows"] if row["stage"]]
    blocks: list[Block] = [
        table,
        *(Paragraph(text, "notebook") for text in _lines(summary)),
        settings_group("Settings of each method", methods),
    ]
    return Section("Certification", blocks, lead, "certification", "Certification", "notebook")


_OF_OUTPUTS: Mapping[str, tuple[str, str, str]] = {
    "segmentation": ("certified_pixel_accuracy", "≤", "pixel_accuracy"),
    "regression": ("certified_mean_absolute_error", "≥", "mean_absolute_error"),
    "multilabel": ("certified_label_accuracy", "≤", "label_accuracy"),
}
"""what is proved about the outputs of each task, and the metric of attacks that it bounds"""


def _lines_of_outputs(summary: Mapping[str, Any]) -> list[str]:
    """A sentence about what is proved about the outputs of a model with another task than classes."""
    task, metrics = summary["model"].get("task"), summary["metrics"]
    if task is None:
        return []
    proved, relation, attacked = _OF_OUTPUTS[task["name"]]
    bounded = f"{uncapitalized(label(attacked))} under attack {_with_interval(attacked, metrics)}"
    return [f"{uncapitalized(label(proved))} {_with_interval(proved, metrics)} {relation} {bounded}"]


def _with_interval(metric: str, metrics: Mapping[str, Any]) -> str:
    return f"{shown(metric, metrics[metric]['value'])} ({interval(metric, metrics[metric])})"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return "< 1 ms" if 0 < seconds < 1e-3 else seconds_text(seconds)


_BY_BOUNDS: Mapping[Arithmetic, str] = {
    "exact": "certificates hold for the network in exact arithmetic with its stored weights, and include the rounding "
    "errors of the bounds",
    "float32": "certificates hold for the network as it is computed in float32, in any order of summation, and include "
    "the rounding errors of the bounds",
}
_WHAT_IS_PROVED = {
    TREES: "certificates hold for all values that the model can compare with its thresholds, and include the rounding "
    "errors of its sums",
    PATCH_MASKS: "certificates are about the vote over masks: no patch of the threat changes it; for the model alone "
    "they prove nothing",
}
"""Sentences about certificates by the name of the only method, where bounds of operations are not used."""


def _lines(summary: Mapping[str, Any]) -> list[str]:
    """Sentences that compare certified and robust accuracy, and state how the certificates were tested."""
    results, metrics = summary["certification"], summary["metrics"]
    noun = summary["noun"]
    counts = ", ".join(f"{count_text(results[name])} {name}" for name in ("certified", "broken", "unknown"))
    lines = [f"of {amount(results['n'], noun)}, {counts}"]
    certified, robust = metrics.get("certified_accuracy"), metrics.get("robust_accuracy")
    training_set = results.get("training_set")
    if training_set:
        return [*lines, *_training_set_lines(training_set, noun)]
    # nothing attacks embeddings
    attackable = summary["threat"]["norm"] != "WordEmbeddings"
    if certified and robust and attackable:
        lines.append(
            f"certified accuracy {percent(certified['value'])} ({interval('certified_accuracy', certified)}) ≤ robust "
            f"accuracy {percent(robust['value'])} ({interval('robust_accuracy', robust)})"
        )
    lines += _lines_of_outputs(summary)
    if results["certified"] and attackable:
        attacked = f"{count_text(results['attacked_certified'])} of {count_text(results['certified'])}"
        contradicted = results["statistical"] and results["statistical"]["contradicted"]
        lines.append(
            f"{attacked} certified {noun} were attacked" + ("" if contradicted else ", and none was broken")
        )
    lines += _statistical_lines(results["statistical"], noun)
    if results["certified"] and not results["statistical"]:
        names = {row["name"] for row in results["rows"] if row["certified"] and row["stage"]}
        known = next(iter(names)) if len(names) == 1 else ""
        lines.append(_WHAT_IS_PROVED.get(known, _BY_BOUNDS[results.get("arithmetic") or "exact"]))
    lines += [
        f"memory ran out in {row['name']}, which continued with {amount(row['batch'], noun)} at a time"
        for row in results["rows"]
        if row["batch"] is not None
    ]
    stopped = sum(row["stopped"] for row in results["rows"])
    if stopped:
        lines.append(
            f"the time limit ended the search for {amount(stopped, noun)}; a longer --timeout may decide more"
        )
    lines += [
        f"{amount(each['examples'], noun)} unknown: the bounds leave the domain of the operation {each['operation']}; "
        "a smaller eps may keep them inside"
        for each in results.get("undefined", [])
    ]
    unconfirmed = sum(row["broken"] - row["confirmed"] for row in results["rows"] if row["stage"])
    if unconfirmed > 0:
        lines.append(
            f"{amount(unconfirmed, 'counterexamples')} of the methods are misclassified by the model, but not in "
            "double precision"
        )
    return lines
