"""Denoising diffusion: noise is added in small steps, a network learns to tell it, and takes it back from pure noise.

Ho, Jain & Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, arXiv:2006.11239 (DDPM): the loss on the
noise, the posterior, the linear schedule. Song, Meng & Ermon, "Denoising Diffusion Implicit Models", ICLR 2021,
arXiv:2010.02502 (DDIM): fewer steps, nothing drawn on the way. Differs from the papers: the schedule of a thousand
steps is compressed into as many as are wanted, and what is told of the clean point is clamped.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.core.draws import Draws
from holdfast.core.types import Positive, Steps

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""The noise (n, d) that is in points (n, d) after as many steps (n) as are told."""

_FIRST, _LAST, _PAPER = 1e-4, 0.02, 1000  # betas of the paper, over its thousand steps


@dataclass(frozen=True)
class Diffusion:
    """How noise grows, and both ways back."""

    steps: Steps = 200
    """of noise, from none to nearly nothing else"""
    clamp: Positive = 4.0
    """largest coordinate that a clean point is believed to have; points are to have a deviation of one"""

    def betas(self) -> Tensor:
        """Share of the variance that each step makes noise, (steps), float64."""
        times = _PAPER / self.steps
        return torch.linspace(_FIRST * times, min(_LAST * times, 0.999), self.steps, dtype=torch.float64)

    def kept(self) -> Tensor:
        """Share of the variance that is not noise yet after each step, (steps), float64."""
        return torch.cumprod(1 - self.betas(), 0)

    def noised(self, clean: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        """Points (n, d) after the steps (n), counted from 0."""
        kept = self._kept_at(step, clean)
        return kept.sqrt() * clean + (1 - kept).sqrt() * noise

    def cleaned(self, noised: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        """The clean points (n, d) if that is the noise in them, clamped."""
        kept = self._kept_at(step, noised)
        return ((noised - (1 - kept).sqrt() * noise) / kept.sqrt()).clamp(-self.clamp, self.clamp)

    def weight(self, step: Tensor, like: Tensor) -> Tensor:
        """How much of the clean points is left after the steps (n), in the type of `like`."""
        return self._kept_at(step, like)[:, 0]

    def _kept_at(self, step: Tensor, like: Tensor) -> Tensor:
        return self.kept().to(like.device)[step].to(like.dtype)[:, None]

    @torch.no_grad()
    def ddpm(self, denoiser: Denoiser, ids: Tensor, dims: int, rng: Draws) -> Tensor:
        """Points (n, dims) drawn from noise, one for each of `ids`. Cost: `steps` forwards."""
        betas, kept = self.betas().tolist(), self.kept().tolist()
        x = rng.at("first").normal(ids, dims)
        drawn = rng.at("steps").normal(ids, self.steps, dims)
        for t in reversed(range(self.steps)):
            clean = self._restored(denoiser, x, t, kept[t])
            before, now, beta = kept[t - 1] if t else 1.0, kept[t], betas[t]
            x = torch.add(
                x * (math.sqrt(1 - beta) * (1 - before) / (1 - now)),
                clean,
                alpha=math.sqrt(before) * beta / (1 - now),
            )
            if t:
                x = torch.add(x, drawn[:, t], alpha=math.sqrt((1 - before) / (1 - now) * beta))
        return x

    @torch.no_grad()
    def ddim(self, denoiser: Denoiser, ids: Tensor, dims: int, rng: Draws, steps: int = 50) -> Tensor:
        """The same in about `steps` steps, of which only the first point is drawn."""
        kept = self.kept().tolist()
        visited = list(range(self.steps - 1, -1, -max(self.steps // steps, 1)))
        x = rng.at("first").normal(ids, dims)
        for t, then in zip(visited, [*visited[1:], -1], strict=True):
            clean = self._restored(denoiser, x, t, kept[t])
            noise = (x - math.sqrt(kept[t]) * clean) / math.sqrt(1 - kept[t])
            before = kept[then] if then >= 0 else 1.0
            x = torch.add(math.sqrt(before) * clean, noise, alpha=math.sqrt(1 - before))
        return x

    def _restored(self, denoiser: Denoiser, x: Tensor, t: int, kept: float) -> Tensor:
        """The clean points that the denoiser sees after step `t`, clamped."""
        noise = denoiser(x, torch.full((len(x),), t, device=x.device))
        seen = torch.add(x, noise, alpha=-math.sqrt(1 - kept)).mul_(1 / math.sqrt(kept))
        return seen.clamp_(-self.clamp, self.clamp)
