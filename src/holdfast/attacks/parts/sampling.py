"""Random choices of distinct positions, and random choices of examples that do not depend on shards."""

import torch
from torch import Tensor

from holdfast.core.draws import Draws
from holdfast.core.evidence import Columns
from holdfast.core.types import Mask, Rows


def distinct_positions(draws: Tensor, m: int) -> Tensor:
    """Convert each row of `k + 1` uniform random numbers to `k` distinct random positions from 0 to `m` - 1.

    The last number of a row is a cyclic shift. All positions are equally likely; sets with neighbouring positions are
    slightly rarer than in a uniform choice.
    """
    k = draws.shape[1] - 1
    positions = (draws[:, :-1] * (m - k + 1)).long().sort(1).values + torch.arange(k, device=draws.device)
    return (positions + (draws[:, -1:] * m).long()) % m


def sample_rows(columns: Columns, among: Mask, rng: Draws, n: int) -> Rows:
    """Return the positions of at most `n` random examples among those of the mask `among`, in ascending order."""
    rows = among.nonzero()[:, 0]
    order = rng.at("sample").uniform(columns["id"][rows], 1, dtype=torch.float64)[:, 0].argsort(stable=True)
    return rows[order[:n]].sort().values
