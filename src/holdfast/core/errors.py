"""Errors of Holdfast, each with the exit code of the command line.

Every message shows the value, what was expected, and a remedy. Any other exception is a bug (exit code 5).
"""

from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any, ClassVar, Self

from holdfast.core.remedies import Install, Remedy, remedy_from_json, remedy_to_json, with_remedies


class HoldfastError(Exception):
    """Base class of errors that a user can resolve; `exit_code` is the exit code of the command line.

    `remedies` are changes of arguments, each of which resolves the error. The text of the error ends with them, as
    arguments of Python (`str(error)`) or as options of the command line (`on_command_line`). There are none if no
    change of an argument is known to work. `ending` is a sentence after them, and `code` are lines of Python after
    the text, which the user can put into a file.
    """

    exit_code: ClassVar[int] = 5

    def __init__(self, message: str, *remedies: Remedy | Install) -> None:
        super().__init__(message, *remedies)
        self.message, self.remedies, self.ending = message, remedies, ""
        self.code: tuple[str, ...] = ()

    @property
    def remedy(self) -> Remedy | Install | None:
        """The first remedy, or None if there is none."""
        return self.remedies[0] if self.remedies else None

    def __str__(self) -> str:
        text = with_remedies(self.message, [remedy.in_python() for remedy in self.remedies]) + self.ending
        return "\n    ".join((text, *self.code))

    def on_command_line(self) -> str:
        """Return the text of the error for users of the command line."""
        remedies = [remedy.on_command_line() for remedy in self.remedies]
        return with_remedies(self.message, remedies) + self.ending

    def reworded(self, message: str) -> Self:
        """Return an error of the same type with the same remedies, code and ending, and another message."""
        error = type(self)(message, *self.remedies).with_code(*self.code)
        error.ending = self.ending
        return error

    def with_code(self, *lines: str) -> Self:
        """Return the error itself with lines of Python after its text."""
        self.code = lines
        return self

    def ended(self, sentence: str) -> Self:
        """Return an error of the same type with the same text, which ends with another sentence."""
        error = self.reworded(self.message)
        error.ending = f"{self.ending}; {sentence}"
        return error


def failure_to_json(error: HoldfastError) -> dict[str, Any]:
    """Return an error as values that JSON can represent, for messages between processes."""
    remedies = [remedy_to_json(remedy) for remedy in error.remedies]
    code = {"code": list(error.code)} if error.code else {}
    return {
        "error": type(error).__name__,
        "message": error.message + error.ending,
        "remedies": remedies,
        **code,
    }


def failure_from_json(
    content: Mapping[str, Any], kinds: Mapping[str, type[HoldfastError]], start: str = ""
) -> HoldfastError:
    """Return the error that `failure_to_json` has written, as one of `kinds`, or else as a `HoldfastError`. Its message
    begins with `start`.
    """
    remedies = map(remedy_from_json, content["remedies"])
    error = kinds.get(content["error"], HoldfastError)(f"{start}{content['message']}", *remedies)
    return error.with_code(*content.get("code", ()))


class UsageError(HoldfastError):
    """Error for an invalid option, name, threat string or configuration (exit code 2)."""

    exit_code: ClassVar[int] = 2


def importing(module: str, needed: str, extra: str) -> ModuleType:
    """Import and return a module of an optional package. Without the package, raise `UsageError` with the sentence
    `needed`, and the command that installs the extra of this package.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise UsageError(needed, Install(extra)) from error


class NoBounds(UsageError):
    """Error for a network of which no sound bounds can be computed, for example because of one of its operations."""


class NoSplit(UsageError):
    """Error for a data set that does not have the requested split."""


class InUse(UsageError):
    """Error for a file or folder that another process uses. It becomes available when that process ends."""


class TargetError(HoldfastError):
    """Error for a model, a data set or a disk that cannot be used (exit code 3)."""

    exit_code: ClassVar[int] = 3


class CarriesCode(TargetError):
    """Error for a model file that is not trusted and contains code that would run when the file is loaded."""


class TargetLost(TargetError):
    """Error for a served model that no longer answers any request. The unfinished run can be resumed later."""


class TargetRefused(TargetError):
    """Error for a served model that rejected an input or gave an unusable answer. The run can be resumed after the
    server is repaired.
    """


class InputRefused(TargetRefused):
    """Error for an HTTP request whose content a server rejected, with a `status` such as 400 or 422. The server may
    accept a request with fewer inputs.
    """

    def __init__(self, message: str, *remedies: Remedy | Install, status: int = 400) -> None:
        super().__init__(message, *remedies)
        self.status = status


class QueriesSpent(TargetLost):
    """Error for a request that would exceed the limit of inputs sent to a server. The run can be resumed."""

    def __init__(self, message: str, *remedies: Remedy | Install, limit: int = 0) -> None:
        super().__init__(message, *remedies)
        self.limit = limit


class UnclearOutput(TargetError):
    """Error for a model that returns one number for each example without a declaration whether this number is a logit
    or a probability.
    """


class NoLogits(TargetError):
    """Error for a model that accepted its inputs and returned something else than one tensor."""


class LostLoss(TargetError):
    """Error for a training whose loss is not finite."""


class FunctionRaised(TargetError):
    """Error for a function of the user, such as an augmentation, that raised an exception during a training."""


class Inconclusive(HoldfastError):
    """Error for a requested change that the measurements do not support. The current state remains (exit code 4)."""

    exit_code: ClassVar[int] = 4


class UnsoundProof(HoldfastError):
    """Error for a certificate that is proved wrong by an adversarial example (exit code 5). The run issues no
    certificate.
    """


class BudgetSpent(HoldfastError):
    """Error for a query that would exceed the query budget of an attack. It ends the attack, and the adversarial
    examples found so far are used.
    """


class Interrupted(HoldfastError):
    """Error for a run that received a signal to stop. `exit_code` is 130 (SIGINT) or 143 (SIGTERM), and the run can be
    resumed.
    """

    def __init__(self, message: str, *remedies: Remedy | Install, signal_number: int) -> None:
        super().__init__(message, *remedies)
        self.signal_number = signal_number
