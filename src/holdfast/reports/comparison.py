"""Comparison of two runs on the same examples: paired differences, an exact test, and the examples whose results
changed.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor

from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Evidence, Scope
from holdfast.core.types import Mask
from holdfast.metrics import comparisons
from holdfast.metrics.shares import Absent
from holdfast.reports import words
from holdfast.reports.curves import estimate_to_json
from holdfast.reports.tree import Facts, Group, Items, Report, Row, Section, Table
from holdfast.reports.words import count_text, number, percent, plain, strict
from holdfast.statistics.intervals import CONFIDENCE, mcnemar

Json = dict[str, Any]

COMPARISON_VERSION = 2
"""Version of the format. It is increased if a reader of the previous version would misinterpret the new one."""
MOST_FLIPPED = 1000
"""Largest number of examples listed for each direction of change; the counts include all examples."""


def comparison(
    first: Evidence,
    second: Evidence,
    summaries: tuple[Mapping[str, Any], Mapping[str, Any]],
) -> Json:
    """Return the content of a comparison of two runs: the changes from the first to the second on the examples that
    both share.

    `summaries` are the summaries of the two runs. Raises `UsageError` if the runs have no examples in common.
    """
    shared = comparisons.paired_examples(first, second)
    notes = _differences(*summaries, len(first), len(second), len(shared))
    clean = first["correct"], second["correct"]
    paired = {"clean_accuracy": _paired(clean, comparisons.clean_accuracy_drop(first, second), shared)}
    robust, flipped, scope, note = _robust(first, second, shared)
    notes.append(note)
    sides = [summary["metrics"] for summary in summaries]
    content = {
        "schema_version": COMPARISON_VERSION,
        "verb": "compare",
        "caution": caution(summaries[0]["threat"], summaries[1]["threat"])
        or _other_bounds(first, second)
        or _other_content(first, second),
        "headline": "",
        "n": len(shared),
        "noun": summaries[0]["noun"],
        "confidence": CONFIDENCE,
        "runs": [_run(summary) for summary in summaries],
        "paired": robust | paired,
        "flipped": flipped,
        "scope": scope,
        "metrics": {name: [side.get(name) for side in sides] for name in dict.fromkeys(chain(*sides))},
        "notes": notes,
    }
    content["survived"] = words.all_attacks_text(summaries[1]["threat"])
    content["headline"] = comparison_headline(content)
    written: Json = strict(content)
    return written


def _robust(
    first: Evidence, second: Evidence, shared: comparisons.Pairs
) -> tuple[Json, Json, Scope | None, str]:
    """The robust accuracies, the changed examples, the scope, and a note; empty if they are not comparable."""
    try:
        scope = comparisons.basis(first, second)
        masks = comparisons.robust_in_scope(first, scope), comparisons.robust_in_scope(second, scope)
        paired = {"robust_accuracy": _paired(masks, comparisons.regression(first, second), shared)}
    except Absent as absent:
        return {}, {}, None, f"robust accuracy is not compared: {absent.on_command_line()}"
    note = f"robust accuracy is {words.SCOPES[scope]}"
    return paired, _flipped(first, second, masks, shared), scope, note


def shown_side_by_side(content: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any] | None]]:
    """Return the metrics of both runs that text reports of a comparison show. Metrics that are redundant
    are left out.
    """
    sides = ({name: pair[k] for name, pair in content["metrics"].items() if pair[k]} for k in (0, 1))
    names = {name for side in sides for name in words.without_redundant(side)}
    return {name: pair for name, pair in content["metrics"].items() if name in names}


def caution(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Return a warning if the threat models of two compared runs differ, or an empty string if they are equal."""
    before, after = words.threat_syntax(first), words.threat_syntax(second)
    if before == after:
        return ""
    return (
        f"The threat models differ: {before} in the first run, {after} in the second; the difference may come from "
        "the attacker and not from the model."
    )


def _other_bounds(first: Evidence, second: Evidence) -> str:
    """Return a warning if the inputs have other bounds in the second run, or an empty string."""
    before, after = (evidence.model.get("bounds") for evidence in (first, second))
    if before == after or before is None or after is None:
        return ""
    ends = [f"{float(low):g} to {float(high):g}" for low, high in (before, after)]
    return (
        f"The bounds of the inputs differ: {ends[0]} in the first run, {ends[1]} in the second; "
        "the same threat model then allows other changes, and the difference may come from the attacker and not from "
        "the model."
    )


