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
from holdfast.cli.running import command_line, watched
from holdfast.config import rotating
from holdfast.config.settings import RotateSettings, canonical
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
    found: Collected
    again: str
    """advice how to continue if it is stopped"""
    stopper: Stopper
    progress: Progress


@contextmanager
def _begun(
    settings: RotateSettings, voice: Voice, *, run: str | None, resume: bool, expect_head: str
) -> Iterator[_Begun]:
    folder = Path(run) if run else new_folder("rotate", digest(as_bytes(canonical(settings))))
    again = way_out(command_line(), folder)
    with stoppable(again) as stopper, watched(voice) as progress:
        terms = rotating.terms(settings)
        pool = collecting.begun(folder, terms, resume=resume, expect_head=expect_head, notify=voice.say)
        voice.say(statement(planned(len(terms.held), settings.judged), planned=True))
        for note in terms.notes:
            voice.say(f"note: {note}")
        found = collecting.collect(
            pool,
            terms,
            budget_s=rotating.budget_s(settings),
            stopper=stopper,
            notify=voice.say,
            progress=progress,
        )
        yield _Begun(pool, terms, found, again, stopper, progress)


def collect(
    settings: RotateSettings, voice: Voice, *, run: str | None, resume: bool, expect_head: str
) -> int:
    """Train and encrypt the first sets of a pool. Returns exit code 0 when complete."""
    with _begun(settings, voice, run=run, resume=resume, expect_head=expect_head) as begun:
        found = begun.found
    right = ", ".join(f"{100 * share:.1f}" for share in found.accuracy)
    click.echo(f"{found.sets} sets of {found.runs} runs of {found.epochs} epochs; bases right on {right} %")
    voice.say(f"pool: {begun.pool.path}")
    return 0


