"""Errors of Holdfast, each with the exit code of the command line.

Every message shows the value, what was expected, and a remedy. Any other exception is a bug (exit code 5).
"""

from typing import ClassVar


class HoldfastError(Exception):
    """Base class of errors that a user can resolve; `exit_code` is the exit code of the command line."""

    exit_code: ClassVar[int] = 5


class UsageError(HoldfastError):
    """An invalid flag, name, threat string or configuration (exit code 2)."""

    exit_code: ClassVar[int] = 2


class NoSplit(UsageError):
    """The data set does not have the split."""


class InUse(UsageError):
    """Another process uses the file or folder; it is available after that process has ended."""


class TargetError(HoldfastError):
    """A model, a data set or a disk that cannot be used (exit code 3)."""

    exit_code: ClassVar[int] = 3


class CarriesCode(TargetError):
    """A model file that runs code when it is loaded, and that is not trusted."""


class TargetLost(TargetError):
    """A target that no longer answers any input; an unfinished run can be resumed later."""


class TargetRefused(TargetError):
    """A target that rejected an input or gave an unusable answer; after it is repaired, the run can be resumed."""


class InputRefused(TargetRefused):
    """A server rejected the content of a request with a `status` such as 400 or 422; it may accept fewer rows."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class QueriesSpent(TargetLost):
    """The next request to a server would exceed the limit of rows; the run can be resumed."""

    def __init__(self, message: str, limit: int = 0) -> None:
        super().__init__(message)
        self.limit = limit


class UnclearOutput(TargetError):
    """A model returns one number for each example, and it is not declared whether it is a logit or a probability."""


class LostLoss(TargetError):
    """The loss of a training is not finite."""


class Inconclusive(HoldfastError):
    """The measurements do not support the requested change; the present state is kept (exit code 4)."""

    exit_code: ClassVar[int] = 4


class BudgetSpent(HoldfastError):
    """Raised by the metered model at the query that would exceed the budget; caught by the harness."""


class Interrupted(HoldfastError):
    """The run received a signal to stop; `exit_code` is 130 (SIGINT) or 143 (SIGTERM), and the run can be resumed."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
