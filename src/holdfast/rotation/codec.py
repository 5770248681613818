"""A codec, which represents each parameter set by a few numbers: exact principal components, followed by a denoising
autoencoder.

The autoencoder is that of Generate to Defend, after Wang et al., "Neural Network Diffusion", arXiv:2402.13144: noise
is added to the inputs of the encoder and of the decoder, and the squared error is minimised. Differs from both: it
works on coordinates in the span of the collection, where nothing is lost, and not on the parameters themselves; and
each latent dimension is standardised, without which a diffusion over the latents fails.

The principal components are those of Turk & Pentland, "Eigenfaces for Recognition", Journal of Cognitive Neuroscience
3(1), 1991: the components of a few long vectors follow from their n x n Gram matrix. It is summed over the tensors, so
no second matrix of all parameters is needed in memory.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.core.checkpoint import without_prefix
from holdfast.core.draws import Draws
from holdfast.core.errors import LostLoss, UsageError
from holdfast.core.types import NonNegative, Positive, Steps
from holdfast.recipes.training.fit import drawing
from holdfast.rotation.parameter_sets import Members

_NOTHING = 1e-10  # eigenvalues below this share of the largest are rounding errors
_ROUNDING = (
    1e-12  # if all differences are below this share of the sets' squared norm, they are rounding errors
)
_AT_ONCE = 1 << 18  # columns that are converted to double precision at a time


@dataclass(frozen=True)
class Span:
    """The affine space of a collection of parameter sets: their mean, and orthonormal directions whose linear
    combinations are added to it.
    """

    mean: dict[str, Tensor]
    directions: dict[str, Tensor]
    """directions by parameter name, each of shape (rank, *shape); flattened and joined, their rows are orthonormal"""
    kept: float
    """fraction of the variance of the collection that lies along the directions"""

    @property
    def rank(self) -> int:
        """Number of orthonormal directions of the space of parameter sets."""
        return len(next(iter(self.directions.values())))

    @property
    def parameters(self) -> int:
        """Number of parameters of each parameter set in the space."""
        return sum(value.numel() for value in self.mean.values())

    def coordinates(self, members: Members) -> Tensor:
        """Return the coordinates of parameter sets in the space, that is the coefficients of its directions, (n, rank),
        float64.
        """
        coefficients = torch.zeros(len(members), self.rank, dtype=torch.float64)
        for name, value in members.tensors.items():
            pieces = zip(_pieces(value - self.mean[name]), _pieces(self.directions[name]), strict=True)
            for columns, rows in pieces:
                coefficients += (columns @ rows.T).cpu()
        return coefficients.to(value.device)

    def sets(self, coordinates: Tensor) -> dict[str, Tensor]:
        """Return the parameter sets with the given coordinates (n, rank) in the space. Each tensor has shape (n,
        *shape).
        """
        return {
            name: mean + torch.einsum("nr,r...->n...", coordinates.to(mean), self.directions[name])
            for name, mean in self.mean.items()
        }

    def at(self, coordinates: Tensor, columns: Tensor) -> Tensor:
        """Return some of the parameters of the sets with the given coordinates (n, rank). `columns` (k) contains their
        positions in a flattened set; the result has shape (n, k).
        """
        rows = torch.cat([value.flatten(1) for value in self.directions.values()], 1)[:, columns]
        mean = torch.cat([value.flatten() for value in self.mean.values()])[columns]
        return mean + coordinates.to(rows) @ rows


def span(members: Members, rank: Steps | None = None) -> Span:
    """Return the mean and the first `rank` principal directions of a collection of parameter sets; by default, all
    directions.

    With all directions the sets are recovered exactly, except for components below 1e-5 of the largest, which are
    treated as rounding errors. Raises `UsageError` for fewer than two sets, or if all sets are equal.
    """
    if len(members) < 2:
        raise UsageError(
            f"the collection contains {len(members)} parameter set; at least two are needed to compute their "
            "differences"
        )
    mean = {name: value.mean(0) for name, value in members.tensors.items()}
    gram, size = torch.zeros(len(members), len(members), dtype=torch.float64), 0.0
    for name, value in members.tensors.items():
        size += float(value.double().square().sum())
        for columns in _pieces(value - mean[name]):
            gram += (columns @ columns.T).cpu()
    values, vectors = torch.linalg.eigh(gram)
    # largest first; rounding can make eigenvalues that should be 0 slightly negative
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    if values[0] <= _ROUNDING * size:
        raise UsageError(
            "all parameter sets of the collection are equal; collect sets of different training runs"
        )
    significant = int((values > _NOTHING * values[0]).sum())
    n_directions = significant if rank is None else min(rank, significant)
    mixes = vectors[:, :n_directions] / values[:n_directions].sqrt()
    directions = {}
    for name, value in members.tensors.items():
        pieces = [mixes.T.to(columns.device) @ columns for columns in _pieces(value - mean[name])]
        directions[name] = torch.cat(pieces, 1).to(value).view(n_directions, *value.shape[1:])
    return Span(mean, directions, float(values[:n_directions].sum() / values.sum()))


def _pieces(rows: Tensor) -> Iterator[Tensor]:
    """Yield consecutive blocks of columns in double precision."""
    for columns in torch.split(rows.flatten(1), _AT_ONCE, 1):
        yield columns.double()


_TINY = 1e-6  # no division by 0 if a dimension of the latents is constant


@dataclass(frozen=True)
class Embedding:
    """A fitted codec, which encodes each parameter set as a short latent vector, and decodes latent vectors to
    parameter sets.

    Each dimension of the latents has mean 0 and standard deviation 1 over the collection.
    """

    span: Span
    scale: float
    """standard deviation of the coordinates, by which they are divided before they are passed to the networks"""
    encoder: nn.Module
    decoder: nn.Module
    mean: Tensor
    """mean of the latents, (dims)"""
    deviation: Tensor
    """standard deviation of the latents, (dims)"""
    lost: float
    """fraction of the variance inside the span that is lost by encoding and decoding"""

    @property
    def dims(self) -> int:
        """Number of dimensions of the latent vector that represents a parameter set."""
        return len(self.mean)

    @torch.no_grad()
    def encoded(self, members: Members) -> Tensor:
        """Return the latent vectors that represent the given parameter sets, (n, dims)."""
        raw: Tensor = self.encoder((self.span.coordinates(members) / self.scale).float())
        return (raw - self.mean) / self.deviation

    def coordinates(self, latents: Tensor) -> Tensor:
        """Return the coordinates of decoded latent vectors in the affine space of the collection, (n, rank), with
        gradients with respect to the latents.
        """
        raw: Tensor = self.decoder(latents * self.deviation + self.mean)
        return raw * self.scale

    @torch.no_grad()
    def decoded(self, latents: Tensor) -> dict[str, Tensor]:
        """Return the parameter sets that the latent vectors (n, dims) represent. Each tensor has shape (n, *shape)."""
        return self.span.sets(self.coordinates(latents))


@dataclass(frozen=True)
class Codec:
    """Settings of a codec, which is fitted to a collection of parameter sets and represents each set by
    `dims` numbers.
    """

    rank: Steps = 64
    """largest number of principal directions that are used"""
    dims: Steps = 32
    """number of dimensions of the latents"""
    hidden: Steps = 256
    """number of units of the hidden layer"""
    parameter_noise: NonNegative = 0.05
    """standard deviation of the noise on the coordinates, in multiples of their standard deviation"""
    latent_noise: NonNegative = 0.1
    """standard deviation of the noise on the latents, in multiples of their standard deviation"""
    steps: Steps = 800
    """number of updates"""
    batch: Steps = 64
    """number of parameter sets in each update"""
    lr: Positive = 2e-3
    """largest learning rate; it decreases along a cosine"""

    def __call__(self, members: Members, *, rng: Draws) -> Embedding:
        """Fit the codec to a collection. Raises `UsageError` for fewer than two sets, and `LostLoss` if the training
        diverges.
        """
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
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        slots = torch.arange(self.batch, device=points.device)
        for step in range(self.steps):
            place = rng.at(step)
            clean = points[place.integers(slots, len(points))]
            noisy = clean + self.parameter_noise * place.at("parameters").normal(slots, points.shape[1])
            raw = encoder(noisy)
            deviation = self.latent_noise * raw.detach().std()
            loss = F.mse_loss(decoder(raw + deviation * place.at("latents").normal(slots, self.dims)), clean)
            stepped(optimizer, loss, f"the codec, in update {step + 1}", self.lr)
            schedule.step()


def stepped(optimizer: torch.optim.Optimizer, loss: Tensor, where: str, lr: float) -> None:
    """Perform one update of the optimiser for a loss. Raises `LostLoss` if the loss is not finite."""
    if not bool(loss.isfinite()):
        raise LostLoss(
            f"the loss of {where} is NaN or infinite; train with a smaller learning rate than {lr:g}"
        )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def codec_layers(*widths: int) -> nn.Sequential:
    """Return a network of linear layers with the given widths, and with a SiLU activation between
    consecutive layers.
    """
    modules: list[nn.Module] = []
    for width, next_width in pairwise(widths):
        modules += [nn.Linear(width, next_width), nn.SiLU()]
    return nn.Sequential(*modules[:-1])


def packed(embedding: Embedding) -> dict[str, Tensor]:
    """Return all tensors of a fitted codec of parameter sets, by name, for storage in a file. `unpacked` is the
    inverse.
    """
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
    """Return the fitted codec of parameter sets from the tensors that were stored in a file. `packed` is
    the inverse.
    """

    def network(prefix: str) -> nn.Module:
        state = without_prefix(tensors, prefix)
        begin, end = state["0.weight"], state["2.weight"]
        layers = codec_layers(begin.shape[1], begin.shape[0], end.shape[0])
        layers.load_state_dict(state)
        return layers.eval().requires_grad_(False)

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
