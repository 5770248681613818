"""Counting and timing: forwards and backwards per image, CPU seconds of the process, the naive floor."""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Passes(torch.autograd.Function):
    """The identity; its backward adds the images of a call to the count of backwards."""

    @staticmethod
    def forward(ctx, x: Tensor, counted: "Counted") -> Tensor:  # type: ignore[override, no-untyped-def]
        ctx.counted = counted
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override, no-untyped-def]
        ctx.counted.backwards += len(gradient)
        return gradient, None


class Counted(nn.Module):
    """A network that counts the images it is asked for, forwards and backwards."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.forwards, self.backwards = inner, 0, 0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        logits: Tensor = self.inner(x)
        return _Passes.apply(logits, self) if logits.requires_grad else logits  # type: ignore[no-untyped-call]


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of the process (all threads) that a call takes."""
    start = time.process_time()
    work()
    return time.process_time() - start


def naive_floor(module: nn.Module, x: Tensor, y: Tensor, steps: int, forwards: int = 0) -> None:
    """`steps` times a forward and the input's gradient of the summed cross-entropy, whole batch, frozen weights.

    `forwards` more passes run without a gradient (a closing look, or a bisection).
    """
    frozen = [p for p in module.parameters() if p.requires_grad]
    for p in frozen:
        p.requires_grad_(False)
    try:
        for _ in range(steps):
            at = x.detach().requires_grad_()
            torch.autograd.grad(F.cross_entropy(module(at), y, reduction="sum"), at)
        with torch.no_grad():
            for _ in range(forwards):
                module(x)
    finally:
        for p in frozen:
            p.requires_grad_(True)
