"""The documentation agrees with the code and the records: names, compositions, costs, keys, commands, numbers."""

import inspect
import json
import re
import tomllib
from dataclasses import replace
from importlib import import_module
from operator import attrgetter
from pathlib import Path

import pytest
import torch

from benchmarks import page as benchmarks_page
from benchmarks.__main__ import ROWS
from benchmarks.record import newest
from benchmarks.rows.recipes import FOR_SMOOTHING
from holdfast import attacks
from holdfast.attacks import Flow
from holdfast.attacks.protocol import Learned
from holdfast.attacks.suites import SUITES, VARIANTS, suite
from holdfast.cli.app import _COMMANDS
from holdfast.core.catalogue import ATTACKS as NAMES
from holdfast.core.catalogue import DOUBTS as CATALOGUED_DOUBTS
from holdfast.core.catalogue import RECIPES as CLASSES
from holdfast.core.constraints import L0, L1, L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.io.data.data import open_data
from holdfast.io.models.composed import with_denoiser
from holdfast.io.models.models import bundled_models, open_model
from holdfast.metrics.names import METRICS
from holdfast.recipes.training.fit import Training
from holdfast.runs.harness.measure import measure
from holdfast.settings.grammar import SPELLINGS, SUITE_SPELLINGS, attack_called, folded, suite_called
from holdfast.settings.texts import CONSENT
from holdfast.settings.values import written_fields
from holdfast.testing import fakes
from holdfast.testing.recipes import threat_for
from holdfast.threats.transformations import Corruptions, Patch, Spatial
from holdfast.threats.triggers import Stamped, Trigger, trigger_text
from holdfast.verbs.opening.recipes import build_recipe
from holdfast.verbs.settings import Adapt, Assess, Certify, Harden, Monitor, RotateSettings, Serve, audits

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
NORMS = {"Linf": Linf, "L2": L2, "L1": L1, "L0": L0}


def text(page):
    return (DOCS / page).read_text(encoding="utf-8")


def rows(page, first):
    """Cells of the table whose first heading is `first`, by their headings."""
    lines = text(page).splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith(f"| {first} |"))
    table = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return [dict(zip(table[0], row, strict=True)) for row in table[2:]]


ATTACKS = rows("reference/attacks.md", "attack")
RECIPES = rows("reference/recipes.md", "recipe")


