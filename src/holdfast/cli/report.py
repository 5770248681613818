"""`holdfast compare`, `report`, `verify` and `runs`: commands for finished runs."""

import sys
from pathlib import Path

import click

from holdfast.cli.early import refuse_reports
from holdfast.cli.options import Voice, spoken
from holdfast.core.errors import UsageError
from holdfast.core.names import line
from holdfast.store.files import POOL_MANIFEST, refuse_no_run


@click.command(short_help="write the reports of a finished run again")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    multiple=True,
    metavar="FILE",
    help="Report, by suffix: .html .json .xml .sarif .md .csv; - for JSON on stdout.",
)
@spoken
def report(voice: Voice, run: Path, output: tuple[str, ...]) -> int:
    """Write reports of a finished run, without measuring anything; its verdict is said again, with its exit code."""
    refuse_no_run(run)
    refuse_reports(output)
    from holdfast.api import report as opened
    from holdfast.cli.running import tell
    from holdfast.verbs.forms import consistent

    result = opened(run)
    with consistent(run):
        tell(result, output, voice)
    return result.exit_code


@click.command(short_help="check that a run's evidence, or a pool, is whole and unchanged")
@click.argument("run", metavar="RUN_OR_POOL", type=click.Path(path_type=Path))
@click.option(
    "--expect-head",
    default="",
    metavar="DIGEST",
    help="Refuse a pool whose ledger does not contain this: what rotate head printed earlier, kept elsewhere.",
)
@spoken
def verify(voice: Voice, run: Path, expect_head: str) -> None:
    """Hash every file of a run again and follow its chain; exits 3 and names the first thing that does not hold.

    Of a pool of holdfast rotate the ledger is checked, and with the pool's key each entry is authenticated and each set
    is opened. Without the key a consistent chain may still be forged; the output states that.
    """
    if (run / POOL_MANIFEST).is_file():
        _verify_pool(voice, run, expect_head)
        return
    if expect_head:
        raise UsageError(f"--expect-head is for pools, and {str(run)!r} is none; leave it out")
    refuse_no_run(run)
    from holdfast.api import verify as checked

    found = checked(run)
    state = "complete" if found.complete else "not finished yet"
    click.echo(
        f"{line(str(run))}: {found.files} files and {found.records} records hold, {state}; head {found.head}"
    )
    for note in found.notes:
        voice.say(f"note: {note}")


def _verify_pool(voice: Voice, pool: Path, expect_head: str) -> None:
    from holdfast.store.verify_pool import verify_pool

    found = verify_pool(pool, expect_head=expect_head)
    if found.authenticated:
        click.echo(
            f"{line(str(pool))}: {found.entries} entries, chain consistent and authenticated; {found.sets} sets open; "
            f"head {found.head}"
        )
        return
    click.echo(
        f"{line(str(pool))}: {found.entries} entries, chain consistent, not authenticated; head {found.head}"
    )
    voice.say(
        "note: without the pool's key the chain could have been computed again after entries were removed; set "
        "HOLDFAST_POOL_KEY, or put the key file back, to authenticate it"
    )


_UNBROKEN = 1000
"""number of characters that exceeds the width of any table"""


@click.command(short_help="list the runs in a folder")
@click.argument("folder", default="holdfast-runs", type=click.Path(path_type=Path))
@spoken
def runs(voice: Voice, folder: Path) -> None:
    """The runs in FOLDER, oldest first: where each lies, its robust accuracy and its state."""
    from rich.table import Table

    from holdfast.reports.numbers import percent
    from holdfast.reports.terminal import cell
    from holdfast.verbs.stored_runs import runs_in

    entries = runs_in(folder)
    if not entries:
        voice.say(f"no runs in {folder}")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("run", "robust", "state", "verb", "model", "data", "threat", "suite"):
        table.add_column(heading, no_wrap=True, justify="right" if heading == "robust" else "left")
    for entry in entries:
        state = (
            f"exit {entry.exit_code}" if entry.finished else f"{entry.stages_done} of {entry.stages} stages"
        )
        robust = "" if entry.robust is None else percent(entry.robust)
        names = (entry.verb, entry.model, entry.data, entry.threat, entry.suite)
        table.add_row(*map(cell, (str(entry.path), robust, state, *names)))
    console = voice.console()
    # Users copy paths from here: a narrow terminal wraps the lines itself, and nothing is cut off.
    console.width = max(console.width, _UNBROKEN)
    console.print(table)


@click.command(short_help="what changed between two runs of the same examples")
@click.argument("first", metavar="RUN_A", type=click.Path(path_type=Path))
@click.argument("second", metavar="RUN_B", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    multiple=True,
    metavar="FILE",
    help="Report, by suffix: .html .json .md; - for JSON on stdout.",
)
@spoken
def compare(voice: Voice, first: Path, second: Path, output: tuple[str, ...]) -> None:
    """What changed from RUN_A to RUN_B: a paired test on the examples they share, and every metric side by side."""
    from holdfast.reports.write import COMPARISON_SUFFIXES

    refuse_no_run(first, second)
    refuse_reports(output, COMPARISON_SUFFIXES)
    from holdfast.api import compare as compared
    from holdfast.api import report as opened
    from holdfast.verbs.forms import consistent

    results = []
    for run in (first, second):
        with consistent(run):
            results.append(opened(run))
            results[-1].summary()
    comparison = compared(*results)
    places: list[Path] = []
    try:
        places.extend(comparison.write(name) for name in output if name != "-")
    finally:
        if "-" in output:
            click.echo(comparison.to_json())
        elif not voice.quiet:
            click.echo(comparison.text(colour=sys.stdout.isatty() and not voice.plain))
        for place in places:
            voice.say(f"report: {place}")
