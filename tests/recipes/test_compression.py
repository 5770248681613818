"""Pruned networks and networks of 8-bit integers: what their files contain, and what attacks on them show."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import holdfast
from holdfast.attacks import PGD
from holdfast.core.batch import Batch
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.training import WEIGHTS
from holdfast.io.models.architectures import (
    int8_layers,
    layers_of,
    naive_gradients,
    packed,
    set_ranges,
    with_int8,
)
from holdfast.io.models.models import open_model
from holdfast.recipes import Int8, Prune
from holdfast.recipes.training.fit import Saving, Training
from holdfast.testing.recipes import same
from holdfast.verbs.opening.recipes import build_recipe

THREAT = ThreatModel(Linf(0.1))
SHORT = Training(epochs=3, batch=64, lr=5e-3, weight_decay=0.0, warmup=0.0)
NET = "from torch import nn\n\ndef make():\n    return nn.Sequential({layers})\n"
LAYERS = (
    "nn.Conv2d(1, 6, 3, padding=1, padding_mode='reflect'), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), "
    "nn.Linear(216, 16), nn.ReLU(), nn.Linear(16, 3)"
)


def images(n=400, seed=0):
    """Images of three classes: which third of the rows is brighter."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=rng)
    x = 0.3 * torch.rand(n, 1, 6, 6, generator=rng)
    for row in range(2):
        x[torch.arange(n), 0, 2 * y + row] += 0.4
    return Batch(x, y, torch.arange(n))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("net") / "net.py"
    path.write_text(NET.format(layers=LAYERS))
    return f"{path}:make"


class Tied(nn.Module):
    """A network that uses one layer under two names."""

    def __init__(self):
        super().__init__()
        self.first = self.second = nn.Linear(36, 36)
        self.last = nn.Linear(36, 3)

    def forward(self, x):
        return self.last(self.second(self.first(x.flatten(1)).relu()))


def test_a_layer_with_two_names_stays_pruned_when_weights_are_loaded():
    net = Tied()
    recipe = Prune(sparsity=0.5, steps=1, training=replace(SHORT, epochs=1, averaging="ema"))
    *_, last = recipe(Classifier(net), images(), THREAT, rng=Draws(0))
    tensors = {name.removeprefix(WEIGHTS): t for name, t in last.tensors.items() if name.startswith(WEIGHTS)}
    new = Classifier(Tied())
    new.load_state_dict(tensors)
    zeros = sum(int((layer.weight == 0).sum()) for layer in (new.net.first, new.net.last))
    assert zeros == round(0.5 * (36 * 36 + 3 * 36))


@pytest.fixture(scope="module")
def dense(source):
    """A network that is right about all examples."""
    torch.manual_seed(0)
    model, data = open_model(source).model.train(), images(seed=1)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data.x), data.y).backward()
        optimizer.step()
    model.eval()
    assert (model(data.x).argmax(1) == data.y).all()
    return model


def hardened(dense, recipe, **settings):
    train, test = images(1000, 2), images(120, 3)
    return holdfast.harden(
        dense.net,
        (test.x, test.y),
        "linf:0.25",
        recipe,
        fit=(train.x, train.y),
        suite=[PGD(steps=5)],
        doubts=False,
        n=120,
        **settings,
    )


@pytest.fixture(scope="module")
def small(dense):
    return hardened(dense, Int8(steps=2, training=replace(SHORT, epochs=1)))


def test_an_int8_layer_has_256_inputs_and_255_weights_for_each_channel():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.Flatten()), 3 * torch.rand(4, 2, 6, 6) - 1
    kernel, bias = net[0].weight.detach().clone(), net[0].bias.detach().clone()
    new = with_int8(nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.Flatten()), ["0"], trained=True)
    new.load_state_dict(
        {"0.weight": kernel, "0.bias": bias, "0.step": torch.ones(()), "0.lowest": torch.zeros(())}
    )
    layers = int8_layers(new)
    set_ranges(layers, Classifier(net), [x[:2], x[2:]])
    step, lowest = layers["0"].step, layers["0"].lowest
    assert float(step) == pytest.approx(float(x.max() - x.min()) / 255, rel=1e-5)
    whole = torch.round(x / step).clamp(lowest, lowest + 255)
    assert len(whole.unique()) <= 256
    scale = kernel.abs().amax((1, 2, 3), keepdim=True) / 127
    expected = nn.functional.conv2d(whole * step, (kernel / scale).round() * scale, bias, padding=1).flatten(
        1
    )
    torch.testing.assert_close(new(x), expected, rtol=0, atol=0)
    assert 0 < float((new(x) - net(x)).detach().abs().max()) < 0.05
    stored = packed(new.state_dict(), ["0"])
    assert stored["0.weight"].dtype == torch.int8 and int(stored["0.weight"].abs().max()) == 127
    final = with_int8(nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.Flatten()), ["0"])
    final.load_state_dict(stored)
    assert torch.equal(final(x), new(x))


