"""Attacks that are written as one walk for each example: a generator that yields queries and is sent their answers, of
which some are rejections. The walks of a batch are followed together, one query of each at a time.
"""

from collections.abc import Callable, Generator

import torch
from torch import Tensor

from holdfast.attacks.parts.losses import margin
from holdfast.core.batch import Batch
from holdfast.core.constraints import Norm, allowed
from holdfast.core.draws import Draws
from holdfast.core.model import Bounds, Model
from holdfast.core.outputs import refused
from holdfast.core.types import Inputs

Answer = float | None
"""margin of a query, or None if it was rejected"""
Walk = Generator[Tensor, Answer, None]
"""attack on one example: it yields queries (*features) and is sent their answers"""


class Example:
    """One attacked example: its input `x` (*features), the radius `eps`, the limit of queries, and its random numbers,
    which are different in each call.
    """

    def __init__(self, batch: Batch, row: int, norm: Norm, bounds: Bounds, rng: Draws, limit: int) -> None:
        self.x, self.eps, self.limit = batch.x[row], norm.eps, limit
        self._norm, self._bounds = norm, bounds
        self._rng, self._ids, self._n_draws = rng, batch.ids[row : row + 1], 0

    def ball(self, x: Tensor) -> Tensor:
        """Return the nearest allowed input (*features) to `x`."""
        projected: Tensor = self._norm.project(x[None], self.x[None], self._bounds)[0]
        return projected

    def box(self, x: Tensor) -> Tensor:
        """Return `x` with each value clamped to its valid range."""
        return self._bounds.clamp(x[None])[0]

    def uniform(self, *shape: int) -> Tensor:
        """Return uniform random numbers in [0, 1) of a shape."""
        return self._next().uniform(self._ids, *shape, dtype=self.x.dtype)[0]

    def signs(self, *shape: int) -> Tensor:
        """Return random signs of a shape."""
        return self._next().signs(self._ids, *shape, dtype=self.x.dtype)[0]

    def normal(self) -> Tensor:
        """Return standard normal random numbers (*features)."""
        return self._next().normal(self._ids, *self.x.shape, dtype=self.x.dtype)[0]

    def direction(self, length: float) -> Tensor:
        """Return a random vector (*features) with an L2 norm of `length`."""
        noise = self.normal()
        return noise * (length / max(float(noise.norm()), 1e-12))

    def _next(self) -> Draws:
        self._n_draws += 1
        return self._rng.at("draw", self._n_draws)


def follow(
    model: Model, batch: Batch, norm: Norm, walk: Callable[[Example], Walk], limit: int, rng: Draws
) -> Inputs:
    """Begin a walk for each example, send their queries to the model, one of each example in each call, and return the
    first allowed and accepted input that breaks the model (n, *features), or the clean input.

    A walk ends when it breaks the model, after `limit` queries, or when it gives up. Rejected inputs are those that the
    model marks, as `holdfast.core.outputs.refused` states.
    """
    result = batch.x.clone()
    walks = [walk(Example(batch, row, norm, model.bounds, rng, limit)) for row in range(len(batch))]
    queries = {row: next(walk) for row, walk in enumerate(walks)}
    for _ in range(limit):
        if not queries:
            break
        rows, x = torch.tensor(list(queries)), torch.stack(list(queries.values()))
        queried = batch.take(rows)
        with torch.no_grad():
            logits = model(x, queried.ids)
        rejected = refused(logits)
        margins = margin(logits.masked_fill(rejected[:, None], 0.0), queried)
        broken = ~rejected & ~(margins > 0) & allowed(norm, x, queried.x, model.bounds)
        result[rows[broken]] = x[broken]
        answers = [None if r else m for m, r in zip(margins.tolist(), rejected.tolist(), strict=True)]
        for row, answer, done in zip(rows.tolist(), answers, broken.tolist(), strict=True):
            del queries[row]
            if not done:
                try:
                    queries[row] = walks[row].send(answer)
                except StopIteration:
                    continue
    return result


def asked(x: Tensor) -> Generator[Tensor, Answer, Answer]:
    """Query one input and return the answer."""
    answer = yield x
    return answer


def least_size(
    attempt: Callable[[float], Generator[Tensor, Answer, Answer]],
    low: float,
    high: float,
    halvings: int,
    trials: int,
    rejections: int,
) -> Generator[Tensor, Answer, float]:
    """Search for the smallest size from `low` to `high` at which at most `rejections` of `trials` proposals are
    rejected; return `high` if there is none. The interval of the logarithm of the size is halved `halvings` times.
    """
    for _ in range(halvings):
        middle, n_rejected = (low * high) ** 0.5, 0
        for _ in range(trials):
            answer = yield from attempt(middle)
            n_rejected += answer is None
            if n_rejected > rejections:
                break
        if n_rejected <= rejections:
            high = middle
        else:
            low = middle
    return high
