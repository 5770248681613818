"""Output of runs on the command line: progress and the verdict on stderr, tables on stdout, and reports in files."""

import math
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from holdfast.cli.options import Voice
from holdfast.core.chain import canonical as as_bytes
from holdfast.core.chain import digest
from holdfast.core.errors import TargetError
from holdfast.core.names import line
from holdfast.reports.run import shown_notes
from holdfast.reports.terminal import body, verdict
from holdfast.reports.tree import Report, Section, Table
from holdfast.reports.words import percent
from holdfast.reports.write import check_destination, rendered, write
from holdfast.runs.assess.expected_time import duration
from holdfast.runs.assess.result import Result
from holdfast.runs.documents.stored_runs import new_folder
from holdfast.runs.engine.identity import way_out
from holdfast.runs.engine.progress import EpochMeasures, Progress, Step, ignore, silent, stoppable
from holdfast.statistics.intervals import clopper_pearson, confidence_sequence
from holdfast.verbs.checked_settings import VerbSettings
from holdfast.verbs.configuration import DEMO, canonical_settings
from holdfast.verbs.functions import demo
from holdfast.verbs.settings import Assess, AuditVerb, Certify, Harden

if TYPE_CHECKING:
    from holdfast.audits.audit import AuditResult
    from holdfast.verbs.exhibition import Exhibit

_STDOUT = "-"
_REPEATED_S = 30.0  # seconds without a line of progress, after which one is written
_BETWEEN_S = 5.0  # fewest seconds between two lines with bounds of the robust accuracy


def command_line() -> str:
    """Return the command line of this process, quoted for a shell."""
    return shlex.join(["holdfast", *sys.argv[1:]])


def folder_of_run(settings: VerbSettings, run: str | None) -> Path:
    """Return the run folder that the user has given, or the path of a new one, named after the command and a digest of
    its settings.
    """
    return Path(run) if run else new_folder(settings.verb, digest(as_bytes(canonical_settings(settings))))


@contextmanager
def finished_run(
    settings: Assess | Certify | Harden | AuditVerb, voice: Voice, *, run: str | None, resume: bool
) -> Iterator[tuple[Any, Path]]:
    """Context manager that takes the steps of a run with a progress bar, and yields its result and its folder. A signal
    ends the process with the command that resumes the run, also while the caller writes reports.
    """
    command, folder = command_line(), folder_of_run(settings, run)
    if resume and not (folder.is_dir() and any(folder.iterdir())):
        voice.say(
            f"note: {str(folder)!r} contains no run to resume, so a new run is started (see holdfast runs)"
        )
    with stoppable(way_out(command, folder)):
        with progress_bar(
            voice, piped=timed_lines if isinstance(settings, Harden) else bound_lines
        ) as progress:
            shared: dict[str, Any] = {
                "resume": resume,
                "progress": progress,
                "notify": voice.say,
                "command": command,
            }
            result: Any
            if isinstance(settings, AuditVerb):
                result = settings.run(folder, **shared)
            else:
                result = settings.run(folder, **shared, detail=voice.say if voice.verbose else ignore)
        yield result, folder


def tell(result: Result, outputs: Sequence[str], voice: Voice, *, folder: Path | None = None) -> None:
    """Write the reports of a finished run to files, print its tables on stdout (JSON if `-` is an output), and its
    verdict on stderr.
    """
    places: list[Path] = []
    try:
        places.extend(_written(result, output, folder) for output in outputs if output != _STDOUT)
        job_summary = os.environ.get("GITHUB_STEP_SUMMARY")
        if job_summary:
            _add(Path(job_summary), rendered(result.report, ".md"))
    finally:
        # also if a report cannot be written, since the measurement took long
        _say(result, voice, as_json=_STDOUT in outputs)
        if folder is not None:
            voice.say(f"run: {folder}")
        for place in places:
            voice.say(f"report: {place}")


def _say(result: Result, voice: Voice, *, as_json: bool) -> None:
    report = result.report
    if as_json:
        click.echo(rendered(report, ".json"))
    elif not voice.quiet:
        width = voice.console().width if sys.stdout.isatty() else None
        click.echo(body(report, colour=_colour(voice), width=width, brief=not voice.verbose))
    click.echo(verdict(report, colour=sys.stderr.isatty() and not voice.plain), err=True, nl=False)
    for note in shown_notes(report.content, verbose=voice.verbose):
        voice.say(f"note: {note}")


def _colour(voice: Voice) -> bool:
    return sys.stdout.isatty() and not voice.plain


