"""`holdfast.Guard`: read from a file, calibrated with a model and data, and refused when it is stale."""

import json
import re

import pytest
import torch

import holdfast
from holdfast.core.errors import TargetError, UsageError
from holdfast.guard.rules import Action, Basis
from holdfast.verbs.opening.guard import notes_of_file

SHAPE = (1, 6, 6)
FILE = """\
inputs: {shape: [1, 6, 6], low: -20, high: 20}
rules:
  range: {mode: enforce}
  energy: {mode: MODE, action: abstain}
"""


def network():
    """Logits that are large for inputs with a large mean, so that the energy of a mean near 0 is high."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 4))
    with torch.no_grad():
        net[1].weight.copy_(torch.randn(4, 1).expand(4, 36) / 6)
        net[1].bias.zero_()
    return net


def inputs(n, seed=0):
    x = torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed)) + 3
    return x, torch.arange(n) % 4


def written(tmp_path, text=FILE, mode="enforce"):
    path = tmp_path / "guard.yaml"
    path.write_text(text.replace("MODE", mode))
    return path


BOUNDS = {"bounds": (-20.0, 20.0)}


def test_a_calibrated_guard_abstains_at_most_at_the_requested_rate_and_on_strange_inputs(tmp_path):
    path = written(tmp_path, mode="observe")
    guard = holdfast.Guard.from_yaml(path).calibrate(network(), inputs(2000), false_positives=0.02)
    path.write_text(FILE.replace("MODE", "enforce"))
    guard = holdfast.Guard.from_yaml(path, network())
    net, (x, _) = network(), inputs(4000, seed=1)
    decision = guard.after(guard.before(x, principal="client"), net(x))
    rate = sum(action is Action.ABSTAIN for action in decision.actions) / len(x)
    assert 0.01 < rate < 0.03
    estimate = guard.observed_rate()
    assert estimate.n == 4000 and estimate.low < 0.02 < estimate.high and not guard.pipeline.observed.too_high
    strange = torch.zeros(300, *SHAPE)
    decision = guard.after(guard.before(strange), net(strange))
    assert set(decision.actions) == {Action.ABSTAIN}
    assert guard.pipeline.observed.too_high


def rows(n, seed=0):
    """Benign rows with four values, from a few groups, as in tables."""
    rng = torch.Generator().manual_seed(seed)
    groups = torch.rand(3, 4, generator=torch.Generator().manual_seed(1))[
        torch.randint(3, (n,), generator=rng)
    ]
    return (groups + 0.05 * torch.randn(n, 4, generator=rng)).clamp(0, 1)


def tabular(rules, dtype="float32", mode="enforce"):
    return {"mode": mode, "inputs": {"shape": [4], "dtype": dtype}, "rules": rules}


def refused(guard, x):
    return sum(not guard.before(x[i : i + 1], principal=f"client {i}").answered for i in range(len(x)))


@pytest.mark.parametrize(
    ("name", "settings", "basis"),
    [
        ("queries", {"action": "block"}, Basis.UNFITTED),
        ("queries", {"action": "block", "threshold": 5}, Basis.UNFITTED),
        ("queries", {"action": "block", "radius": 0.5}, Basis.GIVEN),
        ("energy", {"action": "abstain"}, Basis.UNFITTED),
        ("energy", {"action": "abstain", "threshold": -100}, Basis.GIVEN),
        ("mahalanobis", {"action": "block"}, Basis.UNFITTED),
        ("stability", {"action": "block"}, Basis.UNFITTED),
    ],
)
def test_a_rule_acts_only_if_it_was_fitted_or_given(name, settings, basis, caplog):
    guard = holdfast.Guard.from_settings(tabular({name: settings}))
    x, net = rows(300), torch.nn.Linear(4, 3)
    decisions = [guard.before(each[None], principal=f"client {k}") for k, each in enumerate(x)]
    answered = [
        guard.after(d, net(each[None]), network=net) if d.answered else d
        for d, each in zip(decisions, x, strict=True)
    ]
    acted = sum(decision.action is not Action.ALLOW for decision in answered)
    given = basis is Basis.GIVEN
    assert guard.pipeline.unfitted == (() if given else (name,))
    assert acted > 200 if given else acted == 0
    note = guard.notes[0]
    assert (note.rule, note.basis, note.warns) == (name, basis, True) and str(note) in caplog.text
    assert ("was not measured" if given else "only reports") in str(note)
    if name == "queries" and not given:  # what it would have done is recorded
        assert sum(row.shadow is Action.BLOCK for d in answered for row in d.rows) > 100


def test_a_state_that_is_lost_refuses_no_request_for_a_rule_that_only_reports(tmp_path):
    path = tmp_path / "guard.yaml"
    for radius, answered in (("{}", True), ("{radius: 0.1}", False)):
        path.write_text(f"mode: enforce\ninputs: {{shape: [4]}}\nrules: {{queries: {radius}}}\n")
        guard = holdfast.Guard.from_yaml(path)
        guard.pipeline.queries.detector.state.close()
        decision = guard.before(rows(1))
        assert decision.unchecked and decision.answered is answered


@pytest.mark.parametrize("settings", [{}, {"eps": 0.2}])
def test_the_radius_is_fitted_on_the_traffic_of_an_application(settings, caplog):
    guard = holdfast.Guard.from_settings(tabular({"queries": {"action": "block", **settings}}))
    stream = [(part, torch.zeros(len(part), 3)) for part in rows(2000).split(100)]
    guard = guard.calibrate_on(stream, "model 3", false_positives=0.001)
    calibration = guard.calibration
    assert calibration.n == 1600 and calibration.fired == calibration.fired_by["queries"] == 0
    assert refused(guard, rows(1000, seed=2)) <= 1
    radius = calibration.parameters["queries"]["radius"]
    (note,) = guard.notes
    assert note.basis is Basis.FITTED and note.warns
    assert f"covers changes up to eps {radius / 4:.2g}, less than" in str(note) and str(note) in caplog.text
    wide = float(re.search("`radius: ([^`]+)`", str(note))[1])  # the remedy of the note
    wanted = {"queries": {"radius": wide, **settings}}
    (given, covers) = holdfast.Guard.from_settings(tabular(wanted)).notes
    assert given.basis is Basis.GIVEN and "less than" not in str(covers)


@pytest.mark.parametrize(
    ("rules", "ways"),
    [
        ({"queries": {"radius": 0.5}}, "leave the radius of queries out, so that it is fitted, or lower it"),
        ({"energy": {"threshold": -100.0}}, "or leave them out, so that they are calibrated"),
        (
            {"queries": {"radius": 0.5}, "stability": {}},
            "leave the radius of queries out, so that it is fitted, or lower it",
        ),
    ],
)
def test_a_calibration_states_no_rate_that_its_count_refutes(rules, ways):
    net = torch.nn.Linear(4, 3)
    stream = [(part, net(part).detach()) for part in rows(2000).split(500)]

    def calibrated(rules, rate):
        guard = holdfast.Guard.from_settings(tabular(rules))
        return guard.calibrate_on(stream, "model 3", false_positives=rate, network=net).calibration

    with pytest.raises(UsageError, match=ways) as raised:
        calibrated(rules, 0.01)
    higher = re.search(r"a rate of (\S+) or more", str(raised.value))
    if higher is not None:  # the advice works
        assert calibrated(rules, float(higher[1])).measured.value <= float(higher[1])
    left = {
        name: {k: v for k, v in rule.items() if k not in ("radius", "threshold")}
        for name, rule in rules.items()
    }
    found = calibrated(left, 0.01)
    assert found.fired <= 0.01 * found.n and found.measured.high < 0.02


def test_a_measured_rate_of_a_given_radius_is_printed(tmp_path):
    path = tmp_path / "guard.yaml"
    path.write_text("mode: enforce\ninputs: {shape: [4]}\nrules: {queries: {radius: 0.001}}\n")
    stream = [(rows(1000), torch.zeros(1000, 3))]
    guard = holdfast.Guard.from_yaml(path).calibrate_on(stream, "m", false_positives=0.01)
    note = next(note for note in guard.notes if note.basis is Basis.GIVEN)
    assert not note.warns and "0 % (95 % interval: 0 to 1 %) of 1,000 benign inputs" in str(note)
    (stated, _) = notes_of_file(path)
    assert stated == str(note)
    path.write_text(path.read_text().replace("0.001", "0.002"))
    stale, note, _ = notes_of_file(path)
    assert "run holdfast calibrate again" in stale and "was not measured" in note


def test_finite_differences_in_float64_are_similar_queries():
    rules = {"queries": {"action": "block", "radius": 0.05}}
    guard = holdfast.Guard.from_settings(tabular(rules, dtype="float64"))
    x = torch.full((1, 4), 0.5, dtype=torch.float64)
    queries = [x + 1e-9 * k for k in range(200)]
    assert len({float(each[0, 0].float()) for each in queries}) < 10
    decisions = [guard.before(each) for each in queries]
    assert sum(not decision.answered for decision in decisions) > 150
    assert guard.before(x).answered and torch.equal(decisions[1].x, queries[1])


def test_a_stale_or_changed_calibration_is_refused(tmp_path):
    path, place = written(tmp_path, mode="observe"), tmp_path / "guard.calibration.json"
    holdfast.Guard.from_yaml(path).calibrate(network(), inputs(200), false_positives=0.01)
    holdfast.Guard.from_yaml(path, network())
    other = network()
    with torch.no_grad():
        other[1].bias.add_(1)
    with pytest.raises(
        UsageError, match="calibrated with the model .*, and this model is .*run holdfast calibrate"
    ):
        holdfast.Guard.from_yaml(path, other)
    path.write_text(FILE.replace("MODE", "observe, temperature: 2"))
    with pytest.raises(UsageError, match="calibrated with other settings of the guard"):
        holdfast.Guard.from_yaml(path)
    path.write_text(FILE.replace("MODE", "observe"))
    content = json.loads(place.read_text())
    for change in ({"n": 10**6}, {"format": 2}, {"digest": 3}):
        place.write_text(json.dumps({**content, **change}))
        with pytest.raises(TargetError, match="guard.calibration.json"):
            holdfast.Guard.from_yaml(path)
    place.write_text("[]")
    with pytest.raises(TargetError, match="is not a calibration"):
        holdfast.Guard.from_yaml(path)


@pytest.mark.parametrize(
    ("n", "rules", "message"),
    [
        (998, "energy: {}", "998 calibration inputs are too few .* of 0.1 %, which needs at least 999"),
        (1200, "energy: {}\n  stability: {}", "1,200 calibration inputs are too few to combine 2 rules .*1,999 "),
        (1200, "energy: {threshold: -1000}\n  stability: {}", "rules that a calibration does not change fire .* raise"),
    ],
)  # fmt: skip
def test_too_few_inputs_are_refused(tmp_path, n, rules, message):
    path = written(tmp_path, f"inputs: {{shape: [1, 6, 6], low: -20, high: 20}}\nrules:\n  {rules}\n")
    with pytest.raises(UsageError, match=message):
        holdfast.Guard.from_yaml(path).calibrate(network(), inputs(n))
    assert not (tmp_path / "guard.calibration.json").exists()


def test_probabilities_and_inputs_of_another_shape_are_refused(tmp_path):
    path = written(tmp_path, mode="observe")
    softmax = torch.nn.Sequential(network(), torch.nn.LogSoftmax(1))
    with pytest.raises(UsageError, match="the score of energy is .*0 for all .*log probabilities"):
        holdfast.Guard.from_yaml(path).calibrate(softmax, inputs(1000))
    x, y = inputs(1000)
    with pytest.raises(UsageError, match=r"does not match the guard: .*shape \(256, 1, 4, 9\)"):
        holdfast.Guard.from_yaml(path).calibrate(network(), (x.view(-1, 1, 4, 9), y))


def test_a_fitted_detector_is_stored_with_the_calibration(tmp_path):
    text = FILE.replace(
        "energy: {mode: MODE, action: abstain}", "mahalanobis: {action: flag}\n  squeezing: {bits: 3}"
    )
    path, net = written(tmp_path, text), network()
    guard = holdfast.Guard.from_yaml(path).calibrate(net, inputs(600), false_positives=0.02)
    assert guard.calibration.n == 480
    again, x = holdfast.Guard.from_yaml(path, net), inputs(64, seed=2)[0]
    results = [
        each.after(each.before(x), net(x), network=net).rows for each in (guard, again)
    ]  # a request that both decide in the same way
    assert [[(s.value, s.fired) for s in row.scores] for row in results[0]] == [
        [(s.value, s.fired) for s in row.scores] for row in results[1]
    ]
    with pytest.raises(UsageError, match="feature squeezing calls the network on changed inputs"):
        again.after(again.before(x), net(x))


WITH_QUERIES = """\
inputs: {shape: [3, 16, 16]}
rules:
  queries: {mode: enforce}
  energy: {}
