"""Estimates before a run how long it takes, and how many rows it sends to a served model."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch

from holdfast.attacks.costs import Passes, expected_passes, is_counted, most_rows, search_queries
from holdfast.attacks.parts.ascent import gradient
from holdfast.attacks.parts.losses import margin_loss
from holdfast.attacks.pgd import PGD
from holdfast.attacks.protocol import Attack, Itemised, ThresholdAttack
from holdfast.attacks.suites import LEAST
from holdfast.certifiers.smoothing import ATTACKED_DRAWS, JUDGING_DRAWS, SmoothedVotes
from holdfast.core.batch import Batch, Data
from holdfast.core.draws import Draws
from holdfast.core.meter import batch_size_for, half_batch
from holdfast.core.model import VOTES, Classifier, Model
from holdfast.core.names import enumerated
from holdfast.core.outputs import SAME, change
from holdfast.core.threat import ThreatModel
from holdfast.doubts.probing import JUDGED_AT_RANDOM, probe_rows, probes_for
from holdfast.doubts.protocol import BACKWARDS, FORWARDS, FRESH_ROWS, SAMPLE, SEARCHED, SEARCHES
from holdfast.io.data.data import concatenated
from holdfast.io.remote.served_model import InspectionCounter, rows_of_calls
from holdfast.reports.words import amount
from holdfast.runs.assess.preparation import plan_for, refuse_data
from holdfast.runs.assess.request import AssessRequest, DescribedModel
from holdfast.runs.assess.served_runs import served_by
from holdfast.runs.documents.record import Division
from holdfast.runs.documents.run_manifest import work_of
from holdfast.runs.harness.kinds.checks import CHECKED, PARTS
from holdfast.runs.harness.kinds.passes import FIXED, MATRIX_ROWS
from holdfast.runs.harness.kinds.proof import AT_ONCE
from holdfast.runs.harness.plan import Plan
from holdfast.runs.harness.stage import Member
from holdfast.runs.harness.target import LOOKED_AT, PreparedModel

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
_STATED = ("clean", "baseline", "attack", "fixed-pgd", "curve")
"""Kinds of stages whose time is stated: that of others depends on how soon a search or a proof ends. Stored inputs of a
baseline take few passes and save others, which are both left out."""


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


_SETTLED = (155, 44)
"""Forward and backward passes of the probes for each example if the results of the suite settle the others."""


@dataclass(frozen=True)
class CountedAttack:
    """An attack of the suite in an estimate."""

    passes: tuple[float, float]
    """forward and backward passes for an example that survives it"""
    waves: int = 0
    """see `Member.waves`"""
    least: int = LEAST
    """see `Member.least`"""
    after: bool = False
    """see `Member.after`"""


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
    settling: bool = False
    """whether the suite uses gradients and searches, so that its results usually settle the doubts about them"""

    def of(self, n: int, share: float | None = None, limit_s: float = math.inf) -> float:
        """Return the expected seconds for `n` examples, if `share` of them survive the first attack: by default as many
        as on the measured model. The attacks of the suite end after `limit_s`.

        An attack in waves is expected to end with the first one, which is so if it breaks none. An attack that is run
        only if another one breaks an example is not expected to run.
        """
        surviving = max(n * (self.share if share is None else share), 1.0)
        attacks_s = self._seconds((1, 0), n)
        for k, attack in enumerate(self.attacks):
            rows = surviving if k else surviving + _FEWEST * (n - surviving)
            if attack.waves and attack.after:
                continue
            if attack.waves:
                rows = min(rows, max(attack.least, surviving / 2**attack.waves))
            attacks_s += self._seconds(attack.passes, rows)
        others_s = sum(self._seconds(passes, n) for passes in self.on_all)
        return min(attacks_s, limit_s) + others_s + (self._probed_s(n, surviving) if self.probed else 0.0)

    def _probed_s(self, n: int, surviving: float) -> float:
        """Seconds of the probes, of which one repeats the cheapest attack on a few surviving examples."""
        rows = min(n, SAMPLE)
        if self.settling:
            seconds = self._seconds(_SETTLED, rows)
        else:
            seconds = self._seconds((FORWARDS, BACKWARDS), rows) if self.gradients else 0.0
            seconds += self._seconds((SEARCHES, 0), rows * surviving / n)
        fresh = min(surviving, FRESH_ROWS)
        return seconds + min((self._seconds(each.passes, fresh) for each in self.attacks), default=0.0)

    def _seconds(self, passes: tuple[float, float], n: float) -> float:
        batches = max(math.ceil(n / self.size), 1)
        return batches * self.steps.of(passes, n / batches)


def expected_seconds(
    request: AssessRequest, plan: Plan, target: PreparedModel, data: Data, device: torch.device
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
    plan: Plan, target: PreparedModel, data: Data, device: torch.device, batch_size: int | None
) -> StageTimes:
    """Measure the steps of attacks on the first examples of `data`, and count those of a plan. Passes on surrogates are
    counted like those of the model.
    """
    sample = data.read(0, min(TRIED, len(data))).to(device)
    size = batch_size or batch_size_for(math.prod(sample.x.shape[1:]), str(device))
    gradients = target.original.access == "gradients" and plan.threat.gives("gradients")

    def passes(attack: Attack) -> tuple[float, float]:
        if isinstance(attack, ThresholdAttack):  # evaluates all its candidates in few calls
            return 0.0, 0.0
        return expected_passes(attack, plan.threat, target.classes)

    outside = [FIXED.attack] if plan.attacked and gradients else []
    every = plan.full or plan.smallest

    def counted_attack(member: Member) -> CountedAttack:
        in_waves = () if every else (member.waves, member.least, bool(member.after))
        return CountedAttack(passes(member.attack), *in_waves)

    return StageTimes(
        step_times(target.queried(target.optimised, sample), plan.threat, sample, size, gradients=gradients),
        tuple(counted_attack(member) for member in plan.members),
        tuple(passes(attack) for attack in (*outside, *(member.attack for member in plan.curve))),
        plan.doubts == "all",
        gradients,
        size,
        1.0 if every else surviving_share(plan.threat, target, sample, gradients=gradients),
        gradients
        and not target.randomised
        and any(search_queries(member.attack) >= SEARCHED for member in plan.members),
    )


def surviving_share(threat: ThreatModel, target: PreparedModel, sample: Batch, *, gradients: bool) -> float:
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
        x_adv = short(target.optimised, sample, replace(threat, queries=None), rng=Draws(0))
        with torch.no_grad():
            correct = target.optimised(x_adv, sample.ids).argmax(1) == sample.y
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


@dataclass(frozen=True)
class ExpectedRows:
    """Upper bounds on the numbers of rows that a run sends to a model server, separately for clean inputs, attacks,
    doubts and the judging of attacked inputs.
    """

    clean: int
    """rows of clean inputs, including those for the inspection of the model before the run"""
    attacks: int
    doubts: int
    """rows of the probes, including those for judging the examples that the probes find"""
    judging: int
    """one row for each example that each attack is run on, or 41 rows for a randomised model"""
    unknown: tuple[str, ...] = ()
    """names of the attacks that are not included, because neither a setting nor a budget bounds their rows"""

    @property
    def total(self) -> int:
        """Upper bound on the number of rows that a run sends to a model server for all purposes together."""
        return self.clean + self.attacks + self.doubts + self.judging

    @property
    def description(self) -> str:
        """Sentence that states the total number of rows that a run sends to a model server, and its parts.

        >>> ExpectedRows(57, 6_000, 2_000, 226).description
        'at most 8,283 rows to the server, if it refuses none: 57 clean, 6,000 attacks, 2,000 doubts, 226 judging'
        """
        parts = ", ".join(
            f"{rows:,} {name}"
            for name, rows in (
                ("clean", self.clean),
                ("attacks", self.attacks),
                ("doubts", self.doubts),
                ("judging", self.judging),
            )
        )
        sentence = f"at most {self.total:,} rows to the server, if it refuses none: {parts}"
        if not self.unknown:
            return sentence
        return (
            f"{sentence}; not counted are the rows of {enumerated(self.unknown)}, which no setting bounds: give a "
            "budget, such as queries=1000 in --threat"
        )


def expected_rows(
    order: AssessRequest,
    plan: Plan,
    target: PreparedModel,
    n: int,
    work: Division,
    *,
    right: int | None = None,
    opening: int = 0,
) -> ExpectedRows:
    """Return upper bounds on the numbers of rows that a run on `n` examples sends to a model server. The padding of
    batches is included.

    `work` states how the run is divided. `right` is the number of correctly classified examples, on which attacks are
    run; None means all. `opening` is the number of rows that each process sends to determine how the data are read.
    """
    shards = tuple(stop - start for start, stop in work.shards)
    gates = any(claim.versus is None for claim in order.gates)  # are first tested on a few examples
    if target.smoothed is not None:
        passes = Passes(work.batch_size, target.smoothed.base.batches, shards)
        return _smoothed(target.smoothed, n, passes, gates=gates, opening=opening)
    passes, randomised = Passes(work.batch_size, target.original.batches, shards), target.randomised
    due = n if right is None or plan.threat.constraint.judges_misclassified else right
    judged = JUDGED_AT_RANDOM if randomised else 1
    sample_rows = passes.filled(min(LOOKED_AT, n))
    inspection_rows = passes.filled(1) + (1 + VOTES if randomised else 2) * sample_rows
    clean = (
        (1 + (order.workers or 0))
        * (inspection_rows + opening)  # each worker process inspects the model itself
        + (judged * sample_rows if gates else 0)
        + judged * passes.once(n)
    )
    members = (*plan.members, *plan.curve, *plan.adaptive)
    attack_rows, unknown = _attacked(members, plan, due, passes)
    checks = [
        replace(member, attack=replace(cast(Any, member.attack), passes=member.attack.passes // PARTS))
        for member in plan.adaptive
        if isinstance(member.attack, Itemised)
    ]
    attack_rows += _attacked(checks, plan, min(due, CHECKED), passes)[0]
    judging = sum(judged * _of(member, passes).once(due) for member in members)
    if plan.baseline is not None:  # without gradients, its stored inputs are only judged
        judging += judged * passes.once(due)
    judging += _on_surrogates(plan, n, passes, judged) + _across(
        plan, n, passes, tuple(map(len, order.across))
    )
    doubts = _doubts(plan, due, passes, randomised=randomised)
    return ExpectedRows(clean, attack_rows, doubts, judging, unknown)


def _smoothed(smoothed: SmoothedVotes, n: int, passes: Passes, *, gates: bool, opening: int) -> ExpectedRows:
    """Upper bounds on the rows of the certification of a smoothed classifier without attacks. It is assumed that every
    row is padded separately.
    """
    each, sample = passes.filled(1), min(LOOKED_AT, n)
    inspected = (
        1 + 4 * sample
    )  # of the base classifier: two evaluations, and two tests whether noise is accepted
    votes = JUDGING_DRAWS * (n + (sample if gates else 0))
    # each piece begins with one input of the network, by which the time limit is checked
    pieces = sum(-(-shard // min(AT_ONCE, passes.size)) for shard in passes.shards)
    draws = smoothed.smoothing.draws * n
    return ExpectedRows(opening + each * (inspected + votes), each * ATTACKED_DRAWS * pieces, 0, each * draws)


def _of(member: Member, passes: Passes) -> Passes:
    """The division of an attack's examples into calls of the model: each wave divides them into shards again."""
    return replace(passes, shards=passes.shards * (1 + member.waves))


