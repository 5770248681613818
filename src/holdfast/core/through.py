"""Replacement of gradients: a part of a network keeps its outputs, but adaptive attacks use the gradient of a
differentiable function in its place.

BPDA: Athalye, Carlini & Wagner, "Obfuscated gradients give a false sense of security: circumventing defenses to
adversarial examples", ICML 2018, arXiv:1802.00420. Differs from the paper: the attacked network is not rewritten. The
replacement is stored with the stage and used by adaptive attacks only, so that the same object can be attacked with and
without it; results are always evaluated on the original.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from holdfast.core.errors import UsageError
from holdfast.core.model import Bounds, Model
from holdfast.core.types import Ids, Inputs, Logits

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
class Way:
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
    ways: Sequence[Way] = ()
    steps: bool = False
    """whether roundings anywhere in the network have the gradient of the identity"""

    @property
    def bounds(self) -> Bounds:
        """Lowest and highest valid values of the inputs of the model."""
        return self.model.bounds

    def __call__(self, x: Inputs, ids: Ids | None = None) -> Logits:
        """Return the logits of the model, whose gradient is that of the replacements."""
        with detoured(self.ways, steps=self.steps):
            return self.model(x, ids)


@contextmanager
def detoured(ways: Sequence[Way], *, steps: bool = False) -> Iterator["Straight"]:
    """Context manager inside which the modules in `ways` have the gradients of their replacement functions.

    With `steps`, roundings also have the gradient of the identity. Yields an object that counts these roundings.
    """
    hooks = [way.module.register_forward_hook(_hook(way)) for way in ways]
    straight = Straight()
    try:
        if steps:
            with straight:
                yield straight
        else:
            yield straight
    finally:
        for hook in hooks:
            hook.remove()


def _hook(way: Way) -> Callable[[nn.Module, tuple[Any, ...], Any], Tensor]:
    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        x: Tensor = inputs[0]
        stand_in = x if way.stand_in is None else way.stand_in(x)
        if stand_in.shape != output.shape:
            raise UsageError(
                f"the replacement of {way.name} returns shape {tuple(stand_in.shape)}, but the stage returns "
                f"{tuple(output.shape)}; give a function that returns the same shape: through(stage, backward=...)"
            )
        if way.stand_in is not None and not output.is_floating_point():
            raise UsageError(
                f"the stage {way.name} returns {output.dtype}, which has no gradient to replace; return "
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


class Straight(TorchFunctionMode):
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
