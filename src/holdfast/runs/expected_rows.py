"""How many rows a run sends to a server at most: by arithmetic, before the run."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from holdfast.attacks.costs import Passes, most_rows
from holdfast.core.corruptions import Corruptions
from holdfast.core.model import VOTES
from holdfast.doubts.allotting import JUDGED_AT_RANDOM, probe_rows
from holdfast.doubts.probing import AGAIN, probes_for
from holdfast.doubts.thresholds import FRESH_ROWS, SAMPLE
from holdfast.harness import LOOKED_AT, MATRIX_ROWS, Plan, Target
from holdfast.harness.plan import Member
from holdfast.runs.assembling import listed
from holdfast.runs.order import Order


@dataclass(frozen=True)
class ExpectedRows:
    """Rows that a server is sent at most, by what they are sent for."""

    clean: int
    """clean inputs, with the look at the model before the run"""
    attacks: int
    doubts: int
    """the probes of the doubts, with the judging of what they find"""
    judging: int
    """one row for each example that an attack was run on; 41 of a model that draws at random"""
    unknown: tuple[str, ...] = ()
    """attacks whose rows are not in these numbers, because no setting and no budget says how many they are"""

    @property
    def total(self) -> int:
        """All of them."""
        return self.clean + self.attacks + self.doubts + self.judging

    @property
    def says(self) -> str:
        """The total and its parts in words.

        >>> ExpectedRows(57, 6_000, 2_000, 226).says
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
        said = f"at most {self.total:,} rows to the server, if it refuses none: {parts}"
        if not self.unknown:
            return said
        return (
            f"{said}; not counted are the rows of {listed(self.unknown)}, which no setting bounds: give a budget, such "
            "as queries=1000 in --threat"
        )


def expected_rows(
    plan: Plan,
    n: int,
    *,
    right: int | None = None,
    passes: Passes,
    randomised: bool = False,
    gates: bool = False,
    others: Sequence[int] = (),
    openings: int = 1,
    opening: int = 0,
) -> ExpectedRows:
    """The most rows that a run of the plan on `n` examples sends to a server, rows that fill up a batch included.

    `right` is how many examples are classified correctly, which attacks are run on; None is all of them. `gates` says
    whether a gate is tried on a few examples first, `others` how many examples each data set has that changes are
    carried to and from, `openings` how many processes look at the model, and `opening` how many rows each of them
    takes to find out how the data are read.
    """
    due = n if right is None or isinstance(plan.threat.constraint, Corruptions) else right
    judged = JUDGED_AT_RANDOM if randomised else 1
    few = passes.filled(min(LOOKED_AT, n))
    look = passes.filled(1) + (1 + VOTES if randomised else 2) * few
    clean = openings * (look + opening) + (judged * few if gates else 0) + judged * passes.once(n)
    asked, unknown = _attacked((*plan.members, *plan.curve, *plan.adaptive), plan, due, passes)
    members = (*plan.members, *plan.curve, *plan.adaptive)
    judging = sum(judged * _of(member, passes).once(due) for member in members)
    judging += _on_surrogates(plan, n, passes, judged) + _across(plan, n, passes, others)
    doubts = _doubts(plan, due, passes, randomised=randomised)
    return ExpectedRows(clean, asked, doubts, judging, unknown)


def expected_of(
    order: Order,
    plan: Plan,
    target: Target,
    n: int,
    cut: Mapping[str, Any],
    *,
    right: int | None = None,
    opening: int = 0,
) -> ExpectedRows:
    """`expected_rows` of a run whose manifest says under `cut` in which shards and batches it is measured."""
    shards = tuple(stop - start for start, stop in cut["shards"])
    return expected_rows(
        plan,
        n,
        right=right,
        passes=Passes(cut["batch_size"], target.bare.batches, shards),
        randomised=target.randomised,
        gates=any(claim.versus is None for claim in order.gates),
        others=tuple(map(len, order.across)),
        openings=1 + (order.workers or 0),
        opening=opening,
    )


def _of(member: Member, passes: Passes) -> Passes:
    """How the examples of an attack are passed: waves are measured apart, as shards are."""
    return replace(passes, shards=passes.shards * (1 + member.waves))


def _attacked(members: Iterable[Member], plan: Plan, due: int, passes: Passes) -> tuple[int, tuple[str, ...]]:
    """The most rows that attacks ask for, and the names of those of which that is not known."""
    rows, unknown = 0, []
    for member in members:
        most = most_rows(member.attack, plan.threat, due, _of(member, passes))
        rows += most or 0
        if most is None:
            unknown.append(member.name)
    return rows, tuple(unknown)


def _doubts(plan: Plan, due: int, passes: Passes, *, randomised: bool) -> int:
    """The rows of all probes on as many examples as they take, or those of the suite, which they never exceed."""
    if plan.doubts != "all":
        return 0
    together, attacks = replace(passes, shards=()), [member.attack for member in plan.members]
    probes = sum(
        probe_rows(
            probe,
            attacks,
            plan.threat,
            min(due, FRESH_ROWS if probe.name == AGAIN else SAMPLE),
            together,
            randomised=randomised,
        )
        or 0
        for probe in probes_for(plan.threat, tuple(attacks))
    )
    suite, unknown = _attacked(plan.members, plan, due, Passes(passes.size))
    judged = JUDGED_AT_RANDOM if randomised else 1
    return probes if unknown else min(probes, suite + judged * due * len(plan.members))


def _on_surrogates(plan: Plan, n: int, passes: Passes, judged: int) -> int:
    """The rows of the transfer matrix: each clean input, and what is made of it on each surrogate and on all."""
    if not plan.matrix:
        return 0
    models = len(plan.threat.surrogates)
    makers = models + (models > 1)
    return (1 + makers * judged) * passes.once(min(n, MATRIX_ROWS))


def _across(plan: Plan, n: int, passes: Passes, others: Sequence[int]) -> int:
    """The rows of changes that are carried across data sets: those of each, and as many controls, on each."""
    if not plan.across:
        return 0
    sets = 1 + len(others)
    return (sets + 2 * sets**2) * replace(passes, shards=()).once(min(n, MATRIX_ROWS, *others))