def _other_content(first: Evidence, second: Evidence) -> str:
    """Return a warning if the file of the threat model had another content in the second run, or an empty string."""
    limits = [getattr(evidence.threat.constraint, "limits", {}) for evidence in (first, second)]
    if limits[0].get("content") == limits[1].get("content"):
        return ""
    file = next(limits[1][name] for name in ("file", "printable", "shape") if name in limits[1])
    return (
        f"The content of {file!r} differs between the runs; the difference may come from the attacker "
        "and not from the model."
    )


def comparison_headline(content: Mapping[str, Any]) -> str:
    """Return one sentence that states the change between two compared runs. An exact test decides whether the change is
    significant.
    """
    metric, paired = next(iter(content["paired"].items()))
    before, after = (percent(paired[side]) for side in ("first", "second"))
    change, p = paired["difference"], paired["p"]
    survived = "the suite" if content["scope"] == "suite only" else content["survived"]
    outcome = f"survive {survived}" if metric == "robust_accuracy" else "are correct without any attack"
    shared = f"{count_text(content['n'])} shared {content['noun']}"
    sentence = f"Of {shared}, {after} {outcome} in the second run and {before} in the first"
    level = f"{100 * content['confidence']:.0f} %"
    ends = f"{level} interval {signed(change['low'])} to {signed(change['high'])}"
    contains_zero = number(change["low"]) <= 0 <= number(change["high"])
    significant = number(p) < 1 - content["confidence"]
    prefix = "" if significant else "no significant difference on these examples, "
    contains = "contains" if contains_zero else "does not contain"
    disagreement = f"; the interval {contains} 0, but the exact test decides"
    tested = f"exact McNemar p = {plain(p, 2)}{disagreement if significant == contains_zero else ''}"
    return f"{sentence}: {prefix}{signed(change['value'])} points ({ends}, {tested})."


def percentage_points(change: Mapping[str, Any]) -> str:
    """Return the difference of a metric between two runs, with its confidence interval, as text, such as `−3.5 points
    (−5.8 to −1.2)`.
    """
    return f"{signed(change['value'])} points ({signed(change['low'])} to {signed(change['high'])})"


def signed(share: float | str) -> str:
    """Return a difference of fractions as text in percentage points, with a sign unless it is zero."""
    text = f"{100 * number(share):+.1f}".replace("-", "−")
    return "0.0" if text in {"+0.0", "−0.0"} else text


def _paired(judged: tuple[Mask, Mask], difference: Estimate, shared: comparisons.Pairs) -> Json:
    before, after = judged[0][shared.first].bool(), judged[1][shared.second].bool()
    test = mcnemar(before, after)
    return {
        "first": float(before.double().mean()),
        "second": float(after.double().mean()),
        "difference": estimate_to_json(difference),
        "only_first": test.only_first,
        "only_second": test.only_second,
        "p": test.p,
    }


def _flipped(first: Evidence, second: Evidence, robust: tuple[Mask, Mask], shared: comparisons.Pairs) -> Json:
    """The examples that survive in one run only, by their ids in both."""
    before, after = robust[0][shared.first].bool(), robust[1][shared.second].bool()
    ids = first["id"][shared.first], second["id"][shared.second]
    return {"lost": _side(before & ~after, ids), "gained": _side(after & ~before, ids)}


def _side(mask: Mask, ids: tuple[Tensor, Tensor]) -> Json:
    rows = mask.nonzero()[:, 0]
    listed = [
        list(pair) for pair in zip(*(side_ids[rows[:MOST_FLIPPED]].tolist() for side_ids in ids), strict=True)
    ]
    return {"n": len(rows), "ids": listed}


def _run(summary: Mapping[str, Any]) -> Json:
    return {
        "folder": summary["run"].get("folder", ""),
        "model": str(summary["model"].get("name", "model")),
        "data": str(summary["data"].get("name", "data")),
        "threat": summary["threat"]["constraint"],
        "suite": summary["suite"] or "a list of attacks",
        "seed": summary["seed"],
        "n": summary["n"],
        "verdict": summary["verdict"],
        "open_doubts": words.open_doubts(summary),
    }


