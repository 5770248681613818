"""The doubt `zero-gradient` is raised if the gradient of the margin is zero or not a number at the input and at a
random point near it, or the gradient of a detector's score is so everywhere.
"""

from holdfast.core.evidence import Doubt
from holdfast.doubts.protocol import Case, DoubtTest
from holdfast.doubts.short_attacks import GRADIENTS

ZERO_GRADIENTS = 0.01
"""fraction of examples without a gradient of the margin above which the doubt is raised; a ReLU network may have no
gradient at one point, but rarely at two"""


def conclude(case: Case) -> Doubt:
    """Return the doubt from the gradients of the probe, or from the first gradient of each attack."""
    first_dead = case.context.first_gradient_dead
    if GRADIENTS.name in case.results:
        columns = case.results[GRADIENTS.name].columns
        dead, flat = columns["dead"], columns["flat"]
        text = (
            "the gradient of the margin is zero or NaN, both at the clean input and at a random point, for "
            f"{int(dead.sum())} of {len(dead)} examples"
        )
        if flat.any():
            text += f"; only that of the cross-entropy is for {int(flat.sum())} more, because of saturation"
    elif first_dead is not None and len(first_dead):
        dead = first_dead
        text = (
            f"the first gradient of the attack is zero or NaN for {int(dead.sum())} of {len(dead)} examples"
        )
    else:
        return case.absent(GRADIENTS)
    if case.context.blind:
        text += (
            "; no gradient of the detector's score reaches any input, so attacks cannot evade it by gradients"
        )
        return Doubt(case.name, "raised", 1.0, ZERO_GRADIENTS, len(dead), text)
    return case.judged(float(dead.double().mean()), ZERO_GRADIENTS, len(dead), text)


TEST = DoubtTest(
    title="Gradients vanish",
    meaning="Attacks follow the gradient of the model. Where it is zero or NaN they do not move, and the model "
    "appears more robust than it is.",
    advice="Remove torch.no_grad(), torch.inference_mode(), detach() and numpy from the model, or use --suite "
    "black-box. If a part of the model has no gradient by design, add --adaptive, which replaces the gradient "
    "of that part (BPDA) and also searches without gradients. If the part changes the shape, declare a "
    "differentiable replacement with holdfast.through.",
    advice_for_probabilities="Return the logit, the output of the layer before the sigmoid or softmax, and declare "
    "--model-output logit: where a probability saturates at 0 or 1, its gradient is zero.",
    conclude=conclude,
    probes=(GRADIENTS,),
    thresholds=(ZERO_GRADIENTS,),
    free=True,
    of_strength=True,
    answered_by=("bypass", "search"),
    unanswered_if="dead",
)
