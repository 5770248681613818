"""The audit of extraction and of ownership: copies, exact weights, counted queries, guards, controls, and errors."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import holdfast
from benchmarks.forging import accepted_fields
from holdfast.audits import extraction_copies as copies
from holdfast.audits.ownership import p_value, statistic
from holdfast.cli.app import run as command
from holdfast.core.errors import QueriesSpent, UsageError
from holdfast.core.model import Bounds
from servers import Server
from servers import examples as served_examples

FEATURES, CLASSES = 6, 3
QUERIES = (15, 80)


def make():
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, CLASSES))


def fitted(x, y, seed, epochs=40):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = make()
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(epochs):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval()


@pytest.fixture(scope="module")
def data():
    x, y = served_examples(600)
    return torch.from_numpy(x), torch.from_numpy(y)


@pytest.fixture(scope="module")
def model(data):
    return fitted(*data, 0, epochs=150)


def extraction(model, data, **settings):
    return holdfast.audit.extraction(
        model, data, **{"device": "cpu", "queries": QUERIES, "sample": 200, **settings}
    )


def test_softmax_weights_are_exact_up_to_a_common_term():
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (
        torch.randn(*shape, generator=generator).double() for shape in ((12, 5), (5,), (30, 3, 2, 2))
    )
    found = copies.softmax_weights(
        lambda x: (x.flatten(1) @ weight + bias).log_softmax(1), x, Bounds(-1.0, 2.0)
    )
    assert torch.allclose(found.weight, weight - weight.mean(1, keepdim=True), rtol=0, atol=1e-12)
    assert torch.allclose(found.bias, bias - bias.mean(), rtol=0, atol=1e-12)
    assert copies.is_softmax(lambda x: x.flatten(1) @ weight, x)
    assert not copies.is_softmax(lambda x: (x.flatten(1) @ weight).relu(), x)


def test_less_is_revealed_by_less_detailed_answers():
    p = torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.04], [0.2504, 0.2496, 0.2, 0.2, 0.1]])
    assert copies.revealed(p, "top-3")[0].tolist() == pytest.approx([0.5, 0.3, 0.1, 0.05, 0.05])
    assert copies.revealed(p, "labels").tolist() == [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0]]
    rounded = copies.revealed(p, "rounded")
    assert rounded.argmax(1).tolist() == [0, 0]
    assert rounded[1, 1] == pytest.approx(0.25, abs=1e-3)
    for answers in copies.ANSWERS:
        assert copies.revealed(p, answers).sum(1).tolist() == pytest.approx([1, 1])


def test_each_query_of_k_centre_is_the_farthest_from_those_before():
    points = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
    centres = points[:4]
    for place in copies.k_centre(points[4:], centres, 10).tolist():
        nearest = torch.cdist(points[4:], centres).amin(1)
        assert nearest[place] == nearest.max()
        centres = torch.cat((centres, points[4:][place : place + 1]))


def test_copies_agree_more_with_more_queries_and_detailed_answers(model, data, tmp_path):
    result = extraction(model, data, run=tmp_path / "run")
    found = {(c["pool"], c["answers"], c["choice"], c["queries"]): c for c in result.facts["copies"]}
    few, many = (found["own", "scores", "random", n]["agreement"]["value"] for n in QUERIES)
    assert few < many
    costs = {(cost["pool"], cost["answers"]): cost["difference"]["value"] for cost in result.facts["costs"]}
    assert costs["own", "top-3"] == 0  # all scores of three classes, so that only the training could differ
    assert {pool for pool, *_ in found} == {"own", "noise"}
    assert ("own", "scores", "k-centre", 80) in found
    robust = found["own", "scores", "random", 80]["robust_accuracy"]
    assert robust["low"] <= robust["value"] <= robust["high"]
    assert result.metrics["copy_agreement"].value == many
    assert result.facts["exact"] == {"softmax": False}
    assert not list(accepted_fields(tmp_path / "run", 12, tmp_path / "copy"))
    assert extraction(model, data, run=tmp_path / "run", resume=True).facts == result.facts


def test_a_softmax_model_is_extracted_exactly(data):
    net = nn.Linear(FEATURES, CLASSES)
    result = extraction(net, data, queries=(3, 20))
    assert result.facts["exact"]["queries"] == FEATURES + 1
    assert result.facts["exact"]["error"] < 1e-5
    assert result.verdict == "flagged"


def test_each_row_of_a_server_is_counted_and_none_is_sent_twice_by_a_resumed_run(tmp_path):
    x, y = served_examples(150)
    settings = {"run": tmp_path / "run", "sample": 40, "queries": (10, 30)}
    with Server() as server:
        limited = holdfast.open_model(server.url(), allow_hosts=[server.host], max_queries=100)
        with pytest.raises(QueriesSpent):
            extraction(limited, (x, y), **settings)
        model = holdfast.open_model(server.url(), allow_hosts=[server.host])
        result = extraction(model, (x, y), resume=True, **settings)
        assert len(server.rows) == result.facts["rows_sent"]
        rows = len({tuple(row) for row in server.rows})
        assert len(server.rows) <= rows + 16 + 20  # the repeated queries, and those that determine the layout
    assert not result.facts["repeated"]["changed"]
    assert not list(accepted_fields(tmp_path / "run", 4, tmp_path / "copy"))


def test_a_server_that_refuses_queries_and_answers_differently_is_described():
    x, y = served_examples(150)
    noise, high = np.random.default_rng(0), np.sort(x[:, 0])[-4]

    def form(scores):
        scores = scores + noise.normal(size=scores.shape)
        return {
            "outputs": [{"name": "scores", "shape": list(scores.shape), "data": scores.flatten().tolist()}]
        }

    with Server(
        form=form, refuses=lambda rows: (rows.reshape(-1, FEATURES)[:, 0] >= high).any(keepdims=True)
    ) as server:
        model = holdfast.open_model(server.url(), allow_hosts=[server.host])
        result = extraction(model, (x, y), pool=x[:140], sample=80, queries=(60,))
    (refusal,) = [each for each in result.facts["guard"] if each["pool"] == "other"]
    assert refusal["by"] == "the server"
    assert 1 <= refusal["first_refused"] <= 60
    assert refusal["agreement"]["n"] == result.metrics["copy_agreement"].n < 80
    text = result.text()
    assert "of 80 test examples, on which copies are not compared" in text
    assert "the model answers differently for" in text
    assert "is the first that it recognises or refuses" in text


GUARD = """
schema_version: 1
mode: enforce
inputs: {{shape: [{features}], low: 0, high: 1}}
outputs: logit
rules:
  queries: {{action: block, radius: {radius}}}
  energy: {{action: flag, threshold: {energy}}}
