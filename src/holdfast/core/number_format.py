"""Number format and memory layout of a training: bfloat16, channels last, and compilation with torch.

bfloat16 has the range of float32, so that no loss scaling is needed and no scale is part of a checkpoint. Weights,
losses and updates are in their own precision. The new model is also evaluated in its own precision.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from holdfast.core.model import Classifier

Precision = Literal["auto", "float32", "bfloat16"]
"""number format of convolutions and matrix products: auto is bfloat16 on a GPU that supports it, float32 elsewhere"""
Layout = Literal["auto", "channels-first", "channels-last"]
"""memory layout of images: auto is channels last on a GPU, channels first elsewhere"""


@contextmanager
def computing(precision: Precision, device: torch.device) -> Iterator[None]:
    """Context manager inside which matrix products and convolutions of a training use the number format `precision`.

    Enter it for each pass separately: casts of weights are cached inside the context and miss changes in place.
    """
    if precision == "auto":
        narrow = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        narrow = precision == "bfloat16"
    with torch.autocast(device.type, torch.bfloat16, enabled=narrow):
        yield


@contextmanager
def exactly(x: Tensor) -> Iterator[None]:
    """Context manager inside which matrix products and convolutions have the full precision of their inputs, for
    certified bounds that account for every rounding. On a GPU, they do not use the shorter format TF32.
    """
    with torch.autocast(x.device.type, enabled=False):
        if x.device.type != "cuda":
            yield
            return
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        try:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def have_compiled(model: Classifier) -> None:
    """Compile the forward pass of the network of a model with torch, in place. The names of its tensors do not change.

    The forward is wrapped in a function, because torch does not compile the forward of its own modules, such as
    `Sequential`.
    """
    net = model.net
    assert isinstance(net, nn.Module)  # anything else has no weights to train
    forward = net.forward

    def through(*inputs: Tensor, **named_inputs: Tensor) -> object:
        return forward(*inputs, **named_inputs)

    net.forward = torch.compile(through)


def _last(layout: Layout, device: torch.device) -> bool:
    return layout == "channels-last" or (layout == "auto" and device.type == "cuda")


def laid_out(x: Tensor, layout: Layout) -> Tensor:
    """Return images in the memory layout `layout`, such as channels last. Tensors that are not images are unchanged."""
    if x.dim() == 4 and _last(layout, x.device):
        return x.contiguous(memory_format=torch.channels_last)
    return x


def lay_out(net: nn.Module, layout: Layout) -> None:
    """Change the memory layout of the convolution kernels of a network in place, such as to channels last."""
    for weight in net.parameters():
        weight.data = laid_out(weight.data, layout)
