"""The commands that read finished runs: `holdfast compare`, `report`, `verify`, `runs` and `ui`."""

import os
from pathlib import Path

import click

from holdfast.cli.early import refuse_reports
from holdfast.cli.options import Command, Voice, expecting_head, plain_table, with_voice
from holdfast.core.catalogue import REPORT_FILE
from holdfast.core.errors import UsageError
from holdfast.core.names import line
from holdfast.runs.store.files import AUDIT_MARK, POOL_MANIFEST, refuse_no_run


@click.command(cls=Command, short_help="write the reports of a finished run again")
@click.argument("folders", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    multiple=True,
    metavar="FILE",
    help=REPORT_FILE,
)
@click.option(
    "--annex",
    metavar="STANDARD",
    help="Write the annex of a standard instead: atlas, aisvs, aitg, ml-top-10, nist or eu-ai-act. It lists the "
    "evidence in all given folders of runs, audits, pools, audit chains and adaptations, reports of monitor (.json) "
    "and files of API keys for each requirement, and what is missing.",
)
@click.option(
    "--print-size",
    metavar="SIZE",
    help="Write the learned patch of the run to a sheet in its true size, with -o sheet.pdf. The size is the width of "
    "what the images show, as in 60cm.",
)
@with_voice
def report(
    voice: Voice,
    folders: tuple[Path, ...],
    output: tuple[str, ...],
    annex: str | None,
    print_size: str | None,
) -> int:
    """Write reports of a finished run without measuring anything. The verdict and exit code are those of the run.

    With --annex, the evidence of several folders is listed for each requirement of a standard. With --print-size, the
    learned patch of the run is written to a sheet that you can print.
    """
    if annex is not None:
        if print_size is not None:
            raise UsageError(
                "--print-size is for the patch of a run, and --annex lists evidence; give one of them"
            )
        return _annex(voice, folders, output, annex)
    if len(folders) > 1:
        raise UsageError(
            f"report was given {len(folders)} folders, and writes the reports of one run; give one, or an annex over "
            "all of them with --annex aisvs"
        )
    run = folders[0]
    refuse_no_run(run)
    sheets = [path for path in output if Path(path).suffix.lower() == ".pdf"]
    if print_size is not None or sheets:
        return _sheet(voice, run, output, print_size)
    from holdfast.audits.audit import is_audit

    if is_audit(run):
        from holdfast.cli.audit import report_audit

        return report_audit(run, output, voice)
    from holdfast.adaptation.journal import is_adaptation, open_finished

    if is_adaptation(run):
        from holdfast.adaptation.journal import Adapted
        from holdfast.cli.operate import tell_adapted

        adapted = Adapted.of(open_finished(run))
        tell_adapted(adapted, output, voice)
        return adapted.exit_code
    refuse_reports(output)
    from holdfast.cli.running import tell
    from holdfast.runs.documents.record import consistent
    from holdfast.runs.documents.stored_runs import open_run

    result = open_run(run)
    with consistent(run):
        tell(result, output, voice)
    return result.exit_code


def _sheet(voice: Voice, run: Path, output: tuple[str, ...], print_size: str | None) -> int:
    """Write the sheet of a patch, and return the exit code of a finished command."""
    if print_size is None or len(output) != 1 or Path(output[0]).suffix.lower() != ".pdf":
        raise UsageError(
            f"report was given {print_size or 'no print size'} and {' '.join(output) or 'no file'}; a sheet needs both "
            "a size and one PDF, as in -o sheet.pdf --print-size 60cm"
        )
    from holdfast.verbs.reports import print_sheet

    voice.say(f"wrote {line(str(print_sheet(run, output[0], print_size)))}")
    return 0


def _annex(voice: Voice, folders: tuple[Path, ...], output: tuple[str, ...], standard: str) -> int:
    """Print or write the annex of a standard. The exit code is 0, because an annex has no verdict."""
    refuse_reports(output)
    from holdfast.cli.running import tell_report
    from holdfast.verbs.reports import annex_of

    tell_report(annex_of(folders, standard).report, output, voice)
    return 0


@click.command(cls=Command, short_help="check that the files of a run, a pool or an audit are unchanged")
@click.argument("run", metavar="FOLDER", type=click.Path(path_type=Path))
@expecting_head(
    "Refuse a run or audit whose chain, a pool whose ledger, or an audit folder whose server chains do not contain "
    "this digest, which verify or rotate head printed earlier."
)
@with_voice
def verify(voice: Voice, run: Path, expect_head: str) -> None:
    """Compute the digests of all files of a run or audit, and compare them with its chain. Compute its results again
    from its columns. Exit code 3 for the first mismatch.

    For the audit folder of holdfast serve, all chains are checked together.

    For a pool of holdfast rotate the ledger is checked. With the pool's key each entry is authenticated, and each
    encrypted file is opened. Without the key a consistent chain may still be forged; the output states that.
    """
    if os.path.lexists(run / POOL_MANIFEST):
        _verify_pool(voice, run, expect_head)
        return
    if os.path.lexists(run / AUDIT_MARK):
        _verify_audit(voice, run, expect_head)
        return
    refuse_no_run(run)
    from holdfast.verbs.reports import verify as checked

    verified = checked(run, expect_head=expect_head)
    state = "complete" if verified.complete else "not finished yet"
    click.echo(
        f"{line(str(run))}: {verified.files} files and {verified.records} records are unchanged, {state}; "
        f"head {verified.head}"
    )
    for note in verified.notes:
        voice.say(f"note: {note}")


