"""Converts ONNX operators that are layers, elementwise operations, comparisons and reductions."""

from collections.abc import Callable
from functools import reduce
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.io.onnx.building import GraphStep, Operator, Unsupported, Value, projected_one_hot

Layer = TypeVar("Layer", bound=nn.Module)

_CONV: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_TRANSPOSED: dict[int, Any] = {3: nn.ConvTranspose1d, 4: nn.ConvTranspose2d, 5: nn.ConvTranspose3d}
_BATCH_NORM: dict[int, Any] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_INSTANCE_NORM: dict[int, Any] = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}
_MAX_POOL: dict[int, Any] = {3: nn.MaxPool1d, 4: nn.MaxPool2d, 5: nn.MaxPool3d}
_AVERAGE_POOL: dict[int, Any] = {3: nn.AvgPool1d, 4: nn.AvgPool2d, 5: nn.AvgPool3d}
_GLOBAL_AVERAGE: dict[int, Any] = {3: nn.AdaptiveAvgPool1d, 4: nn.AdaptiveAvgPool2d, 5: nn.AdaptiveAvgPool3d}
_GLOBAL_MAX: dict[int, Any] = {3: nn.AdaptiveMaxPool1d, 4: nn.AdaptiveMaxPool2d, 5: nn.AdaptiveMaxPool3d}


def conv(step: GraphStep) -> Value:
    """Convert the operator Conv: a convolution over one, two or three dimensions."""
    weight, bias = step.tensor(1), step.tensor(2) if step.given(2) else None
    stride, dilation, pads = _window(step, tuple(weight.shape[2:]))
    x, padding = _padded(step, pads, 0.0)
    groups = step.setting("group", 1)
    layer = _of_rank(_CONV, step)(
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=bias is not None,
    )
    return step.builder.module("conv", _filled(layer, weight=weight, bias=bias), x)


def conv_transpose(step: GraphStep) -> Value:
    """Convert the operator ConvTranspose: a transposed convolution. Uneven pads are removed from its output."""
    weight, bias = step.tensor(1), step.tensor(2) if step.given(2) else None
    if "output_shape" in step.attributes or step.setting("auto_pad", b"NOTSET") != b"NOTSET":
        raise Unsupported("ConvTranspose with output_shape or auto_pad")
    stride, dilation, pads = _window(step, tuple(weight.shape[2:]))
    n = len(stride)
    even = pads[:n] == pads[n:]
    groups = step.setting("group", 1)
    layer = _of_rank(_TRANSPOSED, step)(
        weight.shape[0],
        weight.shape[1] * groups,
        tuple(weight.shape[2:]),
        stride=stride,
        padding=pads[:n] if even else 0,
        output_padding=tuple(step.setting("output_padding", (0,) * n)),
        groups=groups,
        bias=bias is not None,
        dilation=dilation,
    )
    y = step.builder.module("conv_transpose", _filled(layer, weight=weight, bias=bias), step.x)
    return y if even else step.builder.call(F.pad, y, _reversed_pads([-p for p in pads]))


def gemm(step: GraphStep) -> Value:
    """Convert the operator Gemm, a general matrix product, to a linear layer. The second factor must be a constant."""
    alpha, beta = step.setting("alpha", 1.0), step.setting("beta", 1.0)
    x = step.builder.call(torch.t, step.x) if step.setting("transA", 0) else step.x
    if not step.input(1).is_static or (step.given(2) and not step.input(2).is_static):
        raise Unsupported("Gemm of two computed matrices")
    weight = step.tensor(1) if step.setting("transB", 0) else step.tensor(1).t()
    bias = step.tensor(2) * beta if step.given(2) else None
    if bias is not None and bias.numel() not in (1, len(weight)):
        raise Unsupported(f"Gemm with a bias of shape {tuple(bias.shape)}")
    return step.builder.module("linear", _linear(weight * alpha, bias), x)


