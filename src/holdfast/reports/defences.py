"""The report's parts on defences: a guard against query-based attacks, and the attackers of a rotation."""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from holdfast.core.evidence import Table as StoredTable
from holdfast.metrics.names import PERCENTS, at_percent
from holdfast.reports.curves import estimate_to_json
from holdfast.reports.tree import Cell, Paragraph, Section, Table
from holdfast.reports.words import count_text, estimate_cell, interval, percent, strict
from holdfast.statistics.intervals import proportion

Json = dict[str, Any]

_ATTACKERS = {
    "plain": "Square, which does not know the guard",
    "adaptive": "OARS, which adapts to rejected queries",
    "patterns": "coarse patterns with a linear fit, which adapt to rejected queries",
    "population": "coarse patterns with a genetic search, which adapt to rejected queries",
    "labels": "RayS, which needs labels only",
    "informed": "informed Square, which knows the query detector",
}
"""Attacks by the prefix of their columns in the table of the evidence."""
BUDGET = 100
"""number of queries of the smaller budget that is reported"""
_WORST = "the best of these for each example"  # rejected: each of the attacks had a rejected query


def stateful_results(table: StoredTable | None) -> Json | None:
    """Return the results of the black-box attacks on a guard for the summary; None if no example was attacked."""
    if table is None or not len(table):
        return None
    names = [name for name in _ATTACKERS if f"{name}_with_broken" in table.columns]
    of_attacks = [_columns(table, name) for name in names]
    worst = {
        column: _first(torch.stack([columns[column] for columns in of_attacks if column in columns]))
        for column in {column: None for columns in of_attacks for column in columns}
    }
    rejected = torch.stack([columns["with_rejected"] for columns in of_attacks])
    worst["with_rejected"] = torch.where((rejected > 0).all(0), rejected.amax(0), 0)
    rows = [_row(_ATTACKERS[name], columns) for name, columns in zip(names, of_attacks, strict=True)]
    return {"n": len(table), "rows": [*rows, _row(_WORST, worst)]}


def _columns(table: StoredTable, attack: str) -> dict[str, Tensor]:
    """The columns of an attack, by their names without its prefix."""
    return {
        column.removeprefix(f"{attack}_"): values
        for column, values in table.columns.items()
        if column.startswith(f"{attack}_")
    }


def _row(attacker: str, columns: Mapping[str, Tensor]) -> Json:
    return {
        "attacker": attacker,
        **_arm(columns["without_broken"], "without"),
        **_arm(columns["with_broken"], "with"),
        **_noticed(columns["with_rejected"]),
        **_arm(columns.get("rounded_broken"), "rounded"),
        **_arm(columns.get("labelled_broken"), "labelled"),
        "broken_in_budget": estimate_to_json(proportion(_within(columns["without_broken"]))),
        "broken_in_budget_with": estimate_to_json(proportion(_within(columns["with_broken"]))),
    }


def _within(broken_at: Tensor) -> Tensor:
    return (broken_at > 0) & (broken_at <= BUDGET)


def _first(broken_at: Tensor) -> Tensor:
    """The least number of queries of all attacks (attacks, n) that broke an example, 0 if none did."""
    never = torch.iinfo(broken_at.dtype).max
    least = torch.where(broken_at > 0, broken_at, never).amin(0)
    return torch.where(least == never, 0, least)


def _arm(broken_at: Tensor | None, arm: str) -> Json:
    """The share of broken examples, and the median number of queries until they were; None for no measurement."""
    if broken_at is None:
        return {f"broken_{arm}": None, f"queries_{arm}": None}
    return {
        f"broken_{arm}": estimate_to_json(proportion(broken_at > 0)),
        f"queries_{arm}": _median(broken_at),
    }


def _noticed(rejected_at: Tensor) -> Json:
    return {
        "rejected": estimate_to_json(proportion(rejected_at > 0)),
        "rejected_after": _median(rejected_at),
    }


def _median(first: Tensor) -> int | None:
    """The median of the numbers of queries that are not 0, which stands for never; None if there is none."""
    reached = first[first > 0]
    return int(torch.median(reached)) if len(reached) else None


def query_section(results: Mapping[str, Any], noun: str) -> Section:
    """Return the section of black-box attacks on a guard, with the guard and with other answers."""
    attacked = [
        (
            row["attacker"],
            _share_broken(row["broken_without"], row["queries_without"]),
            _share_broken(row["broken_with"], row["queries_with"]),
            _share_broken(row["rejected"], row["rejected_after"]),
        )
        for row in results["rows"]
    ]
    answered = [
        (
            row["attacker"],
            *(
                _share_broken(row[f"broken_{arm}"], row[f"queries_{arm}"])
                for arm in ("without", "rounded", "labelled")
            ),
            percent(row["broken_in_budget"]["value"]),
        )
        for row in results["rows"]
    ]
    title = f"queries: black-box attacks on {count_text(results['n'])} {noun} with the guard and without it"
    headings = ("attack", "broken without", "broken with", "rejected")
    answers = ("attack", "all scores", "2 digits", "labels", f"{BUDGET} queries")
    note = (
        "A query detector compares a query with earlier ones, so it is not part of the robust accuracy. It does not "
        "detect attacks with few queries, on many inputs, or with transferred examples. The answer to a rejected query "
        "contains no scores. Every query comes from a new client. The last row has for each of the "
        f"{noun} the attack that needs the fewest queries."
    )
    blocks = (
        Table(headings, attacked, title),
        Table(answers, answered, "queries: the same attacks without the guard, if clients receive less"),
        Paragraph(note, "page"),
    )
    lead = "black-box attacks with the guard and without it, with the median number of queries"
    return Section("Queries", blocks, lead, "query-detector", "Queries")


