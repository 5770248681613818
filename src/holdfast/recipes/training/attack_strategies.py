"""Strategies of attacks in training: for each example a loss, a number of steps, a step size and a start."""

from typing import Final

import torch
from torch import Tensor

from holdfast.attacks.parts.ascent import gradient
from holdfast.attacks.parts.losses import cross_entropy, dlr
from holdfast.core.batch import Batch
from holdfast.core.constraints import Constraint
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.per_example import spread
from holdfast.core.types import Inputs, Logits, PerExample
from holdfast.recipes.training.divergences import kullback_leibler

_LOSSES: Final = ("cross-entropy", "dlr", "kl")
STEPS: Final = (1, 2, 4, 7, 10)
"""numbers of gradient steps"""
_SIZES: Final = (0.25, 0.5, 1.0)  # in multiples of eps
_STARTS: Final = ("near", "anywhere")
_NEAR = 0.1  # of the way to a random point of the ball: at the input itself, the divergence has no gradient

ALTERNATIVES: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("loss", _LOSSES),
    ("steps", tuple(map(str, STEPS))),
    ("step size", tuple(f"{size:g} eps" for size in _SIZES)),
    ("start", _STARTS),
)
"""parts of a strategy, each with its alternatives; the start is a random point of the ball, or near the input"""
_LOSS, _STEP, _SIZE, _START = range(len(ALTERNATIVES))


def steps_of(choices: Tensor) -> Tensor:
    """Return the number of steps of each strategy, int64 (n). A strategy is a row of `choices` (n, parts), with the
    position of the chosen alternative of each part.
    """
    return torch.tensor(STEPS, device=choices.device)[choices[:, _STEP]]


def attacked(
    model: Model,
    batch: Batch,
    constraint: Constraint,
    choices: Tensor,
    clean: Logits,
    rng: Draws,
    *,
    whole: bool = False,
) -> Inputs:
    """Return the inputs of a batch after the attack of each example's strategy in `choices` (n, parts), which is
    gradient ascent without a choice among its points.

    `clean` are the logits of the clean inputs. Examples whose attack has ended are left out of the passes; with
    `whole`, each pass contains the whole batch, as batch norm with the statistics of the batch needs it. Cost: as many
    forwards and backwards of an example as its strategy has steps.
    """
    anywhere = constraint.sample(batch, model.bounds, rng.at("start"))
    share = torch.where(choices[:, _START] == 0, _NEAR, 1.0).to(batch.x)
    x_adv = torch.lerp(batch.x, anywhere, spread(share, batch.x))
    n_steps = steps_of(choices)
    sizes = (
        constraint.eps * torch.tensor(_SIZES, dtype=batch.x.dtype, device=batch.x.device)[choices[:, _SIZE]]
    )
    for step in range(int(n_steps.max())):
        moving = n_steps > step
        rows = torch.arange(len(batch), device=batch.x.device) if whole else moving.nonzero()[:, 0]
        part, x = batch.take(rows), x_adv[rows]
        grad = _gradient(model, part.at(x), choices[rows, _LOSS], clean[rows])
        climb = constraint.steepest(grad, x, model.bounds)
        stepped = x + climb * spread((sizes * moving)[rows].to(x), x)
        x_adv = x_adv.index_copy(0, rows, constraint.project(stepped, part.x, model.bounds))
    return x_adv


def _gradient(model: Model, batch: Batch, losses: Tensor, clean: Logits) -> Inputs:
    """The gradient of the chosen loss of each example."""

    def loss(logits: Logits, examples: Batch) -> PerExample:
        values = (cross_entropy(logits, examples), dlr(logits, examples), kullback_leibler(logits, clean))
        return torch.stack(values).gather(0, losses[None])[0]

    return gradient(model, batch, loss)[0]
