"""What `holdfast doctor` looks for: the usual mistakes between a model and its data, found in seconds.

Each check is a pure function of an `Examined` and returns findings in words, with the way out. Checks that compare
accuracies (another scale, another normalisation, shifted labels) speak only when the alternative is right far more
often than what was declared, so that a merely weak model is not accused.
"""

from holdfast.checkup.examination import examine, misfit
from holdfast.checkup.examined import BETTER, Finding
from holdfast.checkup.readings import FILLED

__all__ = ["BETTER", "FILLED", "Finding", "examine", "misfit"]
