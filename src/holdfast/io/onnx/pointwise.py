"""Converts ONNX operators that are elementwise operations, comparisons and reductions."""

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.io.onnx.building import GraphStep, Operator, Unsupported, Value


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
    "Equal": _binary(torch.eq),
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
