"""Averages of the weights during training, which generalise better than the last weights.

EMA: Polyak & Juditsky, "Acceleration of Stochastic Approximation by Averaging", SIAM Journal on Control and
Optimization 30(4), 1992, in the exponential form that is customary now. SWA: Izmailov et al., "Averaging Weights Leads
to Wider Optima and Better Generalization", UAI 2018, arXiv:1803.05407. Differs from the paper: the running statistics
of batch norm are averaged like the weights and not recomputed in a pass over the training data, because such a pass
gives statistics of clean inputs and adversarial training has statistics of attacked inputs; and the learning rate is
that of the training, where the paper has its own cycles.
"""

import torch
from torch import Tensor, nn


def ema(average: dict[str, Tensor], model: nn.Module, keep: float, step: int) -> None:
    """Update the exponential moving average in place. Its decay is smaller at first, so that the initial weights are
    forgotten.
    """
    _moved(average, model, 1 - min(keep, (step + 1) / (step + 10)))


def swa(average: dict[str, Tensor], model: nn.Module, place: int) -> None:
    """Update the average in place to the mean of `place` earlier weights and the current ones."""
    _moved(average, model, 1 / (1 + place))


@torch.no_grad()
def _moved(average: dict[str, Tensor], model: nn.Module, share: float) -> None:
    """Move the average by `share` towards the model; integer tensors, such as counts of batches, are copied."""
    for name, value in model.state_dict().items():
        if value.is_floating_point() and share < 1:
            average[name].lerp_(value, share)
        else:
            average[name].copy_(value)
