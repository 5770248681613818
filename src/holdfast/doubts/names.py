"""Names of the doubts, which the option `--accept-doubt NAME="why"` accepts.

The module does not import torch, so that a misspelled name is reported quickly.
"""

from typing import Final

DOUBTS: Final[dict[str, str]] = {
    "zero-gradient": "the gradient of the margin is zero or NaN",
    "probabilities": "the model returns probabilities instead of logits",
    "scale": "the same attack breaks more when the logits are scaled down",
    "one-step": "one gradient step breaks more than twenty",
    "black-box": "search without gradients breaks more than gradients do",
    "noise": "random inputs break examples that survived the suite",
    "not-exhausted": "a fresh pass of the suite, or a probe, breaks examples that survived the suite",
    "transfer": "examples computed on another model break more",
    "whole-box": "examples survive although every legal input is allowed",
    "randomness": "the outputs differ from call to call",
    "state": "the outputs depend on the order, the batch, the history or the mode of the layers",
    "loss-spread": "the choice of the loss decides how many examples break",
    "shattered": "the gradient does not predict what a small step does",
    "nan": "the model returned NaN",
    "chance": "the model is no better than one that always predicts the majority class",
    "constant": "the outputs do not depend on the input",
    "input": "the value range, the scale, the layout or the labels of the data do not fit the model",
}
"""condition under which each doubt is raised, by name of the doubt"""

MEANINGLESS: Final = ("constant", "input", "chance")
"""doubts under which the robust accuracy is meaningless for the model, the most informative one first"""

NEEDS_SURROGATE: Final = ("transfer",)
"""doubts that are measured only with a surrogate of the attacker"""

OF_STRENGTH: Final = (
    "zero-gradient",
    "probabilities",
    "scale",
    "one-step",
    "black-box",
    "noise",
    "not-exhausted",
    "transfer",
    "whole-box",
    "randomness",
    "loss-spread",
    "shattered",
)
"""doubts that imply that stronger attacks would break more: the true robust accuracy may be lower, but not higher"""

OF_ADMISSION: Final[dict[str, str]] = {
    "odd-gradients": (
        "a set breaks more easily than the serving set, and examples from sets of the same draw break it three "
        "times as often as examples from stolen sets"
    ),
}
"""condition under which each doubt is raised that only the admission of a set to a rotation can raise"""

OF_ROTATION: Final[dict[str, str]] = {
    "fine-tuning": "the parameter sets of the rotation were not trained against attacks",
}
"""condition under which each doubt is raised that only a model with rotation can raise, from its table of attackers"""

FREE: Final = ("zero-gradient", "probabilities", "state", "nan", "chance", "constant", "input")
"""doubts that cost at most a few forward passes in addition to the attacks; a list of attacks raises only these"""
