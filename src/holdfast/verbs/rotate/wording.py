"""The words in the table of attackers, which state whether a rotation stops, slows, or does not affect an attacker.

The success of an attacker is compared with that of its own attacks when it has the serving set. It is not compared with
that of a suite, because a suite counts the examples that any of its attacks breaks, and the table only those of the
best attack of each attacker.
"""

from collections.abc import Mapping, Sequence
from typing import Any

AS_A0, LITTLE, HALF, NOTHING = 1.2, 0.05, 0.5, 0.8
"""Limits that define the words.

Slowed: with confidence, the success rate is at most `HALF` of that of the white-box attack. Stopped: slowed and, with
confidence, at most `AS_A0` times the success rate of A0; or, with confidence, at most `LITTLE`. Unclear: the interval
contains half of the white-box success rate. A0 and A5 are not affected by swaps. If the success rate of A1 is at least
`NOTHING` times the white-box success rate, rotation does not protect from thefts.
"""
WORDS = {
    "stopped": "stopped",
    "slowed": "slowed",
    "unclear": "unclear because there are too few inputs",
    "untouched": "not affected",
}
Json = dict[str, Any]


def with_words(rows: Sequence[Mapping[str, Any]], itself: Mapping[str, Any] | None = None) -> list[Json]:
    """Return the rows of the table of attackers, each with a word for the effect of the rotation on that attacker.

    `itself` is the success rate of an attacker's attacks when it has the serving set; if it is None, that of A5 is
    used.
    """
    shares = {row["who"]: row["share"] for row in rows}
    white, none = (itself or shares["A5"])["value"], shares["A0"]["value"]
    return [{**row, "word": _word(row["who"], row["share"], white, none)} for row in rows]


def _word(who: str, share: Mapping[str, Any] | None, white: float, none: float) -> str:
    if share is None:
        return "not measured"
    if who in ("A0", "A5"):
        return "untouched"
    half = share["high"] <= HALF * white
    if share["high"] <= LITTLE or (half and share["high"] <= AS_A0 * none):
        return "stopped"
    if half:
        return "slowed"
    return "unclear" if share["low"] <= HALF * white else "untouched"


def protection_verdict(rows: Sequence[Mapping[str, Any]], itself: Mapping[str, Any] | None = None) -> str:
    """Return the verdict on the protection by the rotation, in one or two sentences."""
    by = {row["who"]: row for row in rows}
    one, white = by["A1"]["share"], itself or by["A5"]["share"]
    words = {word: [row["who"] for row in rows if row["word"] == word] for word in WORDS}
    parts = [
        f"{_listed(who)} {'is' if len(who) == 1 else 'are'} {text}"
        for word, text in WORDS.items()
        if (who := words[word])
    ]
    text = f"against the serving set, {'; '.join(parts)}"
    if not white["value"]:
        return (
            "white-box attacks on the serving set break nothing, so the effect of a theft cannot be measured; "
            f"{text}"
        )
    if one is not None and one["value"] >= NOTHING * white["value"] and by["A1"]["word"] == "untouched":
        return (
            f"no protection: an attack on one stolen set breaks {100 * one['value']:.1f} %, an attack on the "
            f"serving set {100 * white['value']:.1f} %; {text}"
        )
    return text


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