def test_the_gradient_passes_through_the_rounding_unless_it_is_naive():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    new, x = with_int8(nn.Sequential(*net), ["1"]), torch.rand(2, 1, 6, 6, requires_grad=True)
    new[1].weight.data.copy_(torch.randint(-127, 128, (3, 36)))
    new[1].step.fill_(1 / 255)
    (grad,) = torch.autograd.grad(new(x)[:, 0].sum(), x)
    torch.testing.assert_close(grad[0].flatten(), new[1].weight[0].float())
    with naive_gradients(new):
        (grad,) = torch.autograd.grad(new(x)[:, 0].sum(), x)
    assert not grad.any()
    assert torch.autograd.grad(new(x)[:, 0].sum(), x)[0].any()


def test_a_shared_layer_is_rounded_once_and_other_kinds_are_left():
    shared = nn.Linear(4, 4)
    net = nn.Sequential(shared, nn.ReLU(), shared, nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)))
    assert layers_of(net) == ("0", "2")
    new = with_int8(net, layers_of(net))
    assert new[0] is new[2] and type(new[3]) is not type(new[0])
    assert isinstance(with_int8(nn.Linear(4, 2), [""]), type(new[0]))


@pytest.mark.parametrize("recipe", [Int8(), Prune()])
def test_a_network_without_layers_is_refused(recipe):
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(36, 3))

        def forward(self, x):
            return x.flatten(1) @ self.weight

    with pytest.raises(UsageError, match="give a network that is built of them"):
        recipe(Classifier(Bare()), images(), THREAT, rng=Draws(0))


def test_a_model_that_is_no_network_is_refused(dense):
    with pytest.raises(TargetError, match="no parameters to train"):
        hardened(Classifier(lambda x: dense(x).detach()), "int8")


@pytest.mark.parametrize("sparsity", [0, 1, 1.5, -0.1])
def test_a_sparsity_must_leave_some_weights_and_remove_some(sparsity):
    with pytest.raises(UsageError, match="sparsity"):
        build_recipe({"use": "prune", "sparsity": sparsity})


def zeros_of(tensors):
    return {
        name: value == 0
        for name, value in tensors.items()
        if name in ("net.0.weight", "net.4.weight", "net.6.weight")
    }


def weights_of(checkpoint):
    return {
        name.removeprefix(WEIGHTS): t for name, t in checkpoint.tensors.items() if name.startswith(WEIGHTS)
    }


@pytest.mark.parametrize("averaging", ["ema", "none"])
def test_every_checkpoint_is_pruned_as_far_as_the_last_and_zeros_stay_zero(dense, averaging):
    recipe = Prune(0.8, gradual=0.6, steps=2, training=replace(SHORT, averaging=averaging))
    checkpoints = list(recipe(dense, images(seed=2), THREAT, rng=Draws(0)))
    n = sum(mask.numel() for mask in zeros_of(dense.state_dict()).values())
    for checkpoint in checkpoints:
        assert sum(int(mask.sum()) for mask in zeros_of(weights_of(checkpoint)).values()) == round(0.8 * n)
    pruned = [
        torch.cat([~value.flatten() for name, value in checkpoint.tensors.items() if "kept." in name])
        for checkpoint in checkpoints
    ]
    assert int(pruned[0].sum()) < int(pruned[1].sum()) == int(pruned[2].sum()) == round(0.8 * n)
    assert bool((pruned[1] <= pruned[2]).all() and (pruned[0] <= pruned[1]).all())
    assert torch.equal(
        pruned[2], torch.cat([m.flatten() for m in zeros_of(weights_of(checkpoints[-1])).values()])
    )


def test_the_smallest_weights_are_pruned_at_once_without_a_gradual_start(dense):
    recipe = Prune(0.5, gradual=0.0, steps=1, training=replace(SHORT, epochs=1, batch=400, lr=1e-9))
    (checkpoint,) = recipe(dense, images(seed=2), THREAT, rng=Draws(0))
    sizes = torch.cat([dense.state_dict()[name].abs().flatten() for name in zeros_of(dense.state_dict())])
    pruned = torch.cat([mask.flatten() for mask in zeros_of(weights_of(checkpoint)).values()])
    assert sizes[pruned].max() <= sizes[~pruned].min() + 1e-6


