"""Everything that computes follows the device of its input: each attack, constraint, recipe and prover on a pretended
device.
"""

from copy import deepcopy
from dataclasses import fields, replace

import pytest
import torch
from torch import nn

import cases
from holdfast import certifiers, recipes
from holdfast.attacks import AdversarialPatch, Corruption, Universal, UniversalDeepFool
from holdfast.certifiers.bounds import tracing
from holdfast.core.catalogue import PROVERS, RECIPES, load
from holdfast.core.constraints import L0, L1, L2, Linf, allowed
from holdfast.core.draws import Draws
from holdfast.core.model import Bounds, Classifier
from holdfast.core.threat import ThreatModel
from holdfast.corruptions import EXTRA, STANDARD
from holdfast.doubts.probing import probes_for
from holdfast.io.models.composed import with_denoiser
from holdfast.recipes.training.recipe import trained_as
from holdfast.runs.harness.measure import measure
from holdfast.testing import laws
from holdfast.testing.fakes import examples, labelled, network, relu_problem
from holdfast.testing.recipes import SHORT
from holdfast.testing.shapes import unchecked
from holdfast.threats.transformations import Corruptions, Patch
from holdfast.threats.triggers import Stamped, Trigger, trigger_text
from pretended_device import CPU, DEVICE, Pretended, pretended

N, STEPS, QUERIES = 4, 2, 12


@pytest.fixture(autouse=True)
def _device():
    with unchecked():
        yield


def brief(attack):
    """The attack with the fewest steps and queries that still run all of its code."""
    limits = {
        "steps": STEPS,
        "queries": QUERIES,
        "passes": 1,
        "fits": 1,
        "examples": N,
        "batch": N,
        "refine": 1,
        "turns": 2,
        "values": 2,
    }
    settings = {field.name for field in fields(attack)} & set(limits)
    return replace(attack, **{name: min(getattr(attack, name), limits[name]) for name in settings})


@pytest.fixture(autouse=True)
def _recorded(monkeypatch):
    """PyTorch records operations on fake tensors, which it cannot make from a tensor subclass: the operations are those
    of a copy on the CPU, with the weights on the device.
    """
    recorded = tracing._recorded

    def of_a_copy(model, x):
        if not isinstance(x, Pretended):
            return recorded(model, x)
        copied = deepcopy(model).to(CPU)
        module = recorded(copied, x.cpu())
        weights = {id(value): name for name, value in [*copied.named_parameters(), *copied.named_buffers()]}
        on_device = dict([*model.named_parameters(), *model.named_buffers()])
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            delattr(module, name)
            setattr(module, name, on_device[weights[id(value)]] if id(value) in weights else value.to(DEVICE))
        for node in module.graph.nodes:
            node.kwargs = {**node.kwargs, **({"device": DEVICE} if "device" in node.kwargs else {})}
        return module

    monkeypatch.setattr(tracing, "_recorded", of_a_copy)


def there(function, *arguments):
    """The result of a function on the pretended device."""
    with pretended():
        return function(*(argument.to(DEVICE) for argument in arguments))


def same(expected, found):
    assert isinstance(found, Pretended)
    torch.testing.assert_close(found.values_on_cpu, expected, equal_nan=True)


@pytest.mark.parametrize("case", [*cases.ATTACKS, *cases.LIMITED], ids=repr)
def test_an_attack_follows_the_device_of_its_input(case):
    case = replace(case, attack=brief(case.attack))
    model, batch, threat = laws.problem(case, n=N)

    def attacked(model, batch):
        return laws.run(case, model, batch, threat)[0]

    same(attacked(model, batch), there(attacked, model, batch))


LEARNED = [
    (Universal(), Linf(0.2)),
    (AdversarialPatch(), Patch(2, 2, "centre", 1)),
    (UniversalDeepFool(), L2(1.0)),
]


