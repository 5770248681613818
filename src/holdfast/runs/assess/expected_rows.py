"""Computes before a run how many rows it will send to a model server: upper bounds, and an estimate from a few
examples.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from holdfast.attacks.costs import Passes, most_rows
from holdfast.attacks.protocol import Itemised
from holdfast.certifiers.smoothing.smoothing import ATTACKED_DRAWS, JUDGING_DRAWS, SmoothedVotes
from holdfast.core.batch import Batch, Data
from holdfast.core.model import VOTES, Classifier
from holdfast.core.outputs import SAME, change
from holdfast.doubts.probing import JUDGED_AT_RANDOM, probe_rows, probes_for
from holdfast.io.data.data import concatenated
from holdfast.io.remote.served_model import InspectionCounter, rows_of_calls
from holdfast.reports.words import amount
from holdfast.runs.assess.preparation import plan_for, refuse_data
from holdfast.runs.assess.request import AssessRequest, Subject
from holdfast.runs.assess.result import enumerated
from holdfast.runs.assess.served_runs import served_by
from holdfast.runs.harness.kinds.checks import CHECKED, PARTS
from holdfast.runs.harness.kinds.proof import AT_ONCE
from holdfast.runs.harness.kinds.transfers import MATRIX_ROWS
from holdfast.runs.harness.plan import Plan
from holdfast.runs.harness.stage import Member
from holdfast.runs.harness.target import LOOKED_AT, Target
from holdfast.runs.stored.record import Division
from holdfast.runs.stored.run_manifest import work_of


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
    target: Target,
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
    passes, randomised = Passes(work.batch_size, target.bare.batches, shards), target.randomised
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
    unsharded, attacks = replace(passes, shards=()), tuple(member.attack for member in plan.members)
    probes = sum(
        probe_rows(probe, plan.threat, min(due, probe.most), unsharded, randomised=randomised) or 0
        for probe in probes_for(plan.threat, attacks)
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


def rehearsed(subject: Subject, data: Data, order: AssessRequest, counted: InspectionCounter) -> Rehearsed:
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
    target = Target(model, model, model, randomised, classes)
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
