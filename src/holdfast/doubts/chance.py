"""The doubt `chance` is raised if the upper end of the interval of clean accuracy does not exceed the share of the
majority class; or the lower end does not, if the accuracy is at most 1.5 times that of guessing (with 20 examples or
more).
"""

import torch

from holdfast.core.evidence import Doubt
from holdfast.doubts.protocol import Case, DoubtTest, percent, share
from holdfast.metrics.shares import absent_classes, listed_classes
from holdfast.statistics.intervals import against_majority


def conclude(case: Case) -> Doubt:
    """Return the doubt from the clean accuracy and the share of the majority class."""
    correct, y = case.columns["correct"], case.columns["y"]
    if len(torch.unique(y)) < 2:
        return case.inapplicable(
            "all examples have the same label, so that any accuracy may be that of a constant prediction"
        )
    result = against_majority(correct, y, case.context.classes)
    absent = absent_classes(y, case.context.classes)
    among = f" among all classes, of which {listed_classes(absent)} have no examples" if absent else ""
    text = (
        f"clean accuracy is {share(correct)} (95 % interval {percent(result.low)} to {percent(result.high)}), and "
        f"always predicting the majority class is right for {percent(result.majority)}{among}"
    )
    return Doubt(
        case.name, "raised" if result.at_chance else "clear", result.high, result.majority, len(y), text
    )


TEST = DoubtTest(
    title="The model is no better than chance",
    meaning="The clean accuracy may be that of always predicting the majority class. The robust accuracy of such a "
    "model is not meaningful.",
    advice="Run holdfast doctor, which tests for a missing normalisation, another value range, another layout and "
    "shifted labels. A network whose outputs are no scores of classes, such as a regression, is no classifier.",
    conclude=conclude,
    free=True,
    meaningless=3,
)
