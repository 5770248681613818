"""Faster frozen copies of a network with the same outputs up to rounding, and averages of several networks."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from holdfast.core.model import Bounds, Classifier, Model
from holdfast.core.outputs import scale
from holdfast.core.types import Ids, Inputs, Logits

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


class ColumnConv2d(nn.Conv2d):
    """Convolution over maps of width 1, which is computed over their transposes: oneDNN has faster kernels for rows."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the feature maps (n, out_channels, out_height, 1) for maps (n, in_channels, height, 1)."""
        if input.dim() != 4 or input.shape[3] != 1:
            return super().forward(input)
        assert not isinstance(self.padding, str)
        geometry = (self.stride[::-1], self.padding[::-1], self.dilation[::-1], self.groups)
        rows = F.conv2d(input.transpose(2, 3), self.weight.transpose(2, 3), self.bias, *geometry)
        return rows.transpose(2, 3)


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


Step = Callable[[Classifier, Tensor], Classifier | None]
"""function that returns a faster copy for inputs like the given ones; None if nothing can be changed"""

_AGREES = 1e-4  # largest difference of logits, relative to the largest logit
_SLOPES = 2  # number of examples whose gradients are compared
_AGREES_IN_SLOPE = 1e-2  # relative to the gradients' norms: rounding may switch a ReLU at zero


def agrees(first: Tensor, second: Tensor) -> bool:
    """Return whether two sets of logits differ by at most 1e-4 of the largest logit and have NaN in the same places."""
    size = scale(first).max().clamp_min(1e-12)
    return bool(torch.allclose(first / size, second / size, rtol=0.0, atol=_AGREES, equal_nan=True))


