"""Changes of the weights during training: adversarial perturbation of the weights, and averages over the training.

AWP: Wu et al., "Adversarial Weight Perturbation Helps Robust Generalization", NeurIPS 2020, arXiv:2004.05884. Differs
from the paper: the network itself takes the step and undoes it, in place of a copy.

EMA: Polyak & Juditsky, "Acceleration of Stochastic Approximation by Averaging", SIAM Journal on Control and
Optimization 30(4), 1992, in the exponential form that is customary now. SWA: Izmailov et al., "Averaging Weights Leads
to Wider Optima and Better Generalization", UAI 2018, arXiv:1803.05407. Differs from the paper: the running statistics
of batch norm are averaged like the weights and not recomputed in a pass over the training data, because such a pass
gives statistics of clean inputs and adversarial training has statistics of attacked inputs; and the learning rate is
that of the training, where the paper has its own cycles.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from holdfast.recipes.training.distributed import average

_TINY = 1e-12  # a gradient of zero then changes nothing


@contextmanager
def perturbed(model: nn.Module, loss: Callable[[], Tensor], share: float) -> Iterator[None]:
    """Context manager inside which the matrices and kernels of `model` are perturbed in the direction that increases
    `loss` (adversarial weight perturbation).

    The size of the perturbation is the fraction `share` of the norm of each weight, and the weights are restored on
    exit. Vectors, such as biases and the scales of norms, are unchanged. Changes of running statistics by `loss` are
    undone. Cost: a forward and a backward; nothing if `share` is 0.
    """
    if not share:
        yield
        return
    perturbed_weights = [weight for weight in model.parameters() if weight.requires_grad and weight.dim() > 1]
    statistics = [buffer.clone() for buffer in model.buffers()]
    grads = torch.autograd.grad(loss(), perturbed_weights, allow_unused=True)
    average(grads)
    before = [weight.detach().clone() for weight in perturbed_weights]
    # the loss has updated the running statistics, which belong to the unperturbed network
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), statistics, strict=True):
            buffer.copy_(value)
        for weight, grad in zip(perturbed_weights, grads, strict=True):
            if grad is not None:
                weight.add_(grad, alpha=float(share * weight.norm() / (grad.norm() + _TINY)))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(perturbed_weights, before, strict=True):
                weight.copy_(value)


def ema(average: dict[str, Tensor], model: nn.Module, keep: float, step: int) -> None:
    """Update the exponential moving average of the weights of a model in place. The decay is smaller at first, so that
    the initial weights are forgotten.
    """
    _average_towards(average, model, 1 - min(keep, (step + 1) / (step + 10)))


def swa(average: dict[str, Tensor], model: nn.Module, n_averaged: int) -> None:
    """Update the mean of the weights of a model in place (stochastic weight averaging); it already contains
    `n_averaged` earlier weights.
    """
    _average_towards(average, model, 1 / (1 + n_averaged))


@torch.no_grad()
def _average_towards(average: dict[str, Tensor], model: nn.Module, share: float) -> None:
    """Move the average by `share` towards the model; integer tensors, such as counts of batches, are copied."""
    for name, value in model.state_dict().items():
        if value.is_floating_point() and share < 1:
            average[name].lerp_(value, share)
        else:
            average[name].copy_(value)
