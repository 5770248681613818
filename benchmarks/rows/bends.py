"""Bent images beside advertorch's stAdv, both allowed to take a pixel from so far and no farther.

The paper leaves the length of its flow free, and punishes how much the flow varies. So that both search the same set,
the peer's L-BFGS-B is given coordinates in which every point is a flow within the limit.
"""

from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.networks import present
from benchmarks.paired import contest
from benchmarks.peers import peer
from benchmarks.record import Cells, Claim, Outcome
from holdfast.attacks import Flow
from holdfast.threats.transformations import Spatial

WHAT = "bent images, Flow and advertorch's stAdv within the same length of flow: broken on the same images"
SETTINGS = (("mnist-cnn", 0.35), ("mnist_cnn_a_adv", 0.5), ("cifar_cnn_a_adv", 0.2))
"""Networks and lengths in pixels, where about half are broken."""
N, STEPS, WEIGHTS, SEED = 200, 250, (0.05, 0.001), 0
"""Steps of L-BFGS-B for each image, as many as all of ours; the paper's weight of the variation, and our own."""


def measured() -> Outcome:
    table: list[Cells] = []
    claims: list[Claim] = []
    notes: list[str] = []
    for net, x, y, length in present(SETTINGS, N, notes):
        rivals = {f"advertorch, weight {w:g}": partial(_stadv, length=length, weight=w) for w in WEIGHTS}
        claims += contest(
            f"{net.name}, {length:g} pixels", net.module, x, y, Spatial(flow=length), {"Flow": Flow()}, rivals, table,
            notes, seed=SEED,
        )  # fmt: skip
    config = {"n": N, "steps": STEPS, "weights": WEIGHTS, "seed": SEED}
    return Outcome(table, claims, config, notes=notes)


def _stadv(net: nn.Module, x: Tensor, y: Tensor, *, length: float, weight: float) -> Tensor:
    """One image after the other, as in the paper: for a batch, the peer has one search over all of it."""
    import scipy.optimize

    attack = peer("advertorch.attacks.spatial").SpatialTransformAttack(
        net, num_classes=10, initial_const=weight, max_iterations=STEPS
    )
    search = partial(_within, scipy.optimize.fmin_l_bfgs_b, length, x.shape[2:])
    with mock.patch.object(scipy.optimize, "fmin_l_bfgs_b", search):
        found = torch.cat([attack.perturb(x[k : k + 1], y[k : k + 1]) for k in range(len(x))])
    lost = ~found.flatten(1).any(1)  # all zero where it found nothing
    return torch.where(lost[:, None, None, None], x, found)


def _within(
    search: Any, length: float, size: torch.Size, value: Any, start: np.ndarray, *, args: tuple[Any, ...],
    bounds: Any, iprint: int, **settings: Any,
) -> tuple[np.ndarray, Any, Any]:  # fmt: skip
    """The peer's search over `z` at each pixel, which moves it by z / (1 + |z|^2)^0.5 of the length: less than all."""
    height, width = size
    unit = length * np.array([2 / width, 2 / height])  # its grid is two wide and two high

    def moved(z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        z = z.reshape(height, width, 2)
        root = np.sqrt(1 + np.square(z).sum(-1, keepdims=True))
        return start + (unit * z / root).ravel(), z, root

    def slope(at: np.ndarray) -> tuple[Any, np.ndarray]:
        grid, z, root = moved(at)
        height_there, down = value(grid, *args)
        down = unit * down.reshape(z.shape)
        return height_there, (down / root - z * (z * down).sum(-1, keepdims=True) / root**3).ravel()

    found, *more = search(slope, np.zeros_like(start), **settings)
    return moved(found)[0], *more
