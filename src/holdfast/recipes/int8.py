"""A network of 8-bit integers: weights and inputs of its layers are rounded, and it is trained further with the
rounding.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018,
arXiv:1712.05877: rounding is part of each forward pass of the training, and its gradient is that of the identity.
Differs from the paper: the training is adversarial (Lin et al., "Defensive Quantization: When Efficiency Meets
Robustness", ICLR 2019, arXiv:1904.08444, find that rounding alone amplifies attacks), and the ranges of the inputs are
measured once, before it.
"""

from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from holdfast.core.batch import Batch
from holdfast.core.errors import TargetError
from holdfast.core.model import Classifier
from holdfast.core.types import Inputs, NonNegative, Positive, Steps
from holdfast.io.models.architectures import int8_layers, layers_of, packed, set_ranges, with_int8
from holdfast.recipes.training.compression import after_compression, bytes_of, compressed, uncompressed
from holdfast.recipes.training.fit import Training, Update
from holdfast.recipes.training.learner import Learner, Loop, adversarial_cross_entropy
from holdfast.recipes.training.recipe import Finished, LossRecipe

_MEASURED = 512
"""Number of training examples on which the ranges of the inputs of layers are measured."""


@dataclass(frozen=True)
class Int8(LossRecipe):
    """Rounds weights and inputs of linear and convolutional layers to 8 bits, and trains the network with the rounding
    on attacked inputs.
    """

    steps: Steps = 7
    """number of gradient steps of the inner attack"""
    reach: Positive = 2.5
    """path length of the inner attack, in multiples of eps"""
    clean: NonNegative = 0.0
    """weight of the loss on clean inputs, relative to that on attacked ones"""
    training: Training = field(
        default_factory=lambda: Training(epochs=1, lr=1e-4, weight_decay=0.0, warmup=0.0, averaging="none")
    )

    new_network: ClassVar[bool] = True

    def network(self, model: Classifier) -> Classifier:
        """Return the model with untrained layers of 8-bit integers."""
        return _rounded(model, trained=False)

    linear_in_labels: ClassVar[bool] = True
    weights_classes: ClassVar[bool] = True

    def prepared(self, loop: Loop) -> Loop:
        """Return the training of the rounded network, with the ranges of its layers on some training examples."""
        new, rng = _rounded(loop.model, trained=True), loop.rng.at("ranges")
        layers, chosen = int8_layers(new.net), rng.bits(loop.data.ids).argsort()[:_MEASURED]
        batch = loop.data.take(chosen.sort().values)
        inputs = batch.x, loop.threat.constraint.sample(batch, loop.model.bounds, rng)
        set_ranges(layers, deepcopy(loop.model).eval(), inputs)
        names = [f"net.{name}" if name else "net" for name in layers]
        published = partial(compressed, compress=lambda weights, _: packed(weights, names))
        return replace(loop, model=new, after=uncompressed(loop.after), published=published)

    def inner(self, learner: Learner, batch: Batch, update: Update) -> Inputs:
        """Return the attacked inputs of a batch, found by gradient ascent on the cross-entropy of the rounded
        network.
        """
        return learner.worst(batch, update.rng, steps=self.steps, reach=self.reach)

    def loss(self, learner: Learner, batch: Batch, x_adv: Inputs) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a batch and the number of correct examples."""
        return adversarial_cross_entropy(learner, batch, x_adv, clean=self.clean)

    def follow_up(self, finished: Finished) -> tuple[dict[str, Any], str]:
        """Return the sizes of both networks, and robust accuracies of the rounded one."""
        net = finished.new
        weights = sum(layer.weight.numel() for layer in int8_layers(net.net).values())
        return after_compression(finished, bytes_of(net), f"{weights:,} weights have 8 bits")


def _rounded(model: Classifier, *, trained: bool) -> Classifier:
    """A copy of a model whose linear and convolutional layers are rounded to 8 bits."""
    new = deepcopy(model)
    if not isinstance(new.net, nn.Module):
        raise TargetError(
            "int8 rounds layers of torch.nn, and the model is a function; give a network, as in net.py:make"
        )
    new.net = with_int8(new.net, layers_of(new.net), trained=trained).eval()
    return new
