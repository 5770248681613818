"""Configuration files: a commented one to start from (`holdfast init`), their check (`holdfast validate`), and the
settings that commands read from them and from flags.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from types import MappingProxyType
from typing import Any, TypeVar

from pydantic.fields import FieldInfo

from holdfast.core.errors import Remedy, TargetError, UsageError
from holdfast.gates.grammar import UnreachedVerdict
from holdfast.reports.write import check_destination as check_place
from holdfast.settings.grammar import AUTO, CARD, is_folder, parse_pairs, refuse_unknown
from holdfast.settings.groups import Flag
from holdfast.settings.guard_settings import check_guard_settings, is_guard
from holdfast.settings.texts import load, parse_yaml, put_setting, refuse_consent
from holdfast.settings.values import address_of
from holdfast.verbs.checked_settings import VERBS, VerbSettings, check_settings, verbs_with
from holdfast.verbs.settings import Assess, Calibrate, Certify, Doctor, Explain, Harden, RotateSettings

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
    "arch", "model_args", "bounds", "mean", "std", "data_normalised", "bits", "layout", "model_output", "classes",
    "class_names", "class_order", "split", "label", "drop", "x", "y", "separator", "header", "sampling_rate",
    "input_shape", "constants", "task", "tolerance",
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

    What identifies a run on resume is its manifest, see `holdfast.runs.documents.run_manifest`.
    """
    fields = type(settings).model_fields
    outside = {
        key for key, field in fields.items() if (flag := flag_of(field)) is not None and not flag.identifies
    }
    values = settings.model_dump(mode="json")  # model_dump_json refuses names of files that are not UTF-8
    return {key: value for key, value in values.items() if key not in outside and key != "schema_version"}


DIGITS = "mnist-mini"
DEMO: Mapping[str, Any] = {
    "model": "mnist-cnn",
    "data": DIGITS,
    "n": 100,
    "threat": "linf:0.1",
    "suite": "fast",
    "curve": True,
    "gates": ["clean_accuracy >= 0.95", "robust_accuracy >= 0.50"],
}
"""Settings of `holdfast demo`, with which one gate passes and one fails."""

DEMO_COMMAND = (
    "holdfast assess mnist-cnn mnist-mini -n 100 --threat linf:0.1 --suite fast --curve "
    "--gate 'clean_accuracy >= 0.95' --gate 'robust_accuracy >= 0.50' -o report.html"
)
"""Command that is equivalent to `holdfast demo`."""


GUARD = "guard"
"""what a file with the settings of a guard is valid for"""


def init(
    path: str | Path | None = None,
    *,
    model: str = "mnist-cnn",
    data: str = "mnist-mini",
    guard: bool = False,
    force: bool = False,
) -> Path:
    """Write a commented configuration file, and return its path: holdfast.yaml, or with `guard` the settings of a
    guard, guard.yaml. An existing file is overwritten only if `force` is true.
    """
    name = "guard.yaml" if guard else "holdfast.yaml"
    template = resources.files("holdfast.settings").joinpath("templates", name).read_text(encoding="utf-8")
    text = Template(template).substitute(model=json.dumps(model), data=json.dumps(data))
    return _written(Path(path or name), text, force=force)


def draft_rules(
    path: str | Path | None = None,
    *,
    table: str | Path,
    label: str | None,
    drop: Sequence[str] = (),
    separator: str | None = None,
    force: bool = False,
) -> tuple[Path, tuple[str, ...]]:
    """Write a draft of the rules of a table, for a threat such as `table:rules.yaml`, and return its path (default:
    rules.yaml) and notes. An existing file is overwritten only if `force` is true.

    `label` is the label column, and `drop` lists columns that are not features.
    """
    from holdfast.settings.table_rules import drafted

    place = Path(path or "rules.yaml")
    _refuse_existing(place, force=force)
    text, notes = drafted(Path(table), label, tuple(drop), separator)
    return _written(place, text, force=force), notes


def _refuse_existing(place: Path, *, force: bool) -> None:
    if place.exists() and not force:
        raise UsageError(
            f"{place} exists already; give another name", Remedy("force", True, reason="to overwrite it")
        )


def _written(place: Path, text: str, *, force: bool) -> Path:
    _refuse_existing(place, force=force)
    try:
        place.write_text(text, encoding="utf-8")
    except OSError as error:
        way_out = "name a file in a folder that can be written"
        raise TargetError(f"cannot write {place}: {error.strerror}; {way_out}") from error
    return place


def validate(path: str | Path = "holdfast.yaml") -> tuple[str, ...]:
    """Check all keys of a configuration file, and its threat models, gates, suites, attacks, recipes and reports.

    Nothing is run, and no model is opened. The calibration of a guard is compared with its settings. Returns the verbs
    for which the file is valid, which are those that use all keys at its top, or `guard` for the settings of a guard.
    Raises `UsageError` for the first fault, and if there is no such verb.
    """
    loaded = load(Path(path))
    if not loaded:
        raise UsageError(
            f"{path} contains no keys; expected keys such as model: and data:, as holdfast init writes them"
        )
    if is_guard(loaded):
        check_guard_settings(loaded, str(path))
        from holdfast.verbs.opening.guard import refuse_unusable

        refuse_unusable(Path(path))
        return (GUARD,)
    verbs, faults = [], []
    for verb, kind in VERBS.items():
        try:
            keys_for_verb(loaded, str(path), kind)
        except MisplacedKeys as error:
            if verb in loaded:  # its section could not be used
                raise
            faults.append(error)
        else:
            verbs.append(verb)
    if not verbs:
        raise min(faults, key=lambda error: len(error.keys))
    if "certify" in verbs and "certify" not in loaded and not _is_certifiable(Path(path)):
        verbs.remove("certify")
    for verb in tuple(verbs):
        try:
            settings = read_settings(Path(path), {}, kind=VERBS[verb])
        except UnreachedVerdict:
            if verb in loaded or verbs == [verb]:
                raise
            verbs.remove(verb)
        else:
            _check_parts(settings, str(path))
    return tuple(verbs)


def _is_certifiable(path: Path) -> bool:
    """Whether robustness can be proved under the threat model of a file."""
    try:
        read_settings(path, {}, kind=Certify)
    except UsageError:
        return False
    return True


def _check_parts(settings: VerbSettings, path: str) -> None:
    """Check the settings that need torch: reports, recipe and attacks."""
    if isinstance(settings, Harden | RotateSettings):
        from holdfast.verbs.opening.recipes import build_recipe, without_functions

        recipe, selected = settings.recipe, AUTO if isinstance(settings, Harden) else CARD
        if recipe["use"] in (AUTO, CARD) and recipe["use"] != selected:
            raise UsageError(
                f"{path}: recipe {recipe['use']} is not for {settings.verb}; name a recipe, or {selected}"
            )
        if recipe["use"] != selected:
            build_recipe(without_functions(recipe))
    if isinstance(settings, Assess | Certify | Harden):
        for output in settings.output:
            if output != "-" and not is_folder(output):
                check_place(Path(output))
        if not isinstance(settings, Certify) and settings.attacks is not None:
            from holdfast.verbs.opening.recipes import build_attack

            for k, spec in enumerate(settings.attacks):
                build_attack(spec, f"{path}: attacks.{k}")
