"""The commands `holdfast models` and `holdfast attacks`: lists of models, architectures and attacks."""

import inspect
from dataclasses import MISSING, fields
from typing import Any

import click

from holdfast.attacks.suites import SUITES, VARIANTS, SuiteName
from holdfast.cli import completing
from holdfast.cli.options import Command, Voice, plain_table, with_voice


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
    from holdfast.settings.spellings import attack_called, is_suite_only, suite_called

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
    from holdfast.settings.spellings import ADAPTIVE, SPELLINGS, SUITE_SPELLINGS, suites_of
    from holdfast.settings.threats_and_attacks import attack_names

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
    from holdfast.settings.spellings import SPELLINGS, suites_of
    from holdfast.settings.threats_and_attacks import attack_class

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
