"""Errors of Holdfast, each with the exit code of the command line; the changes of arguments that resolve them; and
needs of the later steps of a run, which are checked before anything is computed.
"""

import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any, ClassVar, Self, TypeAlias


@dataclass(frozen=True)
class Placeholder:
    """A value that only the user knows, such as the path of further examples."""

    text: str
    """the value on the command line, as in `DATA`"""
    python: str = ""
    """the value in Python, if it is written in another way"""
    form: str = ""
    """what the value on the command line stands for, as in `FILE contains JSON`"""

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return self.python or self.text


Value: TypeAlias = str | int | float | bool | tuple[str, ...] | tuple[float, ...] | Placeholder | None


@dataclass(frozen=True)
class Remedy:
    """A change of one argument, or of several together, that resolves an error.

    >>> Remedy("class_names", ("cat", "dog")).on_command_line()
    'give --class-names cat,dog'
    >>> model_argument("class_names", ("cat", "dog")).in_python()
    "give class_names=('cat', 'dog') to holdfast.open_model"
    >>> Remedy("geometry").on_command_line(), Remedy("geometry").in_python()
    ('leave out --geometry', 'leave out geometry')
    >>> Remedy("recipe.samples").on_command_line()
    'leave out --set recipe.samples'
    >>> Remedy("fit", Placeholder("DATA")).on_command_line()
    'give --fit DATA'
    >>> Remedy("x", Placeholder("NAME"), also=(Remedy("y", Placeholder("NAME")),)).on_command_line()
    'give --x NAME --y NAME'
    >>> remedy = Remedy("method", "smoothing", also=(Remedy("threat", "l2:0.5"),))
    >>> remedy.on_command_line(), remedy.in_python()
    ('give --method smoothing --threat l2:0.5', "give method='smoothing', threat='l2:0.5'")
    >>> remedy = Remedy("recipe.training.lr", 0.01)
    >>> remedy.on_command_line(), remedy.in_python()
    ('give --set recipe.training.lr=0.01', 'give training.lr=0.01 in recipe')
    """

    argument: str
    """name of the argument in Python and in configuration files; with a dot, a setting inside of one"""
    value: Value = None
    """value that resolves the error; None if the argument is to be left out"""
    option: str = ""
    """option of the command line, if it is not the name of the argument with hyphens"""
    function: str = ""
    """function of `holdfast` that has the argument in Python, if it is not the one that was called"""
    repeated: bool = False
    """whether the option is given once for each element of the value"""
    reason: str = ""
    """what the remedy does, as in `to read the first row as data`"""
    also: "tuple[Remedy, ...]" = ()
    """changes of further arguments that are necessary as well"""

    def in_python(self) -> str:
        """Return the remedy as arguments of a function of the Python interface."""
        left_out = [each.argument for each in self._parts if each.value is None]
        given = [each for each in self._parts if each.value is not None]
        texts = [f"leave out {' and '.join(left_out)}"] if left_out else []
        for function in dict.fromkeys(each.function for each in given):
            assignments = (each._assignment() for each in given if each.function == function)
            place = f" to holdfast.{function}" if function else ""
            texts.append(f"give {', '.join(assignments)}{place}")
        return self._with_reason(" and ".join(texts))

    def on_command_line(self) -> str:
        """Return the remedy as options of the command line."""
        left_out = [each.flag for each in self._parts if each.value is None]
        texts = [f"leave out {' and '.join(left_out)}"] if left_out else []
        if words := self.words():
            texts.append(f"give {shlex.join(words)}")
        placeholders = (part.value for part in self._parts if isinstance(part.value, Placeholder))
        forms = "; ".join(each.form for each in placeholders if each.form)
        return self._with_reason(" and ".join(texts)) + (f" ({forms})" if forms else "")

    def words(self) -> tuple[str, ...]:
        """Return the words that the remedy adds to a command line; none if it only removes options."""
        return tuple(word for each in self._parts for word in each._own_words())

    def _own_words(self) -> tuple[str, ...]:
        match self.value:
            case None:
                return ()
            case _ if "." in self.argument:
                return ("--set", f"{self.argument}={self._written}")
            case bool():
                return (self.flag if self.value else f"--no-{self.flag[2:]}",)
            case tuple() if self.repeated:
                return tuple(word for part in self.value for word in (self.flag, str(part)))
            case _:
                return (self.flag, self._written)

    @property
    def flag(self) -> str:
        """The option of the command line, as in `--class-names`, or `--set` with a setting inside of one."""
        if "." in self.argument:
            return f"--set {self.argument}"
        return self.option or f"--{self.argument.replace('_', '-')}"

    @property
    def _parts(self) -> "tuple[Remedy, ...]":
        return (self, *self.also)

    @property
    def _written(self) -> str:
        return ",".join(map(str, self.value)) if isinstance(self.value, tuple) else str(self.value)

    def _assignment(self) -> str:
        first, dot, rest = self.argument.partition(".")
        return f"{rest}={self.value!r} in {first}" if dot else f"{first}={self.value!r}"

    def _with_reason(self, text: str) -> str:
        space = "" if self.reason.startswith(",") else " "
        return f"{text}{space}{self.reason}" if self.reason else text


