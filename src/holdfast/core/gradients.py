"""Gradients with respect to inputs, and replacements of them: through skip connections (SGM), and through parts
without a useful gradient (BPDA).
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from holdfast.core.batch import spread
from holdfast.core.constraints import Constraint
from holdfast.core.errors import Remedy, TargetError, UsageError
from holdfast.core.model import Bounds, Model
from holdfast.core.names import kind_of
from holdfast.core.training import CUTS
from holdfast.core.types import Ids, Inputs, Labels, Logits, PerExample


def input_gradient(value: PerExample, x: Inputs, *, retain: bool = False, raw: bool = False) -> Inputs:
    """Return the gradient of the sum of `value` with respect to the inputs `x`. It is zero if there is no dependence,
    and NaN and infinity are replaced by zero.

    With `retain`, the graph is retained for another gradient; with `raw`, NaN and infinity are not replaced. Cost: one
    backward.
    """
    if not value.requires_grad:
        return torch.zeros_like(x)
    (grad,) = torch.autograd.grad(value.sum(), x, retain_graph=retain, materialize_grads=True)
    # not in place: the gradient of a sum is one number, expanded
    return grad if raw else grad.nan_to_num(0.0, 0.0, 0.0)


def levelled(grad: Inputs) -> Inputs:
    """Return the gradient of each example divided by its mean absolute value, for attacks with momentum. Dong et al.
    2018 divide by the L1 norm instead.
    """
    return grad / spread(grad.flatten(1).abs().mean(1).clamp_min(1e-12), grad)


def sloped(net: Callable[[Inputs], Logits], x: Inputs, y: Labels) -> tuple[Inputs, Logits, PerExample]:
    """Compute a forward pass whose loss can be differentiated with respect to the inputs. Returns a leaf tensor equal
    to `x`, the logits, and the cross-entropy of each example.
    """
    leaf = x.detach().requires_grad_()
    logits = net(leaf)
    return leaf, logits, F.cross_entropy(logits, y, reduction="none")


def gradient_of(value: Tensor, x: Inputs, *, graph: bool = True) -> Inputs:
    """Return the gradient of the sum of `value` with respect to `x` for use in a loss. With `graph`, the result can be
    differentiated again.

    The graph is retained for another gradient. Raises `TargetError` if `value` does not depend on `x`. Cost: one
    backward.
    """
    grad: Inputs | None = None
    if value.requires_grad:
        (grad,) = torch.autograd.grad(
            value.sum(), x, retain_graph=True, create_graph=graph, allow_unused=True
        )
    if grad is None:
        raise TargetError(
            f"no gradient reaches the input of this network, and the recipe needs it; remove what stops it ({CUTS})",
            Remedy("recipe", "standard"),
        )
    return grad


def rise(value: PerExample, x: Inputs, constraint: Constraint, bounds: Bounds) -> PerExample:
    """Return the first-order increase of `value` for each example in a step of length eps, which is eps times the dual
    norm of the gradient.

    Under L1, where the steepest step changes a hundredth of the features, the mean of that hundredth of the largest
    slopes replaces the dual norm. The result is differentiable, so that it can be a penalty. Cost: one backward, and
    another when it is differentiated.
    """
    grad = gradient_of(value, x)
    climb = constraint.steepest(grad.detach(), x.detach(), bounds)
    added: PerExample = constraint.eps * (grad * climb).flatten(1).sum(1)
    return added


DECAY = 0.5
"""default fraction of the gradient that passes through a branch"""
_SHOWN = 12
"""largest number of names in a message"""


class Skipped(nn.Module):
    """Network whose gradient is multiplied by `decay` at the end of each residual branch. Its outputs are unchanged."""

    def __init__(self, net: nn.Module, branches: tuple[str, ...], decay: float) -> None:
        super().__init__()
        self.net, self.branches, self.decay = net, branches, decay

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of the network, bitwise unchanged, with gradients that are scaled down in the residual
        branches.
        """
        called: set[str] = set()
        hooks = [
            self.net.get_submodule(name).register_forward_hook(_decayed(name, self.decay, called))
            for name in self.branches
        ]
        try:
            logits: Tensor = self.net(x)
        finally:
            for hook in hooks:
                hook.remove()
        if not called:
            raise UsageError(
                f"the network does not call {', '.join(self.branches[:_SHOWN])} (an exported program calls none of "
                "its modules); name modules that it calls, or do not use skip gradients"
            )
        return logits


def skipped(net: nn.Module | Callable[[Tensor], Tensor], branches: str, *, decay: float = DECAY) -> Skipped:
    """Return a network with the same outputs whose gradients prefer its skip connections (SGM, the skip gradient
    method), for use as a surrogate model.

    `branches` is a pattern of module names with `*` for any text, which matches the last module of each residual
    branch, before the addition: `layer*.*.bn2`. The gradient of each branch is multiplied by `decay`; 1 has no effect.
    The authors give 0.5 for a ResNet and 0.2 for a DenseNet in their code's README. Raises `UsageError` if no module
    matches.
    """
    if not isinstance(net, nn.Module):
        raise UsageError(
            f"skipped() got {kind_of(net)}; expected a network, because branches are named by its modules"
        )
    if not 0 <= decay <= 1:
        raise UsageError(f"decay is {decay}; expected the share of the gradient that is kept, from 0 to 1")
    names = [name for name, _ in net.named_modules() if name]
    ends = tuple(name for name in names if fnmatchcase(name, branches))
    if not ends:
        kinds = list(dict.fromkeys(re.sub(r"\d+(?=\.|$)", "*", name) for name in names))
        more = f" and {len(kinds) - _SHOWN} more" if len(kinds) > _SHOWN else ""
        has = f"it has {', '.join(kinds[:_SHOWN])}{more}" if kinds else "it has none"
        raise UsageError(
            f"no module of the network is called {branches!r}; {has}. Name the last module of each residual "
            "branch, as in layer*.*.bn2, or do not use skip gradients"
        )
    return Skipped(net, ends, decay)


