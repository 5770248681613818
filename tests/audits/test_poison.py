"""The audit of training data: scores, rules for examples, the comparison of a set, and what is refused."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import holdfast
from benchmarks.forging import accepted_fields
from holdfast.audits.finding import StoredSteps, penultimate
from holdfast.audits.poison import finding_of, images_of, suspects_of
from holdfast.audits.poison_steps import (
    LEVEL,
    METHODS,
    Examples,
    LabelScores,
    PoisonRequest,
    Scored,
    _judged,
    compared,
    feature_scores,
    label_scores,
    measure,
    refuse_unscorable,
    scored,
    with_trusted,
)
from holdfast.cli.app import run as command
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Classifier
from holdfast.runs.engine.progress import ignore
from holdfast.runs.engine.run import MemoryStore, Run
from holdfast.verbs.audit.opening_models import training
from holdfast.verbs.poison import Flip, poisoned

SIDE, CLASSES, TARGET = 8, 4, 2
NET = """
from torch import nn

def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
"""


def digits(n, seed=0):
    """Images with a bright quarter, which is their class, in noise."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % CLASSES
    x = 0.5 * torch.rand(n, 1, SIDE, SIDE, generator=rng)
    for row, label in enumerate(y.tolist()):
        x[row, 0, 3 * (label // 2) : 3 * (label // 2) + 3, 3 * (label % 2) : 3 * (label % 2) + 3] += 0.5
    return x, y


def stamped(x, y, n):
    """Stamp a corner of the first `n` examples of other classes, and give them the label of the target."""
    x, y = x.clone(), y.clone()
    rows = (y != TARGET).nonzero()[:n, 0]
    x[rows, :, 6:, 6:] = 1.0
    y[rows] = TARGET
    return x, y, rows


def flipped(x, y, n):
    """Give the first `n` examples the next class."""
    y = y.clone()
    y[:n] = (y[:n] + 1) % CLASSES
    return x, y, torch.arange(n)


def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 32), nn.ReLU(), nn.Linear(32, CLASSES))


def batch_of(x, y):
    return Batch(x, y, torch.arange(len(x)))


def audited(x, y, clean=None):
    """Return the scores of a set, its finding, and its images."""
    batch = batch_of(x, y)
    request = PoisonRequest(batch, 0) if clean is None else with_trusted(batch, batch_of(*clean))
    model = Classifier(make(), classes=CLASSES)
    run = Run(request.steps(), MemoryStore())
    measure(run, request, training(model), ignore)
    result = scored(StoredSteps({"seed": 0}, run.store))
    return result, finding_of(result), images_of(request.batch, result, model.bounds)


@pytest.fixture(scope="module")
def data():
    return digits(600)


@pytest.fixture(scope="module")
def trusted():
    return digits(200, seed=1)


@pytest.mark.slow
def test_a_set_with_a_trigger_is_flagged_in_its_class(data, trusted):
    x, y, rows = stamped(*data, 60)
    result, finding, images = audited(x, y, trusted)
    assert finding.verdict == "flagged" and not finding.facts["label_errors_only"]
    assert TARGET in {test.label for test in result.comparison.flagged}
    suspects = suspects_of(result).rows
    assert len({*suspects[:60]} & {*rows.tolist()}) >= 50
    assert images["suspects"].shape == (len(finding.pictures[0].captions), 1, SIDE, SIDE)


@pytest.mark.slow
def test_a_set_with_wrong_labels_is_flagged_as_label_errors(data, trusted):
    x, y, rows = flipped(*data, 90)
    result, finding, _ = audited(x, y, trusted)
    assert finding.verdict == "flagged" and finding.facts["label_errors_only"]
    assert finding.facts["found"] == finding.facts["ordered_by"] == "labels" in finding.headline
    found = {*result.flags["labels"][:600].nonzero()[:, 0].tolist()}
    assert len(found & {*rows.tolist()}) >= 80 and len(found) <= 100


