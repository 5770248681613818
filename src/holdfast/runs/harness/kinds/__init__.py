"""The kinds of stages of a measurement. Each kind defines on which examples its stages run, how they measure them, and
which columns they return.

The names of the kinds are stored in `run.json`. The stages of a plan follow the order of `KINDS`.
"""

from collections.abc import Mapping

from holdfast.runs.harness.kinds.across import AcrossSets
from holdfast.runs.harness.kinds.answer_checks import AnswerChecks
from holdfast.runs.harness.kinds.attack import SuiteAttack
from holdfast.runs.harness.kinds.clean import Clean
from holdfast.runs.harness.kinds.detection import DetectorPass
from holdfast.runs.harness.kinds.fit import Fit
from holdfast.runs.harness.kinds.geometry import GeometryTable
from holdfast.runs.harness.kinds.passes import CurvePass, FixedPass
from holdfast.runs.harness.kinds.proof import LateProof, QuickProof, RadiusProof, StatisticalProof
from holdfast.runs.harness.kinds.stateful import StatefulTable
from holdfast.runs.harness.kinds.transfer import TransferMatrix
from holdfast.runs.harness.stage import StageKind

KINDS: Mapping[str, StageKind] = {
    kind.name: kind
    for kind in (
        Clean(),
        QuickProof(),
        StatisticalProof(),
        RadiusProof(),
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
