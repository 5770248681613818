"""Errors of Holdfast, each with the exit code of the command line.

Every message shows the value, what was expected, and a remedy. Any other exception is a bug (exit code 5).
"""

from typing import ClassVar


class HoldfastError(Exception):
    """Base class of errors that a user can resolve; `exit_code` is the exit code of the command line."""

    exit_code: ClassVar[int] = 5


class UsageError(HoldfastError):
    """An option, name, threat string or configuration is invalid (exit code 2)."""

    exit_code: ClassVar[int] = 2


class NoSplit(UsageError):
    """The data set does not have the requested split."""


class InUse(UsageError):
    """Another process uses the file or folder, which is available after that process has ended."""


class TargetError(HoldfastError):
    """A model, a data set or a disk cannot be used (exit code 3)."""

    exit_code: ClassVar[int] = 3


class CarriesCode(TargetError):
    """A model file contains code that would run when the file is loaded, and the file is not trusted."""


class TargetLost(TargetError):
    """A served model no longer answers any input; the unfinished run can be resumed later."""


class TargetRefused(TargetError):
    """A served model rejected an input or gave an unusable answer; after it is repaired, the run can be resumed."""


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
    """A model returns one number for each example, and it was not declared whether that is a logit or a probability."""


class LostLoss(TargetError):
    """The loss of a training is not finite."""


class Inconclusive(HoldfastError):
    """The measurements do not support the requested change, and the current state is not changed (exit code 4)."""

    exit_code: ClassVar[int] = 4


class BudgetSpent(HoldfastError):
    """The next query would exceed the budget; the metered model raises this error, and the harness catches it."""


class Interrupted(HoldfastError):
    """The run received a signal to stop; `exit_code` is 130 (SIGINT) or 143 (SIGTERM), and the run can be resumed."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
