"""The command `holdfast data`, which lists, shows, downloads, imports and poisons data sets."""

import math
import shlex
from pathlib import Path
from typing import Any

import click

from holdfast.cli import completing
from holdfast.cli.options import Group, Voice, plain_table, with_voice
from holdfast.core.names import line, path_text


@click.group(
    cls=Group, invoke_without_command=True, short_help="list, show, download, import and poison data sets"
)
@click.pass_context
def data(context: click.Context) -> None:
    """List data sets, show one, download one from its official mirror, or import downloaded files from a folder.
    Poison one to test audits.

    They are stored in the folder HOLDFAST_DATA (an environment variable), else in the user's cache.
    """
    if context.invoked_subcommand is None:
        context.invoke(list_)


@data.command("list", short_help="list the data sets of the catalogue")
@with_voice
def list_(voice: Voice = Voice()) -> None:  # noqa: B008 (an immutable value)
    """List the data sets of the catalogue, and whether each is on this machine."""
    from holdfast.io.data.data import bundled_data
    from holdfast.io.data_catalogue import data_folder, listed_data_sets

    table = plain_table("name", "description", "available")
    for name in bundled_data():
        table.add_row(name, "bundled with the package", "yes")
    for row in listed_data_sets():
        table.add_row(row.name, row.title, "yes" if row.present else "fetch" if row.fetchable else "import")
    voice.console().print(table)
    voice.say(f"folder: {data_folder()} (HOLDFAST_DATA)")


@data.command(short_help="show the shape, range and classes of a data set")
@click.argument("address", type=completing.DATA)
@click.option("--split", metavar="NAME", help="Split of the data (default: test if there is one).")
@click.option("--label", metavar="COL", help="Label column of a table.")
@click.option("--drop", multiple=True, metavar="COL", help="Leave this column of a table out.")
@click.option("--x", metavar="NAME", help="Name of the array of inputs in an .npz file.")
@click.option("--y", metavar="NAME", help="Name of the array of labels in an .npz file.")
@click.option("--follow-links", is_flag=True, help="Read images through links that lead out of the folder.")
@with_voice
def show(voice: Voice, *, address: str, **options: Any) -> None:
    """Show a data set: shape, range, classes and digest; for a catalogue name also its licence and source."""
    from rich.table import Table

    from holdfast.core.model import Bounds
    from holdfast.io.data.data import open_data
    from holdfast.io.data.layouts import Expected
    from holdfast.io.data_catalogue import CATALOGUE
    from holdfast.reports.terminal import cell

    table = Table(box=None, pad_edge=False, show_header=False)
    entry = CATALOGUE.get(address)
    if entry is not None:
        table.add_row("title", entry.title)
        table.add_row("licence", entry.licence)
        table.add_row("cite", entry.cite)
    anything = Expected(Bounds(-math.inf, math.inf), lenient=True)
    opened = open_data(address, **options, expected=anything)
    sample = opened.read(0, min(len(opened), 1000))
    table.add_row("examples", f"{len(opened):,}")
    table.add_row("shape", " x ".join(str(size) for size in sample.x.shape[1:]))
    table.add_row(
        "range", f"{float(sample.x.min()):.4g} to {float(sample.x.max()):.4g} (first {len(sample):,})"
    )
    names = opened.classes or tuple(str(label) for label in sorted(set(sample.y.tolist())))
    classes = f"{len(names)}: {', '.join(names[:12])}{' …' if len(names) > 12 else ''}"
    table.add_row("classes", cell(classes))
    table.add_row("sha256", opened.digest)
    voice.console().print(table)


@data.command(short_help="download a data set from its official mirror")
@click.argument("name", type=completing.DATA)
@with_voice
def fetch(voice: Voice, name: str) -> None:
    """Download a data set from its official mirror. Every file must match its published checksum."""
    from holdfast.io.remote.fetching import fetch as bring

    voice.say(f"fetching {name}")
    click.echo(bring(name))


@data.command("import", short_help="import downloaded files of data sets from a folder")
@click.argument("folder", type=click.Path(path_type=Path))
@with_voice
def import_(voice: Voice, folder: Path) -> None:
    """Import every data set of the catalogue whose files are in FOLDER itself, under these names: mnist.npz,
    fashion_mnist.npz, cifar10.npz (or cifar10_train0.npz, cifar10_train1.npz and cifar10_test.npz), gtsrb32.npz,
    pneumoniamnist.npz, clamp_pe_malware.csv.gz, credit_default.csv.gz, credit_fraud_small.csv.gz, phishing_url.csv.gz,
    location30.npz.

    Of mnist, fashion-mnist and cifar10 the files of the official mirrors are imported as well. Files under other names
    need no import: give their path as DATA.
    """
    from holdfast.io.remote.fetching import import_folder

    for imported in import_folder(folder):
        click.echo(line(f"{imported.name}: {imported.path} (from {', '.join(imported.files)})"))


@data.command(short_help="plant manipulated examples in training data")
@click.argument("address", metavar="DATA", type=completing.DATA)
@click.option(
    "--attack",
    required=True,
    metavar="NAME,KEY=VALUE",
    help="flip, flip-targeted, badnets, blended or sig, with rate (the share of the training examples that is "
    "poisoned), target (a class) and further settings, as in badnets,target=1,rate=0.01,size=3.",
)
@click.option("-o", "output", required=True, type=click.Path(path_type=Path), help="File to write (.npz).")
@click.option("--seed", default=0, show_default=True, help="Seed of the random choices.")
@with_voice
def poison(voice: Voice, *, address: str, attack: str, output: Path, seed: int) -> None:
    """Plant manipulated examples in the training split of DATA, as a drill for audits.

    The file that is written has the poisoned training split, the unchanged test split, and the positions of the
    manipulated examples (poisoned). The trigger of a backdoor is written beside it, as in drill.trigger.npz.

    Settings of the attacks: source (flip-targeted); size and at (badnets); alpha (blended); delta and frequency (sig).
    """
    from holdfast.api.poisoning import write_drill

    drill = write_drill(address, attack, output, seed=seed)
    aim = "" if drill.target is None else f", target class {drill.target}"
    voice.say(
        f"{drill.attack}{aim}: {drill.poisoned:,} of {drill.train:,} training examples are poisoned "
        f"({drill.poisoned / drill.train:.3g} of them); the {drill.test:,} test examples are unchanged"
    )
    if drill.trigger is not None:
        voice.say(
            f"success rate of the attack on a MODEL that was trained on {drill.data}: holdfast assess MODEL "
            f"{drill.data} --threat {shlex.quote('trigger:' + path_text(str(drill.trigger)))}"
        )
    click.echo(line(str(drill.data)))
    if drill.trigger is not None:
        click.echo(line(str(drill.trigger)))
