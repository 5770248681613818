"""Measures the examples of an assessment in blocks, until a condition is decided (`holdfast assess --until`)."""

from dataclasses import replace
from pathlib import Path

from holdfast.core.batch import Data
from holdfast.core.evidence import Columns, Looks
from holdfast.gates.grammar import Claim, look_sizes
from holdfast.gates.judging import Doubts, judge
from holdfast.io.data.data import Selection
from holdfast.runs.assess.measuring import Measurement
from holdfast.runs.documents.record import UNTIL, looks_from_json
from holdfast.runs.harness.assembly import Context, evidence_from


def measured_until(measurement: Measurement, claim: Claim) -> Measurement:
    """Measure the first examples, then more, until the claim is decided or all are measured. Return the measurement
    restricted to the examples of the last look, whose stages are complete except that they are not stored as such.

    Each look has the result of an ordinary run on its examples. A shard is measured again only if a stage is run on
    other examples of it than at the look before, as in a wave of an attack. The number of the look is stored, so that
    a resumed run continues with the next one.
    """
    run, plan, target = measurement.run, measurement.plan, measurement.target
    n, stored = len(measurement.data), run.store.document(UNTIL)
    looks = Looks(claim.text, 0, 0, n, None) if stored is None else looks_from_json(Path(), stored)
    while looks.ended is None:
        size = look_sizes(n)[looks.look]
        by_stage: dict[str, Columns] = {}
        look = _first(measurement, size, partial=True)
        missed = look.stages([stage for stage in plan.stages() if not stage.adaptive], by_stage)
        looks = replace(looks, look=looks.look + 1, examples=size)
        outline = plan.outline(target.classes)
        evidence = evidence_from(outline, by_stage, {}, Context(), randomised=target.randomised)
        verdict = judge(claim, replace(evidence, looks=looks), Doubts()).verdict
        if missed:
            looks = replace(looks, ended="out of time")
        elif verdict != "unclear" or size == n:
            looks = replace(looks, ended="all measured" if verdict == "unclear" else "decided")
        run.record(UNTIL, vars(looks))
    return _first(measurement, looks.examples, partial=False)


def _first(measurement: Measurement, n: int, *, partial: bool) -> Measurement:
    """The measurement of the first `n` examples, which end with a shard."""
    data: Data = Selection(measurement.data, tuple(range(n)))
    shards = tuple(shard for shard in measurement.run.shards if shard[1] <= n)
    run = replace(measurement.run, shards=shards, partial=partial)
    return replace(measurement, run=run, data=data, looks=True)
