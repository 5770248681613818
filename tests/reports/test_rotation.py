"""The table of attackers in every report: whole, escaped, and absent where nothing rotates."""

import json

import jsonschema
import pytest

from holdfast.doubts.probing import doubt_test
from holdfast.reports.defences import NAMES
from holdfast.reports.json_schemas import summary_schema
from holdfast.reports.summary import summary
from reports import made

HOSTILE = "<script>alert(1)</script>|[x](http://e)\x1b[31m`"


def share(value=0.25):
    return {"value": value, "low": value / 2, "high": min(2 * value, 1.0), "n": 300}


def document(**changes):
    rows = [
        {
            "attacker": who, "has": HOSTILE, "share": None if who == "A2" else share(), "attack": HOSTILE,
            "effect": "not measured" if who == "A2" else "slowed", "message": HOSTILE,
            "broken_ids": [1, 2], "seconds": 1.0,
        }
        for who in NAMES
    ]  # fmt: skip
    alternatives = [
        {
            "alternative": "static",
            "clean_accuracy": share(1.0),
            "stolen_set": share(),
            "white_box": None,
            "message": HOSTILE,
        },
        {"alternative": "soup", "message": "the pool holds no several sets of a run"},
    ]  # fmt: skip
    known = {
        "set": "8db30a34",
        "n_correct": 300,
        "rows": rows,
        "alternatives": alternatives,
        "conclusion": "A1 is slowed",
    }
    return {**known, "complete": True, **changes}


def summarised(rotation):
    evidence = made.evidence()
    return summary(evidence, metrics=made.measured(evidence), run=made.RUN, rotation=rotation)


def test_the_table_is_in_every_report():
    content = summarised(document())
    jsonschema.validate(json.loads(made.report(content, ".json")), summary_schema())
    assert [row["alternative"] for row in content["rotation"]["alternatives"]] == ["static"], (
        "what was not measured is left out"
    )
    assert "broken_ids" not in content["rotation"]["rows"][0], (
        "which inputs fell stays in the folder of the run"
    )
    for text in (made.page(content), made.markdown(content), made.on_terminal(content)):
        assert all(name in text for name in NAMES.values())
        assert "static" in text and "slowed" in text and "25.0 %" in text
    assert "A1 is slowed." in made.page(content) and "A1 is slowed." in made.markdown(content)


def test_texts_of_a_pool_are_shown_and_never_interpreted():
    content = summarised(document())
    for text in (made.page(content), made.notebook(content), made.markdown(content)):
        assert "<script>alert" not in text and "\x1b" not in text
    assert "\x1b" not in made.on_terminal(content)
    assert "\\|\\[x\\](http" in made.markdown(content), "no cell is cut in two"


@pytest.mark.parametrize("rotation", [None, document(complete=False), document(rows=[])])
def test_an_incomplete_table_has_no_conclusion(rotation):
    content = summarised(rotation)
    jsonschema.validate(json.loads(made.report(content, ".json")), summary_schema())
    assert content["rotation"] is None
    assert "Rotation against each attacker" not in made.page(content)
    assert "### Attackers" not in made.markdown(content)
    assert "attackers:" not in made.on_terminal(content)


def test_the_doubt_is_explained():
    assert doubt_test("fine-tuning").meaning and doubt_test("fine-tuning").advice