def matmul(step: GraphStep) -> Value:
    """Convert the operator MatMul: to a linear layer if it is a product of a value with a constant matrix on its right,
    or of a constant matrix with a vector, else to a matrix product.
    """
    right = step.input(1)
    projected = projected_one_hot(step)
    if projected is not None:
        return projected
    if right.is_static and right.rank == 2 and step.x.node is not None:
        return step.builder.module("linear", _linear(step.tensor(1).t(), None), step.x)
    if step.x.is_static and step.x.rank == 2 and right.rank == 1:
        return step.builder.module("linear", _linear(step.tensor(0), None), right)
    return step.builder.call(torch.matmul, step.x, right)


def batch_norm(step: GraphStep) -> Value:
    """Convert the operator BatchNormalization with fixed statistics."""
    if step.setting("training_mode", 0):
        raise Unsupported("BatchNormalization in training mode")
    layer = _of_rank(_BATCH_NORM, step)(step.x.shape[1], eps=step.setting("epsilon", 1e-5))
    names = ("weight", "bias", "running_mean", "running_var")
    return step.builder.module(
        "batch_norm", _filled(layer, **{name: step.tensor(i) for i, name in enumerate(names, 1)}), step.x
    )


def instance_norm(step: GraphStep) -> Value:
    """Convert the operator InstanceNormalization, which normalises each channel of each example."""
    layer = _of_rank(_INSTANCE_NORM, step)(step.x.shape[1], eps=step.setting("epsilon", 1e-5), affine=True)
    return step.builder.module(
        "instance_norm", _filled(layer, weight=step.tensor(1), bias=step.tensor(2)), step.x
    )


def layer_norm(step: GraphStep) -> Value:
    """Convert the operator LayerNormalization, which normalises over the last dimensions."""
    axis = step.setting("axis", -1)
    layer = nn.LayerNorm(step.x.shape[axis % step.x.rank :], eps=step.setting("epsilon", 1e-5))
    weight, shape = step.tensor(1), layer.normalized_shape
    bias = step.tensor(2) if step.given(2) else torch.zeros_like(weight)
    return step.builder.module(
        "layer_norm", _filled(layer, weight=weight.expand(shape), bias=bias.expand(shape)), step.x
    )


