"""The commands `holdfast init`, `validate` and `demo`, `models` and `attacks`, and `data`, which lists, shows,
downloads, imports and poisons data sets.
"""

import inspect
import json
import math
import shlex
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import click

from holdfast.attacks.suites import SUITES, VARIANTS, SuiteName
from holdfast.cli import completing
from holdfast.cli.options import Command, Group, Voice, plain_table, with_voice
from holdfast.core.names import line, path_text
from holdfast.verbs.configuration import GUARD, draft_rules
from holdfast.verbs.configuration import init as write_starting_file
from holdfast.verbs.configuration import validate as check_file


@click.command(cls=Command, short_help="list the bundled models and architectures")
@with_voice
def models(voice: Voice) -> None:
    """List the bundled models, and the architectures for files that contain only parameters (--arch)."""
    from holdfast.io.models.architectures import ARCHITECTURES
    from holdfast.io.models.models import bundled_models

    table = plain_table("name", "description")
    for name in sorted(bundled_models()):
        table.add_row(name, "bundled model, used by its name")
    for name, factory in sorted(ARCHITECTURES.items()):
        table.add_row(name, f"architecture, for --arch: {_first_line(factory)}")
    voice.console().print(table)


@click.command(cls=Command, short_help="list the attacks, or show one with its settings")
@click.argument("name", required=False, type=completing.ATTACK)
@with_voice
def attacks(voice: Voice, name: str | None) -> None:
    """List the attacks with all their names, or show the settings and defaults of the attack NAME."""
    from holdfast.settings.grammar import attack_called, is_suite_only, suite_called

    if name is not None and is_suite_only(name) and (suite := suite_called(name)) is not None:
        _show_suite(voice, suite)
        return
    chosen = None if name is None else attack_called(name)  # before torch, to report mistakes early
    if chosen is None:
        _list_attacks(voice)
    else:
        _show_attack(voice, chosen)


def _list_attacks(voice: Voice) -> None:
    """Print tables of the attacks, of their variants in suites, and of the suites, each with its other names."""
    from holdfast.metrics.names import CORRUPTIONS
    from holdfast.settings.grammar import ADAPTIVE, SPELLINGS, SUITE_SPELLINGS, suites_of
    from holdfast.verbs.opening.recipes import attack_names

    console = voice.console()
    table = plain_table("name", "other names", "access", "description")
    for name, cls in sorted(attack_names().items()):
        other_names = str(SPELLINGS.get(name, ""))
        table.add_row(name, other_names, cls.needs, _first_line(cls))
    console.print(table)
    console.print("\nattacks with other settings, by their names in suites")
    variants = plain_table("name", "other names", "attack", "suites")
    for name, of in sorted(VARIANTS.items()):
        if name not in CORRUPTIONS:
            variants.add_row(name, str(SPELLINGS.get(name, "")), of, ", ".join(suites_of(name)))
    console.print(variants)
    console.print(f"\ncommon corruptions: {', '.join(CORRUPTIONS)}")
    console.print(f"\nadded by --adaptive, depending on the raised doubts: {', '.join(ADAPTIVE)}")
    console.print("\nsuites")
    suites = plain_table("name", "other names")
    for name in SUITES:
        suites.add_row(name, ", ".join(SUITE_SPELLINGS.get(name, ())))
    console.print(suites)


def _show_suite(voice: Voice, chosen: SuiteName) -> None:
    """Print the names of the attacks of a suite under each norm."""
    click.echo(f"{chosen} is a suite of attacks, for --suite {chosen}\n")
    table = plain_table("norm", "attacks")
    for kind, specs in SUITES[chosen].items():
        table.add_row(kind, ", ".join(spec.name for spec in specs))
    voice.console().print(table)


def _show_attack(voice: Voice, chosen: str) -> None:
    """Print one attack with its paper, its other names and its settings."""
    from holdfast.settings.grammar import SPELLINGS, suites_of
    from holdfast.verbs.opening.recipes import attack_class

    of = VARIANTS.get(chosen, chosen)
    cls = attack_class(of)
    if chosen in VARIANTS:
        click.echo(
            f"{chosen} is the name of {of} with other settings in the suites {', '.join(suites_of(chosen))}\n"
        )
    other_names = str(SPELLINGS.get(chosen, ""))
    other_names_line = f"other names: {other_names}\n" if other_names else ""
    source = (inspect.getmodule(cls).__doc__ or "").strip()
    click.echo(f"{of}: {_first_line(cls)}\nneeds {_needs(cls.needs)}\n{other_names_line}\n{source}\n")
    table = plain_table("setting", "default", "meaning")
    meanings = _meanings(cls)
    for f in fields(cls):
        default = "" if f.default is MISSING else getattr(f.default, "__name__", repr(f.default))
        table.add_row(f.name, default, meanings.get(f.name, ""))
    voice.console().print(table)


def _needs(access: str) -> str:
    """Return the access that an attack needs, as the words that follow "needs" in the output."""
    return "no access" if access == "none" else access


def _first_line(documented: Any) -> str:
    return (inspect.getdoc(documented) or "").split("\n", 1)[0].rstrip(".")


def _meanings(cls: type[Any]) -> dict[str, str]:
    """Return the documentation string of each field of the dataclass `cls`, by the name of the field."""
    import ast
    import textwrap

    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    meanings: dict[str, str] = {}
    for item, after in zip(body.body, body.body[1:], strict=False):
        match item, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                meanings[name] = " ".join(text.split())
    return meanings


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
    from holdfast.io.data_catalogue import GENERATED, data_folder, listed_data_sets

    table = plain_table("name", "description", "available")
    for name in bundled_data():
        table.add_row(name, "bundled with the package", "yes")
    for name, title in GENERATED.items():
        table.add_row(name, title, "yes")
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
    from holdfast.io.data.layouts import DeclaredData
    from holdfast.io.data_catalogue import CATALOGUE
    from holdfast.reports.terminal import cell

    table = Table(box=None, pad_edge=False, show_header=False)
    entry = CATALOGUE.get(address)
    if entry is not None:
        table.add_row("title", entry.title)
        table.add_row("licence", entry.licence)
        table.add_row("cite", entry.cite)
    anything = DeclaredData(Bounds(-math.inf, math.inf), lenient=True)
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
    from holdfast.verbs.poison import write_drill

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
        from holdfast.verbs.schema import settings_schema

        click.echo(json.dumps(settings_schema(), indent=2))
        return
    path = path or Path("holdfast.yaml")
    kinds = check_file(path)
    voice.say(f"{path} is valid for {', '.join(kinds)}")
    if kinds == (GUARD,):
        from holdfast.verbs.opening.guard import notes_of_file, unchecked_of_file

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
    decide, quantise or look up, are measured in Python (`holdfast.verbs.exhibition.exhibition`).
    Exit code 0 if it completes, whether or not gates pass.
    """
    from holdfast.cli.running import run_demo, run_gallery

    return run_gallery(place, voice) if gallery else run_demo(place or Path("holdfast-demo"), voice)
