import csv
import io
import json
import os
import re
import stat
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from holdfast.core.catalogue import names
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.evidence import Doubt
from holdfast.reports.run import run_report
from holdfast.reports.write import check_destination, replacing, write
from reports import made


@pytest.fixture(scope="module")
def evidence():
    return made.evidence()


@pytest.fixture(scope="module")
def failing(evidence):
    return made.summarised(
        evidence, "robust_accuracy >= 0.5", "robust_accuracy >= 0.35", "clean_accuracy <= 0.99"
    )


@pytest.fixture(scope="module")
def accepted(evidence):
    return made.summarised(
        evidence, "robust_accuracy >= 0.3", accepted={"black-box": "an adaptive run is on file"}
    )


def _cases(content):
    root = ET.fromstring(made.report(content, ".xml"))
    return root, {case.get("name"): case for case in root.iter("testcase")}


def test_junit_has_the_shape_that_readers_expect(failing):
    root, cases = _cases(failing)
    (suite,) = root
    assert root.tag == "testsuites"
    for node in (root, suite):
        assert int(node.get("tests")) == len(cases)
        assert int(node.get("failures")) == len(list(root.iter("failure")))
        assert int(node.get("skipped")) == len(list(root.iter("skipped")))
        assert node.get("errors") == "0"
    for case in cases.values():
        assert case.get("classname")
        assert float(case.get("time")) >= 0
        assert len(case.findall("failure") + case.findall("skipped")) <= 1


def test_junit_fails_exactly_what_the_gates_fail(failing, accepted):
    _, cases = _cases(failing)
    assert cases["robust_accuracy >= 0.5"].find("failure").get("type") == "fail"
    assert cases["robust_accuracy >= 0.35"].find("failure").get("type") == "unclear"
    assert "black-box" in cases["robust_accuracy >= 0.35"].find("failure").get("message")
    assert cases["black-box"].find("skipped").get("message").startswith("raised: ")
    root, cases = _cases(accepted)
    assert not list(root.iter("failure"))
    assert accepted["exit_code"] == 0
    assert "an adaptive run is on file" in cases["black-box"].find("system-out").text


@pytest.mark.parametrize(
    "claims", [(), ("robust_accuracy >= 0.5",), ("robust_accuracy >= 0.4",), ("clean_accuracy <= 1",)]
)
def test_junit_has_a_failure_exactly_when_the_exit_code_is_not_zero(claims, evidence):
    content = made.summarised(evidence, *claims)
    root, _ = _cases(content)
    assert (len(list(root.iter("failure"))) > 0) == (content["exit_code"] != 0)


def test_markdown_puts_the_verdict_first_and_keeps_its_tables_whole(failing, accepted):
    lines = made.markdown(failing).splitlines()
    assert lines[0].startswith("## ✕ Fail")
    assert lines[2].startswith("41.5 % of 1,000 images")
    of_lines = [line.count("|") if line.startswith("|") else 0 for line in lines]
    assert {4, 5, 6, 7, 8} == {*of_lines} - {0}
    assert all(first == second or 0 in (first, second) for first, second in pairwise(of_lines))
    assert "**black-box** (accepted): Search without gradients" in made.markdown(accepted)
    assert "Accepted because: an adaptive run is on file." in made.markdown(accepted)


def test_at_most_five_doubts_are_above_the_pictures_and_raised_ones_first():
    names = ("zero-gradient", "scale", "one-step", "black-box", "noise", "nan", "chance")
    calm = tuple(Doubt(name, "clear") for name in names)
    page = made.page(made.summarised(made.evidence(n=8, doubts=(*calm, Doubt("state", "raised", 1, 0, 8)))))
    section = page[page.index('<h2 id="doubts">') :]
    shown = section[: section.index("<summary>3 more</summary>")]
    assert shown.index("(state: raised)") < shown.index("<strong>zero-gradient</strong>")
    assert "<strong>black-box</strong>" in shown and "<strong>noise</strong>" not in shown
    assert "<strong>chance</strong>" in section[len(shown) : section.index("</section>")]


