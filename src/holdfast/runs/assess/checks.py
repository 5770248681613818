"""Checks the model, the data, the threat model and the gates before a measurement, and chooses the batch size."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from holdfast.attacks.parts.prepare import multiply_adds
from holdfast.core.batch import UNLABELLED, Batch, Data
from holdfast.core.constraints import L1, L2, Constraint, Linf, extent
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.evidence import Columns, Evidence
from holdfast.core.labels import off_range
from holdfast.core.model import Bounds
from holdfast.core.names import size_text, threat_text
from holdfast.core.pieces import Room
from holdfast.core.remedies import Remedy
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Inputs, Logits
from holdfast.gates.grammar import Claim
from holdfast.gates.judging import Doubts, judge, refuse_rotation
from holdfast.io.doctor import FILLED, share_filled
from holdfast.io.remote.value_ranges import (
    BYTES,
    before_normalisation,
    extremes,
    outside,
    pixel_divisor,
    range_of_training,
)
from holdfast.runs.harness import Context, Plan, Target, Work, evidence_from

_PIECE = 1024
"""examples that are read at once to find the range of the labels"""
_WORTH_SHARING = 5_000_000
"""Multiplications for an example above which more threads are faster: between a LeNet and four convolutions without
strides."""


@contextmanager
def enough_threads(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Context manager in which torch uses one thread for a network that is too small to benefit from more.

    For a small network, the synchronisation of threads at every layer costs more than the threads gain, especially on a
    busy machine. The number of threads is restored on exit. If the user set `OMP_NUM_THREADS`, the number is not
    changed.
    """
    small = "OMP_NUM_THREADS" not in os.environ and multiply_adds(model, x) < _WORTH_SHARING
    with threads(1 if small else torch.get_num_threads()):
        yield


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Context manager in which torch uses `n` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def refuse_data(data: Data) -> None:
    """Raise `TargetError` if the data contain no examples."""
    if not len(data):
        raise TargetError(f"{data.name} is empty; at least one example is needed")


def refuse_threat(threat: ThreatModel, bounds: Bounds, x: Tensor, classes: int) -> None:
    """Raise `UsageError` if the threat model is not possible for the model or its inputs.

    For example, eps must not exceed the size of the bounds, and the target class must be a class of the model.
    """
    threat.constraint.refuse_unfit(x)
    eps, farthest = threat.constraint.eps, extent(threat.constraint, x, bounds)
    # The tolerance accepts an eps that is computed from the bounds and rounded.
    if math.isfinite(eps) and eps > farthest * (1 + 1e-6):
        raise UsageError(
            f"eps is {eps:g}, but no two inputs inside the bounds are further apart than {farthest:g} in "
            f"{threat.name}; eps is in the units of the inputs, whose bounds can be declared",
            _smaller_eps(threat, farthest, bounds),
        )
    if threat.goal is not None and not 0 <= threat.goal < classes:
        raise UsageError(
            f"the target class is {threat.goal}, but the model has {classes} classes; give a class from 0 to "
            f"{classes - 1}"
        )


