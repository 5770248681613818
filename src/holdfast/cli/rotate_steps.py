"""The steps of `holdfast rotate` on the command line, which write progress to stderr and results to stdout."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from holdfast.api import rotate_requests
from holdfast.api.verb_settings import RotateSettings
from holdfast.cli.options import Voice
from holdfast.cli.running import command_line, folder_of_run, progress_bar
from holdfast.core.errors import UsageError
from holdfast.core.names import line
from holdfast.reports.terminal import cell
from holdfast.rotation.pool.pool import NAME_DIGITS, Pool
from holdfast.rotation.steps import admit as admission
from holdfast.rotation.steps import collect as collection
from holdfast.rotation.steps import draw as drawing
from holdfast.rotation.steps import expose as exposure
from holdfast.rotation.steps import rotation_run
from holdfast.rotation.steps import status as pool_status
from holdfast.rotation.steps import swap as swapping
from holdfast.rotation.steps import train as training
from holdfast.rotation.steps.verdicts import Judged
from holdfast.runs.engine.resuming import way_out
from holdfast.runs.engine.signals import stoppable
from holdfast.runs.store.files import usable, write_atomically
from holdfast.runs.store.records import document

_STDOUT = "-"
_AHEAD = 2
"""Smallest recommended number of admitted sets that have not served yet, so that a swap is always possible."""


def collect(
    settings: RotateSettings, voice: Voice, *, run: str | None, resume: bool, expect_head: str
) -> int:
    """Create a pool, train its first parameter sets, and store them encrypted. Return exit code 0."""
    folder = folder_of_run(settings, run)
    again = way_out(command_line(), folder)
    with stoppable(again), progress_bar(voice) as progress:
        request = rotate_requests.collect_request(settings, folder, resume=resume, expect_head=expect_head)
        collected = collection.collect(request, again=again, notify=voice.say, progress=progress)
    accuracy = ", ".join(f"{100 * share:.1f}" for share in collected.accuracy)
    click.echo(
        f"{collected.sets} sets of {collected.runs} trainings of {collected.epochs} epochs; "
        f"accuracy of the bases: {accuracy} %"
    )
    voice.say(f"pool: {collected.pool.path}")
    return 0


def train(pool: str, settings: RotateSettings, voice: Voice, *, expect_head: str) -> int:
    """Train a generator on the parameter sets of a pool, and store it in the pool. Return exit code 0."""
    again = f"an earlier generator is kept, start again with: {command_line()}"
    with stoppable(again):
        request = rotate_requests.train_request(Path(pool), settings, expect_head=expect_head)
        trained = training.train(request, again=again, notify=voice.say)
    click.echo(
        f"generator trained on {trained.sets} sets of {trained.parameters:,} parameters in "
        f"{trained.codec_s + trained.diffusion_s:.0f} s; the codec costs {100 * trained.accuracy_lost:.2f} points of "
        f"accuracy"
    )
    return 0


def draw(
    pool: str,
    settings: RotateSettings,
    voice: Voice,
    *,
    wanted: int | None,
    by: str | None,
    immunising: bool,
    resume: bool,
    expect_head: str,
) -> int:
    """Generate or retrain new parameter sets, and add them to a pool. They serve only after they are admitted. Return
    exit code 0.
    """
    again = f"finished steps are stored; resume with: {command_line()}{'' if resume else ' --resume'}"
    with stoppable(again):
        request = rotate_requests.draw_request(
            Path(pool), settings, sets=wanted, by=by, immunising=immunising, resume=resume,
            expect_head=expect_head
        )  # fmt: skip
        drawn = drawing.draw(request, again=again, notify=voice.say)
    immunised = f", immunised against {len(drawn.against)} sets" if drawn.against else ""
    how = "sampled from the generator" if drawn.by == "generator" else "trained from fresh random weights"
    click.echo(f"{len(drawn.names)} candidates {how}, selected from {drawn.looked_at}{immunised}")
    voice.say(f"a candidate must be admitted before it may serve: holdfast rotate admit {shlex.quote(pool)}")
    return 0


def admit(pool: str, settings: RotateSettings, voice: Voice, *, expect_head: str) -> int:
    """Judge the new parameter sets of a pool by gates. Return exit code 0 if at least one set was admitted, otherwise
    4.
    """
    again = f"finished steps are stored; resume with: {command_line()}"
    with stoppable(again), progress_bar(voice) as progress:
        request = rotate_requests.admit_request(Path(pool), settings, expect_head=expect_head)
        result = admission.admit(request, again=again, notify=voice.say, progress=progress)
    for judged in result.judged if voice.verbose else ():
        _show_gates(judged, voice)
    click.echo(f"{len(result.admitted)} of {len(result.judged)} candidates admitted")
    if result.kept_out:
        click.echo(f"holdfast: {line(result.kept_out)}", err=True)
    return result.exit_code


def turn(
    settings: RotateSettings,
    voice: Voice,
    *,
    run: str | None,
    resume: bool,
    by: str | None,
    immunising: bool,
    once: bool,
    anyway: bool,
    expect_head: str,
) -> int:
    """Run all steps of a rotation, and then swap the serving set whenever a swap is due, until the process is stopped.
    Return exit code 0.

    If `once` is True, the function returns after the steps.
    """
    folder = folder_of_run(settings, run)
    again = way_out(command_line(), folder)
    with stoppable(again), progress_bar(voice) as progress:
        request = rotate_requests.run_request(
            settings, folder, by=by, immunising=immunising, once=once, anyway=anyway, resume=resume,
            expect_head=expect_head
        )  # fmt: skip
        rotation_run.run(request, again=again, notify=voice.say, progress=progress)
    return 0


def swap(pool: str, voice: Voice, *, why: str, unjudged: bool, expect_head: str) -> int:
    """Replace the serving set of a pool by another admitted set. Return exit code 0."""
    opened = Pool.open(Path(pool), expect_head=expect_head)
    swapped = swapping.swap(opened, why, unjudged=unjudged)
    click.echo(f"{swapped.name} serves as epoch {swapped.epoch}")
    if swapped.unjudged:
        voice.say(f"note: {swapping.UNJUDGED}")
    if swapped.waiting < _AHEAD:
        voice.say(
            f"note: {swapped.waiting} admitted sets wait, fewer than the recommended {_AHEAD}; draw and admit more "
            "before the next swap"
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
                write_atomically(Path(output), document(overview), 0o600)
    if _STDOUT in outputs:
        click.echo(json.dumps(overview, indent=2))
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
        table.add_row(row["name"], row["state"], row["since"][:10], epochs, answers, cell(why))
    voice.console().print(table)
    now = overview["serving"]
    serving = (
        "no set serves"
        if now is None
        else f"{now['name']} serves as epoch {now['epoch']} since {now['since']}"
    )
    click.echo(f"{serving}; {len(overview['ahead'])} wait; {overview['entries']} entries, authenticated")


def _show_gates(judged: Judged, voice: Voice) -> None:
    heads = ("verdict", "gate", "measured", "required")
    title = f"{judged.name}: {judged.verdict}"
    table = Table(*heads, title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for gate in judged.gates:
        table.add_row(gate.verdict, gate.name, cell(gate.why), gate.bound)
    for name, estimate in judged.reported.items():
        measured = f"{estimate.value:.3g} ({estimate.low:.3g} to {estimate.high:.3g}, n = {estimate.n:,})"
        table.add_row("–", name, measured, "reported, not a gate")
    voice.console().print(table)
