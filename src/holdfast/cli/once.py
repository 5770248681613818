"""A group whose commands take an option once: of two values for one option, click alone would keep the last."""

from collections.abc import Sequence

import click

from holdfast.core.errors import UsageError


class Group(click.Group):
    """A group that refuses an option given twice to one of its commands, unless it may be repeated."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the words name, its options counted before it reads them."""
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None and not ctx.resilient_parsing:
            inner = click.Context(command, parent=ctx, info_name=name, **command.context_settings)
            _, _, order = command.make_parser(inner).parse_args(list(rest))
            _refuse_repeated(order)
        return name, command, rest


def _refuse_repeated(order: Sequence[click.Parameter]) -> None:
    """Raise `UsageError` for an option that stands twice with a value of its own each time."""
    if any(parameter.is_eager for parameter in order):  # --help is answered whatever else stands there
        return
    seen: set[str] = set()
    for option in order:
        if not isinstance(option, click.Option) or option.multiple:
            continue
        switch = option.is_flag and not option.secondary_opts
        if str(option.name) in seen and not switch:
            written = max(option.opts, key=len)
            raise UsageError(f"{written} stands twice, and only one can be meant; keep one")
        seen.add(str(option.name))
