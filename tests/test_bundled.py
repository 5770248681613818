"""The bundled networks and images, and the catalogue of small networks that they come from."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from torch.nn import functional as F

import holdfast
from holdfast.generators.networks import bundled_generators, opened_generator
from holdfast.io.models.architectures import ARCHITECTURES
from holdfast.io.models.models import open_model

BUNDLED = Path(holdfast.__file__).with_name("bundled")
NETWORKS = ("mnist-cnn", "mnist-cnn-hardened")


def test_mnist_mini_is_the_first_images_of_mnist(data_folder):
    with np.load(BUNDLED / "mnist-mini.npz") as mini, np.load(data_folder / "mnist.npz") as whole:
        for name, n in {"x_train": 5000, "y_train": 5000, "x_test": 1000, "y_test": 1000}.items():
            assert mini[name].dtype == np.uint8
            np.testing.assert_array_equal(mini[name], whole[name][:n])


@pytest.fixture(scope="module")
def digits():
    with np.load(BUNDLED / "mnist-mini.npz") as mini:
        return torch.from_numpy(mini["x_test"])[:, None].float() / 255, torch.from_numpy(
            mini["y_test"]
        ).long()


def opened(name):
    path = BUNDLED / f"{name}.safetensors"
    with safetensors.safe_open(path, framework="pt") as file:
        stored = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
    described = json.loads(stored["holdfast"])
    assert list(stored) == ["holdfast"] and stored["holdfast"] == json.dumps(described, sort_keys=True)
    net = ARCHITECTURES[described["architecture"]](**described["arguments"])
    net.load_state_dict(tensors)
    return net.eval(), described


@pytest.mark.parametrize("name, accuracy", [("mnist-cnn", 0.99), ("mnist-cnn-hardened", 0.98)])
def test_a_bundled_network_is_small_right_and_carded(name, accuracy, digits):
    net, described = opened(name)
    x, y = digits
    n_parameters = sum(p.numel() for p in net.parameters())
    assert n_parameters <= 200_000
    with torch.no_grad():
        logits = net((x - described["mean"][0]) / described["std"][0])
    assert logits.shape == (1000, described["classes"])
    assert (logits.argmax(1) == y).double().mean() >= accuracy
    card = (BUNDLED / f"{name}.md").read_text(encoding="utf-8")
    assert all(
        word in card for word in ("make bundled", "clean accuracy", "CC BY-SA 3.0", f"{n_parameters:,}")
    )


def test_hardening_holds_where_the_standard_network_breaks(digits):
    x, y = (part[:200] for part in digits)
    share = {}
    for name in NETWORKS:
        net, described = opened(name)
        mean, std = described["mean"][0], described["std"][0]
        x_adv = x.clone()
        for _ in range(10):
            x_adv.requires_grad_(True)
            loss = F.cross_entropy(net((x_adv - mean) / std), y)
            (gradient,) = torch.autograd.grad(loss, x_adv)
            x_adv = (x_adv.detach() + 0.05 * gradient.sign()).clamp(x - 0.2, x + 0.2).clamp(0, 1)
        share[name] = (net((x_adv - mean) / std).argmax(1) == y).double().mean().item()
    assert share["mnist-cnn"] < 0.3
    assert share["mnist-cnn-hardened"] > 0.9


@pytest.mark.slow
@pytest.mark.parametrize(("name", "eps"), [("mnist-cnn", 0.1), ("mnist-cnn-hardened", 0.3)])
def test_no_doubt_is_raised_against_a_bundled_network(name, eps):
    found = holdfast.assess(name, "mnist-mini", f"linf:{eps}", "fast", n=64)
    assert [doubt.name for doubt in found.doubts if doubt.state == "raised"] == []


@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - {"detector", "unet"}))  # of other outputs
def test_a_catalogue_network_takes_its_inputs_and_knows_its_classes(name):
    net = ARCHITECTURES[name]().eval()
    x = torch.zeros(2, 3, 32, 32) if name == "resnet" else torch.zeros(2, 1, 28, 28)
    assert net(x).shape == (2, 10)


def test_catalogue_settings_change_the_network():
    assert ARCHITECTURES["cnn"](channels=3, side=32, classes=4, depth=2)(torch.zeros(1, 3, 32, 32)).shape == (
        1,
        4,
    )
    assert ARCHITECTURES["mlp"](features=12, classes=3, depth=0)(torch.zeros(1, 12)).shape == (1, 3)
    assert ARCHITECTURES["resnet"](channels=1, blocks=2)(torch.zeros(2, 1, 16, 16)).shape == (2, 10)


def test_the_bundled_generators_are_small_and_open_by_name():
    bundled = bundled_generators()
    assert sum(path.stat().st_size for path in bundled.values()) < 3_000_000
    for name, path in bundled.items():
        assert path.with_suffix(".md").is_file()
        opened = opened_generator(name)
        assert opened.name == name
        assert opened.notes(0) == ()
        assert opened.samples(2, 0).shape == (2, 1, 28, 28)


def test_the_diffusion_model_generates_digits_of_the_classes_that_are_named():
    generator = opened_generator("mnist-diffusion").generator
    classes = torch.arange(50) % 10
    samples = generator.sample(50, 0, classes)
    with torch.no_grad():
        predicted = open_model("mnist-cnn").model(samples).argmax(1)
    assert (predicted == classes).float().mean() > 0.8
