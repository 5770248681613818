"""The table of attackers of a rotation, for the summary and as tables."""

from collections.abc import Iterator, Mapping
from typing import Any

from holdfast.reports.numbers import count_text, percent, strict
from holdfast.reports.transfer import shown

Json = dict[str, Any]

_ROW = ("who", "holds", "share", "attack", "word", "says")
_INSTEAD = ("who", "clean", "thief", "white", "says")
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
    """The table of attackers for the summary; None if it was not measured. The broken inputs stay in the run folder."""
    if document is None or not document["complete"] or not document["rows"]:
        return None
    table: Json = strict(
        {
            "set": document["set"],
            "n": document["right"],
            "verdict": document["verdict"],
            "rows": [{key: row[key] for key in _ROW} for row in document["rows"]],
            "instead": [
                {key: row.get(key) for key in _INSTEAD} for row in document["instead"] if row.get("clean")
            ],
        }
    )
    return table


def effect(word: str) -> str:
    """The effect of a rotation on an attacker, as reports show it."""
    return "not affected" if word == "untouched" else word


def title(found: Mapping[str, Any], noun: str) -> str:
    """Title of the table of attackers."""
    return (
        f"attackers: share of the {count_text(found['n'])} {noun} classified correctly by set {found['set']} that each "
        "attacker breaks"
    )


def headings(found: Mapping[str, Any]) -> list[str]:
    """Column headings of the table of attackers."""
    return ["attacker", "broken", "rotation", "attack", "has"]


def cells(found: Mapping[str, Any]) -> Iterator[list[str]]:
    """Cells of each row of the table of attackers, as text."""
    for row in found["rows"]:
        share = "–" if row["share"] is None else shown(row["share"])
        holds = row["says"] if row["share"] is None else row["holds"]
        yield [NAMES.get(row["who"], row["who"]), share, effect(row["word"]), row["attack"] or "–", holds]


def instead_title(found: Mapping[str, Any], noun: str) -> str:
    """Title of the table of alternatives."""
    return (
        f"alternatives: other uses of the same time, with the share of {noun} that examples from the stolen set "
        "and white-box attacks on the serving set break"
    )


def instead_headings(found: Mapping[str, Any]) -> list[str]:
    """Column headings of the table of alternatives."""
    return [
        "alternative",
        "clean accuracy",
        "broken by the stolen set",
        "broken by white-box attack",
        "description",
    ]


def instead_cells(found: Mapping[str, Any]) -> Iterator[list[str]]:
    """Cells of each row of the table of alternatives, as text."""
    for row in found["instead"]:
        shares = ("–" if row[key] is None else shown(row[key]) for key in ("thief", "white"))
        yield [row["who"], percent(row["clean"]["value"]), *shares, row["says"]]
