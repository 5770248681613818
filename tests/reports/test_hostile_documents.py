"""Whatever documents of strangers state, outputs show it, and no terminal, browser or CI system obeys it."""

import json
import re
import shutil
from functools import cache
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import torch

import holdfast
from conclusions import concluding
from holdfast.adaptation.journal import Adaptation, Adapted, Step, open_journal
from holdfast.audits.audit import AuditRequest, AuditResult, audited
from holdfast.audits.finding import Curve, Finding, Line, Picture, Table
from holdfast.cli.app import run as command
from holdfast.core.catalogue import names
from holdfast.explanation.case import Explained, Figure, bars
from holdfast.reports.audit import audit_report, monitoring_report
from holdfast.reports.comparison import comparison_report
from holdfast.reports.formats.html import fragment, notebook
from holdfast.reports.run import run_report
from holdfast.reports.terminal import body, verdict
from holdfast.reports.tree import Picture as Shown
from holdfast.reports.words import NOT_A_NUMBER_WORDS
from holdfast.reports.write import write
from holdfast.runs.documents.stored_runs import open_run
from holdfast.verbs.reports import Annex, annex_of, annex_report
from reports.test_hostile_strings import CI_COMMAND, HOSTILE, shape
from runs import stored
from store.test_foreign import rewritten

TEXT = f"{HOSTILE[12]}\n::error::owned {HOSTILE[19]} ##vso[task.x]{HOSTILE[0]}{HOSTILE[8]}{HOSTILE[13]}\ud800"
"""A text with everything that an output could obey."""
CLOSED = {"verdict", "state", "verb", "kind", "view", "outcome"}
"""Keys of values out of closed sets, which readers compare with these sets."""


def filled(content, text=TEXT):
    """A document in which another text is in all places of texts, except for values out of closed sets."""
    if isinstance(content, dict):
        return {key: value if key in CLOSED else filled(value, text) for key, value in content.items()}
    if isinstance(content, list):
        return [filled(each, text) for each in content]
    is_text = isinstance(content, str) and content not in NOT_A_NUMBER_WORDS
    return text if is_text and not content.startswith("data:image/png") else content


def refuse_obedience(form, said):
    """Fail if an output is not valid in its form, or if a terminal, a browser or a CI system would obey it."""
    said.encode()
    assert not CI_COMMAND.search(said), form
    if form == ".json":
        json.loads(said, parse_constant=pytest.fail)
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u2066]", said)
        return
    assert all(letter == "\n" or letter.isprintable() for letter in said), form
    if form == ".html":
        assert not {"script", "iframe", "object", "form", "base"} & set(shape(said).tags)
        assert not [name for _, name, _ in shape(said).attributes if name.startswith("on")]
    if form == ".md":
        prose = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", said)
        assert not re.search(r"(?<!\\)<(?!/?(details|summary)>)|(?<!\\)\]\(", prose)
    if form == ".xml":
        ET.fromstring(said)


@cache
def a_run():
    return open_run(stored.assessment())


def of_run(folder):
    result = a_run() if folder == stored.assessment() else open_run(folder)
    return run_report(filled(result.summary()), result.evidence.columns), {}


def of_audit():
    result = AuditResult(filled(audited(REQUEST, measure).content))
    return audit_report(result.content), {"str": str(result)}


def of_comparison():
    return comparison_report(filled(holdfast.compare(a_run(), a_run()).summary())), {}


def of_annex():
    annex = Annex(filled(annex_of([stored.assessment()], "aisvs").content))
    return annex_report(annex.content), {"str": str(annex)}


def of_monitoring():
    return monitoring_report(filled(MONITORED)), {}


def of_explanation():
    figure = Figure(
        "change", TEXT, TEXT, (TEXT, TEXT), ((TEXT, 1.0),), (Shown("data:image/png;base64,", TEXT),),
        bars((TEXT,), (1.0,), (TEXT,)), tabular=True, note=TEXT, reason=TEXT,
    )  # fmt: skip
    explained = Explained(TEXT, TEXT, (figure,), (TEXT,), (TEXT,), ((TEXT, TEXT),))
    return explained.report, {"text": explained.text(), "figure.csv": figure.csv}


