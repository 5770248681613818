"""Annexes of standards: every kind of evidence has a row, and an annex lists evidence without judging it."""

import json
import re
import shutil

import pytest
import torch
from click.testing import CliRunner

import holdfast
from conclusions import concluding
from holdfast.adaptation.journal import open_journal
from holdfast.attacks import FGSM, Square
from holdfast.attacks.suites import VARIANTS
from holdfast.audits.audit import AuditRequest, audited
from holdfast.audits.finding import Finding
from holdfast.cli.app import verbs
from holdfast.core.catalogue import ATTACKS, AUDITS, BUNDLED, PROVERS, RECIPES
from holdfast.core.errors import TargetError, UsageError
from holdfast.guard.rules import QUERIES, RANGE, SCHEMA
from holdfast.server.keys import add_key
from holdfast.verbs.reports import annex_of, standard_names, standards_data

FORMS = {
    "atlas": r"AML\.[TM]\d{4}(\.\d{3})?",
    "aisvs": r"v1\.0-C\d+\.\d+\.\d+",
    "aitg": r"AITG-[A-Z]{3}-\d\d",
    "ml-top-10": r"ML\d\d:2023",
    "nist": r"NISTAML\.\d{2,3}",
    "eu-ai-act": r"Article \d+(\(\d\))?",
}


def _listed(source):
    return [name for kind in standards_data()["evidence"].values() for name in kind["of"].get(source, ())]


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("attacks", ATTACKS),
        ("audits", AUDITS),
        ("certificates", PROVERS),
        ("guard rules", (SCHEMA, RANGE, QUERIES, *BUNDLED["detectors"])),
    ],
)
def test_everything_that_gives_evidence_has_one_row(source, names):
    assert sorted(_listed(source)) == sorted(names)


def test_recipes_of_rows_exist():
    assert set(_listed("recipes")) <= set(RECIPES)


def test_every_identifier_of_a_row_is_one_of_its_standard():
    data = standards_data()
    assert set(data["standards"]) == set(FORMS) == set(standard_names())
    for name, standard in data["standards"].items():
        assert standard["version"] and re.fullmatch(r"\d{4}-\d\d-\d\d", standard["read"])
        assert all(re.fullmatch(FORMS[name], each) for each in standard["requirements"])
        for kind in data["evidence"].values():
            assert set(kind[name]) <= set(standard["requirements"]), kind["title"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("annex") / "a"
    attacks = [FGSM(), Square(queries=5)]
    holdfast.assess("mnist-cnn", "mnist-mini", threat="linf:0.1", suite=attacks, n=30, run=folder)
    return folder


@pytest.fixture(autouse=True)
def concluded():
    """An audit whose finding does not depend on steps."""
    found = Finding("not flagged", "no trigger is small")
    with concluding(lambda steps: found):
        yield


def _audit(folder):
    about = {"name": "other-net", "digest": "0" * 64}, {"name": "d", "digest": "1" * 64}
    audited(AuditRequest("backdoor", {}, *about, (), ("no-backdoor",)), lambda run: dict, folder)
    return folder


def test_an_annex_lists_evidence_and_what_is_missing(run, tmp_path):
    content = annex_of([run, _audit(tmp_path / "b")], "aisvs").content
    requirements = {each["id"]: each for each in content["requirements"]}
    evaluated = requirements["v1.0-C11.1.3"]
    assert {name for each in evaluated["evidence"] for name in each["names"]} == {"FGSM", "Square"}
    assert "proofs for single inputs" in [each["title"] for each in evaluated["missing"]]
    assert requirements["v1.0-C6.1.4"]["evidence"][0]["model"] == "other-net"
    assert not requirements["v1.0-C11.2.5"]["evidence"]
    assert requirements["v1.0-C11.2.5"]["missing"][0]["how"] == "holdfast audit membership"
    assert not requirements["v1.0-C11.1.1"]["covered"]
    assert content["models"] == ["mnist-cnn", "other-net"] and "different models" in content["caution"]


@pytest.mark.parametrize("standard", list(FORMS))
def test_an_annex_never_states_that_a_requirement_is_met(standard, run, tmp_path):
    annex = annex_of([run], standard)
    texts = [annex.write(tmp_path / f"annex{suffix}").read_text() for suffix in (".html", ".json", ".md")]
    for text in [*texts, str(annex)]:
        assert not re.search(r"compl(y|ies|iant|iance)|conform|satisf|fulfil", text, re.IGNORECASE)
        assert annex.content["standard"]["version"] in text or text == str(annex)
    assert annex.content["caution"] == ""
    assert json.loads(texts[1]) == annex.content


def test_wrong_folders_and_standards_are_refused(run, tmp_path):
    with pytest.raises(UsageError, match="the standards are atlas, aisvs"):
        annex_of([run], "iso")
    with pytest.raises(UsageError, match="no folder was given"):
        annex_of([], "aisvs")
    with pytest.raises(TargetError, match="contains no run"):
        annex_of([tmp_path], "aisvs")
    shutil.copytree(run, tmp_path / "altered")
    (tmp_path / "altered" / "verdict.json").write_text("{}")
    with pytest.raises(TargetError, match="restore it from a copy"):
        annex_of([tmp_path / "altered"], "aisvs")
    with open_journal(tmp_path / "adapted", {"server": "http://s"}, resume=False):
        pass
    with pytest.raises(TargetError, match="not finished"):
        annex_of([tmp_path / "adapted"], "aisvs")


def test_the_command_writes_an_annex_of_several_folders(run, tmp_path):
    page = tmp_path / "annex.html"
    words = ["report", str(run), str(_audit(tmp_path / "b")), "--annex", "atlas", "-o", str(page)]
    done = CliRunner().invoke(verbs, words, catch_exceptions=False)
    assert done.exit_code == 0 and "AML.T0043.000: White-Box Optimization" in done.output
    assert "<script" not in page.read_text() and "other-net" in page.read_text()
    with pytest.raises(UsageError, match="--annex aisvs"):
        CliRunner().invoke(verbs, words[:3], catch_exceptions=False)


def test_reports_of_monitor_and_keys_with_limits_are_evidence(tmp_path):
    def evidence(path):
        requirements = annex_of([path], "aisvs").content["requirements"]
        return {each["id"]: each["evidence"][0]["statement"] for each in requirements if each["evidence"]}

    report = tmp_path / "monitor.json"
    x = torch.rand(400, 4, generator=torch.Generator().manual_seed(0)).numpy()
    holdfast.monitor(x[:200], reference=x[200:]).write(report)
    assert list(evidence(report)) == ["v1.0-C12.3.1"]
    keys = tmp_path / "keys.json"
    add_key(keys, "a", ("infer",), rate=2.0)
    add_key(keys, "b", ("infer",))
    assert "1 of 2 valid keys" in evidence(keys)["v1.0-C11.2.2"]
    report.write_text(json.dumps(json.loads(report.read_text()) | {"verb": "assess"}))
    with pytest.raises(TargetError, match="verb"):
        annex_of([report], "aisvs")


def test_an_attack_of_a_suite_counts_by_its_class_and_has_its_name_in_reports(run, tmp_path):
    quick = tmp_path / "quick"
    holdfast.assess("mnist-cnn", "mnist-mini", "linf:0.1", "quick", n=5, doubts=False, run=quick)
    content = annex_of([quick], "aisvs").content
    requirements = {each["id"]: each for each in content["requirements"]}
    assert requirements["v1.0-C11.1.3"]["evidence"][0]["names"] == ["Sprint"]  # as in the report of the run
    assert set(VARIANTS.values()) <= set(_listed("attacks"))
