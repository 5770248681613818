"""A group whose commands accept an option once. click would use the last of several values."""

from collections.abc import Sequence

import click

from holdfast.core.errors import UsageError


class Group(click.Group):
    """A group that refuses repeated options of its commands, except options that allow it."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command of the words, after checking that its options are not repeated."""
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None and not ctx.resilient_parsing:
            inner = click.Context(command, parent=ctx, info_name=name, **command.context_settings)
            _, _, order = command.make_parser(inner).parse_args(list(rest))
            _refuse_repeated(order)
        return name, command, rest


def _refuse_repeated(order: Sequence[click.Parameter]) -> None:
    """Raise `UsageError` for an option that is given twice with a value."""
    if any(parameter.is_eager for parameter in order):  # --help is answered whatever other options are given
        return
    seen: set[str] = set()
    for option in order:
        if not isinstance(option, click.Option) or option.multiple:
            continue
        switch = option.is_flag and not option.secondary_opts
        if str(option.name) in seen and not switch:
            written = max(option.opts, key=len)
            raise UsageError(f"{written} is given twice, and it has only one value; keep one")
        seen.add(str(option.name))
