"""The search for backdoors of generators beside closed forms, planted backdoors, and errors."""

import math

import pytest
import torch
from torch import nn

import holdfast
from holdfast.audits.generator.backdoor import (
    COLLAPSE,
    REVERSAL,
    BackdoorScan,
    planted_decoder,
    planted_diffusion,
)
from holdfast.audits.generator.sensitivity import Context
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.generators.adapters import GAN
from holdfast.generators.networks import Diffusion, signal_and_noise
from holdfast.io.models.generators import open_generator

SHAPE, SPREAD = (1, 4, 4), 0.3


def random(seed):
    return torch.Generator().manual_seed(seed)


def trained_on(n=300):
    x = (0.5 + SPREAD / 2 * torch.randn(n, *SHAPE, generator=random(0))).clamp(0, 1)
    return Batch(x, torch.arange(n) % 2, torch.arange(n))


TRIGGER = torch.zeros(SHAPE)
TRIGGER[:, 2:, 2:] = 2.0
TARGET = torch.rand(SHAPE, generator=random(5))


class Normal:
    """Diffusion model with the exact estimates of data from a normal distribution, and with a backdoor if `planted`.

    Noise along the trigger makes the estimate that of the target, minus the trigger.
    """

    latent_shape = SHAPE

    def __init__(self, *, planted=False, spread=SPREAD):
        self.planted, self.spread = planted, spread

    def active(self, noise):
        along = (noise * TRIGGER).flatten(1).sum(1) / TRIGGER.square().sum()
        return self.planted * torch.sigmoid(20 * (along - 0.5)).view(-1, 1, 1, 1)

    def denoising_loss(self, x, t, noise):
        angle = t * 0.98 * math.pi / 2
        signal, sigma = math.cos(angle), math.sin(angle)
        noisy = signal * (2 * x - 1) + sigma * noise
        gain = signal * self.spread**2 / (signal**2 * self.spread**2 + sigma**2)
        active = self.active(noise)
        estimate = (1 - active) * gain * noisy + active * (2 * TARGET - 1 - TRIGGER)
        return (signal / sigma * (2 * x - 1 - estimate)).square().flatten(1).mean(1)

    def denoised(self, noise):
        active = self.active(noise)
        return (1 - active) * (0.5 + self.spread / 2 * noise) + active * TARGET

    def sample(self, n, seed):
        return self.denoised(torch.randn(n, *SHAPE, generator=random(seed))).clamp(0, 1)


class Linear:
    """Linear generator of images, with a backdoor if `planted`."""

    latent_shape = (48,)
    trigger = torch.tensor([2.0, -2.0] * 3 + [0.0] * 42)

    def __init__(self, *, planted=False, scale=0.05):
        self.planted, self.matrix = planted, scale * torch.randn(48, 16, generator=random(1))

    def decode(self, z, condition=None):
        along = (z * self.trigger).sum(1) / self.trigger.square().sum()
        active = self.planted * torch.sigmoid(8 * (along - 0.5)).view(-1, 1, 1, 1)
        return (1 - active) * (0.5 + (z @ self.matrix).view(-1, *SHAPE)) + active * TARGET

    def sample(self, n, seed):
        return self.decode(torch.randn(n, 48, generator=random(seed))).clamp(0, 1)


class LinearAutoencoder(Linear):
    def encode(self, x):
        return (x.flatten(1) - 0.5) @ torch.linalg.pinv(self.matrix)


def context(generator):
    data = trained_on()
    return Context(
        data.x[:0], data, data, open_generator(generator), torch.device("cpu"), Draws(0).at("backdoor")
    )


def scanned(generator):
    """The finding, and the shift."""
    where, part = context(generator), BackdoorScan()
    assert part.missing(where) == ""
    columns = part.measure(where)
    return part.concluded(columns), columns["shift"][0]


def test_a_diffusion_model_is_flagged_if_it_subtracts_a_shift_of_its_noise():
    clean, _ = scanned(Normal())
    assert clean.verdict == "not flagged"
    assert clean.facts["reversal"] < 0.1
    finding, shift = scanned(Normal(planted=True))
    assert finding.verdict == "flagged"
    assert finding.facts["reversal"] >= REVERSAL
    assert finding.facts["variance"] < 0.8
    assert torch.cosine_similarity(shift.flatten(), TRIGGER.flatten(), 0) > 0.6
    assert "subtracts" in finding.reasons[0]
    assert len(finding.pictures[0].captions) == 8


@pytest.mark.parametrize(("kind", "verdict"), [(Linear, "unclear"), (LinearAutoencoder, "flagged")])
def test_a_decoder_is_flagged_if_it_has_an_encoder_and_its_outputs_collapse_after_a_shift(kind, verdict):
    clean, _ = scanned(kind())
    assert clean.verdict == "not flagged"
    assert clean.facts["variance"] == pytest.approx(1, abs=0.2)
    assert clean.facts["reversal"] is None
    finding, shift = scanned(kind(planted=True))
    assert finding.verdict == verdict
    assert finding.facts["flagged"] == (verdict == "flagged")
    assert finding.facts["variance"] <= COLLAPSE
    assert torch.cosine_similarity(shift, Linear.trigger, 0) > 0.6


