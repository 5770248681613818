"""Decides from the results of the probes whether each doubt is raised."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from holdfast.core.evidence import Columns, Doubt
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Ids, Mask
from holdfast.doubts.probing import all_probes, doubt_tests, surviving_examples
from holdfast.doubts.protocol import Case, MeasurementContext, ProbeResults

NO_PASSES: Mapping[str, Mask] = {}


@dataclass(frozen=True)
class Findings:
    """All doubts of a run with their states, and the examples that the suite did not break but another attack did."""

    doubts: tuple[Doubt, ...]
    missed: Mapping[str, Ids] = field(default_factory=dict)
    """ids of the examples that a probe or pass broke and the suite did not, by name of the probe or pass"""


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
    doubts = [
        test.conclude(Case(name, results, columns, context, missed, attacked))
        for name, test in doubt_tests().items()
        if test.conclude is not None and (context.suite or test.free or (missed and name == "not-exhausted"))
    ]
    return Findings(tuple(doubts), missed)


def missed_by_suite(columns: Columns, threat: ThreatModel, passes: Mapping[str, Mask]) -> dict[str, Ids]:
    """Return the ids of the examples that survive the suite but that a probe or another attack outside the suite broke,
    by the name of that attack.
    """
    surviving = surviving_examples(columns, threat)
    ids_by_pass = {name: columns["id"][broken & surviving] for name, broken in passes.items()}
    return {name: ids for name, ids in ids_by_pass.items() if len(ids)}