def _share_broken(broken: Mapping[str, Any] | None, queries: int | None) -> Cell | str:
    """A share with its interval and the median number of queries."""
    if broken is None:
        return "–"
    median = () if queries is None else (f"median {count_text(queries)} queries",)
    return Cell(percent(broken["value"]), (interval("attack_success_rate", broken), *median))


_COLUMNS: Final = (
    ("oblivious_detection_rate", "detected if unknown"),
    ("detection_rate", "detected if known"),
    ("accepted_right", "robust with rejection"),
)
"""metrics of a detector at a false positive rate, with the headings of their columns"""


def detector_section(summary: Mapping[str, Any]) -> Section | None:
    """Return the section of the detector of a model: at each false positive rate, the detection rate for attackers that
    do not know the detector and that know it, and the robust accuracy with rejection. None if none was evaluated.
    """
    metrics, noun = summary["metrics"], summary["noun"]
    rows = [(rate, [metrics.get(at_percent(name, rate)) for name, _ in _COLUMNS]) for rate in PERCENTS]
    # robust accuracy is measured whenever there are enough clean inputs, also if no attack succeeded
    measured = [estimates[-1] is not None for _, estimates in rows]
    if not any(measured):
        return None
    cells = [
        (
            f"{rate} %",
            *("–" if e is None else estimate_cell("attack_success_rate", e) for e in estimates),
        )
        for rate, estimates in rows
    ]
    lead = f"{count_text(summary['n'])} {noun} under attacks that do and do not know it"
    table = Table(("false positives", *(heading for _, heading in _COLUMNS)), cells)
    note = (
        f"Each row is a threshold at which the detector rejects this share of the clean {noun}. Detected: of the "
        f"attacked {noun} that the network misclassifies, the share that the detector rejects; it is unknown or known "
        f"to the attacker. Robust with rejection: share of the {noun} that are accepted and right when clean, and of "
        "which no attacked version is accepted and wrong. Attacks that know the detector follow the gradient of "
        "network and detector together. Of all attacked versions of an input, the one with the lowest score counts."
    )
    few = "" if all(measured) else "; 0.1 % needs 999 or more"
    return Section("Detector", (table, Paragraph(note, "page")), f"{lead}{few}", "detector", "Detector")


_ROW = ("attacker", "has", "share", "attack", "effect", "message")
_ALTERNATIVE = ("alternative", "clean_accuracy", "stolen_set", "white_box", "message")
"""Keys of the document in the run folder that the rows of the tables contain."""
NAMES = {
    "A0": "A0 has surrogates only",
    "A1": "A1 has one listed set",
    "A1u": "A1u has one unlisted set",
    "A2": "A2 has several sets",
    "A2c": "A2c has the collection",
    "A3": "A3 has the generator",
    "A4": "A4 queries across swaps",
    "A5": "A5 has the serving set",
    "A6": "A6 distils answers",
}
"""Names of the attackers in reports."""


def rotation(document: Mapping[str, Any] | None) -> Json | None:
    """Return the success of attackers with different knowledge of a rotation, as JSON for the summary, or None if it
    was not measured.

    The inputs that were broken are not included; they are in the run folder only.
    """
    if document is None or not document["complete"] or not document["rows"]:
        return None
    table: Json = strict(
        {
            "serving_set": document["set"],
            "n": document["n_correct"],
            "conclusion": document["conclusion"],
            "rows": [{key: row[key] for key in _ROW} for row in document["rows"]],
            "alternatives": [
                {key: row.get(key) for key in _ALTERNATIVE}
                for row in document["alternatives"]
                if row.get("clean_accuracy")
            ],
        }
    )
    return table


def section(results: Mapping[str, Any], noun: str) -> Section:
    """Return the section of the success of attackers with different knowledge of a rotation, and of other uses of the
    same training time.
    """
    attackers = [
        (
            NAMES.get(row["attacker"], row["attacker"]),
            _success(row["share"]),
            row["effect"],
            row["attack"] or "–",
            row["message"] if row["share"] is None else row["has"],
        )
        for row in results["rows"]
    ]
    alternatives = [
        (
            row["alternative"],
            percent(row["clean_accuracy"]["value"]),
            *(_success(row[key]) for key in ("stolen_set", "white_box")),
            row["message"],
        )
        for row in results["alternatives"]
    ]
    of_attackers = (
        f"attackers: share of the {count_text(results['n'])} {noun} classified correctly by set "
        f"{results['serving_set']} that each attacker breaks"
    )
    of_alternatives = (
        f"alternatives: other uses of the same time, with the share of {noun} that examples from the stolen set and "
        "white-box attacks on the serving set break"
    )
    headings = (
        "alternative",
        "clean accuracy",
        "broken by the stolen set",
        "broken by white-box attack",
        "description",
    )
    blocks = (
        Table(
            ("attacker", "broken", "rotation", "attack", "has"),
            attackers,
            of_attackers,
            texts=frozenset({2, 3, 4}),
        ),
        Paragraph(_EFFECTS, "page"),
        Table(headings, alternatives, of_alternatives, texts=frozenset({4})),
        Paragraph(of_alternatives, "page"),
    )
    title = "Attackers of the rotation"
    return Section(title, blocks, results["conclusion"], "rotation", "Attackers")


_EFFECTS = (
    "Slowed: the attacker breaks at most half as many as an attacker with the serving set (the white-box attack of "
    "static below). Stopped: slowed, and at most 1.2 times as many as A0; or at most 5 %. Not affected: more than half "
    "as many. These use the ends of the interval. Unclear: the interval contains the limit. Each attacker is "
    "represented by its most successful attack."
)


def _success(share: Mapping[str, Any] | None) -> Cell | str:
    return "–" if share is None else estimate_cell("transfer_success", share)
