"""The audit of shared gradients: exact reconstruction, optimisation, protection, and its errors."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy

import holdfast
from benchmarks.forging import accepted_fields
from holdfast.core.errors import TargetError, UsageError


def dense(*, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 128, bias=bias), nn.ReLU(), nn.Linear(128, 5))


def conv(*, norm=False):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1), *([nn.BatchNorm2d(8)] if norm else []), nn.Sigmoid()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(288, 5))


@pytest.fixture(scope="module")
def data():
    x = torch.rand(40, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    return x, torch.arange(40) % 5


def audit(net, data, **settings):
    usual = {"device": "cpu", "batch_size": (1,), "batches": 4, "steps": 60}
    return holdfast.audit.reconstruct(net, data, **{**usual, **settings})


@pytest.mark.parametrize("settings", [{}, {"mean": (0.3,), "std": (0.2,)}])
def test_a_dense_layer_gives_the_inputs_and_labels_of_a_batch(data, settings, tmp_path):
    result = audit(dense(), data, batch_size=(1, 4, 8), run=tmp_path / "run", **settings)
    assert [result.facts[f"gradients-{size}"]["exactly_reconstructed"] for size in (1, 4)] == [1, 1]
    assert [result.facts[f"gradients-{size}"]["labels"] for size in (1, 4)] == [1, 1]
    assert result.facts["gradients-8"]["exactly_reconstructed"] > 0.7
    assert result.verdict == "flagged" and result.metrics["exactly_reconstructed"].value == 1
    assert not accepted_fields(tmp_path / "run", 6, tmp_path / "copy")


def test_without_such_a_layer_inputs_are_found_by_optimisation(data):
    facts = audit(conv(), data, steps=200).facts["gradients-1"]
    assert facts["exactly_reconstructed"] < 1 and facts["labels"] == 1
    assert facts["psnr_above_mean_image"]["value"] > 3


def test_the_noise_of_dp_sgd_leaves_the_mean_image(data):
    result = audit(dense(), data, clip=1.0, noise=2.0)
    plain, protected = result.facts["gradients-1"], result.facts["protected-1"]
    assert plain["exactly_reconstructed"] == 1 and protected["exactly_reconstructed"] == 0
    assert abs(protected["psnr_above_mean_image"]["value"]) < 0.5
    # the gates judge what is shared
    assert result.metrics["exactly_reconstructed"].value == 0 and result.verdict == "not flagged"


def test_batch_normalisation_is_not_changed(data):
    net = conv(norm=True)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    audit(net, data, batch_size=(4,), batches=1)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    with pytest.raises(UsageError, match="batch normalisation in train mode"):
        audit(net, data, clip=1.0, noise=1.0)


def test_a_gradient_in_a_file_is_inverted_and_one_of_another_network_is_refused(data, tmp_path):
    net, (x, y) = dense(), data
    loss = cross_entropy(net(x[:3]), y[:3])
    named = dict(net.named_parameters())
    gradient = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    save_file(gradient, tmp_path / "gradient.safetensors")
    result = audit(net, (x[:3], y[:3]), gradient=tmp_path / "gradient.safetensors")
    assert result.facts["gradients-3"]["exactly_reconstructed"] == 1
    gain = result.metrics["psnr_above_mean_image"]
    assert gain.low == gain.value == gain.high  # one gradient is no sample
    other = audit(net, (x[3:6], y[3:6]), gradient=tmp_path / "gradient.safetensors")
    assert "differs from that of the data" in other.text()
    save_file({**gradient, "1.bias": gradient["1.bias"] / 0}, tmp_path / "infinite.safetensors")
    with pytest.raises(TargetError, match="in 1.bias that are not finite"):
        audit(net, (x[:3], y[:3]), gradient=tmp_path / "infinite.safetensors")
    with pytest.raises(TargetError, match="is no gradient of this network"):
        audit(conv(), (x[:3], y[:3]), gradient=tmp_path / "gradient.safetensors")


def test_intervals_are_those_of_batches(data):
    few = audit(conv(), data, batch_size=(10,), batches=2, steps=2)
    gain = few.metrics["psnr_above_mean_image"]
    assert gain.n == 2 and gain.high - gain.low > 50 and "fewer than 6 batches" in few.text()


def test_classes_are_inverted(data):
    result = audit(dense(), data, batches=1, inversion=True)
    (table,) = [each for each in result.content["tables"] if each["title"] == "Inversion of the classes"]
    assert len(table["rows"]) == 5 and result.content["pictures"]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"batch_size": (1, 64)}, "batch_size is 64, and there are 40 examples"),
        ({"clip": 1.0}, "without noise"),
        ({"batch_size": "0"}, "expected whole numbers"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(data, settings, message):
    with pytest.raises(UsageError, match=message):
        audit(dense(), data, **settings)


def test_the_model_is_no_judge_of_itself():
    with pytest.raises(UsageError, match="the judge mnist-cnn is the model itself"):
        audit("mnist-cnn", "mnist-mini", judge="mnist-cnn")