def train(pool: str, settings: RotateSettings, voice: Voice, *, expect_head: str) -> int:
    """Train a generator. Returns exit code 0 when it is stored."""
    held = Pool.held(Path(pool), expect_head=expect_head)
    with stoppable(f"what was learned before stands, start again with: {command_line()}"):
        terms = rotating.reopened(held, settings)
        found = learning.learn(
            held, terms, rotating.codec(settings), rotating.diffusion(settings), notify=voice.say
        )
    click.echo(
        f"a generator of {found.sets} sets of {found.parameters:,} numbers, learned in "
        f"{found.codec_s + found.diffusion_s:.0f} s; the codec loses {100 * found.accuracy_lost:.2f} points"
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
    held = Pool.held(Path(pool), expect_head=expect_head)
    again = f"what was finished is kept, go on with: {command_line()}{'' if resume else ' --resume'}"
    with stoppable(again) as stopper:
        terms = rotating.reopened(held, settings)
        found = drawing.draw(
            held,
            terms,
            wanted,
            by=by,
            immunise=rotating.immunise(settings) if immunising else None,
            resume=resume,
            stopper=stopper,
            notify=voice.say,
        )
    against = f", immunised against {len(found.against)} sets" if found.against else ""
    how = "by the generator" if found.by == "generator" else "anew"
    click.echo(f"{len(found.names)} candidates made {how}, of {found.looked_at} looked at{against}")
    voice.say(f"they may serve once they are admitted: holdfast rotate admit {shlex.quote(pool)}")
    return 0


def admit(pool: str, settings: RotateSettings, voice: Voice, *, expect_head: str) -> int:
    """Judge the candidates of a pool. Returns exit code 0 if one was admitted, 4 if none."""
    held = Pool.held(Path(pool), expect_head=expect_head)
    again = f"what was finished is kept, go on with: {command_line()}"
    with stoppable(again) as stopper, watched(voice) as progress:
        found = admission.admit(
            held,
            rotating.reopened(held, settings),
            claims=settings.gates,
            accepted=settings.accept_doubts,
            judged=settings.judged,
            again=again,
            stopper=stopper,
            notify=voice.say,
            progress=progress,
        )
    for judged in found.judged if voice.verbose else ():
        _show_gates(judged, voice)
    click.echo(f"{len(found.admitted)} of {len(found.judged)} candidates admitted")
    if found.kept_out:
        click.echo(f"holdfast: {line(found.kept_out)}", err=True)
    return found.exit_code


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
        raise UsageError("nothing says when to swap; give --every 50q/principal or --every 24h, or --once")
    with _begun(settings, voice, run=run, resume=resume, expect_head=expect_head) as begun:
        pool, terms = begun.pool, begun.terms
        how = LoopSettings(
            triggers,
            settings.keep,
            rotating.immunise(settings) if immunising else None,
            _made_by(begun, settings, voice, by),
            claims=settings.gates,
            accepted=settings.accept_doubts,
            judged=settings.judged,
            again=begun.again,
        )
        turner = RotationLoop(pool, terms, how, begun.stopper, voice.say, begun.progress)
        turner.begin()
        voice.say(f"pool: {pool.path}")
        if not once:
            now = pool.serving
            serves = f"{now.name} serves as epoch {now.epoch}" if now else "nothing serves"
            voice.say(
                f"{serves}, {len(pool.ahead)} wait; from here on it swaps when that is due, until Ctrl-C"
            )
            turner.turn()
    return 0


def _made_by(begun: _Begun, settings: RotateSettings, voice: Voice, asked: By | None) -> By | None:
    """Train a generator if it is needed. Returns how sets are made: `asked`, or `anew` if that training failed."""
    if asked == "anew" or begun.found.sets == 1 or learning.what_was_learned(begun.pool) is not None:
        return asked
    codec, diffusion = rotating.codec(settings), rotating.diffusion(settings)
    try:
        learning.learn(begun.pool, begun.terms, codec, diffusion, notify=voice.say)
    except (Inconclusive, LostLoss) as error:
        if asked is not None:
            raise
        voice.say(f"note: {error}; sets are trained anew")
        return "anew"
    return asked


def swap(pool: str, voice: Voice, *, why: str, unjudged: bool, expect_head: str) -> int:
    """Let another set serve. Returns exit code 0."""
    held = Pool.held(Path(pool), expect_head=expect_head)
    old = held.unjudged
    now = held.swap(why=why, choose=next_set, unjudged=unjudged)
    click.echo(f"{now.name} serves as epoch {now.epoch}")
    if now.name in old:
        voice.say(f"note: {UNJUDGED}")
    left = len(held.ahead)
    if left < _AHEAD:
        voice.say(
            f"note: {left} admitted sets wait, and {_AHEAD} should: draw and admit more before the next swap"
        )
    return 0


def expose(pool: str, name: str, voice: Voice, *, why: str, expect_head: str) -> int:
    """Record that an attacker may have a set. Returns exit code 0 when the ledger contains it."""
    if not why.strip():
        raise UsageError("an exposure is noted without a reason; say what happened with --why TEXT")
    held = Pool.held(Path(pool), expect_head=expect_head)
    held.expose(name, why)
    click.echo(f"{name} is listed as exposed: {line(why)}")
    serving = held.serving
    if serving is not None and serving.name == name:
        voice.say(f"it serves still: holdfast rotate swap {shlex.quote(pool)}")
    if held.unjudged:
        voice.say(
            f"{len(held.unjudged)} sets that wait are to be judged again: holdfast rotate admit {shlex.quote(pool)}"
        )
    return 0


def head(pool: str, voice: Voice, *, expect_head: str) -> int:
    """Print the digest of the last entry. Returns exit code 0 if the ledger is valid."""
    ledger = Pool.held(Path(pool), expect_head=expect_head).ledger
    found = ledger.head
    click.echo(found)
    voice.say(
        f"entry {ledger.entry_of(found)}; store it outside the folder, and give it to later commands as --expect-head, "
        f"which refuse an older copy of the folder"
    )
    return 0


def migrate(pool: str, voice: Voice) -> int:
    """Convert a pool of the older format. Returns exit code 0."""
    found = migrating.migrate(Path(pool))
    click.echo(f"{found.entries} entries converted and authenticated; head {found.head}")
    listed = ", ".join(found.exposed) or "no set"
    voice.say(
        f"note: the older ledger was not authenticated: entries may have been removed or changed by anyone who could "
        f"write the folder. It lists {listed} as exposed; note what is missing by holdfast rotate expose "
        f"{shlex.quote(pool)} SET"
    )
    if found.unjudged:
        voice.say(
            f"note: it does not say what sets were judged against, so {len(found.unjudged)} that wait are to be judged "
            f"again: holdfast rotate admit {shlex.quote(pool)}"
        )
    return 0


def status(pool: str, voice: Voice, *, outputs: Sequence[str], expect_head: str) -> int:
    """Show the content of a pool. Returns exit code 0 if its ledger is valid."""
    for output in outputs:
        if output != _STDOUT and Path(output).suffix != ".json":
            raise UsageError(f"-o {output} has no report of a pool; write -o FILE.json, or - for stdout")
    found = standing(Pool.held(Path(pool), expect_head=expect_head))
    for output in outputs:
        if output != _STDOUT:
            with usable(Path(output)):
                write_atomically(Path(output), document(found), 0o600)
    if _STDOUT in outputs:
        click.echo(json.dumps(found, indent=2))
    elif not voice.quiet:
        _show(found, voice)
    for note in found["notes"]:
        voice.say(f"note: {note}")
    return 0


def _show(found: Mapping[str, Any], voice: Voice) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("set", min_width=NAME_DIGITS, no_wrap=True)
    for name in ("state", "since", "epoch", "answers"):
        table.add_column(name, no_wrap=True)
    table.add_column("why", overflow="fold")
    for one in found["sets"]:
        epochs = ", ".join(map(str, one["epochs"]))
        given = str(one["answers"]) if one["epochs"] else ""
        said = f"exposed: {one['exposed']}" if one["exposed"] else one["why"]
        table.add_row(one["name"], one["state"], one["since"][:10], epochs, given, cell(said))
    voice.console().print(table)
    now = found["serving"]
    serving = (
        "nothing serves"
        if now is None
        else f"{now['name']} serves as epoch {now['epoch']} since {now['since']}"
    )
    click.echo(f"{serving}; {len(found['ahead'])} wait; {found['entries']} entries, authenticated")


def _show_gates(judged: Judged, voice: Voice) -> None:
    heads = ("verdict", "gate", "found", "asked")
    title = f"{judged.name}: {judged.verdict}"
    table = Table(*heads, title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for one in judged.gates:
        table.add_row(one.verdict, one.name, cell(one.why), one.bound)
    for name, found in judged.reported.items():
        said = f"{found.value:.3g} ({found.low:.3g} to {found.high:.3g}, n = {found.n:,})"
        table.add_row("–", name, said, "reported, decides nothing")
    voice.console().print(table)