@pytest.mark.parametrize(
    "recipe", [Prune(0.8, steps=2, training=SHORT), Int8(steps=2, training=SHORT)], ids=["prune", "int8"]
)
def test_it_resumes_within_an_epoch(dense, recipe):
    kept, data = [], images(seed=2)
    saving = replace(recipe, training=replace(SHORT, saving=Saving(4, kept.append)))
    *_, whole = saving(dense, data, THREAT, rng=Draws(0))
    assert [(one.epoch, one.step) for one in kept] == [(0, 4), (1, 2), (2, 4)]
    for begun in kept:
        *_, resumed = recipe(dense, data, THREAT, rng=Draws(0), after=begun)
        assert same(resumed, whole)


def test_a_file_of_8_bits_is_smaller_and_opens_as_the_same_model(small, source, tmp_path):
    result = small
    place = result.write(tmp_path / "small") / "model.safetensors"
    assert {name: value.dtype for name, value in load_file(place).items()}["4.weight"] == torch.int8
    opened, x = open_model(str(place), arch=source), images(50, 4).x
    assert torch.equal(opened.model(x), result.model(x))
    assert "3 layers have weights and inputs of 8 bits" in opened.notes[-1]
    assert result.card["model"]["parameters"] > 3000
    entry = result.card["follow_up"]
    assert entry["bytes"]["after"] < 0.45 * entry["bytes"]["before"]
    shares = entry["robust_accuracy"]
    assert shares["worst"] <= min(shares["through"], shares["transferred"]) < shares["naive"] == 1.0
    assert "An overestimate is 100.0 %" in str(result.notes)
    with pytest.raises(UsageError, match="give a network that is built of them"):
        Int8()(opened.model, images(), THREAT, rng=Draws(0))
    other = tmp_path / "other.py"
    other.write_text(NET.format(layers=LAYERS.replace("nn.Linear(216, 16)", "nn.LazyLinear(16)")))
    with pytest.raises(TargetError, match="no linear or convolutional layer"):
        open_model(str(place), arch=f"{other}:make")


def test_weights_of_8_bits_are_not_trained(small):
    test = images(60, 3)
    with pytest.raises(
        TargetError, match="3 layers of the model have weights of 8 bits .* are not trained; give"
    ):
        holdfast.audit.poison((test.x, test.y), model=small.model)


def test_a_naive_attack_on_8_bits_raises_a_doubt(small):
    test = images(120, 3)

    def assessed():
        return holdfast.assess(small.model.net, (test.x, test.y), "linf:0.25", [PGD(steps=10)], n=40)

    true = assessed()
    with naive_gradients(small.model.net):
        naive = assessed()
    raised = {doubt.name for doubt in naive.doubts if doubt.state == "raised"}
    assert "zero-gradient" in raised
    assert "zero-gradient" not in {doubt.name for doubt in true.doubts if doubt.state == "raised"}
    assert naive.metrics["suite_robust_accuracy"].value > true.metrics["suite_robust_accuracy"].value


def test_rounding_has_no_bounds(small):
    test = images(2, 3)
    with pytest.raises(UsageError, match=r"no sound bounds are known for the operation aten\.round"):
        holdfast.certify(small.model, (test.x, test.y), "linf:0.1", method="ibp", n=2)


def test_the_card_of_a_pruned_network_states_its_size(dense, tmp_path, source):
    result = hardened(dense, Prune(0.75, steps=2, training=replace(SHORT, epochs=2)))
    place = result.write(tmp_path / "sparse") / "model.safetensors"
    n = sum(mask.numel() for mask in zeros_of(dense.state_dict()).values())
    opened = open_model(str(place), arch=source).model
    assert sum(int(mask.sum()) for mask in zeros_of(opened.state_dict()).values()) == round(0.75 * n)
    entry = result.card["follow_up"]
    assert entry["sparsity"] == pytest.approx(0.75, abs=1 / n)
    assert entry["bytes"]["after"] == entry["bytes"]["before"] - 4 * round(0.75 * n) + -(-n // 8)
    assert "naive" not in entry["robust_accuracy"]
    assert "need one bit" in (tmp_path / "sparse" / "card.md").read_text()
