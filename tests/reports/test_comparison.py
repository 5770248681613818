import dataclasses
import json
import re

import jsonschema
import pytest
import torch

from holdfast.core.catalogue import names
from holdfast.core.chain import canonical, digest
from holdfast.core.constraints import L2, Linf
from holdfast.core.errors import UsageError
from holdfast.core.evidence import PassRecord
from holdfast.core.threat import ThreatModel
from holdfast.reports import comparison
from holdfast.reports.formats.html import notebook
from holdfast.reports.json_schemas import summary_schema
from holdfast.reports.terminal import body
from holdfast.reports.write import rendered, write
from holdfast.runs.assess.assess import assess
from holdfast.verbs.reports import compare, report, verify
from reports import made
from runs.fakes import FAST, data, order, subject
from store.test_foreign import rewritten


@pytest.fixture(scope="module")
def first():
    return made.evidence(400, gallery=0)


def _changed(evidence, lost, gained, **changes):
    """The same examples; some surviving ones fall, some fallen ones stand."""
    success = evidence["success"].clone()
    held = evidence["correct"] & ~success
    success[held.nonzero()[:lost, 0]] = True
    success[(evidence["correct"] & evidence["success"]).nonzero()[:gained, 0]] = False
    columns = dict(evidence.columns) | {"success": success}
    return dataclasses.replace(evidence, columns=columns, **changes)


def _compared(first, second):
    content = comparison.comparison(first, second, (made.summarised(first), made.summarised(second)))
    jsonschema.validate(content, summary_schema("comparison-2"), cls=jsonschema.Draft202012Validator)
    return content


def _shown(content, suffix=""):
    """The report of a comparison in a format, or as text for a terminal."""
    report = comparison.comparison_report(content)
    return rendered(report, suffix) if suffix else body(report, colour=False)


def test_pairs_count_the_examples_whose_verdict_changed(first):
    content = _compared(first, _changed(first, lost=30, gained=4))
    paired = content["paired"]["robust_accuracy"]
    assert (paired["only_first"], paired["only_second"]) == (30, 4)
    assert paired["difference"]["value"] == pytest.approx(-26 / 400)
    assert paired["second"] - paired["first"] == pytest.approx(-26 / 400)
    assert paired["difference"]["low"] < paired["difference"]["value"] < paired["difference"]["high"] < 0
    assert paired["p"] < 1e-4
    assert content["flipped"]["lost"]["n"] == 30
    assert content["flipped"]["gained"]["n"] == 4
    assert "−6.5 points" in content["headline"]
    assert "no difference" not in content["headline"]


def test_the_same_run_twice_shows_no_difference(first):
    content = _compared(first, first)
    paired = content["paired"]["robust_accuracy"]
    assert (paired["only_first"], paired["only_second"], paired["p"]) == (0, 0, 1.0)
    assert "no significant difference on these examples, 0.0 points" in content["headline"]
    assert not any("differ" in note for note in content["notes"])


def test_passes_count_only_where_their_settings_and_surrogates_are_the_same(first):
    def made_with(steps, digest):
        curve = PassRecord("curve-1-fmn", "FMN of the eps curve", 400, 0, {"steps": steps})
        return dataclasses.replace(first, passes=(curve,), surrogates=({"name": "other", "digest": digest},))

    scopes = [
        _compared(made_with(10, "ab"), made_with(*other))["scope"] for other in ((10, "ab"), (100, "ab"))
    ]
    assert scopes == ["every pass", "suite only"]
    assert _compared(made_with(10, "ab"), made_with(10, "cd"))["scope"] == "suite only"


def test_examples_are_paired_by_content_and_not_by_place(first):
    order = torch.randperm(400, generator=torch.Generator().manual_seed(3))[:250]
    columns = {name: column[order] for name, column in first.columns.items()}
    columns["id"] = columns["id"] + 5000
    content = _compared(first, dataclasses.replace(first, columns=columns))
    assert content["n"] == 250
    assert content["paired"]["robust_accuracy"]["only_first"] == 0
    assert any("250 examples are in both runs, of 400 and 250" in note for note in content["notes"])
    moved = _changed(dataclasses.replace(first, columns=columns), lost=1, gained=0)
    ((before, after),) = _compared(first, moved)["flipped"]["lost"]["ids"]
    assert after >= 5000 > before
    assert (first["digest"][before] == moved["digest"][(moved["id"] == after).nonzero()[0, 0]]).all()


def test_runs_without_a_shared_example_are_refused(first):
    with pytest.raises(UsageError, match="share no example"):
        _compared(first, made.evidence(50, seed=9, gallery=0))


def test_differences_between_compared_runs_are_stated(first):
    second = dataclasses.replace(first, suite="quick@1", doubts=())
    notes = _compared(first, second)["notes"]
    assert "suite differs: standard@1 in the first run, quick@1 in the second" in notes
    assert "doubts are open in the first run: black-box" in notes


