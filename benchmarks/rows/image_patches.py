"""A patch of its own for every image, beside the two of others that move it: by gradients, and by scores alone.

That of Rao et al., "Adversarial Training against Location-Optimized Adversarial Patches", ECCV 2020 workshop,
arXiv:2005.02313, takes as many gradients as ours, split over two starts, and never lies on the last row or column;
Sparse-RS (arXiv:2006.12834) is given many queries.
"""

import random
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.networks import present
from benchmarks.paired import Peer, contest
from benchmarks.peers import peer
from benchmarks.record import Cells, Claim, Outcome
from holdfast.attacks import PatchAttack
from holdfast.threats.transformations import Patch

WHAT = "a patch for each image, beside Rao et al.'s at as many gradients and Sparse-RS: broken on the same images"
SETTINGS = (("cifar_cnn_a_adv", 4), ("hardened-by-hand", 5))
"""Networks and sides of the square, where not all are broken."""
N, STEPS, STARTS, QUERIES, SEED = 200, 100, 2, 3000, 0
STEP_SIZE, STRIDE = 0.05, 2
"""Of Rao et al., as in the authors' commands."""


def measured() -> Outcome:
    table: list[Cells] = []
    claims: list[Claim] = []
    notes: list[str] = []
    for net, x, y, side in present(SETTINGS, N, notes):
        rivals: dict[str, Peer] = {
            f"Rao et al., {how}": partial(_rao, how=how, side=side) for how in ("random", "full")
        }
        if x.shape[1] == 3:
            rivals["Sparse-RS"] = partial(_sparse_rs, side=side)
        claims += contest(
            f"{net.name}, {side}x{side}", net.module, x, y, Patch(side, side), {"PatchAttack": PatchAttack()}, rivals,
            table, notes, seed=SEED,
        )  # fmt: skip
    config = {"n": N, "steps": STEPS, "starts": STARTS, "queries": QUERIES, "seed": SEED}
    return Outcome(table, claims, config, notes=notes)


def _rao(net: nn.Module, x: Tensor, y: Tensor, *, how: str, side: int) -> Tensor:
    """The authors' patches that move along with the loss, to one neighbour at random or to the best of four."""
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002 - the peer draws from the global state
    height, width = x.shape[2:]
    places = peer("common.mask").MaskGenerator(
        (height, width), (side, side), include_list=np.array([[0, 0, height - 1, width - 1]])
    )
    attack = peer("attacks.adversarial_patch").AdversarialPatch(
        places, STEP_SIZE, STEPS, optimize_location=True, optimize_location_type=how, stride=STRIDE, signed_grad=True
    )  # fmt: skip
    objective = peer("attacks.objectives").UntargetedF0Objective()
    objective.set(y)
    out = x.clone()
    for _ in range(STARTS):
        changes, _ = attack.run(net, x, objective)
        found = (x + torch.from_numpy(changes)).clamp(0, 1)
        with torch.no_grad():
            broken = net(found).argmax(1) != y
        out[broken] = found[broken]
    return out


def _sparse_rs(net: nn.Module, x: Tensor, y: Tensor, *, side: int) -> Tensor:
    """Its single-channel updates are of three channels, so that grey images are beyond it."""
    attack = peer("rs_attacks").RSAttack(
        net,
        norm="patches",
        eps=side * side,
        n_queries=QUERIES,
        p_init=0.3,
        seed=SEED,
        verbose=False,
        device="cpu",
    )
    found: Tensor = attack.perturb(x, y)[1]
    return found