def test_the_headline_states_which_doubts_of_a_passed_gate_were_not_measured():
    doubts = tuple(Doubt(name, "not measured") for name in ("not-exhausted", "transfer", "chance"))
    evidence = made.evidence(doubts=doubts)
    stated = "Doubts that were not measured: not-exhausted, chance."
    passed = made.summarised(evidence, "robust_accuracy >= 0.3")
    assert passed["headline"].endswith(stated) and stated in made.page(passed)
    assert "not measured" not in made.summarised(evidence, "robust_accuracy >= 0.9")["headline"]
    # stronger attacks could only lower the robust accuracy further
    upper = made.summarised(evidence, "robust_accuracy <= 0.6")["headline"]
    assert upper.endswith("Doubts that were not measured: chance.")


def test_every_report_states_a_doubt_in_sentences_and_advises_by_the_declared_output():
    doubt = Doubt("zero-gradient", "raised", 0.5, 0.01, 4, "2 of 4 are flat; see there")
    flat = made.evidence(n=8, doubts=(doubt, replace(doubt, name="noise", message="draws break 1 of 4")))
    content = made.summarised(replace(flat, model={**flat.model, "output": "probability"}))
    (logits, _) = made.summarised(flat)["doubts"]
    assert "BPDA" in logits["advice"]
    advice = ("Return the logit, the output of the layer before", "The suite is too weak: add")
    says = ("2 of 4 are flat; see there.", "Draws break 1 of 4.")
    text = made.markdown(content)
    assert all(f"{found} {way_out}" in text for found, way_out in zip(says, advice, strict=True))
    assert all(f"open: {found}\n" in made.stated(content) for found in says)
    assert all(f"<dd>{part}" in made.page(content) for part in (*says, *advice))


def test_the_page_states_once_why_doubts_were_not_measured(failing):
    said = "it needs gradients, and the model gives scores only"
    names = ("zero-gradient", "scale", "shattered")
    hidden = tuple(Doubt(name, "not applicable", message=said) for name in names)
    other = Doubt("noise", "not applicable", message="eps is 0, so no input may change")
    page = made.page(made.summarised(made.evidence(n=8, doubts=(*hidden, other))))
    assert page.count(said) == 1 and page.count("eps is 0, so no input may change") == 1
    assert (
        "<strong>zero-gradient</strong>, <strong>scale</strong>, <strong>shattered</strong> not applicable"
        in page
    )
    shown = made.page(failing)
    assert f"{len(failing['examples'])} of the broken examples." in shown


def test_csv_is_one_row_an_example(failing, evidence, tmp_path):
    write(run_report(failing, evidence.columns), tmp_path / "rows.csv")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "rows.csv").read_text())))
    assert len(rows) == len(evidence)
    assert list(rows[0])[:6] == [
        "id",
        "y",
        "clean_prediction",
        "robust",
        "broken_by",
        "adversarial_prediction",
    ]
    assert sum(row["robust"] == "true" for row in rows) == round(
        1000 * failing["metrics"]["robust_accuracy"]["value"]
    )
    assert {row["robust"] for row in rows} == {"true", "false"}
    for row in rows:
        place = int(evidence["broken_by"][int(row["id"])])
        assert row["broken_by"] == ("" if place < 0 else evidence.attacks[place].stage)
        assert (row["distance_linf"] == "inf") == (row["robust"] == "true")


def test_the_terminal_has_the_same_text_without_colour(failing, accepted):
    plain, coloured = (made.on_terminal(failing, colour=colour) for colour in (False, True))
    assert "\x1b" not in plain
    assert "\x1b" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain
    for attack in ("APGD-CE", "APGD-T", "FAB-T", "Square"):
        assert attack in plain
    said = made.stated(failing)
    assert said.startswith("✕ Fail  41.5 % of 1,000 images")
    assert "unclear: requires at least 35 % robust accuracy, measured 41.5 %" in said
    assert "doubt black-box open" in said
    assert "Accepted because: an adaptive run is on file" in made.stated(accepted)


def test_examples_that_an_attack_did_not_try_are_reported_with_their_risk(failing):
    square = failing["attacks"][-1]
    said = f"(95 % confidence, if none is easier to break): Square {square['not_tried']['n']} (8.9 %)"
    plain = made.on_terminal(failing)
    why = "\n\nexamples that were skipped, because all examples closer to the decision boundary survived, with the "
    assert f"{why}largest share of them that would break {said}\n\n" in plain
    assert f"{said}." in made.markdown(failing)
    tried = {**failing, "attacks": [{**attack, "not_tried": None} for attack in failing["attacks"]]}
    assert "skipped" not in made.on_terminal(tried) + made.markdown(tried)


