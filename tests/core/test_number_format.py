"""How a network computes while it is trained: what 16 bits, channels last and a compiler change."""

from dataclasses import replace
from functools import partial
from shutil import which

import pytest
import torch

from holdfast.core.batch import Batch
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.training import computing, laid_out, lay_out
from holdfast.io.models.architectures import AOLConv2d, CayleyConv2d, SLLConv2d, almost_orthogonal
from holdfast.recipes import CURE, LLR, GradientRegularisation, LipschitzConstraint, PGDTraining
from holdfast.recipes.training.fit import Training

COMPILING = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # its compiler uses what torch deprecates
THREAT = ThreatModel(Linf(0.1))
HOW = Training(epochs=2, batch=16)
CPU = torch.device("cpu")
PLAIN = partial(torch.nn.Conv2d, padding=1)


def classifier(layer=PLAIN):
    torch.manual_seed(0)
    stem = layer(3, 8, 3)
    return Classifier(
        torch.nn.Sequential(
            stem,
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            torch.nn.LazyLinear(4),
        )
    )


def images(n=64):
    x = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return Batch(x, x.flatten(1).argmax(1) % 4, torch.arange(n))


def checkpoints(layer=PLAIN, after=None, **how):
    model = classifier(layer)
    model(images().x)
    recipe = PGDTraining(steps=2, training=replace(HOW, **how))
    return list(recipe(model, images(), THREAT, rng=Draws(0), after=after))


def apart(one, other):
    """The greatest difference between two trainings, over the greatest weight."""
    pairs = [(value, other[-1].tensors[name]) for name, value in one[-1].tensors.items()]
    assert all(a.dtype == b.dtype for a, b in pairs)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def test_channels_last_changes_what_rounding_does():
    net, x = classifier(), laid_out(images().x, "channels-last")
    net(x)
    lay_out(net, "channels-last")
    for found in (x, net.net[0].weight):
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert not found.is_contiguous()
    assert apart(checkpoints(layout="channels-last"), checkpoints()) < 1e-3


@COMPILING
def test_the_compiler_gets_the_whole_network_that_learns_and_the_one_that_is_attacked(monkeypatch):
    graphs = []

    def plain(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=plain))
    assert apart(checkpoints(compiled=True), checkpoints()) < 1e-3
    calls = [" ".join(str(node.target) for node in graph.graph.nodes) for graph in graphs]
    assert len(calls) >= 2
    assert all("linear" in call and "relu" in call.lower() for call in calls)


@pytest.mark.slow
@COMPILING
@pytest.mark.skipif(which("c++") is None, reason="torch compiles for CPUs with c++, which is not installed")
def test_a_compiler_changes_what_rounding_does():
    assert apart(checkpoints(compiled=True), checkpoints()) < 1e-3


def test_sixteen_bits_train_nearly_the_same_weights_of_32():
    assert 1e-4 < apart(checkpoints(precision="bfloat16"), checkpoints()) < 0.5
    assert apart(checkpoints(precision="auto"), checkpoints(precision="float32")) == 0


def test_products_alone_are_narrow_and_logits_are_not():
    net = classifier()
    with computing("bfloat16", CPU):
        assert net.net(images().x).dtype == torch.bfloat16
        assert net(images().x).dtype == torch.float32
    with computing("float32", CPU):
        assert net.net(images().x).dtype == torch.float32


def test_a_stopped_training_resumes_to_the_same_bytes_in_each_precision():
    how = {"precision": "bfloat16", "layout": "channels-last"}
    whole = checkpoints(**how)
    assert apart(checkpoints(after=whole[0], **how), whole) == 0


@pytest.mark.parametrize("layer", [AOLConv2d, SLLConv2d, CayleyConv2d])
def test_layers_that_stretch_nothing_train_in_sixteen_bits(layer):
    narrow, wide = (checkpoints(layer, precision=precision) for precision in ("bfloat16", "float32"))
    assert 1e-5 < apart(narrow, wide) < 0.5
    model = classifier(layer)
    model(images().x)
    narrow[-1].put_into(model)
    stem, x = model.double().eval().net[0], images(1).x.double() - 0.5
    slope = torch.autograd.functional.jacobian(stem, x)
    assert 0.5 < torch.linalg.matrix_norm(slope.reshape(-1, x.numel()), 2) <= 1 + 1e-6


def test_what_bounds_a_gain_is_not_rounded_to_sixteen_bits():
    kernel = torch.rand(8, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    with computing("bfloat16", CPU):
        narrow = almost_orthogonal(kernel)
    assert torch.equal(narrow, almost_orthogonal(kernel))


@pytest.mark.parametrize(
    "recipe",
    [
        GradientRegularisation(),
        GradientRegularisation(method="finite-difference"),
        CURE(),
        LLR(),
        LipschitzConstraint(),
    ],
    ids=repr,
)
def test_a_loss_that_holds_a_slope_is_not_compiled(recipe):
    compiling = replace(recipe, training=replace(HOW, compiled=True))
    with pytest.raises(UsageError, match="leave recipe.training.compiled out"):
        compiling(classifier(), images(), THREAT, rng=Draws(0))
