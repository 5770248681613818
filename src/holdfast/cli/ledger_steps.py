"""The steps of `holdfast rotate` that use only the ledger of a pool, so that no command here imports torch."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from holdfast.cli.options import Voice
from holdfast.core.errors import UsageError
from holdfast.core.names import line
from holdfast.reports.numbers import json_text
from holdfast.rotation.pool.pool import NAME_DIGITS, Pool
from holdfast.rotation.steps import short_steps as exposure
from holdfast.rotation.steps import short_steps as pool_status
from holdfast.rotation.steps import short_steps as swapping
from holdfast.runs.store.files import usable, write_atomically
from holdfast.runs.store.folder import document

_STDOUT = "-"
_AHEAD = 2
"""Smallest recommended number of admitted sets that have not served yet, so that a swap is always possible."""


def swap(pool: str, voice: Voice, *, why: str, unjudged: bool, expect_head: str) -> int:
    """Replace the serving set of a pool by another admitted set. Return exit code 0."""
    opened = Pool.open(Path(pool), expect_head=expect_head)
    swapped = swapping.swap(opened, why, unjudged=unjudged)
    click.echo(f"{swapped.name} serves as epoch {swapped.epoch}")
    if swapped.unjudged:
        voice.say(f"note: {swapping.UNJUDGED}")
    if swapped.waiting < _AHEAD:
        voice.say(
            f"note: number of admitted sets that wait: {swapped.waiting}, and at least {_AHEAD} are recommended; draw "
            "and admit more before the next swap"
        )
    return 0


def expose(pool: str, name: str, voice: Voice, *, why: str, expect_head: str) -> int:
    """Record in the ledger of a pool that an attacker may have a certain parameter set. Return exit code 0."""
    opened = Pool.open(Path(pool), expect_head=expect_head)
    exposed = exposure.expose(opened, name, why)
    click.echo(f"{name} is listed as exposed: {line(why)}")
    if exposed.serving:
        voice.say(f"it is still the serving set; replace it: holdfast rotate swap {shlex.quote(pool)}")
    if exposed.unjudged:
        voice.say(
            f"{exposed.unjudged} waiting sets must be judged again: holdfast rotate admit {shlex.quote(pool)}"
        )
    return 0


def head(pool: str, voice: Voice, *, expect_head: str) -> int:
    """Verify the ledger of a pool and print the digest of its last entry. Return exit code 0."""
    latest = pool_status.head(Pool.open(Path(pool), expect_head=expect_head))
    click.echo(latest.digest)
    voice.say(
        f"this is the digest of entry {latest.entries}; store it outside the folder. A later command with "
        f"--expect-head DIGEST refuses an older copy of the folder"
    )
    return 0


def status(pool: str, voice: Voice, *, outputs: Sequence[str], expect_head: str) -> int:
    """Verify the ledger of a pool, and print its parameter sets and their states. Return exit code 0."""
    for output in outputs:
        if output != _STDOUT and Path(output).suffix != ".json":
            raise UsageError(f"-o {output} is not possible for a pool; write -o FILE.json, or - for stdout")
    overview = pool_status.status(Pool.open(Path(pool), expect_head=expect_head))
    for output in outputs:
        if output != _STDOUT:
            with usable(Path(output)):
                write_atomically(Path(output), document(overview))
    if _STDOUT in outputs:
        click.echo(json_text(overview), nl=False)
    elif not voice.quiet:
        _show(overview, voice)
    for note in overview["notes"]:
        voice.say(f"note: {note}")
    return 0


def _show(overview: Mapping[str, Any], voice: Voice) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("set", min_width=NAME_DIGITS, no_wrap=True)
    for name in ("state", "since", "epoch", "answers"):
        table.add_column(name, no_wrap=True)
    table.add_column("why", overflow="fold")
    for row in overview["sets"]:
        epochs = ", ".join(map(str, row["epochs"]))
        answers = str(row["answers"]) if row["epochs"] else ""
        why = f"exposed: {row['exposed']}" if row["exposed"] else row["why"]
        table.add_row(row["name"], row["state"], row["since"][:10], epochs, answers, Text(line(why)))
    voice.console().print(table)
    now = overview["serving"]
    serving = (
        "no set serves"
        if now is None
        else f"{now['name']} serves as epoch {now['epoch']} since {now['since']}"
    )
    click.echo(f"{serving}; {len(overview['ahead'])} wait; {overview['entries']} entries, authenticated")
