"""Assessments and explanations of a model of files whose rules are those of formats."""

import json
from pathlib import Path

import jsonschema
import pytest

import holdfast
from files_of_formats import archive, pdf, pe
from holdfast.cli.app import run
from holdfast.core.batch import decoded_files
from holdfast.reports.json_schemas import summary_schema
from holdfast.reports.run import MOST_EDITS
from holdfast.threats.file_formats import FORMATS

pytest.importorskip("pefile")
pytest.importorskip("pypdf")
KINDS = ("pdf", "pe", "zip")
THREAT = "bytes:change=8,append=6,insert=4,file=rules.json"
RULES = [{"starts": starts, "format": kind} for kind, starts in zip(KINDS, ("%PDF", "MZ", "PK"), strict=True)]
MODEL = '''
KINDS = (b"%PDF", b"MZ", b"PK")


def make():
    """Scores by the first bytes; a large last byte is a sign of the next kind."""
    return scores


def scores(files):
    kinds = [next((k for k, start in enumerate(KINDS) if file.startswith(start)), 0) for file in files]
    kinds = [(kind + (file[-1] > 128)) % 3 for kind, file in zip(kinds, files)]
    return [[3.0 * (kind == k) - 1 for k in range(3)] for kind in kinds]
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "rules.json").write_text(json.dumps(RULES))
    contents = {"pdf": pdf(), "pe": pe(), "zip": archive()}
    for kind, content in contents.items():
        path = tmp_path / "files" / kind / f"one.{kind}"
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    return contents


def test_every_changed_file_is_opened_and_its_bytes_are_reported(folder):
    settings = {"model": "model.py:make", "data": "files", "threat": THREAT}
    stored = holdfast.Assess(**settings, save_adversarial=True).run(folder="run").adversarial
    assert run(["report", "run", "-o", "report.html", "-o", "report.json", "-o", "report.md"]) == 0
    assert len(stored["x"]) == 3
    for content, kind in zip(decoded_files(stored["x"]), KINDS, strict=True):
        assert content != folder[kind]
        assert FORMATS[kind].fault(content, folder[kind]) == ""
    summary = json.loads(Path("report.json").read_text())
    jsonschema.validate(summary, summary_schema())
    examples = summary["examples"]
    assert [example["kind"] for example in examples] == ["bytes"] * 3
    page, text = (Path(name).read_text() for name in ("report.html", "report.md"))
    for example, kind in zip(examples, KINDS, strict=True):
        assert example["length"] == len(folder[kind]) and example["edits"] and not example["left_out"]
        for edit in example["edits"][:MOST_EDITS]:
            assert f"0x{edit['offset']:x}" in page and f"0x{edit['offset']:x}" in text
            clean = bytes.fromhex(edit["clean"])
            assert folder[kind][edit["offset"] :].startswith(clean)
            assert folder[kind][: edit["offset"]].endswith(bytes.fromhex(edit["preceding"]))
        assert f"in a file of {example['length']:,} bytes" in page


def test_explanations_name_bytes_and_the_fewest_edits(folder):
    settings = {"model": "model.py:make", "data": "files", "threat": THREAT}
    explained = holdfast.Explain(**settings, index=1).run()
    (row,) = explained["change"].rows
    assert int(row[2], 16) > 128  # one byte, in the place of the last one or after it
    assert row[0] in ("0x5ff", "0x600") and row[0] in explained.sentence + "0x600"
    assert "depends most on byte 0x0 (“M”)" in explained["attributions"].title
    whole = holdfast.Explain(**settings).run()
    assert "the end" in whole["places"].title