def _attacked(members: Iterable[Member], plan: Plan, due: int, passes: Passes) -> tuple[int, tuple[str, ...]]:
    """The most rows that the attacks query, and the names of attacks without a known bound."""
    rows, unknown = 0, []
    for member in members:
        bound = most_rows(member.attack, plan.threat, due, _of(member, passes))
        rows += bound or 0
        if bound is None:
            unknown.append(member.name)
    return rows, tuple(unknown)


def _doubts(plan: Plan, due: int, passes: Passes, *, randomised: bool) -> int:
    """Rows of all probes on their largest number of examples, limited by the rows of the suite."""
    if plan.doubts != "all":
        return 0
    unsharded, attacks = replace(passes, shards=()), dict(enumerate(member.attack for member in plan.members))
    probes = sum(
        probe_rows(probe, plan.threat, min(due, probe.most), unsharded, randomised=randomised) or 0
        for probe in probes_for(plan.threat, attacks)
        if not probe.settles
    )
    suite, unknown = _attacked(plan.members, plan, due, Passes(passes.size))
    judged = JUDGED_AT_RANDOM if randomised else 1
    return probes if unknown else min(probes, suite + judged * due * len(plan.members))


def _on_surrogates(plan: Plan, n: int, passes: Passes, judged: int) -> int:
    """Rows of the transfer matrix: each clean input, and its examples from each surrogate and from all together."""
    if not plan.matrix:
        return 0
    models = len(plan.threat.surrogates)
    makers = models + (models > 1)
    return (1 + makers * judged) * passes.once(min(n, MATRIX_ROWS))


