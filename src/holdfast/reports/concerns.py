"""The meaning of each doubt and advice, in plain words."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Concern:
    """A doubt with its meaning and advice."""

    title: str
    meaning: str
    advice: str


CONCERNS = {
    "zero-gradient": Concern(
        "Gradients vanish",
        "The attacks follow the model's gradient; where it is zero or not a number they stand still, and the model "
        "looks stronger than it is.",
        "Take torch.no_grad(), torch.inference_mode(), detach() and numpy out of the model, or use --suite black-box. "
        "Where the gradient is lost on purpose, add --adaptive, which attacks round the part that swallows it (BPDA) "
        "and by search; declare a stand-in for that part with holdfast.through where it changes the shape.",
    ),
    "probabilities": Concern(
        "The model returns probabilities",
        "Rows that sum to one have been through a softmax; its flat ends hide the gradient from every loss.",
        "Return the logits: take the softmax (or sigmoid) off the end of the model.",
    ),
    "scale": Concern(
        "Large logits hide the gradient",
        "The same model with its logits scaled down is broken more often, so saturation was holding the attacks back.",
        "Read the smaller number, or evaluate the model with its logits divided by the temperature it was trained at.",
    ),
    "one-step": Concern(
        "One step beats many",
        "A single gradient step finds more than twenty smaller ones, which only happens where the surface misleads "
        "local search: gradient masking.",
        "Add restarts and gradient-free attacks; do not trust a number that one step improves upon.",
    ),
    "black-box": Concern(
        "Blind search beats gradients",
        "An attack that never sees a gradient breaks more than one that does, so the gradients are not telling the "
        "truth.",
        "Add --adaptive, and look for the part of the model that masks gradients.",
    ),
    "noise": Concern(
        "Random noise breaks what attacks did not",
        "Plain random draws inside the allowed change break examples that survived the suite.",
        "The suite is not finished: add attacks, steps or restarts.",
    ),
    "not-exhausted": Concern(
        "The suite still finds more",
        "A fresh pass over the surviving examples closest to the boundary breaks some of them, so another run would "
        "report a lower number.",
        "Run a stronger suite or more restarts before quoting the number.",
    ),
    "transfer": Concern(
        "Attacks made elsewhere work better",
        "Examples made on another model break this one more often than attacks made on it directly.",
        "Attack through the surrogate, and find out what hides this model's own gradient.",
    ),
    "whole-box": Concern(
        "Unlimited change does not break it",
        "Allowed to change anything at all, an attack should succeed always; here it does not, so it is the attack "
        "that fails.",
        "Check that the input really reaches the model, and that gradients flow all the way back.",
    ),
    "randomness": Concern(
        "The answer changes between calls",
        "The same input gets different outputs, so one lucky draw counts as robustness.",
        "Use --adaptive or suite rand, which average over draws, or switch the randomness off.",
    ),
    "state": Concern(
        "The answer depends on more than the input",
        "Order, batch or history changes the outputs, or modules are in training mode.",
        "Call model.eval(), and evaluate without state that is carried from call to call.",
    ),
    "loss-spread": Concern(
        "The loss decides the result",
        "Attacks that differ only in their loss disagree by more than they should; at least one of them is being "
        "misled.",
        "Read the worst of them, and add the losses that did best to the suite.",
    ),
    "shattered": Concern(
        "The gradient predicts nothing",
        "Moving a little along the gradient changes the output by much more or much less than the gradient says.",
        "Add --adaptive, which goes round the part that shatters the gradient and searches without it.",
    ),
    "chance": Concern(
        "The model is no better than chance",
        "The accuracy without any attack may be that of always predicting the majority class. The robust accuracy of "
        "such a model says nothing about its robustness.",
        "Run holdfast doctor, which looks for a missing normalisation, another value range, another layout and shifted "
        "labels.",
    ),
    "constant": Concern(
        "The outputs do not depend on the input",
        "Every example gets the same output, so no attack can change a prediction, and none can be resisted.",
        "Check the weights and the preprocessing: a wrong value range can switch off every unit of the first layers.",
    ),
    "input": Concern(
        "The data do not fit the model",
        "The model is right far more often when the same data are given with another value range, normalisation or "
        "layout or with 1 subtracted from the labels, or the data fill only a small part of the declared bounds. What "
        "was attacked is another task.",
        "Declare the preprocessing of your training: --mean and --std, --data-normalised, --bounds or --layout. Labels "
        "count from 0.",
    ),
    "fine-tuning": Concern(
        "Adversarial fine-tuning for the same time does more",
        "The parameter sets that take turns were never trained against attacks, and rotation does nothing against who "
        "holds the one that serves.",
        "Harden the model first (holdfast harden), and collect the pool from what that writes.",
    ),
    "nan": Concern(
        "Some outputs are not a number",
        "An output that is not a number counts as broken; it usually means an overflow in the model.",
        "Find the inputs that cause it: they are marked in the evidence.",
    ),
}


_SATURATED = (
    "Return the logit, the output of the layer before the sigmoid or softmax, and declare --model-output logit: where "
    "a probability is saturated at 0 or 1, its gradient is zero."
)
"""The advice for `zero-gradient` if the model is declared to return probabilities."""


def concern(name: str, output: str | None = None) -> Concern:
    """The explanation of a doubt for a model with the declared `output`; for a doubt of a plugin, only its name."""
    known = CONCERNS.get(name, Concern(name.replace("-", " ").capitalize(), "", ""))
    if name == "zero-gradient" and output == "probability":
        return replace(known, advice=_SATURATED)
    return known
