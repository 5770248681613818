"""The sensitivity of generators beside closed forms of linear ones, evasion, the pictures, and errors."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import holdfast
from benchmarks.forging import accepted_fields
from holdfast.audits.generator.attacks import Autoencoder, Discriminator, input_radius
from holdfast.audits.generator.sensitivity import (
    UNBOUNDED,
    Context,
    LatentChange,
    Search,
    distances,
    latent_radius,
    perturbed,
    sensitive_directions,
    worst_latents,
)
from holdfast.cli.app import run as command
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError, UsageError
from holdfast.io.models.generators import open_generator
from holdfast.runs.store.columns import validated_columns
from holdfast.verbs.audit.opening_generators import refuse_condition

LATENT, SHAPE = 4, (1, 4, 4)


def random(seed):
    return torch.Generator().manual_seed(seed)


MATRIX = 0.1 * torch.randn(16, LATENT, generator=random(0))
OFFSETS = 0.3 * torch.randn(3, 16, generator=random(1))
SINGULAR = torch.linalg.svdvals(MATRIX)


class Linear(nn.Module):
    """Linear generator, autoencoder and discriminator, conditional if `classes` is given."""

    latent_shape = (LATENT,)

    def __init__(self, classes=None, shape=(16,), matrix=MATRIX):
        super().__init__()
        self.classes, self.shape = classes, shape
        self.matrix = nn.Parameter(matrix.clone())
        self.back = nn.Parameter(torch.linalg.pinv(matrix))
        self.weight = nn.Parameter(torch.ones(16))

    def decode(self, z, condition=None):
        offset = 0 if condition is None else OFFSETS[condition]
        return (z @ self.matrix.T + offset).view(-1, *self.shape)

    def encode(self, x):
        return x.flatten(1) @ self.back.T

    def discriminate(self, x):
        return x.flatten(1) @ self.weight

    def sample(self, n, seed, condition=None):
        return self.decode(torch.randn(n, LATENT, generator=random(seed)), condition).detach()


class Plain:
    """Generator without any other ability."""

    def sample(self, n, seed):
        return data(n, seed).x


def data(n, seed, shape=(16,)):
    x = (torch.randn(n, LATENT, generator=random(seed)) @ MATRIX.T).view(n, *shape)
    x = x + 0.01 * torch.randn(n, *shape, generator=random(seed + 50))
    return Batch(x, torch.arange(n) % 3, torch.arange(n))


def context(generator, shape=(16,)):
    opened = open_generator(generator)
    return Context(
        opened.samples(120, 0),
        data(300, 1, shape),
        data(200, 2, shape),
        opened,
        torch.device("cpu"),
        Draws(0),
    )


def finding(part, where):
    assert part.missing(where) == ""
    columns = part.measure(where)
    validated_columns("part", columns, part.forms(), {})
    return part.concluded(columns)


def test_the_worst_latent_change_of_a_linear_decoder_is_along_its_first_singular_vector():
    decode, z = Linear().decode, torch.randn(6, LATENT, generator=random(3))
    worst = worst_latents(decode, z, 0.1, Draws(0), search=Search(steps=40)).detach()
    found = distances(decode(worst), decode(z)).detach()
    assert found.tolist() == pytest.approx([0.2 * float(SINGULAR[0])] * 6, rel=1e-3)
    assert float(distances(worst, z).max()) <= 0.2 * (1 + 1e-6)
    random_change = distances(decode(perturbed(z, latent_radius(z, 0.1), UNBOUNDED, Draws(1))), decode(z))
    assert bool((random_change < found).all())


def test_the_sensitive_directions_of_a_linear_decoder_are_its_singular_vectors():
    z = torch.randn(5, LATENT, generator=random(3))
    directions, gains = sensitive_directions(Linear().decode, z, 2, Draws(0), iterations=60)
    assert gains.tolist() == pytest.approx(SINGULAR[:2].tolist(), rel=1e-3)
    expected = torch.linalg.svd(MATRIX).Vh[:2]
    assert (directions * expected).sum(1).abs().tolist() == pytest.approx([1, 1], abs=1e-3)


def test_the_search_reaches_the_largest_value_of_a_linear_function_and_stays_valid():
    x, radius = torch.full((4, 9), 0.5), torch.tensor([0.0, 0.1, 0.2, 0.4])
    weight = torch.linspace(-1, 1, 9)
    found = Search()(lambda point: point @ weight, x, radius, UNBOUNDED, Draws(0))
    assert ((found - x) @ weight).tolist() == pytest.approx((radius * weight.norm()).tolist(), rel=1e-3)
    clipped = Search()(lambda point: point @ weight, x, 10 + radius, holdfast.Bounds(0, 1), Draws(0))
    assert float(clipped.min()) >= 0
    assert float(clipped.max()) <= 1


def test_the_sensitivity_of_a_linear_generator_is_that_of_the_closed_form():
    found = finding(LatentChange(0.1), context(Linear()))
    sensitivity = found.metrics["latent_sensitivity"]
    assert sensitivity.value == pytest.approx(0.1 * LATENT**0.5 * float(SINGULAR[0]), rel=1e-3)
    assert found.facts["latent_random"] < sensitivity.value < found.facts["sample"]
    assert found.facts["gains"] == pytest.approx(SINGULAR[:3].tolist(), rel=0.02)
    assert [table.title for table in found.tables] == [
        "Sensitivity",
        "Most sensitive latent directions",
        "Features that change most",
    ]
    feature = int(found.tables[2].rows[0][0])
    assert feature == int(torch.linalg.svd(MATRIX).U[:, 0].abs().argmax())


def test_the_worst_change_of_the_condition_is_that_of_the_closed_form():
    found = finding(LatentChange(0.1, condition=1), context(Linear(classes=3)))
    apart = (OFFSETS - OFFSETS[1]).norm(dim=1)
    assert found.facts["condition"] == pytest.approx(float(apart.max()), rel=1e-4)
    assert found.facts["condition_random"] == pytest.approx(float(apart[2]), rel=1e-4)


def test_adversarial_inputs_change_more_than_random_ones():
    # with orthogonal columns, latent vectors have the distances of the outputs up to a factor
    where = context(Linear(matrix=0.3 * torch.linalg.qr(MATRIX).Q))
    autoencoder = finding(Autoencoder(0.1), where).facts
    # the reconstruction is a projection, so that it moves at most as far as the input
    radius = input_radius(where, 0.1)
    assert autoencoder["away_random"] < autoencoder["away"] <= radius * (1 + 1e-5)
    assert autoencoder["away"] == pytest.approx(radius, rel=0.02)
    assert autoencoder["towards"] < autoencoder["towards_random"]
    assert autoencoder["target"] - autoencoder["towards"] == pytest.approx(radius, rel=0.05)
    assert autoencoder["auddc"] == pytest.approx(0.5, abs=0.02)  # the straight line from example to target
    assert autoencoder["auddc_random"] > 0.6
    evasion = finding(Discriminator(0.5), where).facts
    for name in ("generated", "real"):
        assert evasion[f"{name}_worst"] >= evasion[f"{name}_random"]
    assert evasion["real_worst"] > evasion["real_unchanged"] + 0.1


def test_images_are_shown_with_the_directions_and_the_part_that_changes():
    where = context(Linear(shape=SHAPE), SHAPE)
    titles = [picture.title for picture in finding(LatentChange(0.1), where).pictures]
    assert len(titles) == 4
    assert titles[0].startswith("Sensitive latent direction 1: the output changes by")
    pictures = {"autoencoder": Autoencoder(0.1), "moved": LatentChange(0.1)}
    for name, part in pictures.items():
        images = part.images(part.measure(where), where)[name]
        (picture,) = (each for each in finding(part, where).pictures if each.name == name)
        assert len(images) == len(picture.captions)
        assert 0 <= float(images.min()) <= float(images.max()) <= 1


def test_what_a_generator_lacks_is_named():
    parts = (LatentChange(0.1), Autoencoder(0.1), Discriminator(0.1))
    lacking = [part.missing(context(Plain())) for part in parts]
    assert lacking == ["decode(z)", "encode(x)", "discriminate(x)"]
    fixed = Linear()
    where = context(fixed)
    fixed.decode = lambda z: Linear().decode(z).detach()
    assert parts[0].missing(where) == "gradients of decode(z)"
    fixed.decode = lambda z: 0 * z.detach() @ fixed.matrix.T
    assert parts[0].missing(where) == "gradients of decode(z)"


def test_a_decoder_of_many_operations_is_attacked_with_fewer_latent_vectors():
    found = finding(LatentChange(0.1, work=1500), context(Linear()))
    assert found.metrics["latent_sensitivity"].n == 1500 // (2 * LATENT * 16)
    assert finding(LatentChange(0.1, work=1), context(Linear())).metrics["latent_sensitivity"].n == 8


@pytest.mark.parametrize(
    ("decode", "message"),
    [
        (lambda z: z, "samples of shape"),
        (lambda z: z.sum(), "expected a tensor with"),
        (lambda z: (z @ MATRIX.T) / 0, "NaN or infinity"),
        (lambda z: z @ MATRIX, "raised RuntimeError"),
    ],
)
def test_a_broken_decoder_is_refused(decode, message):
    broken = Linear()
    where = context(broken)
    broken.decode = decode
    with pytest.raises(TargetError, match=message):
        LatentChange(0.1).missing(where)


def test_a_condition_that_does_not_exist_is_refused():
    with pytest.raises(UsageError, match="condition is 3, and g has 3 classes; a class from 0 to 2"):
        refuse_condition(3, "g", 3)
    with pytest.raises(UsageError, match="is not a conditional generator"):
        refuse_condition(0, "g", None)


def test_the_audit_has_the_sensitivity_of_one_class_and_a_gate():
    train, held_out = ((batch.x, batch.y) for batch in (data(600, 1), data(700, 2)))
    result = holdfast.audit.generator(
        Linear(classes=3),
        train,
        held_out=held_out,
        samples=200,
        device="cpu",
        condition=1,
        gates=["latent_sensitivity <= 0.001"],
    )
    assert result.exit_code == 1
    assert {"sensitivity", "autoencoder", "discriminator"} <= set(result.facts)
    with pytest.raises(UsageError, match="no example of the data has this label"):
        holdfast.audit.generator(
            Linear(classes=9), train, held_out=held_out, samples=200, device="cpu", condition=8
        )


def test_the_command_resumes_to_the_same_facts_and_skips_the_search(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, batch in (("train", data(600, 1)), ("test", data(400, 2))):
        np.savez(f"{name}.npz", x=batch.x.numpy(), y=batch.y.numpy())
    (tmp_path / "gen.py").write_text(
        "import torch\n\n\nclass Generator:\n    latent_shape = (4,)\n\n    def decode(self, z):\n"
        "        return torch.tanh(z.repeat(1, 4)) / 4\n\n    def sample(self, n, seed):\n"
        "        return self.decode(torch.randn(n, 4, generator=torch.Generator().manual_seed(seed)))\n\n\n"
        "def make():\n    return Generator()\n"
    )
    audit = ["audit", "generator", "gen.py:make", "train.npz", "--held-out", "test.npz", "--samples", "200"]
    assert command([*audit, "--run", "a", "-o", "a.json"]) == 0
    assert command([*audit, "--run", "a", "--resume", "-o", "b.json"]) == 0
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert first["facts"] == second["facts"]
    assert not accepted_fields(tmp_path / "a", 6, tmp_path / "copy")
    assert 0 < first["facts"]["sensitivity"]["latent_random"] < first["facts"]["sensitivity"]["latent"]
    assert command([*audit, "--latent", "0", "-o", "c.json"]) == 0
    assert "sensitivity" not in json.loads((tmp_path / "c.json").read_text())["facts"]