def _decayed(
    name: str, decay: float, called: set[str]
) -> Callable[[nn.Module, tuple[Any, ...], Any], Tensor]:
    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        called.add(name)
        if not isinstance(output, Tensor):
            raise UsageError(
                f"the module {name} returns {kind_of(output)}; name one that returns a tensor as the end of a "
                "branch"
            )
        if not output.requires_grad:
            return output
        end = output.clone()  # a hook on `output` itself would affect the skip connection too
        end.register_hook(lambda grad: decay * grad)  # type: ignore[no-untyped-call]
        return end

    return hook


StandIn = Callable[[Tensor], Tensor]
"""function that is differentiable, from the input of a stage to a tensor in the shape of the stage's output"""


class Through(nn.Module):
    """A part of a network together with a differentiable function, whose gradient adaptive attacks use in place of that
    of the part.
    """

    def __init__(
        self, stage: nn.Module | Callable[[Tensor], Tensor], backward: StandIn | None = None
    ) -> None:
        super().__init__()
        self.stage, self.backward = stage, backward

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the wrapped part of the network, with its own gradient."""
        passed: Tensor = self.stage(x)
        return passed


def through(stage: nn.Module | Callable[[Tensor], Tensor], backward: StandIn | None = None) -> Through:
    """Wrap a part of a network and declare a differentiable function `backward` for it, whose gradient adaptive attacks
    (`--adaptive`) use in its place.

    `backward` takes the stage's inputs and returns a tensor in the shape of its outputs. Without it the gradient passes
    unchanged, which requires that the stage does not change the shape. Only adaptive attacks use the function.
    """
    if not callable(stage) or not (backward is None or callable(backward)):
        raise UsageError(
            f"through() got {stage!r} and {backward!r}; expected a network or a function, and for backward a "
            "function or None"
        )
    return Through(stage, backward)


@dataclass(frozen=True)
class Replacement:
    """A module of a network and the function whose gradient replaces its own. If the function is None, the gradient
    passes unchanged.
    """

    name: str
    module: nn.Module
    stand_in: StandIn | None = None


@dataclass(frozen=True)
class View:
    """Wrapper of a model for an adaptive attack. It has the same outputs, but some modules have the gradients of
    replacement functions.
    """

    model: Model
    replacements: Sequence[Replacement] = ()
    steps: bool = False
    """whether roundings anywhere in the network have the gradient of the identity"""

    @property
    def bounds(self) -> Bounds:
        """Lowest and highest valid values of the inputs of the model."""
        return self.model.bounds

    def __call__(self, x: Inputs, ids: Ids | None = None) -> Logits:
        """Return the logits of the model, whose gradient is that of the replacements."""
        with detoured(self.replacements, steps=self.steps):
            return self.model(x, ids)


@contextmanager
def detoured(replacements: Sequence[Replacement], *, steps: bool = False) -> Iterator["StraightThrough"]:
    """Context manager inside which the modules in `replacements` have the gradients of their replacement functions.

    With `steps`, roundings also have the gradient of the identity. Yields an object that counts these roundings.
    """
    hooks = [replacement.module.register_forward_hook(_replaced(replacement)) for replacement in replacements]
    rounding = StraightThrough()
    try:
        if steps:
            with rounding:
                yield rounding
        else:
            yield rounding
    finally:
        for hook in hooks:
            hook.remove()


def _replaced(replacement: Replacement) -> Callable[[nn.Module, tuple[Any, ...], Any], Tensor]:
    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        x: Tensor = inputs[0]
        stand_in = x if replacement.stand_in is None else replacement.stand_in(x)
        if stand_in.shape != output.shape:
            raise UsageError(
                f"the replacement of {replacement.name} returns shape {tuple(stand_in.shape)}, but the stage returns "
                f"{tuple(output.shape)}; give a function that returns the same shape: through(stage, backward=...)"
            )
        if replacement.stand_in is not None and not output.is_floating_point():
            raise UsageError(
                f"the stage {replacement.name} returns {output.dtype}, which has no gradient to replace; return "
                "floating-point values, as in .float()"
            )
        return instead(output, stand_in)

    return hook


def instead(value: Tensor, stand_in: Tensor) -> Tensor:
    """Return exactly `value`, but with the gradient of `stand_in`, a tensor of the same shape."""
    out: Tensor = _Instead.apply(value.detach(), stand_in)  # type: ignore[no-untyped-call]
    return out


class _Instead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, stand_in: Tensor) -> Tensor:  # noqa: ANN401
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # noqa: ANN401
        return None, grad


_STEPS = {torch.round, torch.floor, torch.ceil, torch.trunc, torch.fix} | {
    Tensor.round, Tensor.floor, Tensor.ceil, Tensor.trunc, Tensor.fix
}  # fmt: skip


class StraightThrough(TorchFunctionMode):
    """Context manager inside which rounding operations have the gradient of the identity (straight-through
    estimator).
    """

    def __init__(self) -> None:
        super().__init__()
        self.passed = 0
        """number of roundings with a replaced gradient"""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        value = func(*args, **(kwargs or {}))
        if func in _STEPS and args and args[0].requires_grad:
            self.passed += 1
            return instead(value, args[0])
        return value
