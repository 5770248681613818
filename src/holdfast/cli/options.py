"""The options that every command has, and the output of commands: results are written to stdout, everything else to
stderr.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import click

from holdfast.core.errors import Remedy, UsageError
from holdfast.core.names import line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from holdfast.settings.groups import Section

F = TypeVar("F", bound=Callable[..., Any])

_ALL = "holdfast.help-all"
"""Key of the metadata of click's context that states whether the help shows all options."""
_TITLES: "Mapping[Section, str]" = {
    "command": "Options",
    "threat": "Threat",
    "model": "Model",
    "data": "Data",
    "report": "Report",
    "run": "Run",
}


_FEW = 5
"""Number of options up to which `--help` shows also those that few people use."""


def _show_all(context: click.Context, parameter: click.Parameter, value: bool) -> None:  # noqa: FBT001
    if value:
        context.meta[_ALL] = True
        click.echo(context.get_help(), color=context.color)
        context.exit()


_HELP_ALL: Mapping[str, Any] = {
    "is_flag": True,
    "is_eager": True,
    "expose_value": False,
    "callback": _show_all,
    "help": "Show all options and exit.",
}


class GroupedOption(click.Option):
    """An option with its part of the help, and whether `--help` or only `--help-all` shows it."""

    def __init__(
        self, *arguments: Any, section: "Section" = "run", common: bool = False, **settings: Any
    ) -> None:
        super().__init__(*arguments, **settings)
        self.section, self.common = section, common


class Command(click.Command):
    """A command whose `--help` shows the options that most people use, in parts, and whose `--help-all` shows all."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        rare = [option for option in self.params if isinstance(option, GroupedOption) and not option.common]
        self.abridged = len(rare) > _FEW
        self.params.append(click.Option(["--help-all"], hidden=not self.abridged, **_HELP_ALL))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, each part below its title, and the number of those that are not shown."""
        parts: dict[Section, list[tuple[str, str]]] = {section: [] for section in _TITLES}
        n_left_out = 0
        shows_all = not self.abridged or ctx.meta.get(_ALL)
        for option in self.get_params(ctx):
            record = option.get_help_record(ctx)
            if record is None or isinstance(option, click.Argument):
                continue
            if not isinstance(option, GroupedOption):
                parts["run" if option.is_eager else "command"].append(record)
            elif option.common or shows_all:
                parts[option.section].append(record)
            else:
                n_left_out += 1
        for section, records in parts.items():
            if records:
                with formatter.section(_TITLES[section]):
                    formatter.write_dl(records)
        if n_left_out:
            formatter.write_paragraph()
            formatter.write_text(f"{n_left_out} further options: {ctx.command_path} --help-all")


class Group(click.Group):
    """A group of commands that rejects a command line in which an option with one value is given twice."""

    command_class = Command

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.params.append(click.Option(["--help-all"], hidden=True, **_HELP_ALL))

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

    return click.option("--expect-head", cls=GroupedOption, metavar="DIGEST", callback=given, help=text)


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


def plain_table(*headings: str, title: str | None = None) -> "Table":
    """Return a table of the library Rich without lines, for `Voice.console`."""
    from rich.table import Table

    return Table(*headings, title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")


def _remember(field: str) -> Callable[[click.Context, click.Parameter, bool], None]:
    """Return a callback of click that stores the value of a flag in the `Voice` of the running command."""

    def remember(context: click.Context, parameter: click.Parameter, value: bool) -> None:  # noqa: FBT001 (by click)
        context.meta[_VOICE] = replace(context.meta.get(_VOICE, Voice()), **{field: value})

    return remember


_OPTIONS = (
    click.option(
        "-q",
        "--quiet",
        cls=GroupedOption,
        is_flag=True,
        expose_value=False,
        callback=_remember("quiet"),
        help="Print only the requested output.",
    ),
    click.option(
        "-v",
        "--verbose",
        cls=GroupedOption,
        is_flag=True,
        expose_value=False,
        callback=_remember("verbose"),
        help="Print more details.",
    ),
    click.option(
        "--no-color",
        cls=GroupedOption,
        is_flag=True,
        expose_value=False,
        callback=_remember("no_color"),
        help="Print no colours (as with the environment variable NO_COLOR).",
    ),
    # read from the words of the command line, because errors occur before options are parsed, too
    click.option(
        "--debug", cls=GroupedOption, is_flag=True, expose_value=False, help="Show the traceback of an error."
    ),
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
