"""Weights moved up their own loss for the time of a gradient.

Wu et al., "Adversarial Weight Perturbation Helps Robust Generalization", NeurIPS 2020, arXiv:2004.05884. Differs from
the paper: the step up is taken by the network itself and taken back, and not by a copy of it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from holdfast.ops.distributed import average

_TINY = 1e-12


@contextmanager
def perturbed(model: nn.Module, loss: Callable[[], Tensor], share: float) -> Iterator[None]:
    """The weights of `model`, each matrix or kernel moved up `loss` by that share of its norm; then as they were.

    Vectors, such as biases and the scales of norms, stay. What `loss` does to running statistics is undone. Cost: a
    forward and a backward; nothing where the share is 0.
    """
    if not share:
        yield
        return
    moved = [weight for weight in model.parameters() if weight.requires_grad and weight.dim() > 1]
    statistics = [buffer.clone() for buffer in model.buffers()]
    grads = torch.autograd.grad(loss(), moved, allow_unused=True)
    average(grads)
    before = [weight.detach().clone() for weight in moved]
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), statistics, strict=True):
            buffer.copy_(value)
        for weight, grad in zip(moved, grads, strict=True):
            if grad is not None:
                weight.add_(grad, alpha=float(share * weight.norm() / (grad.norm() + _TINY)))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(moved, before, strict=True):
                weight.copy_(value)
