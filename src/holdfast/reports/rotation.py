"""The table of attackers of a rotation, for the summary and as tables."""

from collections.abc import Iterator, Mapping
from typing import Any

from holdfast.reports.numbers import count, percent, strict
from holdfast.reports.transfer import shown

Json = dict[str, Any]

_ROW = ("who", "holds", "share", "attack", "word", "says")
_INSTEAD = ("who", "clean", "thief", "white", "says")
NAMES = {
    "A0": "A0 stole nothing",
    "A1": "A1 stole a set that is listed",
    "A1u": "A1u stole one that is not",
    "A2": "A2 stole several",
    "A2c": "A2c stole the collection",
    "A3": "A3 has the generator",
    "A4": "A4 asks across swaps",
    "A5": "A5 holds what serves",
    "A6": "A6 distils the answers",
}
"""Names of the attackers in reports."""


def rotation(document: Mapping[str, Any] | None) -> Json | None:
    """The table of attackers for the summary; None if it was not measured. The broken inputs stay in the run folder."""
    if document is None or not document["complete"] or not document["rows"]:
        return None
    found: Json = strict(
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
    return found


def title(found: Mapping[str, Any], noun: str) -> str:
    """Title of the table of attackers."""
    return f"attackers: of the {count(found['n'])} {noun} that set {found['set']} has right those that each turns"


def headings(found: Mapping[str, Any]) -> list[str]:
    """Column headings of the table of attackers."""
    return ["attacker", "turned", "rotation", "by", "holds"]


def cells(found: Mapping[str, Any]) -> Iterator[list[str]]:
    """Cells of each row of the table of attackers, as text."""
    for row in found["rows"]:
        share = "–" if row["share"] is None else shown(row["share"])
        holds = row["says"] if row["share"] is None else row["holds"]
        yield [NAMES.get(row["who"], row["who"]), share, row["word"], row["attack"] or "–", holds]


def instead_title(found: Mapping[str, Any], noun: str) -> str:
    """Title of the table of alternatives."""
    return f"instead: what else the time buys, {noun} that a thief of the set before turns, and who holds what serves"


def instead_headings(found: Mapping[str, Any]) -> list[str]:
    """Column headings of the table of alternatives."""
    return ["instead", "right", "a thief turns", "white box turns", "what it is"]


def instead_cells(found: Mapping[str, Any]) -> Iterator[list[str]]:
    """Cells of each row of the table of alternatives, as text."""
    for row in found["instead"]:
        shares = ("–" if row[key] is None else shown(row[key]) for key in ("thief", "white"))
        yield [row["who"], percent(row["clean"]["value"]), *shares, row["says"]]