def in_training(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the dropout and batch norm layers of a model that are in train mode, and those of attention
    with dropout.
    """
    return tuple(name for name, m in model.named_modules() if _depends_on_mode(m) and m.training)


def _depends_on_mode(module: nn.Module) -> bool:
    drops = isinstance(module, nn.MultiheadAttention) and module.dropout > 0
    return drops or isinstance(module, _BatchNorm | _DropoutNd)


def quickened(model: Classifier, x: Tensor) -> tuple[Classifier, tuple[str, ...]]:
    """Return a faster frozen copy of `model` for attacks on inputs like `x` (n, *features), and descriptions of what
    was changed for speed.

    In the copy, batch norm is folded into the layer before it, convolutions of maps of width 1 run along the width,
    others use channels last where that is faster, and the input gradient of convolutions with few channels is faster. A
    change is omitted if it alters the logits by more than 1e-4 or the gradient by more than 1e-2 (both relative), or if
    it raises an error. A model that cannot be copied is returned unchanged.
    """
    if not isinstance(model.net, nn.Module):
        return model, ()
    try:
        quick = copy.deepcopy(model).eval().requires_grad_(False)
    except Exception:  # noqa: BLE001  copying a network can raise any error
        return model, ("the model cannot be copied, so it is attacked as it is",)
    with torch.no_grad():
        reference = model(x)
    # compared as well, because the step for stems changes only the gradient
    slope = _slope(quick, x[:_SLOPES])
    changes: list[str] = []
    for description, step in _STEPS:
        changed = _changed(step, quick, x, reference, slope)
        if changed is not None:
            quick = changed
            changes.append(description)
    return quick, tuple(changes)


def _changed(
    step: Step, model: Classifier, x: Tensor, reference: Tensor, slope: Tensor | None
) -> Classifier | None:
    """The model after one change; None if there is nothing to change, outputs differ, or an error occurs."""
    try:
        candidate = step(model, x)
        return candidate if candidate is not None and _computes(candidate, x, reference, slope) else None
    except Exception:  # noqa: BLE001  changing a network can raise any error
        return None


def _slope(model: Classifier, x: Tensor) -> Tensor | None:
    """The input gradient of the sum of squared logits; None if the model has none."""
    leaf = x.detach().clone().requires_grad_()
    try:
        with torch.enable_grad():
            return torch.autograd.grad(model(leaf).square().sum(), leaf)[0]
    except Exception:  # noqa: BLE001  it may not be differentiable at all
        return None


def _computes(model: Classifier, x: Tensor, reference: Tensor, slope: Tensor | None) -> bool:
    """Whether a copy has the logits of the model, and its gradient if it has one."""
    with torch.no_grad():
        if not agrees(reference, model(x)):
            return False
    if slope is None:
        return True
    own_slope = _slope(model, x[:_SLOPES])
    return own_slope is not None and _same_slope(slope, own_slope)


def _same_slope(first: Tensor, second: Tensor) -> bool:
    """Whether two gradients agree: the norm of their difference is at most 1e-2 of the larger norm."""
    first, second = first.nan_to_num(0.0, 0.0, 0.0).double(), second.nan_to_num(0.0, 0.0, 0.0).double()
    return bool((first - second).norm() <= _AGREES_IN_SLOPE * torch.maximum(first.norm(), second.norm()))


def _last(model: Classifier, x: Tensor) -> Classifier | None:
    """A copy that runs channels last; None if that does not pay."""
    if x.dim() != 4 or not _channels_last_pays(model, x):
        return None
    return copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _with_rows(model: Classifier, x: Tensor) -> Classifier | None:
    """A copy whose convolutions along the height of maps of width 1 run along the width; on a CPU only."""
    if x.device.type != "cpu":
        return None
    columns: set[nn.Module] = set()
    copied = copy.deepcopy(model)

    def watch(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].dim() == 4 and inputs[0].shape[3] == 1:
            columns.add(layer)

    layers = [m for m in copied.modules() if type(m) is nn.Conv2d and _is_column(m)]
    handles = [layer.register_forward_pre_hook(watch) for layer in layers]
    try:
        copied(x[:2])
    finally:
        for handle in handles:
            handle.remove()
    for layer in columns:
        layer.__class__ = ColumnConv2d
    return copied if columns else None


def _is_column(layer: nn.Conv2d) -> bool:
    plain = layer.padding_mode == "zeros" and not isinstance(layer.padding, str) and layer.padding[1] == 0
    return plain and layer.kernel_size[1] == 1 < layer.kernel_size[0]


def _with_stems(model: Classifier, x: Tensor) -> Classifier | None:
    """A copy whose convolutions with few channels compute their input gradient faster; on a CPU only."""
    copied = copy.deepcopy(model)
    return copied if x.device.type == "cpu" and quicken_stems(copied) else None


def _folded(model: Classifier, x: Tensor) -> Classifier | None:
    """A copy in which each batch norm directly after a convolution or linear layer is folded into that layer.

    The pairs are found in a forward pass: the input of the batch norm is the output tensor of the layer. Whether the
    tensor is used elsewhere is not checked here; the caller compares the logits.
    """
    if not any(isinstance(m, _BatchNorm) for m in model.modules()):
        return None
    outputs: dict[int, tuple[nn.Module, Tensor]] = {}
    calls: dict[nn.Module, int] = {}
    pairs: dict[nn.Module, nn.Module] = {}

    def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls[module] = calls.get(module, 0) + 1
        if isinstance(module, _BatchNorm):
            maker = outputs.get(id(inputs[0]))
            if maker is not None:
                pairs[module] = maker[0]
        elif isinstance(output, Tensor):
            outputs[id(output)] = (module, output)  # the tensor is kept alive, so that its id stays unique

    copied = copy.deepcopy(model)
    watched = [
        m for m in copied.modules() if isinstance(m, (_BatchNorm, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))
    ]
    handles = [m.register_forward_hook(watch) for m in watched]
    try:
        copied(x[:2])
    finally:
        for handle in handles:
            handle.remove()
    once = {norm: layer for norm, layer in pairs.items() if calls[norm] == 1 and calls[layer] == 1}
    for norm, layer in once.items():
        _fold(layer, norm)
    for parent in list(copied.modules()):
        for name, child in list(parent.named_children()):
            if child in once:
                setattr(parent, name, nn.Identity())
    return copied if once else None


def _fold(layer: nn.Module, norm: nn.Module) -> None:
    assert isinstance(norm, _BatchNorm)
    if norm.running_mean is None or norm.running_var is None:
        return
    fuse = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
    weight, bias = fuse(
        layer.weight,  # type: ignore[arg-type]
        layer.bias,  # type: ignore[arg-type]
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    layer.weight, layer.bias = weight.requires_grad_(False), bias.requires_grad_(False)


def _channels_last_pays(model: Classifier, x: Tensor) -> bool:
    """Whether to run channels last: on a CPU, if most convolutions larger than 1x1 have stride one.

    This is a rule and not a timing, so that the same run gives the same evidence. It follows the measurements in
    `benchmarks/records` (0.7 to 0.9 of the time; strided convolutions get slower).
    """
    convolutions = [
        m for m in model.modules() if isinstance(m, nn.Conv2d) and not isinstance(m, ColumnConv2d)
    ]
    strides = [m.stride for m in convolutions if m.kernel_size != (1, 1)]
    return x.device.type == "cpu" and 2 * sum(stride == (1, 1) for stride in strides) > len(strides)


def multiply_adds(model: nn.Module, x: Tensor) -> int:
    """Return the number of multiplications in the convolutions and linear layers of a model for the forward pass of one
    example.

    They are counted in a forward pass of `x` (n, *features).
    """
    total = 0

    def count(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        weight = module.weight
        assert isinstance(weight, Tensor)
        total += output.numel() // len(x) * weight[0].numel()

    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, kinds)]
    if not handles:  # no query to a model behind a server
        return 0
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return total


_STEPS: tuple[tuple[str, Step], ...] = (
    ("batch norm is folded into the layer before it", _folded),
    ("convolutions of maps of width 1 run along the width", _with_rows),
    ("convolutions run channels last", _last),
    ("convolutions of few channels give their input gradient as a matrix product", _with_stems),
)


@dataclass(frozen=True)
class Ensemble:
    """Model that returns the mean of the logits of several models, for inputs with common bounds."""

    models: tuple[Model, ...]
    bounds: Bounds

    def __call__(self, x: Inputs, ids: Ids | None = None) -> Logits:
        """Return the logits (n, classes); cost: one forward of each model."""
        return torch.stack([model(x, ids) for model in self.models]).mean(0)
