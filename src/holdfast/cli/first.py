"""`holdfast init`, `holdfast validate` and `holdfast demo`: the first commands that somebody runs."""

import json
from pathlib import Path

import click

from holdfast.cli.options import Voice, spoken
from holdfast.core.errors import TargetError, UsageError

_TEMPLATE = """\
# What `holdfast assess --config holdfast.yaml` does. Every key is also a flag and an argument of holdfast.assess;
# flags are stronger than this file. Check it with: holdfast validate holdfast.yaml
schema_version: 1

model: {model}        # a bundled name, file.py:factory, or a .safetensors, .pt, .pt2 or .onnx file
data: {data}          # a bundled or catalogue name, .npz, .csv, .parquet, or a folder of class folders
n: 200                   # the first 200 examples; leave out for all of them

threat: "linf:0.2"       # what an attacker may change: linf, l2, l1 or l0, and how much of it
suite: standard          # quick takes seconds; standard is the composition of AutoAttack
gates:
  - "clean_accuracy >= 0.95"
  - "robust_accuracy >= 0.50"

# mean: [0.1307]         # preprocessing belongs to the model: it is differentiated through
# std: [0.3081]
# curve: true            # accuracy against eps
# attacks:               # a list of your own instead of a suite
#   - {{use: PGD, steps: 100, restarts: 5}}
output: [report.html, junit.xml]
seed: 0
"""


@click.command(short_help="write a commented holdfast.yaml")
@click.argument("path", default="holdfast.yaml", type=click.Path(path_type=Path))
@click.option("--model", default="mnist-cnn", show_default=True, help="The model it names.")
@click.option("--data", default="mnist-mini", show_default=True, help="The data it names.")
@click.option("--force", is_flag=True, help="Write over a file that is there.")
@spoken
def init(voice: Voice, *, path: Path, model: str, data: str, force: bool) -> None:
    """Write a commented configuration to start from."""
    if path.exists() and not force:
        raise UsageError(f"{path} is there already; give another name, or --force to write over it")
    try:
        path.write_text(_TEMPLATE.format(model=json.dumps(model), data=json.dumps(data)), encoding="utf-8")
    except OSError as error:
        raise TargetError(
            f"cannot write {path}: {error.strerror}; name a file in a folder that can be written"
        ) from error
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
    from holdfast.config.settings import read

    settings = read(path, {})
    if settings.attacks is not None:
        from holdfast.config.attacks import build

        for k, spec in enumerate(settings.attacks):
            build(spec, f"{path}: attacks.{k}")
    voice.say(f"{path} is valid")


@click.command(short_help="the main job, offline, in under a minute")
@click.option(
    "-o",
    "--output",
    "folder",
    default="holdfast-demo",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder of the report.",
)
@spoken
def demo(voice: Voice, folder: Path) -> int:
    """Assess a bundled model on real data: one gate that passes and one that fails, explained in a report.

    Exits 0 when it ran, whatever its gates say.
    """
    from holdfast.cli.running import run_demo

    return run_demo(folder, voice)
