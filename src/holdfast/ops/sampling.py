"""Random choices of distinct positions, and of examples independently of shards."""

import torch
from torch import Tensor

from holdfast.core.draws import Draws
from holdfast.core.evidence import Columns
from holdfast.core.types import Mask, Rows


def distinct_positions(draws: Tensor, m: int) -> Tensor:
    """Return `k` distinct positions below `m` for each row of uniform random numbers (n, k + 1).

    The last number of a row is a cyclic shift. All positions are equally likely; sets with neighbouring positions are
    slightly rarer than in a uniform choice.
    """
    k = draws.shape[1] - 1
    apart = (draws[:, :-1] * (m - k + 1)).long().sort(1).values + torch.arange(k, device=draws.device)
    return (apart + (draws[:, -1:] * m).long()) % m


def sample_rows(columns: Columns, among: Mask, rng: Draws, n: int) -> Rows:
    """Return at most `n` random rows of those in the mask `among`, in ascending order."""
    rows = among.nonzero()[:, 0]
    order = rng.at("sample").uniform(columns["id"][rows], 1, dtype=torch.float64)[:, 0].argsort(stable=True)
    return rows[order[:n]].sort().values