@pytest.mark.parametrize(("attack", "constraint"), LEARNED, ids=lambda each: type(each).__name__)
def test_an_attack_that_is_learned_follows_the_device_of_its_input(attack, constraint):
    attack, model, threat = brief(attack), network(), ThreatModel(constraint)
    batch = labelled(model, examples(n=N))

    def attacked(model, batch):
        learned = attack.fit(model, batch, threat, rng=Draws(0))
        return attack.fitted(learned)(model, batch, threat, rng=Draws(0))

    same(attacked(model, batch), there(attacked, model, batch))


@pytest.mark.parametrize("name", [*STANDARD, *EXTRA])
def test_a_corruption_follows_the_device_of_its_input(name):
    batch = examples(n=N, shape=(3, 32, 32), dtype=torch.float32)

    def attacked(batch):
        return Corruption(name)(network(), batch, ThreatModel(Corruptions(3)), rng=Draws(0))

    same(attacked(batch), there(attacked, batch))


NORMS = [*(norm(2.0) for norm in (Linf, L2, L1, L0)), L0(2.0, per="pixel")]
"""the other constraints are those of attacks above"""
BOUNDS = [Bounds(), Bounds(torch.zeros(3, 4, 4), torch.ones(3, 4, 4))]


@pytest.mark.parametrize("bounds", BOUNDS, ids=["numbers", "tensors"])
@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_a_norm_follows_the_device_of_its_input(norm, bounds):
    batch = examples(n=N)

    def computed(batch):
        step = 2 * Draws(0).normal(batch.ids, *batch.x.shape[1:], dtype=batch.x.dtype)
        points = [
            norm.project(batch.x + step, batch.x, bounds),
            norm.within(batch.x + step, batch.x, bounds, batch.x.new_full((N,), 1.0)),
            norm.sample(batch, bounds, Draws(0)),
        ]
        judged = torch.cat([allowed(norm, point, batch.x, bounds) for point in points]).double()
        return torch.cat(
            [judged, *(point.flatten() for point in (*points, norm.steepest(step, batch.x, bounds)))]
        )

    same(computed(batch), there(computed, batch))


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "masked-words"])  # texts are on the CPU
def test_a_recipe_follows_the_device_of_its_data(name):
    entry = RECIPES[name]
    recipe = brief(getattr(recipes, entry.cls)(**entry.settings))
    model, surrogate = network(1).requires_grad_(), network(5)
    data = labelled(network(), examples(n=2 * N))
    if isinstance(recipe, recipes.Denoising):
        model.net = with_denoiser(model.net, {"channels": 3, "width": 4, "depth": 2}).eval()
    if isinstance(recipe, recipes.MultiNormTraining):
        recipe = replace(recipe, others=(L2(0.2), L1(0.5)))
    if isinstance(recipe, recipes.GeneratedData):
        recipe = replace(recipe, confidence=0.0)
    if isinstance(recipe, recipes.HAT):
        model = network().requires_grad_()

    def trained(model, data, surrogate):
        threat = ThreatModel(Linf(0.05), surrogates=(surrogate,))
        if isinstance(recipe, recipes.Repair | recipes.FTSAM):
            square = torch.zeros(data.x.shape[1:])
            square[..., :2, :2] = 1
            threat = ThreatModel(Stamped("square", trigger_text(Trigger(square, square, 1))))
        if isinstance(recipe, recipes.MaskedPatches):
            threat = ThreatModel(Patch(2, 2))
        # a generator that was hardly trained is not judged
        short, used = replace(SHORT, epochs=1, batch=N, trial=name == "generated"), recipe
        if isinstance(recipe, recipes.RSLAD):
            used = recipe.taught_by(surrogate)
        *_, last = trained_as(used, short)(model, data, threat, rng=Draws(0))
        return last

    expected, found = trained(model, data, surrogate), there(trained, model, data, surrogate)
    for name, value in found.tensors.items():
        # a checkpoint is stored from the CPU
        torch.testing.assert_close(getattr(value, "values_on_cpu", value), expected.tensors[name])


