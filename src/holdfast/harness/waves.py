"""Which examples a stage is run on, decided over all of them at once; and the waves of an attack told as one.

An attack that goes in waves begins with the examples that came nearest to falling and goes on while that pays: the
first wave is 1 / 2^waves of those that stand, each later one twice its forerunner but for the second, which is as large
as the first, none has fewer than `LEAST`, and a wave that breaks nothing is the last.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from holdfast.core.corruptions import Corruptions
from holdfast.core.draws import Draws
from holdfast.core.evidence import PARTIAL, Columns, Residual
from holdfast.core.types import Mask, PerExample
from holdfast.harness.detecting import undetected
from holdfast.harness.plan import Plan, Stage, Step
from holdfast.ops.sampling import sample_rows

MATRIX_ROWS = 500
"""Examples of the transfer matrix, and of each data set carried across, at most: a share is known to 4.5 points."""
LEAST = 32
"""Examples of a wave: fewer would prove little where they break nothing."""

AT_TIMES = 0.05
"""Adaptive attacks go on with an example that is broken but right in more than this share of the draws."""

_CONFIDENCE = 0.95


def due(stage: Stage, plan: Plan, by_stage: Mapping[str, Columns]) -> Mask:
    """The examples that a stage after the clean one is run on, of all of them."""
    clean = by_stage["clean"]
    eligible = clean["correct"] & clean["eligible"]
    if stage.kind == "attacked" or isinstance(plan.threat.constraint, Corruptions):
        return torch.ones_like(eligible)  # what is wrong on a clean image may be right on a corrupted one
    if stage.kind == "detection":
        return undetected(stage.aim, by_stage)
    if stage.kind == "transfer":
        chosen = torch.zeros_like(eligible)
        among = torch.ones_like(eligible) if plan.threat.goal is None else clean["y"] != plan.threat.goal
        chosen[sample_rows(clean, among, Draws(plan.seed).at("stage", stage.name), MATRIX_ROWS)] = True
        return chosen
    if stage.kind == "curve" or plan.smallest or plan.full:
        return eligible
    standing = eligible & ~broken(by_stage)
    if stage.adaptive:
        return standing | eligible & (_chance(by_stage) > AT_TIMES)
    if stage.member is None or not stage.member.waves:
        return standing
    earlier = [by_stage[name] for name in stage.earlier]
    if earlier and not earlier[-1]["success"].any():
        return torch.zeros_like(standing)
    tried = torch.stack([torch.zeros_like(standing), *(columns["ran"] for columns in earlier)]).any(0)
    began = int((standing & ~tried).sum() + tried.sum())
    share = math.ceil(began / 2 ** (stage.member.waves - max(len(earlier) - 1, 0)))
    last = len(earlier) == stage.member.waves
    return _lowest(standing & ~tried, _heights(plan, by_stage), began if last else max(share, LEAST))


def _heights(plan: Plan, by_stage: Mapping[str, Columns]) -> PerExample:
    """The lowest margin that each example was brought to; before any attack the clean one, if that is the goal's."""
    clean = by_stage["clean"]["margin"]
    lowest = clean if plan.threat.goal is None else torch.full_like(clean, torch.inf)
    for name, columns in by_stage.items():
        if name[0].isdigit():
            lowest = torch.where(columns["ran"], torch.minimum(lowest, columns["height"]), lowest)
    return lowest


def _chance(by_stage: Mapping[str, Columns]) -> Tensor:
    """Of a model that draws at random, the lowest share of draws in which each example is right; of others 0 or 1."""
    lowest = by_stage["clean"]["right"]
    for name, columns in by_stage.items():
        if name[0].isdigit():
            lowest = torch.where(columns["ran"], torch.minimum(lowest, columns["right"]), lowest)
    return lowest


def _lowest(among: Mask, heights: PerExample, n: int) -> Mask:
    """The `n` of lowest height; of equals, those that come first."""
    rows = among.nonzero()[:, 0]
    chosen = torch.zeros_like(among)
    chosen[rows[heights[rows].argsort(stable=True)[:n]]] = True
    return chosen


def broken(by_stage: Mapping[str, Columns]) -> Mask:
    """Which examples an attack of the suite has broken already."""
    gone = torch.zeros_like(by_stage["clean"]["correct"])
    for name, columns in by_stage.items():
        if name[0].isdigit():
            gone |= columns["success"]
    return gone


def gathered(steps: Sequence[Step], by_stage: Mapping[str, Columns]) -> dict[str, Columns]:
    """The columns of each stage, those of the waves of one attack joined under the name of the first."""
    joined = dict(by_stage)
    for step in steps:
        if not step.wave_of or step.name not in by_stage:
            continue
        first, wave = joined[step.wave_of], joined.pop(step.name)
        joined[step.wave_of] = {
            name: _either(name, first, wave, wave["ran"]) for name in dict.fromkeys((*first, *wave))
        }
    return joined


def _either(name: str, first: Columns, wave: Columns, ran: Mask) -> Tensor:
    """One column of both: each example's own, or all that were kept to look at."""
    if name not in wave or name not in first:
        return wave[name] if name in wave else first[name]
    if len(first[name]) == len(ran) and not name.startswith(PARTIAL):
        return torch.where(ran, wave[name], first[name])
    return torch.cat((first[name], wave[name]))


def most_left(held: int, waves: int) -> float:
    """The largest share of the others that would fall, where `held` all held in one of so many `waves`.

    With 95 % confidence: each wave may be the one that holds by luck, so each has its part of the other 5 %.
    """
    most: float = 1 - ((1 - _CONFIDENCE) / waves) ** (1 / held)
    return most


def residual(waves: Sequence[Columns], standing: int) -> Residual | None:
    """What an attack left alone of those that stood, and at what risk; None where it tried them all."""
    ran = [int(columns["ran"].sum()) for columns in waves]
    left, last = standing - sum(ran), max((k for k, n in enumerate(ran) if n), default=0)
    if left <= 0 or not ran[last] or waves[last]["success"].any():
        return None
    return Residual(left, most_left(ran[last], len(waves)))


def remark(attack: str, waves: Sequence[Columns], risk: Residual | None) -> tuple[str, ...]:
    """What must be said of an attack that stopped before it came to all that stood: at what risk."""
    if risk is None:
        return ()
    ran = [int(columns["ran"].sum()) for columns in waves]
    tried, last = sum(ran), next(n for n in reversed(ran) if n)
    said = (
        f"{attack} was run on {tried:,} of the {tried + risk.untried:,} that stood, lowest margins first. The last "
        f"{last:,} of them all held, so with 95 % confidence it would break at most {100 * risk.at_most:.1f} % of the "
        f"other {risk.untried:,}, if none of those is likelier to fall"
    )
    return (said,)
