"""Report of the success of attackers with different knowledge of a rotation, as an entry of the summary
and as tables.
"""

from collections.abc import Mapping
from typing import Any

from holdfast.reports.numbers import count_text, percent, strict
from holdfast.reports.transfer import shown
from holdfast.reports.tree import Cell, Paragraph, Section, Table

Json = dict[str, Any]

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
            _share(row["share"]),
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
            *(_share(row[key]) for key in ("stolen_set", "white_box")),
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


def _share(share: Mapping[str, Any] | None) -> Cell | str:
    return "–" if share is None else shown(share)