def convolutional():
    """A network with the operations that the bounds distinguish."""
    torch.manual_seed(0)
    return (
        Classifier(
            nn.Sequential(
                nn.Conv2d(3, 4, 3, padding=1),
                nn.BatchNorm2d(4),
                nn.ReLU(),
                nn.AvgPool2d(2),
                nn.Flatten(),
                nn.Linear(16, 8),
                nn.Tanh(),
                nn.Linear(8, 4),
            ).double(),
            mean=(0.5, 0.4, 0.3),
            std=(0.2, 0.3, 0.2),
        )
        .eval()
        .requires_grad_(False)
    )


# trees and texts are never on a device, and the votes of partitions are tested with their recipe
OF_NETWORKS = [name for name in PROVERS if name not in ("masking", "partitions", "substitutions", "trees")]


@pytest.mark.parametrize("name", OF_NETWORKS)
def test_a_prover_follows_the_device_of_its_input(name):
    settings = {"smoothing": {"sigma": 0.5, "draws": 200}}.get(name, {})
    prover = brief(load("certifiers", name, type)(**settings))
    norm = L2 if name in ("lipschitz", "smoothing") else Linf
    threat = ThreatModel(Patch(1, 2) if name == "patch-masks" else norm(0.02))
    model = convolutional()
    batch = labelled(model, examples(n=N))

    def proved(model, batch):
        proofs = prover.ready(model, batch, threat)(batch)
        return torch.stack([proofs.certified, proofs.bound, proofs.broken, proofs.stopped]).double()

    same(proved(model, batch), there(proved, model, batch))


def test_branch_and_bound_divides_problems_on_the_device_of_its_input():
    oracle, batch = relu_problem(0)
    batch = batch.take(torch.tensor([3]))
    model, eps = oracle.classifier(), 0.97 * float(oracle.distance(batch.x, batch.y, Linf(1.0)))

    def proved(model, batch):
        proofs = certifiers.BranchAndBound(steps=STEPS).ready(model, batch, ThreatModel(Linf(eps)))(batch)
        assert proofs.work.max() > 5
        return torch.stack([proofs.certified, proofs.bound, proofs.broken]).double()

    same(proved(model, batch), there(proved, model, batch))


def test_operations_that_mix_devices_fail():
    x = torch.ones(3)
    with pretended():
        there = x.to(DEVICE).requires_grad_()
        assert there.device == DEVICE and (there + torch.ones(())).device == DEVICE
        assert torch.zeros(2, device=DEVICE).device == torch.tensor([1.0], device=DEVICE).device == DEVICE
        (gradient,) = torch.autograd.grad((there * there).sum(), there)
        assert gradient.device == DEVICE and gradient.cpu().tolist() == [2.0, 2.0, 2.0]
        assert there[[0, 2]].device == there[x > 0].device == DEVICE
        for mixed in (
            lambda: there + x,
            lambda: torch.cat((there, x)),
            lambda: torch.where(x > 0, there, 0.0),
            lambda: x[there > 0],
            lambda: torch.ones(()).add_(there.sum()),
            lambda: torch.rand(3, device=DEVICE, generator=torch.Generator()),
        ):
            with pytest.raises(RuntimeError, match=r"several devices|expected a generator"):
                mixed()


PROBES = [probe for probe in probes_for(ThreatModel(Linf(0.06))) if probe.name != "search"]
"""the search is that of `Square`, with many queries"""


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.name)
def test_a_probe_of_a_doubt_follows_the_device_of_its_input(probe):
    model, threat = network(), ThreatModel(Linf(0.06))
    batch = labelled(model, examples(n=N))

    def probed(model, batch):
        columns = probe.run(model, batch, threat, Draws(0))
        return torch.cat([column.double().flatten() for column in columns.values()])

    same(probed(model, batch), there(probed, model, batch))


def test_the_evidence_of_an_attack_is_on_the_cpu():
    case = cases.brief(cases.ATTACKS[0])
    model, batch, threat = laws.problem(case, n=N)
    expected = measure(model, [batch], [case.attack], threat)
    with pretended():
        found = measure(model.to(DEVICE), [batch.to(DEVICE)], [case.attack], threat)
    for name, column in expected.columns.items():
        torch.testing.assert_close(found[name], column)
