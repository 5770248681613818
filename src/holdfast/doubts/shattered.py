"""The doubt `shattered` is raised if the gradient does not predict the effect of a small step."""

from holdfast.core.evidence import Doubt, DoubtState
from holdfast.doubts.protocol import Case, DoubtTest
from holdfast.doubts.short_attacks import GRADIENTS

SLOPE_RATIO = (0.5, 2.0)
"""interval in which the median ratio of measured to predicted change must be"""


def conclude(case: Case) -> Doubt:
    """Return the doubt from the ratio of measured to predicted change along the gradient."""
    if case.context.task not in (None, "regression"):
        message = "attacks follow the gradient of another loss than the score of the task"
        return Doubt(case.name, "not applicable", message=message)
    if GRADIENTS.name not in case.results or case.context.threat.constraint.eps == 0:
        return case.absent(GRADIENTS)
    ratios = case.results[GRADIENTS.name].columns["ratio"].double()
    resolved = ratios[~ratios.isnan()]
    if not len(resolved):
        return Doubt(case.name, "not measured", message="no gradient is large enough for a measurement")
    ratio, (low, high) = float(resolved.median()), SLOPE_RATIO
    text = f"along the gradient the margin changes by {ratio:.2g} times the predicted amount (median)"
    state: DoubtState = "clear" if low <= ratio <= high else "raised"
    return Doubt(case.name, state, ratio, low if ratio < 1 else high, len(resolved), text)


TEST = DoubtTest(
    title="The gradient does not predict the output",
    meaning="A small step along the gradient changes the output by much more or much less than the gradient predicts.",
    advice="Add --adaptive, which replaces the gradient of the part that shatters it and also searches without "
    "gradients.",
    conclude=conclude,
    probes=(GRADIENTS,),
    thresholds=SLOPE_RATIO,
    of_strength=True,
    answered_by=("bypass", "search"),
    unanswered_if="not bypassed",
)
