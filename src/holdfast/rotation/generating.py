"""Latent diffusion models that generate parameter sets: Generate to Defend as published, and variants of its
regulariser.

The paper adds `lambda ||generated - original||_1` to a loss that is minimised, which pulls generated sets towards
the originals (`printed`). With the opposite sign (`away`) it pushes them away without a bound. `hinge` pushes a set
away from the nearest set of the collection up to a margin. The distance between parameters does not predict whether
an attack transfers, so none is the default; measure what each achieves. Rombach et al., "High-Resolution Image
Synthesis with Latent Diffusion Models", CVPR 2022, arXiv:2112.10752, for diffusion over latents; Wang et al.,
"Neural Network Diffusion", arXiv:2402.13144, for diffusion over parameters. Differs from the latter: a residual
multilayer perceptron replaces the convolution, since the latent dimensions have no order.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.core.checkpoint import without_prefix
from holdfast.core.draws import Draws
from holdfast.core.errors import LostLoss
from holdfast.core.types import NonNegative, Positive, Steps
from holdfast.recipes.training.fit import drawing
from holdfast.rotation import codec
from holdfast.rotation.codec import Embedding, stepped
from holdfast.rotation.diffusion import Diffusion
from holdfast.rotation.distances import apart
from holdfast.rotation.parameter_sets import Members

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
    tensors = {f"codec.{name}": value for name, value in codec.packed(generator.embedding).items()}
    tensors |= {f"denoiser.{name}": value for name, value in generator.denoiser.state_dict().items()}
    settings = torch.tensor([generator.diffusion.steps, generator.diffusion.clamp], dtype=torch.float64)
    return {**tensors, "diffusion": settings}


def unpacked_generator(tensors: Mapping[str, Tensor]) -> Generator:
    """Return the generator of parameter sets from the tensors that were stored in a file. `packed_generator` is the
    inverse.
    """
    embedding, state = codec.unpacked(without_prefix(tensors, "codec.")), without_prefix(tensors, "denoiser.")
    width, depth = len(state["first.bias"]), sum(name.endswith(".bias") for name in state) - 2
    denoiser = Denoiser(embedding.dims, width, depth)
    denoiser.load_state_dict(state)
    steps, clamp = tensors["diffusion"].tolist()
    return Generator(embedding, denoiser.eval().requires_grad_(False), Diffusion(int(steps), clamp))
