"""What the table of attackers says in words: who is stopped, who is slowed, whom rotation leaves as he was.

A thief is compared with what his own attacks do to the set that serves when he holds it, for a suite counts whatever
any of its attacks turns, and a thief the best one of his.
"""

from collections.abc import Mapping, Sequence
from typing import Any

AS_A0, LITTLE, HALF, NOTHING = 1.2, 0.05, 0.5, 0.8
"""Slowed is who surely gets at most half of the white box; stopped who of these surely gets at most 1.2 times what A0
does, or whoever surely gets at most 5 %. From 0.8 of the white box on rotation protects from no theft. Who stole
nothing and who holds what serves are none the worse for swapping. Where an interval leaves open whether it is half, it
is unclear."""
WORDS = {
    "stopped": "stopped",
    "slowed": "slowed",
    "unclear": "unclear on so few inputs",
    "untouched": "untouched",
}
Json = dict[str, Any]


def judged(rows: Sequence[Mapping[str, Any]], itself: Mapping[str, Any] | None = None) -> list[Json]:
    """The rows, each with its word; `itself` is what a thief's attacks do to the set that serves, else A5 stands in."""
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


def verdict(rows: Sequence[Mapping[str, Any]], itself: Mapping[str, Any] | None = None) -> str:
    """One or two sentences."""
    by = {row["who"]: row for row in rows}
    one, white = by["A1"]["share"], itself or by["A5"]["share"]
    words = {word: [row["who"] for row in rows if row["word"] == word] for word in WORDS}
    parts = [
        f"{_listed(who)} {'is' if len(who) == 1 else 'are'} {said}"
        for word, said in WORDS.items()
        if (who := words[word])
    ]
    text = f"against the set that serves, {'; '.join(parts)}"
    if not white["value"]:
        return f"attacks on the set that serves turn nothing, so that no theft can be told from none; {text}"
    if one is not None and one["value"] >= NOTHING * white["value"] and by["A1"]["word"] == "untouched":
        return (
            f"no protection: an attack on one stolen set turns {100 * one['value']:.1f} % where one on the set that "
            f"serves turns {100 * white['value']:.1f} %; {text}"
        )
    return text


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
