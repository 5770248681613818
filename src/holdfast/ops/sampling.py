"""Random choices that need few random numbers."""

import torch
from torch import Tensor


def distinct(draws: Tensor, m: int) -> Tensor:
    """As many different positions below `m` as there are uniform draws (n, k + 1) but one, which turns them round.

    Each position is as likely as any other; sets of neighbours are a little rarer than in a fair draw.
    """
    k = draws.shape[1] - 1
    apart = (draws[:, :-1] * (m - k + 1)).long().sort(1).values + torch.arange(k, device=draws.device)
    return (apart + (draws[:, -1:] * m).long()) % m
