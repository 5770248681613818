"""Selects the examples that a stage is run on, and combines the parts of an attack that tries its examples in several
waves.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from holdfast.core.evidence import Columns, Residual, in_table
from holdfast.core.types import Mask
from holdfast.runs.harness.stage import Schedule, Stage, StageOutline, certified_in

_CONFIDENCE = 0.95  # of the bounds of all waves of an attack together


def due_examples(stage: Stage, plan: Schedule, by_stage: Mapping[str, Columns]) -> Mask | None:
    """Return the mask of the examples that a stage is run on, or None for the clean stage, which is run on all
    examples.
    """
    due = stage.kind.due(stage, plan, by_stage)
    if due is not None and plan.threat.constraint.judges_misclassified:
        return torch.ones_like(due)  # a misclassified image may be classified correctly when corrupted
    return due


def only_tested(stage: Stage, plan: Schedule, by_stage: Mapping[str, Columns]) -> Mask | None:
    """Return the mask of the certified examples, on which an attack of the suite is a short test of the certificates.
    None for other stages, and if every attack is run on every example.
    """
    complete = plan.full or plan.smallest or not stage.kind.in_suite
    return None if complete else certified_in(plan.stages(), by_stage)


def joined_waves(steps: Sequence[StageOutline], by_stage: Mapping[str, Columns]) -> dict[str, Columns]:
    """Return the columns of all stages. An attack that tried its examples in several waves has one entry, under the
    name of its first wave.
    """
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
    if len(first[name]) == len(ran) and not in_table(name):
        return torch.where(ran, wave[name], first[name])
    return torch.cat((first[name], wave[name]))


def untried_bound(n_unbroken: int, waves: int) -> float:
    """Return an upper bound, with 95 % confidence, on the fraction of untried examples that an attack would break if it
    broke none of the last `n_unbroken` examples.

    Any of the `waves` could be the last one by chance, so the error probability is divided
    among them.
    """
    most: float = 1 - ((1 - _CONFIDENCE) / waves) ** (1 / n_unbroken)
    return most


def residual(waves: Sequence[Columns], surviving: int) -> Residual | None:
    """Return the number of surviving examples that an attack has not tried, and an upper bound on the fraction of them
    that it would break.

    Returns None if the attack tried all of them.
    """
    ran = [int(columns["ran"].sum()) for columns in waves]
    untried, last = surviving - sum(ran), max((k for k, n in enumerate(ran) if n), default=0)
    # the bound needs a last wave that broke no example
    if untried <= 0 or not ran[last] or waves[last]["success"].any():
        return None
    return Residual(untried, untried_bound(ran[last], len(waves)))


def remark(waves: Sequence[Columns], risk: Residual | None) -> tuple[str, ...]:
    """Return a note on an attack that stopped before it had tried all surviving examples, with a bound on the fraction
    that it would break.
    """
    if risk is None:
        return ()
    ran = [int(columns["ran"].sum()) for columns in waves]
    tried, last = sum(ran), next(n for n in reversed(ran) if n)
    note = (
        f"it was run on {tried:,} of the {tried + risk.untried:,} robust examples, lowest margins "
        f"first. The last {last:,} all survived, so with 95 % confidence it would break at most "
        f"{100 * risk.at_most:.1f} % of the other {risk.untried:,}, if none of those is more likely to be broken"
    )
    return (note,)
