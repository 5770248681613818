"""Checks of `holdfast doctor`: common mistakes in the combination of a model and its data, in seconds.

Each check is a pure function of an `Examined` and returns findings as text with advice. Checks that compare accuracies
(another scale, another normalisation, shifted labels) report a finding only if the alternative is correct far more
often than the declaration, so that a weak model does not cause findings.
"""

from holdfast.checkup.examination import examine, misfit
from holdfast.checkup.examined import BETTER, Finding
from holdfast.checkup.readings import FILLED

__all__ = ["BETTER", "FILLED", "Finding", "examine", "misfit"]
