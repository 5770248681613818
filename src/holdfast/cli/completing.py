"""Types of options and arguments for completion by the shell. They do not validate values, and do not import torch."""

from collections.abc import Callable, Sequence
from typing import Any

import click
from click.shell_completion import CompletionItem

from holdfast.attacks.suites import VARIANTS
from holdfast.cli.early import bundled
from holdfast.core.catalogue import DRIFT_TESTS, names
from holdfast.settings.grammar import AUTO, CARD, SOURCES, every_name
from holdfast.threats.parsing import FORMS


class Completed(click.ParamType):  # type: ignore[type-arg]  # generic in new versions of click only
    """Type of a command-line argument that the shell completes with known names, or with file names if
    no name matches.
    """

    name = "text"

    def __init__(self, names: Callable[[], Sequence[str]], *, listed: bool = False) -> None:
        """Create a type whose possible values are returned by `names`.

        If `listed` is True, the value is a list of names separated by commas.
        """
        self.names, self.listed = names, listed

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the value of a command-line argument as a string, without validation."""
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Return the known names that begin with the text `incomplete`, ignoring case. If there is none, the shell
        completes file names.
        """
        before, comma, last = incomplete.rpartition(",") if self.listed else ("", "", incomplete)
        matching = [name for name in self.names() if name.lower().startswith(last.lower())]
        if matching:
            return [CompletionItem(before + comma + name) for name in matching]
        return [CompletionItem(incomplete, type="file")]


def _data() -> list[str]:
    from holdfast.io.data_catalogue import CATALOGUE, GENERATED

    return [*bundled("*.npz"), *GENERATED, *CATALOGUE]


def _attacks() -> list[str]:
    return sorted((*names("attacks"), *VARIANTS), key=str.lower)


MODEL = Completed(lambda: bundled("*.safetensors"))
DATA = Completed(_data)
ATTACK = Completed(_attacks, listed=True)
SUITE = Completed(every_name, listed=True)
RECIPE = Completed(lambda: [AUTO, *names("recipes")])
DRIFT_TEST = Completed(lambda: list(DRIFT_TESTS), listed=True)
METHOD = Completed(lambda: [AUTO, *names("certifiers")])
SETS_RECIPE = Completed(lambda: [CARD, *names("recipes")])
SOURCE = Completed(lambda: list(SOURCES))
THREAT = Completed(lambda: [f"{name}:" for name in FORMS])
