"""Colours turned and faded by our gradients and grid, beside random trials of colours.

Hosseini & Poovendran, "Semantic Adversarial Examples", CVPR 2018 workshop, arXiv:1804.00499: 1,000 trials for each
image, the hue anywhere and the saturation within limits that grow from nothing. That search runs twice: in the colours
of our threat, so that both search the same set; and, where hue and saturation are free, in those of the paper, HSV.
There a shift of the saturation may make any colour full, which our threat does not allow: that one is shown and nothing
is claimed of it.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.networks import present
from benchmarks.paired import Peer, contest
from benchmarks.record import Cells, Claim, Outcome
from holdfast.attacks import GridSearch, TransformPGD
from holdfast.attacks.parts.images import reached
from holdfast.core.model import Bounds
from holdfast.threats.transformations import Colour

WHAT = "colours turned and faded, beside 1,000 random trials: broken on the same images"
FREE, NARROW = Colour(hue=180, saturation=1), Colour(hue=18, saturation=0.3, brightness=0.2, contrast=0.3)
SETTINGS = (("cifar_cnn_a_adv", FREE, 200), ("cifar_cnn_a_adv", NARROW, 200), ("cifar_resnet20", FREE, 100))
TRIALS, SEED, HSV = 1000, 0, "random trials in HSV"
ATTACKS = {"TransformPGD": TransformPGD(), "GridSearch": GridSearch()}


def measured() -> Outcome:
    table: list[Cells] = []
    claims: list[Claim] = []
    notes: list[str] = []
    for net, x, y, threat, n in present(SETTINGS, max(n for *_, n in SETTINGS), notes):
        rivals: dict[str, Peer] = {"random trials": partial(_trials, change=partial(_turned, threat))}
        if threat == FREE:
            rivals[HSV] = partial(_trials, change=_hsv)
        claims += contest(
            f"{net.name}, {threat}", net.module, x[:n], y[:n], threat, ATTACKS, rivals, table, notes, seed=SEED,
            wider=frozenset([HSV]),
        )  # fmt: skip
    config = {"networks, threats and n": [[name, str(threat), n] for name, threat, n in SETTINGS], "trials": TRIALS,
              "seed": SEED}  # fmt: skip
    return Outcome(table, claims, config, notes=notes)


def _trials(net: nn.Module, x: Tensor, y: Tensor, *, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The authors' search: whoever is broken leaves, and the last limits are the widest."""
    out, left = x.clone(), torch.arange(len(x))
    with torch.no_grad():
        for trial in range(TRIALS):
            place = 2 * torch.rand(len(left), 4) - 1
            place[:, 1:] *= trial / TRIALS
            changed = change(x[left], place)
            broken = net(changed).argmax(1) != y[left]
            out[left[broken]], left = changed[broken], left[~broken]
            if not len(left):
                break
    return out


def _turned(threat: Colour, x: Tensor, place: Tensor) -> Tensor:
    return reached(x, place[:, : len(threat.axes)], threat, Bounds(0, 1))


def _hsv(x: Tensor, place: Tensor) -> Tensor:
    """Hue and saturation shifted by what the authors add to them, the value as it was."""
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    red, green, blue = (x / chroma.clamp_min(1e-12)[:, None]).unbind(1)
    sixth = torch.where(
        value == x[:, 0], (green - blue) % 6, torch.where(value == x[:, 1], blue - red + 2, red - green + 4)
    )
    hue = sixth + 3 * place[:, 0, None, None]
    saturation = (chroma / value.clamp_min(1e-12) + place[:, 1, None, None]).clamp(0, 1)
    faded = []
    for corner in (5, 3, 1):
        far = (corner + hue) % 6
        faded.append(value * (1 - saturation * torch.minimum(far, 4 - far).clamp(0, 1)))
    return torch.stack(faded, 1)