"""


def test_a_guard_recognises_a_stream_of_near_duplicates_for_one_key_and_for_ten(model, data, tmp_path):
    with torch.no_grad():
        energy = float(
            (-model(data[0]).logsumexp(1)).max()
        )  # of the logits, which fires on none of these inputs
    (tmp_path / "guard.yaml").write_text(GUARD.format(features=FEATURES, radius=0.05, energy=energy))
    noise = np.random.default_rng(0).normal(size=(200, FEATURES)) * 0.01
    guarded = holdfast.open_model(model, guard=str(tmp_path / "guard.yaml"))
    pool = (data[0][:1].numpy() + noise).astype(np.float32)
    result = extraction(guarded, data, pool=pool, queries=(100,))
    seen = {(each["pool"], each["keys"]): each for each in result.facts["guard"]}
    assert {keys for _, keys in seen} == {1, 10}
    assert seen["other", 1]["recognised"] <= seen["other", 10]["recognised"] <= 100
    assert seen["other", 10]["agreement"] is not None
    assert seen["own", 1]["fired"] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"queries": "2,100"}, "fewer than one query for each class"),
        ({"queries": "0"}, "expected whole numbers from 1 on"),
        ({"pool": np.zeros((9, FEATURES + 1), np.float32)}, "shape|features"),
        ({"controls": "folder"}, "there is none"),
        ({"gates": ["no-backdoor"]}, "is not one of audit extraction"),
        ({"suspect": "other.pt", "gates": ["copy_agreement <= 0.5"]}, "not on a suspect"),
        ({"suspect": "other.pt", "controls": "a", "train_controls": "1min"}, "not both"),
    ],
)
def test_impossible_settings_are_refused(model, data, settings, message):
    with pytest.raises(UsageError, match=message):
        extraction(model, data, **settings)


def test_test_examples_in_the_pool_are_counted_and_left_out(model, data):
    x, y = data
    result = extraction(model, (x[:300], y[:300]), pool=x[290:].numpy(), n=300, sample=None, queries=(10,))
    assert result.facts["shared_with_test"]["other"] == 10
    assert "10 of the inputs of the pool other" in result.text()
    with pytest.raises(UsageError, match="are test examples"):
        extraction(model, (x[:300], y[:300]), pool=x[:20].numpy(), n=300, sample=None, queries=(10,))


def test_a_model_is_copied_from_a_pool_alone(model, data):
    result = extraction(model, None, pool=data[0].numpy(), sample=None, queries=(30,))
    assert result.facts["copies"][0]["accuracy"] is None
    unattacked = extraction(model, data, sample=None, queries=(30,), threat="corruptions:1")
    assert unattacked.facts["copies"][0]["robust_accuracy"] is None
    assert "Robust is" not in unattacked.text()
    assert result.metrics["copy_agreement"].n == 120


def test_the_command_needs_a_pool_or_data(tmp_path, capsys):
    assert command(["audit", "extraction", "mnist-cnn"]) == 2
    assert "data and pool are missing" in capsys.readouterr().err
    np.savez(tmp_path / "pool.npz", x=np.random.default_rng(0).random((60, 1, 28, 28), dtype=np.float32))
    words = [
        "mnist-cnn",
        "--pool",
        str(tmp_path / "pool.npz"),
        "--queries",
        "20",
        "--run",
        str(tmp_path / "run"),
    ]
    assert command(["audit", "extraction", *words, "--device", "cpu"]) == 0
    assert "a copy trained on 20 answers" in capsys.readouterr().err


def noisy(n, seed):
    """Inputs with random labels, which a network can only remember."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, FEATURES, generator=generator), torch.randint(CLASSES, (n,), generator=generator)