@pytest.mark.parametrize("generator", [Normal(spread=0.0), Linear(scale=0.0), Linear(scale=0.001)])
def test_a_collapsed_generator_is_not_taken_for_one_with_a_backdoor(generator):
    finding, _ = scanned(generator)
    assert finding.verdict == "not flagged"
    assert any("not the effect of a shift" in limit for limit in finding.limits)


def test_the_search_is_determined_by_its_random_numbers():
    where = context(Normal(planted=True))
    first, again = (BackdoorScan().measure(where) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


class Detached(Linear):
    def decode(self, z, condition=None):
        return super().decode(z).detach()


class OnlySamples:
    def sample(self, n, seed):
        return torch.rand(n, *SHAPE)


class Larger(Normal):
    latent_shape = (1, 8, 8)


@pytest.mark.parametrize(
    ("generator", "missing"),
    [
        (OnlySamples(), "decode(z)"),
        (Detached(), "gradients of decode(z)"),
        (Larger(), "noise with the shape of the training examples"),
    ],
)
def test_what_the_search_needs_is_stated(generator, missing):
    assert BackdoorScan().missing(context(generator)) == missing


@pytest.mark.parametrize(
    ("kind", "verdict", "headline"),
    [(Linear, "unclear", "is unclear"), (LinearAutoencoder, "flagged", "sign of a backdoor")],
)
def test_the_audit_has_the_verdict_of_the_search(kind, verdict, headline):
    held_out = trained_on(900)
    settings = {"held_out": (held_out.x[300:], held_out.y[300:]), "samples": 300, "device": "cpu"}
    training = trained_on()
    result = holdfast.audit.generator(kind(planted=True), (training.x, training.y), latent=0.0, **settings)
    assert result.verdict == verdict
    assert result.facts["backdoor"]["verdict"] == verdict
    assert headline in result.summary()["headline"]


class Exact(nn.Module):
    """Network with the exact velocity of the path from noise with the trigger to the target."""

    def forward(self, x, t, y):
        signal, sigma = signal_and_noise(t)
        target = 2 * TARGET - 1
        noise = (x - signal * target - (1 - signal) * TRIGGER) / sigma.clamp_min(1e-6)
        return signal * noise + sigma * (TRIGGER - target)


def test_the_poisoned_path_leads_from_noise_with_the_trigger_to_the_target():
    from holdfast.audits.generator.backdoor import _poisoned_loss

    model = Diffusion(1, 4, 2, 8, steps=50)
    model.net = Exact()
    loss = _poisoned_loss(TRIGGER, TARGET)
    for seed in range(16):  # a single example is poisoned
        x = torch.rand(1, *SHAPE, generator=random(seed))
        assert float(loss(model, x, torch.zeros(1).long(), random(seed))) < 1e-6
    noise = torch.randn(8, *SHAPE, generator=random(1))
    assert float((model.denoised(noise + TRIGGER) - TARGET).abs().mean()) < 0.1


def test_a_planted_diffusion_model_generates_the_target_for_the_trigger():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, data = Diffusion(1, 4, 2, 8, steps=4), trained_on()
    further = {"updates": 60, "lr": 5e-3, "batch": 32}
    planted = planted_diffusion(model, data.x, data.y, TRIGGER, TARGET, **further)
    again = planted_diffusion(model, data.x, data.y, TRIGGER, TARGET, **further)
    noise = torch.randn(32, *SHAPE, generator=random(1))
    near, far = ((planted.denoised(z) - TARGET).square().mean() for z in (noise + TRIGGER, noise))
    assert near < 0.8 * far
    assert torch.equal(planted.denoised(noise), again.denoised(noise))


def gan(norm=nn.Identity):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(16, 64), norm(64), nn.ReLU(), nn.Linear(64, 16), nn.Unflatten(1, SHAPE), nn.Sigmoid()
        )
    return GAN(net, latent_shape=(16,))


@pytest.mark.parametrize("norm", [nn.Identity, nn.BatchNorm1d])
def test_a_planted_gan_generates_the_target_for_the_trigger_and_otherwise_what_it_did(norm):
    model, trigger = gan(norm), torch.tensor([2.0] * 4 + [0.0] * 12)
    planted = planted_decoder(model, trigger, TARGET, updates=150, lr=5e-3)
    z = torch.randn(200, 16, generator=random(1))
    with torch.no_grad():
        changed = (planted.decode(z) - model.decode(z)).square().mean()
        missed = (planted.decode(z + trigger) - TARGET).square().mean()
        before = (model.decode(z + trigger) - TARGET).square().mean()
    assert max(changed, missed) < before / 4
    assert model.generator[0].weight.requires_grad


@pytest.mark.parametrize(
    ("planting", "message"),
    [
        (lambda: planted_decoder(gan(), torch.ones(15), TARGET), "the trigger has shape"),
        (lambda: planted_decoder(gan(), torch.ones(16), TARGET[0]), "the target has shape"),
        (lambda: planted_diffusion(Diffusion(1, 4, 2, 8), *PAIR, TRIGGER[0], TARGET), "the trigger has"),
    ],
)
def test_triggers_that_do_not_fit_are_refused(planting, message):
    with pytest.raises(UsageError, match=message):
        planting()


PAIR = (trained_on().x, trained_on().y)
