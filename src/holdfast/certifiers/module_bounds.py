"""Bounds of the outputs and of the layers of a module, for use in Python."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from holdfast.certifiers.bounds.alpha import optimised, sharpen
from holdfast.certifiers.bounds.crown import finite, one_hot, relaxed, substitute
from holdfast.certifiers.bounds.graph import Region, Relaxation
from holdfast.certifiers.bounds.tracing import traced
from holdfast.core.errors import UsageError
from holdfast.core.names import did_you_mean
from holdfast.core.training import exactly
from holdfast.core.types import Inputs

BoundMethod = Literal["ibp", "crown", "alpha-crown"]
BallNorm = Literal["linf", "l2", "l1"]
_STEPS = 20
"""number of steps of the optimisation of slopes, as in `holdfast.certifiers.AlphaCrown`"""
_ELEMENTS = 2**22
"""largest number of coefficients that are computed at once"""


@dataclass(frozen=True, eq=False)
class LinearBounds:
    """Linear bounds of the values of a layer: A x + b with the sum over all features of an input x of the region.

    Coefficients are (n, *values, *features), and constants (n, *values).
    """

    lower_coefficients: Tensor
    lower_constants: Tensor
    upper_coefficients: Tensor
    upper_constants: Tensor


@dataclass(frozen=True, eq=False)
class LayerBounds:
    """Bounds of the values of a layer for all inputs of the region of each of n inputs."""

    relaxation: Relaxation
    """the operations before the values, with bounds of theirs"""
    method: BoundMethod
    lower: Tensor
    """lower bounds (n, *values)"""
    upper: Tensor
    """upper bounds (n, *values)"""

    @cached_property
    def linear(self) -> LinearBounds:
        """Linear bounds in terms of the input, reduced or enlarged by their rounding errors. They are computed when
        they are first used, and need n times values times features numbers.
        """
        shape = (len(self.lower), *self.lower.shape[1:])
        with torch.no_grad(), exactly(self.lower):
            parts = [
                _lines(self.relaxation, self.method, sign, with_coefficients=True) for sign in (1.0, -1.0)
            ]
        (_, a, b), (_, minus_a, minus_b) = parts
        features = self.relaxation.region.low.shape[1:]
        return LinearBounds(
            a.view(*shape, *features), b.view(shape), -minus_a.view(*shape, *features), -minus_b.view(shape)
        )


@dataclass(frozen=True, eq=False)
class ModuleBounds:
    """Bounds of a module: those of its outputs, and those of a layer by its name, as in `result["encoder.0"]`."""

    module: nn.Module | Callable[[Tensor], Tensor]
    region: Region
    method: BoundMethod
    outputs: LayerBounds

    @property
    def lower(self) -> Tensor:
        """Lower bounds (n, *outputs) of the outputs."""
        return self.outputs.lower

    @property
    def upper(self) -> Tensor:
        """Upper bounds (n, *outputs) of the outputs."""
        return self.outputs.upper

    @property
    def linear(self) -> LinearBounds:
        """Linear bounds of the outputs."""
        return self.outputs.linear

    def __getitem__(self, name: str) -> LayerBounds:
        """Return the bounds of the output of a submodule, at its last call in a forward pass.

        Raises `UsageError` for an unknown name, and for a submodule that is not called or returns no tensor.
        """
        names = (
            [each for each, _ in self.module.named_modules()] if isinstance(self.module, nn.Module) else []
        )
        if name not in names or not name:
            raise UsageError(f"the module has no submodule {name!r}{did_you_mean(name, names[1:])}")
        return _bounded(_Values(self.module, name), self.region, self.method)


def bounds(
    module: nn.Module | Callable[[Tensor], Tensor],
    x: Inputs,
    eps: float | Tensor,
    *,
    norm: BallNorm = "linf",
    method: BoundMethod = "crown",
) -> ModuleBounds:
    """Return bounds of the outputs of a module, and of its layers, for all inputs within `eps` of each input `x` (n,
    *features).

    `eps` is a number, or under linf a tensor that broadcasts to the features. The bounds hold in exact arithmetic, with
    the weights as stored, and contain their own rounding errors. `ibp` propagates intervals, `crown` substitutes
    linear bounds back to the input, and `alpha-crown` optimises their slopes for each value. Raises `NoBounds` for an
    operation without sound bounds, and `UsageError` for a module in training mode and for an eps of another length.
    """
    for what, given, known in (("norm", norm, get_args(BallNorm)), ("method", method, get_args(BoundMethod))):
        if given not in known:
            raise UsageError(f"{what} is {given!r}; expected one of {', '.join(known)}")
    layers = list(module.modules()) if isinstance(module, nn.Module) else []
    # a module that joins others has no mode of its own
    if any(layer.training for layer in layers if next(layer.children(), None) is None):
        raise UsageError(
            "the module is in training mode, in which bounds are not those of its use; call module.eval()"
        )
    if x.dtype not in (torch.float32, torch.float64) or x.dim() < 2:
        raise UsageError(
            f"x has the shape {tuple(x.shape)} and the type {x.dtype}; expected inputs (n, features, ...) in float32 "
            "or float64"
        )
    region = _region(x.detach(), eps, norm)
    return ModuleBounds(module, region, method, _bounded(_Values(module), region, method))


def _region(x: Inputs, eps: float | Tensor, norm: BallNorm) -> Region:
    size, features = torch.as_tensor(eps, dtype=torch.float64, device=x.device), x.shape[1:]
    try:
        size.expand(features)
    except RuntimeError:
        fits = False
    else:
        fits = norm == "linf" or size.numel() == 1
    if not fits:
        expected = f"a number{'' if norm != 'linf' else f' or a tensor that broadcasts to {tuple(features)}'}"
        raise UsageError(
            f"eps has the shape {tuple(size.shape)}; expected {expected}, as x has the shape {tuple(x.shape)}"
        )
    if not bool(((size >= 0) & (size < math.inf)).all()):
        raise UsageError(f"eps is {eps}; it must be 0 or more and finite")
    low, high = (x.double() - size).to(x.dtype), (x.double() + size).to(x.dtype)
    low, high = (
        low.nextafter(torch.full_like(low, -torch.inf)),
        high.nextafter(torch.full_like(high, torch.inf)),
    )
    radius = 0.0 if norm == "linf" else float(size) * (1 + 1e-6)
    return Region(low, high, x, {"linf": None, "l2": 2, "l1": 1}[norm], radius)


class _Values(nn.Module):
    """The output of a submodule of a module, or of the module for an empty name."""

    def __init__(self, net: nn.Module | Callable[[Tensor], Tensor], name: str = "") -> None:
        super().__init__()
        self.net, self.name = net, name

    def forward(self, x: Tensor) -> Tensor:
        """Return the values."""
        values: list[object] = []
        if self.name:
            assert isinstance(self.net, nn.Module)
            layer = self.net.get_submodule(self.name)
            hook = layer.register_forward_hook(lambda _, __, output: values.append(output))
            try:
                self.net(x)
            finally:
                hook.remove()
        else:
            values.append(self.net(x))
        value = values[-1] if values else None
        if not isinstance(value, Tensor):
            what = f"the submodule {self.name!r}" if self.name else "the module"
            raise UsageError(
                f"{what} {f'returns {type(value).__name__}' if values else 'is not called in a forward pass'}; bounds "
                "are those of a tensor"
            )
        if value.dim() < 2:
            raise UsageError(
                f"{f'the submodule {self.name!r}' if self.name else 'the module'} returns a tensor of the shape "
                f"{tuple(value.shape)} for {len(x)} inputs; expected values (n, values, ...): keep a dimension for them"
            )
        return value.view(value.shape)  # so that a softmax at the end is not left out, as it is for classes


def _bounded(values: _Values, region: Region, method: BoundMethod) -> LayerBounds:
    x = region.centre
    graph = traced(values.eval(), x).to(x.dtype, x.device)
    with torch.no_grad(), exactly(x):
        relaxation = relaxed(graph, region, substituted=method != "ibp")
        if method == "alpha-crown":
            sharpen(relaxation, _STEPS)
        low, high = relaxation.bound(graph.output)
        if method != "ibp":
            lower, upper = (
                _lines(relaxation, method, sign, with_coefficients=False)[0].view(low.shape)
                for sign in (1.0, -1.0)
            )
            low, high = torch.fmax(low, lower), torch.fmin(high, -upper)
    return LayerBounds(relaxation, method, finite(low), -finite(-high))


def _lines(
    relaxation: Relaxation, method: BoundMethod, sign: float, *, with_coefficients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Lower bounds (n, values) of all values times a sign, with the coefficients (n, values, features) and constants
    (n, values) of linear ones. Without coefficients, these are empty.
    """
    graph, region = relaxation.graph, relaxation.region
    index, n = graph.output, len(region.low)
    shape = graph.shape_of(index)
    largest = max(graph.shape_of(i).numel() for i in graph.ancestors(index))
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    every = torch.arange(shape.numel(), device=region.low.device)
    for chosen in torch.split(every, max(1, _ELEMENTS // (n * largest))):
        signs = torch.full((n, len(chosen)), sign, dtype=region.low.dtype, device=chosen.device)
        rows = one_hot(chosen.expand(n, -1), signs, shape)
        if method == "alpha-crown":
            choices = optimised(relaxation, index, rows, steps=_STEPS, until_positive=False).choices
            result = substitute(relaxation, index, rows, choices)
        else:
            result = substitute(relaxation, index, rows)
        a, lower = result.coefficients, result.lower
        if not with_coefficients:
            parts.append((lower, lower[:, :0], lower[:, :0]))
            continue
        least = region.minimum(a)
        rounding = 4 * torch.finfo(lower.dtype).eps * (lower.abs() + least.abs())
        parts.append((lower, a.flatten(2), lower - least - rounding))
    lower, a, b = (torch.cat(each, 1) for each in zip(*parts, strict=True))
    return lower, a, b
