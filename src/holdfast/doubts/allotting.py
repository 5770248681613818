"""Chooses the number of examples for each probe on a model behind a server, so that all probes together send at most as
many inputs as the suite.

Each row sent to a server may cost money. The largest number of rows of a probe is known in advance, so the numbers
follow from the columns of the suite, and a resumed run computes the same ones.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from holdfast.attacks.costs import Passes
from holdfast.core.evidence import Doubt
from holdfast.core.model import VOTES
from holdfast.core.threat import ThreatModel
from holdfast.doubts.probing import counts, doubt_test
from holdfast.doubts.protocol import AGAIN, Probe

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