def _differences(
    first: Mapping[str, Any], second: Mapping[str, Any], n_first: int, n_second: int, n_shared: int
) -> list[str]:
    """Notes that a reader needs before interpreting the difference."""
    sides = _run(first), _run(second)
    notes = [
        f"{key} differs: {sides[0][key]} in the first run, {sides[1][key]} in the second"
        for key in ("suite", "data")
        if sides[0][key] != sides[1][key]
    ]
    if not n_shared == n_first == n_second:
        notes.append(
            f"{count_text(n_shared)} examples are in both runs, of {count_text(n_first)} and {count_text(n_second)}"
        )
    for place, side in zip(("first", "second"), sides, strict=True):
        if side["open_doubts"]:
            notes.append(f"doubts are open in the {place} run: {', '.join(side['open_doubts'])}")
    return notes


def comparison_report(content: Mapping[str, Any]) -> Report:
    """Return the report of a comparison with the given content."""
    runs, notes = content["runs"], content["notes"]
    return Report(
        verb="compare",
        about=f"comparison: {runs[0]['model']} and {runs[1]['model']}",
        headline=content["headline"],
        content=content,
        caution=content["caution"],
        lead=(Group("Notes on the comparison", (Items(notes),)),) if notes else (),
        sections=[*_sections(content)],
        footer="Generated by Holdfast from the evidence of both runs.",
    )


def _sections(content: Mapping[str, Any]) -> Iterator[Section]:
    noun = content["noun"]
    paired = Table(
        ("paired", "first", "second", "difference", "p"),
        _paired_rows(content),
        f"{count_text(content['n'])} shared {noun}",
        depth="notebook",
    )
    lead = (
        f"{count_text(content['n'])} of them, paired by content. The interval is of the paired difference; p is "
        "McNemar's exact test, which decides whether there is a difference"
    )
    yield Section(f"On the shared {noun}", (paired,), lead, depth="notebook")
    if content["flipped"]:
        flipped = [(text, content["flipped"][side]) for side, text in SIDES.items()]
        facts = Facts([(text, f"{count_text(each['n'])}{_first_ids(each)}") for text, each in flipped])
        yield Section("Changed examples", (facts,), "numbers are source rows of the first run")
    yield Section("Runs", (_runs(content["runs"]),))
    rows: dict[str, Row] = {
        name: (words.metric_cell(name), *(words.estimate_cell(name, e) if e else "–" for e in pair))
        for name, pair in shown_side_by_side(content).items()
    }
    lead = (
        f"for each run, on all of its examples, with {100 * content['confidence']:.0f} % intervals. The JSON report "
        "contains all metrics"
    )
    tables = words.metric_tables(("metric", "first", "second"), rows, "metrics")
    yield Section("Metrics", tables, lead, depth="notebook")


def _runs(runs: Sequence[Mapping[str, Any]]) -> Table:
    keys = [
        key
        for key in ("model", "data", "threat", "suite", "seed", "n", "verdict", "folder")
        if runs[0][key] != ""
    ]
    rows = [(key, *(str(run[key]) for run in runs)) for key in keys]
    return Table(("run", "first", "second"), rows, texts=frozenset({1, 2}))


def _paired_rows(content: Mapping[str, Any]) -> list[tuple[str, ...]]:
    suite = content["scope"] == "suite only"
    return [
        (
            words.label(f"suite_{name}" if suite and name == "robust_accuracy" else name),
            percent(row["first"]),
            percent(row["second"]),
            percentage_points(row["difference"]),
            plain(row["p"], 2),
        )
        for name, row in content["paired"].items()
    ]


SIDES = {
    "lost": "Robust in the first run, broken in the second",
    "gained": "Broken in the first run, robust in the second",
}
"""Description of each of the two directions in which the result of an example can change."""


def _first_ids(flipped: Mapping[str, Any], most: int = 20) -> str:
    """A few ids, and how many more there are."""
    if not flipped["n"]:
        return ""
    ids = ", ".join(f"#{pair[0]}" for pair in flipped["ids"][:most])
    more = flipped["n"] - most
    return f" ({ids}{f' and {count_text(more)} more' if more > 0 else ''})"
