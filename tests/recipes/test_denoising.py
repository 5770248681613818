"""Denoised smoothing: the classifier is unchanged, the denoiser removes noise, and the file of the new model opens."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import holdfast
from holdfast.certifiers.smoothing import numbered_noise
from holdfast.core.batch import UNLABELLED, Batch
from holdfast.core.constraints import L2
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Classifier
from holdfast.core.outputs import with_detector
from holdfast.core.threat import ThreatModel
from holdfast.io.models.architectures import cnn
from holdfast.io.models.composed import DenoisedNetwork, with_denoiser
from holdfast.io.models.models import open_model
from holdfast.io.models.weights import written
from holdfast.recipes import Denoising
from holdfast.testing.recipes import SHORT

SIZES = {"channels": 1, "width": 8, "depth": 3}


def stripes(n=64):
    """Images of 8 x 8 pixels with horizontal (class 0) or vertical (class 1) stripes, and a network for them."""
    torch.manual_seed(0)
    row = torch.tensor([0.2, 0.8] * 4)
    y = torch.arange(n) % 2
    x = torch.where(y[:, None, None, None] == 1, row[None, None, None], row[None, None, :, None])
    x = x + 0.1 * torch.rand(n, 1, 8, 8)  # no two are equal
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 2),
    )
    adam = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(30):
        adam.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        adam.step()
    return Classifier(net.eval(), mean=(0.5,), std=(0.3,)), Batch(x, y, torch.arange(n))


@pytest.mark.slow
@pytest.mark.parametrize("weights", [{}, {"mse": 0.0}])
def test_a_trained_denoiser_removes_noise_and_leaves_the_classifier(weights):
    model, data = stripes(128)
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    with torch.no_grad():
        outputs = model(data.x)
    model.net = with_denoiser(model.net, SIZES)
    assert torch.equal(model.eval()(data.x).detach(), outputs)  # untrained, it changes nothing
    unlabelled = data.labelled(torch.full_like(data.y, UNLABELLED))
    how = replace(SHORT, epochs=20, batch=16, optimizer="adamw", lr=0.01, weight_decay=0.0)
    *_, last = Denoising(sigma=1.0, training=how, **weights)(
        model, unlabelled, ThreatModel(L2(0.5)), rng=Draws(0)
    )
    noisy = data.x + numbered_noise(Draws(9), data.ids, torch.zeros_like(data.ids), data.x)
    with torch.no_grad():
        right_before = int((model(noisy).argmax(1) == data.y).sum())
        last.put_into(model)
        right = int((model.eval()(noisy).argmax(1) == data.y).sum())
        scale = model.preprocess
        error, noise = (
            (image - scale(data.x)).square().mean()
            for image in (model.net.denoise(scale(noisy)), scale(noisy))
        )
    assert all(torch.equal(value, before[name]) for name, value in model.net.classifier.state_dict().items())
    assert right > right_before + 3
    if weights.get("mse", 1):
        assert error < 0.2 * noise


def test_the_classifier_stays_in_evaluation_mode_and_is_not_trained():
    model, _ = stripes()
    net = with_denoiser(model.net, SIZES).train()
    assert net.training and net.residual.training and not net.classifier.training
    assert not any(weight.requires_grad for weight in net.classifier.parameters())


def test_a_file_states_its_denoiser_and_opens_without_code(tmp_path):
    net = with_denoiser(cnn(side=8, width=2, depth=2, hidden=4), SIZES)
    nn.init.normal_(net.residual[-1].weight)
    arguments = {"side": 8, "width": 2, "depth": 2, "hidden": 4}
    metadata = {"architecture": "cnn", "arguments": arguments, "denoiser": SIZES}
    path = tmp_path / "model.safetensors"
    path.write_bytes(written(net, metadata))
    opened, x = open_model(str(path)), torch.rand(3, 1, 8, 8)
    assert isinstance(opened.model.net, DenoisedNetwork)
    assert opened.architecture["denoiser"] == SIZES
    torch.testing.assert_close(opened.model(x), net(x))
    for wrong in ({"channels": 1, "width": 8}, {**SIZES, "depth": 1}, {**SIZES, "width": "8"}, [1, 8, 3]):
        path.write_bytes(written(net, {**metadata, "denoiser": wrong}))
        with pytest.raises(TargetError, match="denoiser is .* channels, width and depth"):
            open_model(str(path))
    path.write_bytes(written(net, {**metadata, "denoiser": {**SIZES, "depth": 1_000_000}}))
    with pytest.raises(TargetError, match="do not fit"):
        open_model(str(path))


@pytest.mark.slow
def test_harden_puts_a_denoiser_in_front_and_returns_both(tmp_path):
    model, data = stripes(640)
    recipe = {"use": "denoised", "sigma": 0.5, "width": 4, "depth": 2, "training": {"epochs": 1, "batch": 64}}
    found = holdfast.harden(
        model, (data.x, data.y), "l2:0.3", recipe, suite="quick", n=8, doubts=False, device="cpu"
    )
    new = found.model.net
    assert isinstance(new, DenoisedNetwork) and not isinstance(model.net, DenoisedNetwork)
    assert all(
        torch.equal(value, new.classifier.state_dict()[name])
        for name, value in model.net.state_dict().items()
    )
    assert found.before["clean_accuracy"].value == 1


def test_an_input_without_a_denoiser_is_refused_with_a_remedy():
    model, data = stripes()
    with pytest.raises(UsageError, match="put an untrained one in front"):
        next(Denoising()(model, data, ThreatModel(L2(0.5)), rng=Draws(0)))
    model.net = with_denoiser(model.net, SIZES)
    with pytest.raises(UsageError, match="both 0"):
        next(Denoising(mse=0, stability=0)(model, data, ThreatModel(L2(0.5)), rng=Draws(0)))
    with pytest.raises(UsageError, match="depth at least 2"):
        DenoisedNetwork(model.net, 1, depth=1)
    table = nn.Sequential(nn.Linear(6, 3)), (torch.rand(60, 6), torch.arange(60) % 3)
    with pytest.raises(UsageError, match=r"inputs have shape \(6,\); give recipe="):
        holdfast.harden(*table, "l2:0.3", "denoised", n=5, device="cpu")
    rejecting = with_detector(stripes()[0].net, lambda x: x.flatten(1).mean(1), 0.9)
    with pytest.raises(UsageError, match="harden the network without its detector"):
        holdfast.harden(rejecting, (data.x, data.y), "l2:0.3", "denoised", n=5, device="cpu")
