"""Models with masked gradients whose softmax is saturated: the gradient of the cross-entropy is zero, but that of the
margin is not.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.core.batch import Batch
from holdfast.doubts.gallery.item import Item
from holdfast.doubts.gallery.small_networks import digit_network, trained_on_digits

TEMPERATURE = 100.0  # the logits grow by about this factor, so that the softmax at temperature 1 saturates
SHARPNESS = 30.0  # factor of the logits, for which the softmax saturates in float32


class Times(nn.Module):
    """Layer that multiplies its input by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Return the input `x` multiplied by the constant `factor`."""
        return self.factor * x


def distilled(digits: Batch, twin: nn.Module) -> nn.Module:
    """Return a network that was trained on the outputs of a teacher network (defensive distillation), both with a
    softmax at temperature 100.

    The result is used without the temperature, so that its logits are large.
    """

    def hot(net: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(net(batch.x) / TEMPERATURE, batch.y)

    teacher = trained_on_digits(digit_network, digits, hot, epochs=10, lr=2e-2)

    def taught(net: nn.Module, batch: Batch) -> Tensor:
        soft = (teacher(batch.x) / TEMPERATURE).softmax(1)
        return F.cross_entropy(net(batch.x) / TEMPERATURE, soft)

    return trained_on_digits(digit_network, digits, taught, epochs=10, lr=2e-2, seed=1)


def saturated(digits: Batch, twin: nn.Module) -> nn.Module:
    """Return the undefended network `twin` followed by such a sharp softmax that most probabilities are exactly 0 or 1
    in float32.
    """
    return nn.Sequential(twin, Times(SHARPNESS), nn.Softmax(1))


ITEMS = (
    Item(
        "distillation",
        "Papernot et al., Distillation as a defense to adversarial perturbations, S&P 2016, arXiv:1511.04508",
        distilled,
    ),
    Item(
        "saturated-softmax",
        "Carlini & Wagner, Defensive distillation is not robust to adversarial examples, 2016, arXiv:1607.04311",
        saturated,
    ),
)