def tell_report(
    report: Report,
    outputs: Sequence[str],
    voice: Voice,
    *,
    text: str | None = None,
    has_headline: bool = False,
) -> None:
    """Write the reports of a finished result to files, and print it on stdout (JSON if `-` is an output) and its
    headline on stderr. `text` is printed instead of the tables of the report.
    """
    places: list[Path] = []
    try:
        places.extend(write(report, Path(output)) for output in outputs if output != _STDOUT)
    finally:
        # also if a report cannot be written, since the measurement took long
        if _STDOUT in outputs:
            click.echo(rendered(report, ".json"), nl=False)
        elif not voice.quiet:
            shown = body(report, colour=_colour(voice), width=voice.console().width) if text is None else text
            click.echo(shown)
        if not has_headline:
            click.echo(line(report.headline), err=True)
        for place in places:
            voice.say(f"report: {place}")


def tell_audit(result: "AuditResult", outputs: Sequence[str], voice: Voice, folder: Path | None) -> None:
    """Write the reports of an audit, and print its tables (JSON if `-` is an output) and its verdict."""
    from holdfast.reports.audit import failing_gate

    try:
        tell_report(result.report, outputs, voice)
    finally:
        if gate := failing_gate(result.content):
            _say_failing(gate, voice, folder)
        if folder is not None:
            voice.say(f"run: {folder}")


def _say_failing(gate: str, voice: Voice, folder: Path | None) -> None:
    """Print the gate that fails a flagged audit, with the command that judges it on the finished audit of this
    process.
    """
    from holdfast.runs.engine.identity import resumed

    command = "" if folder is None else f": {resumed(command_line(), folder, '--gate', gate)}"
    voice.say(f"note: no gate was set, so that the exit code is 0; with --gate {gate} it is 1{command}")


def _written(result: Result, output: str, folder: Path | None) -> Path:
    try:
        return result.write(output)
    except TargetError as error:
        if folder is None:
            raise
        raise error.ended(
            f"nothing is lost: holdfast report {shlex.quote(str(folder))} -o FILE writes it again"
        ) from error


def _add(place: Path, text: str) -> None:
    try:
        with place.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise TargetError(
            f"{place} (GITHUB_STEP_SUMMARY) cannot be written: {error.strerror or error}; unset it, or free some space"
        ) from error


PipedProgress = Callable[[Voice], AbstractContextManager[Progress]]
"""Context manager that shows progress in lines, for an output that is not a terminal."""


@contextmanager
def progress_bar(voice: Voice, *, piped: PipedProgress | None = None) -> Iterator[Progress]:
    """Context manager that shows a progress bar on stderr. It yields the function that updates the bar during a run.

    If stderr is not a terminal, no bar is shown. Then `piped` writes lines, and without it nothing is written.
    """
    if voice.quiet or not sys.stderr.isatty():
        if piped is None or voice.quiet:
            yield silent
            return
        with piped(voice) as progress:
            yield progress
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as RichProgress

    class Bars(RichProgress):
        """A bar, and below it the bound of the robust accuracy."""

        bound = ""

        def get_renderables(self) -> Iterator[Any]:
            yield from super().get_renderables()
            if self.bound:
                yield self.bound

    columns = (
        TextColumn("{task.fields[place]:>5}"),
        TextColumn("{task.description:<18}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[surviving]}"),
    )
    bound_of = _Bound()
    with Bars(*columns, console=voice.console(err=True), transient=True) as bars:
        task = bars.add_task("starting", total=None, place="", surviving="")
        last = ""

        def progress(step: Step) -> None:
            nonlocal last
            if step.stage != last:
                bars.reset(task, total=step.of)
                last = step.stage
            bars.bound = bound_of(step) or bars.bound
            unfinished = step.done < step.of  # the next work may take long and is not a stage
            bars.update(task, completed=step.done, total=step.of, visible=unfinished, **_texts(step))

        yield progress


@contextmanager
def bound_lines(voice: Voice) -> Iterator[Progress]:
    """Context manager that yields a callback which writes the bound of the robust accuracy when it has changed, at most
    every few seconds.
    """
    last, written_at, bound_of = "", -math.inf, _Bound()

    def progress(step: Step) -> None:
        nonlocal last, written_at
        bound = bound_of(step)
        if time.monotonic() < written_at + _BETWEEN_S or bound in ("", last):
            return
        last, written_at = bound, time.monotonic()
        voice.say(bound)

    yield progress


@contextmanager
def timed_lines(voice: Voice) -> Iterator[Progress]:
    """Context manager that yields a callback which writes a line for each epoch of a training. After 30 s without such
    a line, a thread writes one with the last step and the time so far.
    """
    last: Step | None = None
    written_at = began = time.monotonic()
    ended = threading.Event()

    def say(text: str) -> None:
        nonlocal written_at
        written_at = time.monotonic()
        voice.say(text)

    def progress(step: Step) -> None:
        nonlocal last
        last = step
        if step.measured is not None:
            say(_epoch_line(step.stage, step.measured))

    def repeat() -> None:
        while not ended.wait(max(written_at + _REPEATED_S - time.monotonic(), 0.01)):
            if time.monotonic() - written_at >= _REPEATED_S:
                step = (
                    ""
                    if last is None
                    else f"; last finished: {_stage_line(last)}, {last.done:,} of {last.of:,}"
                )
                say(f"running for {duration(time.monotonic() - began)}{step}")

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield progress
    finally:
        ended.set()
        thread.join()