def test_the_fits_of_learned_attacks_are_stated(failing):
    first, *others = failing["attacks"]
    learned = {**failing, "attacks": [{**first, "fits": 3}, *others]}
    said = "number of fits of each learned attack, the best of which was evaluated: APGD-CE 3"
    assert f"\n\n{said}\n\n" in made.on_terminal(learned)
    assert f"{said[1:]}." in made.markdown(learned)
    assert "learned attack" not in made.on_terminal(failing) + made.markdown(failing)


def test_the_signs_of_the_doubts_are_explained_where_they_stand(failing):
    said = made.on_terminal(failing).splitlines()[-1]
    legend = "doubts (▲ raised, ✓ clear, ○ not measured, – not applicable)"
    assert said.startswith(f"{legend}  ✓ zero-gradient  ✓ probabilities  ▲ black-box")
    clear = {**failing, "doubts": [d for d in failing["doubts"] if d["state"] == "clear"]}
    assert "\ndoubts (✓ clear)  ✓ zero-gradient" in made.on_terminal(clear)
    assert "doubts" not in made.on_terminal({**failing, "doubts": []})


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_tables_fit_the_terminal(failing, width):
    lines = made.on_terminal(failing, width=width).splitlines()
    assert max(len(line) for line in lines if not line.startswith("doubts")) <= max(width, 56)
    assert any("58.0 %" in line for line in lines)


@pytest.mark.parametrize("suffix", names("reports"))
def test_every_output_is_written_whole_and_the_same_each_time(suffix, failing, evidence, tmp_path):
    path = tmp_path / "new" / f"report{suffix}"
    write(run_report(failing, evidence.columns), path)
    first = path.read_bytes()
    write(run_report(failing, evidence.columns), path)
    assert path.read_bytes() == first
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    mask = os.umask(0o022)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), replacing(path) as file:
        file.write("half" + "\udcff")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_reported_with_a_remedy(failing, evidence, tmp_path, monkeypatch):
    full = os.open("/dev/full", os.O_WRONLY)
    target = tmp_path / ".part"
    target.touch()
    monkeypatch.setattr("tempfile.mkstemp", lambda **_: (full, str(target)))
    with pytest.raises(TargetError, match=r"No space left.*choose another place"):
        write(run_report(failing, evidence.columns), tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_suffix_is_refused_with_those_that_exist(failing, evidence, tmp_path):
    for name in ("report.pdf", "report", ".html"):
        with pytest.raises(UsageError, match=re.escape(" ".join(names("reports")))):
            check_destination(tmp_path / name)
    with pytest.raises(UsageError):
        write(run_report(failing, evidence.columns), tmp_path / "report.pdf")
    check_destination(tmp_path / "missing" / "REPORT.HTML")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_takes_no_file_is_refused_before_anything_runs(failing, tmp_path):
    (tmp_path / "x.html").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(TargetError, match="is a folder"):
        check_destination(tmp_path / "x.html")
    with pytest.raises(TargetError, match="is a file, not a folder"):
        check_destination(tmp_path / "file" / "x.html")
    with pytest.raises(TargetError):
        write(run_report(failing), tmp_path / "file" / "x.json")


def test_checking_an_output_needs_neither_torch_nor_a_renderer():
    code = (
        "import sys; from pathlib import Path; from holdfast.reports.write import check_destination;"
        "check_destination(Path('x.html'));"
        "print([name for name in ('torch', 'jinja2', 'rich', 'PIL', 'numpy') if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "[]"


def test_csv_is_written_to_any_text_file(failing, evidence):
    from holdfast.reports.formats.csv import write_rows

    file = io.StringIO()
    write_rows(failing, {name: column[:3] for name, column in evidence.columns.items()}, file)
    assert len(file.getvalue().splitlines()) == 4


def test_names_of_classes_are_in_every_report_that_lists_classes(tmp_path):
    evidence = made.evidence(n=30)
    names = [f"kind-{number}" for number in range(int(evidence["y"].max()) + 1)]
    named = replace(evidence, data={**evidence.data, "classes": names})
    content = made.summarised(named)
    write(run_report(content, named.columns), tmp_path / "rows.csv")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "rows.csv").read_text())))
    assert [row["class"] for row in rows] == [names[int(row["y"])] for row in rows]
    for text in (
        made.markdown(content),
        made.page(content),
        made.report(content, ".xml"),
        json.dumps(content),
    ):
        assert all(row["name"] in text for row in content["per_class"])
        assert content["per_class"][0]["name"].startswith("kind-")