@pytest.mark.slow
def test_a_clean_set_is_not_flagged(data, trusted):
    finding = audited(*data, trusted)[1]
    assert finding.verdict == "not flagged"
    assert any("ordered" in reason for reason in finding.reasons) == (finding.facts["suspects"] > 0)
    assert "below" in finding.headline and "is not seen with these trusted examples" in finding.headline


@pytest.mark.slow
def test_label_noise_in_digits_is_found_as_such_and_ordered_by_labels():
    """Digits of which some are like those of other classes, so that their features and labels are unusual as well."""
    mnist = np.load(Path(holdfast.__file__).parent / "bundled" / "mnist-mini.npz")
    x = torch.from_numpy(np.concatenate((mnist["x_train"], mnist["x_test"]))).float().flatten(1) / 255
    y = torch.from_numpy(np.concatenate((mnist["y_train"], mnist["y_test"]))).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    n = len(x) * 2 // 3
    plan = poisoned(x[:n], y[:n], Flip(), rate=0.05, target=None, seed=0)
    batch, clean = batch_of(x[:n], plan.y), batch_of(x[n:], y[n:])
    request = with_trusted(batch, clean)
    run = Run(request.steps(), MemoryStore())
    net = nn.Sequential(nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, 10))
    measure(run, request, training(Classifier(net, classes=10)), ignore)
    result = scored(StoredSteps({"seed": 0}, run.store))
    finding, suspects = finding_of(result), suspects_of(result)
    assert finding.facts["found"] == "labels" and finding.facts["label_errors_only"]
    assert "unlike" not in finding.headline
    wrong = {*plan.indices.tolist()}
    by_column = sorted(suspects.rows, key=lambda row: -float(result.scores["labels"][row]))
    first, best = (len(wrong & {*rows[: len(wrong)]}) / len(wrong) for rows in (suspects.rows, by_column))
    assert first >= best > 0.7


def made_up(n=400, *, wrong=(), unlike=(), wrong_and_unusual=()):
    """Scores of two classes, in which some labels are contradicted, and some features of class 1 are unusual."""
    rng = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 2
    scores = {name: torch.rand(n, generator=rng, dtype=torch.float64) for name in METHODS}
    flags = {name: torch.zeros(n, dtype=torch.bool) for name in METHODS}
    predicted = y.clone()
    for rows, names in (
        (wrong, ("labels",)),
        (unlike, ("energy",)),
        (wrong_and_unusual, ("labels", "energy")),
    ):
        for name in names:
            scores[name][list(rows)] += 2 + (name == "labels" and names == ("labels",))
            flags[name][list(rows)] = True
        if "labels" in names:
            predicted[list(rows)] = 1 - y[list(rows)]
    zeros = torch.zeros(n, dtype=torch.float64)
    return Scored(Examples(torch.arange(n), y, 0), scores, flags, predicted, zeros, zeros, None)


@pytest.mark.parametrize("contradicted", [True, False])
def test_unusual_features_are_evidence_unless_wrong_labels_explain_them(contradicted):
    n, manipulated = 1000, 100
    y = torch.arange(n) % 2
    unlike = (torch.arange(n) < 2 * manipulated) & (y == 1)
    predicted = torch.where(unlike & contradicted, 1 - y, y)
    zeros, none = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.bool)
    columns = dict.fromkeys(("loss", "clustering", "share", "silhouette"), zeros)
    columns |= {"energy": unlike.double(), "unusual": unlike.long(), "clustered": none.long()}
    labels = LabelScores(predicted=predicted, loss=zeros, suspect=none)
    result = _judged(Examples(torch.arange(n), y, 200), labels, columns, Draws(0))
    finding, kind = finding_of(result), "labels" if contradicted else "features"
    assert finding.verdict == "flagged"
    assert (finding.facts["found"], finding.facts["ordered_by"]) == (kind, kind)
    assert ("unlike" in finding.headline, "labels" in finding.headline) == (not contradicted, contradicted)
    suspects = suspects_of(result)
    assert len(suspects.rows) == manipulated and {*suspects.reasons} == {kind}


