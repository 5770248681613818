"""Votes of a classifier on randomly changed copies of inputs, and what they show about its smoothed classifier."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from holdfast.certifiers.protocol import Proofs, StatisticalProver
from holdfast.certifiers.smoothing.noise import MOST_DRAWS, numbered_noise
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Classifier, Model
from holdfast.core.outputs import refused
from holdfast.core.pieces import Room, in_room
from holdfast.core.purpose import judging
from holdfast.core.types import Ids, Inputs, Labels, Logits, Mask, Positive
from holdfast.statistics.sequential import SequentialTest, fewest_draws, sequential_test

_VALUES = 1 << 20  # values of noisy inputs in memory at once, and
_ROWS = 1024  # at most so many inputs: more are not faster on a CPU

FOR_WRONG = 0.01
"""share of the failure probability for the verdict that the prediction is wrong, which seven more draws make up for"""
_SELECTION = 100  # draws that choose the class at an attacked input, as in the paper
_HALF = 0.5

NO_CLASS = -1
"""vote for an output that is not a number, and for an input that the model or its server refuses"""


def votes_of(logits: Logits) -> Labels:
    """Return the predicted class of each input, or `NO_CLASS` if an output is NaN or the server refused the input.

    A model that rejects inputs votes for its additional last class.
    """
    none = refused(logits) | logits.isnan().any(1)
    return torch.where(none, NO_CLASS, logits.argmax(1))


def noisy_votes(
    model: Model,
    x: Inputs,
    ids: Ids,
    draws: range,
    sigma: Positive,
    *,
    rng: Draws,
    clip: bool = False,
) -> Tensor:
    """Return how often each class is predicted for noisy copies of each input, (n, classes + 1) int64.

    `draws` are the numbers of the draws, the same for all inputs; the noise is a function of `rng`, the id and the
    number. The last column counts `NO_CLASS`. With `clip` the noisy inputs are clamped to the bounds of the model.
    Cost: `len(draws)` forwards of each input, in batches that are halved if memory runs out.
    """

    def noisy(rows: Tensor, numbers: Tensor) -> Inputs:
        changed = x[rows] + sigma * numbered_noise(rng, ids[rows], numbers, x)
        return model.bounds.clamp(changed) if clip else changed

    size = max(1, min(_ROWS, _VALUES // max(1, math.prod(x.shape[1:]))))
    return counted_votes(model, ids, draws, noisy, size)


def counted_votes(
    model: Model, ids: Ids, draws: range, changed: Callable[[Tensor, Tensor], Inputs], size: int
) -> Tensor:
    """Return how often each class is predicted for the copies of each input, (n, classes + 1) int64.

    `changed` returns the copies of the inputs in given rows for given numbers of draws, and `size` is the largest
    number of copies of one call of the model.
    """
    n_pairs, n_draws = len(ids) * len(draws), len(draws)
    room, start, votes = Room(size), 0, torch.zeros(0)

    def predicted(size: int) -> tuple[Tensor, Labels, int]:
        pairs = torch.arange(start, min(start + size, n_pairs), device=ids.device)
        rows, numbers = pairs // n_draws, draws.start + pairs % n_draws
        logits = model(changed(rows, numbers), ids[rows])
        return rows, votes_of(logits), logits.shape[1]

    while start < n_pairs:
        with torch.no_grad():
            rows, predictions, classes = in_room(predicted, room, start, n_pairs - start)
        width = classes + 1
        if not start:
            votes = torch.zeros(len(ids) * width, dtype=torch.int64, device=ids.device)
        # -1 modulo the width is the last column
        votes += torch.bincount(rows * width + predictions % width, minlength=len(votes))
        start += len(rows)
    return votes.view(len(ids), -1)


def refuse_impossible(how: StatisticalProver) -> None:
    """Raise `UsageError` for a failure probability or a number of draws with which nothing can be shown."""
    if not 0 < how.failure_probability < 1:
        raise UsageError(
            f"failure_probability is {how.failure_probability}; it must be between 0 and 1, such as 0.001: no "
            "number of draws makes a statistical certificate certain"
        )
    if not 1 <= how.draws < MOST_DRAWS:
        raise UsageError(f"draws is {how.draws}; it must be from 1 to {MOST_DRAWS - 1:,}, such as 10000")


@dataclass(frozen=True)
class Counting:
    """Tests of the predictions of the smoothed classifier of a model by votes on changed copies of inputs."""

    how: StatisticalProver
    model: Classifier

    @property
    def rng(self) -> Draws:
        """Source of the changes for certificates."""
        return Draws(self.how.seed).at(self.how.place, "certify")

    def proofs(
        self,
        test: SequentialTest,
        batch: Batch,
        eps: float,
        radius: Callable[[float], float],
        bound: Callable[[Tensor], Tensor],
    ) -> Proofs:
        """Return what a test of the label shows about the smoothed classifier at the examples of a batch.

        `radius` returns the certified radius for an upper limit of the probability of another class than the label, and
        `bound` the lower bounds of the margin within `eps`.
        """
        if not len(batch):
            none = Proofs.none(batch)
            return replace(none, radius=none.bound, abstained=none.certified)
        votes, look = self._run(test, batch, 0, self.rng)
        work = votes.sum(1)
        misses = work - votes.gather(1, batch.y[:, None])[:, 0]
        certified = misses <= torch.tensor(test.proves, device=look.device)[look]
        ends = zip(look.tolist(), misses.tolist(), strict=True)
        limits = [test.upper_limit(at, count) for at, count in ends]
        upper = torch.tensor(limits, dtype=torch.float64, device=look.device)
        broken, more = self._wrong(test, batch, votes, look, certified)
        radii = batch.x.new_tensor(list(map(radius, limits)), dtype=torch.float64)
        radii = torch.where(certified, radii.clamp_min(eps), radii).masked_fill(broken, 0.0)
        return Proofs(
            certified,
            bound(upper),
            work + more,
            torch.zeros_like(certified),
            batch.x,
            broken,
            radius=radii,
            abstained=~broken & (upper >= _HALF),
        )

    def refuted(self, batch: Batch) -> Mask:
        """Return for attacked inputs `batch.x` whether the smoothed classifier predicts another class than the label
        there.

        A result of true is wrong with a probability of at most the failure probability of the settings. The noise is
        independent of that of a certificate and of `Smoothed` as a network, which attacks use. The other class is the
        most frequent one in 100 draws.
        """
        how, rng = self.how, self.rng.at("refute")
        refuted = torch.zeros_like(batch.ids, dtype=torch.bool)
        if not len(batch):
            return refuted
        with judging():
            votes = how.votes(self.model, batch.x, batch.ids, range(_SELECTION), rng=rng)
        rival = votes[:, :-1].argmax(1)
        rows = (rival != batch.y).nonzero()[:, 0]
        draws = max(how.draws, fewest_draws(_HALF, how.failure_probability))
        test = sequential_test(_HALF, draws, how.failure_probability)
        refuted[rows] = self._shown(test, batch.take(rows).labelled(rival[rows]), _SELECTION, rng)[0]
        return refuted

    def _run(self, test: SequentialTest, batch: Batch, begin: int, rng: Draws) -> tuple[Tensor, Labels]:
        """The votes on the draws of each example from `begin` on until the test of its label ends, and the index of the
        look at which it ends.
        """
        look, before = torch.zeros_like(batch.ids), 0
        open_rows, votes = torch.arange(len(batch), device=batch.ids.device), torch.zeros(0)
        for at, n in enumerate(test.looks):
            part, numbers = batch.take(open_rows), range(begin + before, begin + n)
            with judging():
                new = self.how.votes(self.model, part.x, part.ids, numbers, rng=rng)
            votes = votes if at else torch.zeros_like(new)
            votes[open_rows] += new
            look[open_rows] = at
            misses = n - votes[open_rows].gather(1, part.y[:, None])[:, 0]
            open_rows = open_rows[(misses > test.proves[at]) & (misses < test.gives_up[at])]
            before = n
            if not len(open_rows):
                break
        return votes, look

    def _wrong(
        self, of_label: SequentialTest, batch: Batch, votes: Tensor, look: Labels, certified: Mask
    ) -> tuple[Mask, Tensor]:
        """Where the smoothed classifier is wrong at the clean input, and the number of draws that show it.

        The other class is the most frequent one so far. It is tested on the draws that follow, which are independent of
        this choice.
        """
        how, wrong, work = self.how, torch.zeros_like(certified), torch.zeros_like(batch.ids)
        alpha = FOR_WRONG * how.failure_probability
        rival = votes[:, :-1].argmax(1)
        tried = ~certified & (rival != batch.y)
        for at in sorted(set(look[tried].tolist())):
            rows = (tried & (look == at)).nonzero()[:, 0]
            begin = of_label.looks[at]
            if how.draws - begin < fewest_draws(_HALF, alpha):
                continue
            other = batch.take(rows).labelled(rival[rows])
            test = sequential_test(_HALF, how.draws - begin, alpha)
            wrong[rows], work[rows] = self._shown(test, other, begin, self.rng)
        return wrong, work

    def _shown(self, test: SequentialTest, batch: Batch, begin: int, rng: Draws) -> tuple[Mask, Tensor]:
        """Whether a test proves that the smoothed classifier predicts the label of each example, and the number of
        draws from `begin` on that it needs.
        """
        if not len(batch):
            return torch.zeros_like(batch.ids, dtype=torch.bool), torch.zeros_like(batch.ids)
        votes, look = self._run(test, batch, begin, rng)
        work = votes.sum(1)
        misses = work - votes.gather(1, batch.y[:, None])[:, 0]
        return misses <= torch.tensor(test.proves, device=look.device)[look], work
