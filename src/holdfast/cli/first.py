"""The commands `holdfast init`, `holdfast validate` and `holdfast demo`, for a first use."""

import json
import shlex
from pathlib import Path

import click

from holdfast.api.starting import GUARD, draft_rules
from holdfast.api.starting import init as write_starting_file
from holdfast.api.starting import validate as check_file
from holdfast.cli import completing
from holdfast.cli.options import Command, Voice, with_voice


@click.command(cls=Command, short_help="write a commented holdfast.yaml")
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option(
    "--model",
    type=completing.MODEL,
    default="mnist-cnn",
    show_default=True,
    help="Model of the configuration.",
)
@click.option(
    "--data", type=completing.DATA, default="mnist-mini", show_default=True, help="Data of the configuration."
)
@click.option("--guard", is_flag=True, help="Write the settings of a guard instead (default: guard.yaml).")
@click.option("--table", metavar="FILE", help="Draft the rules of this table instead (default: rules.yaml).")
@click.option("--label", metavar="COL", help="Label column of the table.")
@click.option("--drop", multiple=True, metavar="COL", help="Leave this column of the table out.")
@click.option("--separator", metavar="C", help="Character between the columns of the table (default: comma).")
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
@with_voice
def init(
    voice: Voice,
    *,
    path: Path | None,
    model: str,
    data: str,
    guard: bool,
    table: str | None,
    label: str | None,
    drop: tuple[str, ...],
    separator: str | None,
    force: bool,
) -> None:
    """Write a commented configuration file to start from (default: holdfast.yaml).

    With --table, draft the rules of a table from its rows, for a threat such as table:rules.yaml.
    """
    if table is not None:
        written, notes = draft_rules(
            path, table=table, label=label, drop=drop, separator=separator, force=force
        )
        for note in notes:
            voice.say(f"note: {note}")
        options = " ".join(
            [f"--label {shlex.quote(str(label))}", *(f"--drop {shlex.quote(column)}" for column in drop)]
        )
        voice.say(
            f"wrote {written}; edit it, then: holdfast assess MODEL {shlex.quote(table)} {options} "
            f"--threat table:{shlex.quote(str(written))}"
        )
        return
    written = write_starting_file(path, model=model, data=data, guard=guard, force=force)
    shown = shlex.quote(str(written))
    following = f"holdfast validate {shown}" if guard else f"holdfast assess --config {shown}"
    voice.say(f"wrote {written}; next: {following}")


@click.command(cls=Command, short_help="check a holdfast.yaml without running it")
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option("--schema", "print_schema", is_flag=True, help="Print the JSON Schema for editors and exit.")
@with_voice
def validate(voice: Voice, *, path: Path | None, print_schema: bool) -> None:
    """Check all keys of a configuration file, including threat, gates, suite and attacks, without running anything.

    The file may also contain the settings of a guard, with which its calibration is compared. No model is opened.
    """
    if print_schema:
        from holdfast.api.schema import settings_schema

        click.echo(json.dumps(settings_schema(), indent=2))
        return
    path = path or Path("holdfast.yaml")
    kinds = check_file(path)
    voice.say(f"{path} is valid for {', '.join(kinds)}")
    if kinds == (GUARD,):
        from holdfast.api.guard_notes import notes_of_file, unchecked_of_file

        for note in (*notes_of_file(path), unchecked_of_file(path)):
            voice.say(f"note: {note}")


@click.command(cls=Command, short_help="assess a bundled model, offline, in about a minute")
@click.option(
    "-o",
    "--output",
    "place",
    type=click.Path(path_type=Path),
    help="Folder of the report (default: holdfast-demo); with --gallery a .json file, or -.",
)
@click.option(
    "--gallery", is_flag=True, help="Show models with masked gradients, and the doubts that reveal them."
)
@with_voice
def demo(voice: Voice, place: Path | None, *, gallery: bool) -> int:
    """Assess a bundled model on real images, with one gate that passes and one that fails, explained in a report.

    With --gallery, build thirteen models with masked gradients (ten minutes or more), and show for each the robust
    accuracy under PGD, the robust accuracy under an adaptive attack, and the raised doubts. Further models, which
    decide, quantise or look up, are measured in Python (`holdfast.api.verbs.exhibition`).
    Exit code 0 if it completes, whether or not gates pass.
    """
    from holdfast.cli.running import run_demo, run_gallery

    return run_gallery(place, voice) if gallery else run_demo(place or Path("holdfast-demo"), voice)
