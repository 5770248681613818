"""Generators of parameter sets: a codec, and diffusion in its space: Generate to Defend as published, and
variants.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.core.draws import Draws
from holdfast.core.errors import LostLoss, UsageError
from holdfast.core.training import without_prefix
from holdfast.core.types import NonNegative, Positive, Steps
from holdfast.recipes.training.fit import drawing
from holdfast.rotation.collecting import Members, apart

DenoisingFunction = Callable[[Tensor, Tensor], Tensor]
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
    def ddpm(self, denoiser: DenoisingFunction, ids: Tensor, dims: int, rng: Draws) -> Tensor:
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
    def ddim(
        self, denoiser: DenoisingFunction, ids: Tensor, dims: int, rng: Draws, steps: int = 50
    ) -> Tensor:
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

    def _restored(self, denoiser: DenoisingFunction, x: Tensor, t: int, kept: float) -> Tensor:
        """The clean points that the denoiser predicts at step `t`, clamped."""
        noise = denoiser(x, torch.full((len(x),), t, device=x.device))
        clean = torch.add(x, noise, alpha=-math.sqrt(1 - kept)).mul_(1 / math.sqrt(kept))
        # at high noise the division by a small root enlarges every error of the denoiser
        return clean.clamp_(-self.clamp, self.clamp)


_NOTHING = 1e-10  # eigenvalues below this share of the largest are rounding errors
_ROUNDING = 1e-12
"""If all differences are below this share of the squared norm of the sets, they are rounding errors."""
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


Regulariser = Literal["off", "printed", "away", "hinge"]
Sampler = Literal["ddpm", "ddim"]

UNKNOWN = -1
"""value in `Members.basins` of a set that belongs to no training run"""
_FREQUENCIES = 16  # sines and cosines that encode the diffusion step, from 1 to exp(-7.5) radians a step
# Parameters that distances are computed from, those of them in one update, and the sets in one update:
_POOL, _COLUMNS, _ROWS = 16_384, 512, 24


class Denoiser(nn.Module):
    """Network of a latent diffusion model that predicts the noise in latents (n, dims) at given diffusion steps. It is
    a residual multilayer perceptron.
    """

    falling: Tensor

    def __init__(self, dims: int, width: int, depth: int) -> None:
        super().__init__()
        self.first = nn.Linear(dims + 2 * _FREQUENCIES, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.last = nn.Linear(width, dims)
        self.register_buffer("falling", torch.exp(-0.5 * torch.arange(_FREQUENCIES)), persistent=False)

    def forward(self, latents: Tensor, step: Tensor) -> Tensor:
        """Return the predicted noise (n, dims) in `latents` (n, dims) at the diffusion steps `step` (n)."""
        angle = step.to(latents.dtype)[:, None] * self.falling
        hidden = F.silu(self.first(torch.cat((latents, angle.sin(), angle.cos()), 1)))
        for block in self.blocks:
            hidden = hidden + F.silu(block(hidden))
        noise: Tensor = self.last(hidden)
        return noise


@dataclass(frozen=True)
class Generator:
    """A fitted generator of parameter sets. It must be secret, because the sets on which it was trained can be
    reconstructed from it.
    """

    embedding: Embedding
    """encoder of parameter sets to latents, and decoder"""
    denoiser: nn.Module
    """network that predicts the noise in latents (n, dims)"""
    diffusion: Diffusion
    """noise schedule"""

    def drawn(self, n: int, rng: Draws, sampler: Sampler = "ddpm") -> Members:
        """Generate `n` parameter sets with the stochastic sampler `ddpm` or the deterministic one, `ddim`. The same
        `rng` generates the same sets, so `rng` must be secret if the sets are.
        """
        ids = torch.arange(n, device=self.embedding.mean.device)
        draw = self.diffusion.ddpm if sampler == "ddpm" else self.diffusion.ddim
        latents = draw(self.denoiser, ids, self.embedding.dims, rng)
        return Members(self.embedding.decoded(latents), torch.full((n,), UNKNOWN))

    def mean(self) -> dict[str, Tensor]:
        """Return the parameter set that the mean of the latents represents, for a comparison with generated sets.

        For a collection from one run it is as good a model as any generated set; for one from several runs it does not
        work.
        """
        middle = torch.zeros(1, self.embedding.dims, device=self.embedding.mean.device)
        return Members(self.embedding.decoded(middle), torch.full((1,), UNKNOWN)).one(0)


@dataclass(frozen=True)
class LatentDiffusion:
    """Settings of a latent diffusion model, which learns the distribution of parameter sets from the latents of a
    collection and generates new sets.
    """

    diffusion: Diffusion = field(default_factory=Diffusion)
    width: Steps = 384
    """number of units of each layer of the denoiser"""
    depth: Steps = 3
    """number of residual blocks of the denoiser"""
    steps: Steps = 3_000
    """number of updates; with half as many, only a third of the sets that are generated from several runs work, instead
    of four fifths"""
    batch: Steps = 64
    """number of latents in each update"""
    lr: Positive = 1e-3
    """largest learning rate; it decreases along a cosine"""
    regulariser: Regulariser = "off"
    """term of the loss for the L1 distance to the collection: `off`: none; `printed`: the distance to the set that is
    restored, as in the paper; `away`: minus that distance; `hinge`: a hinge loss on the distance to the nearest set"""
    weight: NonNegative = 1.0
    """weight of the regulariser (lambda)"""
    margin: Positive = 0.3
    """margin of the hinge, in multiples of the distance between the runs of the collection"""

    def __call__(self, embedding: Embedding, members: Members, *, rng: Draws) -> Generator:
        """Fit a generator to the collection that the codec was fitted to. Raises `LostLoss` if the training
        diverges.
        """
        latents = embedding.encoded(members)
        with drawing(rng.at("begin")):
            denoiser = Denoiser(embedding.dims, self.width, self.depth).to(latents.device)
        distance = None if self.regulariser == "off" else _Distance(embedding, members, rng.at("pool"))
        optimizer = torch.optim.AdamW(denoiser.parameters(), self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        slots = torch.arange(self.batch, device=latents.device)
        for update in range(self.steps):
            place = rng.at(update)
            rows = place.at("rows").integers(slots, len(latents))
            step = place.at("steps").integers(slots, self.diffusion.steps)
            clean, noise = latents[rows], place.at("noise").normal(slots, embedding.dims)
            noised = self.diffusion.noised(clean, noise, step)
            predicted = denoiser(noised, step)
            loss = F.mse_loss(predicted, noise)
            if distance is not None:
                subset = slice(_ROWS)
                restored = self.diffusion.cleaned(noised[subset], predicted[subset], step[subset])
                pushed = self._pushed(distance, restored, rows[subset], place)
                loss = loss + self.weight * (self.diffusion.weight(step[subset], latents) * pushed).mean()
            stepped(optimizer, loss, f"the diffusion, in update {update + 1}", self.lr)
            schedule.step()
        if not all(bool(weight.isfinite().all()) for weight in denoiser.parameters()):
            raise LostLoss(
                "the weights of the diffusion are NaN or infinite; train with a smaller learning rate than "
                f"{self.lr:g}"
            )
        return Generator(embedding, denoiser.eval().requires_grad_(False), self.diffusion)

    def _pushed(self, distance: "_Distance", restored: Tensor, rows: Tensor, rng: Draws) -> Tensor:
        """Value of the regulariser for each restored latent (n), before its weight."""
        distances = distance(restored, rng)
        if self.regulariser == "hinge":
            return F.relu(self.margin - distances.min(1).values)
        to_original = distances.gather(1, rows[:, None])[:, 0]
        return to_original if self.regulariser == "printed" else -to_original


class _Distance:
    """L1 distances of decoded latents to the sets of the collection, in multiples of the distance between its runs.

    Estimated from a random subset of the parameters.
    """

    def __init__(self, embedding: Embedding, members: Members, rng: Draws) -> None:
        place = torch.zeros(1, dtype=torch.int64, device=embedding.mean.device)
        n = min(_POOL, embedding.span.parameters)
        # float64, since float32 cannot represent every index of a large network
        columns = (rng.uniform(place, n, dtype=torch.float64)[0] * embedding.span.parameters).long()
        span, collection = embedding.span, members.tensors.values()
        at = span.at(torch.eye(span.rank, device=place.device), columns).float()
        self._mean = span.at(torch.zeros(1, span.rank, device=place.device), columns).float()
        self._directions = at - self._mean
        self._collection = torch.cat([value.flatten(1) for value in collection], 1)[:, columns].float()
        self._embedding, self._unit = embedding, apart(members)

    def __call__(self, latents: Tensor, rng: Draws) -> Tensor:
        """Distances (n, sets of the collection). Differentiable with respect to the latents."""
        place = torch.zeros(1, dtype=torch.int64, device=latents.device)
        columns = rng.at("columns").integers(place, self._collection.shape[1], _COLUMNS)[0]
        sets = self._mean[:, columns] + self._embedding.coordinates(latents) @ self._directions[:, columns]
        return torch.cdist(sets, self._collection[:, columns], p=1) / len(columns) / self._unit


def packed_generator(generator: Generator) -> dict[str, Tensor]:
    """Return all tensors of a generator of parameter sets, by name, for storage in a file. `unpacked_generator` is the
    inverse.
    """
    tensors = {f"codec.{name}": value for name, value in packed(generator.embedding).items()}
    tensors |= {f"denoiser.{name}": value for name, value in generator.denoiser.state_dict().items()}
    settings = torch.tensor([generator.diffusion.steps, generator.diffusion.clamp], dtype=torch.float64)
    return {**tensors, "diffusion": settings}


def unpacked_generator(tensors: Mapping[str, Tensor]) -> Generator:
    """Return the generator of parameter sets from the tensors that were stored in a file. `packed_generator` is the
    inverse.
    """
    embedding, state = unpacked(without_prefix(tensors, "codec.")), without_prefix(tensors, "denoiser.")
    width, depth = len(state["first.bias"]), sum(name.endswith(".bias") for name in state) - 2
    denoiser = Denoiser(embedding.dims, width, depth)
    denoiser.load_state_dict(state)
    steps, clamp = tensors["diffusion"].tolist()
    return Generator(embedding, denoiser.eval().requires_grad_(False), Diffusion(int(steps), clamp))