@pytest.fixture(scope="module")
def controls(tmp_path_factory):
    folder = tmp_path_factory.mktemp("controls")
    for seed in range(20):
        save_file(fitted(*noisy(60, 100 + seed), seed, 150).state_dict(), folder / f"{seed:02}.safetensors")
    return folder


def test_a_copy_is_recognised_beside_independent_networks_only(controls, tmp_path):
    members, others = noisy(60, 1), noisy(60, 2)
    victim = fitted(*members, 0, 300)
    with torch.no_grad():
        labels = victim(members[0]).softmax(1)
    copy, independent = fitted(members[0], labels, 1, 300), fitted(*noisy(60, 3), 2, 150)

    def compared(suspect, **settings):
        return holdfast.audit.extraction(
            victim, members, pool=others, suspect=suspect, device="cpu", **settings
        )

    alone = compared(copy)
    assert alone.verdict == "unclear"
    assert "p" not in alone.facts
    found = compared(copy, controls=str(controls), run=tmp_path / "run")
    assert found.verdict == "flagged"
    assert found.facts["p"] < 1e-3
    assert not list(accepted_fields(tmp_path / "run", 8, tmp_path / "copy"))
    assert compared(independent, controls=str(controls)).verdict == "not flagged"
    twice = tmp_path / "twice"
    twice.mkdir()
    for file in controls.iterdir():
        (twice / file.name).write_bytes(file.read_bytes())
    (twice / "20.safetensors").write_bytes((controls / "00.safetensors").read_bytes())
    with pytest.raises(UsageError, match="are the same network"):
        compared(copy, controls=str(twice))


def test_the_p_value_is_the_tail_of_a_further_network():
    from scipy import stats

    controls = [0.3, -0.2, 0.1, 0.5, -0.4]
    low, high = stats.ttest_1samp(controls, 0).confidence_interval(0.95)
    half = (
        (high - low) / 2 * np.sqrt(len(controls) + 1)
    )  # of a prediction, which is sqrt(n + 1) times as wide
    shifted = [3 + each for each in controls]
    assert p_value(np.mean(shifted) + half, shifted, 1000) == pytest.approx(0.025)
    assert p_value(5.0, [0.0] * 19 + [5.0], 1000) == pytest.approx(1 / 20)  # as a control that is an outlier
    trained_on_the_others = [-9 + each for each in controls]
    assert p_value(0.5, trained_on_the_others, 1000) > 0.3
    margins = torch.tensor([1.0, 2.0, 4.0, 0.5, 0.2, 0.9])
    expected = stats.ttest_ind(margins[:3], margins[3:], equal_var=False).statistic
    assert statistic(margins, 3) == pytest.approx(expected)
    assert statistic(7 * margins, 3) == pytest.approx(expected)
