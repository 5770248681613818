"""Computes how many held-out examples the accuracy gates of an admission need, and widens their tolerances if there are
fewer.

A gate passes if the upper end of a confidence interval is within its tolerance. A set that is as good as its reference
still differs from it on a fraction d of the examples, half of them lost and half gained; on n examples, the difference
of the accuracies has a standard error of sqrt(d / n). Such a set passes with probability `POWER` if the tolerance is at
least (z_confidence + z_power) sqrt(d / n), as in a non-inferiority trial on paired proportions (Liu et al., Statistics
in Medicine 21, 2002). With fewer examples nearly every set stays unclear and is refused.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

from holdfast.core.types import Mask
from holdfast.rotation.steps.rotation_request import EVERY, FIRST, MOST
from holdfast.rotation.steps.set_measuring import judged_ranges
from holdfast.statistics.intervals import bonferroni, normal_quantile

Gate = Literal["clean accuracy", "robust accuracy"]
CONFIDENCE = 0.95
"""Joint confidence of the intervals of a gate over all times that it is judged."""
POWER = 0.8
"""Probability that a set that is as good as its reference passes a gate."""
LEAST: Mapping[Gate, float] = {"clean accuracy": 0.01, "robust accuracy": 0.02}
"""Largest loss of accuracy that each gate tolerates if enough examples are held out, as a fraction."""
PLANNED: Mapping[Gate, float] = {"clean accuracy": 0.03, "robust accuracy": 0.1}
"""Expected fraction of examples on which only one of two models trained by the same recipe is correct.

These values are used before any training; an admission measures the actual ones.
"""
MEASURED_LATER = (
    "On how many examples equal sets differ is measured in the admission, and the gates may then need more"
)
"""Reason why a number that was computed before any training may be too small."""
_PART: Mapping[Gate, int] = {
    "clean accuracy": 1,
    "robust accuracy": 2,
}  # the divisors of the first number of examples in an admission


@dataclass(frozen=True)
class NeededExamples:
    """Number of examples that one gate of an admission needs, and its tolerance with the available examples."""

    gate: Gate
    changed: float
    """fraction of examples on which exactly one of two equally good sets is correct"""
    n_held_out: int
    """number of held-out examples"""
    looks: int
    """largest number of times that the gate is judged, with more examples each time"""

    @property
    def least(self) -> float:
        """Accuracy that a set may lose at this gate, as a fraction, if enough examples are held out."""
        return LEAST[self.gate]

    @property
    def needed(self) -> int:
        """Number of examples with which a set as good as its reference passes the gate at the smallest tolerance with
        high probability.
        """
        return math.ceil(self.changed * (_reach(self.looks) / self.least) ** 2)

    @property
    def tolerance(self) -> float:
        """Accuracy that a set may lose at this gate, as a fraction. It is larger than the smallest tolerance if there
        are too few examples.
        """
        return max(self.least, _reach(self.looks) * math.sqrt(self.changed / max(self.n_held_out, 1)))

    @property
    def widened(self) -> bool:
        """Whether the tolerance of the gate is widened, because there are fewer examples than needed."""
        return self.tolerance > self.least

    @property
    def description(self) -> str:
        """The gate, its tolerance and its number of needed examples as text."""
        text = f"{self.gate} within {tolerance_text(self.least)} needs {self.needed:,} examples"
        return f"{text}, so it allows {tolerance_text(self.tolerance)}" if self.widened else text


def looks(n_held_out: int, judged: int, gate: Gate) -> int:
    """Return the largest number of times that a gate is judged for one parameter set, each time on more held-out
    examples.

    `n_held_out` is the number of held-out examples, and `judged` the number on which a set is judged first.
    """
    return len(judged_ranges(n_held_out, max(judged // _PART[gate], 1)))


def slack(changed: float, n: int, looks: int) -> float:
    """Return by how much the fraction of changed predictions of a set may exceed its expected value by chance, if the
    set is as good as its reference.

    `n` is the number of examples.
    """
    return _reach(looks) * math.sqrt(changed * (1 - changed) / max(n, 1))


def _reach(looks: int) -> float:
    """Number of standard errors in the tolerance that an equal set passes with probability `POWER`."""
    return normal_quantile((1 + bonferroni(CONFIDENCE, looks)) / 2) + normal_quantile(POWER)


def planned_needs(n_held_out: int, judged: int = FIRST) -> tuple[NeededExamples, ...]:
    """Estimate before any training how many held-out examples each accuracy gate of an admission needs."""
    return tuple(
        NeededExamples(gate, share, n_held_out, looks(n_held_out, judged, gate))
        for gate, share in PLANNED.items()
    )


def measured_needs(
    clean: Sequence[Mask], white: Sequence[Mask], n_held_out: int, judged: int
) -> tuple[NeededExamples, ...]:
    """Compute how many held-out examples each accuracy gate of an admission needs, from the examples that similar sets
    classify correctly.

    `clean` contains the mask (n) of each set on clean inputs, and `white` the mask (n) under white-box attacks.
    """
    shares: Mapping[Gate, float] = {"clean accuracy": changed(clean), "robust accuracy": changed(white)}
    return tuple(
        NeededExamples(gate, share, n_held_out, looks(n_held_out, judged, gate))
        for gate, share in shares.items()
    )


def changed(right: Sequence[Mask]) -> float:
    """Return the fraction of examples on which exactly one of two parameter sets is correct, averaged over all pairs.
    It is 0 for fewer than two sets.
    """
    pairs = [
        float((first_mask != second_mask).double().mean())
        for first_mask, second_mask in combinations(right, 2)
    ]
    return sum(pairs) / len(pairs) if pairs else 0.0


def sufficient(needs: Sequence[NeededExamples], judged: int) -> int:
    """Return the smallest number of held-out examples with which no gate is widened.

    With more examples a gate may be judged more often, and then needs more of them.
    """
    n = 0
    while (more := max(replace(need, looks=looks(n, judged, need.gate)).needed for need in needs)) > n:
        n = more
    return n


def statement(needs: Sequence[NeededExamples], judged: int, *, planned: bool) -> str:
    """Return a message with the number of held-out examples that the gates need, the available number, and by how much
    a shortage widens the tolerances of the gates.
    """
    need, n_held_out, about = sufficient(needs, judged), needs[0].n_held_out, "at least " if planned else ""
    details = "; ".join(
        f"{need_of_gate.description}, since equal sets differ on {about}{100 * need_of_gate.changed:.1f} % of them"
        for need_of_gate in needs
    )
    text = f"the gates need {about}{need:,} held-out examples, and there are {n_held_out:,} ({details})"
    if planned:
        text += f". {MEASURED_LATER}"
    if n_held_out >= need:
        return text
    remedy = f"with {about}{EVERY * need:,} training examples, of which one in {EVERY} is held out, they would not be"
    return f"{text}. Tolerances are widened; {remedy if need <= MOST else f'at most {MOST:,} are held out'}"


def widened(needs: Iterable[NeededExamples]) -> list[str]:
    """Return a list with a note on widened tolerances of the gates. It is empty if enough examples are held out."""
    texts = [f"{need.gate} to {tolerance_text(need.tolerance)}" for need in needs if need.widened]
    return [f"tolerances were widened: {', '.join(texts)}"] if texts else []


def tolerance_text(share: float) -> str:
    """Return a tolerance, which is given as a fraction, as text in percentage points."""
    number = f"{100 * share:.2g}"
    return f"{number} point" if number == "1" else f"{number} points"
