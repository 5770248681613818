"""The doubt `state` is raised if outputs depend on the order, the batch or earlier calls, or layers were in training
mode.
"""

from holdfast.core.evidence import Doubt
from holdfast.doubts.protocol import CHANGE, Case, DoubtTest, largest
from holdfast.doubts.randomness import STEADINESS


def conclude(case: Case) -> Doubt:
    """Return the doubt from the mode of the layers, and from calls in another order, batch and history."""
    training = case.context.in_training
    listed = ", ".join(training[:3]) + (" …" if len(training) > 3 else "")
    modes = (
        f"layers were in training mode ({listed}), but measured in evaluation mode: call model.eval() before the "
        "model is passed, or in its factory"
        if training
        else ""
    )
    if STEADINESS.name not in case.results:
        text = modes or "no layer was in training mode; order, batch and history were not tested"
        return case.judged(float(len(training)), 0.0, len(case.columns["id"]), text)
    repeated = case.results[STEADINESS.name].columns
    # for a randomised model, only calls with the same seed can show a dependence on the history
    random = largest(repeated["repeat"]) > CHANGE
    changes = {
        kind: largest(repeated[kind]) for kind in (("history",) if random else ("order", "batch", "history"))
    }
    worst = max(changes, key=lambda kind: changes[kind])
    text = f"the logits do not depend on {', '.join(changes)}"
    if changes[worst] > 0:
        text = f"of {', '.join(changes)} the {worst} changes the logits most, by {changes[worst]:.1g} of the largest"
    text = f"{modes}; {text}" if modes else text
    raised = bool(training) or changes[worst] > CHANGE
    return Doubt(
        case.name, "raised" if raised else "clear", changes[worst], CHANGE, len(repeated["repeat"]), text
    )


TEST = DoubtTest(
    title="The output depends on more than the input",
    meaning="The order, the batch or earlier calls change the outputs, or modules are in training mode.",
    advice="If modules are in training mode, call model.eval() before the model is passed, or in its factory. "
    "Otherwise evaluate without state that is kept between calls.",
    conclude=conclude,
    probes=(STEADINESS,),
    thresholds=(0.0, CHANGE),
    free=True,
    served_probe=STEADINESS.name,
)
