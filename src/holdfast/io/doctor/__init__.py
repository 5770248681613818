"""Checks of the command `holdfast doctor`, which find common mistakes in the use of a model with its data within
seconds.

Each check is a function of an `Examined` that yields findings; a finding contains a description and advice. Checks that
compare accuracies (another scale, another normalisation, shifted labels) report a finding only if the model is correct
far more often with the alternative than with the declared one, so that a weak model does not cause findings.
"""

from holdfast.io.doctor.behaviour import names_of_labels, spread_examples
from holdfast.io.doctor.examination import examine, misfit
from holdfast.io.doctor.readings import BETTER, FILLED, Checkup, Finding, share_filled

__all__ = [
    "BETTER",
    "FILLED",
    "Checkup",
    "Finding",
    "examine",
    "misfit",
    "names_of_labels",
    "share_filled",
    "spread_examples",
]
