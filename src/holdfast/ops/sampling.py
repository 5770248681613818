"""Random choices: of positions, with few random numbers, and of examples, whatever shards they lie in."""

import torch
from torch import Tensor

from holdfast.core.draws import Draws
from holdfast.core.evidence import Columns
from holdfast.core.types import Mask, Rows


def distinct(draws: Tensor, m: int) -> Tensor:
    """As many different positions below `m` as there are uniform draws (n, k + 1) but one, which turns them round.

    Each position is as likely as any other; sets of neighbours are a little rarer than in a fair draw.
    """
    k = draws.shape[1] - 1
    apart = (draws[:, :-1] * (m - k + 1)).long().sort(1).values + torch.arange(k, device=draws.device)
    return (apart + (draws[:, -1:] * m).long()) % m


def sample_rows(columns: Columns, among: Mask, rng: Draws, n: int) -> Rows:
    """At most `n` of the marked rows, in their order."""
    rows = among.nonzero()[:, 0]
    order = rng.at("sample").uniform(columns["id"][rows], 1, dtype=torch.float64)[:, 0].argsort(stable=True)
    return rows[order[:n]].sort().values
