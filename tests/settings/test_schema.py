"""The published schema of the configuration: in step with the code, and at one with what the code accepts."""

import json
import re
from functools import cache
from pathlib import Path

import jsonschema
import pytest
import yaml

from holdfast import attacks
from holdfast.core.catalogue import RECIPES
from holdfast.settings.grammar import AUTO, CARD, SOURCES
from holdfast.settings.texts import CONSENT
from holdfast.verbs.checked_settings import VERBS
from holdfast.verbs.configuration import DEMO, init, validate
from holdfast.verbs.schema import settings_schema

ROOT = Path(__file__).resolve().parents[2]
STORED = ROOT / "docs" / "reference" / "holdfast.schema.json"
ALL_KEYS = {key for kind in VERBS.values() for key in kind.model_fields}
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def blocks():
    """Every YAML block of the documentation that is a configuration."""
    for page in PAGES:
        for k, block in enumerate(
            re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        ):
            if set(yaml.safe_load(block)) & {"model", "attacks", "threat"}:
                yield pytest.param(block, id=f"{page.stem}-{k}")


@cache
def validator():
    return jsonschema.Draft202012Validator(settings_schema())


def accepted(content):
    validator().validate(content)


def test_stored_copy_is_in_step():
    assert json.loads(STORED.read_text(encoding="utf-8")) == settings_schema(), (
        "write it again: holdfast validate --schema > docs/reference/holdfast.schema.json"
    )


def test_it_is_a_schema_and_holds_every_key_attack_and_recipe():
    content = settings_schema()
    jsonschema.Draft202012Validator.check_schema(content)
    assert set(content["properties"]) == {*ALL_KEYS, *VERBS} - {*CONSENT}
    for verb, kind in VERBS.items():
        (section, _) = content["properties"][verb]["anyOf"]
        assert set(section["properties"]) == set(kind.model_fields) - {*CONSENT}
    tags = [attack["properties"]["use"]["const"] for attack in content["$defs"]["attack"]["oneOf"]]
    assert sorted(tags) == sorted(attacks.__all__)
    recipes = [recipe["properties"]["use"]["const"] for recipe in content["$defs"]["recipe"]["oneOf"]]
    assert recipes == [AUTO, CARD, *RECIPES]
    sources = [source["properties"]["use"]["const"] for source in content["$defs"]["source"]["oneOf"]]
    assert sources == [*SOURCES]


def test_it_accepts_what_init_writes_and_what_the_demo_runs(tmp_path):
    path = init(tmp_path / "holdfast.yaml", model="file.py:factory", data="images.npz")
    accepted(yaml.safe_load(path.read_text()))
    accepted(DEMO)
    shown = path.read_text().replace("# curve", "curve").replace("# mean", "mean").replace("# std", "std")
    shown = (
        shown.replace("suite: standard ", "").replace("# attacks:", "attacks:").replace("#   - {", "  - {")
    )
    accepted(yaml.safe_load(shown))
    assert yaml.safe_load(shown)["attacks"][0]["use"] == "PGD"


@pytest.mark.parametrize("block", list(blocks()))
def test_it_accepts_every_example_of_the_documentation(block, tmp_path):
    accepted(yaml.safe_load(block))
    path = tmp_path / "holdfast.yaml"
    path.write_text(block)
    validate(path)


def test_there_are_examples():
    assert list(blocks())


@pytest.mark.parametrize(
    "content",
    [
        {"thret": "linf:0.1"},
        {"bounds": None},
        {"attacks": []},
        {"attacks": [{"steps": 5}]},
        {"attacks": [{"use": "PDG"}]},
        {"attacks": [{"use": "PGD", "stepz": 5}]},
        {"attacks": [{"use": "PGD", "steps": 0}]},
        {"attacks": [{"use": "PGD", "loss": "cosine"}]},
        {"n": 0},
    ],
)
def test_it_refuses_what_the_code_refuses(content, tmp_path):
    with pytest.raises(jsonschema.ValidationError):
        accepted(content)