def of_adaptation():
    step = Step("begin", 0.0, {TEXT: TEXT, "list": [TEXT]})
    adapted = Adapted.of(Adaptation(Path("a"), TEXT, TEXT, (step,), TEXT, "not promoted", TEXT))
    return adapted.report, {"text": adapted.text(), "str": str(adapted)}


ABOUT = {"name": "a", "digest": "0" * 64}
REQUEST = AuditRequest("backdoor", {"a": "b"}, ABOUT, ABOUT, ("scores",), ("no-backdoor",), notes=("a note",))


def measure(run):
    run.stage("scores", lambda: {"id": torch.arange(3)})
    return lambda: {"picture": torch.rand(1, 1, 8, 8)}


def concluded(steps):
    """A finding with another text in all of its places."""
    return Finding(
        "flagged",
        TEXT,
        (TEXT,),
        {TEXT: TEXT, "fact": TEXT},
        tables=(
            Table(TEXT, (TEXT, TEXT), [(TEXT, 1.5)], TEXT),
            Table(TEXT, (TEXT, TEXT), [(TEXT, TEXT)], texts=True),
        ),
        pictures=steps.pictures([Picture("picture", TEXT, (TEXT,))]),
        curves=(Curve(TEXT, TEXT, TEXT, [Line(TEXT, [(0.1, 0.2), (1.0, 1.0)])], 0.01, TEXT),),
        limits=(TEXT,),
    )


@pytest.fixture(scope="module", autouse=True)
def conclusion():
    """An audit of one stage, whose finding consists of other texts."""
    with concluding(concluded):
        yield


_SHARE = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}
_SOURCE = {"name": "a", "n": 9, "labelled": True}
_ACCURACY = {"accuracy": _SHARE, "calibration_error": 0.1, "errors": [{"name": "a", "error": _SHARE}]}
_TEST = {
    "name": "a", "compares": "b", "state": "alarm", "guarantee": "c", "fewest": 9, "restarted": ["d"],
    "alarm": {"after": 9, "signal": "a", "evidence": "b", "view": "inputs"},
    "power": {"signal": "a", "shift": 1.0, "drop": 0.1, "errors": True, "false_alarms": 1},
}  # fmt: skip
MONITORED = {
    "notes": ["a note"],
    "schema_version": 1, "verb": "monitor", "verdict": "alarm", "alpha": 0.01, "stream": _SOURCE, "reference": _SOURCE,
    "measured": _ACCURACY, "of_reference": _ACCURACY, "expected": _SHARE, "model": "a", "layer": "b", "decisive": ["a"],
    "tests": [_TEST],
}  # fmt: skip


@pytest.mark.parametrize(
    "outputs",
    [
        pytest.param(lambda: of_run(stored.assessment()), id="assessment"),
        pytest.param(lambda: of_run(stored.hardening()), id="hardening", marks=pytest.mark.slow),
        *(of_audit, of_comparison, of_annex, of_monitoring, of_explanation, of_adaptation),
    ],
)
def test_no_output_obeys_a_text_of_a_document(outputs, tmp_path):
    report, texts = outputs()
    texts["terminal"] = verdict(report, colour=False) + body(report, colour=False)
    texts |= {"fragment.html": fragment(report), "notebook.html": notebook(report)}
    for suffix in names("reports"):
        texts[f"report{suffix}"] = write(report, tmp_path / f"report{suffix}").read_text(encoding="utf-8")
    for name, said in texts.items():
        assert "owned" in said
        refuse_obedience(name[name.rfind(".") :] if "." in name else name, said)


def _free(content):
    """The keys of `run.json` and other documents whose texts a stranger can choose without any contradiction."""
    for key in (
        "notes",
        "hardware",
        "versions",
        "created",
        "details",
        "reason",
        "server",
        "headline",
        "limits",
    ):
        if key in content:
            content[key] = filled(content[key])
    for key in ("model", "data"):
        if key in content:
            content[key]["name"] = TEXT


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    """A folder with a run, a hardening, an audit and an adaptation of a stranger."""
    root = tmp_path_factory.mktemp("strangers") / "runs"
    shutil.copytree(stored.assessment(), root / "run")
    audited(REQUEST, measure, root / "audit")
    for place in (root / "run", root / "audit"):
        for name in ("run.json", "doubts.json"):
            if (place / name).is_file():
                rewritten(place, name, _free)
        (place / "about.json").write_text(json.dumps({"created": TEXT}))
    with open_journal(root / "adapted", {"server": TEXT}, resume=False) as journal:
        journal.take("begin", lambda: {TEXT: TEXT, "list": [TEXT], "share": 0.5, "ends": TEXT})
        journal.end()
    return root