def _smaller_eps(threat: ThreatModel, farthest: float, bounds: Bounds) -> Remedy:
    """Return a threat model with an eps that is possible: the given one divided by 255 if it may be on the scale of
    bytes and the inputs are on that of 0 to 1, or else a fraction of the largest possible one.
    """
    constraint = threat.constraint
    scaled = (
        constraint.in_input_units
        and not threat.unit
        and bounds.width == 1
        and constraint.eps / 255 <= farthest
    )
    largest = max(1.0, farthest // 32) if constraint.counts_changes else farthest * 8 / 255
    eps = constraint.eps / 255 if scaled else largest
    pixels = "px" if constraint.counts_pixels else ""
    change = f"{threat.name}:{size_text(eps, digits=3)}{pixels}"
    text = threat_text(change, threat.goal, threat.access, threat.queries, threat.unit)
    return Remedy("threat", text, reason="(the given eps divided by 255)" if scaled else "")


def small_eps_note(constraint: Constraint, bounds: Bounds, features: int) -> tuple[str, ...]:
    """Return a note for the report if eps is so small that it was probably meant for other bounds: a change of all
    values by the same amount is less than a tenth of an 8-bit pixel step.

    Returns an empty tuple otherwise.
    """
    eps, width = constraint.eps, bounds.width
    divisors: Mapping[type[Constraint], tuple[float, str]] = {
        Linf: (1.0, ""),
        L2: (math.sqrt(features), f", divided by the square root of the {features:,} values of an input,"),
        L1: (float(features), f", divided by the {features:,} values of an input,"),
    }
    divisor, divided = divisors.get(type(constraint), (0.0, ""))
    if not 0 < eps < 0.1 * divisor * width / 255:
        return ()
    step = f"less than a tenth of one step between 256 levels of the bounds, whose width is {width:g}"
    return (f"eps {eps:.3g}{divided} is {step}: check that eps is in the units of the inputs",)


def wide_bounds_note(x: Inputs, bounds: Bounds) -> tuple[str, ...]:
    """Return a note for the report if the inputs `x` fill at most a tenth of the bounds, which were probably meant for
    other inputs. Returns an empty tuple otherwise.
    """
    share, (low, high) = share_filled(x, bounds), extremes(x)
    if not 0 < share <= FILLED:
        return ()
    filled = f"the inputs range from {low:.4g} to {high:.4g}, which is {share:.1%} of the bounds"
    return (
        f"{filled}: check that the bounds are the limits of the inputs and that the inputs are scaled as in training",
    )


def refuse_batch(
    batch: Batch,
    bounds: Bounds,
    classes: int,
    name: str,
    *,
    whole: Data | Batch | None = None,
    remote: bool = False,
    logits: Callable[[Inputs], Logits] | None = None,
) -> None:
    """Raise `TargetError` unless all inputs are floats inside the bounds and all labels are valid classes.

    NaN is a missing value, which is accepted if `logits` returns finite outputs for it. The message contains the range
    of the labels of `whole`, of which the batch is a part. `remote` states whether the model runs on a server.
    """
    x, y = batch.x, batch.y
    if not x.is_floating_point():
        raise TargetError(
            f"the inputs of {name} are {x.dtype}; floats inside the bounds were expected, as x.float() / 255"
        )
    not_finite = ~x.flatten(1).isfinite().all(1)
    if not_finite.any() and (x.isinf().any() or logits is None or not logits(x[not_finite]).isfinite().all()):
        row = int(not_finite.nonzero()[0, 0])
        raise TargetError(
            f"{name} contains NaN or infinity, first in row {int(batch.ids[row])}; replace or remove such rows"
        )
    # normalised data and conversions to float32 leave the bounds by rounding
    if outside(x, bounds).any():
        raise _out_of_range(x, *bounds.like(x), name)
    if len(y) and (int(y.min()) < 0 or int(y.max()) >= classes):
        ends = _range_of_labels(batch if whole is None else whole)
        raise off_range(*ends, classes, name, remote=remote)


def _range_of_labels(data: Data | Batch) -> tuple[int, int]:
    """The smallest and the largest label of all labelled examples."""
    if isinstance(data, Batch):
        labelled = data.y[data.y != UNLABELLED]
        return int(labelled.min()), int(labelled.max())
    pieces = [data.read(start, start + _PIECE).y for start in range(0, len(data), _PIECE)]
    return min(int(y.min()) for y in pieces), max(int(y.max()) for y in pieces)


def _out_of_range(x: Tensor, low: Tensor, high: Tensor, name: str) -> TargetError:
    """Return the error for inputs outside the bounds."""
    lowest, highest = float(x.min()), float(x.max())
    box = f"{float(low.min()):g} to {float(high.max()):g}"
    message = f"the inputs of {name} range from {lowest:.4g} to {highest:.4g}, outside the bounds {box}"
    bounds = range_of_training(lowest, highest)
    if pixel_divisor(lowest, highest, 4) == 255 and float(high.max()) == 1:
        return TargetError(f"{message}; divide them by 255", BYTES)
    if (float(low.min()), float(high.max())) == (0, 1):
        return TargetError(message, before_normalisation(), bounds)
    return TargetError(f"{message}; scale them", bounds)


def refuse_gates(
    claims: Sequence[Claim],
    plan: Plan,
    target: Target,
    sample: Batch,
    data: Data,
    *,
    paired: bool = False,
) -> None:
    """Raise `UsageError` for a gate whose metric the planned stages do not measure. The message states which setting
    would measure it.

    Gates against a baseline are checked only if the baseline is `paired`, measured by the same plan on the same
    examples. The examples that other runs have in common are known only at the end.
    """
    for claim in claims:
        refuse_rotation(claim)
    checked = [claim for claim in claims if claim.versus is None or (paired and claim.versus == "baseline")]
    if not checked:
        return
    evidence = _as_if_broken(plan, target, sample)
    if getattr(data, "groups", None) is not None:
        evidence = replace(evidence, columns={**evidence.columns, "group": torch.zeros_like(evidence["y"])})
    for claim in checked:
        judge(claim, evidence, Doubts(), baseline=evidence if claim.versus else None)


def _as_if_broken(plan: Plan, target: Target, sample: Batch) -> Evidence:
    """Evidence with every column of the plan, in which the last attack breaks all correct examples."""
    by_stage: dict[str, Columns] = {}
    for stage in plan.stages():
        work = Work(plan, target, (sample,), Room(len(sample)), by_stage.get("clean", {}))
        by_stage[stage.name] = stage.kind.as_if_broken(stage, work)
    outline = plan.outline(target.classes)
    return evidence_from(outline, by_stage, {}, Context(), randomised=target.randomised)
