import dataclasses
import json
import math

import jsonschema
import pytest
import torch

from holdfast.attacks.parts.losses import margin_loss
from holdfast.core.constraints import L0, L2, Linf
from holdfast.core.threat import ThreatModel
from holdfast.reports import words
from holdfast.reports.json_schemas import summary_schema
from holdfast.reports.words import (
    count_text,
    number,
    percent,
    plain,
    seconds_text,
    shown_of_gate,
    size,
    strict,
    why,
)
from reports import made


def _check(content):
    jsonschema.validate(content, summary_schema(), cls=jsonschema.Draft202012Validator)
    return content


def _targeted():
    evidence = made.evidence()
    eligible = evidence["y"] != 3
    columns = dict(evidence.columns) | {"eligible": eligible, "success": evidence["success"] & eligible}
    return dataclasses.replace(evidence, columns=columns, threat=ThreatModel(Linf(0.2), goal=3, queries=500))


def _minimum_norm():
    evidence = made.evidence()
    found = {f"{record.stage}.distance": evidence["distance"] * 2 for record in evidence.attacks}
    found["3-fab-t.distance"] = torch.where(evidence["y"] == 3, math.inf, evidence["distance"])
    return dataclasses.replace(
        evidence,
        columns=dict(evidence.columns) | found,
        threat=ThreatModel(L2(math.inf)),
        suite="minimum-norm@1",
    )


def _nothing_attacked():
    evidence = made.evidence(gallery=0)
    kept = ("id", "y", "digest", "prediction", "margin", "correct")
    columns = {name: evidence[name] for name in kept} | {
        "success": torch.zeros(len(evidence), dtype=torch.bool)
    }
    return dataclasses.replace(evidence, columns=columns, attacks=(), doubts=(), suite="", tables={})


