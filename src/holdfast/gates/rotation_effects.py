"""Describes the effect of a rotation on each attacker: stopped, slowed, unclear, or not affected.

The success of an attacker is compared with that of its own attacks when it has the serving set. It is not compared with
that of a suite, because a suite counts the examples that any of its attacks breaks, and the table only those of the
best attack of each attacker.
"""

from collections.abc import Mapping, Sequence
from typing import Any

AS_A0, LITTLE, HALF, NOTHING = 1.2, 0.05, 0.5, 0.8
"""Limits of the effects. Slowed: with confidence, the success is at most `HALF` of that of the white-box attack.
Stopped: slowed, and with confidence at most `AS_A0` times the success of A0; or with confidence at most `LITTLE`.
Unclear: the interval contains half of the white-box success. A0 and A5 are not affected by swaps. If A1 achieves
`NOTHING` of the white-box success or more, rotation does not protect from thefts."""
EFFECTS = {
    "stopped": "stopped",
    "slowed": "slowed",
    "unclear": "unclear because there are too few inputs",
    "not affected": "not affected",
}
Json = dict[str, Any]


def with_effects(rows: Sequence[Mapping[str, Any]], white_box: Mapping[str, Any] | None = None) -> list[Json]:
    """Add the effect of the rotation, such as stopped or slowed, to the measured success rate of each attacker.

    `white_box` is the success of an attacker's attacks with the serving set; if it is None, that of A5 is used.
    """
    shares = {row["attacker"]: row["share"] for row in rows}
    white, none = (white_box or shares["A5"])["value"], shares["A0"]["value"]
    return [{**row, "effect": _effect(row["attacker"], row["share"], white, none)} for row in rows]


def _effect(attacker: str, share: Mapping[str, Any] | None, white: float, none: float) -> str:
    if share is None:
        return "not measured"
    if attacker in ("A0", "A5"):
        return "not affected"
    half = share["high"] <= HALF * white
    if share["high"] <= LITTLE or (half and share["high"] <= AS_A0 * none):
        return "stopped"
    if half:
        return "slowed"
    return "unclear" if share["low"] <= HALF * white else "not affected"


def protection_verdict(rows: Sequence[Mapping[str, Any]], white_box: Mapping[str, Any] | None = None) -> str:
    """Return one or two sentences that state how well the rotation protects against each attacker."""
    by = {row["attacker"]: row for row in rows}
    stolen_share, white = by["A1"]["share"], white_box or by["A5"]["share"]
    by_effect = {effect: [row["attacker"] for row in rows if row["effect"] == effect] for effect in EFFECTS}
    parts = [
        f"{_listed(attackers)} {'is' if len(attackers) == 1 else 'are'} {text}"
        for effect, text in EFFECTS.items()
        if (attackers := by_effect[effect])
    ]
    text = f"against the serving set, {'; '.join(parts)}"
    if not white["value"]:
        return (
            "white-box attacks on the serving set break nothing, so the effect of a theft cannot be measured; "
            f"{text}"
        )
    if (
        stolen_share is not None
        and stolen_share["value"] >= NOTHING * white["value"]
        and by["A1"]["effect"] == "not affected"
    ):
        return (
            f"no protection: an attack on one stolen set breaks {100 * stolen_share['value']:.1f} %, an attack on the "
            f"serving set {100 * white['value']:.1f} %; {text}"
        )
    return text


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
