"""Command-line options that are generated from the declared settings of a command."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, Union, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from holdfast.cli import completing
from holdfast.cli.options import GroupedOption
from holdfast.core.errors import RUN_FOLDER, UsageError
from holdfast.settings.groups import Flag, Section
from holdfast.verbs.checked_settings import VerbSettings
from holdfast.verbs.configuration import flag_of

Option = Callable[[Any], Any]

SETTING = (
    click.option(
        "--set",
        "sets",
        cls=GroupedOption,
        multiple=True,
        metavar="A.B=C",
        help="Set any key of the configuration, as in recipe.beta=6.",
    ),
    click.option(
        "--config",
        "-c",
        cls=GroupedOption,
        common=True,
        type=click.Path(),
        metavar="FILE",
        help="Configuration file (see holdfast init). Flags take precedence.",
    ),
)
"""The options `--set` and `--config`, which concern the configuration as a whole."""

MODEL_AND_DATA = (
    click.argument("model", required=False, type=completing.MODEL),
    click.argument("data", required=False, type=completing.DATA),
)
"""The arguments MODEL and DATA of the commands that open a model and data."""


def run_options(verb: str) -> tuple[Option, Option]:
    """Return the options `--run` and `--resume` of a command that writes the folder of a run."""
    return (
        click.option(
            "--run",
            "run",
            cls=GroupedOption,
            common=True,
            type=click.Path(),
            metavar="DIR",
            help=f"Folder of the run (default: holdfast-runs/<time>-{verb}-<digest>).",
        ),
        click.option(
            "--resume",
            cls=GroupedOption,
            common=True,
            is_flag=True,
            help="Continue the run in --run, or report it again if it is finished.",
        ),
    )


def refuse_resume_without_run(*, resume: bool, run: str | None) -> None:
    """Raise `UsageError` if a run is to be resumed and its folder is not given."""
    if resume and run is None:
        raise UsageError(
            "--resume continues a run, and its folder is not given (see holdfast runs)", RUN_FOLDER
        )


def options_of(kind: type[VerbSettings], *, only: Collection[str] = ()) -> tuple[Option, ...]:
    """Return the click options of a command, one for each of its settings that can be given as a flag.

    If `only` is given, options are returned for these keys only. Settings without a flag have no option.
    """
    options: list[Option] = []
    for key, field in kind.model_fields.items():
        flag = flag_of(field)
        if flag is None or (only and key not in only):
            continue
        options.append(_option(key, field, flag, kind.section_of(key)))
    return tuple(options)


def flag_names(kind: type[VerbSettings]) -> Mapping[str, str]:
    """Return the command-line options of a command, such as `--batch-size`, by the names of its settings in
    configuration files.
    """
    return {
        key: flag.name or _long(key)
        for key, field in kind.model_fields.items()
        if (flag := flag_of(field)) is not None
    }


def _long(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _option(key: str, field: FieldInfo, flag: Flag, section: Section) -> Option:
    name = flag.name or _long(key)
    names = (flag.short, name) if flag.short else (name,)
    kind = _plain_type(field.annotation)
    # default=None, unlike that of the setting, so that a key of a file is not replaced by an absent option
    settings: dict[str, Any] = {
        "cls": GroupedOption,
        "section": section,
        "common": flag.common,
        "default": None,
        "help": flag.help or field.description,
    }
    if kind is bool:
        if flag.negated:
            return click.option(f"{name}/--no-{name[2:]}", key, **settings)
        return click.option(*names, key, is_flag=True, flag_value=not name.startswith("--no-"), **settings)
    settings["metavar"] = flag.metavar
    if is_repeated(field):
        settings |= {"multiple": True, "default": ()}
    return click.option(*names, key, type=_click_type(kind, flag), **settings)


def is_repeated(field: FieldInfo) -> bool:
    """Return whether a command-line option may be given several times, because the value of its setting is a list or a
    mapping.
    """
    kind = _plain_type(field.annotation)
    return get_origin(kind) is list or is_mapping(field)


def is_mapping(field: FieldInfo) -> bool:
    """Return whether the values of a command-line option have the form NAME=VALUE, because its setting is a mapping."""
    kind = _plain_type(field.annotation)
    return get_origin(kind) is dict and _plain_type(get_args(kind)[1]) in (str, float)


def _plain_type(annotation: Any) -> Any:
    """Return the type of a setting without `Annotated` and without None."""
    if hasattr(annotation, "__metadata__"):
        return _plain_type(get_args(annotation)[0])
    if get_origin(annotation) is Union or type(annotation).__name__ == "UnionType":
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        return _plain_type(kinds[0]) if len(kinds) == 1 else annotation
    return annotation


def _click_type(kind: Any, flag: Flag) -> Any:
    if flag.completion == "PATH":
        return click.Path()
    if flag.completion:
        return getattr(completing, flag.completion)
    if get_origin(kind) is Literal:
        return click.Choice(get_args(kind))
    return int if kind is int else str


def with_named_parts(flags: dict[str, Any]) -> dict[str, Any]:
    """Return command-line flags in which `--recipe NAME` and `--source NAME` are replaced by the equivalent `--set
    recipe.use=NAME` and `--set source.use=NAME`.

    Further `--set` options can then change settings of the recipe or source.
    """
    parts = {key: flags[key] for key in ("recipe", "source") if flags.get(key) is not None}
    other_flags = {key: value for key, value in flags.items() if key not in parts}
    return {**other_flags, "sets": (*(f"{key}.use={name}" for key, name in parts.items()), *flags["sets"])}
