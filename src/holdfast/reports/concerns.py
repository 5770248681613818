"""Explanations of the doubts for readers of reports: the meaning of each doubt, and advice."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Concern:
    """Explanation of a doubt for readers of reports: a title, its meaning, and advice."""

    title: str
    meaning: str
    advice: str


CONCERNS = {
    "zero-gradient": Concern(
        "Gradients vanish",
        "Attacks follow the gradient of the model. Where it is zero or NaN they do not move, and the model "
        "appears more robust than it is.",
        "Remove torch.no_grad(), torch.inference_mode(), detach() and numpy from the model, or use --suite "
        "black-box. If a part of the model has no gradient by design, add --adaptive, which replaces the gradient "
        "of that part (BPDA) and also searches without gradients. If the part changes the shape, declare a "
        "differentiable replacement with holdfast.through.",
    ),
    "probabilities": Concern(
        "The model returns probabilities",
        "Outputs that sum to one come from a softmax. Where it saturates, the gradient of every loss is close to "
        "zero.",
        "Return the logits: remove the softmax (or sigmoid) at the end of the model.",
    ),
    "scale": Concern(
        "Large logits mask the gradient",
        "The same attack breaks more examples when the logits are scaled down, so saturation made the attacks "
        "weaker.",
        "Use the smaller robust accuracy, or evaluate the model with its logits divided by the temperature of its "
        "training.",
    ),
    "one-step": Concern(
        "One step breaks more than many",
        "A single gradient step breaks more examples than twenty smaller ones. This is a sign of gradient "
        "masking: local gradients point in wrong directions.",
        "Add restarts and gradient-free attacks. The measured robust accuracy is not reliable.",
    ),
    "black-box": Concern(
        "Search without gradients breaks more",
        "An attack without gradients breaks more examples than one with gradients, so the gradients are misleading.",
        "Add --adaptive, and look for the part of the model that masks gradients.",
    ),
    "noise": Concern(
        "Random noise breaks examples that attacks did not",
        "Random perturbations inside the threat model break examples that survived the suite.",
        "The suite is too weak: add attacks, steps or restarts.",
    ),
    "not-exhausted": Concern(
        "A fresh pass of the suite breaks more",
        "A fresh pass of the suite, or a probe, breaks some of the surviving examples, so another run would measure "
        "a lower robust accuracy.",
        "Use a stronger suite or more restarts before you report the robust accuracy.",
    ),
    "transfer": Concern(
        "Transferred examples break more",
        "Examples computed on another model break this one more often than examples computed on it directly.",
        "Use attacks on the surrogate, and find the part of this model that masks its gradient.",
    ),
    "whole-box": Concern(
        "Unlimited changes do not break the model",
        "With unlimited changes an attack should always succeed. Here it does not, so the attack does not work on "
        "this model.",
        "Check that the output depends on the input, and that gradients reach the input.",
    ),
    "randomness": Concern(
        "The output changes between calls",
        "The same input has different outputs, so an example can survive by chance.",
        "Use --adaptive or --suite rand, which average over draws, or disable the randomness.",
    ),
    "state": Concern(
        "The output depends on more than the input",
        "The order, the batch or earlier calls change the outputs, or modules are in training mode.",
        "If modules are in training mode, call model.eval() before the model is passed, or in its factory. Otherwise "
        "evaluate without state that is kept between calls.",
    ),
    "loss-spread": Concern(
        "The loss decides the result",
        "Attacks that differ only in their loss break very different numbers of examples. At least one loss has "
        "misleading gradients.",
        "Use the lowest robust accuracy, and add the losses that broke most to the suite.",
    ),
    "shattered": Concern(
        "The gradient does not predict the output",
        "A small step along the gradient changes the output by much more or much less than the gradient predicts.",
        "Add --adaptive, which replaces the gradient of the part that shatters it and also searches without "
        "gradients.",
    ),
    "chance": Concern(
        "The model is no better than chance",
        "The clean accuracy may be that of always predicting the majority class. The robust accuracy of such a "
        "model is not meaningful.",
        "Run holdfast doctor, which tests for a missing normalisation, another value range, another layout and "
        "shifted labels.",
    ),
    "constant": Concern(
        "The outputs do not depend on the input",
        "Every example has the same output, so no attack can change a prediction, and surviving an attack means "
        "nothing.",
        "Check the weights and the preprocessing: a wrong value range can make every unit of the first layers zero.",
    ),
    "input": Concern(
        "The data do not fit the model",
        "The accuracy is much higher with another value range, normalisation or layout of the same data, or with "
        "1 subtracted from the labels, or the data fill only a small part of the declared bounds. The attacks ran "
        "on a different task than that of the training.",
        "Declare the preprocessing of your training: --mean and --std, --data-normalised, --bounds or --layout. Labels "
        "count from 0.",
    ),
    "fine-tuning": Concern(
        "Adversarial fine-tuning for the same time does more",
        "The parameter sets were not trained against attacks, and rotation does not protect against an attacker "
        "who has the serving set.",
        "Harden the model first (holdfast harden), and collect the pool from the hardened model.",
    ),
    "nan": Concern(
        "Some outputs are not a number",
        "An example with a NaN output counts as broken. NaN usually means an overflow in the model.",
        "Find the inputs that cause NaN: they are marked in the evidence.",
    ),
}


_SATURATED = (
    "Return the logit, the output of the layer before the sigmoid or softmax, and declare --model-output logit: "
    "where a probability saturates at 0 or 1, its gradient is zero."
)
"""The advice for `zero-gradient` if the model is declared to return probabilities."""


def concern(name: str, output: str | None = None) -> Concern:
    """Return the explanation of a doubt, which may depend on whether the model returns logits or probabilities
    (`output`).

    For a doubt of a plugin, the explanation consists only of its name.
    """
    explanation = CONCERNS.get(name, Concern(name.replace("-", " ").capitalize(), "", ""))
    if name == "zero-gradient" and output == "probability":
        return replace(explanation, advice=_SATURATED)
    return explanation
