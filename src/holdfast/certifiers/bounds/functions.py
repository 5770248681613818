"""Translations of functions of single values, and of the minimum and maximum of two, into operations of a graph."""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.certifiers.bounds import operations
from holdfast.certifiers.bounds.translator import (
    TracedValue,
    Translation,
    Translator,
    constant,
    constant_of,
    scalar,
    scaled,
    shifted,
)

# default arguments of the operations
_ABSENT = TracedValue(None)
_LEAK, _HALF, _ONE, _MINUS_ONE, _TWENTY = (TracedValue(None, each) for each in (0.01, 0.5, 1.0, -1.0, 20.0))


def _relu(to: Translator, x: TracedValue) -> TracedValue:
    return to.add(operations.ReLU(), x)


def _threshold(to: Translator, x: TracedValue, at: TracedValue, value: TracedValue) -> TracedValue:
    if at.constant != 0 or value.constant != 0:
        raise to.refused("a threshold other than zero")
    return to.add(operations.ReLU(), x)


def _kinked(
    to: Translator, x: TracedValue, below: Tensor, above: float, least: float = -math.inf
) -> TracedValue:
    """A function with the slope `below` under zero and `above` over it: below * x + (above - below) * relu(x).

    Written with a ReLU, its sign can be assumed in branch and bound; the linear bounds are the same.
    """
    positive = scaled(to, to.add(operations.ReLU(), x), above - below, None)
    return to.add(operations.Sum(least=least), positive, scaled(to, x, below, None))


def _leaky(to: Translator, x: TracedValue, slope: TracedValue = _LEAK) -> TracedValue:
    return _kinked(to, x, scalar(to, slope.constant), 1.0)


def _rrelu(to: Translator, x: TracedValue, noise: TracedValue, *settings: TracedValue) -> TracedValue:
    given = [each.constant for each in settings]
    lower, upper, training = [*given, *(1 / 8, 1 / 3, False)[len(given) :]][:3]
    if training:
        raise to.refused("a leaky ReLU with random slopes in training mode")
    return TracedValue(None, (_kinked(to, x, scalar(to, (lower + upper) / 2), 1.0), None))


def _prelu(to: Translator, x: TracedValue, weight: TracedValue) -> TracedValue:
    return _kinked(to, x, constant(to, weight), 1.0)


def _abs(to: Translator, x: TracedValue) -> TracedValue:
    magnitude = _kinked(to, x, scalar(to, -1.0), 1.0, least=0.0)
    to.magnitudes[magnitude.node] = x.node
    return magnitude


def _clamp(
    to: Translator, x: TracedValue, low: TracedValue = _ABSENT, high: TracedValue = _ABSENT
) -> TracedValue:
    if any(isinstance(each.constant, Tensor) or each.node is not None for each in (low, high)):
        for limit, limited in ((low, _maximum), (high, _minimum)):
            if limit.node is not None or limit.constant is not None:
                x = limited(to, x, limit)
        return x
    least, most = (None if each.constant is None else float(each.constant) for each in (low, high))
    limits = tuple(each for each in (least, most) if each is not None and math.isfinite(each))
    return to.add(operations.Piecewise(partial(torch.clamp, min=least, max=most), limits, (0.0, 1.0)), x)


def _hardtanh(
    to: Translator,
    x: TracedValue,
    low: TracedValue = _MINUS_ONE,
    high: TracedValue = _ONE,
) -> TracedValue:
    return _clamp(to, x, low, high)


def _hardsigmoid(to: Translator, x: TracedValue) -> TracedValue:
    return to.add(operations.Piecewise(F.hardsigmoid, (-3.0, 3.0), (0.0, 1 / 6)), x)


def _softshrink(to: Translator, x: TracedValue, at: TracedValue = _HALF) -> TracedValue:
    limit = float(at.constant)
    return to.add(operations.Piecewise(partial(F.softshrink, lambd=limit), (-limit, limit), (0.0, 1.0)), x)


def _maximum(to: Translator, a: TracedValue, b: TracedValue) -> TracedValue:
    """The larger one of two values, b + relu(a - b), so that branch and bound can assume which one it is."""
    if a.node is None:
        a, b = b, a
    return _shifted(to, _excess(to, a, b), b, 1.0)


def _minimum(to: Translator, a: TracedValue, b: TracedValue) -> TracedValue:
    """The smaller one of two values, a - relu(a - b)."""
    if a.node is None:
        a, b = b, a
    return to.add(operations.Sum(-1.0), to.aligned(a, to.out), _excess(to, a, b))


def _excess(to: Translator, a: TracedValue, b: TracedValue) -> TracedValue:
    return to.add(operations.ReLU(), _shifted(to, a, b, -1.0))


def _shifted(to: Translator, a: TracedValue, b: TracedValue, factor: float) -> TracedValue:
    """A + factor * b, for a value a and a value or constant b. Unlike in `shifted`, minus infinity in b is an ordinary
    constant.
    """
    if b.node is None:
        return scaled(to, a, None, factor * constant(to, b))
    return to.add(operations.Sum(factor), to.aligned(a, to.out), to.aligned(b, to.out))


