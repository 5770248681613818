"""The audit of a generator: its measures beside closed forms and torchmetrics, copies, a collapse, and errors."""

import json
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import holdfast
from benchmarks.forging import accepted_fields
from holdfast.audits.audit import open_audit
from holdfast.audits.generator.copies import copies, frechet_distance, kernel_distance, label_entropy, quality
from holdfast.cli.app import run as command
from holdfast.core.errors import TargetError, UsageError


def points(n, seed, classes=4, features=16):
    """Points of several classes around their centres, with labels, as values from 0 to 1."""
    centres = torch.rand(classes, features, generator=torch.Generator().manual_seed(9))
    random = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=random)
    noise = 0.06 * torch.randn(n, features, generator=random)
    return (0.2 + 0.6 * centres[y] + noise).clamp(0, 1), y


TRAIN, HELD_OUT = points(600, 0), points(400, 1)


class Points:
    """Generator of new points, of training examples, or of few points."""

    def __init__(self, kind="new"):
        self.kind = kind

    def sample(self, n, seed):
        if self.kind == "copies":
            return TRAIN[0][torch.randperm(600, generator=torch.Generator().manual_seed(seed))[:n]]
        if self.kind == "four":
            return torch.cat((TRAIN[0][[7, 3, 3, 9]], points(n - 4, 100 + seed % 1000)[0]))
        if self.kind == "few":
            return points(10, 50)[0].repeat(n // 10 + 1, 1)[:n]
        return points(n, 100 + seed)[0]


def audited(generator, **settings):
    usual = {"held_out": HELD_OUT, "samples": 400, "device": "cpu"}
    return holdfast.audit.generator(generator, TRAIN, **{**usual, **settings})


def test_the_frechet_distance_of_normal_distributions_is_that_of_the_closed_form():
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(200_000, 4, generator=random), 1 + 2 * torch.randn(200_000, 4, generator=random)
    assert frechet_distance(a, b) == pytest.approx(8.0, abs=0.1)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)


def test_frechet_distance_and_kid_are_those_of_torchmetrics():
    fids = pytest.importorskip("torchmetrics.image.fid", reason="torchmetrics is not installed")
    kids = pytest.importorskip("torchmetrics.image.kid", reason="torchmetrics is not installed")

    class Features(nn.Module):
        num_features = 8

        def forward(self, x):
            return x.flatten(1)

    random = torch.Generator().manual_seed(0)
    a = torch.randn(300, 8, 1, 1, generator=random)
    b = 0.3 + 1.2 * torch.randn(200, 8, 1, 1, generator=random)
    fid = fids.FrechetInceptionDistance(feature=Features()).set_dtype(torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the memory of the features
        kid = kids.KernelInceptionDistance(feature=Features(), subsets=1, subset_size=200)
    for metric in (fid, kid):
        metric.update(a[:200] if metric is kid else a, real=True)
        metric.update(b, real=False)
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    assert frechet_distance(flat_b, flat_a) == pytest.approx(float(fid.compute()), rel=1e-3)
    assert kernel_distance(flat_b, flat_a[:200]) == pytest.approx(float(kid.compute()[0]), rel=1e-3)


def test_repeated_samples_are_precise_and_cover_nothing():
    reference, few = points(500, 0)[0], points(20, 1)[0].repeat(25, 1)
    measures = quality(few, reference)
    assert measures.precision.value > 0.5
    assert measures.recall.value <= 0.01
    whole = quality(points(500, 2)[0], reference)
    assert whole.frechet.value < measures.frechet.value
    assert whole.recall.value > 0.7
    assert whole.frechet.low < whole.frechet.value < whole.frechet.high


def test_the_entropy_of_classes_is_1_if_they_are_equally_frequent():
    assert label_entropy(torch.full((4,), 10)) == pytest.approx(1)
    assert label_entropy(torch.tensor([40, 0, 0, 0])) == pytest.approx(0)


def test_copies_are_counted_and_named():
    training, held_out = TRAIN[0], HELD_OUT[0]
    found = copies(torch.cat((training[5:10] + 1e-4, points(5, 3)[0])), training, held_out)
    assert found.nearest[:5].tolist() == [5, 6, 7, 8, 9]
    assert (found.rate.value, found.near.value) == (0, 0.5)
    assert found.near_held_out.value < 0.05


@pytest.mark.parametrize(
    "gate", ["not-flagged", "frechet <= 50", "copy_rate <= 0.01", "near_copy_rate <= 0.05"]
)
def test_a_gate_on_the_verdict_or_on_copies_and_quality_is_judged_for_every_generator(gate):
    result = audited(Points("new"), gates=[gate], latent=0)
    assert result.verdict == "not flagged" and result.exit_code == 0


def test_few_copies_are_listed_and_flag_a_generator_although_it_has_no_more_near_copies(tmp_path):
    result = audited(Points("four"), gates=["copy_rate <= 0.001"], run=tmp_path / "run")
    copied, facts = result.metrics["copy_rate"], result.facts
    assert result.verdict == "flagged" and result.exit_code == 1
    assert copied.value == facts["copies"] / 400 == 0.01 and copied.low < 0.01 < copied.high < 0.03
    assert facts["held_out_copy_rate"] == 0 and facts["rows_repeat"] is False
    assert facts["near_copy_rate"] < 0.03 and facts["held_out_near_copy_rate"] < 0.03
    tables = {table["title"]: table for table in result.content["tables"]}
    assert tables["Samples that equal a training example"]["rows"] == [[0, 7], [1, 3], [2, 3], [3, 9]]
    assert "4 of 400 samples and 0 of 400 held-out examples equal" in result.content["reasons"][0]
    page = result.write(tmp_path / "audit.html").read_text()
    assert 'data-heading="held-out"' in page  # a narrow page has a line for each cell of the row
    assert open_audit(tmp_path / "run").verdict == "flagged"
    assert not accepted_fields(tmp_path / "run", 8, tmp_path / "copy")


@pytest.mark.parametrize(
    ("kind", "verdict", "collapsed"),
    [("new", "not flagged", False), ("copies", "flagged", False), ("few", "flagged", True)],
)
def test_copies_and_a_collapse_are_flagged(kind, verdict, collapsed):
    result = audited(Points(kind), gates=["copy_rate <= 0.05", "not-flagged"])
    assert result.verdict == verdict
    assert result.facts["collapsed"] is collapsed
    rate, not_flagged = (gate["verdict"] for gate in result.content["gates"])
    assert rate == ("fail" if kind == "copies" else "pass")
    assert not_flagged == ("fail" if verdict == "flagged" else "pass")
    assert result.exit_code == (1 if verdict == "flagged" else 0)
    if kind == "copies":
        assert result.metrics["copy_rate"].value >= 0.99


def test_the_command_takes_a_file_of_samples_and_a_function_and_is_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.savez("train.npz", x=TRAIN[0].numpy(), y=TRAIN[1].numpy())
    np.savez("test.npz", x=HELD_OUT[0].numpy(), y=HELD_OUT[1].numpy())
    np.savez("samples.npz", x=TRAIN[0][:400].numpy())
    (tmp_path / "gen.py").write_text(
        "import numpy as np\n\n\nclass Noise:\n    def sample(self, n, seed):\n"
        "        return np.random.default_rng(seed).random((n, 16), dtype='float32')\n\n\n"
        "def make():\n    return Noise()\n"
    )
    audit = ["audit", "generator"]
    on_file = [*audit, "samples.npz", "train.npz", "--held-out", "test.npz", "--run", "a"]
    assert command([*on_file, "-o", "a.json", "-o", "a.html"]) == 0
    assert "Flagged: 100.0 % of the samples are copies" in capsys.readouterr().err
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["facts"]["copy_rate"] == 1
    assert command([*on_file, "--resume", "-o", "b.json"]) == 0
    assert json.loads((tmp_path / "b.json").read_text())["facts"] == written["facts"]
    on_noise = [*audit, "gen.py:make", "train.npz", "--held-out", "test.npz", "--samples", "400"]
    assert command([*on_noise, "-o", "c.json"]) == 0
    facts = json.loads((tmp_path / "c.json").read_text())["facts"]
    assert facts["frechet"] > 10 * facts["floor"]["frechet"]


class Broken:
    def __init__(self, answer):
        self.answer = answer

    def sample(self, n, seed):
        return self.answer(n)


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (lambda n: torch.full((n, 16), torch.nan), TargetError, "contain NaN"),
        (lambda n: torch.rand(n - 1, 16), TargetError, "returned shape"),
        (lambda n: torch.rand(n, 12), UsageError, "have shape"),
        (lambda n: 255 * torch.rand(n, 16), UsageError, "have values from"),
        (lambda n: 1 / 0, TargetError, "raised ZeroDivisionError"),
    ],
)
def test_samples_that_cannot_be_compared_are_refused(answer, kind, message):
    with pytest.raises(kind, match=message):
        audited(Broken(answer))


