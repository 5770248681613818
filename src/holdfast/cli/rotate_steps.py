"""The steps of `holdfast rotate` on the command line, which write progress to stderr and results to stdout."""

import shlex
from pathlib import Path

import click
from rich.table import Table

from holdfast.api import rotate_requests
from holdfast.api.verb_settings import RotateSettings
from holdfast.cli.options import Voice
from holdfast.cli.running import command_line, folder_of_run, progress_bar
from holdfast.core.names import line
from holdfast.reports.terminal import cell
from holdfast.reports.words import amount
from holdfast.rotation.steps import admit as admission
from holdfast.rotation.steps import collect as collection
from holdfast.rotation.steps import draw as drawing
from holdfast.rotation.steps import rotation_run
from holdfast.rotation.steps import train as training
from holdfast.rotation.steps.admission_gates import Judged
from holdfast.runs.engine.resuming import way_out
from holdfast.runs.engine.signals import stoppable


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
    immunised = f", immunised against {amount(len(drawn.against), 'sets')}" if drawn.against else ""
    how = "sampled from the generator" if drawn.by == "generator" else "trained from fresh random weights"
    click.echo(f"{amount(len(drawn.names), 'candidates')} {how}, selected from {drawn.looked_at}{immunised}")
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
