"""Estimates before a run how long it takes: steps of attacks are timed on its examples, and counted for each attack."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from holdfast.attacks.costs import expected_passes, is_counted
from holdfast.attacks.parts.ascent import gradient
from holdfast.attacks.parts.losses import margin_loss
from holdfast.attacks.pgd import PGD
from holdfast.attacks.protocol import Attack, ThresholdAttack
from holdfast.core.batch import Batch, Data
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.pieces import batch_size_for, half_batch
from holdfast.core.threat import ThreatModel
from holdfast.doubts.protocol import BACKWARDS, FORWARDS, FRESH_ROWS, SAMPLE, SEARCHES
from holdfast.runs.assess.request import AssessRequest
from holdfast.runs.harness.kinds.attack import LEAST
from holdfast.runs.harness.kinds.passes import FIXED
from holdfast.runs.harness.plan import Plan
from holdfast.runs.harness.target import Target

_FEW, _MANY = 8, 128
"""Numbers of examples in the two batches on which steps are timed; attacks are run on batches of both sizes."""
_STEPS = 5
"""Number of steps that are timed at once."""
_SLOW_S = 0.5
"""Steps that are expected to take longer on the larger batch are not timed there, but extrapolated."""
_HARMLESS = 1e-4
"""Size of changes during the timing, which break no example, so that no step is left out."""
TRIED = 32
"""Number of examples on which a short attack estimates how many survive the first attack."""
_FEWEST = 0.2
"""Share of the passes of an attack on an example that it breaks early."""
_STATED = ("clean", "attack", "fixed-pgd", "curve")
"""Kinds of stages whose time is stated: that of others depends on how soon a search or a proof ends."""


@dataclass(frozen=True)
class ExpectedCost:
    """Estimated cost of a run, extrapolated from a few examples."""

    n: int
    """number of examples of the run"""
    attacks: int
    """number of attacks"""
    forwards: float
    """forward passes of single examples"""
    backwards: float
    """backward passes of single examples"""
    tried: int
    """number of examples that were measured for the numbers of passes"""
    seconds: float | None
    """expected seconds of the run; None if they cannot be estimated"""
    notes: ClassVar[tuple[str, ...]] = ("nothing was stored",)

    def __str__(self) -> str:
        """Return the cost as one sentence."""
        return (
            f"{self.n:,} examples, {self.attacks} attacks: about {self.forwards:,.0f} forward passes, "
            f"{self.backwards:,.0f} backward passes (measured on the first {self.tried})"
            f"{'' if self.seconds is None else f', about {duration(max(self.seconds, 1))}'}"
        )


def duration(seconds: float) -> str:
    """Return a duration with two significant digits, as in `15 s`, `2.5 min` and `3 h`."""
    for limit, unit, size in ((100, "s", 1), (6000, "min", 60)):
        if seconds < limit:
            return f"{float(f'{seconds / size:.2g}'):g} {unit}"
    return f"{float(f'{seconds / 3600:.2g}'):g} h"


@dataclass(frozen=True)
class StepTime:
    """Measured seconds of one step of an attack on a batch."""

    batch_s: float
    """seconds for each batch"""
    example_s: float
    """seconds for each example in it, in addition"""

    def of(self, n: float) -> float:
        """Return the seconds of a step on a batch of `n` examples."""
        return self.batch_s + n * self.example_s


@dataclass(frozen=True)
class StepTimes:
    """Measured seconds of the steps of attacks: of a query, and of a gradient step."""

    query: StepTime
    gradient: StepTime

    def of(self, passes: tuple[float, float], n: float) -> float:
        """Return the seconds of an attack on a batch of `n` examples, which makes so many forward passes and backward
        passes, as from `expected_passes`.
        """
        forwards, backwards = passes
        return max(forwards - backwards, 0.0) * self.query.of(n) + backwards * self.gradient.of(n)


@dataclass(frozen=True)
class CountedAttack:
    """An attack of the suite in an estimate."""

    passes: tuple[float, float]
    """forward and backward passes for an example that survives it"""
    waves: int
    """see `Member.waves`"""


@dataclass(frozen=True)
class StageTimes:
    """Measured seconds of steps and counted steps of a plan, from which the time for any number of examples follows."""

    steps: StepTimes
    attacks: tuple[CountedAttack, ...]
    on_all: tuple[tuple[float, float], ...]
    """passes of the attacks that are run on every example, outside the suite"""
    probed: bool
    gradients: bool
    size: int
    """number of examples in a batch"""
    share: float
    """share of examples that survive the first attack"""

    def of(self, n: int, share: float | None = None, limit_s: float = math.inf) -> float:
        """Return the expected seconds for `n` examples, if `share` of them survive the first attack: by default as many
        as on the measured model. The attacks of the suite end after `limit_s`.

        An attack in waves is expected to end with the first one, which is so if it breaks none.
        """
        surviving = max(n * (self.share if share is None else share), 1.0)
        attacks_s = self._seconds((1, 0), n)
        for k, attack in enumerate(self.attacks):
            rows = surviving if k else surviving + _FEWEST * (n - surviving)
            if attack.waves:
                rows = min(rows, max(LEAST, surviving / 2**attack.waves))
            attacks_s += self._seconds(attack.passes, rows)
        others_s = sum(self._seconds(passes, n) for passes in self.on_all)
        return min(attacks_s, limit_s) + others_s + (self._probed_s(n, surviving) if self.probed else 0.0)

    def _probed_s(self, n: int, surviving: float) -> float:
        """Seconds of the probes, of which one repeats the suite on a few surviving examples."""
        rows = min(n, SAMPLE)
        seconds = self._seconds((FORWARDS, BACKWARDS), rows) if self.gradients else 0.0
        seconds += self._seconds((SEARCHES, 0), rows * surviving / n)
        return seconds + sum(self._seconds(each.passes, min(surviving, FRESH_ROWS)) for each in self.attacks)

    def _seconds(self, passes: tuple[float, float], n: float) -> float:
        batches = max(math.ceil(n / self.size), 1)
        return batches * self.steps.of(passes, n / batches)


def expected_seconds(
    request: AssessRequest, plan: Plan, target: Target, data: Data, device: torch.device
) -> float | None:
    """Return the expected seconds of a requested assessment with the completed `plan`, or None if they cannot be
    estimated: if an attack has no known number of steps or no usual norm, if something is proved, or with workers.
    """
    alone = (request.workers or 1) == 1 and request.ray is None
    known = all(is_counted(member.attack) for member in (*plan.members, *plan.curve))
    kinds = all(stage.kind.name in _STATED and not stage.adaptive for stage in plan.stages())
    usual = plan.threat.constraint.in_input_units and plan.threat.goal is None
    seen = plan.threat.gives("scores") and not target.rejects and not target.randomised
    if not (known and kinds and usual and seen and alone):
        return None
    times, limit_s = stage_times(plan, target, data, device, request.batch_size), request.time_budget_s
    return times.of(len(data), limit_s=math.inf if limit_s is None else limit_s)


def stage_times(
    plan: Plan, target: Target, data: Data, device: torch.device, batch_size: int | None
) -> StageTimes:
    """Measure the steps of attacks on the first examples of `data`, and count those of a plan. Passes on surrogates are
    counted like those of the model.
    """
    sample = data.read(0, min(TRIED, len(data))).to(device)
    size = batch_size or batch_size_for(math.prod(sample.x.shape[1:]), str(device))
    gradients = target.bare.access == "gradients" and plan.threat.gives("gradients")

    def passes(attack: Attack) -> tuple[float, float]:
        if isinstance(attack, ThresholdAttack):  # evaluates all its candidates in few calls
            return 0.0, 0.0
        return expected_passes(attack, plan.threat, target.classes)

    outside = [FIXED.attack] if plan.attacked and gradients else []
    every = plan.full or plan.smallest
    return StageTimes(
        step_times(target.quick, plan.threat, sample, size, gradients=gradients),
        tuple(CountedAttack(passes(member.attack), 0 if every else member.waves) for member in plan.members),
        tuple(passes(attack) for attack in (*outside, *(member.attack for member in plan.curve))),
        plan.doubts == "all",
        gradients,
        size,
        1.0 if every else surviving_share(plan.threat, target, sample, gradients=gradients),
    )


def surviving_share(threat: ThreatModel, target: Target, sample: Batch, *, gradients: bool) -> float:
    """Return the share of examples that survive the first attack, estimated with a short attack on a sample: 1 if the
    model has no scores, or the threat model no usual norm.
    """
    eps = threat.constraint.eps
    if not threat.constraint.in_input_units or not threat.gives("scores") or target.rejects:
        return 1.0
    if not 0 < eps < math.inf or threat.goal is not None:
        return 1.0
    from holdfast.attacks.square import Square  # late, as only runs that state their time need it

    short: Attack = PGD(steps=10) if gradients else Square(queries=100)
    with torch.random.fork_rng():
        x_adv = short(target.quick, sample, replace(threat, queries=None), rng=Draws(0))
        with torch.no_grad():
            correct = target.quick(x_adv, sample.ids).argmax(1) == sample.y
    return float(correct.double().mean())


def step_times(
    model: Model, threat: ThreatModel, sample: Batch, size: int, *, gradients: bool = True
) -> StepTimes:
    """Measure the seconds of a query and of a gradient step of attacks on a model, in batches of at most `size`.
    Without `gradients`, a gradient step takes no time.

    Steps of attacks are timed under the usual norms, and only passes of the model under other threat models.
    """
    from holdfast.attacks.square import Square

    usual = threat.constraint.in_input_units
    harmless = (
        replace(threat, constraint=threat.constraint.resized(_HARMLESS), queries=None) if usual else None
    )

    def query(batch: Batch) -> None:
        if harmless is not None:
            Square(queries=_STEPS)(model, batch, harmless, rng=Draws(0))
            return
        for _ in range(_STEPS):
            model(batch.x, batch.ids)

    def step(batch: Batch) -> None:
        if harmless is not None:
            PGD(steps=_STEPS, drop=False)(model, batch, harmless, rng=Draws(0))
            return
        for _ in range(_STEPS):
            gradient(model, batch, margin_loss)

    rows = torch.arange(len(sample), device=sample.ids.device).repeat(-(-_MANY // len(sample)))
    with torch.random.fork_rng(), torch.no_grad():
        sample = sample.labelled(model(sample.x, sample.ids).argmax(1))
        batches = [sample.take(rows[: min(n, size)]) for n in (_FEW, _MANY)]
        return StepTimes(
            _step_time(query, batches), _step_time(step, batches) if gradients else StepTime(0.0, 0.0)
        )


def _step_time(steps: Callable[[Batch], None], batches: Sequence[Batch]) -> StepTime:
    """Seconds of a step: a line through the times of a small and a larger batch."""
    few, many = batches
    steps(few)  # fills caches
    few_s = _timed(steps, few)
    linear = StepTime(0.0, few_s / len(few))
    if len(many) == len(few) or _STEPS * linear.of(len(many)) > _SLOW_S:
        return linear
    try:
        many_s = _timed(steps, many)
    except (RuntimeError, MemoryError) as error:
        half_batch(len(many), error)
        return linear
    example_s = max(many_s - few_s, 0.0) / (len(many) - len(few))
    return StepTime(max(few_s - example_s * len(few), 0.0), example_s)


def _timed(steps: Callable[[Batch], None], batch: Batch) -> float:
    """Seconds of one of the steps."""
    start = time.perf_counter()
    steps(batch)
    return (time.perf_counter() - start) / _STEPS
