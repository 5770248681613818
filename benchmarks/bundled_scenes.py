"""Trains the bundled networks for segmentation and detection on generated scenes, and writes their cards."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from holdfast.io.data.scenes import CLASSES, SIZE, Scenes, scenes
from holdfast.io.models.architectures import ARCHITECTURES
from holdfast.io.models.dense_prediction import overlap
from holdfast.io.models.weights import written

N_TEST = 500
"""Scenes of the test split on which the card states results; they choose nothing."""
BACKGROUND = 0.6
"""Weight of the cross-entropy of pixels of the background."""


@dataclass(frozen=True)
class Training:
    """How one network is made."""

    architecture: str
    arguments: dict[str, int]
    scenes: int
    """number of training scenes, each of which is used once"""
    lr: float
    """largest learning rate of one cycle of AdamW"""
    warmup: float = 0.15
    """share of the steps in which the learning rate rises"""
    weight_decay: float = 0.01
    batch: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Kind:
    """A task with its loss on a batch of scenes, and its results on the test scenes."""

    task: str
    training: Training
    loss: Callable[[nn.Module, Tensor, Scenes], Tensor]
    results: Callable[[nn.Module, Tensor, Scenes], dict[str, float]]


def loss_of_pixels(net: nn.Module, x: Tensor, truth: Scenes) -> Tensor:
    weights = torch.tensor([BACKGROUND, *[1.0] * (len(CLASSES) - 1)])
    return F.cross_entropy(net(x), torch.from_numpy(truth.masks), weight=weights)


def loss_of_boxes(net: nn.Module, x: Tensor, truth: Scenes) -> Tensor:
    losses: dict[str, Tensor] = net(x, targets(torch.from_numpy(truth.boxes)))
    return losses["classification"] + losses["bbox_regression"]


def targets(boxes: Tensor) -> list[dict[str, Tensor]]:
    """The packed objects of each scene in the form of torchvision."""
    objects = [each[each[:, 4] >= 0] for each in boxes]
    return [{"boxes": each[:, :4], "labels": each[:, 4].long()} for each in objects]


def results_of_pixels(net: nn.Module, x: Tensor, truth: Scenes) -> dict[str, float]:
    """Mean IoU of the classes, from one confusion matrix, and the share of right pixels."""
    masks, n = torch.from_numpy(truth.masks), len(CLASSES)
    predicted = net(x).argmax(1)
    counts = torch.bincount((masks * n + predicted).flatten(), minlength=n * n).view(n, n).double()
    hits = counts.diag()
    iou = (hits / (counts.sum(0) + counts.sum(1) - hits)).mean()
    return {"mean IoU": float(iou), "pixel accuracy": float(hits.sum() / counts.sum())}


def results_of_boxes(net: nn.Module, x: Tensor, truth: Scenes) -> dict[str, float]:
    """Share of objects that are found, and of detections of score 0.5 that are right: same label, IoU 0.5 or more."""
    found, present, right, given = 0, 0, 0, 0
    for output, target in zip(net(x), targets(torch.from_numpy(truth.boxes)), strict=True):
        sure = output["scores"] >= 0.5
        common, union = overlap(output["boxes"][sure][:, None], target["boxes"])
        matches = (common >= 0.5 * union) & (output["labels"][sure][:, None] == target["labels"])
        found += int(matches.any(0).sum())
        right += int(matches.any(1).sum())
        present, given = present + len(target["labels"]), given + int(sure.sum())
    return {"recall of objects": found / present, "precision": right / max(given, 1)}


NETWORKS = {
    "scenes-detector": Kind(
        "detection",
        Training("detector", {"width": 12}, scenes=8_000, lr=5e-3),
        loss_of_boxes,
        results_of_boxes,
    ),
    "scenes-unet": Kind(
        "segmentation",
        Training("unet", {}, scenes=14_000, lr=8e-3),
        loss_of_pixels,
        results_of_pixels,
    ),
}
"""The bundled networks on scenes, by name."""


def trained(kind: Kind) -> nn.Module:
    """The network in half precision, in which it is stored, converted back."""
    training, steps = kind.training, kind.training.scenes // kind.training.batch
    torch.manual_seed(training.seed)
    net = ARCHITECTURES[training.architecture](**training.arguments).train()
    optimiser = torch.optim.AdamW(net.parameters(), training.lr, weight_decay=training.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, training.lr, total_steps=steps, pct_start=training.warmup
    )
    for step in range(steps):
        truth = scenes(training.batch, training.seed, split="train", start=step * training.batch)
        optimiser.zero_grad()
        kind.loss(net, floats(truth), truth).backward()
        optimiser.step()
        schedule.step()
    return net.half().float().eval()


def floats(truth: Scenes) -> Tensor:
    return torch.from_numpy(truth.x).float() / 255


def write_network(name: str, folder: Path) -> None:
    """Train a network, and write its weights in half precision and its card."""
    kind, start = NETWORKS[name], time.process_time()
    net = trained(kind)
    spent = time.process_time() - start
    test = scenes(N_TEST, split="test")
    with torch.no_grad():
        results = kind.results(net, floats(test), test)
    described = {
        "architecture": kind.training.architecture,
        "arguments": kind.training.arguments,
        "bounds": [0.0, 1.0],
        "class_names": list(CLASSES),
        "task": kind.task,
    }
    (folder / f"{name}.safetensors").write_bytes(written(net.half(), described))
    rows = "\n".join(
        f"| {title}, the {N_TEST} test scenes | {value:.4f} |" for title, value in results.items()
    )
    settings = "\n".join(f"    {line}" for line in json.dumps(asdict(kind.training), indent=2).splitlines())
    n_parameters = sum(p.numel() for p in net.parameters())
    text = f"""# {name}

A small network for {kind.task}, trained in the ordinary way, undefended. Bundled for demonstration and tests, not for
production.

| | |
| --- | --- |
| architecture | `{kind.training.architecture}`, {n_parameters:,} parameters in half precision |
| input | 3 x {SIZE} x {SIZE}, values in [0, 1] |
| classes | {", ".join(CLASSES)} |
| data | generated scenes: the first {kind.training.scenes:,} of the training split |
| command | `make bundled`, seed {kind.training.seed} (one seed), {spent:.0f} s of CPU time on one thread |
| versions | torch {torch.__version__.split("+")[0]}, numpy {np.__version__} |
{rows}

Settings:

{settings}

Licence: Apache-2.0. The digits of the scenes are of MNIST by Yann LeCun, Corinna Cortes and Christopher J. C. Burges
(CC BY-SA 3.0).
"""
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