CASES = {
    "images": lambda: made.summarised(
        made.evidence(), "robust_accuracy >= 0.5", "robust_accuracy@0.1 >= 0.4"
    ),
    "table": lambda: made.summarised(made.evidence(120, image=False, classes=("no", "yes"))),
    "accepted": lambda: made.summarised(
        made.evidence(), "robust_accuracy >= 0.3", accepted={"black-box": "why"}
    ),
    "targeted": lambda: made.summarised(_targeted(), "targeted_success_rate <= 0.9"),
    "minimum norm": lambda: made.summarised(_minimum_norm(), "robust_margin >= 0.1"),
    "nothing attacked": lambda: made.summarised(_nothing_attacked()),
    "one example": lambda: made.summarised(made.evidence(1, gallery=0)),
    "pixels": lambda: made.summarised(
        made.evidence(threat=ThreatModel(L0(10, per="pixel"), access="scores"))
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_summary_follows_the_published_schema_and_survives_strict_json(case):
    content = _check(CASES[case]())
    assert json.loads(made.report(content, ".json")) == content
    assert "Infinity" not in made.report(content, ".json")


def test_a_run_without_a_description_has_a_page():
    evidence = dataclasses.replace(made.evidence(), model={}, data={}, suite="")
    content = _check(made.summary(evidence, metrics=made.measured(evidence)))
    assert "Reproduce" in made.page(content)


@pytest.mark.parametrize("case", CASES)
def test_every_summary_makes_a_page(case):
    text = made.page(CASES[case]())
    assert text.count("<h1>") == 1
    assert "Undefined" not in text


@pytest.mark.slow
def test_schema_refuses_what_a_reader_would_misread():
    content = made.summarised(made.evidence())
    jsonschema.Draft202012Validator.check_schema(summary_schema())
    for broken in (
        {"verdict": "maybe"},
        {"exit_code": 7},
        {"metrics": {"a": {"value": "Infinity", "low": 0, "high": 1, "n": 2}}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            _check(content | broken)
    del content["threat"]
    with pytest.raises(jsonschema.ValidationError):
        _check(content)


def test_verdict_and_exit_code_go_together():
    evidence = made.evidence()
    claims = {"robust_accuracy >= 0.5": ("fail", 1), "robust_accuracy >= 0.4": ("unclear", 4)}
    for claim, expected in claims.items():
        content = made.summarised(evidence, claim)
        assert (content["verdict"], content["exit_code"]) == expected
    content = made.summarised(evidence, "robust_accuracy >= 0.3", accepted={"black-box": "why"})
    assert (content["verdict"], content["exit_code"]) == ("pass", 0)
    assert made.summarised(evidence, *claims)["exit_code"] == 1
    content = made.summarised(evidence)
    assert (content["verdict"], content["exit_code"]) == ("no gate", 0)


def test_headline_is_one_plain_sentence():
    evidence = made.evidence()
    assert made.summarised(evidence, "robust_accuracy >= 0.5")["headline"] == (
        "41.5 % of 1,000 images survive every attack tried (95 % interval 38.4–44.6 %); "
        "the gate requires at least 50 %: fail."
    )
    assert made.summarised(evidence, "robust_accuracy >= 0.4")["headline"].endswith("at least 40 %: unclear.")
    with_suite = dataclasses.replace(
        evidence, columns={**evidence.columns, "suite_success": evidence["success"]}
    )
    of_suite = made.summarised(with_suite, "suite_robust_accuracy >= 0.5")["headline"]
    assert "the gate requires at least 50 % suite robust accuracy: fail" in of_suite
    doubted = made.summarised(evidence, "robust_accuracy >= 0.3")
    assert doubted["headline"].endswith("unclear, because of open doubts (black-box).")
    assert "doubts are open: black-box" in doubted["gates"][0]["message"]
    accepted = made.summarised(evidence, "robust_accuracy >= 0.3", accepted={"black-box": "why"})
    assert accepted["headline"].endswith("at least 30 %: pass. Accepted doubts: black-box.")
    several = made.summarised(
        evidence, "robust_accuracy >= 0.5", "clean_accuracy >= 0.9", "robust_accuracy >= 0.4"
    )
    assert "1 of 3 gates fails, 2 are unclear: fail" in several["headline"]
    alike = made.summarised(evidence, "robust_accuracy >= 0.5", "robust_accuracy >= 0.6")
    assert alike["headline"].endswith("; both gates fail.")
    assert made.summarised(evidence)["headline"].endswith("no gate was set.")
    assert "could be changed to class 3" in made.summarised(_targeted())["headline"]
    targeted = _targeted()
    smallest = dataclasses.replace(
        targeted,
        columns=dict(targeted.columns) | {"distance_linf": targeted["distance"]},
        threat=ThreatModel(Linf(math.inf), goal=3),
    )
    assert "reach class 3 within an Linf change of 0." in made.summarised(smallest)["headline"]
    gated = made.summarised(smallest, "targeted_success_rate <= 0.5")["headline"]
    assert "at most 50 % targeted success rate" in gated
    assert "break within an L2 change of 0.253" in made.summarised(_minimum_norm())["headline"]


def test_share_after_each_attack_ends_at_robust_accuracy():
    content = made.summarised(made.evidence())
    after = [attack["robust_accuracy"]["value"] for attack in content["attacks"]]
    assert after == sorted(after, reverse=True)
    assert after[-1] == content["metrics"]["robust_accuracy"]["value"]
    surviving = [attack["surviving_after"] for attack in content["attacks"]]
    assert after == pytest.approx([left / 1000 for left in surviving])


def test_without_an_eps_no_attack_leaves_a_share():
    content = made.summarised(_minimum_norm())
    assert all(attack["robust_accuracy"] is None for attack in content["attacks"])
    assert "robust_accuracy" not in content["metrics"]
    assert content["curves"]["eps"]
    assert not content["per_class"]


def test_an_attack_without_an_eps_is_reported_by_its_distances():
    evidence = _minimum_norm()
    content = made.summarised(evidence)
    for attack in content["attacks"]:
        distance = evidence[f"{attack['stage']}.distance"]
        found = distance.isfinite() & evidence["correct"]
        assert attack["success_rate"]["n"] == int(evidence["correct"].sum())
        assert attack["success_rate"]["value"] == pytest.approx(
            int(found.sum()) / attack["success_rate"]["n"]
        )
        assert attack["median_distance"]["value"] == float(distance.double().sort().values[499])
    rows = [line.split() for line in made.on_terminal(content).splitlines()]
    (fab,) = (row for row in rows if row[:1] == ["FAB-T"])
    share = content["attacks"][2]["success_rate"]["value"]
    assert "minimum-norm@1: the smallest changes found" in made.on_terminal(content, width=80)
    assert " APGD-CE " in made.on_terminal(content, width=80)
    assert fab[1:4] == [str(round(share * 985)), f"{100 * share:.1f}", "%"]
    assert fab[4] == f"{content['attacks'][2]['median_distance']['value']:.3f}"
    assert "| attack | found | share | median |" in made.markdown(content)
    assert ">median<" in made.page(content) and "Hardest attack" not in made.page(content)
    plain = made.summarised(made.evidence())
    assert {attack["success_rate"] for attack in plain["attacks"]} == {None}
    assert "median" not in made.on_terminal(plain) and ">median<" not in made.page(plain)


def test_examples_are_called_what_they_are():
    assert made.summarised(made.evidence())["noun"] == "images"
    assert made.summarised(made.evidence(image=False))["noun"] == "examples"
    bare = made.evidence(gallery=0)
    assert made.summarised(dataclasses.replace(bare, tables={}))["noun"] == "examples"
    told = dataclasses.replace(bare, tables={}, data=dict(bare.data) | {"shape": [3, 32, 32]})
    assert made.summarised(told)["noun"] == "images"


def test_targeted_shares_run_over_the_eligible_examples():
    content = made.summarised(_targeted())
    last = content["attacks"][-1]["robust_accuracy"]
    rate = content["metrics"]["targeted_success_rate"]
    assert last["n"] == rate["n"] == content["n"] < 1000
    assert last["value"] == pytest.approx(1 - rate["value"])


def test_gallery_shows_what_was_measured():
    evidence = made.evidence(gallery=20)
    content = made.summarised(evidence)
    assert len(content["examples"]) == 12
    for example in content["examples"]:
        row = example["id"]
        assert example["label"] == made.CLASSES[evidence["y"][row]]
        assert example["adversarial_prediction"] == made.CLASSES[evidence["adversarial_prediction"][row]]
        assert example["broken_by"] == evidence.attacks[evidence["broken_by"][row]].name
        assert example["robust"] is False
        assert example["amplified"] == pytest.approx(5, abs=0.05)


def test_difference_is_grey_where_nothing_changed():
    import base64
    import io

    from PIL import Image

    evidence = made.evidence(gallery=1)
    x = torch.full((1, 1, 4, 4), 0.5)
    x_adv = x.clone()
    x_adv[0, 0, 0, 0], x_adv[0, 0, 3, 3] = 0.6, 0.4
    gallery = {"id": evidence.gallery["id"], "x": x, "x_adv": x_adv}
    content = made.summarised(dataclasses.replace(evidence, tables=made.tables(gallery=gallery)))
    address = content["examples"][0]["difference"].partition(",")[2]
    pixels = Image.open(io.BytesIO(base64.b64decode(address)))
    assert pixels.getpixel((1, 1)) == 128
    assert pixels.getpixel((0, 0)) == 255
    assert pixels.getpixel((3, 3)) == 0


def test_features_of_a_table_are_listed_by_how_much_they_changed():
    evidence = made.evidence(50, image=False, classes=("no", "yes"), gallery=1)
    x = torch.zeros(1, 4)
    x_adv = torch.tensor([[0.1, 0.0, -0.3, 0.2]])
    gallery = {"id": evidence.gallery["id"], "x": x, "x_adv": x_adv}
    data = dict(evidence.data) | {"features": ["age", "income", "debt", "rent"]}
    content = made.summarised(dataclasses.replace(evidence, tables=made.tables(gallery=gallery), data=data))
    example = content["examples"][0]
    assert [change["feature"] for change in example["changes"]] == ["debt", "rent", "age"]
    assert example["changed"] == 3


@pytest.mark.slow
def test_large_evidence_stays_a_small_page():
    classes = tuple(f"class {i}" for i in range(300))
    evidence = made.evidence(200_000, classes=classes, gallery=0)
    noise = torch.rand((12, 3, 224, 224), generator=torch.Generator().manual_seed(0))
    gallery = {"id": evidence["id"][evidence["success"]][:12], "x": noise, "x_adv": 1 - noise}
    evidence = dataclasses.replace(evidence, tables=made.tables(gallery=gallery))
    metrics = {"robust_accuracy": made.estimate("robust_accuracy", evidence)}
    content = made.summary(evidence, metrics=metrics, run=made.RUN)
    text = made.page(content)
    assert len(text.encode()) < 2_000_000
    assert len(made.report(content, ".json").encode()) < 2_000_000


def test_numbers_that_are_not_finite_stand_as_words_and_come_back():
    assert strict({"a": math.inf, "b": [-math.inf], "c": 1.5}) == {"a": "inf", "b": ["-inf"], "c": 1.5}
    assert strict(math.nan) == "nan"
    for value in (math.inf, -math.inf, 0.25):
        assert number(strict(value)) == value
    assert strict(margin_loss) == "margin_loss"
    assert strict(Linf(0.5)) == {"Linf": {"eps": 0.5}}
    assert strict("\udcff") == "\\udcff"


def test_numbers_are_read_in_their_usual_notations():
    assert percent(0.415) == "41.5 %"
    assert percent(1.0) == "100.0 %"
    assert percent(0.9999) == "99.99 %"
    assert percent(0.0001) == "0.01 %"
    assert [plain(value) for value in (0.2, 1234.5, 0.00001, -2.5, math.inf, 400)] == [
        "0.2", "1,234", "1.00e−05", "−2.5", "∞", "400",
    ]  # fmt: skip
    assert [size(eps) for eps in (8 / 255, 0.2, 0.3, 12, 0.5)] == ["8/255", "0.2", "0.3", "12", "0.5"]
    assert [seconds_text(value) for value in (0.25, 22.1, 7200)] == ["250 ms", "22.1 s", "2.0 h"]
    assert count_text(2113000) == "2,113,000"


def test_a_threat_is_described_in_words():
    told = made.summarised(_targeted())["threat"]["description"]
    assert "at most 0.2" in told[0]
    assert "class 3" in told[1]
    assert "500 queries" in told[3]
    pixels = CASES["pixels"]()["threat"]
    assert pixels["constraint"] == "l0:10px"
    assert "10 pixels of an image" in pixels["description"][0]
    assert "no gradients" in pixels["description"][2]
    smallest = made.summarised(_minimum_norm())["threat"]
    assert smallest["constraint"] == "l2"
    assert "smallest change" in smallest["description"][0]


def test_every_metric_has_a_label_and_a_kind():
    for name in words.METRICS:
        assert "_" not in words.label(name)
    assert words.is_share("worst_class")
    assert not words.is_share("mean_perturbation_l2")
    assert words.label("mean_perturbation_linf") == "Mean perturbation Linf"


def _transferred():
    g = torch.Generator().manual_seed(0)
    right = torch.rand(300, 3, generator=g) < 0.9
    right[:, 2] = False
    wrong = torch.rand(300, 4, 3, generator=g) < torch.tensor([0.9, 0.3, 0.5, 0.6])[:, None]
    cards = (
        {"name": "nets/<b>.pt", "how": "pt", "digest": "ef" * 32},
        {"name": "c", "how": "code", "digest": "12" * 32},
    )
    transfer = {"id": torch.arange(300), "right": right, "wrong": wrong}
    return made.evidence(surrogates=cards, tables=made.tables(transfer=transfer))


def test_the_transfer_matrix_is_in_every_report():
    content = _check(made.summarised(_transferred()))
    found = content["transfer"]
    assert found["models"] == ["mnist-cnn-hardened", "<b>.pt", "c"]
    assert [(row["computed_on"], row["source"]) for row in found["rows"]] == [
        ("mnist-cnn-hardened", 0),
        ("<b>.pt", 1),
        ("c", 2),
        ("all surrogates", None),
    ]
    assert all(row["shares"][2] is None for row in found["rows"])
    share = found["rows"][1]["shares"][0]
    html = made.page(content)
    assert f"heat-{round(10 * share['value'])}" in html
    assert html.count("own") >= 2
    assert "&lt;b&gt;.pt" in html
    assert "<b>.pt" not in html
    said = f"{percent(share['value'])} ({words.interval('transfer_success', share)} of {share['n']})"
    assert said in made.on_terminal(content)
    assert said in made.markdown(content)
    assert any("surrogate models: nets/" in sentence for sentence in content["threat"]["description"])


def test_the_transfer_to_other_data_is_in_every_report():
    g = torch.Generator().manual_seed(0)
    turned = torch.rand(200, 2, 2, generator=g) < torch.tensor([[0.9, 0.3], [0.1, 0.8]])
    others = ({"name": "sets/<b>.npz", "digest": "ef" * 32, "n": 300},)
    evidence = made.evidence(
        others=others, tables=made.tables(across={"turned": turned, "control": turned.flip(2)})
    )
    content = _check(made.summarised(evidence))
    found = content["data_transfer"]
    assert (found["data"][1], found["n"], content["other_data"][0]["n"]) == ("<b>.npz", 200, 300)
    assert [row["computed_on"] for row in found["rows"]] == found["data"]
    share, control = (found["rows"][0][name][1] for name in ("shares", "controls"))
    assert share["value"] == pytest.approx(turned[:, 0, 1].double().mean().item())
    html = made.page(content)
    assert "Transfer across data" in html
    assert f"heat-{round(10 * share['value'])}" in html
    assert "<b>.npz" not in html
    interval = words.interval("transfer_success", share)
    said = f"{percent(share['value'])} ({interval}, control {percent(control['value'])})"
    assert said in made.on_terminal(content)
    assert said in made.markdown(content)


def test_reports_without_other_data_do_not_mention_it():
    content = _check(made.summarised(made.evidence()))
    assert (content["data_transfer"], content["other_data"]) == (None, [])
    assert "across data" not in made.page(content) + made.on_terminal(content)


def test_without_surrogates_there_is_no_matrix():
    content = _check(made.summarised(made.evidence()))
    assert content["transfer"] is None
    assert content["surrogates"] == []
    assert ">Transfer<" not in made.page(content)
    assert "transfer:" not in made.on_terminal(content)


def test_the_gate_on_a_training_shows_percentage_points():
    estimate = {"value": 0.26, "low": 0.1, "high": 0.4, "n": 50}
    gate = {
        "metric": "robust_accuracy",
        "versus": "before",
        "relation": ">=",
        "bound": 0.0,
        "verdict": "pass",
    }
    gate |= {"estimate": estimate, "scope": None}
    assert shown_of_gate(gate) == "26.0 percentage points"
    assert "given model (10.0 to 40.0 percentage points) is above 0" in why(gate, [])
    assert shown_of_gate({**gate, "versus": None}) == "26.0 %"
