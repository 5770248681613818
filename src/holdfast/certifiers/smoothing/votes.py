"""Votes of a classifier on noisy copies of inputs, which randomised smoothing counts."""

import math

import torch
from torch import Tensor

from holdfast.certifiers.smoothing.noise import numbered_noise
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.outputs import refused
from holdfast.core.pieces import Room, in_room
from holdfast.core.types import Ids, Inputs, Labels, Logits, Positive

_VALUES = 1 << 20  # values of noisy inputs in memory at once, and
_ROWS = 1024  # at most so many inputs: more are not faster on a CPU

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
    n_pairs, n_draws = len(x) * len(draws), len(draws)
    size = max(1, min(_ROWS, _VALUES // max(1, math.prod(x.shape[1:]))))
    room, start, votes = Room(size), 0, torch.zeros(0)

    def predicted(size: int) -> tuple[Tensor, Labels, int]:
        pairs = torch.arange(start, min(start + size, n_pairs), device=ids.device)
        rows, numbers = pairs // n_draws, draws.start + pairs % n_draws
        noisy = x[rows] + sigma * numbered_noise(rng, ids[rows], numbers, x)
        logits = model(model.bounds.clamp(noisy) if clip else noisy, ids[rows])
        return rows, votes_of(logits), logits.shape[1]

    while start < n_pairs:
        with torch.no_grad():
            rows, predictions, classes = in_room(predicted, room, start, n_pairs - start)
        width = classes + 1
        if not start:
            votes = torch.zeros(len(x) * width, dtype=torch.int64, device=ids.device)
        # -1 modulo the width is the last column
        votes += torch.bincount(rows * width + predictions % width, minlength=len(votes))
        start += len(rows)
    return votes.view(len(x), -1)
