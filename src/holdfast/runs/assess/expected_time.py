"""Estimates before a run how long it takes, from a few passes of the model and the number of passes of each attack."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from holdfast.attacks.costs import expected_passes
from holdfast.attacks.parts.ascent import gradient
from holdfast.attacks.parts.losses import margin_loss
from holdfast.attacks.pgd import PGD
from holdfast.certifiers.protocol import Prover, StatisticalProver
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.pieces import half_batch
from holdfast.doubts.thresholds import BACKWARDS, FORWARDS, FRESH_ROWS, SAMPLE, SEARCHES
from holdfast.runs.harness import LOOKED_AT, Plan, Target
from holdfast.runs.harness.kinds.proof import prepared_prover

_QUICK_S = 0.05
"""A pass on a few examples that is quicker than this is timed again with a whole batch, in which an example costs
less."""
TRIED = 32
"""Number of examples on which a short attack estimates how many survive the first attack."""
_SHORT = PGD(steps=10)
_AROUND = 0.15  # almost two standard errors of that share
_FEWEST = 0.2  # share of the passes of an attack on an example that it breaks early


@dataclass(frozen=True)
class ExpectedTime:
    """Lower and upper estimate of the seconds of a run."""

    least_s: float
    most_s: float

    @property
    def middle_s(self) -> float:
        """Seconds in the middle of the range."""
        return (self.least_s + self.most_s) / 2

    def __str__(self) -> str:
        """Return the range as text.

        >>> str(ExpectedTime(2, 190))
        'about 2 s to 3.2 min'
        """
        texts = [duration(max(seconds, 1)) for seconds in (self.least_s, self.most_s)]
        return f"about {' to '.join(dict.fromkeys(texts))}"


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
    cpu_s: float
    """seconds of CPU time"""
    tried: int
    """number of examples that were measured for the estimate"""
    notes: ClassVar[tuple[str, ...]] = ("nothing was stored",)

    def __str__(self) -> str:
        """Return the cost as one sentence."""
        return (
            f"{self.n:,} examples, {self.attacks} attacks: about {self.forwards:,.0f} forward passes, "
            f"{self.backwards:,.0f} backward passes, {self.cpu_s:,.0f} s of CPU (measured on the first {self.tried})"
        )


def duration(seconds: float) -> str:
    """Return a duration with two significant digits, as in `15 s`, `2.5 min` and `3 h`."""
    for limit, unit, size in ((100, "s", 1), (6000, "min", 60)):
        if seconds < limit:
            return f"{float(f'{seconds / size:.2g}'):g} {unit}"
    return f"{float(f'{seconds / 3600:.2g}'):g} h"


@dataclass(frozen=True)
class StageTimes:
    """Measured seconds of the stages and the probes of a plan for one example, from which the time for any number of
    examples follows.
    """

    always_s: float
    """seconds for every example, such as those of the clean pass and of quick methods of certification"""
    attacks_s: tuple[float, ...]
    """seconds of each attack for an example that survives it"""
    late_s: float
    """seconds of the slow methods of certification for an example that is left to them"""
    probes_s: float
    """seconds of the probes for an example, of at most `SAMPLE`"""
    searches_s: float
    """the same for an example that survives, in addition"""
    probed: bool
    workers: int
    shares: tuple[float, float]
    """range of the share of examples that survive the first attack"""

    def of(self, n: int, shares: tuple[float, float] | None = None) -> ExpectedTime:
        """Return the expected time for `n` examples. `shares` is the range of the share of surviving examples, by
        default that of the measured model.
        """
        few, most = shares or self.shares
        return ExpectedTime(self._seconds(n, few, 0), self._seconds(n, most, most))

    def _seconds(self, n: int, share: float, share_late: float) -> float:
        """Seconds if a share of the examples survives the first attack, and one is left to the slow methods."""
        attacks_s, first_s = sum(self.attacks_s), self.attacks_s[0] if self.attacks_s else 0.0
        attacked_s = attacks_s * share + _FEWEST * first_s * (1 - share)
        each_s = self.always_s + attacked_s + self.late_s * share_late
        probed_s = 0.0
        if self.probed:
            probed_s = min(n, SAMPLE) * (self.probes_s + self.searches_s * share)
            probed_s += min(n * share, FRESH_ROWS) * attacks_s
        return n * each_s / self.workers + probed_s


def expected_time(plan: Plan, target: Target, sample: Batch, n: int, size: int, workers: int) -> ExpectedTime:
    """Estimate how long the stages and the probes of a plan take on `n` examples, in batches of at most `size`. The
    measurements are those of `stage_times`.
    """
    return stage_times(plan, target, sample, min(size, max(n, 1)), workers).of(n)


def stage_times(plan: Plan, target: Target, sample: Batch, size: int, workers: int) -> StageTimes:
    """Measure how long the stages and the probes of a plan take for one example, in batches of `size`.

    It takes a few passes of the model on the examples in `sample`, a short attack on them, and one run of each quick
    method of certification on one of them. Passes on surrogates are counted like those of the model.
    """
    sample = sample.first(size)
    shares = expected_shares(plan, target, sample)
    sample = sample.take(torch.arange(min(len(sample), LOOKED_AT), device=sample.ids.device))
    gradients = target.bare.access == "gradients" and plan.threat.gives("gradients")
    forward_s, backward_s = pass_times(target.quick, sample, size, gradients=gradients)

    def seconds(forwards: float, backwards: float) -> float:
        return forwards * forward_s + backwards * backward_s

    attacks = [
        seconds(*expected_passes(member.attack, plan.threat, target.classes))
        for member in (*plan.members, *plan.curve)
    ]
    return StageTimes(
        forward_s + sum(_proof_s(prover, plan, target, sample, forward_s) for prover in plan.proofs),
        tuple(attacks),
        sum(_limit_s(prover) for prover in plan.late_proofs),
        seconds(FORWARDS, BACKWARDS),
        seconds(SEARCHES, 0),
        plan.doubts == "all",
        workers,
        shares,
    )


def expected_shares(plan: Plan, target: Target, sample: Batch) -> tuple[float, float]:
    """Return a range of the share of examples that survive the first attack, estimated with a short attack on a sample.

    It is 0 to 1 if the model has no gradients, or the threat model no norm.
    """
    constraint, threat = plan.threat.constraint, plan.threat
    if target.bare.access != "gradients" or not threat.gives("gradients") or threat.goal is not None:
        return 0.0, 1.0
    if not (plan.members and constraint.is_ball and 0 < constraint.eps < math.inf) or target.rejects:
        return 0.0, 1.0
    with torch.random.fork_rng():
        x_adv = _SHORT(target.quick, sample, replace(threat, queries=None), rng=Draws(0))
        with torch.no_grad():
            correct = target.quick(x_adv, sample.ids).argmax(1) == sample.y
    share = float(correct.double().mean())
    return max(share - _AROUND, 0.0), min(share + _AROUND, 1.0)


def pass_times(model: Model, sample: Batch, size: int, *, gradients: bool = True) -> tuple[float, float]:
    """Measure the seconds of a forward pass for one example, and the seconds that a backward pass adds, in batches of
    `size`, which is halved if memory runs out. Without `gradients`, a backward pass takes no time.
    """
    try:
        return _pass_times(model, sample, size, gradients=gradients)
    except (RuntimeError, MemoryError) as error:
        if size <= len(sample):
            raise
        return pass_times(model, sample, half_batch(size, error), gradients=gradients)


def _pass_times(model: Model, sample: Batch, size: int, *, gradients: bool) -> tuple[float, float]:
    with torch.random.fork_rng(), torch.no_grad():
        forward_s = _timed(lambda: model(sample.x, sample.ids))
        rows = torch.arange(len(sample), device=sample.ids.device)
        if forward_s < _QUICK_S and size > len(sample):
            sample = sample.take(rows.repeat(-(-size // len(sample)))[:size])
            forward_s = _timed(lambda: model(sample.x, sample.ids))
        both_s = _timed(lambda: gradient(model, sample, margin_loss)) if gradients else forward_s
    return forward_s / len(sample), max(both_s - forward_s, 0.0) / len(sample)


def _timed(call: Callable[[], object]) -> float:
    """Seconds of the second of two calls; the first one fills caches."""
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
    return seconds


def _proof_s(prover: Prover, plan: Plan, target: Target, sample: Batch, forward_s: float) -> float:
    """Seconds of a quick method of certification for one example."""
    if isinstance(prover, StatisticalProver):
        return prover.draws * forward_s
    ready = prepared_prover(target, prover, sample, plan.threat)
    one = sample.take(torch.zeros_like(sample.ids[:1]))
    start = time.perf_counter()
    ready(one)
    return time.perf_counter() - start


def _limit_s(prover: Prover) -> float:
    """Time limit of a slow method of certification for one example."""
    return float(vars(prover).get("timeout_s", 0.0))