def _verify_pool(voice: Voice, pool: Path, expect_head: str) -> None:
    from holdfast.rotation.ledger import verify_pool

    verified = verify_pool(pool, expect_head=expect_head)
    if verified.authenticated:
        click.echo(
            f"{line(str(pool))}: {verified.entries} entries, chain consistent and authenticated; {verified.sets} sets "
            f"decrypted; head {verified.head}"
        )
        return
    click.echo(
        f"{line(str(pool))}: {verified.entries} entries, chain consistent, not authenticated; head {verified.head}"
    )
    voice.say(
        "note: without the pool's key it is not excluded that entries were removed and the chain was computed again; "
        "set HOLDFAST_POOL_KEY, or restore the key file, to authenticate the chain"
    )


def _verify_audit(voice: Voice, folder: Path, expect_head: str) -> None:
    from holdfast.server.audit_folder import verify_audit

    verified = verify_audit(folder, expect_head=expect_head)
    lost = f", {verified.lost} lost while the disk was full" if verified.lost else ""
    click.echo(
        f"{line(str(folder))}: {verified.chains} chains with {verified.records} records are unchanged; requests: "
        f"{verified.answered} answered, {verified.failed} failed, {verified.interrupted} interrupted, {verified.open} "
        f"in progress{lost}; head {verified.head}"
    )
    for note in verified.notes:
        voice.say(f"note: {note}")


_UNBROKEN = 1000
"""Width in characters that is larger than any table."""


@click.command(cls=Command, short_help="list the runs in a folder")
@click.argument("folder", default="holdfast-runs", type=click.Path(path_type=Path))
@with_voice
def runs(voice: Voice, folder: Path) -> None:
    """List the runs, audits and adaptations in FOLDER, oldest first, each with its path, its robust accuracy and its
    state.
    """
    from holdfast.reports.terminal import cell
    from holdfast.reports.words import percent
    from holdfast.verbs.reports import stored_runs

    entries = stored_runs(folder)
    if not entries:
        voice.say(f"no runs in {folder}")
        return
    table = plain_table()
    for heading in ("run", "robust", "state", "verb", "model", "data", "threat", "suite"):
        table.add_column(heading, no_wrap=True, justify="right" if heading == "robust" else "left")
    for entry in entries:
        state = f"{entry.stages_done} of {entry.stages} stages"
        if entry.finished:
            state = "refused" if entry.exit_code is None else f"exit {entry.exit_code}"
        robust = "" if entry.robust is None else percent(entry.robust)
        names = (entry.verb, entry.model, entry.data, entry.threat, entry.suite)
        table.add_row(*map(cell, (str(entry.path), robust, state, *names)))
    console = voice.console()
    # users copy paths from here, so nothing is cut off: a narrow terminal wraps the lines itself
    console.width = max(console.width, _UNBROKEN)
    console.print(table)


@click.command(cls=Command, short_help="show what changed between two runs on the same examples")
@click.argument("first", metavar="RUN_A", type=click.Path(path_type=Path))
@click.argument("second", metavar="RUN_B", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    multiple=True,
    metavar="FILE",
    help=REPORT_FILE,
)
@with_voice
def compare(voice: Voice, first: Path, second: Path, output: tuple[str, ...]) -> None:
    """Show what changed from RUN_A to RUN_B: a paired test on their common examples, and all metrics of both."""
    refuse_no_run(first, second)
    refuse_reports(output)
    from holdfast.cli.running import tell_report
    from holdfast.verbs.reports import compare as compared

    tell_report(compared(first, second).report, output, voice)


_MOST_PORT = 65_535


@click.command(cls=Command, short_help="show the runs of a folder in a browser")
@click.argument("folder", default="holdfast-runs", type=click.Path(path_type=Path))
@click.option(
    "--port",
    type=click.IntRange(0, _MOST_PORT),
    default=8090,
    show_default=True,
    help="Port on the loopback interface; 0 for any that is free.",
)
@click.option(
    "--export",
    "exported",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write the pages to a new folder as static files instead, and end.",
)
@click.option(
    "--trust-code",
    is_flag=True,
    help="Let explanations of examples run the code of models, such as file.py of file.py:factory, and send requests "
    "to models behind HTTP.",
)
@with_voice
def ui(voice: Voice, folder: Path, port: int, exported: Path | None, *, trust_code: bool) -> int:
    """Show the runs, audits, pools and adaptations in FOLDER: verdicts, trends, comparisons and single examples.

    The pages only read, and are answered on the loopback interface until Ctrl-C. They have no login: other users of
    this computer can read them. Nothing in a folder of a run is executed; an explanation of an example opens the model
    of its run.
    """
    if exported is not None and trust_code:
        raise UsageError("--trust-code is for explanations, which an export does not have; leave it out")
    from holdfast.verbs.serve import refuse_missing_extra

    refuse_missing_extra()
    from holdfast.viewer.pages import Site
    from holdfast.viewer.shelf import Shelf

    shelf = Shelf(folder)
    if exported is not None:
        from holdfast.viewer.serving import export

        n = export(Site(shelf, mode="files"), exported)
        voice.say(f"{n} files: {exported / 'index.html'}")
        return 0
    from holdfast.server.messages import bound_socket
    from holdfast.viewer.pages import explainer
    from holdfast.viewer.serving import HOST, serve_site

    listener = bound_socket(HOST, port)
    address = f"http://{HOST}:{listener.getsockname()[1]}/"
    site = Site(shelf, explainer(trust_code=trust_code))
    serve_site(site, listener, lambda: voice.say(f"{folder} is shown at {address} until Ctrl-C"))
    return 0