def test_without_evidence_for_features_suspects_are_ordered_by_their_labels():
    wrong, both = range(0, 60, 2), range(100, 160, 2)
    suspects = suspects_of(made_up(wrong=wrong, wrong_and_unusual=both))
    assert suspects.order == "labels" and {*suspects.reasons} == {"labels"}
    assert {*suspects.rows[:30]} == {*wrong} and {*suspects.rows[30:]} == {*both}


def test_no_order_is_stated_without_suspects():
    assert not any("ordered" in reason for reason in finding_of(made_up()).reasons)


def test_unusual_features_of_examples_with_predicted_labels_come_first():
    wrong, unlike = range(0, 60, 2), range(101, 121, 2)
    result = made_up(wrong=wrong, unlike=unlike)
    suspects = suspects_of(result)
    assert (suspects.order, suspects.evident) == ("both", (1,))
    assert {*suspects.rows[:10]} == {*unlike} and {*suspects.reasons[:10]} == {"features"}
    assert {*suspects.reasons[10:]} == {"labels"}
    reasons = finding_of(result).reasons
    assert any("features and labels" in reason and "no test supports" in reason for reason in reasons)
    assert any("no share of manipulated examples is detected" in reason for reason in reasons)


def test_unusual_features_that_classes_or_trusted_examples_have_by_nature_are_no_evidence():
    several = suspects_of(made_up(wrong=range(0, 60, 2), unlike=range(100, 120)))
    assert (several.order, several.evident) == ("labels", ())
    for n_natural, evident in ((0, (1,)), (10, ())):
        result = made_up(unlike=[*range(101, 121, 2), *range(301, 301 + 2 * n_natural, 2)])
        examples = replace(result.examples, n_trusted=100)
        assert suspects_of(replace(result, examples=examples)).evident == evident


