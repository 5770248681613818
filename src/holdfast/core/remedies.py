"""Changes of arguments that resolve an error, written for Python and for the command line."""

import shlex
from dataclasses import dataclass
from typing import TypeAlias

Value: TypeAlias = str | int | float | bool | tuple[str, ...] | None


@dataclass(frozen=True)
class Remedy:
    """A change of one argument that resolves an error.

    >>> Remedy("class_names", ("cat", "dog")).on_command_line()
    'give --class-names cat,dog'
    >>> Remedy("class_names", ("cat", "dog"), function="open_model").in_python()
    "give class_names=('cat', 'dog') to holdfast.open_model"
    >>> Remedy("geometry").on_command_line(), Remedy("geometry").in_python()
    ('leave out --geometry', 'leave out geometry')
    """

    argument: str
    """name of the argument in Python and in configuration files"""
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

    def in_python(self) -> str:
        """Return the remedy as an argument of a function of the Python interface."""
        place = f" to holdfast.{self.function}" if self.function else ""
        if self.value is None:
            return self._with_reason(f"leave out {self.argument}")
        return self._with_reason(f"give {self.argument}={self.value!r}{place}")

    def on_command_line(self) -> str:
        """Return the remedy as an option of the command line."""
        if self.value is None:
            return self._with_reason(f"leave out {self.flag}")
        return self._with_reason(f"give {shlex.join(self.words())}")

    def words(self) -> tuple[str, ...]:
        """Return the words that the remedy adds to a command line; none if it removes an option."""
        match self.value:
            case None:
                return ()
            case bool():
                return (self.flag if self.value else f"--no-{self.flag[2:]}",)
            case tuple() if self.repeated:
                return tuple(word for part in self.value for word in (self.flag, part))
            case tuple():
                return (self.flag, ",".join(self.value))
            case _:
                return (self.flag, str(self.value))

    @property
    def flag(self) -> str:
        """The option of the command line, as in `--class-names`."""
        return self.option or f"--{self.argument.replace('_', '-')}"

    def _with_reason(self, text: str) -> str:
        return f"{text} {self.reason}" if self.reason else text


@dataclass(frozen=True)
class Install:
    """The installation of an extra of the package, in a clone of the repository.

    >>> Install("serve").on_command_line()
    "run: pip install -e '.[serve]'"
    """

    extra: str
    """name of the extra in `pyproject.toml`"""

    def in_python(self) -> str:
        """Return the command that installs the extra."""
        return f"run: pip install -e '.[{self.extra}]'"

    def on_command_line(self) -> str:
        """Return the command that installs the extra."""
        return self.in_python()
