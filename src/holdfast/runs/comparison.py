"""Two runs of the same examples: what changed, paired by the digest of each example."""

from dataclasses import dataclass

from holdfast.core.estimate import Estimate
from holdfast.metrics.paired import clean_accuracy_drop, compared, pairs, regression
from holdfast.ops.statistics import McNemar
from holdfast.runs.result import Result


@dataclass(frozen=True)
class Comparison:
    """The second run against the first."""

    first: Result
    second: Result
    n: int
    """examples that both runs hold"""
    regression: Estimate
    """robust accuracy that the second has less than the first; negative is better"""
    clean_accuracy_drop: Estimate
    """clean accuracy that the second has less than the first"""
    test: McNemar
    """exact test of who still stands: `only_first` stand in the first run alone, `only_second` in the second"""
    differing: tuple[str, ...]
    """what else differs between the two, so that not all of the change is the model's"""


def compare(first: Result, second: Result) -> Comparison:
    """What the second run has more or less than the first. `UsageError` if they share no example."""
    after, before = second.evidence, first.evidence
    asked = {
        "threat": before.threat != after.threat,
        "suite": (before.suite, [a.settings for a in before.attacks])
        != (after.suite, [a.settings for a in after.attacks]),
        "seed": before.seed != after.seed,
        "data": before.data.get("digest") != after.data.get("digest"),
    }
    return Comparison(
        first,
        second,
        len(pairs(before, after)),
        regression(after, before),
        clean_accuracy_drop(after, before),
        compared(after, before),
        tuple(name for name, differs in asked.items() if differs),
    )