def _stage_line(step: Step) -> str:
    texts = _texts(step)
    robust = f", {texts['surviving'].strip()} so far" if texts["surviving"] else ""
    bound = f", {bound}" if (bound := _Bound()(step)) else ""
    return f"stage {texts['place']}: {texts['description']}{bound or robust}"


class _Bound:
    """Function that returns an upper bound of the robust accuracy with its 95 % confidence as text, which is empty if
    the run measures none.

    In a run on all examples it is the share of surviving ones with its interval, an estimate until the clean pass has
    run on all of them. A run that ends when a condition is decided measures a growing part of them, on which this
    share may rise; its bound is the lowest end of a confidence sequence so far.
    """

    def __init__(self) -> None:
        self._lowest, self._text = 1.0, ""

    def __call__(self, step: Step) -> str:
        """Return the bound after a step."""
        if step.n is None or not step.seen:
            return ""
        part = f"{step.seen:,} of {step.n:,} example{'s' * (step.n != 1)}"
        if step.in_looks:
            _, high = confidence_sequence(step.surviving, step.seen)
            if high < self._lowest:
                self._lowest = high
                self._text = f"robust accuracy at most {percent(high)} (95 % confidence), from {part}"
            return self._text
        low, high = clopper_pearson(step.surviving, step.seen)
        share = percent(step.surviving / step.seen)
        from_part = f", estimated from {part}" if step.seen < step.n else ""
        return f"robust accuracy at most {share} ({100 * low:.1f} to {percent(high)}){from_part}"


def _epoch_line(stage: str, measured: EpochMeasures) -> str:
    return (
        f"{stage}, epoch {measured.epoch} of {measured.of}: loss {measured.loss:.3g}, robust "
        f"{percent(measured.robust)} and clean {percent(measured.clean)} of {measured.held_out:,} held-out examples, "
        f"about {duration(measured.left_s)} left"
    )


def _texts(step: Step) -> dict[str, Any]:
    share = f"{step.surviving / step.seen:6.1%} robust" if step.seen and step.n is None else ""
    return {
        "description": step.title or step.stage,
        "place": f"{step.place}/{step.of_stages}",
        "surviving": share,
    }


_COLUMNS = {
    "masked model": "name",
    "naive": "naive_robust_accuracy",
    "twin": "twin_robust_accuracy",
    "adaptive": "adaptive_robust_accuracy",
}


def _gallery_report(measured: Sequence[Mapping[str, Any]]) -> Report:
    """The report with the robust accuracies of the bundled models with masked gradients, and the doubts that
    were raised for each.
    """
    first = measured[0]
    title = f"robust accuracy of {first['n']} digits under linf:{first['eps']:g}"
    rows = []
    for item in measured:
        name, *shares = (item[key] for key in _COLUMNS.values())
        rows.append((name, *map(percent, shares), ", ".join(item["doubts"])))
    headings = (*_COLUMNS, "doubts raised by the naive evaluation")
    return Report(
        verb="demo",
        about="models with masked gradients",
        headline="naive: PGD-40 on the cross-entropy; twin: the same network without the defence, under suite standard",
        content={"gallery": list(measured)},
        sections=(Section(title, (Table(headings, rows, texts=frozenset({4})),)),),
    )


def run_gallery(place: Path | None, voice: Voice) -> int:
    """Measure the bundled models with masked gradients, print a table, and write a report to the file `place`. Return
    exit code 0.
    """
    from holdfast.verbs.exhibition import exhibition  # late, as the other commands do without the gallery

    if place is not None and str(place) != _STDOUT:
        check_destination(place)
    voice.say(
        "building models with masked gradients on real digits, and running PGD and adaptive attacks on each"
    )

    def show(exhibit: "Exhibit") -> None:
        naive, adaptive = percent(exhibit.naive_robust_accuracy), percent(exhibit.adaptive_robust_accuracy)
        voice.say(f"  {exhibit.name}: {naive} robust under PGD, {adaptive} under adaptive attacks")

    report = _gallery_report([asdict(exhibit) for exhibit in exhibition(shown=show)])
    tell_report(report, [] if place is None else [str(place)], voice)
    return 0


def run_demo(folder: Path, voice: Voice) -> int:
    """Assess the bundled network on images of digits, print the results with an explanation, and return exit code 0."""
    voice.say(
        f"attacking a classifier of handwritten digits on {DEMO['n']} real images with the attacks of the suite "
        f"{DEMO['suite']}"
    )
    with progress_bar(voice, piped=bound_lines) as progress:
        result = demo(folder, progress=progress, notify=voice.say)
    tell(result, [], voice)
    voice.say(
        "one gate passes and one fails: the network classifies clean digits correctly, but small perturbations break it"
    )
    voice.say("open the report in a browser:")
    click.echo(str((folder / "report.html").absolute()))
    return 0
