"""The errors a user may meet, each with the exit code that the command line ends with.

Every message shows the value, what was expected, and the way out. Anything else that escapes is a bug (exit code 5).
"""

from typing import ClassVar


class HoldfastError(Exception):
    """Something a user can act upon; `exit_code` is what the command line returns."""

    exit_code: ClassVar[int] = 5


class UsageError(HoldfastError):
    """A flag, a name, a threat string or a configuration that cannot be meant (exit code 2)."""

    exit_code: ClassVar[int] = 2


class NoSplit(UsageError):
    """A split that the data do not have."""


class InUse(UsageError):
    """What another process works on; it can be had once that has ended."""


class TargetError(HoldfastError):
    """A model, a data set or a disk that cannot be used (exit code 3)."""

    exit_code: ClassVar[int] = 3


class CarriesCode(TargetError):
    """A model file that runs code when it is loaded, and that is not trusted."""


class TargetLost(TargetError):
    """A target that cannot be asked any more, whatever the input; a run that was under way can be resumed later."""


class TargetRefused(TargetError):
    """A target that refused an input, or answered it by nothing that can be used; mended, a run goes on with it."""


class InputRefused(TargetRefused):
    """A server that refused the content of a request by its `status`, as 400 or 422; fewer rows may be taken."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class QueriesSpent(TargetLost):
    """The next request to a server would exceed the number of rows that it may be sent; a run can be resumed."""

    def __init__(self, message: str, limit: int = 0) -> None:
        super().__init__(message)
        self.limit = limit


class UnclearOutput(TargetError):
    """Single outputs that may be logits or probabilities, where nothing declares which."""


class LostLoss(TargetError):
    """A training whose loss is no number any more."""


class Inconclusive(HoldfastError):
    """What was measured does not allow what was asked; what stood before still stands (exit code 4)."""

    exit_code: ClassVar[int] = 4


class BudgetSpent(HoldfastError):
    """Raised by the metered model at the query that would exceed the budget; caught by the harness."""


class Interrupted(HoldfastError):
    """The run was asked to stop; `exit_code` is 130 (SIGINT) or 143 (SIGTERM), and the run resumes."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