@pytest.mark.parametrize(
    ("words", "suffixes"),
    [
        (("report", "run"), names("reports")),
        (("report", "audit"), names("reports")),
        (("report", "run", "audit", "adapted", "--annex", "aisvs"), names("reports")),
        (("compare", "run", "run"), names("reports")),
        (("verify", "run"), ()),
        (("verify", "audit"), ()),
        (("verify", "adapted"), ()),
        (("runs", "."), ()),
        (("explain", "run"), names("reports")),
    ],
)
def test_no_command_prints_what_a_strangers_run_would_have_obeyed(
    strangers, words, suffixes, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(strangers)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "job.md"))
    outputs = [word for suffix in suffixes for word in ("-o", str(tmp_path / f"x{suffix}"))]
    assert command([*words, *outputs]) in (0, 1, 3, 4)
    said = capsys.readouterr()
    for text in (said.out, said.err):
        refuse_obedience("terminal", text)
    for file in tmp_path.iterdir():
        refuse_obedience(file.suffix, file.read_text(encoding="utf-8"))


def test_no_page_obeys_a_strangers_run(strangers, tmp_path):
    pytest.importorskip("starlette")
    assert command(["ui", str(strangers), "--export", str(tmp_path / "site")]) == 0
    pages = [path for path in (tmp_path / "site").rglob("*") if path.suffix in (".html", ".csv")]
    assert len(pages) > 10
    for path in pages:
        refuse_obedience(path.suffix, path.read_text(encoding="utf-8"))


def _with(folder, name, place, text):
    """Write the text of a number in the place of a value of a document, and compute the chain again."""
    content = json.loads((folder / name).read_text())
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = "HERE"
    (folder / name).write_text(json.dumps(content).replace('"HERE"', text))
    if (folder / "chain.jsonl").exists():
        rewritten(folder, name)


NUMBERS = [
    ("run", "run.json", ("model", "bounds")),
    ("run", "run.json", ("config", "threat", "eps")),
    ("run", "run.json", ("data", "n")),
    ("run", "doubts.json", ("doubts", 5, "statistic")),
    ("run", "verdict.json", ("exit_code",)),
    ("run", "about.json", ("time",)),
    ("audit", "finding.json", ("facts", "fact")),
    ("adapted", "begin.json", ("share",)),
    ("adapted", "about.json", ("times", "begin")),
]


@pytest.mark.parametrize("number", ["Infinity", "NaN", "1e999", "1e308", '"\\ud800"'])
@pytest.mark.parametrize(
    ("folder", "name", "place"), NUMBERS, ids=[".".join(map(str, n[2])) for n in NUMBERS]
)
def test_odd_numbers_and_texts_end_no_command_with_an_internal_error(
    strangers, folder, name, place, number, tmp_path, capsys
):
    run = shutil.copytree(strangers / folder, tmp_path / "runs" / folder)
    _with(run, name, place, number)
    reported = ["report", run] + (["--annex", "aisvs"] if folder == "adapted" else [])
    codes = {"report": command([*map(str, reported), "-o", str(tmp_path / "report.html")])}
    said = capsys.readouterr().err
    codes["runs"] = command(["runs", str(run.parent)])
    codes["verify"] = command(["verify", str(run)])
    codes["ui"] = command(["ui", str(run.parent), "--export", str(tmp_path / "site")])
    if folder == "run":
        codes["explain"] = command(["explain", str(run)])
        codes["compare"] = command(["compare", str(run), str(strangers / "run")])
    assert set(codes.values()) <= {0, 1, 3, 4}, codes
    if number in ("Infinity", "NaN", "1e999"):
        assert codes["report"] == 3 and f"the number {number} is not finite" in said and name in said


def test_a_run_of_a_file_whose_name_is_not_utf8_is_read(strangers, tmp_path):
    run = shutil.copytree(strangers / "run", tmp_path / "run")
    about = {
        "created": "",
        "command": "holdfast assess 'odd\udcff.pt' mnist",
    }  # as Python decodes such a name
    (run / "about.json").write_text(json.dumps(about))
    assert command(["report", str(run)]) in (0, 1, 4)
