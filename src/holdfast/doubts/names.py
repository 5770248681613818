"""The names of the doubts for `--accept-doubt NAME="why"`. Does not import torch, so a misspelled name fails fast."""

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
"""Name of every doubt, and when it is raised."""

MEANINGLESS: Final = ("constant", "input", "chance")
"""Doubts under which the robust accuracy says nothing about the model, the most informative first."""

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
"""Doubts that imply that stronger attacks would break more: the true robust accuracy may be lower, but not higher."""

OF_ADMISSION: Final[dict[str, str]] = {
    "odd-gradients": (
        "a set breaks more easily than the serving set, and examples from sets of the same draw break it three "
        "times as often as examples from stolen sets"
    ),
}
"""Name of every doubt that only the admission of a set to a rotation raises, and when it is raised."""

OF_ROTATION: Final[dict[str, str]] = {
    "fine-tuning": "the parameter sets of the rotation were not trained against attacks",
}
"""Name of every doubt that only a model with rotation raises, by its table of attackers, and when it is raised."""

FREE: Final = ("zero-gradient", "probabilities", "state", "nan", "chance", "constant", "input")
"""The doubts that cost at most a few forward passes more than the attacks. A list of attacks raises only these."""