def test_every_page_is_in_the_navigation_or_in_the_list_of_decisions():
    listed = re.findall(r"[\w/.-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    decisions = {page for page in pages if page.startswith("decisions/")}
    assert sorted(listed) == sorted(pages - decisions)
    linked = re.findall(r"\]\(([\w-]+\.md)\)", text("decisions/index.md"))
    assert sorted(f"decisions/{page}" for page in linked) == sorted(decisions - {"decisions/index.md"})


def test_every_missed_requirement_of_a_record_is_documented():
    records = [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks/records").glob("*.json"))]
    latest = {record["row"]: record["claims"] for record in records}
    missed = {row: sum(not claim["met"] for claim in claims) for row, claims in latest.items()}
    documented = {
        row["row"].strip("`"): (int(row["missed"]), int(row["of"]))
        for row in rows("reference/missed.md", "row")
    }
    assert documented == {row: (n, len(latest[row])) for row, n in missed.items() if n}


def test_the_page_of_benchmarks_is_in_step_with_the_records():
    assert set(benchmarks_page.SUBJECTS) == set(ROWS), "name the subject of each row"
    assert text("benchmarks.md") == benchmarks_page.page(), "write it again: make benchmarks-page"


@pytest.mark.parametrize("row, path", benchmarks_page.PLACES.items())
def test_a_table_on_another_page_is_in_step_with_its_record(row, path):
    written = path.read_text(encoding="utf-8")
    assert f"<!-- {row}: begin -->" in written
    assert written == benchmarks_page.with_table(row, written), "write it again: make benchmarks-page"


def test_the_readme_is_short_and_its_rows_are_recorded():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 120
    start = lines.index("| question | result | command: `python -m benchmarks --only …` |") + 2
    named = [line.split("|")[-2] for line in lines[start : lines.index("", start)]]
    assert len(named) == 3
    assert all(newest(row)["claims"] for cell in named for row in re.findall("`([^`]+)`", cell))


def test_every_attack_has_a_row():
    assert sorted(row["attack"].strip("`") for row in ATTACKS) == sorted(attacks.__all__)


def test_the_other_names_of_attacks_and_suites_are_documented():
    documented = {
        row["canonical"].replace("`", ""): row["also"].split(", ")
        for row in rows("reference/attacks.md", "canonical")
    }
    for name, also in documented.items():
        suite_name = name.removeprefix("suite ")
        for other in also:
            assert (suite_called if name != suite_name else attack_called)(other) == suite_name
    forms = {name: {folded(form) for form in also} for name, also in documented.items()}
    for name, spelling in SPELLINGS.items():
        wanted = {folded(form) for form in (spelling.paper, *spelling.short) if form} - {folded(name)}
        assert name in VARIANTS or forms.get(name, set()) == wanted
    for name, other in SUITE_SPELLINGS.items():
        assert forms[f"suite {name}"] == set(map(folded, other))


def test_every_attack_is_compared_and_every_reference_belongs_to_one():
    compared = rows("reference/attacks.md", "compared")
    assert sorted(row["compared"].strip("`") for row in compared) == sorted(NAMES)
    references = ROOT / "benchmarks/references/attacks"
    used = set()
    for row in compared:
        measured, files = (re.findall("`([^`]+)`", row[column]) for column in ("rows", "files"))
        assert set(measured) <= set(ROWS)
        matching = {name: {path.resolve() for path in references.glob(f"{name}.json")} for name in files}
        assert measured or files, row["compared"]
        assert all(matching.values()), row["compared"]
        used.update(*matching.values())
    assert not set(references.glob("*.json")) - used
    for path in references.glob("*.json"):
        sides = json.loads(path.read_text())
        assert all(sides[side]["rows"] for side in ("ours", "reference")), path.name


@pytest.mark.parametrize("row", ATTACKS, ids=lambda row: row["attack"].strip("`"))
def test_an_attack_needs_and_costs_what_its_row_states(row):
    attack = getattr(attacks, row["attack"].strip("`"))()
    assert row["needs"] == attack.needs
    cited = re.findall(r"arxiv\.org/abs/(\d{4}\.\d{4,5})", row["source"])
    assert cited
    assert set(cited) <= set(re.findall(r"arXiv:(\d{4}\.\d{4,5})", inspect.getmodule(type(attack)).__doc__))
    if row["passes"] == "learned":
        assert isinstance(attack, Learned)
        return
    kind = row["norms"].split(",")[0]
    if kind in ("text", "bytes", "table"):
        if attack.needs != "gradients":
            assert row["passes"] == f"at most {attack.queries} + 0"
        return
    batch = open_data("mnist-mini", n=2).read(0, 2)
    limited = {"images": Corruptions(1), "L0": L0(1), "patch": Patch(1, 1), "spatial": Spatial(0.001, 0.001)}
    corner = torch.zeros(1, 28, 28)
    corner[:, -3:, -3:] = 1
    limited["trigger"] = Stamped("t.npz", trigger_text(Trigger(corner, corner)))
    limited["spatial"] = Spatial(flow=1e-6) if isinstance(attack, Flow) else limited["spatial"]
    smallest = limited.get(kind) or NORMS.get(kind, Linf)(1e-6)
    spared = max(
        0, vars(attack).get("queries", 0) - 500
    )  # each query is like the next, and 500 show what it spends
    if spared:
        attack = replace(attack, queries=500)
    threat = ThreatModel(smallest, surrogates=(open_model("mnist-cnn").model,))
    evidence = measure(open_model("mnist-cnn-hardened").model, [batch], [attack], threat)
    assert evidence["correct"].all()
    stated = tuple(map(int, re.findall(r"\d+", row["passes"])))
    cost = evidence.attacks[0].cost
    spent = (cost.forwards / len(batch) - 1 + spared, cost.backwards / len(batch))
    if row["passes"].startswith("at most"):
        assert spent <= stated
    else:
        assert spent == pytest.approx(stated, rel=0.002 if spared else 0.02)


@pytest.mark.parametrize("row", rows("concepts/suites.md", "suite"), ids=lambda row: row["suite"].strip("`"))
def test_a_suite_is_composed_as_its_row_states(row):
    for norm, constraint in NORMS.items():
        if row[norm] == "–":
            with pytest.raises(UsageError, match=norm.lower()):
                suite(row["suite"].strip("`"), constraint(1.0))
        else:
            chosen = suite(row["suite"].strip("`"), constraint(1.0))
            assert row[norm] == ", ".join(name for name, _ in chosen.attacks)


def test_every_suite_metric_doubt_command_and_bundled_model_is_documented():
    assert [row["suite"].strip("`") for row in rows("concepts/suites.md", "suite")] == list(SUITES)
    documented = text("concepts/metrics.md")
    missing = [
        name
        for name in METRICS
        if f"`{name}`" not in documented and f"`_{name.split('_')[-1]}`" not in documented
    ]
    assert not missing
    documented = {row["doubt"].strip("`"): row["is raised if"] for row in rows("concepts/doubts.md", "doubt")}
    modules = {name: import_module(f"holdfast.doubts.{name.replace('-', '_')}") for name in CATALOGUED_DOUBTS}
    described = {name: " ".join(module.__doc__.split()) for name, module in modules.items()}
    assert list(documented) == list(described)
    for name, condition in documented.items():
        assert described[name].startswith(f"The doubt `{name}` is raised if {condition}.")
    assert not [name for name in _COMMANDS if f"`holdfast {name}" not in text("reference/command-line.md")]
    assert not [name for name in bundled_models() if f"`{name}`" not in text("reference/bundled.md")]


def test_every_key_of_the_configuration_is_described_as_in_the_schema():
    documented = {
        row["key"].strip("`"): row["description"] for row in rows("reference/configuration.md", "key")
    }
    known = {
        key: entry.description
        for kind in (
            Adapt,
            Monitor,
            Serve,
            RotateSettings,
            Certify,
            Harden,
            Assess,
        )  # of several, the last
        for key, entry in kind.model_fields.items()
    }
    for key in CONSENT:
        del known[key]
    assert documented == known


def test_the_flags_of_the_configuration_page_exist():
    pages = (
        ROOT / "tests" / "cli" / "help" / f"{name}-all.txt"
        for name in ("harden", "assess", "certify", "rotate-run", "serve", "monitor", "adapt")
    )
    shown = "".join(page.read_text(encoding="utf-8") for page in pages)
    for row in rows("reference/configuration.md", "key"):
        for flag in re.findall(r"`(-[\w-]+)`", row["option"]):
            assert re.search(rf"(?<![\w-]){flag}\b", shown), flag


class Counting(torch.nn.Module):
    """Counts the examples that it and its copies are given."""

    asked = 0

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        Counting.asked += len(x)
        return self.net(x)


def test_every_recipe_has_a_row():
    assert sorted(row["recipe"].strip("`") for row in RECIPES) == sorted(CLASSES)


RECORDS = (
    "recipes",
    "certified-training",
    "partitions",
    "repair",
    "text-masking",
    "patch-masks",
    "distil-robust",
    "compression",
    "hybrid",
    "policy",
    "league",
    "generated",
)


def test_every_recipe_has_a_record():
    recorded = {row["recipe"] for name in RECORDS for row in newest(name)["table"] if row["recipe"]}
    private = {"dp-sgd"}  # its accuracy depends on the budget: it has a row of its own
    assert recorded | FOR_SMOOTHING | private == set(CLASSES)
    assert "DP-SGD, 400 canaries" in str(newest("privacy")["table"])
    assert not recorded & FOR_SMOOTHING
    smoothed = newest("smoothing")["config"]
    assert {f"{CLASSES[name].cls}(" in str(smoothed) for name in FOR_SMOOTHING} == {True}


@pytest.mark.parametrize("row, first", [("recipes", "trained by"), ("regularisers", "at a small eps")])
def test_the_page_has_the_recorded_numbers_of_recipes(row, first):
    columns = ("clean, %", "robust, %", "epochs", "doubts raised")
    recorded = newest(row)["table"]
    documented = {row[first].strip("`"): row for row in rows("reference/recipes.md", first)}
    assert {name: [row[column] for column in columns] for name, row in documented.items()} == {
        row["recipe"]: [str(row[column]) for column in columns] for row in recorded
    }
    assert {name: row["passes"] for name, row in documented.items()} == {
        row["recipe"]: f"{row['passes']:.1f}" for row in recorded
    }


def test_the_page_has_the_recorded_numbers_of_partitions():
    (recorded,) = newest("partitions")["table"]
    (documented,) = rows("concepts/training-set-certificates.md", "members")
    assert documented == {
        name: f"{value:g}" if isinstance(value, float) else str(value)
        for name, value in recorded.items()
        if name != "recipe"
    }


def test_the_page_has_the_recorded_numbers_of_repair():
    columns = {
        "before": "before",
        "after": "after",
        "clean loss": "clean, lost points",
        "after 50 updates": "after 50 updates",
        "control after 50": "control after 50",
    }
    assert rows("concepts/repair.md", "drill") == [
        {
            "drill": row["drill"],
            "recipe": f"`{row['recipe']}`",
            **{title: f"{100 * row[name]:.1f}" for name, title in columns.items()},
            "outcome": row["outcome"],
        }
        for row in newest("repair")["table"]
    ]


def test_the_page_has_the_recorded_numbers_of_learned_strategies():
    assert rows("concepts/hardening.md", "strategy") == [
        {
            "strategy": row["strategy"],
            **{name: str(row.get(name, "")) for name in ("robust, %", "passes", "CPU s", "updates", "steps")},
            "clean, %": str(row["clean"]),
            "learned − this, points": row.get("learned − this, points", ""),
        }
        for row in newest("policy")["table"]
    ]
    (found,) = (kept["measured"] for kept in newest("league")["detail"].values())
    assert rows("concepts/hardening.md", "network") == [
        {
            "network": name,
            **{column: f"{100 * share:.1f}" for column, share in zip(found["columns"], shares, strict=True)},
        }
        for name, shares in found["cross_play"].items()
    ]


def test_the_page_has_the_recorded_numbers_of_certified_training():
    documented = rows("concepts/certified-training.md", "recipe")
    assert documented == [
        {
            "recipe": f"`{row['recipe']}`",
            "epochs": str(row["epochs"]),
            "CPU s": str(row["training, CPU s"]),
            **{
                name: f"{row[f'{source}, %']:.2f}"
                for name, source in {
                    "clean, %": "clean",
                    "by intervals, %": "ibp",
                    "by CROWN, %": "crown",
                    "by branch and bound, %": "certified",
                    "broken, %": "broken",
                }.items()
            },
            "undecided": str(row["undecided"]),
        }
        for row in newest("certified-training")["table"]
    ]


def test_the_page_has_the_tables_for_the_published_ones():
    documented = rows("concepts/hardening.md", "model")
    assert documented == [
        {
            "model": row["model"],
            "recipe": f"`{row['recipe']}`",
            "clean, %": f"{row['clean accuracy, %']:.1f}",
            "adversarial, %": f"{row['adversarial accuracy, %']:.1f}",
            "of single seeds": row["of single seeds"],
            "success rate, %": f"{row['success rate, %']:.1f}",
            "smallest L2": f"{row['median smallest L2']:.2f}",
            "smallest Linf": f"{row['median smallest Linf']:.3f}",
            "doubts": str(row["doubts raised"]),
        }
        for row in newest("seed-tables")["table"]
        if row.get("table", "1–3") == "1–3"
    ]


def test_the_page_has_the_recorded_numbers_of_generated_images():
    assert rows("concepts/hardening.md", "requested") == [
        {
            **{name: f"`{row[name]}`" for name in ("requested", "recipe", "suite")},
            **{name: row[name] for name in ("clean, %", "robust, %")},
            "epochs": f"{row['epochs']:.1f}",
            "CPU s": f"{row['planning s'] + row['CPU s']:.0f}",
            "generated − auto, points": row.get("generated − auto, points", ""),
        }
        for row in newest("generated")["table"]
    ]


def test_the_page_has_the_recorded_numbers_of_the_tables_4_and_5():
    recorded = [row for row in newest("seed-tables")["table"] if row.get("table") in ("4", "5")]
    titles = {
        "clean, %": "clean accuracy, %",
        "adversarial, %": "adversarial accuracy, %",
        "clean error, %": "clean error, %",
        "adversarial error, %": "adversarial error, %",
    }
    assert rows("concepts/hardening.md", "table") == [
        {
            **{name: row[name] for name in ("table", "threat", "model")},
            "recipe": f"`{row['recipe']}`",
            **{title: f"{row[name]:.1f}" for title, name in titles.items()},
        }
        for row in recorded
    ]


def test_the_page_has_the_recorded_numbers_of_distillation():
    assert rows("concepts/hardening.md", "distilled or trained by") == [
        {
            "distilled or trained by": f"`{row['recipe']}`",
            "epochs": f"{row['epochs']:.1f}",
            **{name: row.get(name, "") for name in ("clean, %", "robust, %", "points more")},
        }
        for row in newest("distil-robust")["table"]
    ]


def test_the_page_has_the_recorded_numbers_of_compression():
    columns = ("clean, %", "robust, %", "points lost", "PGD through, %", "transferred, %", "naive, %")
    assert rows("concepts/hardening.md", "compressed network") == [
        {
            "compressed network": row["network"],
            "bytes": f"{row['bytes']:,}" if "bytes" in row else "",
            **{name: row.get(name, "") for name in columns},
        }
        for row in newest("compression")["table"]
    ]


def test_every_picture_is_of_the_newest_record():
    shown = {
        path.parent / name
        for path in DOCS.rglob("*.md")
        for name in re.findall(r"!\[[^\]]+\]\(([^)]+\.svg)\)", path.read_text(encoding="utf-8"))
    }
    assert shown == set(DOCS.rglob("*.svg"))
    for picture in shown:
        source = re.search(r"python -m benchmarks --only (\S+), (\S+)</dc:description>", picture.read_text())
        assert source[2] == newest(source[1])["made"], picture.name


@pytest.mark.parametrize("row", RECIPES, ids=lambda row: row["recipe"].strip("`"))
def test_a_recipe_costs_and_cites_what_its_row_states(row, monkeypatch):
    name = row["recipe"].strip("`")
    recipe = build_recipe({"use": name, **({"others": "l2:1"} if name == "multi-norm" else {})})
    assert row["class"].strip("`") == type(recipe).__name__
    cited = re.findall(r"arxiv\.org/abs/(\d{4}\.\d{4,5})", row["source"])
    assert set(cited) <= set(re.findall(r"arXiv:(\d{4}\.\d{4,5})", inspect.getmodule(type(recipe)).__doc__))
    if name == "masked-words":
        pytest.skip("its inputs are texts")
    if name == "rslad":
        recipe = recipe.taught_by(fakes.network(5))
    data = fakes.labelled(fakes.network(), fakes.examples(n=24))
    surrogates = (Classifier(Counting(fakes.network(5).net)),)

    def asked(epochs, eps=0.05):
        threat = replace(threat_for(recipe, eps), surrogates=surrogates)
        guarded = {"guard": False} if hasattr(recipe, "guard") else {}
        how = Training(epochs=epochs, batch=8, trial=name == "generated")  # too short for a generator
        short = replace(recipe, training=how, **guarded)
        Counting.asked = 0
        model = Classifier(Counting(fakes.network().net)).requires_grad_()
        if name == "denoised":
            model.net = with_denoiser(model.net, {"channels": 3, "width": 4, "depth": 2})
        counted = sum(point.measured["forwards"] for point in short(model, data, threat, rng=Draws(0)))
        # which ask other networks, too, reserve examples or measure ranges first
        if name not in {"augment-policy", "denoised", "ensemble", "hat", "int8", "league", "tune"}:
            # a look at one example before, and at four by dp-sgd
            assert counted * len(data) == pytest.approx(Counting.asked, abs=4 if name == "dp-sgd" else 1)
        return Counting.asked

    forwards = (asked(3) - asked(1)) / (2 * len(data))
    if row["forwards"].startswith("at most "):
        assert 1 < forwards <= int(row["forwards"].removeprefix("at most "))
        assert all(asked(1, eps) >= asked(1) for eps in (0.0, 0.05 / 1000))
    elif row["forwards"].startswith("about "):  # batches are random samples
        assert forwards == pytest.approx(int(row["forwards"].removeprefix("about ")), abs=0.3)
    else:
        assert forwards == int(row["forwards"])
        assert asked(1, 0.0) == asked(1, 0.05 / 1000) == asked(1)  # by which a budget is planned


def test_the_page_has_the_recorded_numbers_of_smoothing():
    recorded = [{**row, "radius": row["eps"]} for row in newest("smoothing")["table"]]
    for first in ("eps", "radius", "network"):
        documented = rows("concepts/smoothing.md", first)
        expected = [row for row in recorded if (first == "network") == ("by Cohen's" not in row)]
        assert [{name: re.sub(r",(?=\d)", "", cell) for name, cell in row.items()} for row in documented] == [
            {name: str(row[name]) for name in documented[0]} for row in expected
        ]


def test_the_page_has_the_recorded_numbers_of_rotating():
    documented = rows("concepts/rotation-measurements.md", "construction")
    assert documented == [
        {
            "construction": row["construction"],
            "clean, %": f"{row['clean, %']:.1f}",
            **{name: f"{row[name]:.3f}" for name in ("A0", "A1", "A2", "A3", "white box")},
            "admitted, %": f"{row['let in, %']:.0f}" if "let in, %" in row else "",
        }
        for row in newest("rotation")["table"]
    ]


@pytest.mark.parametrize(
    ("row", "of_sets", "of_lines"),
    [
        ("rotation-unguarded", "without a guard", "line, without a guard"),
        ("rotation-robust", "hardened", "line"),
        ("rotation-cifar", "small residual network", "line on CIFAR-10"),
    ],
)
def test_the_page_has_the_recorded_numbers_of_rotating_hardened_sets(row, of_sets, of_lines):
    table = newest(row)["table"]
    sets, lines = ([row for row in table if ("A2" not in row) is line] for line in (False, True))
    assert rows("concepts/rotation-measurements.md", of_sets) == [
        {
            of_sets: row["what"],
            "clean, %": f"{row['clean, %']:.1f}",
            **{name: f"{row[name]:.3f}" for name in ("A0", "A1", "A2", "A3", "white box")},
        }
        for row in sets
    ]
    assert rows("concepts/rotation-measurements.md", of_lines) == [
        {
            of_lines: row["what"],
            "clean, %": f"{row['clean, %']:.1f}",
            "points lost": f"{row['points lost']:.2f}",
            **{name: f"{row[name]:.3f}" for name in ("A1", "white box", "on the margin")},
            "passes": f"{row['passes']:,.0f}",
        }
        for row in lines
    ]


def test_the_page_has_the_recorded_numbers_of_new_basins():
    columns = {  # of the page: that of the record, and its decimal places
        "admitted, %": ("let in, %", 0),
        "from the best": ("from the best", 3),
        "lost halfway": ("lost halfway", 1),
        "s per set": ("s for a set", 2),
    }
    assert rows("concepts/rotation-measurements.md", "attempt") == [
        {
            "attempt": row["attempt"],
            **{
                column: f"{round(row[name], digits) + 0.0:.{digits}f}" if name in row else ""
                for column, (name, digits) in columns.items()
            },
        }
        for row in newest("new-basins")["table"]
    ]


def test_every_setting_of_a_training_is_documented():
    documented = {
        row["setting"].strip("`"): row["default"] for row in rows("reference/recipes.md", "setting")
    }
    assert documented == {field.name: str(field.default) for field in written_fields(Training)}


@pytest.mark.parametrize(
    ("page", "n_steps", "n_places"), [("architecture", 30, 6), ("design", 0, 6), ("style", 0, 2)]
)
def test_the_functions_that_a_page_names_exist(page, n_steps, n_places):
    content = text(f"{page}.md")
    steps = re.findall(r"^\| \d+ \| `([^`]+)` \| `([^`]+)` \|", content, re.MULTILINE)
    places = re.findall(r"`([a-z/_]+\.py)`\s\(`([A-Za-z_.]+)`\)", content)
    assert len(steps) >= n_steps and len(places) >= n_places
    for file, name in (*steps, *places):
        module = import_module("holdfast." + file.removesuffix(".py").replace("/", "."))
        assert attrgetter(name)(module), f"{file}: {name}"


def unindented(content):
    return "\n".join(line.strip() for line in content.splitlines())


def test_the_excerpts_of_the_style_page_are_in_the_code():
    blocks = re.findall(r"```python([^\n]*)\n(.*?)```", text("style.md"), re.DOTALL)
    assert len(blocks) > 5
    for info, excerpt in blocks:
        source = re.fullmatch(r' title="(.+)"', info)[1]
        assert unindented(excerpt) in unindented((ROOT / source).read_text(encoding="utf-8")), excerpt


def test_the_design_names_the_packages_that_do_not_exist_yet():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (floors,) = (each for each in project["tool"]["importlinter"]["contracts"] if each["id"] == "floors")
    packages = set(re.findall(r"\w+", " ".join(floors["layers"]))) - {"__main__"}
    planned = text("design.md").partition("## Planned verbs")[2]
    source = ROOT / "src/holdfast"
    absent = {
        name for name in packages if not (source / name).is_dir() and not (source / f"{name}.py").is_file()
    }
    assert absent == {name for name in packages if f"`{name}`" in planned}


def test_the_page_of_the_python_interface_has_a_row_for_each_audit():
    row = r"^\| `holdfast\.audit\.(\w+)` \| `holdfast\.(\w+)` \|"
    rows = re.findall(row, text("reference/python.md"), re.MULTILINE)
    assert dict(rows) == {name: kind.__name__ for name, kind in audits().items()}


def test_the_files_and_names_of_contributing_exist():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    path = r"`([\w.]+(?:/[\w.]+)*(?:/|\.(?:py|md|json|toml|txt|yml|png)))`"

    def place(name):
        return next((root / name for root in (ROOT, ROOT / "src/holdfast") if (root / name).exists()), None)

    files = {name for name in re.findall(path, page) if "NAME" not in name} - {"run.json"}  # of a run folder
    assert len(files) > 60
    assert all(map(place, files)), [name for name in files if place(name) is None]
    for row in re.findall(r"^\| (`.+) \|$", page, re.MULTILINE):
        places = filter(None, map(place, re.findall(path, row)))
        code = "".join(each.read_text(encoding="utf-8") for each in places if each.suffix == ".py")
        for name in re.findall(r"`(_?[A-Z]{2}[A-Z_]*|_\w+)`", row.partition(" | ")[2]):
            assert not code or name in code, row
