"""Writes the command line of a stored run from its settings in `run.json`.

A run folder may come from someone else, and users copy the command from a report into a shell. Therefore no stored
command line is shown: the program and its options are those of Holdfast, and every value is quoted as one word.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from holdfast.attacks.suites import SUITES
from holdfast.core.catalogue import RECIPES, load, names
from holdfast.core.names import exact
from holdfast.gates.judging import Judgement
from holdfast.io.models.factories import names_code
from holdfast.threats.stored import threat_from_json

_ADDRESS = re.compile(r"[\w./@][\w./:@+=-]*")
"""Address of a model or of data that is shown: one word that no program reads as an option."""
_SUITE = re.compile(r"([\w-]+)@\d+")
"""Name and version of a whole suite, without `--only` and `--skip`."""
_SWITCHES = {"full": "--full", "keep_adversarial": "--save-adversarial"}
_OPTIONS_OF_KINDS = {"curve": "--curve", "quick-proof": "--certify"}
"""options of `assess` that add a stage, by the kind of the stage"""
_OPENED_WITH = (
    "label",
    "drop",
    "split",
    "x",
    "y",
    "separator",
    "layout",
    "bounds",
    "mean",
    "std",
    "model_output",
)
"""settings with which model and data are opened again and that run no code, which the command states"""


def command_of(manifest: Mapping[str, Any], gates: Sequence[Judgement] = ()) -> str:
    """Return the command line of a run of `assess`, `certify` or `harden`, and "" for a run of another verb.

    `manifest` is the content of `run.json`, and `gates` are the judged gates. A placeholder, such as MODEL, stands for
    what `run.json` does not state in one word, and for a model that runs code when it is opened. Options that it does
    not contain, such as a guard, are missing.
    """
    verb = manifest.get("verb")
    if verb not in ("assess", "certify", "harden"):
        return ""
    config = manifest["config"]
    words = ["holdfast", verb, _address(manifest["model"], "MODEL"), _address(manifest["data"], "DATA")]
    members = manifest["model"].get("members", ())
    words += [word for card in members for word in ("--member", _address(card, "MODEL"))]
    words += _opening(manifest.get("opening", {}))
    words += ["--threat", threat_from_json(config["threat"]).text]
    if config.get("recipe") in names("recipes"):
        words += ["--recipe", config["recipe"], *_recipe_settings(config)]
    for key, option in (("budget_s", "--budget"), ("assess_budget_s", "--assess-budget")):
        if isinstance(config.get(key), int | float):
            words += [option, f"{config[key]:g}s"]
    if verb != "certify":  # which has no options for its attacks
        words += _attacks(manifest)
    if isinstance(manifest["data"].get("n"), int):
        option = "--sample" if manifest["data"].get("sampled") is True else "-n"
        words += [option, str(manifest["data"]["n"])]
    groups = manifest["data"].get("groups")
    if groups is not None:
        words += ["--groups", _address({"name": groups["column"]}, "NAME")]
    words += [option for key, option in _SWITCHES.items() if config.get(key) is True]
    words += ["--no-examples"] if config.get("examples") is False else []
    if isinstance(config.get("time_budget_s"), int | float):
        words += ["--time-budget", f"{config['time_budget_s']:g}s"]
    if isinstance(config.get("seed"), int) and config["seed"]:
        words += ["--seed", str(config["seed"])]
    for gate in gates:
        words += ["--gate", gate.claim.text]
    return shlex.join(words)


def _opening(settings: Mapping[str, Any]) -> list[str]:
    """Return the options with which model and data are opened. Values that are not text or numbers are left out."""
    words = []
    for name in _OPENED_WITH:
        given = settings.get(name)
        numbers = isinstance(given, list) and all(isinstance(value, float) for value in given)
        texts = [",".join(map(exact, given))] if given and numbers else given
        # as one word, because a value may begin with a hyphen
        words += [
            f"--{name.replace('_', '-')}={text}"
            for text in (texts if isinstance(texts, list) else [texts])
            if isinstance(text, str) and text.isprintable()
        ]
    return words


def _recipe_settings(config: Mapping[str, Any]) -> list[str]:
    """Return the options for the settings of the recipe that are not its defaults."""
    name = config["recipe"]
    given, cls = config.get("settings", {}).get(name), load("recipes", name, type)
    if not isinstance(given, Mapping) or any(field.default is field.default_factory for field in fields(cls)):
        return []
    usual = cls(**(RECIPES[name].settings if name in RECIPES else {}))
    return [word for text in _changed(given, usual, "recipe") for word in ("--set", text)]


def _changed(given: Mapping[str, Any], usual: Any, path: str) -> list[str]:
    """Return `PATH=VALUE` for each given setting that is not that of the object `usual`."""
    texts = []
    for field in fields(usual):
        value, default = given.get(field.name), getattr(usual, field.name)
        if isinstance(value, Mapping) and is_dataclass(default):
            texts += _changed(value, default, f"{path}.{field.name}")
        elif field.name in given and isinstance(value, bool | int | float | str | list) and value != default:
            text = value if isinstance(value, str) else json.dumps(value)
            texts.append(f"{path}.{field.name}={'FILE.py:NAME' if names_code(text) else text}")
    return texts


def _attacks(manifest: Mapping[str, Any]) -> list[str]:
    """Return the options for the attacks and the doubts of a run."""
    config = manifest["config"]
    named = _SUITE.fullmatch(config["suite"])
    words = ["--suite", named[1] if named and named[1] in SUITES else "ATTACKS"]
    surrogates = [card for card in manifest.get("surrogates", ()) if not card.get("member")]
    for option, cards in (
        ("--surrogate", surrogates),
        ("--across", manifest.get("other_data", ())),
    ):
        words += [word for card in cards for word in (option, _address(card, option[2:].upper()))]
    steps = config.get("stages", ())
    if any(step.get("adaptive") is True for step in steps):
        words.append("--adaptive")
        if isinstance(config.get("adaptive_budget"), int):
            words += ["--adaptive-budget", str(config["adaptive_budget"])]
    kinds = {step.get("kind") for step in steps}
    words += [option for kind, option in _OPTIONS_OF_KINDS.items() if kind in kinds]
    return [*words, "--no-doubts"] if config.get("doubts") == "none" else words


def _address(card: Mapping[str, Any], placeholder: str) -> str:
    """Return the name of a model or of data if it can be its address, and otherwise the placeholder."""
    name = card.get("name")
    shown = isinstance(name, str) and _ADDRESS.fullmatch(name) is not None and not names_code(name)
    return str(name) if shown and card.get("how") != "python" else placeholder
