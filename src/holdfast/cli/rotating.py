"""The steps of a rotation on the command line: progress on stderr, results on stdout."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from holdfast.cli.options import Voice
from holdfast.cli.running import command_line, progress_bar
from holdfast.config import rotating
from holdfast.config.settings import RotateSettings, canonical_settings
from holdfast.core.chain import canonical as as_bytes
from holdfast.core.chain import digest
from holdfast.core.errors import Inconclusive, LostLoss, UsageError
from holdfast.core.names import line
from holdfast.engine.progress import Progress
from holdfast.engine.resuming import way_out
from holdfast.engine.signals import Stopper, stoppable
from holdfast.reports.terminal import cell
from holdfast.rotation import next_set
from holdfast.store import migrating
from holdfast.store.files import usable, write_atomically
from holdfast.store.pool import NAME_DIGITS, Pool
from holdfast.store.records import document
from holdfast.verbs.rotate import admission, collecting, drawing, learning
from holdfast.verbs.rotate.collecting import Collected
from holdfast.verbs.rotate.drawing import By
from holdfast.verbs.rotate.request import RotateRequest
from holdfast.verbs.rotate.samples import planned, statement
from holdfast.verbs.rotate.status import UNJUDGED, standing
from holdfast.verbs.rotate.verdicts import Judged
from holdfast.verbs.rotate.watching import LoopSettings, RotationLoop
from holdfast.verbs.stored_runs import new_folder

_STDOUT = "-"
_AHEAD = 2
"""Least number of admitted sets that should wait, so that a swap is always possible."""


@dataclass(frozen=True)
class _Begun:
    """A pool whose collection is complete, with the inputs of the next steps."""

    pool: Pool
    terms: RotateRequest
    collected: Collected
    again: str
    """advice how to continue if it is stopped"""
    stopper: Stopper
    progress: Progress


@contextmanager
def _begun(
    settings: RotateSettings, voice: Voice, *, run: str | None, resume: bool, expect_head: str
) -> Iterator[_Begun]:
    folder = Path(run) if run else new_folder("rotate", digest(as_bytes(canonical_settings(settings))))
    again = way_out(command_line(), folder)
    with stoppable(again) as stopper, progress_bar(voice) as progress:
        terms = rotating.terms(settings)
        pool = collecting.begun(folder, terms, resume=resume, expect_head=expect_head, notify=voice.say)
        voice.say(statement(planned(len(terms.held), settings.options.n_judged), planned=True))
        for note in terms.notes:
            voice.say(f"note: {note}")
        collected = collecting.collect(
            pool,
            terms,
            budget_s=rotating.budget_s(settings),
            stopper=stopper,
            notify=voice.say,
            progress=progress,
        )
        yield _Begun(pool, terms, collected, again, stopper, progress)


def collect(
    settings: RotateSettings, voice: Voice, *, run: str | None, resume: bool, expect_head: str
) -> int:
    """Train and encrypt the first sets of a pool. Returns exit code 0 when complete."""
    with _begun(settings, voice, run=run, resume=resume, expect_head=expect_head) as begun:
        collected = begun.collected
    accuracy = ", ".join(f"{100 * share:.1f}" for share in collected.accuracy)
    click.echo(
        f"{collected.sets} sets of {collected.runs} trainings of {collected.epochs} epochs; "
        f"accuracy of the bases: {accuracy} %"
    )
    voice.say(f"pool: {begun.pool.path}")
    return 0


def train(pool: str, settings: RotateSettings, voice: Voice, *, expect_head: str) -> int:
    """Train a generator. Returns exit code 0 when it is stored."""
    opened = Pool.held(Path(pool), expect_head=expect_head)
    with stoppable(f"an earlier generator is kept, start again with: {command_line()}"):
        terms = rotating.reopened(opened, settings)
        learned = learning.learn(
            opened, terms, rotating.codec(settings), rotating.diffusion(settings), notify=voice.say
        )
    click.echo(
        f"generator trained on {learned.sets} sets of {learned.parameters:,} parameters in "
        f"{learned.codec_s + learned.diffusion_s:.0f} s; the codec costs {100 * learned.accuracy_lost:.2f} points of "
        f"accuracy"
    )
    return 0


def draw(
    pool: str,
    settings: RotateSettings,
    voice: Voice,
    *,
    wanted: int | None,
    by: By | None,
    immunising: bool,
    resume: bool,
    expect_head: str,
) -> int:
    """Add candidates to a pool. Returns exit code 0 when complete."""
    opened = Pool.held(Path(pool), expect_head=expect_head)
    again = f"finished steps are stored; resume with: {command_line()}{'' if resume else ' --resume'}"
    with stoppable(again) as stopper:
        terms = rotating.reopened(opened, settings)
        drawn = drawing.draw(
            opened,
            terms,
            wanted,
            by=by,
            immunise=rotating.immunise(settings) if immunising else None,
            resume=resume,
            stopper=stopper,
            notify=voice.say,
        )
    against = f", immunised against {len(drawn.against)} sets" if drawn.against else ""
    how = "sampled from the generator" if drawn.by == "generator" else "trained from fresh random weights"
    click.echo(f"{len(drawn.names)} candidates {how}, selected from {drawn.looked_at}{against}")
    voice.say(f"a candidate must be admitted before it may serve: holdfast rotate admit {shlex.quote(pool)}")
    return 0


def admit(pool: str, settings: RotateSettings, voice: Voice, *, expect_head: str) -> int:
    """Judge the candidates of a pool. Returns exit code 0 if one was admitted, 4 if none."""
    opened = Pool.held(Path(pool), expect_head=expect_head)
    again = f"finished steps are stored; resume with: {command_line()}"
    with stoppable(again) as stopper, progress_bar(voice) as progress:
        result = admission.admit(
            opened,
            rotating.reopened(opened, settings),
            claims=settings.judgement.gates,
            accepted=settings.judgement.accept_doubts,
            judged=settings.options.n_judged,
            again=again,
            stopper=stopper,
            notify=voice.say,
            progress=progress,
        )
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
    by: By | None,
    immunising: bool,
    once: bool,
    expect_head: str,
) -> int:
    """Run all steps, and then swap whenever it is due until stopped. Returns exit code 0, with `once` after the
    steps.
    """
    triggers = rotating.triggers(settings)
    if not (triggers or once):
        raise UsageError(
            "no condition for swaps is given; add --every 50q/principal or --every 24h, or --once"
        )
    with _begun(settings, voice, run=run, resume=resume, expect_head=expect_head) as begun:
        pool, terms = begun.pool, begun.terms
        how = LoopSettings(
            triggers,
            settings.options.min_waiting,
            rotating.immunise(settings) if immunising else None,
            _made_by(begun, settings, voice, by),
            claims=settings.judgement.gates,
            accepted=settings.judgement.accept_doubts,
            judged=settings.options.n_judged,
            again=begun.again,
        )
        turner = RotationLoop(pool, terms, how, begun.stopper, voice.say, begun.progress)
        turner.begin()
        voice.say(f"pool: {pool.path}")
        if not once:
            now = pool.serving
            serves = f"{now.name} serves as epoch {now.epoch}" if now else "no set serves"
            voice.say(
                f"{serves}, {len(pool.ahead)} wait; from now on sets are swapped whenever a swap is due, until Ctrl-C"
            )
            turner.turn()
    return 0


def _made_by(begun: _Begun, settings: RotateSettings, voice: Voice, asked: By | None) -> By | None:
    """Train a generator if it is needed. Returns how sets are made: `asked`, or `anew` if that training failed."""
    if asked == "anew" or begun.collected.sets == 1 or learning.what_was_learned(begun.pool) is not None:
        return asked
    codec, diffusion = rotating.codec(settings), rotating.diffusion(settings)
    try:
        learning.learn(begun.pool, begun.terms, codec, diffusion, notify=voice.say)
    except (Inconclusive, LostLoss) as error:
        if asked is not None:
            raise
        voice.say(f"note: {error}; sets are trained from fresh random weights")
        return "anew"
    return asked


def swap(pool: str, voice: Voice, *, why: str, unjudged: bool, expect_head: str) -> int:
    """Let another set serve. Returns exit code 0."""
    opened = Pool.held(Path(pool), expect_head=expect_head)
    old = opened.unjudged
    now = opened.swap(why=why, choose=next_set, unjudged=unjudged)
    click.echo(f"{now.name} serves as epoch {now.epoch}")
    if now.name in old:
        voice.say(f"note: {UNJUDGED}")
    left = len(opened.ahead)
    if left < _AHEAD:
        voice.say(
            f"note: {left} admitted sets wait, fewer than the recommended {_AHEAD}; draw and admit more before the "
            "next swap"
        )
    return 0


def expose(pool: str, name: str, voice: Voice, *, why: str, expect_head: str) -> int:
    """Record that an attacker may have a set. Returns exit code 0 when the ledger contains it."""
    if not why.strip():
        raise UsageError("the exposure has no reason; describe what happened with --why TEXT")
    opened = Pool.held(Path(pool), expect_head=expect_head)
    opened.expose(name, why)
    click.echo(f"{name} is listed as exposed: {line(why)}")
    serving = opened.serving
    if serving is not None and serving.name == name:
        voice.say(f"it is still the serving set; replace it: holdfast rotate swap {shlex.quote(pool)}")
    if opened.unjudged:
        voice.say(
            f"{len(opened.unjudged)} waiting sets must be judged again: holdfast rotate admit {shlex.quote(pool)}"
        )
    return 0


def head(pool: str, voice: Voice, *, expect_head: str) -> int:
    """Print the digest of the last entry. Returns exit code 0 if the ledger is valid."""
    ledger = Pool.held(Path(pool), expect_head=expect_head).ledger
    latest = ledger.head
    click.echo(latest)
    voice.say(
        f"this is the digest of entry {ledger.entry_of(latest)}; store it outside the folder. A later command with "
        f"--expect-head DIGEST refuses an older copy of the folder"
    )
    return 0


def migrate(pool: str, voice: Voice) -> int:
    """Convert a pool of the older format. Returns exit code 0."""
    migrated = migrating.migrate(Path(pool))
    click.echo(f"{migrated.entries} entries converted and authenticated; head {migrated.head}")
    listed = ", ".join(migrated.exposed) or "no set"
    voice.say(
        f"note: the older ledger was not authenticated: entries may have been removed or changed by anyone who could "
        f"write the folder. It lists {listed} as exposed; record what is missing with holdfast rotate expose "
        f"{shlex.quote(pool)} SET"
    )
    if migrated.unjudged:
        voice.say(
            f"note: the older ledger does not record which stolen sets a set was judged against, so "
            f"{len(migrated.unjudged)} waiting sets must be judged again: holdfast rotate admit {shlex.quote(pool)}"
        )
    return 0


def status(pool: str, voice: Voice, *, outputs: Sequence[str], expect_head: str) -> int:
    """Show the content of a pool. Returns exit code 0 if its ledger is valid."""
    for output in outputs:
        if output != _STDOUT and Path(output).suffix != ".json":
            raise UsageError(f"-o {output} is not possible for a pool; write -o FILE.json, or - for stdout")
    overview = standing(Pool.held(Path(pool), expect_head=expect_head))
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
