"""The doubt `odd-gradients` of a candidate set of a rotation, which `verbs/rotate/admission_gates.py` measures."""

from holdfast.doubts.protocol import DoubtTest

TEST = DoubtTest(
    raised_if="for a candidate set of a rotation: attacks on it succeed more often than on the serving set, and "
    "examples from sets of the same draw transfer to it three times as often as those from stolen sets",
    title="Odd gradients",
)
