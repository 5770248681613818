"""Attacks on functions of a generator, such as its decoder: the largest change of the output for a bounded change of
the input, and the directions to which the output is most sensitive.

The search is PGD: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018,
arXiv:1706.06083. Differs from the paper: the norm is Euclidean, step sizes follow a cosine to zero, and the best
iterate of each row is returned instead of the last.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.functional import jvp, vjp

from holdfast.core.constraints import L2
from holdfast.core.draws import Draws
from holdfast.core.model import Bounds
from holdfast.core.types import Inputs, PerExample, Positive, Restarts, Steps

Function = Callable[[Tensor], Tensor]
UNBOUNDED = Bounds(-math.inf, math.inf)
"""bounds of latent vectors"""


@dataclass(frozen=True)
class Search:
    """PGD that maximises any function of each row."""

    steps: Steps = 20
    restarts: Restarts = 2
    step_size: Positive = 8.0
    """first step size as a multiple of the radius; with it, PGD on a linear decoder converges like power iteration"""

    def __call__(
        self,
        value: Function,
        x: Inputs,
        radius: Tensor,
        bounds: Bounds,
        rng: Draws,
        start: Inputs | None = None,
    ) -> Inputs:
        """Return, for each row of `x`, the valid point within the Euclidean `radius` (n) that was found to have the
        largest `value`, a function that returns one number for each row (n). The search begins at random points of the
        boundary of the ball, and at first at `start` if it is given. Cost: `restarts` times `steps` backward passes.
        """
        best, best_value = x.clone(), torch.full_like(radius, -math.inf)
        for restart in range(self.restarts):
            given = start if restart == 0 else None
            point = perturbed(x, radius, bounds, rng.at("restart", restart)) if given is None else given
            point = L2().within(point, x, bounds, radius)
            for step in range(self.steps + 1):
                point = point.detach().requires_grad_()
                with torch.enable_grad():
                    found = value(point)
                    (slope,) = torch.autograd.grad(found.sum(), point)
                better = found.detach() > best_value
                best[better], best_value[better] = point.detach()[better], found.detach()[better]
                size = self.step_size * (1 + math.cos(math.pi * step / self.steps)) / 2
                moved = point.detach() + _rows(size * radius, x) * L2().steepest(slope, x, bounds)
                point = L2().within(moved, x, bounds, radius)
        return best


SEARCH = Search()
"""search with the usual settings"""


def perturbed(x: Inputs, radius: Tensor, bounds: Bounds, rng: Draws) -> Inputs:
    """Return each row moved by `radius` (n) in a random direction, clipped to the bounds."""
    noise = rng.normal(torch.arange(len(x), device=x.device), *x.shape[1:], dtype=x.dtype)
    moved = x + _rows(radius, x) * L2().steepest(noise, x, bounds)
    return L2().within(moved, x, bounds, radius)


def distances(a: Tensor, b: Tensor) -> PerExample:
    """Return the Euclidean distance of the rows of two tensors (n, *features)."""
    found: PerExample = torch.linalg.vector_norm((a - b).flatten(1), dim=1)
    return found


def squared(a: Tensor, b: Tensor) -> PerExample:
    """Return the squared Euclidean distance of the rows, whose gradient is defined everywhere."""
    return (a - b).flatten(1).square().sum(1)


def latent_radius(z: Tensor, eps: float) -> Tensor:
    """Return the radius (n) of changes of latent vectors of a root mean square of `eps`: eps times the square root of
    the number of elements.
    """
    return torch.full((len(z),), eps * math.sqrt(z[0].numel()), dtype=z.dtype, device=z.device)


def worst_latents(
    decode: Function,
    z: Tensor,
    eps: float,
    rng: Draws,
    direction: Tensor | None = None,
    search: Search = SEARCH,
) -> Tensor:
    """Return latent vectors (n, *latent) within `latent_radius` of `z` that change the output of `decode` most, as the
    Euclidean distance |decode(z + d) - decode(z)|. The first restart begins in a `direction` (*latent) of length 1 if
    it is given.
    """
    with torch.no_grad():
        before = decode(z)
    radius = latent_radius(z, eps)
    start = None if direction is None else z + _rows(radius, z) * direction
    return search(lambda points: squared(decode(points), before), z, radius, UNBOUNDED, rng, start)


def sensitive_directions(
    decode: Function, z: Tensor, count: int, rng: Draws, iterations: int = 10
) -> tuple[Tensor, PerExample]:
    """Return the `count` orthonormal directions (count, *latent) to which the output is most sensitive, in descending
    order, and their gains (count): the root mean square, over the rows of `z`, of the change of the output for each
    unit of a small change in the direction.

    They are the eigenvectors of the mean of the products of the transposed Jacobian with itself, by orthogonal
    iteration; for a linear decoder, the right singular vectors and singular values of its matrix. Cost: about five
    passes for each direction and iteration.
    """
    size = z[0].numel()
    count = min(count, size)
    basis = rng.normal(torch.arange(count, device=z.device), size, dtype=z.dtype).T
    basis = torch.linalg.qr(basis).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(_product(decode, z, basis)).Q
    product = _product(decode, z, basis)
    # the eigenvectors inside the subspace, in descending order
    small = basis.T @ product
    values, rotation = torch.linalg.eigh((small + small.T) / 2)
    directions = (basis @ rotation).flip(1).T
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    directions = directions * torch.where(largest < 0, -1, 1)  # an eigenvector has no sign
    return directions.view(count, *z.shape[1:]), values.flip(0).clamp_min(0).sqrt()


def _product(decode: Function, z: Tensor, basis: Tensor) -> Tensor:
    """The mean over the rows of the transposed Jacobian times the Jacobian, times each column of a basis."""
    columns = []
    for column in basis.T:
        direction = column.view(1, *z.shape[1:]).expand_as(z).contiguous()
        change = jvp(decode, z, direction)[1]  # type: ignore[no-untyped-call]
        product = vjp(decode, z, change)[1]  # type: ignore[no-untyped-call]
        columns.append(product.flatten(1).mean(0))
    return torch.stack(columns, 1)


def _rows(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.dim() - 1))
