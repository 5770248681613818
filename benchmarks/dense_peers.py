"""Other implementations of attacks on segmentation and detection, on the bundled networks of scenes.

Each attack is a function of images (n, 3, h, w) in [0, 1], their truth, the number of forward and backward passes of
each image, and a seed, and returns attacked images. The truth is a tensor of masks (n, h, w), or of packed boxes
(n, k, 6) as `holdfast.io.data.scenes` returns them.

- `segpgd`: Gu et al., "SegPGD: An Effective and Efficient Adversarial Attack for Evaluating and Boosting Segmentation
  Robustness", ECCV 2022, arXiv:2207.12391, written from the paper.
- `tog_vanishing`: Chow et al., "Adversarial Objectness Gradient Attacks in Real-time Object Detection Systems", TPS
  2020, arXiv:2004.04320, written from the paper. Its loss is that of a detector in training without objects, which the
  form of torchvision permits: the targets have no boxes. `tog_on_outputs` has the same loss of the scores that the
  detector returns, for a detector that has no losses.
- `art_pgd` and `art_vanishing`: PGD of the Adversarial Robustness Toolbox on its `PyTorchObjectDetector`, away from the
  true objects, and towards targets without objects.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from copy import deepcopy
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.bundled_scenes import targets
from benchmarks.peers import peer, stand_ins
from holdfast.io.models.models import open_model

EPS_OF_MASKS, EPS_OF_BOXES = 2 / 255, 8 / 255
SEGPGD_STEP = 0.01 / (8 / 255)
"""Step size relative to eps: benchmarks of SegPGD use 0.01 at 8/255."""
TOG_STEP = 1 / 4
"""Step size relative to eps: the authors use 2/255 at 8/255."""
LOSSES = ("classification", "bbox_regression")

PeerAttack = Callable[[Tensor, Tensor, int, int], Tensor]


@cache
def network(name: str) -> nn.Module:
    """A bundled network, in evaluation mode."""
    net = open_model(name).model.net
    assert isinstance(net, nn.Module)
    return net.requires_grad_(False).eval()


def segpgd(images: Tensor, masks: Tensor, passes: int, seed: int) -> Tensor:
    """SegPGD with lambda = (t - 1) / 2T in pass t of T: the weight of wrong pixels grows from 0 to almost that of right
    ones.
    """
    net, done = network("scenes-unet"), 0

    def loss(x: Tensor) -> Tensor:
        nonlocal done
        logits, weight = net(x), done / (2 * passes)
        right = logits.argmax(1) == masks
        done += 1
        entropy = F.cross_entropy(logits, masks, reduction="none")
        return torch.where(right, (1 - weight) * entropy, weight * entropy).mean((1, 2)).sum()

    return _ascended(loss, images, EPS_OF_MASKS, SEGPGD_STEP, passes, seed)


def tog_vanishing(images: Tensor, boxes: Tensor, passes: int, seed: int) -> Tensor:
    """TOG vanishing: the loss of training without objects falls."""
    net, empty = _in_training(), targets(torch.full_like(boxes, -1))

    def loss(x: Tensor) -> Tensor:
        losses: Mapping[str, Tensor] = net(x, empty)
        return -losses["classification"]

    return _ascended(loss, images, EPS_OF_BOXES, TOG_STEP, passes, seed)


def tog_on_outputs(images: Tensor, boxes: Tensor, passes: int, seed: int) -> Tensor:
    """TOG vanishing on the scores of the detections: the sum of -log(1 - score) falls."""
    net = network("scenes-detector")

    def loss(x: Tensor) -> Tensor:
        scores = torch.cat([output["scores"] for output in net(x)])
        return torch.log1p(-scores.clamp(max=1 - 1e-6)).sum()

    return _ascended(loss, images, EPS_OF_BOXES, TOG_STEP, passes, seed)


def art_pgd(images: Tensor, boxes: Tensor, passes: int, seed: int) -> Tensor:
    """PGD of ART, which raises the losses of training with the true objects. It has no random draws: for detectors, ART
    starts at the images.
    """
    return _by_art(images, targets(boxes), passes, targeted=False)


def art_vanishing(images: Tensor, boxes: Tensor, passes: int, seed: int) -> Tensor:
    """Targeted PGD of ART: the losses of training without objects fall. It has no random draws either."""
    return _by_art(images, targets(torch.full_like(boxes, -1)), passes, targeted=True)


ON_MASKS: Mapping[str, PeerAttack] = {"SegPGD": segpgd}
ON_BOXES: Mapping[str, PeerAttack] = {
    "TOG vanishing": tog_vanishing,
    "TOG vanishing, outputs": tog_on_outputs,
    "ART PGD": art_pgd,
    "ART PGD, no objects": art_vanishing,
}


def _ascended(
    loss: Callable[[Tensor], Tensor], images: Tensor, eps: float, step: float, passes: int, seed: int
) -> Tensor:
    """The last of `passes` steps of equal size from a random start, as in both papers."""
    draws = torch.Generator().manual_seed(seed)
    x = (images + (2 * torch.rand(images.shape, generator=draws) - 1) * eps).clamp(0, 1)
    for _ in range(passes):
        x.requires_grad_(True)
        value = loss(x)
        # no detection is left, and no gradient
        gradient = torch.autograd.grad(value, x)[0] if value.requires_grad else torch.zeros_like(x)
        x = x.detach() + step * eps * gradient.sign()
        x = x.clamp(images - eps, images + eps).clamp(0, 1)
    return x


def _in_training() -> nn.Module:
    """A copy of the detector that returns losses, with the fixed statistics of batch norm."""
    net = deepcopy(network("scenes-detector")).train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return net


def _by_art(images: Tensor, wanted: list[dict[str, Tensor]], passes: int, *, targeted: bool) -> Tensor:
    detection, evasion = peer("art.estimators.object_detection"), peer("art.attacks.evasion")
    # ART reads the version of torchvision and uses nothing of it here
    lacking = find_spec("torchvision") is None
    torchvision: Mapping[str, Mapping[str, Any]] = {"torchvision": {"__version__": "0.20"}}
    with stand_ins(torchvision) if lacking else nullcontext():
        estimator = detection.PyTorchObjectDetector(
            deepcopy(network("scenes-detector")), tuple(images.shape[1:]), clip_values=(0, 1), attack_losses=LOSSES,
            device_type="cpu",
        )  # fmt: skip
    attack = evasion.ProjectedGradientDescent(
        estimator, eps=EPS_OF_BOXES, eps_step=TOG_STEP * EPS_OF_BOXES, max_iter=passes, targeted=targeted,
        batch_size=len(images), verbose=False,
    )  # fmt: skip
    truth = [{name: value.numpy() for name, value in each.items()} for each in wanted]
    return torch.from_numpy(attack.generate(x=images.numpy(), y=truth))
