"""Diffusion: the closed forms of a Gaussian, for which the perfect denoiser is known, and another implementation."""

import pytest
import torch

from holdfast.core.draws import Draws
from holdfast.rotation.generating import Diffusion

IDS = torch.arange(4_000)
MEAN, DEVIATION = 0.7, 0.5


def gaussian(how):
    """The noise that is expected in points of a Gaussian of that mean and deviation."""

    def denoiser(x, step):
        kept = how.kept()[step].to(x.dtype)[:, None]
        return (1 - kept).sqrt() * (x - kept.sqrt() * MEAN) / (kept * DEVIATION**2 + 1 - kept)

    return denoiser


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_perfect_denoiser_draws_from_its_distribution(sampler):
    how = Diffusion(200, clamp=10)
    x = getattr(how, sampler)(gaussian(how), IDS, 3, Draws(1))
    assert x.mean(0).sub(MEAN).abs().max() < 0.03
    assert x.std(0).sub(DEVIATION).abs().max() < 0.03
    assert x.T.corrcoef().fill_diagonal_(0).abs().max() < 0.06


def test_noise_and_what_is_left_share_the_variance_and_part_again():
    how, x, rng = Diffusion(50), Draws(2).normal(IDS, 2), Draws(3)
    noise, step = rng.normal(IDS, 2), rng.integers(IDS, 50)
    noised = how.noised(x, noise, step)
    assert noised.var(0).sub(1).abs().max() < 0.06
    torch.testing.assert_close(how.cleaned(noised, noise, step), x.clamp(-4, 4), atol=2e-3, rtol=0)
    assert how.weight(step, x).equal(how.kept()[step].float())
    assert how.kept()[-1] < 1e-3  # noise alone is left at the end


def test_a_draw_is_that_of_its_place_and_id_whatever_is_drawn_beside_it():
    how = Diffusion(20)
    whole = how.ddpm(gaussian(how), IDS[:8], 3, Draws(5))
    torch.testing.assert_close(how.ddpm(gaussian(how), IDS[5:7], 3, Draws(5)), whole[5:7])
    assert not torch.equal(how.ddpm(gaussian(how), IDS[:8], 3, Draws(6)), whole)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_it_is_what_diffusers_does(sampler):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    how, rng = Diffusion(100), Draws(7)
    said = {"num_train_timesteps": 100, "beta_start": 1e-3, "beta_end": 0.2, "clip_sample_range": 4.0}
    kind = diffusers.DDPMScheduler if sampler == "ddpm" else diffusers.DDIMScheduler
    scheduler = kind(**said, **({"set_alpha_to_one": True} if sampler == "ddim" else {}))
    scheduler.set_timesteps(100)
    denoiser = gaussian(how)
    drawn = rng.at("steps").normal(IDS[:16], 100, 3)
    x = rng.at("first").normal(IDS[:16], 3)
    products = [*scheduler.alphas_cumprod.tolist(), 1.0]  # the last one is that before the first step
    for t in scheduler.timesteps.tolist():
        noise = denoiser(x, torch.full((16,), t))
        stepped = scheduler.step(noise, t, x, generator=None)
        if sampler == "ddim":
            x = stepped.prev_sample
            continue
        mean = _mean(scheduler, noise, t, x)
        variance = (1 - products[t - 1]) / (1 - products[t]) * (1 - products[t] / products[t - 1])
        x = mean + variance**0.5 * drawn[:, t] if t else mean
    torch.testing.assert_close(
        getattr(how, sampler)(denoiser, IDS[:16], 3, rng, **({"steps": 100} if sampler == "ddim" else {})),
        x,
        atol=1e-4,
        rtol=1e-4,
    )


def _mean(scheduler, noise, t, x):
    """The mean of the posterior by their coefficients."""
    kept, before = scheduler.alphas_cumprod[t], scheduler.alphas_cumprod[t - 1] if t else torch.tensor(1.0)
    clean = ((x - (1 - kept).sqrt() * noise) / kept.sqrt()).clamp(-4, 4)
    alpha = kept / before
    return (before.sqrt() * (1 - alpha) * clean + alpha.sqrt() * (1 - before) * x) / (1 - kept)