def test_another_threat_is_stated_before_any_number(first):
    weaker = ThreatModel(Linf(0.1), access="scores", queries=10)
    content = _compared(first, dataclasses.replace(first, threat=weaker))
    said = (
        "The threat models differ: linf:0.2 in the first run, linf:0.1,access=scores,queries=10 in the second"
    )
    assert content["caution"].startswith(said)
    assert _shown(content).startswith(said)
    assert _shown(content, ".md").startswith(f"**{said}")
    page = _shown(content, ".html")
    assert page.index(said) < page.index(content["headline"][:20])
    keys = list(json.loads(_shown(content, ".json")))
    assert keys.index("caution") < keys.index("headline")
    assert _compared(first, first)["caution"] == ""


def test_other_bounds_are_stated_under_the_same_threat(first):
    one, other = (
        dataclasses.replace(first, model={**first.model, "bounds": ends}) for ends in ([0, 1], [0, 255])
    )
    said = "The bounds of the inputs differ: 0 to 1 in the first run, 0 to 255 in the second"
    assert _compared(one, other)["caution"].startswith(said)
    assert _compared(one, one)["caution"] == ""


@pytest.mark.parametrize(
    ("lost", "gained", "said"),
    [
        (
            11,
            3,
            "no significant difference on these examples, −2.0 points",
        ),  # the interval does not contain 0
        (30, 4, "in the first: −6.5 points (95 % interval −9.3 to −3.6, exact McNemar p = 6.2e−06)"),
    ],
)
def test_the_exact_test_decides_if_the_interval_disagrees(first, lost, gained, said):
    content = _compared(first, _changed(first, lost, gained))
    assert said in content["headline"]
    at_odds = "the interval does not contain 0, but the exact test decides" in content["headline"]
    assert at_odds == (lost == 11)


def test_runs_without_robust_accuracy_compare_the_rest(first):
    second = dataclasses.replace(first, threat=ThreatModel(L2()))
    content = _compared(first, second)
    assert list(content["paired"]) == ["clean_accuracy"]
    assert any("robust accuracy is not compared" in note for note in content["notes"])
    for suffix in ("", *names("reports")):
        assert "clean" in _shown(content, suffix).lower() or suffix == ".xml"


def test_all_outputs_agree(first, tmp_path):
    content = _compared(first, _changed(first, lost=30, gained=4))
    for suffix in names("reports"):
        path = write(comparison.comparison_report(content), tmp_path / f"compared{suffix}")
        text = path.read_text(encoding="utf-8")
        assert "6.5" in text
        assert suffix == ".xml" or "30" in text
        assert suffix == ".json" or "6.2e−06" in text
    assert json.loads((tmp_path / "compared.json").read_text()) == content
    shown = _shown(content)
    assert content["headline"] not in shown  # the command prints it after the tables
    assert "Robust in the first run, broken in the second: 30 (#" in shown
    assert "and 10 more" in shown


def test_a_report_of_several_runs_has_the_metrics_of_one_run(first):
    content = _compared(first, _changed(first, lost=30, gained=4))
    assert {"attack_success_rate", "perturbation_linf"} <= set(content["metrics"])
    content["metrics"]["perturbation_linf"][0]["value"] = "inf"
    content["metrics"]["perturbation_linf"][1]["value"] = "inf"
    for text in (_shown(content), _shown(content, ".html")):
        assert "Robust accuracy" in text
        assert "Attack success rate" not in text
        assert "Perturbation Linf" not in text
    content["metrics"]["perturbation_linf"][1]["value"] = 0.1
    assert "Perturbation Linf" in _shown(content)


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script>", "\x1b[2J", "| a | `b`", '"><img src=x onerror=y>']
)
def test_names_of_users_are_shown_and_not_obeyed(first, text):
    named = {
        "model": {"name": text},
        "data": {"name": text, "noun": text, "classes": made.CLASSES},
        "suite": text,
    }
    content = _compared(dataclasses.replace(first, **named), dataclasses.replace(first, suite=f"{text}2"))
    page = _shown(content, ".html") + notebook(comparison.comparison_report(content))
    assert not re.search(r"<(script|img)", page)
    assert "\x1b" not in page + _shown(content, ".md") + _shown(content)
    assert (
        len(
            {
                line.count("|") - line.count("\\|")
                for line in _shown(content, ".md").splitlines()
                if line[:1] == "|"
            }
        )
        == 2
    )


def test_a_stored_run_of_an_earlier_version_of_a_suite_is_reported_and_compared(tmp_path):
    old, new = (
        assess(subject(), data(), order(FAST, suite=f"fast@{k}"), run=tmp_path / f"{k}") for k in (1, 2)
    )

    def without_condition(content):
        """Stages of `fast@1` do not state after which attack they run."""
        for step in content["config"]["stages"]:
            step.pop("after", None)
        content["digests"]["config"] = digest(canonical(content["config"]))

    rewritten(old.folder, "run.json", without_condition)
    stored = report(old.folder)
    assert verify(old.folder).complete and stored.metrics == old.metrics
    assert stored.evidence.attacks == old.evidence.attacks
    compared = compare(old.folder, new.folder)
    assert compared.summary()["scope"] == "suite only"
    assert "suite differs: fast@1 in the first run, fast@2 in the second" in compared.summary()["notes"]