"""


def pictures(n, seed=0):
    """Different smooth images."""
    coarse = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=16, mode="bilinear"), torch.arange(n) % 4


def test_near_duplicates_are_blocked_by_all_processes_that_share_the_file(tmp_path):
    path, (images, labels) = written(tmp_path, WITH_QUERIES), pictures(700)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 4))
    calibrated = holdfast.Guard.from_yaml(path).calibrate(net, (images, labels), false_positives=0.01)
    assert calibrated.calibration.n == 560 and calibrated.calibration.parameters["queries"]["radius"] > 0
    assert (tmp_path / "guard.key").stat().st_mode & 0o077 == 0
    workers = [holdfast.Guard.from_yaml(path, net) for _ in range(3)]
    fresh = pictures(40, seed=1)[0]
    noise = (pictures(40, seed=2)[0] - 0.5).sign() / 40
    for k, image in enumerate(fresh):
        assert workers[k % 3].before(image[None], principal=f"p{k % 10}").answered
    attack = [
        workers[k % 3].before((fresh[:1] + noise[k]).clamp(0, 1), principal=f"p{k % 10}") for k in range(40)
    ]
    refused = [decision for decision in attack[20:] if not decision.answered]
    # the key is random, and a few near duplicates share no hash with the first query
    assert attack[0].answered and len(refused) >= 14
    assert refused[0].refusal == "the request was refused"


def test_the_key_of_a_guard_is_private_and_valid(tmp_path, monkeypatch):
    path = written(tmp_path, WITH_QUERIES.replace("  energy: {}\n", ""))
    holdfast.Guard.from_yaml(path)
    (tmp_path / "guard.key").chmod(0o644)
    with pytest.raises(
        TargetError, match="has mode 0644, so that other users can read the key; run chmod 600"
    ):
        holdfast.Guard.from_yaml(path)
    monkeypatch.setenv("HOLDFAST_GUARD_KEY", "short")
    with pytest.raises(
        UsageError, match="HOLDFAST_GUARD_KEY contains 5 characters that are not a key; 64 hex"
    ):
        holdfast.Guard.from_yaml(path)
    monkeypatch.setenv("HOLDFAST_GUARD_KEY", "a" * 64)
    holdfast.Guard.from_yaml(path)


def test_flagged_inputs_are_stored_and_deleted_through_the_guard(tmp_path):
    pytest.importorskip("cryptography")
    text = FILE.replace("action: abstain", "action: block, threshold: 0") + "store: {inputs: flagged}\n"
    guard = holdfast.Guard.from_yaml(written(tmp_path, text))
    invalid = guard.before(torch.full((1, *SHAPE), 99.0), principal="eve")
    blocked = guard.after(guard.before(torch.zeros(2, *SHAPE), principal="eve"), -torch.ones(2, 4) * 9)
    fine = guard.after(guard.before(torch.zeros(1, *SHAPE), principal="eve"), torch.ones(1, 4) * 9)
    assert [invalid.answered, blocked.answered, fine.answered] == [False, False, True]
    stored = {each.request: each.x for each in guard.stored_inputs.read()}
    assert {request: len(x) for request, x in stored.items()} == {invalid.request: 1, blocked.request: 2}
    assert guard.stored_inputs.delete(principal="eve") == 2 and not list(guard.stored_inputs.read())
    with pytest.raises(UsageError, match="a guard without a file has no lasting key"):
        holdfast.Guard.from_settings(
            {"inputs": {"shape": [4]}, "rules": {"range": {}}, "store": {"inputs": "flagged"}}
        )


def test_features_of_a_layer_are_calibrated_and_given_by_the_application(tmp_path):
    text = FILE.replace("energy: {mode: MODE, action: abstain}", "mahalanobis: {on: features, layer: '1'}")
    net = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(36, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)
    )
    path, x = written(tmp_path, text), inputs(64, seed=2)[0]
    guard = holdfast.Guard.from_yaml(path).calibrate(net, inputs(500), false_positives=0.02)
    assert guard.pipeline.detectors["mahalanobis"].precision.shape == (8, 8)
    decision = guard.after(guard.before(x), net(x), features=net[:2](x))
    assert sum(row.scores[-1].fired for row in decision.rows) < 8
    with pytest.raises(UsageError, match="needs features; give them, as in"):
        guard.after(guard.before(x), net(x))
    for layer, message in (
        ("'9'", "the network has no layer '9'; it has 0, 1, 2, 3"),
        ("null", "and no layer"),
    ):
        path.write_text(text.replace("'1'", layer))
        (tmp_path / "guard.calibration.json").unlink(missing_ok=True)
        with pytest.raises(UsageError, match=message):
            holdfast.Guard.from_yaml(path).calibrate(net, inputs(500), false_positives=0.02)


STREAMED = """\
inputs: {shape: [1, 6, 6], low: -20, high: 20}
rules:
  queries: {mode: enforce, radius: 0.001}
  energy: {}
"""


def test_a_guard_is_calibrated_on_the_traffic_of_an_application(tmp_path):
    path, net = (
        written(tmp_path, STREAMED),
        network(),
    )
    x = inputs(600)[0]
    stream = [(part, net(part)) for part in x.split(100)]
    guard = holdfast.Guard.from_yaml(path)
    assert guard.calibrate_on(stream, "digits 3", false_positives=0.01).calibration.n == 600
    again = holdfast.Guard.from_yaml(path, model_name="digits 3")
    scores = -net(x).logsumexp(1)
    assert 1 <= int((scores > again.pipeline.rules["energy"].threshold).sum()) <= 6
    with pytest.raises(UsageError, match="run holdfast calibrate again"):
        holdfast.Guard.from_yaml(path, model_name="digits 4")
    with pytest.raises(UsageError, match="500 calibration inputs are too few"):
        guard.calibrate_on(stream[:5], "digits 3")
