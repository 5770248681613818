"""Selects the examples that a stage is run on, over all examples at once; and combines the waves of an attack.

An attack with waves starts with the examples of the lowest margins and continues while it succeeds: the first wave
has 1 / 2^waves of the surviving examples, the second as many, each later one twice as many. No wave has fewer than
`LEAST` examples, and a wave that breaks none is the last.
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
from holdfast.harness.plan import Plan, Stage, StageOutline
from holdfast.ops.sampling import sample_rows

MATRIX_ROWS = 500
"""Largest number of examples in the transfer matrix, and of each data set in the transfer across data sets; a share
is then known to 4.5 percentage points."""
LEAST = 32
"""Smallest number of examples in a wave: with fewer, a wave without success shows little."""

AT_TIMES = 0.05
"""Adaptive attacks continue with a broken example that is correct in more than this share of the votes."""

_CONFIDENCE = 0.95


def due_examples(stage: Stage, plan: Plan, by_stage: Mapping[str, Columns]) -> Mask:
    """Mask of the examples that a stage after the clean one is run on."""
    clean = by_stage["clean"]
    eligible = clean["correct"] & clean["eligible"]
    if stage.kind == "attacked" or isinstance(plan.threat.constraint, Corruptions):
        return torch.ones_like(eligible)  # a misclassified image may be classified correctly when corrupted
    if stage.kind == "detection":
        return undetected(stage.aim, by_stage)
    if stage.kind == "transfer":
        chosen = torch.zeros_like(eligible)
        among = torch.ones_like(eligible) if plan.threat.goal is None else clean["y"] != plan.threat.goal
        chosen[sample_rows(clean, among, Draws(plan.seed).at("stage", stage.name), MATRIX_ROWS)] = True
        return chosen
    if stage.kind == "curve" or plan.smallest or plan.full:
        return eligible
    standing = eligible & ~broken_by_suite(by_stage)
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
    """The lowest margin reached for each example; the clean margin is included for an untargeted threat model."""
    clean = by_stage["clean"]["margin"]
    lowest = clean if plan.threat.goal is None else torch.full_like(clean, torch.inf)
    for name, columns in by_stage.items():
        if name[0].isdigit():
            lowest = torch.where(columns["ran"], torch.minimum(lowest, columns["height"]), lowest)
    return lowest


def _chance(by_stage: Mapping[str, Columns]) -> Tensor:
    """The lowest share of votes in which each example is correct; 0 or 1 for a deterministic model."""
    lowest = by_stage["clean"]["right"]
    for name, columns in by_stage.items():
        if name[0].isdigit():
            lowest = torch.where(columns["ran"], torch.minimum(lowest, columns["right"]), lowest)
    return lowest


def _lowest(among: Mask, heights: PerExample, n: int) -> Mask:
    """The `n` examples of lowest margin; the first ones among equals."""
    rows = among.nonzero()[:, 0]
    chosen = torch.zeros_like(among)
    chosen[rows[heights[rows].argsort(stable=True)[:n]]] = True
    return chosen


def broken_by_suite(by_stage: Mapping[str, Columns]) -> Mask:
    """Mask of the examples that an attack of the suite has broken."""
    gone = torch.zeros_like(by_stage["clean"]["correct"])
    for name, columns in by_stage.items():
        if name[0].isdigit():
            gone |= columns["success"]
    return gone


def joined_waves(steps: Sequence[StageOutline], by_stage: Mapping[str, Columns]) -> dict[str, Columns]:
    """The columns of each stage; the waves of one attack are joined under the name of the first."""
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
    """One column of both: the value of the wave that ran on the example, or all stored inputs."""
    if name not in wave or name not in first:
        return wave[name] if name in wave else first[name]
    if len(first[name]) == len(ran) and not name.startswith(PARTIAL):
        return torch.where(ran, wave[name], first[name])
    return torch.cat((first[name], wave[name]))


def most_left(held: int, waves: int) -> float:
    """Upper bound on the share of untried examples that would break, after a wave that broke none of `held`.

    The confidence is 95 %. Any of the `waves` could be the last one by chance, so the error is divided among them.
    """
    most: float = 1 - ((1 - _CONFIDENCE) / waves) ** (1 / held)
    return most


def residual(waves: Sequence[Columns], standing: int) -> Residual | None:
    """How many surviving examples an attack did not try, and the upper bound on the share it would break.

    None if it tried all.
    """
    ran = [int(columns["ran"].sum()) for columns in waves]
    left, last = standing - sum(ran), max((k for k, n in enumerate(ran) if n), default=0)
    if left <= 0 or not ran[last] or waves[last]["success"].any():
        return None
    return Residual(left, most_left(ran[last], len(waves)))


def remark(attack: str, waves: Sequence[Columns], risk: Residual | None) -> tuple[str, ...]:
    """A note on an attack that stopped before it had tried all surviving examples, with the risk."""
    if risk is None:
        return ()
    ran = [int(columns["ran"].sum()) for columns in waves]
    tried, last = sum(ran), next(n for n in reversed(ran) if n)
    said = (
        f"{attack} was run on {tried:,} of the {tried + risk.untried:,} robust examples, lowest margins "
        f"first. The last {last:,} all survived, so with 95 % confidence it would break at most "
        f"{100 * risk.at_most:.1f} % of the other {risk.untried:,}, if none of those is more likely to be broken"
    )
    return (said,)
