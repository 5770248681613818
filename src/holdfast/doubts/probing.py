"""The tests of all doubts, their probes, the selection of examples, and the conclusions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from holdfast.attacks.costs import Passes
from holdfast.attacks.parts.random_search import sample_rows
from holdfast.attacks.protocol import Attack
from holdfast.core.catalogue import DOUBTS, load, names
from holdfast.core.draws import Draws
from holdfast.core.evidence import Columns, Doubt
from holdfast.core.model import VOTES
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Ids, Mask, Rows
from holdfast.doubts.protocol import (
    AGAIN,
    Case,
    DoubtTest,
    MeasurementContext,
    Probe,
    ProbeResults,
    probing_threat,
    undecided,
    within_budget,
)


def doubt_tests() -> dict[str, DoubtTest]:
    """Return the tests of all doubts by name, in the order of reports, with those of other packages in the entry-point
    group `holdfast.doubts`.
    """
    return {name: load("doubts", name, DoubtTest) for name in names("doubts")}


def doubt_test(name: str) -> DoubtTest:
    """Return the test of a doubt. If no installed package has it, as for a stored run, it consists of its name."""
    known = name in DOUBTS or name in names("doubts")
    return load("doubts", name, DoubtTest) if known else DoubtTest(name.replace("-", " ").capitalize())


NO_ATTACKS: Mapping[int, Attack] = {}


def all_probes() -> tuple[Probe, ...]:
    """Return all probes in their order, except the new run of the suite."""
    probes = {probe.name: probe for test in doubt_tests().values() for probe in test.probes}
    return tuple(sorted(probes.values(), key=lambda probe: probe.order))


def probes_for(threat: ThreatModel, attacks: Mapping[int, Attack] = NO_ATTACKS) -> tuple[Probe, ...]:
    """Return the probes that are possible under a threat model, with those that run attacks of the suite again, which
    `attacks` has by their places in the suite. If eps is 0, these are only the ones that do not change inputs.
    """
    of_suite = [test.of_suite for test in doubt_tests().values() if test.of_suite is not None and attacks]
    probes = (*all_probes(), *(probe(attacks) for probe in of_suite))
    return tuple(probe for probe in probes if probe.applies(threat) and threat.gives(probe.needs))


def counts(probe: Probe, threat: ThreatModel) -> bool:
    """Return whether adversarial examples that a probe finds are inside the threat model, including its limit on
    queries.
    """
    return probe.breaks and within_budget(probe.queries, threat) == probe.queries


def surviving_examples(columns: Columns, threat: ThreatModel) -> Mask:
    """Return the mask of the examples that survive all attacks of the suite.

    For a minimum-norm run, these are the examples that were not broken within 1.05 times the eps of the probes. The
    factor allows for inaccurate distances: a probe that breaks an example just inside its known distance is no evidence
    against the run.
    """
    surviving = columns["correct"] & columns.get("eligible", torch.ones_like(columns["correct"]))
    if threat.constraint.eps < torch.inf:
        return surviving & ~columns["success"]
    return surviving & (columns["distance"] > 1.05 * probing_threat(threat, columns).constraint.eps)


def rows_for(
    probe: Probe, columns: Columns, threat: ThreatModel, rng: Draws, most: int | None = None
) -> Rows:
    """Return the row indices of the examples on which a probe is run, at most `most`, in the order of the data.

    A sample depends on ids only, so that shards have no influence.
    """
    n = probe.most if most is None else min(most, probe.most)
    if probe.on == "correct":
        among = columns["correct"] & columns.get("eligible", torch.ones_like(columns["correct"]))
        return sample_rows(columns, among, rng, n)
    surviving = surviving_examples(columns, threat)
    if probe.on == "undecided":
        return sample_rows(columns, surviving & undecided(columns), rng, n)
    if probe.on == "surviving":
        return sample_rows(columns, surviving, rng, n)
    # a margin in probability is at least -1, so that examples with NaN are among the first
    closeness = columns.get("attacked_probability_margin", columns["margin"]).double().nan_to_num(nan=-1.0)
    rows = surviving.nonzero()[:, 0]
    return rows[closeness[rows].argsort(stable=True)[:n]].sort().values


LEAST = 8
"""Smallest useful number of examples for a probe: if it breaks none of 8, it may still break up to a third of all
examples (95 % confidence)."""
JUDGED_AT_RANDOM = 1 + 2 * VOTES
"""Number of rows with which one input of a randomised model is evaluated; for other models it is 1."""
OMITTED_FIRST = ("search", AGAIN, "noise", "steadiness")
"""Probes in the order in which they are omitted if not all of them can have `LEAST` examples. The search is first
because it decides no doubt alone."""

_SHARED = "for a served model all doubts together may use at most as many rows as the suite"


@dataclass(frozen=True)
class Allotment:
    """The number of examples for each probe on a model behind a server, and the reasons why some probes are omitted."""

    examples: Mapping[str, int]
    """number of examples by name of the probe; omitted probes are missing"""
    wanted: Mapping[str, int] = field(default_factory=dict)
    """number of examples on which each probe would run if there were no limit, by its name"""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """reason why a probe is omitted, by its name"""


def probe_rows(probe: Probe, threat: ThreatModel, n: int, passes: Passes, *, randomised: bool) -> int | None:
    """Return an upper bound on the number of inputs that a probe sends to a server if it is run on `n` examples.

    Returns None if the number is unknown, as for an attack of another package without a budget.
    """
    votes = VOTES if randomised and probe.voted is not None else 1
    rows = None if probe.rows is None else probe.rows(threat, n, passes, votes)
    judging = (JUDGED_AT_RANDOM if randomised else 1) * passes.once(n) if counts(probe, threat) else 0
    return None if rows is None else rows + judging


def allotted(wanted: Mapping[str, int], budget: int, cost: Callable[[str, int], int | None]) -> Allotment:
    """Return on how many examples each probe is run, so that all probes together send at most `budget` inputs to a
    server. `wanted` contains the numbers of examples without this limit.

    In order of increasing cost, each probe gets an equal part of the remaining rows, or as many as it needs if these
    are fewer.
    """
    reasons: dict[str, str] = {}
    running: dict[str, int] = {}
    for name, n in wanted.items():
        rows = cost(name, n)
        if rows is None:
            reasons[name] = (
                "the number of its rows is unknown in advance; give a budget, such as queries=1000 in --threat"
            )
        else:
            running[name] = rows
    while True:
        examples, remaining = dict[str, int](), budget
        # cheapest first: the rows that a cheap probe does not need go to the others
        for place, name in enumerate(sorted(running, key=lambda name: running[name])):
            share = remaining // (len(running) - place)
            examples[name] = _most(name, wanted[name], share, cost)
            remaining -= cost(name, examples[name]) or 0
        if all(examples[name] >= min(LEAST, wanted[name]) for name in running):
            return Allotment(examples, wanted, reasons)
        omitted = next((name for name in OMITTED_FIRST if name in running), next(iter(running)))
        least = min(LEAST, wanted[omitted])
        reasons[omitted] = _reason(cost(omitted, least) or 0, least, budget)
        del running[omitted]


def _most(name: str, n: int, share: int, cost: Callable[[str, int], int | None]) -> int:
    """The largest number of examples, up to `n`, for which a probe stays within its share of the rows."""
    # not by division: rows that fill up a fixed batch count as well, so the cost is not proportional to k
    return next((k for k in range(n, 0, -1) if (cost(name, k) or 0) <= share), 0)


def _reason(rows: int, n: int, budget: int) -> str:
    return (
        f"{_SHARED}, here {budget:,}, and this one would use {rows:,} on {n} examples in addition to the others; "
        "attack more examples, with a larger -n or --sample"
    )


def as_allotted(doubts: Sequence[Doubt], allotment: Allotment) -> tuple[Doubt, ...]:
    """Return the doubts of a run with notes on those whose probes were omitted, or run on fewer examples, to limit the
    inputs sent to a server.

    A doubt is `not measured` if its probe was omitted, and has a note if its probe was run on fewer examples than
    without the limit.
    """

    def with_note(doubt: Doubt) -> Doubt:
        probe = doubt_test(doubt.name).served_probe
        if probe in allotment.reasons and doubt.state in ("clear", "not measured"):
            return Doubt(doubt.name, "not measured", message=allotment.reasons[probe])
        n, wanted = allotment.examples.get(probe, 0), allotment.wanted.get(probe, 0)
        if 0 < n < wanted and doubt.state in ("clear", "raised"):
            return replace(doubt, message=f"{doubt.message}; {n} of {wanted} examples, because {_SHARED}")
        return doubt

    return tuple(map(with_note, doubts))


NO_PASSES: Mapping[str, Mask] = {}


@dataclass(frozen=True)
class Findings:
    """All doubts of a run with their states, and the examples that the suite did not break but another attack did."""

    doubts: tuple[Doubt, ...]
    missed: Mapping[str, Ids] = field(default_factory=dict)
    """ids of the examples that a probe or pass broke and the suite did not, by name of the probe or pass"""


def is_wanted(probe: Probe, results: ProbeResults, columns: Columns, context: MeasurementContext) -> bool:
    """Return whether a doubt needs the results of a probe, after the results of the probes before it."""
    deciding = [
        test.settled(Case(name, results, columns, context)) is None if test.settled is not None else True
        for name, test in doubt_tests().items()
        if probe.name in {each.name for each in test.probes}
    ]
    return not deciding or any(deciding)


def conclude(
    results: ProbeResults,
    columns: Columns,
    context: MeasurementContext,
    passes: Mapping[str, Mask] = NO_PASSES,
) -> Findings:
    """Return all doubts with their states, such as raised or clear, computed from the results of the probes and the
    columns of the suite.

    `columns` are those of the suite, with the clean `nan` and `is_probability`. `passes` are masks (n) of the examples
    that each pass or probe outside the suite broke, as evaluated by the harness. For a list of attacks (no suite), only
    the doubts that are `free` are returned, and `not-exhausted` if a pass broke examples that survived the attacks.
    """
    missed = missed_by_suite(columns, context.threat, passes)
    attacked = any(probe.breaks and probe.name in results for probe in all_probes())
    doubts = []
    for name, test in doubt_tests().items():
        if test.conclude is None or not (context.suite or test.free or (missed and name == "not-exhausted")):
            continue
        case = Case(name, results, columns, context, missed, attacked)
        complete = all(probe.name in results for probe in test.probes)
        settled = None if complete or test.settled is None else test.settled(case)
        doubts.append(test.conclude(case) if settled is None else settled)
    return Findings(tuple(doubts), missed)


def missed_by_suite(columns: Columns, threat: ThreatModel, passes: Mapping[str, Mask]) -> dict[str, Ids]:
    """Return the ids of the examples that survive the suite but that a probe or another attack outside the suite broke,
    by the name of that attack.
    """
    surviving = surviving_examples(columns, threat)
    ids_by_pass = {name: columns["id"][broken & surviving] for name, broken in passes.items()}
    return {name: ids for name, ids in ids_by_pass.items() if len(ids)}
