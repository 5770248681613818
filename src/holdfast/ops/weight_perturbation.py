"""Perturbation of weights in the direction that raises their loss, for the computation of one gradient.

Wu et al., "Adversarial Weight Perturbation Helps Robust Generalization", NeurIPS 2020, arXiv:2004.05884. Differs from
the paper: the network itself takes the step and undoes it, in place of a copy.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from holdfast.ops.distributed import average

_TINY = 1e-12


@contextmanager
def perturbed(model: nn.Module, loss: Callable[[], Tensor], share: float) -> Iterator[None]:
    """Context manager that perturbs each matrix or kernel of `model` in the direction that increases `loss`.

    The size of the perturbation is the fraction `share` of the norm of each weight, and the weights are restored on
    exit. Vectors, such as biases and the scales of norms, are unchanged. Changes of running statistics by `loss` are
    undone. Cost: a forward and a backward; nothing if `share` is 0.
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
