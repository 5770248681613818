"""`holdfast init`, `holdfast validate` and `holdfast demo`: commands for a first use."""

import json
from pathlib import Path

import click

from holdfast.cli import completing
from holdfast.cli.options import Voice, spoken
from holdfast.config.starting import init as write_starting_file
from holdfast.config.starting import validate as check_file


@click.command(short_help="write a commented holdfast.yaml")
@click.argument("path", default="holdfast.yaml", type=click.Path(path_type=Path))
@click.option(
    "--model", type=completing.MODEL, default="mnist-cnn", show_default=True, help="The model it names."
)
@click.option(
    "--data", type=completing.DATA, default="mnist-mini", show_default=True, help="The data it names."
)
@click.option("--force", is_flag=True, help="Write over a file that is there.")
@spoken
def init(voice: Voice, *, path: Path, model: str, data: str, force: bool) -> None:
    """Write a commented configuration to start from."""
    write_starting_file(path, model=model, data=data, force=force)
    voice.say(f"wrote {path}; next: holdfast assess --config {path}")


@click.command(short_help="check a holdfast.yaml without running it")
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option("--schema", "print_schema", is_flag=True, help="Print the JSON Schema for editors and stop.")
@spoken
def validate(voice: Voice, *, path: Path | None, print_schema: bool) -> None:
    """Check every key of a configuration, its threat, gates, suite and attacks, without running anything."""
    if print_schema:
        from holdfast.config.schema import schema

        click.echo(json.dumps(schema(), indent=2))
        return
    path = path or Path("holdfast.yaml")
    check_file(path)
    voice.say(f"{path} is valid")


@click.command(short_help="the main job, offline, in under a minute")
@click.option(
    "-o",
    "--output",
    "place",
    type=click.Path(path_type=Path),
    help="Folder of the report (default: holdfast-demo); with --gallery a .json file, or -.",
)
@click.option("--gallery", is_flag=True, help="Show masked models instead, and what gives them away.")
@spoken
def demo(voice: Voice, place: Path | None, *, gallery: bool) -> int:
    """Assess a bundled model on real data: one gate that passes and one that fails, explained in a report.

    With --gallery, build a dozen masked models (four to ten minutes): what PGD as it comes says of each, what is left
    of it under an attacker who knows it, and the doubts that gave it away. Exits 0 when it ran, whatever gates say.
    """
    from holdfast.cli.running import run_demo, run_gallery

    return run_gallery(place, voice) if gallery else run_demo(place or Path("holdfast-demo"), voice)
