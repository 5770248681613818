"""The options that every command has, and the output of commands: results are written to stdout, everything else to
stderr.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import click

from holdfast.core.errors import UsageError
from holdfast.core.names import line
from holdfast.core.remedies import Remedy

if TYPE_CHECKING:
    from rich.console import Console

F = TypeVar("F", bound=Callable[..., Any])


class Group(click.Group):
    """A group of commands that rejects a command line in which an option with one value is given twice."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command at the start of `args` with its name and its arguments. Raises `UsageError` if an option
        with one value is given twice.
        """
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None and not ctx.resilient_parsing:
            inner = click.Context(command, parent=ctx, info_name=name, **command.context_settings)
            _, _, order = command.make_parser(inner).parse_args(list(rest))
            _refuse_repeated(order)
        return name, command, rest


def _refuse_repeated(order: Sequence[click.Parameter]) -> None:
    """Raise `UsageError` if an option that has one value is given twice."""
    if any(parameter.is_eager for parameter in order):  # --help is answered whatever other options are given
        return
    names_given: set[str] = set()
    for option in order:
        if not isinstance(option, click.Option) or option.multiple:
            continue
        switch = option.is_flag and not option.secondary_opts
        if str(option.name) in names_given and not switch:
            written = max(option.opts, key=len)
            raise UsageError(f"{written} is given twice, and it has only one value; keep one")
        names_given.add(str(option.name))


def expecting_head(text: str) -> Callable[[F], F]:
    """Return the option `--expect-head DIGEST` with a help text. An empty value, as of a variable that is not set, is
    refused, because without a digest nothing is compared.
    """

    def given(context: click.Context, parameter: click.Parameter, value: str | None) -> str:
        if value == "":
            raise UsageError(
                "--expect-head is empty; the digest that was printed earlier was expected",
                Remedy("expect_head"),
            )
        return value or ""

    return click.option("--expect-head", metavar="DIGEST", callback=given, help=text)


_VOICE = "holdfast.voice"
"""Key of the `Voice` in the metadata of click's context."""


@dataclass(frozen=True)
class Voice:
    """Verbosity and colours of the output of a command, with methods that write messages."""

    quiet: bool = False
    verbose: bool = False
    no_color: bool = False

    @property
    def plain(self) -> bool:
        """Whether colours are turned off by `--no-color` or by a nonempty environment variable `NO_COLOR`."""
        return self.no_color or bool(os.environ.get("NO_COLOR"))

    def console(self, *, err: bool = False) -> "Console":
        """Return a console of the library Rich on stdout or stderr. It is 110 characters wide if it is
        not a terminal.
        """
        from rich.console import Console

        stream = sys.stderr if err else sys.stdout
        width = None if stream.isatty() or os.environ.get("COLUMNS") else 110
        return Console(stderr=err, no_color=self.plain, highlight=False, width=width, soft_wrap=False)

    def say(self, text: str) -> None:
        """Write a line of text to stderr, unless the option `--quiet` was given.

        Control characters and CI commands in the text are escaped.
        """
        if not self.quiet:
            indent = len(text) - len(text.lstrip(" "))
            # click's echo bypasses a progress bar and writes into its line
            sys.stderr.write(f"{' ' * indent}{line(text.strip())}\n")
            sys.stderr.flush()


def _remember(field: str) -> Callable[[click.Context, click.Parameter, bool], None]:
    """Return a callback of click that stores the value of a flag in the `Voice` of the running command."""

    def remember(context: click.Context, parameter: click.Parameter, value: bool) -> None:  # noqa: FBT001 (by click)
        context.meta[_VOICE] = replace(context.meta.get(_VOICE, Voice()), **{field: value})

    return remember


_OPTIONS = (
    click.option(
        "-q",
        "--quiet",
        is_flag=True,
        expose_value=False,
        callback=_remember("quiet"),
        help="Print only the requested output.",
    ),
    click.option(
        "-v",
        "--verbose",
        is_flag=True,
        expose_value=False,
        callback=_remember("verbose"),
        help="Print more details.",
    ),
    click.option(
        "--no-color",
        is_flag=True,
        expose_value=False,
        callback=_remember("no_color"),
        help="Print no colours (as with the environment variable NO_COLOR).",
    ),
    # read from the words of the command line, because errors occur before options are parsed, too
    click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error."),
)


def with_voice(command: F) -> F:
    """Add the options `-q`, `-v`, `--no-color` and `--debug` to a command, which receives their values as a `Voice` in
    its first argument.

    The `Voice` has its defaults if no option was parsed, as in a command that another command invokes.
    """

    @wraps(command)
    def with_first_argument(*args: Any, **options: Any) -> Any:
        context = click.get_current_context()
        return context.invoke(command, context.meta.get(_VOICE, Voice()), *args, **options)

    return offered(*_OPTIONS)(with_first_argument)  # type: ignore[return-value]


def offered(*options: Callable[[Any], Any]) -> Callable[[F], F]:
    """Return a decorator that adds several click options to a command, in the given order."""

    def offer(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return offer