@pytest.mark.parametrize("n_trusted", [40, 100, 300])
def test_the_detectable_number_is_the_smallest_that_is_flagged(n_trusted):
    """Manipulated examples have the largest scores, and trusted ones are spread evenly over the others."""

    def flagged(n_manipulated):
        n = 1000 + n_trusted
        trusted = torch.zeros(n, dtype=torch.bool)
        places = torch.arange(n_trusted) * (n - n_manipulated) // n_trusted
        trusted[n_manipulated + places + (n - n_manipulated) // n_trusted // 2] = True
        scores = {"energy": torch.arange(n).flip(0).double()}
        compares = {"energy": torch.ones(n, dtype=torch.bool)}
        y, ids = torch.zeros(n, dtype=torch.int64), torch.arange(n)
        return compared(scores, compares, y, trusted, ids=ids, rng=Draws(0))

    smallest = flagged(0).tests[0].detectable
    assert flagged(0).detectable[0] == flagged(0).detectable[None] == smallest / 1000
    least = next(m for m in range(1000) if flagged(m).flagged)
    assert 0.75 * smallest <= least <= smallest + 1


def test_too_few_trusted_examples_leave_the_set_unclear():
    result, finding, _ = audited(*digits(100), digits(8, seed=1))
    assert finding.verdict == "unclear" and not result.comparison.enough
    shares = result.comparison.detectable
    assert {share for label, share in shares.items() if label is not None} == {1.0} and shares[None] > 0.2
    assert any("No share of these classes is seen" in reason for reason in finding.reasons)


def test_the_level_holds_for_scores_that_do_not_depend_on_trust():
    rng = torch.Generator().manual_seed(0)
    y, ids = torch.arange(400) % 4, torch.arange(400)
    flagged, draws = 0, 60
    for draw in range(draws):
        scores = {name: torch.randint(50, (400,), generator=rng).double() for name in METHODS}
        trusted = torch.rand(400, generator=rng) < 0.3
        compares = dict.fromkeys(METHODS, torch.ones(400, dtype=torch.bool))
        flagged += bool(compared(scores, compares, y, trusted, ids=ids, rng=Draws(draw)).flagged)
    assert flagged <= max(2, 3 * LEVEL * draws)


def test_the_p_value_is_that_of_the_hypergeometric_distribution():
    score = torch.arange(100.0).flip(0)
    trusted = torch.arange(100) >= 50
    result = compared(
        {"energy": score},
        {"energy": torch.ones(100, dtype=torch.bool)},
        torch.zeros(100, dtype=torch.int64),
        trusted,
        ids=torch.arange(100),
        rng=Draws(0),
    )
    test, together = result.tests
    assert (together.label, together.p) == (None, test.p)
    assert (test.examined, test.trusted, test.expected, test.excess) == (50, 0, 25.0, 50)
    assert test.p == pytest.approx(14 / 1.0089134454556415e29, rel=1e-6)  # 7 shares, 2 tests, 100 choose 50


def test_a_set_with_some_trusted_examples_among_the_largest_scores_is_not_flagged():
    trusted = (torch.arange(4000) % 10) < torch.where(torch.arange(4000) < 2000, 3, 7)
    result = compared(
        {"energy": torch.arange(4000.0).flip(0)},
        {"energy": torch.ones(4000, dtype=torch.bool)},
        torch.zeros(4000, dtype=torch.int64),
        trusted,
        ids=torch.arange(4000),
        rng=Draws(0),
    )
    assert not result.flagged and 0.01 < result.detectable[0] < 0.02 and result.enough


def test_energy_and_clusters_find_a_shifted_group_of_features():
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(200, 30, generator=rng).double()
    features[:20, 0] += 20
    result = feature_scores(features, torch.ones(200, dtype=torch.bool))
    assert result.clustered.nonzero()[:, 0].tolist() == list(range(20))
    assert float(result.energy[:20].min()) > float(result.energy[20:].max())
    assert bool(result.unusual[:20].all()) and result.share == pytest.approx(0.1)
    none = feature_scores(features, torch.zeros(200, dtype=torch.bool))
    assert not none.unusual.any() and not none.energy.any()


@pytest.mark.parametrize("width", [60, 20])
def test_the_energy_is_that_of_the_top_singular_directions(width):
    features = torch.randn(40, width, generator=torch.Generator().manual_seed(0)).double()
    centred = features - features.mean(0)
    exact = (centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:10].T).square().sum(1)
    assert torch.allclose(feature_scores(features, torch.ones(40, dtype=torch.bool)).energy, exact)


def test_confident_learning_finds_labels_that_other_networks_contradict():
    y = torch.tensor([0] * 10 + [1] * 10)
    logits = torch.zeros(20, 3, dtype=torch.float64)
    logits[torch.arange(20), y] = 4.0
    logits[0] = torch.tensor([0.0, 4.0, 0.0])
    result = label_scores(logits, y)
    assert result.suspect.nonzero()[:, 0].tolist() == [0] and int(result.loss.argmax()) == 0


def test_penultimate_features_are_the_inputs_of_the_last_linear_layer(data):
    net = make()
    features, logits = penultimate(Classifier(net), data[0][:5])
    with torch.no_grad():
        assert torch.allclose(features.float(), net[:-1](data[0][:5]))
        assert torch.allclose(logits.float(), net(data[0][:5]))
    images = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Conv2d(3, 4, 6), nn.Flatten())
    assert penultimate(Classifier(images), data[0][:5])[0].shape == (5, 3)


def test_the_scores_are_a_function_of_the_seed(data):
    first, second = (audited(data[0][:60], data[1][:60])[0] for _ in range(2))
    assert all(torch.equal(first.scores[name], second.scores[name]) for name in METHODS)


