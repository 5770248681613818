"""Denoising diffusion models: noise is added to data in small steps, a network learns to predict it, and new points are
sampled from noise.

Ho, Jain & Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, arXiv:2006.11239 (DDPM): the loss on the
noise, the posterior, the linear schedule. Song, Meng & Ermon, "Denoising Diffusion Implicit Models", ICLR 2021,
arXiv:2010.02502 (DDIM): fewer steps, deterministic after the first point. Differs from the papers: the schedule of a
thousand steps is compressed to the number of steps given, and the predicted clean point is clamped.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.core.draws import Draws
from holdfast.core.types import Positive, Steps

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""function that predicts the noise (n, d) in points (n, d) at diffusion steps (n)"""

_FIRST, _LAST, _PAPER = 1e-4, 0.02, 1000  # betas of the paper, over its thousand steps


@dataclass(frozen=True)
class Diffusion:
    """Noise schedule of a denoising diffusion model, with sampling by the methods DDPM and DDIM."""

    steps: Steps = 200
    """number of steps that add noise"""
    clamp: Positive = 4.0
    """limit of the absolute coordinates of a predicted clean point; points should have a standard deviation of one"""

    def betas(self) -> Tensor:
        """Return the fraction of the variance that each step of the diffusion replaces by noise, as float64 (steps)."""
        times = _PAPER / self.steps
        # below 1 for any number of steps: a beta of 1 would remove all data
        return torch.linspace(_FIRST * times, min(_LAST * times, 0.999), self.steps, dtype=torch.float64)

    def kept(self) -> Tensor:
        """Return the fraction of the variance of the data that remains after each step of the diffusion, as float64
        (steps).
        """
        return torch.cumprod(1 - self.betas(), 0)

    def noised(self, clean: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        """Return the clean points (n, d) mixed with `noise` as after the diffusion steps `step` (n), which are counted
        from 0.
        """
        kept = self._kept_at(step, clean)
        return kept.sqrt() * clean + (1 - kept).sqrt() * noise

    def cleaned(self, noised: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        """Return the clean points (n, d) that follow from the noised points if `noise` is the noise in them. Their
        coordinates are clamped.
        """
        kept = self._kept_at(step, noised)
        return ((noised - (1 - kept).sqrt() * noise) / kept.sqrt()).clamp(-self.clamp, self.clamp)

    def weight(self, step: Tensor, like: Tensor) -> Tensor:
        """Return the fraction of the variance of the data that remains after the diffusion steps `step` (n), in the
        data type of `like`.
        """
        return self._kept_at(step, like)[:, 0]

    def _kept_at(self, step: Tensor, like: Tensor) -> Tensor:
        return self.kept().to(like.device)[step].to(like.dtype)[:, None]

    @torch.no_grad()
    def ddpm(self, denoiser: Denoiser, ids: Tensor, dims: int, rng: Draws) -> Tensor:
        """Sample new points (n, dims) with DDPM, one for each id, starting from noise. The cost is `steps` forward
        passes of the denoising network.
        """
        # Python floats, so that the coefficients have double precision for points of any type
        betas, kept = self.betas().tolist(), self.kept().tolist()
        x = rng.at("first").normal(ids, dims)
        noise = rng.at("steps").normal(ids, self.steps, dims)
        for t in reversed(range(self.steps)):
            clean = self._restored(denoiser, x, t, kept[t])
            kept_before, kept_now, beta = kept[t - 1] if t else 1.0, kept[t], betas[t]
            x = torch.add(
                x * (math.sqrt(1 - beta) * (1 - kept_before) / (1 - kept_now)),
                clean,
                alpha=math.sqrt(kept_before) * beta / (1 - kept_now),
            )
            if t:
                x = torch.add(x, noise[:, t], alpha=math.sqrt((1 - kept_before) / (1 - kept_now) * beta))
        return x

    @torch.no_grad()
    def ddim(self, denoiser: Denoiser, ids: Tensor, dims: int, rng: Draws, steps: int = 50) -> Tensor:
        """Sample new points (n, dims) with DDIM in about `steps` steps, one for each id. Only the noise at the start is
        random.
        """
        kept = self.kept().tolist()
        visited = list(range(self.steps - 1, -1, -max(self.steps // steps, 1)))
        x = rng.at("first").normal(ids, dims)
        for t, next_t in zip(visited, [*visited[1:], -1], strict=True):
            clean = self._restored(denoiser, x, t, kept[t])
            noise = (x - math.sqrt(kept[t]) * clean) / math.sqrt(1 - kept[t])
            kept_after = kept[next_t] if next_t >= 0 else 1.0
            x = torch.add(math.sqrt(kept_after) * clean, noise, alpha=math.sqrt(1 - kept_after))
        return x

    def _restored(self, denoiser: Denoiser, x: Tensor, t: int, kept: float) -> Tensor:
        """The clean points that the denoiser predicts at step `t`, clamped."""
        noise = denoiser(x, torch.full((len(x),), t, device=x.device))
        clean = torch.add(x, noise, alpha=-math.sqrt(1 - kept)).mul_(1 / math.sqrt(kept))
        # at high noise the division by a small root enlarges every error of the denoiser
        return clean.clamp_(-self.clamp, self.clamp)
