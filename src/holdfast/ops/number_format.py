"""How a network computes while it is trained: in numbers of 16 bits, channels last, compiled.

Sixteen bits are bfloat16's, whose range is that of 32, so that no loss is scaled and no scale is part of a checkpoint;
weights, losses and updates stay as they are. A new model is judged in its own precision.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from holdfast.core.model import Classifier

Precision = Literal["auto", "float32", "bfloat16"]
"""Of convolutions and matrix products: auto is bfloat16 on a GPU that has it, float32 elsewhere."""
Layout = Literal["auto", "channels-first", "channels-last"]
"""How images lie in memory: auto is channels last on a GPU, channels first elsewhere."""


@contextmanager
def computing(precision: Precision, device: torch.device) -> Iterator[None]:
    """Within it, products take numbers of that precision.

    To be entered for each pass anew, for weights that are changed in place are cast anew only then.
    """
    if precision == "auto":
        narrow = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        narrow = precision == "bfloat16"
    with torch.autocast(device.type, torch.bfloat16, enabled=narrow):
        yield


@contextmanager
def exactly(x: Tensor) -> Iterator[None]:
    """Within it, products keep the precision of what they are given, for weights whose bound counts every rounding."""
    with torch.autocast(x.device.type, enabled=False):
        yield


def have_compiled(model: Classifier) -> None:
    """Let torch compile the forward of a model's network, in place; its tensors keep their names.

    Through a function of our own, for torch compiles no forward of its own modules, such as a `Sequential`, by itself.
    """
    net = model.net
    assert isinstance(net, nn.Module)  # anything else has no weights to train
    forward = net.forward

    def through(x: Tensor) -> Tensor:
        logits: Tensor = forward(x)
        return logits

    net.forward = torch.compile(through)


def _last(layout: Layout, device: torch.device) -> bool:
    return layout == "channels-last" or (layout == "auto" and device.type == "cuda")


def laid_out(x: Tensor, layout: Layout) -> Tensor:
    """Images with their channels where the layout has them; anything else as it is."""
    if x.dim() == 4 and _last(layout, x.device):
        return x.contiguous(memory_format=torch.channels_last)
    return x


def lay_out(net: nn.Module, layout: Layout) -> None:
    """The same for the kernels of a network, in place."""
    for weight in net.parameters():
        weight.data = laid_out(weight.data, layout)
