"""The doubt `odd-gradients` is raised if attacks on a candidate set of a rotation succeed more often than on the
serving set, and examples from sets of the same draw transfer to it three times as often as those from stolen sets.

It is measured by `rotation/steps/admission_gates.py`.
"""

from holdfast.doubts.protocol import DoubtTest

TEST = DoubtTest(
    title="Odd gradients",
)
