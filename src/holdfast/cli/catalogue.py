"""`holdfast models` and `holdfast attacks`: what there is to name."""

import inspect
from dataclasses import MISSING, fields
from typing import Any

import click

from holdfast.cli import completing
from holdfast.cli.options import Voice, spoken


@click.command(short_help="list the bundled models and architectures")
@spoken
def models(voice: Voice) -> None:
    """The models that come with the package, and the architectures that a weights file may name."""
    from rich.table import Table

    from holdfast.sources.architectures import ARCHITECTURES
    from holdfast.sources.models import bundled_models

    table = Table("name", "what", box=None, pad_edge=False, header_style="bold")
    for name in sorted(bundled_models()):
        table.add_row(name, "bundled model, opened by its name")
    for name, factory in sorted(ARCHITECTURES.items()):
        table.add_row(name, f"architecture, for --arch: {_first_line(factory)}")
    voice.console().print(table)


@click.command(short_help="list the attacks, or show one with its settings")
@click.argument("name", required=False, type=completing.ATTACK)
@spoken
def attacks(voice: Voice, name: str | None) -> None:
    """The attacks that a suite, a configuration or `use:` may name; with NAME, its settings and their defaults."""
    from holdfast.config.naming import VARIANTS, attack_meant

    chosen = None if name is None else attack_meant(name)  # before torch, so that a slip is answered at once
    from rich.table import Table

    from holdfast.config.attacks import attack_class, attack_names

    if name is None or chosen is None:
        table = Table("name", "needs", "what it does", box=None, pad_edge=False, header_style="bold")
        for known, cls in sorted(attack_names().items()):
            table.add_row(known, cls.needs, _first_line(cls))
        voice.console().print(table)
        return
    cls = attack_class(chosen)
    variant = next((known for known in VARIANTS if known.casefold() == name.casefold()), None)
    if variant is not None:
        click.echo(f"{variant} is the name that suites give to {chosen} with settings of its own\n")
    source = (inspect.getmodule(cls).__doc__ or "").strip()
    click.echo(f"{chosen}: {_first_line(cls)}\nneeds {cls.needs}\n\n{source}\n")
    table = Table("setting", "default", "meaning", box=None, pad_edge=False, header_style="bold")
    meanings = _meanings(cls)
    for f in fields(cls):
        default = "" if f.default is MISSING else getattr(f.default, "__name__", repr(f.default))
        table.add_row(f.name, default, meanings.get(f.name, ""))
    voice.console().print(table)


def _first_line(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").split("\n", 1)[0].rstrip(".")


def _meanings(cls: type[Any]) -> dict[str, str]:
    """The string under each field of a dataclass: the one place where a setting is explained."""
    import ast
    import textwrap

    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for item, after in zip(body.body, body.body[1:], strict=False):
        match item, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = " ".join(text.split())
    return found
