"""The verdict on a training: whether the new model is better than the given one by the metric of the recipe."""

from dataclasses import dataclass
from typing import Literal

from holdfast.core.errors import UsageError
from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Evidence
from holdfast.core.goal import Goal
from holdfast.metrics.paired import LOSSES, change, improvement

TrainingVerdict = Literal["improved", "no difference shown", "worse"]


@dataclass(frozen=True)
class Before:
    """The measurement of the given model of a training, and the goal of the recipe."""

    evidence: Evidence
    goal: Goal

    def improvement(self, after: Evidence) -> Estimate:
        """Return the change from the given model to the new one on the same examples, positive if it is better."""
        return improvement(self.goal, change(self.goal.metric, after, self.evidence))


def training_verdict(improvement: Estimate) -> TrainingVerdict:
    """Return the verdict on a training by the interval of the improvement.

    >>> training_verdict(Estimate(0.2, 0.1, 0.3, 100)), training_verdict(Estimate(0.2, -0.1, 0.5, 10))
    ('improved', 'no difference shown')
    """
    if improvement.low > 0:
        return "improved"
    return "worse" if improvement.high < 0 else "no difference shown"


def refuse_goal(recipe: str, goal: Goal) -> None:
    """Raise `UsageError` if the metric that a recipe declares is not known as a difference between two runs."""
    if goal.metric not in LOSSES:
        raise UsageError(
            f"recipe {recipe} declares the goal {goal.metric!r}, whose difference between two models is not known; "
            f"one of {', '.join(LOSSES)} was expected"
        )
