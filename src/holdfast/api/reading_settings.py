"""Functions that read the settings of commands from files and flags, and the classes of these settings.

A setting has the same name in the YAML file, on the command line and in Python.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from pydantic.fields import FieldInfo

from holdfast.api.checked_settings import VERBS, VerbSettings, check_settings, verbs_with
from holdfast.api.verb_settings import Assess, Calibrate, Doctor, Explain, Harden
from holdfast.core.errors import UsageError
from holdfast.settings.consent import refuse_consent
from holdfast.settings.default_suite import refuse_unknown
from holdfast.settings.grammar import parse_pairs
from holdfast.settings.groups import Flag
from holdfast.settings.values import address_of
from holdfast.settings.yaml_text import load, parse_yaml, put_setting

_REPLACING = (("n", "sample"), ("sample", "n"), ("suite", "attacks"), ("attacks", "suite"))
"""Pairs of settings that exclude each other: a flag (or a `--set`) for one replaces the other in the file."""

S = TypeVar("S", bound=VerbSettings)


class MisplacedKeys(UsageError):
    """Error for keys at the top level of a configuration file that the present command does not use but another command
    does.
    """

    def __init__(self, message: str, keys: tuple[str, ...]) -> None:
        super().__init__(message)
        self.keys = keys


def read_settings(
    path: Path | None,
    overrides: Mapping[str, Any],
    sets: Sequence[str] = (),
    *,
    flags: Mapping[str, str] = MappingProxyType({}),
    kind: type[S],
) -> S:
    """Return the validated settings of a command from a YAML file, from `--set a.b=c` and from other flags, in
    increasing order of precedence.

    The file may contain settings of several verbs; see `keys_for_verb`. `flags` maps the keys of the overrides to their
    names in messages.
    """
    loaded = {} if path is None else load(path)
    content = keys_for_verb(loaded, str(path), kind)
    overriding = {key: value for key, value in overrides.items() if value is not None}
    assignments = {}
    for key, value in parse_pairs(sets, "--set").items():
        first, dot, rest = key.partition(".")
        if first in VERBS and dot:
            raise UsageError(f"--set {key}: the name of the verb is left out, as in --set {rest}={value}")
        assignments[key] = value
    written = {key.partition(".")[0]: f"--set {key.partition('.')[0]}" for key in assignments}
    refuse_consent(written, "--set")
    written |= {key: flags.get(key, key) for key in overriding}
    for key, rival in _REPLACING:
        if key in written and rival in content and rival not in written:
            check_settings({rival: content.pop(rival)}, str(path), kind=kind)  # a mistake in it is reported
    for key, value in assignments.items():
        _put_assignment(content, key, parse_yaml(value, f"--set {key}"))
    content |= overriding
    settings = check_settings(content, "" if path is None else str(path), written, kind=kind)
    if isinstance(settings, Assess | Harden):
        refuse_unknown(settings.suite, settings.attacks, settings.threat, settings.only, settings.skip)
    return settings


def keys_for_verb(loaded: Mapping[str, Any], where: str, kind: type[VerbSettings]) -> dict[str, Any]:
    """Return those settings in a configuration file that apply to one command.

    The keys are those at the top, and those of the section with the name of the verb, which takes precedence. Sections
    of other verbs are validated but not returned. For `doctor`, `calibrate` and `explain`, all keys of `assess` are
    accepted, but only those that they use are returned. Raises `UsageError`, with the section for each key, for keys at
    the top that the verb does not use.
    """
    reading: type[VerbSettings] = Assess if kind in (Doctor, Calibrate, Explain) else kind
    sections = {verb: _section(loaded[verb], verb, where) for verb in VERBS if verb in loaded}
    shared = {key: value for key, value in loaded.items() if key not in VERBS}
    refuse_consent(shared, where)
    _refuse_misplaced(shared, where, reading, kind.verb)
    section = sections.get(reading.verb, {})
    for key, rival in _REPLACING:
        if key in section and rival not in section:
            shared.pop(rival, None)
    content = {**shared, **section}
    if reading is not kind:
        check_settings(content, where, kind=reading)
        content = {key: value for key, value in content.items() if key in kind.model_fields}
    return content


def _section(content: object, verb: str, where: str) -> dict[str, Any]:
    """Return the section of a verb after its validation."""
    if content is None:
        return {}
    if not isinstance(content, dict):
        hint = "; for holdfast assess write assess: {certify: true}" if content is True else ""
        raise UsageError(
            f"{where}: {verb} is {content!r}; expected settings of {verb}, as in {verb}: {{seed: 1}}{hint}"
        )
    refuse_consent(content, f"{where}: {verb}")
    check_settings(content, f"{where}: {verb}", kind=VERBS[verb])
    return content


def _refuse_misplaced(shared: Mapping[str, Any], where: str, kind: type[VerbSettings], command: str) -> None:
    """Raise `UsageError` with the new place of each key at the top that the verb does not use and another does."""
    known = kind.model_fields
    elsewhere = {str(key): verbs for key in shared if key not in known and (verbs := verbs_with(str(key)))}
    if elsewhere:
        places = "; ".join(
            f"{key} in {' or '.join(f'{verb}:' for verb in verbs)}" for key, verbs in elsewhere.items()
        )
        raise MisplacedKeys(
            f"{where} contains {', '.join(elsewhere)} at the top, which {command} does not use. Keys that not all "
            f"verbs of a file use are written in the section of a verb: {places}",
            tuple(elsewhere),
        )


def given(**settings: Any) -> dict[str, Any]:
    """Return those keyword arguments that are not None. In the Python interface, None stands for the default of a
    setting.
    """
    return {key: value for key, value in settings.items() if value is not None}


def _put_assignment(content: dict[str, Any], path: str, value: Any) -> None:
    """Set the value of a `--set`. A recipe or source with another name keeps only the settings that all have."""
    first, _, rest = path.partition(".")
    if first in ("recipe", "source") and rest:
        part = content.get(first)
        if isinstance(part, str):
            part = {"use": part}
        if isinstance(part, Mapping):
            other = rest == "use" and part.get("use", value) != value
            content[first] = {key: part[key] for key in part if not other or key == "training"}
    put_setting(content, path, value)


def items(settings: VerbSettings) -> Iterator[tuple[str, Any, bool]]:
    """Yield the name and the value of every setting of a command, and whether the user gave it."""
    for key in type(settings).model_fields:
        yield key, getattr(settings, key), key in settings.model_fields_set


OPENED_WITH = (
    "arch", "model_args", "bounds", "mean", "std", "data_normalised", "layout", "model_output", "classes",
    "class_names", "class_order", "split", "label", "drop", "x", "y", "separator", "header",
)  # fmt: skip
"""settings with which a model and data are opened, apart from their addresses"""


def opening_settings(settings: VerbSettings) -> dict[str, Any]:
    """Return the given settings with which the model and the data of a command are opened again, as plain values; none
    for a model that has no address.
    """
    if address_of(getattr(settings, "model", None)) is None:
        return {}
    return settings.model_dump(mode="json", include={*OPENED_WITH, "groups"} & settings.model_fields_set)


def flag_of(field: FieldInfo) -> Flag | None:
    """Return the description of the command-line option of a setting, or None if the setting has no option of its
    own.
    """
    return next((metadata for metadata in field.metadata if isinstance(metadata, Flag)), None)


def canonical_settings(settings: VerbSettings) -> dict[str, Any]:
    """Return those settings of a command that affect the evidence, as plain values by name. Their digest is part of the
    name of a new run folder.

    What identifies a run on resume is its manifest, see `holdfast.runs.stored.run_manifest`.
    """
    fields = type(settings).model_fields
    outside = {
        key for key, field in fields.items() if (flag := flag_of(field)) is not None and not flag.identifies
    }
    values = settings.model_dump(mode="json")  # model_dump_json refuses names of files that are not UTF-8
    return {key: value for key, value in values.items() if key not in outside and key != "schema_version"}
