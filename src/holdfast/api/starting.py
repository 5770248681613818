"""Creates a commented configuration file to start from (`holdfast init`), and checks an existing one (`holdfast
validate`).

torch is imported only for the settings of attacks in a configuration.
"""

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from holdfast.api.checked_settings import VERBS, VerbSettings
from holdfast.api.reading_settings import MisplacedKeys, keys_for_verb, read_settings
from holdfast.api.verb_settings import Assess, Certify, Harden, RotateSettings
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.remedies import Remedy
from holdfast.gates.grammar import UnreachedVerdict
from holdfast.reports.write import check_destination as check_place
from holdfast.settings.grammar import is_folder
from holdfast.settings.guard_settings import check_guard_settings, is_guard
from holdfast.settings.naming import AUTO, CARD
from holdfast.settings.yaml_text import load

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
        from holdfast.api.guard_opening import refuse_unusable

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
        from holdfast.api.recipe_building import build_recipe, without_functions

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
            from holdfast.settings.threats_and_attacks import build_attack

            for k, spec in enumerate(settings.attacks):
                build_attack(spec, f"{path}: attacks.{k}")