def _where(to: Translator, condition: TracedValue, a: TracedValue, b: TracedValue) -> TracedValue:
    if condition.node is not None:
        raise to.refused("a selection whose condition depends on the input")
    first = constant(to, condition)
    masks = (first, 1 - first)
    varying = [(value, mask) for value, mask in zip((a, b), masks, strict=True) if value.node is not None]
    parts = [scaled(to, value, mask, None) for value, mask in varying]
    if len(parts) == 2:
        return to.add(operations.Sum(), *parts)
    other, mask = (b, masks[1]) if b.node is None else (a, masks[0])
    filling = constant(to, other)
    return shifted(to, parts[0], torch.where(mask > 0, filling, 0.0))


def _masked_fill(to: Translator, x: TracedValue, mask: TracedValue, value: TracedValue) -> TracedValue:
    return _where(to, mask, value, x)


def smooth(function: Callable[..., Tensor], curvature: float, kinks: tuple[float, ...] = ()) -> Translation:
    """Return the translation of a smooth function without further arguments, whose derivative has the Lipschitz
    constant `curvature` between the kinks.
    """

    def translate(to: Translator, x: TracedValue, **kwargs: TracedValue) -> TracedValue:
        settings = {name: constant_of(arg) for name, arg in kwargs.items()}
        return to.add(
            operations.Smooth(
                partial(function, **settings) if settings else function, curvature, kinks=kinks
            ),
            x,
        )

    return translate


def _elu(to: Translator, x: TracedValue, *settings: TracedValue) -> TracedValue:
    alpha, scale, inner = (*(float(each.constant) for each in settings), 1.0, 1.0, 1.0)[:3]
    return _exponential_unit(to, x, alpha * scale, inner, scale)


def _exponential_unit(
    to: Translator, x: TracedValue, alpha: float, inner: float, slope: float
) -> TracedValue:
    """The function alpha * (exp(inner * x) - 1) for negative values, and slope * x for others."""
    if alpha < 0 or inner < 0 or slope < 0:
        raise to.refused("an exponential linear unit with a negative factor")
    function = partial(_negative_exponential, alpha=alpha, inner=inner, slope=slope)
    kinks = () if alpha * inner == slope else (0.0,)
    return to.add(operations.Smooth(function, alpha * inner**2, kinks=kinks), x)


def _negative_exponential(x: Tensor, alpha: float, inner: float, slope: float) -> Tensor:
    return alpha * torch.expm1(inner * x.clamp(max=0)) + slope * x.clamp(min=0)


def _celu(to: Translator, x: TracedValue, alpha: TracedValue = _ONE) -> TracedValue:
    return _exponential_unit(to, x, float(alpha.constant), 1 / float(alpha.constant), 1.0)


def _softplus(
    to: Translator,
    x: TracedValue,
    beta: TracedValue = _ONE,
    threshold: TracedValue = _TWENTY,
) -> TracedValue:
    """The function log(1 + exp(beta * x)) / beta, in place of which torch returns x above the threshold."""
    steepness = float(beta.constant)
    if steepness <= 0:
        raise to.refused(f"softplus with the beta {steepness}")
    limit = float(threshold.constant)
    left_out = math.log1p(math.exp(-limit)) / steepness
    function = partial(F.softplus, beta=steepness, threshold=limit)
    # the values on the grid, and the function between them, may differ from the smooth one
    return to.add(operations.Smooth(function, steepness / 4, error=2 * left_out), x)


def _log_sigmoid(to: Translator, x: TracedValue) -> TracedValue:
    return TracedValue(None, (to.add(operations.Smooth(F.logsigmoid, 0.25), x), None))


FUNCTIONS: dict[str, Translation] = {
    "aten.relu": _relu,
    "aten.threshold": _threshold,
    "aten.leaky_relu": _leaky,
    "aten.rrelu_with_noise_functional": _rrelu,
    "aten._prelu_kernel": _prelu,
    "aten.abs": _abs,
    "aten.clamp": _clamp,
    "aten.clamp_min": _clamp,
    "aten.clamp_max": lambda to, x, high: _clamp(to, x, _ABSENT, high),
    "aten.hardtanh": _hardtanh,
    "aten.hardsigmoid": _hardsigmoid,
    "aten.softshrink": _softshrink,
    "aten.maximum": _maximum,
    "aten.minimum": _minimum,
    "aten.where": _where,
    "aten.masked_fill": _masked_fill,
    "aten.elu": _elu,
    "aten.celu": _celu,
    "aten.softplus": _softplus,
    "aten.log_sigmoid_forward": _log_sigmoid,
    # the largest second derivatives, rounded up
    "aten.tanh": smooth(torch.tanh, 0.77),
    "aten.sigmoid": smooth(torch.sigmoid, 0.0963),
    "aten.gelu": smooth(F.gelu, 0.9),
    "aten.silu": smooth(F.silu, 0.5),
    "aten.mish": smooth(F.mish, 0.65),
    "aten.hardswish": smooth(F.hardswish, 1 / 3, (-3.0, 3.0)),
    "aten.erf": smooth(torch.erf, 0.97),
    "aten.sin": smooth(torch.sin, 1.0),
    "aten.cos": smooth(torch.cos, 1.0),
    "aten.atan": smooth(torch.atan, 0.65),
}
"""Translation of each function with sound bounds, by the name of its operation."""