def test_the_quality_compares_a_part_of_many_training_examples(set_limit):
    set_limit("holdfast.audits.generator.audit.COMPARED", 300)
    result = audited(Points())
    assert "each compared with 300 training examples" in result.content["tables"][0]["note"]
    assert result.metrics["copy_rate"].value < 0.05
    assert audited(Points("copies")).metrics["copy_rate"].value > 0.9  # all of them are searched for copies


def test_bad_input_is_refused():
    with pytest.raises(UsageError, match="latent is 0, which skips its search; leave latent out"):
        audited(Points(), latent=0, gates=["latent_sensitivity <= 1"])
    with pytest.raises(UsageError, match="held_out is missing"):
        holdfast.audit.generator(Points(), TRAIN)
    with pytest.raises(UsageError, match="are among the training examples"):
        audited(Points(), held_out=TRAIN)
    with pytest.raises(UsageError, match="at least 200"):
        audited(Points(), held_out=(HELD_OUT[0][:50], HELD_OUT[1][:50]))
    with pytest.raises(UsageError, match="needs more examples than features"):
        audited(Points(), samples=20)
    with pytest.raises(UsageError, match="a method sample"):
        audited(nn.Linear(2, 2))
    with pytest.raises(UsageError, match="have no labels"):
        holdfast.audit.generator(Points(), TRAIN[0], held_out=HELD_OUT, samples=400, device="cpu")


def test_a_generator_that_ignores_its_seed_is_noted():
    result = audited(Broken(lambda n: points(n, 7)[0]))
    assert any("ignores its seed" in note for note in result.summary()["notes"])


def test_code_that_a_configuration_names_is_not_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.savez("train.npz", x=TRAIN[0].numpy(), y=TRAIN[1].numpy())
    np.savez("test.npz", x=HELD_OUT[0].numpy(), y=HELD_OUT[1].numpy())
    (tmp_path / "net.py").write_text("raise SystemExit('the code ran')\n")
    (tmp_path / "audit.yaml").write_text("held_out: test.npz\naudit-generator: {features: 'net.py:make'}\n")
    words = ["audit", "generator", "train.npz", "train.npz", "--held-out", "test.npz", "-c", "audit.yaml"]
    assert command(words) == 2
    assert "the configuration refers to code (features: net.py:make)" in capsys.readouterr().err