def _across(plan: Plan, n: int, passes: Passes, others: Sequence[int]) -> int:
    """Rows of the transfer across data sets: the perturbations of each data set, and as many controls, on each."""
    if not plan.across:
        return 0
    sets = 1 + len(others)
    return (sets + 2 * sets**2) * replace(passes, shards=()).once(min(n, MATRIX_ROWS, *others))


_SAMPLED = 32
"""clean examples from which the clean accuracy is estimated"""


@dataclass(frozen=True)
class Rehearsed:
    """Expected number of rows that a run sends to a model server, and the number sent to estimate it."""

    n: int
    """number of examples of the run"""
    attacks: tuple[str, ...]
    most: ExpectedRows
    """upper bounds on the rows, for the largest possible number of correct examples"""
    likely: ExpectedRows | None
    """expected rows if the fraction of correct examples is that of the sample; None if the sample
    is empty or complete"""
    right: int
    """number of correct examples in the sample"""
    tried: int
    sent: int
    """number of rows that were sent to the server for the estimate"""
    batches: str = ""
    """description of the batch sizes that the server accepts; empty if it accepts any number of rows"""

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about the estimate itself."""
        sent = f"sent to the server for this estimate: {amount(self.sent, 'rows')}; nothing was stored"
        if not self.batches:
            return (sent,)
        return f"note: {self.batches}; the rows that fill up a batch are counted", sent

    def __str__(self) -> str:
        """Return the estimate as one or two lines."""
        attacks = f"{amount(len(self.attacks), 'attacks')} ({', '.join(self.attacks)})"
        text = f"{amount(self.n, 'examples')}, {attacks}: {self.most.description}"
        share = f"{self.right:,} of {amount(self.tried, 'clean examples')}"
        if self.likely is not None:
            return f"{text}\nif the share of correct examples is that of a trial ({share}): {self.likely.description}"
        if self.tried:
            return f"{text}\nattacks are run on correct examples only; in a trial {share} were correct"
        return text


def rehearsed(
    subject: DescribedModel, data: Data, order: AssessRequest, counted: InspectionCounter
) -> Rehearsed:
    """Estimate how many rows a run will send to a model server, by measuring a few examples.

    `counted` limits and counts the rows that are sent for the estimate. Raises the same errors as the run itself.
    """
    refuse_data(data)
    model, opening = subject.model, counted.rows
    first, second = rows_of_calls(model, counted.remaining, min(_SAMPLED, len(data)), LOOKED_AT)
    n_sampled = min(max(first, 1), len(data))
    rows = [k * len(data) // n_sampled for k in range(n_sampled)]
    sample = concatenated([data.read(row, row + 1) for row in rows])
    right, randomised = 0, False
    classes = model.classes or len(data.classes or ()) or int(sample.y.max()) + 1
    if first:
        classes, right, randomised = _inspected(model, sample, second)
    target = PreparedModel(model, model, model, randomised, classes)
    with ExitStack() as stack:
        plan = plan_for(subject, data, order, target, sample, stack)
        shape = tuple(sample.x.shape[1:])
        work = work_of(len(data), order, plan, shape, served=served_by(model))

        def expected(right: int | None) -> ExpectedRows:
            return expected_rows(order, plan, target, len(data), work, right=right, opening=opening)

        is_complete = first >= len(data)
        upper_bound = expected(right if is_complete else None)
        share = right / n_sampled if first else 1.0
        likely = None if is_complete or not first else expected(round(share * len(data)))
    names = tuple(member.name for member in plan.members)
    size = 1 if model.batches is None else model.batches.size
    batches = model.batches.description if model.batches is not None and size > 1 else ""
    return Rehearsed(
        len(data), names, upper_bound, likely, right, n_sampled if first else 0, counted.rows, batches
    )


def _inspected(model: Classifier, sample: Batch, again: int) -> tuple[int, int, bool]:
    """The number of classes, the number of correct examples in a sample, and whether the model is randomised.

    Randomness is tested on the first `again` examples, unless `again` is 0.
    """
    with torch.no_grad():
        logits = model(sample.x)
        repeated = model(sample.x[:again]) if again else logits[:0]
    randomised = bool((change(logits[:again], repeated) > SAME).any()) if again else False
    class_logits = logits[:, :-1] if model.rejects else logits
    return class_logits.shape[1], int((class_logits.argmax(1) == sample.y).sum()), randomised
