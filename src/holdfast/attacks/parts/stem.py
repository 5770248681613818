"""Convolutions with few input channels, such as the first one of a network, with a fast gradient with respect to the
input.

Training does not need this gradient of the first layer, and attacks always do. With one to four input channels, torch's
CPU kernel takes 1.2 to five times as long as a matrix product and a fold.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FEW = 4  # most input channels for which the product is faster: equal at six, half as fast at eight
_COLUMNS = 2**18  # numbers that are unfolded at once (1 MiB of float32), to fit a core's cache

Pair = tuple[int, int]


class _Convolution(torch.autograd.Function):
    """`F.conv2d` whose backward returns only the gradient of its input; it can be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair
    ) -> Tensor:
        return F.conv2d(x, weight, bias, stride, padding, dilation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401  torch gives it no type
        x, weight, _, *ctx.geometry = inputs
        ctx.save_for_backward(weight)
        ctx.size = x.shape[2:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        (weight,) = ctx.saved_tensors
        return _input_gradient(grad, weight, ctx.size, *ctx.geometry), None, None, None, None, None


def _input_gradient(
    grad: Tensor, weight: Tensor, size: torch.Size, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """The input gradient: each output's gradient times the kernel, summed by `F.fold`, a few examples at a time."""
    spread = weight.flatten(1).t().to(grad.dtype)
    n_at_once = max(1, _COLUMNS // (len(spread) * grad.shape[2] * grad.shape[3]))
    pieces = torch.split(grad.flatten(2), n_at_once)
    return torch.cat(
        [F.fold(spread @ piece, size, weight.shape[2:], dilation, padding, stride) for piece in pieces]
    )


class StemConv2d(nn.Conv2d):
    """Frozen convolution for images with few channels whose gradient with respect to the input is computed fast."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the feature maps (n, out_channels, …) for images (n, in_channels, height, width)."""
        learns = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        if learns or input.dim() != 4 or not (input.requires_grad and torch.is_grad_enabled()):
            return super().forward(input)
        maps: Tensor = _Convolution.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.bias, self.stride, self.padding, self.dilation
        )
        return maps


def quicken_stems(net: nn.Module) -> bool:
    """Convert the convolutions of `net` with at most four input channels to the faster `StemConv2d`, and return whether
    there were any.

    Only frozen layers are changed. If a weight requires a gradient in a forward, the layer uses the plain convolution.
    """
    stems = [m for m in net.modules() if type(m) is nn.Conv2d and _fits(m)]
    for stem in stems:
        stem.__class__ = StemConv2d  # in place, so that weights, hooks and names remain
    return bool(stems)


def _fits(layer: nn.Conv2d) -> bool:
    plain = layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return plain and layer.in_channels <= _FEW and not layer.weight.requires_grad
