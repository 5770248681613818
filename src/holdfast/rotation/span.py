"""The span of a collection: exact principal components of parameter sets of any size.

Turk & Pentland, "Eigenfaces for Recognition", Journal of Cognitive Neuroscience 3(1), 1991: the components of a few
long vectors follow from their n x n Gram matrix. It is summed over the tensors, so no second matrix of all
parameters is needed in memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.core.errors import UsageError
from holdfast.core.types import Steps
from holdfast.rotation.members import Members

_NOTHING = 1e-10  # eigenvalues below this share of the largest are rounding errors
_ROUNDING = (
    1e-12  # if all differences are below this share of the sets' squared norm, they are rounding errors
)
_AT_ONCE = 1 << 18  # columns that are converted to double precision at a time


@dataclass(frozen=True)
class Span:
    """A mean parameter set and orthonormal directions; a set is the mean plus a combination of the directions."""

    mean: dict[str, Tensor]
    directions: dict[str, Tensor]
    """each tensor has shape (rank, *shape); flattened and joined, the rows are orthonormal"""
    kept: float
    """share of the variance of the collection along the directions"""

    @property
    def rank(self) -> int:
        """Number of principal directions."""
        return len(next(iter(self.directions.values())))

    @property
    def parameters(self) -> int:
        """Number of parameters of one set."""
        return sum(value.numel() for value in self.mean.values())

    def coordinates(self, members: Members) -> Tensor:
        """Coefficients of the directions for each set, (n, rank), float64."""
        coefficients = torch.zeros(len(members), self.rank, dtype=torch.float64)
        for name, value in members.tensors.items():
            pieces = zip(_pieces(value - self.mean[name]), _pieces(self.directions[name]), strict=True)
            for some, rows in pieces:
                coefficients += (some @ rows.T).cpu()
        return coefficients.to(value.device)

    def sets(self, coordinates: Tensor) -> dict[str, Tensor]:
        """The parameter sets at `coordinates` (n, rank), each tensor (n, *shape)."""
        return {
            name: mean + torch.einsum("nr,r...->n...", coordinates.to(mean), self.directions[name])
            for name, mean in self.mean.items()
        }

    def at(self, coordinates: Tensor, columns: Tensor) -> Tensor:
        """Parameters at positions `columns` (k) of the flattened sets at `coordinates` (n, rank), shape (n, k)."""
        rows = torch.cat([value.flatten(1) for value in self.directions.values()], 1)[:, columns]
        mean = torch.cat([value.flatten() for value in self.mean.values()])[columns]
        return mean + coordinates.to(rows) @ rows


def span(members: Members, rank: Steps | None = None) -> Span:
    """The mean and the `rank` principal directions of a collection; by default all directions.

    With all directions the sets are recovered exactly, except for components below 1e-5 of the largest, which are
    treated as rounding. Raises `UsageError` for fewer than two sets, or if all sets are equal.
    """
    if len(members) < 2:
        raise UsageError(
            f"the collection contains {len(members)} parameter set; at least two are needed to compute their "
            "differences"
        )
    mean = {name: value.mean(0) for name, value in members.tensors.items()}
    gram, size = torch.zeros(len(members), len(members), dtype=torch.float64), 0.0
    for name, value in members.tensors.items():
        size += float(value.double().square().sum())
        for some in _pieces(value - mean[name]):
            gram += (some @ some.T).cpu()
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    if values[0] <= _ROUNDING * size:
        raise UsageError(
            "all parameter sets of the collection are equal; collect sets of different training runs"
        )
    within = int((values > _NOTHING * values[0]).sum())
    n_directions = within if rank is None else min(rank, within)
    mixes = vectors[:, :n_directions] / values[:n_directions].sqrt()
    directions = {}
    for name, value in members.tensors.items():
        pieces = [mixes.T.to(some.device) @ some for some in _pieces(value - mean[name])]
        directions[name] = torch.cat(pieces, 1).to(value).view(n_directions, *value.shape[1:])
    return Span(mean, directions, float(values[:n_directions].sum() / values.sum()))


def _pieces(rows: Tensor) -> Iterator[Tensor]:
    """Yield consecutive blocks of columns in double precision."""
    for some in torch.split(rows.flatten(1), _AT_ONCE, 1):
        yield some.double()
