"""The kinds of stages of a measurement. Each kind defines on which examples its stages run, how they measure them, and
which columns they return.

The names of the kinds are stored in `run.json`. The stages of a plan follow the order of `KINDS`.
"""

from collections.abc import Mapping

from holdfast.harness.kinds.across import AcrossSets
from holdfast.harness.kinds.attack import SuiteAttack
from holdfast.harness.kinds.clean import Clean
from holdfast.harness.kinds.detection import DetectorPass
from holdfast.harness.kinds.fit import Fit
from holdfast.harness.kinds.geometry import GeometryTable
from holdfast.harness.kinds.passes import CurvePass, FixedPass
from holdfast.harness.kinds.proof import LateProof, QuickProof, StatisticalProof
from holdfast.harness.kinds.stateful import StatefulTable
from holdfast.harness.kinds.transfer import TransferMatrix
from holdfast.harness.stage import StageKind

KINDS: Mapping[str, StageKind] = {
    kind.name: kind
    for kind in (
        Clean(),
        QuickProof(),
        StatisticalProof(),
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
    )
}
"""All kinds of stages by name."""