def test_audited_examples_that_are_trusted_are_left_out(data):
    request = with_trusted(batch_of(*data), batch_of(data[0][10:50], data[1][10:50]))
    assert (request.n, request.n_trusted) == (560, 40)
    assert len({*request.batch.ids.tolist()}) == 600
    assert request.batch.ids[:12].tolist() == [*range(10), 50, 51]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x, torch.zeros_like(y)), "all 40 examples have the label 0"),
        (lambda x, y: (x, torch.arange(40)), "each of the 40 examples has a label of its own"),
    ],
)
def test_labels_that_form_no_classes_are_refused(change, message):
    with pytest.raises(UsageError, match=message):
        refuse_unscorable(batch_of(*change(*digits(40))))


def test_trusted_examples_of_other_classes_or_shapes_are_refused(data):
    x, y = digits(40)
    with pytest.raises(UsageError, match=r"only one of them has examples of 3;"):
        with_trusted(batch_of(*data), batch_of(x[y < 3], y[y < 3]))
    with pytest.raises(UsageError, match=r"shape \(1, 4, 8\)"):
        with_trusted(batch_of(*data), batch_of(x[:, :, :4], y))
    with pytest.raises(UsageError, match="nothing to audit"):
        with_trusted(batch_of(x, y), batch_of(x, y))


@pytest.mark.slow
def test_the_command_writes_suspects_and_judges_the_gate(data, trusted, tmp_path, capsys):
    x, y, rows = stamped(*data, 60)
    np.savez(tmp_path / "train.npz", x_train=x, y_train=y, x_test=trusted[0], y_test=trusted[1])
    np.savez(tmp_path / "clean.npz", x=trusted[0], y=trusted[1])
    (tmp_path / "net.py").write_text(NET)
    base = [
        "audit",
        "poison",
        str(tmp_path / "train.npz"),
        "--model",
        f"{tmp_path / 'net.py'}:make",
        "--trust-code",
    ]
    reports = ["-o", str(tmp_path / "report.html"), "-o", str(tmp_path / "report.json")]
    run, suspects = str(tmp_path / "run"), tmp_path / "suspects.csv"
    clean = ["--clean", str(tmp_path / "clean.npz"), "--suspects", str(suspects), "--run", run]
    assert command([*base, *clean, "-g", "no-poison", *reports]) == 1
    assert "Flagged: examples of class 2" in capsys.readouterr().err
    with suspects.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len({int(line["index"]) for line in lines[:60]} & {*rows.tolist()}) >= 50
    page = json.loads((tmp_path / "report.json").read_text())["tables"][1]
    assert [*lines[0]] == page["headings"] and len(page["rows"]) == 20
    words = ("index", "class", "predicted", "reason", "flagged by")
    columns = [page["headings"].index(word) for word in words]
    for line, row in zip(lines, page["rows"], strict=False):
        assert [line[word] for word in words] == [str(row[column]) for column in columns]
    assert (
        lines[0]["class"] == str(TARGET)
        and lines[0]["reason"] in {"features", "both"}
        and "clustering" in lines[0]["flagged by"].split(", ")
    )
    assert "data:image/png" in (tmp_path / "report.html").read_text()
    suspects.unlink()
    other = tmp_path / "other.csv"  # a finished audit writes the file of a resumed command
    assert command([*base, *clean[:2], "--suspects", str(other), "--run", run, "--resume"]) == 0
    assert len(other.read_text().splitlines()) == len(lines) + 1 and not suspects.exists()
    assert command(["verify", run]) == 0
    assert not accepted_fields(tmp_path / "run", 6, tmp_path / "copy")
    capsys.readouterr()
    assert command([*base, "-o", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "unclear"


def test_rows_of_a_table_are_listed_without_pictures():
    x, y, _ = flipped(*digits(100), 10)
    result = holdfast.audit.poison((x.flatten(1), y), nn.Sequential(*make()[1:]))
    assert result.verdict == "unclear" and not result.content["pictures"]
    assert result.content["tables"][1]["headings"][:3] == ["index", "class", "predicted"]
