"""A codec of parameter sets: exact principal components, followed by a denoising autoencoder.

The autoencoder is that of Generate to Defend, after Wang et al., "Neural Network Diffusion", arXiv:2402.13144: noise
is added to the inputs of the encoder and of the decoder, and the squared error is minimised. Differs from both: it
works on coordinates in the span of the collection, where nothing is lost, and not on the parameters themselves; and
each latent dimension is standardised, without which a diffusion over the latents fails.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.core.checkpoint import without_prefix
from holdfast.core.draws import Draws
from holdfast.core.errors import LostLoss
from holdfast.core.types import NonNegative, Positive, Steps
from holdfast.ops.fit import drawing
from holdfast.rotation.members import Members
from holdfast.rotation.span import Span, span

_TINY = 1e-6


@dataclass(frozen=True)
class Embedding:
    """A fitted codec: encodes parameter sets as latents, whose dimensions have mean 0 and deviation 1, and decodes
    them.
    """

    span: Span
    scale: float
    """standard deviation of the coordinates; the networks take coordinates divided by it"""
    encoder: nn.Module
    decoder: nn.Module
    mean: Tensor
    """mean of the latents, (dims)"""
    deviation: Tensor
    """standard deviation of the latents, (dims)"""
    lost: float
    """share of the variance in the span that is lost by encoding and decoding"""

    @property
    def dims(self) -> int:
        """Number of dimensions of a latent."""
        return len(self.mean)

    @torch.no_grad()
    def encoded(self, members: Members) -> Tensor:
        """Latents of the parameter sets, (n, dims)."""
        raw: Tensor = self.encoder((self.span.coordinates(members) / self.scale).float())
        return (raw - self.mean) / self.deviation

    def coordinates(self, latents: Tensor) -> Tensor:
        """Coordinates in the span (n, rank) of the latents. Differentiable with respect to the latents."""
        raw: Tensor = self.decoder(latents * self.deviation + self.mean)
        return raw * self.scale

    @torch.no_grad()
    def decoded(self, latents: Tensor) -> dict[str, Tensor]:
        """Parameter sets of the latents, each tensor (n, *shape)."""
        return self.span.sets(self.coordinates(latents))


@dataclass(frozen=True)
class Codec:
    """Settings of a codec, which learns to describe each parameter set of a collection by a few numbers."""

    rank: Steps = 64
    """largest number of principal directions that are kept"""
    dims: Steps = 32
    """dimensions of the latents"""
    hidden: Steps = 256
    """units of the hidden layer"""
    parameter_noise: NonNegative = 0.05
    """standard deviation of the noise on the coordinates, in multiples of their standard deviation"""
    latent_noise: NonNegative = 0.1
    """standard deviation of the noise on the latents, in multiples of their standard deviation"""
    steps: Steps = 800
    """number of updates"""
    batch: Steps = 64
    """parameter sets in each update"""
    lr: Positive = 2e-3
    """largest learning rate; it decreases along a cosine"""

    def __call__(self, members: Members, *, rng: Draws) -> Embedding:
        """Fit the codec. Raises `UsageError` for fewer than two sets, `LostLoss` if the training diverges."""
        inside = span(members, self.rank)
        coordinates = inside.coordinates(members)
        scale = float(coordinates.std())
        points = (coordinates / scale).float()
        encoder, decoder = self._networks(inside.rank, points.device, rng)
        self._fit(encoder, decoder, points, rng.at("fit"))
        with torch.no_grad():
            raw = encoder(points)
            lost = (F.mse_loss(decoder(raw), points) / points.var(unbiased=False)).item()
        if not math.isfinite(lost):
            raise LostLoss(
                f"the weights of the codec are NaN or infinite; train with a smaller learning rate than {self.lr:g}"
            )
        deviation = raw.std(0) + _TINY
        for network in (encoder, decoder):
            network.eval().requires_grad_(False)
        return Embedding(inside, scale, encoder, decoder, raw.mean(0), deviation, lost)

    def _networks(self, rank: int, device: torch.device, rng: Draws) -> tuple[nn.Module, nn.Module]:
        with drawing(rng.at("begin")):
            return (
                codec_layers(rank, self.hidden, self.dims).to(device),
                codec_layers(self.dims, self.hidden, rank).to(device),
            )

    def _fit(self, encoder: nn.Module, decoder: nn.Module, points: Tensor, rng: Draws) -> None:
        learned = [*encoder.parameters(), *decoder.parameters()]
        optimizer = torch.optim.AdamW(learned, self.lr, weight_decay=1e-4)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        slots = torch.arange(self.batch, device=points.device)
        for step in range(self.steps):
            place = rng.at(step)
            some = points[place.integers(slots, len(points))]
            shaken = some + self.parameter_noise * place.at("parameters").normal(slots, points.shape[1])
            raw = encoder(shaken)
            spread = self.latent_noise * raw.detach().std()
            loss = F.mse_loss(decoder(raw + spread * place.at("latents").normal(slots, self.dims)), some)
            stepped(optimizer, loss, f"the codec, in update {step + 1}", self.lr)
            falling.step()


def stepped(optimizer: torch.optim.Optimizer, loss: Tensor, where: str, lr: float) -> None:
    """Perform one update of the optimiser. Raises `LostLoss` if the loss is not finite."""
    if not bool(loss.isfinite()):
        raise LostLoss(
            f"the loss of {where} is NaN or infinite; train with a smaller learning rate than {lr:g}"
        )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def codec_layers(*widths: int) -> nn.Sequential:
    """Linear layers of the given widths with a SiLU between each two of them."""
    modules: list[nn.Module] = []
    for wide, next_wide in pairwise(widths):
        modules += [nn.Linear(wide, next_wide), nn.SiLU()]
    return nn.Sequential(*modules[:-1])


def packed(embedding: Embedding) -> dict[str, Tensor]:
    """All tensors of a fitted codec by name, for a file. `unpacked` is the inverse."""
    tensors = {f"mean.{name}": value for name, value in embedding.span.mean.items()}
    tensors |= {f"directions.{name}": value for name, value in embedding.span.directions.items()}
    tensors |= {f"encoder.{name}": value for name, value in embedding.encoder.state_dict().items()}
    tensors |= {f"decoder.{name}": value for name, value in embedding.decoder.state_dict().items()}
    scalars = torch.tensor([embedding.scale, embedding.lost, embedding.span.kept], dtype=torch.float64)
    return {
        **tensors,
        "latent.mean": embedding.mean,
        "latent.deviation": embedding.deviation,
        "told": scalars,
    }


def unpacked(tensors: Mapping[str, Tensor]) -> Embedding:
    """The fitted codec of the tensors that `packed` returned."""

    def network(first: str) -> nn.Module:
        state = without_prefix(tensors, first)
        begin, end = state["0.weight"], state["2.weight"]
        found = codec_layers(begin.shape[1], begin.shape[0], end.shape[0])
        found.load_state_dict(state)
        return found.eval().requires_grad_(False)

    scale, lost, kept = tensors["told"].tolist()
    inside = Span(without_prefix(tensors, "mean."), without_prefix(tensors, "directions."), kept)
    return Embedding(
        inside,
        scale,
        network("encoder."),
        network("decoder."),
        tensors["latent.mean"],
        tensors["latent.deviation"],
        lost,
    )
