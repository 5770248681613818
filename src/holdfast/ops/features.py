"""The features of a network: the input of its last layer."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from holdfast.core.types import Logits


class Features:
    """The features of the latest forward pass."""

    def __init__(self) -> None:
        self._rows = 0
        self._found: Tensor | None = None

    def or_logits(self, logits: Logits) -> Tensor:
        """The input of the last layer, with at least as many rows as the batch, or `logits` if there is none."""
        return logits if self._found is None else self._found

    def _begin(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._rows, self._found = len(inputs[0]), None

    def _note(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # a layer that runs for single examples or for a part of the batch is left out
        if inputs and inputs[0].dim() > 1 and len(inputs[0]) >= self._rows:
            self._found = inputs[0]


@contextmanager
def watched(model: nn.Module) -> Iterator[Features]:
    """Context that records the input of the last linear or convolution layer that runs for the whole batch in a pass.

    Layers are recognised by their type; a network that was imported as one graph or program, or that stores its weights
    elsewhere, has none. All hooks are removed at the end, also after an error.
    """
    features = Features()
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Linear, _ConvNd))]
    hooks = [model.register_forward_pre_hook(features._begin, prepend=True)]
    hooks += [layer.register_forward_pre_hook(features._note) for layer in layers]
    try:
        yield features
    finally:
        for hook in hooks:
            hook.remove()
