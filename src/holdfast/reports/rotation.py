"""Report of the success of attackers with different knowledge of a rotation, as an entry of the summary
and as tables.
"""

from collections.abc import Mapping
from typing import Any

from holdfast.reports.numbers import count_text, percent, strict
from holdfast.reports.transfer import shown
from holdfast.reports.words import TextTable

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


def attacker_table(results: Mapping[str, Any], noun: str) -> TextTable:
    """Return the table of the success of attackers with different knowledge of a rotation."""
    rows = []
    for row in results["rows"]:
        share = "–" if row["share"] is None else shown(row["share"])
        has = row["message"] if row["share"] is None else row["has"]
        name = NAMES.get(row["attacker"], row["attacker"])
        rows.append([name, share, row["effect"], row["attack"] or "–", has])
    return TextTable(
        f"attackers: share of the {count_text(results['n'])} {noun} classified correctly by set "
        f"{results['serving_set']} that each attacker breaks",
        ["attacker", "broken", "rotation", "attack", "has"],
        rows,
    )


def alternative_table(results: Mapping[str, Any], noun: str) -> TextTable:
    """Return the table that compares a rotation with other uses of the same training time."""
    rows = []
    for row in results["alternatives"]:
        shares = ("–" if row[key] is None else shown(row[key]) for key in ("stolen_set", "white_box"))
        rows.append([row["alternative"], percent(row["clean_accuracy"]["value"]), *shares, row["message"]])
    return TextTable(
        f"alternatives: other uses of the same time, with the share of {noun} that examples from the stolen set "
        "and white-box attacks on the serving set break",
        [
            "alternative",
            "clean accuracy",
            "broken by the stolen set",
            "broken by white-box attack",
            "description",
        ],
        rows,
    )