model_argument = partial(Remedy, function="open_model")
"""remedy that changes an argument of `holdfast.open_model`"""
data_argument = partial(Remedy, function="open_data")
"""remedy that changes an argument of `holdfast.open_data`"""

TRUST_CODE = model_argument("trust_code", True, reason="if you trust it")
"""permission to run the code in a file, or to which a file refers"""
RESUME = Remedy("resume", True)
"""continuation of a run in its folder"""
RUN_FOLDER = Remedy("run", Placeholder("DIR"))
"""folder of a run"""
OTHER_FOLDER = Remedy("run", Placeholder("DIR"), reason="for another folder")
"""folder of a new run"""
OTHER_EXAMPLES = Remedy("fit", Placeholder("DATA"), reason="for other examples")
"""examples on which a training or an attack is fitted"""
REFERENCE = Remedy("reference", Placeholder("DATA"), reason="with samples that the model was not trained on")
"""samples with which a stream is compared"""
UPSTREAM_KEY = Remedy(
    "upstream_headers", ("Authorization: env:VARIABLE",), "--upstream-header", repeated=True
)
"""header with a key of the upstream server that is in an environment variable"""
SURROGATE = Remedy(
    "surrogates", Placeholder("MODEL", "[MODEL]"), "--surrogate", reason="for a model with the same classes"
)
"""model on which an attacker without access to the assessed one computes examples"""


@dataclass(frozen=True)
class Install:
    """The installation of an extra of the package.

    >>> Install("serve").on_command_line()
    'run: pip install "holdfast-ml[serve]"'
    """

    extra: str
    """name of the extra in `pyproject.toml`"""

    def in_python(self) -> str:
        """Return the command that installs the extra."""
        return f'run: pip install "holdfast-ml[{self.extra}]"'

    def on_command_line(self) -> str:
        """Return the command that installs the extra."""
        return self.in_python()


def remedy_to_json(remedy: Remedy | Install) -> dict[str, Any]:
    """Return a remedy as values that JSON can represent, for messages between processes."""
    if isinstance(remedy, Install):
        return {"extra": remedy.extra}
    content = {each.name: getattr(remedy, each.name) for each in fields(Remedy)}
    if isinstance(remedy.value, Placeholder):
        content["value"] = {each.name: getattr(remedy.value, each.name) for each in fields(Placeholder)}
    return {**content, "also": [remedy_to_json(each) for each in remedy.also]}


def remedy_from_json(content: Mapping[str, Any]) -> Remedy | Install:
    """Return the remedy that `remedy_to_json` has written."""
    if "extra" in content:
        return Install(content["extra"])
    value = content["value"]
    if isinstance(value, Mapping):
        value = Placeholder(**value)
    elif isinstance(value, list):
        value = tuple(value)
    also = tuple(each for part in content["also"] if isinstance(each := remedy_from_json(part), Remedy))
    return Remedy(**{**content, "value": value, "also": also})


def with_remedies(text: str, remedies: Iterable[str]) -> str:
    """Return a text that ends with remedies, of which any one can be chosen."""
    choice = ", or ".join(remedies)
    if not text or not choice:
        return text or choice
    return f"{text} {choice[0].upper()}{choice[1:]}" if text[-1] in ".?" else f"{text}; {choice}"


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


class FreeSizes(UsageError):
    """Error for a model file whose inputs have any shape, which is not declared. That of the data may be taken."""


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
    """Error for a model that accepted its inputs and returned something else than one tensor, or its axes in another
    order.
    """


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


@dataclass(frozen=True)
class Need:
    """What a step of a run needs of the settings, the model, the data and the disk."""

    step: str
    """name of the step"""
    refuse: Callable[[], object]
    """function that raises `UsageError` or `TargetError` if the need is not met"""


def refuse_unmet(needs: Iterable[Need]) -> None:
    """Check the needs of later steps in their order. The message of an error begins with the name of the step."""
    for need in needs:
        try:
            need.refuse()
        except (TargetError, UsageError) as error:
            raise error.reworded(f"the later step {need.step} would fail: {error.message}") from error
