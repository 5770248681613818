"""Averages of the weights on their way, which generalise better than where the way ends.

EMA: Polyak & Juditsky, "Acceleration of Stochastic Approximation by Averaging", SIAM Journal on Control and
Optimization 30(4), 1992, in the exponential form that is customary now. SWA: Izmailov et al., "Averaging Weights Leads
to Wider Optima and Better Generalization", UAI 2018, arXiv:1803.05407. Differs from the paper: the running statistics
of batch norm are averaged as the weights are, and not computed anew by a pass over the training data, for those belong
to clean inputs, and the statistics of an adversarial training to attacked ones; and the learning rate is that of the
training, where the paper has its own cycles.
"""

import torch
from torch import Tensor, nn


def ema(average: dict[str, Tensor], model: nn.Module, keep: float, step: int) -> None:
    """Move the average towards the weights, faster at first, so that no start lingers."""
    _moved(average, model, 1 - min(keep, (step + 1) / (step + 10)))


def swa(average: dict[str, Tensor], model: nn.Module, place: int) -> None:
    """Make the average the plain mean of `place` weights before and those of now."""
    _moved(average, model, 1 / (1 + place))


@torch.no_grad()
def _moved(average: dict[str, Tensor], model: nn.Module, share: float) -> None:
    """What is no fraction, such as a count of batches, is taken as it is."""
    for name, value in model.state_dict().items():
        if value.is_floating_point() and share < 1:
            average[name].lerp_(value, share)
        else:
            average[name].copy_(value)
