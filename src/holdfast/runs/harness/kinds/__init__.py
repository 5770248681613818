"""The kinds of stages of a measurement. Each kind defines on which examples its stages run, how they measure them, and
which columns they return.

The names of the kinds are stored in `run.json`. The stages of a plan follow the order of `KINDS`.
"""

from collections.abc import Mapping

from holdfast.runs.harness.kinds.attack import Fit, SuiteAttack
from holdfast.runs.harness.kinds.baseline import FromBaseline
from holdfast.runs.harness.kinds.checks import AnswerChecks, GeometryTable, StatefulTable
from holdfast.runs.harness.kinds.passes import (
    AcrossSets,
    Clean,
    CurvePass,
    DetectorPass,
    FixedPass,
    TransferMatrix,
)
from holdfast.runs.harness.kinds.proof import LateProof, QuickProof, RadiusProof, StatisticalProof
from holdfast.runs.harness.stage import StageKind

KINDS: Mapping[str, StageKind] = {
    kind.name: kind
    for kind in (
        Clean(),
        QuickProof(),
        StatisticalProof(),
        RadiusProof(),
        FromBaseline(),
        Fit(),
        SuiteAttack(),
        LateProof(),
        FixedPass(),
        DetectorPass(),
        CurvePass(),
        TransferMatrix(),
        AcrossSets(),
        GeometryTable(),
        StatefulTable(),
        AnswerChecks(),
    )
}
"""All kinds of stages by name."""
