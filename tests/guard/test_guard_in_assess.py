"""A calibrated guard is a part of an assessed model: stateless detectors reject, and the query detector is tried."""

import json

import pytest
import torch

import holdfast
from holdfast.attacks import Square
from holdfast.core.batch import Batch
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.meter import Answering
from holdfast.core.threat import ThreatModel
from holdfast.guard.detectors.queries import QueryDetector, Screened
from holdfast.guard.query_rule import QueryTrials
from holdfast.guard.state_in_memory import MemoryState
from holdfast.runs.harness.target import prepared
from holdfast.testing.fakes import examples, labelled, network

SHAPE = (3, 16, 16)
THREAT = ThreatModel(Linf(0.1))


def pictures(n=400, seed=0):
    coarse = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.interpolate(coarse, size=16, mode="bilinear")


def model():
    return network(shape=SHAPE)


def batch(n=12):
    given = examples(n=n, shape=SHAPE)
    return labelled(model(), Batch(pictures(n, seed=1), given.y, given.ids))


def written(tmp_path, rules):
    path = tmp_path / "guard.yaml"
    path.write_text(f"inputs: {{shape: [3, 16, 16], dtype: float64}}\nrules: {rules}\n")
    return path


def guard(tmp_path, rules):
    path = written(tmp_path, rules)
    holdfast.Guard.from_yaml(path).calibrate(
        model(), (pictures(), torch.arange(400) % 4), false_positives=0.05
    )
    return path


def assessed(path, rule="", **settings):
    data = (batch().x, batch().y)
    reference = holdfast.open_model(model(), guard=f"{path}{rule}")
    threat = settings.pop("threat", "linf:0.1")
    return holdfast.assess(reference, data, threat, "fgsm", doubts=False, **settings)


@pytest.mark.slow
def test_the_model_rejects_exactly_where_a_calibrated_rule_fires(tmp_path):
    path = guard(tmp_path, "{energy: {}, squeezing: {bits: 3, median: 0}, stability: {draws: 2}}")
    result = assessed(path)
    pipeline = holdfast.Guard.from_yaml(path).pipeline
    x, net = batch().x, model()
    decision = pipeline.after(pipeline.before(x), net(x), network=net)
    fired = torch.tensor([any(score.fired for score in row.scores) for row in decision.rows])
    assert torch.equal(result.evidence["score"] > 0, fired)
    assert any("rejects inputs by energy, squeezing, stability" in note for note in result.evidence.notes)
    alone = assessed(path, ":energy").evidence
    thresholds, scales = (
        pipeline.rules["energy"].threshold,
        holdfast.Guard.from_yaml(path).calibration.scales["energy"],
    )
    expected = (-net(x).logsumexp(1) - thresholds) / scales
    assert torch.allclose(alone["score"], expected)


def test_a_guard_that_cannot_be_a_part_of_the_model_is_refused(tmp_path):
    path = guard(tmp_path, "{energy: {}, mahalanobis: {}}")
    with pytest.raises(
        UsageError, match="the guard has no detector 'squeezing', as energy; it has energy, mahalanobis"
    ):
        assessed(path, ":squeezing")
    other = network(1, shape=SHAPE)
    with pytest.raises(UsageError, match="was calibrated with the model .*run holdfast calibrate again"):
        holdfast.assess(
            holdfast.open_model(other, guard=str(path)), (batch().x, batch().y), Linf(0.1), "fgsm"
        )
    (tmp_path / "guard.calibration.json").unlink()
    with pytest.raises(
        UsageError, match="the rule energy of the guard has no threshold; run holdfast calibrate"
    ):
        assessed(path)


def test_the_query_detector_is_tried_and_reported(tmp_path):
    path = guard(tmp_path, "{queries: {eps: 0.1}, energy: {}}")
    result = assessed(path, ":queries", threat="linf:0.1,queries=25", run=tmp_path / "run")
    table = result.evidence.tables["stateful"].columns
    assert (table["plain_without_rejected"] == 0).all() and (table["plain_with_rejected"] > 0).any()
    result.write(tmp_path / "r.json")
    summary = json.loads((tmp_path / "r.json").read_text())
    rows = summary["query_detector"]["rows"]
    assert [row["broken_with"]["n"] for row in rows] == [len(table["id"])] * 7
    assert rows[0]["rejected"]["value"] == float((table["plain_with_rejected"] > 0).double().mean())
    for arm in ("without", "labelled"):
        shares = [row[f"broken_{arm}"]["value"] for row in rows if row[f"broken_{arm}"]]
        assert shares[-1] >= max(shares[:-1])
    assert all(row["broken_in_budget"] == row["broken_without"] for row in rows)
    result.write(tmp_path / "r.html")
    assert 'id="query-detector"' in (tmp_path / "r.html").read_text()
    result.write(tmp_path / "r.md")
    assert "### Queries" in (tmp_path / "r.md").read_text()


def test_a_query_detector_without_a_radius_is_not_tried(tmp_path):
    path = written(tmp_path, "{queries: {}}")
    with pytest.raises(
        UsageError, match="queries of the guard has no radius; run holdfast calibrate first, or give"
    ):
        assessed(path)


def test_stateless_detectors_are_tried_with_queries(tmp_path):
    path = written(tmp_path, "{energy: {threshold: -100.0}}")  # rejects every input
    table = assessed(path, threat="linf:0.3,queries=25").evidence.tables["stateful"].columns
    assert (table["plain_without_broken"] > 0).any() and "informed_with_broken" not in table
    for name in ("plain", "adaptive", "patterns", "population", "labels"):
        assert (table[f"{name}_without_rejected"] == 0).all()
        assert (table[f"{name}_with_broken"] == 0).all() and (table[f"{name}_with_rejected"] == 1).all()


def test_the_counts_of_a_screened_model_are_those_of_its_queries():
    given, net = batch(4), model()
    with prepared(net, given) as target:
        bare = Screened(target.original, given, Linf(0.3))
        x_adv = Square(queries=150)(Answering(bare, given), given, ThreatModel(Linf(0.3)), rng=Draws(0))
    broken = net(x_adv).argmax(1) != given.y
    assert broken.any() and torch.equal(bare.broken_at > 0, broken)
    assert (bare.queries[~broken] == 150).all() and (bare.queries >= bare.broken_at).all()
    detector = QueryDetector(b"k" * 32, MemoryState(), SHAPE)
    screened = Screened(net, given, Linf(0.3), detector)
    nearly = given.x + 0.02 * torch.linspace(0, 1, 30, dtype=torch.float64).view(30, 1, 1, 1, 1)
    rejected = [screened((x * 0.98).clamp(0, 1), given.ids).isposinf().all(1) for x in nearly]
    stacked = torch.stack(rejected)
    assert torch.equal(screened.rejected_at > 0, stacked.any(0))


def test_trials_attack_only_examples_that_are_correct():
    given = batch(6)
    wrong = Batch(given.x, torch.where(torch.arange(6) < 2, (given.y + 1) % 4, given.y), given.ids)
    with prepared(model(), wrong) as target:
        table = QueryTrials(queries=20)(target, wrong, THREAT, 0)
    assert table.columns["id"].tolist() == wrong.ids[2:].tolist()
