"""How many held-out examples the gates on accuracy need, and what they tolerate where fewer are held out.

A gate passes where the upper end of an interval lies within its tolerance. A set that is as good as what it is compared
with still differs from it on a share d of the examples, some lost and as many gained; on n examples the difference of
both accuracies has a standard error of sqrt(d / n). That set passes with probability `POWER` where the tolerance is at
least (z_confidence + z_power) sqrt(d / n), as in a non-inferiority trial on paired shares (Liu et al., Statistics in
Medicine 21, 2002). With fewer examples nearly every set stays unclear and is refused.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from holdfast.core.types import Mask
from holdfast.ops.statistics import bonferroni, normal_quantile
from holdfast.runs.rotate.measuring import ends
from holdfast.runs.rotate.terms import EVERY, FIRST, MOST

Gate = Literal["clean accuracy", "robust accuracy"]
CONFIDENCE = 0.95
"""Of every gate: its intervals hold together with it, however often examples are added before they decide."""
POWER = 0.8
"""Probability with which a set that is equal passes a gate."""
LEAST: Mapping[Gate, float] = {"clean accuracy": 0.01, "robust accuracy": 0.02}
"""Points of accuracy that may be lost, clean and under attack, where enough examples are held out."""
PLANNED: Mapping[Gate, float] = {"clean accuracy": 0.03, "robust accuracy": 0.1}
"""Shares of examples on which two trainings of one recipe are expected to differ, before any was made; the admission
measures them."""
_PART: Mapping[Gate, int] = {
    "clean accuracy": 1,
    "robust accuracy": 2,
}  # as admission shares out what judges at first


@dataclass(frozen=True)
class Need:
    """What one gate needs, and what it tolerates on the examples that there are."""

    gate: Gate
    changed: float
    """share of examples on which equal sets differ in being right"""
    held: int
    """examples that are held out"""
    looks: int
    """how often the gate is judged at most, with more examples each time"""

    @property
    def least(self) -> float:
        """The tolerance where enough examples are held out, as a share."""
        return LEAST[self.gate]

    @property
    def needed(self) -> int:
        """Examples on which an equal set passes within the least tolerance."""
        return math.ceil(self.changed * (_reach(self.looks) / self.least) ** 2)

    @property
    def tolerance(self) -> float:
        """What may be lost, as a share: the least, or as much as an equal set needs on so few examples."""
        return max(self.least, _reach(self.looks) * math.sqrt(self.changed / max(self.held, 1)))

    @property
    def widened(self) -> bool:
        """Whether fewer examples are held out than are needed."""
        return self.tolerance > self.least

    @property
    def says(self) -> str:
        """The gate, its tolerance, and what it needs."""
        said = f"{self.gate} within {points(self.least)} needs {self.needed:,} examples"
        return f"{said}, so it tolerates {points(self.tolerance)}" if self.widened else said


def looks(held: int, judged: int, gate: Gate) -> int:
    """How often a gate is judged at most, of so many held-out examples, `judged` of which judge at first."""
    return len(ends(held, max(judged // _PART[gate], 1)))


def slack(changed: float, held: int, looks: int) -> float:
    """By how much the share of changed predictions of an equal set may exceed its mean, on so many examples."""
    return _reach(looks) * math.sqrt(changed * (1 - changed) / max(held, 1))


def _reach(looks: int) -> float:
    """Standard errors between the difference of an equal set and the tolerance that it passes."""
    return normal_quantile((1 + bonferroni(CONFIDENCE, looks)) / 2) + normal_quantile(POWER)


def planned(held: int, judged: int = FIRST) -> tuple[Need, ...]:
    """The needs before anything is trained."""
    return tuple(Need(gate, share, held, looks(held, judged, gate)) for gate, share in PLANNED.items())


def measured(clean: Sequence[Mask], white: Sequence[Mask], held: int, judged: int) -> tuple[Need, ...]:
    """The needs by how much sets differ that are alike: which examples (n) each has right, clean and under attack."""
    shares: Mapping[Gate, float] = {"clean accuracy": changed(clean), "robust accuracy": changed(white)}
    return tuple(Need(gate, share, held, looks(held, judged, gate)) for gate, share in shares.items())


def changed(right: Sequence[Mask]) -> float:
    """Mean share of examples on which two of several sets differ in being right; 0 of fewer than two."""
    pairs = [float((one != other).double().mean()) for one, other in combinations(right, 2)]
    return sum(pairs) / len(pairs) if pairs else 0.0


def statement(needs: Sequence[Need], *, planned: bool) -> str:
    """How many examples the gates need, how many there are, and what follows from that."""
    need, held, about = max(one.needed for one in needs), needs[0].held, "about " if planned else ""
    each = "; ".join(
        f"{one.says}, where equal sets differ on {about}{100 * one.changed:.1f} % of them" for one in needs
    )
    said = f"the gates need {about}{need:,} held-out examples, and {held:,} are held out ({each})"
    if held >= need:
        return said
    remedy = f"{EVERY * need:,} training examples, of which one in {EVERY} is held out, would do without"
    return f"{said}. Tolerances are widened; {remedy if need <= MOST else f'at most {MOST:,} are held out'}"


def widened(needs: Iterable[Need]) -> list[str]:
    """What is tolerated beyond the usual, in words; empty where enough examples are held out."""
    wide = [f"{one.gate} to {points(one.tolerance)}" for one in needs if one.widened]
    return [f"tolerances were widened: {', '.join(wide)}"] if wide else []


def points(share: float) -> str:
    """A tolerance in points."""
    number = f"{100 * share:.2g}"
    return f"{number} point" if number == "1" else f"{number} points"
