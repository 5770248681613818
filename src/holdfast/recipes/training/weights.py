"""Frozen copies of a network that is being trained, and changes of its weights: perturbations and averages."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from holdfast.attacks.parts.fast_networks import quicken_stems
from holdfast.core.model import Classifier
from holdfast.recipes.training.optimisation import average

Statistics = Literal["running", "batch"]
"""statistics that batch norm uses: the running mean and variance, or those of the current batch"""


def twin(model: Classifier, statistics: Statistics = "running") -> Classifier:
    """Return a frozen copy of a network in eval mode, which shares the memory of the weights and running statistics
    with `model`.

    Updates in place, such as those of optimisers and batch norm, affect both. Attacks on the copy build no graph of the
    weights, do not change batch norm, and compute the gradient of images fast. With `statistics="batch"`, batch norm
    uses the statistics of the copy's own inputs and stores none.
    """
    copied = deepcopy(model).eval().requires_grad_(False)
    if statistics == "batch":
        for layer in copied.modules():
            if isinstance(layer, _BatchNorm):
                layer.running_mean = layer.running_var = (
                    None  # torch then uses the statistics of the batch, also in eval mode
                )
    shared = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, value in (*copied.named_parameters(), *copied.named_buffers()):
        _share(value, shared[name])
    # the matrix product is faster than the kernels of torch on a CPU only
    if next(copied.parameters()).device.type == "cpu":
        quicken_stems(copied)
    return copied


def _share(copied: Tensor, original: Tensor) -> None:
    copied.data = original.data


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
