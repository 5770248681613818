"""Estimates how long the judging of parameter sets takes, before a rotation begins and before an admission."""

from dataclasses import dataclass

import torch

from holdfast.attacks.costs import expected_passes
from holdfast.rotation.steps.contents import OWN
from holdfast.rotation.steps.rotation_request import RotateRequest
from holdfast.rotation.steps.set_measuring import WHITE
from holdfast.rotation.steps.transfer_examples import SAME_DRAW_SETS
from holdfast.rotation.transfer_attacks import ATTACKS
from holdfast.runs.assess.expected_time import duration, step_times

_SAMPLE, _BATCH = 8, 250  # examples on which passes are timed, and batch size of transfer attacks
_CRAFTED = (
    160  # gradients of all transfer attacks for each example and source; see `TransferAttacker.crafted`
)


@dataclass(frozen=True)
class ExpectedTime:
    """Lower and upper estimate of the seconds of a run."""

    least_s: float
    most_s: float

    def __str__(self) -> str:
        """Return the range as text.

        >>> str(ExpectedTime(2, 190))
        'about 2 s to 3.2 min'
        """
        texts = [duration(max(seconds, 1)) for seconds in (self.least_s, self.most_s)]
        return f"about {' to '.join(dict.fromkeys(texts))}"


def admission_time(
    common: RotateRequest, sizes: tuple[int, int, int], sets: int, references: int, stolen: int
) -> ExpectedTime:
    """Estimate how long it takes to judge `sets` parameter sets.

    `sizes` are the first numbers of held-out examples for transfer attacks, white-box attacks and attacks from the same
    draw; `references` is the number of sets that the candidates are compared with, and `stolen` the largest number of
    stolen sets. The least time is that of an admission whose transfer examples are stored and whose gates are clear on
    the first examples, and the most that of one that computes all of them on all held-out examples.
    """
    held_out = common.held_out
    sample = held_out.take(torch.arange(min(_SAMPLE, len(held_out)), device=held_out.ids.device))
    steps = step_times(common.model, common.threat, sample, _BATCH)
    forward_s, gradient_s = (step.of(_BATCH) / _BATCH for step in (steps.query, steps.gradient))
    passes = [expected_passes(member.attack, common.threat, common.model.classes or 2) for member in WHITE]
    white_s = sum(steps.of(each, _BATCH) for each in passes) / _BATCH

    def judging(transfer: int, white: int, same_draw: int) -> float:
        attackers = 2 + stolen
        each = len(ATTACKS) * attackers * transfer * forward_s + white * white_s
        return each + _CRAFTED * SAME_DRAW_SETS * same_draw * gradient_s

    n = len(held_out)
    several = 2 * min(stolen, OWN) if stolen > 1 else 0
    once = _CRAFTED * n * (OWN + stolen + several) * gradient_s + references * n * white_s
    least = sets * judging(*(min(size, n) for size in sizes))
    return ExpectedTime(least, once + sets * judging(n, n, n))
