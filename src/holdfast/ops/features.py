"""What a network has made of its inputs where its last layer begins."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from holdfast.core.types import Logits


class Features:
    """The features of the latest pass."""

    def __init__(self) -> None:
        self._rows = 0
        self._found: Tensor | None = None

    def or_logits(self, logits: Logits) -> Tensor:
        """What the last layer was given, as many rows as the batch had or more, or `logits` where no layer was seen."""
        return logits if self._found is None else self._found

    def _begin(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._rows, self._found = len(inputs[0]), None

    def _note(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # one that is run for each example apart, or for a part of the batch, has but some of them
        if inputs and inputs[0].dim() > 1 and len(inputs[0]) >= self._rows:
            self._found = inputs[0]


@contextmanager
def watched(model: nn.Module) -> Iterator[Features]:
    """Within it, the input of the last linear layer or convolution that runs in a pass, and runs for the whole batch.

    Layers are known by their type, so that a network that was imported as one graph or program, or that holds its
    weights elsewhere, shows none. No hook stays behind, whatever happens within.
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