def group_norm(step: GraphStep) -> Value:
    """Convert the operator GroupNormalization, which normalises groups of channels."""
    groups, channels = step.setting("num_groups", 1), step.x.shape[1]
    layer = nn.GroupNorm(groups, channels, eps=step.setting("epsilon", 1e-5))
    weight, bias = step.tensor(1), step.tensor(2)
    if len(weight) == groups != channels:  # opset 18 has one scale for each group
        weight, bias = (tensor.repeat_interleave(channels // groups) for tensor in (weight, bias))
    return step.builder.module("group_norm", _filled(layer, weight=weight, bias=bias), step.x)


def local_response_norm(step: GraphStep) -> Value:
    """Convert the operator LRN, which normalises across adjacent channels."""
    layer = nn.LocalResponseNorm(
        step.setting("size", 1),
        step.setting("alpha", 1e-4),
        step.setting("beta", 0.75),
        step.setting("bias", 1.0),
    )
    return step.builder.module("local_response_norm", layer, step.x)


def prelu(step: GraphStep) -> Value:
    """Convert the operator PRelu: a rectifier with a learned slope below zero."""
    slope = step.tensor(1)
    channels = step.x.shape[1] if step.x.rank > 1 else 1
    if slope.numel() not in (1, channels) or (slope.numel() > 1 and slope.shape[0] != channels):
        raise Unsupported(f"PRelu with a slope of shape {tuple(slope.shape)}")
    return step.builder.module("prelu", _filled(nn.PReLU(slope.numel()), weight=slope.flatten()), step.x)


def max_pool(step: GraphStep) -> Value:
    """Convert the operator MaxPool: the maximum of each window."""
    if step.n_outputs > 1 or step.setting("storage_order", 0):
        raise Unsupported("MaxPool that returns indices")
    kernel = tuple(step.attributes["kernel_shape"])
    stride, dilation, pads = _window(step, kernel)
    x, padding = _padded(step, pads, -torch.inf, at_most=tuple(size // 2 for size in kernel))
    layer = _of_rank(_MAX_POOL, step)(
        kernel, stride, padding, dilation, ceil_mode=bool(step.setting("ceil_mode", 0))
    )
    return step.builder.module("max_pool", layer, x)


def average_pool(step: GraphStep) -> Value:
    """Convert the operator AveragePool: the mean of each window. An attribute determines whether padding is
    included.
    """
    kernel = tuple(step.attributes["kernel_shape"])
    stride, dilation, pads = _window(step, kernel)
    if any(size != 1 for size in dilation):
        raise Unsupported("AveragePool with dilations")
    counts, ceil_mode = bool(step.setting("count_include_pad", 0)), bool(step.setting("ceil_mode", 0))
    n = len(kernel)
    even = pads[:n] == pads[n:] and all(p <= size // 2 for p, size in zip(pads, kernel, strict=False))
    if not even and (ceil_mode or not counts):
        raise Unsupported("AveragePool with uneven pads that are not counted")
    x, padding = _padded(step, pads, 0.0, at_most=tuple(size // 2 for size in kernel))
    layer = _of_rank(_AVERAGE_POOL, step)(
        kernel, stride, padding, ceil_mode=ceil_mode, count_include_pad=counts
    )
    return step.builder.module("average_pool", layer, x)


def _global_pool(layers: dict[int, Any], name: str) -> Operator:
    def pool(step: GraphStep) -> Value:
        return step.builder.module(name, _of_rank(layers, step)(1), step.x)

    return pool


def _of_rank(layers: dict[int, Any], step: GraphStep) -> Callable[..., Any]:
    if step.x.rank not in layers:
        raise Unsupported(f"{step.op} of {step.x.rank} dimensions")
    chosen: Callable[..., Any] = layers[step.x.rank]
    return chosen


def _window(
    step: GraphStep, kernel: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the strides, dilations and pads of an operator.

    The pads are first those at the beginnings of all dimensions, then those at the ends.
    """
    n = len(kernel)
    stride = tuple(step.setting("strides", (1,) * n))
    dilation = tuple(step.setting("dilations", (1,) * n))
    auto = step.setting("auto_pad", b"NOTSET")
    if auto == b"NOTSET":
        return stride, dilation, tuple(step.setting("pads", (0,) * 2 * n))
    if auto == b"VALID":
        return stride, dilation, (0,) * 2 * n
    totals = [
        max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
        for size, s, k, d in zip(step.x.shape[2:], stride, kernel, dilation, strict=True)
    ]
    small, large = tuple(total // 2 for total in totals), tuple(total - total // 2 for total in totals)
    return stride, dilation, (small + large if auto == b"SAME_UPPER" else large + small)


def _padded(
    step: GraphStep, pads: tuple[int, ...], value: float, at_most: tuple[int, ...] | None = None
) -> tuple[Value, tuple[int, ...]]:
    """Return the input and the padding of the layer. Pads that are uneven or larger than `at_most` are added to the
    input.
    """
    n = len(pads) // 2
    if pads[:n] == pads[n:] and (
        at_most is None or all(p <= most for p, most in zip(pads, at_most, strict=False))
    ):
        return step.x, pads[:n]
    return step.builder.call(F.pad, step.x, _reversed_pads(pads), value=value), (0,) * n


def _reversed_pads(pads: list[int] | tuple[int, ...]) -> tuple[int, ...]:
    """Return pads in the order of torch: last dimension first, with beginning and end next to each other."""
    n = len(pads) // 2
    return tuple(pad for dim in reversed(range(n)) for pad in (pads[dim], pads[dim + n]))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    return _filled(layer, weight=weight, bias=None if bias is None else bias.flatten().expand(len(weight)))


def _filled(layer: Layer, **tensors: Tensor | None) -> Layer:
    """Return the layer with copies of the tensors as its parameters, converted to the type of the first tensor."""
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    layer.to(next(iter(present.values())).dtype)
    state = {name: tensor.detach().clone() for name, tensor in present.items()}
    layer.load_state_dict(state, strict=False)
    return layer


LAYERS: dict[str, Operator] = {
    "AveragePool": average_pool,
    "BatchNormalization": batch_norm,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Gemm": gemm,
    "GlobalAveragePool": _global_pool(_GLOBAL_AVERAGE, "global_average_pool"),
    "GlobalMaxPool": _global_pool(_GLOBAL_MAX, "global_max_pool"),
    "GroupNormalization": group_norm,
    "InstanceNormalization": instance_norm,
    "LRN": local_response_norm,
    "LayerNormalization": layer_norm,
    "MatMul": matmul,
    "MaxPool": max_pool,
    "PRelu": prelu,
}
"""Functions that convert the operators of this module, by their ONNX names."""


def _unary(function: Callable[[Tensor], Tensor]) -> Operator:
    def apply(step: GraphStep) -> Value:
        return step.builder.call(function, step.x)

    return apply


def _binary(function: Callable[[Any, Any], Any]) -> Operator:
    def apply(step: GraphStep) -> Value:
        return step.builder.call(function, step.x, step.input(1))

    return apply


def _variadic(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    def apply(step: GraphStep) -> Value:
        values = [step.input(i) for i in range(len(step.inputs))]
        return reduce(lambda a, b: step.builder.call(function, a, b), values)

    return apply


def _activation(name: str, make: Callable[[GraphStep], nn.Module]) -> Operator:
    def apply(step: GraphStep) -> Value:
        return step.builder.module(name, make(step), step.x)

    return apply


def _reduction(function: Callable[..., Tensor]) -> Operator:
    def apply(step: GraphStep) -> Value:
        axes = step.axes(1)
        if not axes:
            if step.setting("noop_with_empty_axes", 0):
                return step.x
            axes = tuple(range(step.x.rank))
        return step.builder.call(function, step.x, tuple(axes), keepdim=bool(step.setting("keepdims", 1)))

    return apply


def l1_norm(x: Tensor, dim: tuple[int, ...], *, keepdim: bool) -> Tensor:
    """Return the sum of absolute values over the dimensions `dim`."""
    return x.abs().sum(dim, keepdim=keepdim)


def l2_norm(x: Tensor, dim: tuple[int, ...], *, keepdim: bool) -> Tensor:
    """Return the square root of the sum of squares over the dimensions `dim`."""
    return x.square().sum(dim, keepdim=keepdim).sqrt()


def squares(x: Tensor, dim: tuple[int, ...], *, keepdim: bool) -> Tensor:
    """Return the sum of squares over the dimensions `dim`."""
    return x.square().sum(dim, keepdim=keepdim)


def quotient(a: Tensor, b: Tensor) -> Tensor:
    """Return the quotient of two tensors. Quotients of integers are rounded towards zero."""
    if a.is_floating_point() or b.is_floating_point():
        return torch.div(a, b)
    return torch.div(a, b, rounding_mode="trunc")


def modulo(step: GraphStep) -> Value:
    """Convert the operator Mod: the remainder of a division, with the sign of the divisor, or of the dividend if `fmod`
    is set.
    """
    return step.builder.call(
        torch.fmod if step.setting("fmod", 0) else torch.remainder, step.x, step.input(1)
    )


def clip(step: GraphStep) -> Value:
    """Convert the operator Clip, which clamps values to two constants.

    The limits are attributes in older opsets and inputs in newer ones.
    """
    low, high = (
        float(step.tensor(i)) if step.given(i) else step.attributes.get(name)
        for i, name in ((1, "min"), (2, "max"))
    )
    if low is None and high is None:
        return step.x
    return step.builder.call(torch.clamp, step.x, min=low, max=high)


def hard_sigmoid(step: GraphStep) -> Value:
    """Convert the operator HardSigmoid: a linear function clamped to [0, 1]."""
    alpha, beta = step.setting("alpha", 0.2), step.setting("beta", 0.5)
    line = step.builder.call(torch.add, step.builder.call(torch.mul, step.x, alpha), beta)
    return step.builder.call(torch.clamp, line, min=0.0, max=1.0)


def softmax(step: GraphStep) -> Value:
    """Convert the operators Softmax and LogSoftmax. Before opset 13 they apply to all dimensions from the axis on."""
    axis = step.setting("axis", -1 if step.opset >= 13 else 1) % step.x.rank
    if step.opset < 13 and any(size != 1 for size in step.x.shape[axis + 1 :]):
        raise Unsupported(f"{step.op} of opset {step.opset} over several dimensions")
    layer = nn.Softmax(axis) if step.op == "Softmax" else nn.LogSoftmax(axis)
    return step.builder.module("softmax", layer, step.x)


def gelu(step: GraphStep) -> Value:
    """Convert the operator Gelu: the Gaussian error linear unit."""
    how = step.setting("approximate", b"none").decode()
    return step.builder.module("gelu", nn.GELU(approximate=how), step.x)


def where(step: GraphStep) -> Value:
    """Convert the operator Where, which selects each element from one of two tensors by a condition."""
    return step.builder.call(torch.where, step.x, step.input(1), step.input(2))


def _arg(function: Callable[..., Any]) -> Operator:
    """Return the function that converts the operators ArgMax and ArgMin, which return the index of an extreme."""

    def convert(step: GraphStep) -> Value:
        if step.setting("select_last_index", 0):
            raise Unsupported(f"{step.op} that takes the last of equals")
        axis, keeps = step.setting("axis", 0), bool(step.setting("keepdims", 1))
        return step.builder.call(function, step.x, axis, keepdim=keeps)

    return convert


def onnx_mean(step: GraphStep) -> Value:
    """Convert the operator Mean: the elementwise mean of several tensors."""
    total = _variadic(torch.add)(step)
    assert isinstance(total, Value)
    return step.builder.call(torch.div, total, len(step.inputs))


POINTWISE: dict[str, Operator] = {
    "Abs": _unary(torch.abs),
    "Add": _binary(torch.add),
    "And": _binary(torch.logical_and),
    "ArgMax": _arg(torch.argmax),
    "ArgMin": _arg(torch.argmin),
    "Ceil": _unary(torch.ceil),
    "Celu": _activation("celu", lambda step: nn.CELU(step.setting("alpha", 1.0))),
    "Clip": clip,
    "Cos": _unary(torch.cos),
    "Div": _binary(quotient),
    "Elu": _activation("elu", lambda step: nn.ELU(step.setting("alpha", 1.0))),
    "Erf": _unary(torch.erf),
    "Exp": _unary(torch.exp),
    "Floor": _unary(torch.floor),
    "Gelu": gelu,
    "Greater": _binary(torch.gt),
    "GreaterOrEqual": _binary(torch.ge),
    "HardSigmoid": hard_sigmoid,
    "HardSwish": _activation("hard_swish", lambda _: nn.Hardswish()),
    "LeakyRelu": _activation("leaky_relu", lambda step: nn.LeakyReLU(step.setting("alpha", 0.01))),
    "Less": _binary(torch.lt),
    "LessOrEqual": _binary(torch.le),
    "Log": _unary(torch.log),
    "LogSoftmax": softmax,
    "Max": _variadic(torch.maximum),
    "Mean": onnx_mean,
    "Min": _variadic(torch.minimum),
    "Mish": _activation("mish", lambda _: nn.Mish()),
    "Mod": modulo,
    "Mul": _binary(torch.mul),
    "Neg": _unary(torch.neg),
    "Not": _unary(torch.logical_not),
    "Or": _binary(torch.logical_or),
    "Pow": _binary(torch.pow),
    "Reciprocal": _unary(torch.reciprocal),
    "ReduceL1": _reduction(l1_norm),
    "ReduceL2": _reduction(l2_norm),
    "ReduceMax": _reduction(torch.amax),
    "ReduceMean": _reduction(torch.mean),
    "ReduceMin": _reduction(torch.amin),
    "ReduceSum": _reduction(torch.sum),
    "ReduceSumSquare": _reduction(squares),
    "Relu": _activation("relu", lambda _: nn.ReLU()),
    "Round": _unary(torch.round),
    "Selu": _activation("selu", lambda _: nn.SELU()),
    "Sigmoid": _activation("sigmoid", lambda _: nn.Sigmoid()),
    "Sign": _unary(torch.sign),
    "Sin": _unary(torch.sin),
    "Softmax": softmax,
    "Softplus": _unary(F.softplus),
    "Softsign": _unary(F.softsign),
    "Sqrt": _unary(torch.sqrt),
    "Sub": _binary(torch.sub),
    "Sum": _variadic(torch.add),
    "Tanh": _activation("tanh", lambda _: nn.Tanh()),
    "Where": where,
}
"""Functions that convert the operators of this module, by their ONNX names."""
