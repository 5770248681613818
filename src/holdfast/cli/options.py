"""Options of every command, and its output: results on stdout, everything else on stderr."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from holdfast.core.names import line

if TYPE_CHECKING:
    from rich.console import Console

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Voice:
    """Verbosity and colours of a command."""

    quiet: bool = False
    verbose: bool = False
    no_color: bool = False

    @property
    def plain(self) -> bool:
        """Whether colours are turned off by `--no-color` or a nonempty `NO_COLOR`."""
        return self.no_color or bool(os.environ.get("NO_COLOR"))

    def console(self, *, err: bool = False) -> "Console":
        """Return a console on stdout or stderr. It is 110 characters wide if it is not a terminal."""
        from rich.console import Console

        stream = sys.stderr if err else sys.stdout
        width = None if stream.isatty() or os.environ.get("COLUMNS") else 110
        return Console(stderr=err, no_color=self.plain, highlight=False, width=width, soft_wrap=False)

    def say(self, text: str) -> None:
        """Write a line to stderr, unless quiet.

        Control characters and CI commands in it are made harmless.
        """
        if not self.quiet:
            indent = len(text) - len(text.lstrip(" "))
            # click's echo bypasses a progress bar and writes into its line
            sys.stderr.write(f"{' ' * indent}{line(text.strip())}\n")
            sys.stderr.flush()


def with_voice(command: F) -> F:
    """Add -q, -v, --no-color and --debug to a command, which receives a `voice`."""

    def collect(*, quiet: bool, verbose: bool, no_color: bool, debug: bool, **rest: Any) -> Any:
        return command(voice=Voice(quiet, verbose, no_color), **rest)

    collect.__name__, collect.__doc__ = command.__name__, command.__doc__
    collect.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
    for option in (
        click.option("--debug", is_flag=True, help="Show the traceback of an error."),
        click.option(
            "--no-color", is_flag=True, help="Print no colours (as with the environment variable NO_COLOR)."
        ),
        click.option("-v", "--verbose", is_flag=True, help="Print more details."),
        click.option("-q", "--quiet", is_flag=True, help="Print only the requested output."),
    ):
        collect = option(collect)
    return collect  # type: ignore[return-value]


def offered(*options: Callable[[Any], Any]) -> Callable[[F], F]:
    """Add options to a command in the given order."""

    def offer(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return offer
