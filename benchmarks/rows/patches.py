"""One learned patch on traffic signs, beside ART's at equal steps; both pasted into the same test images."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import ours
from benchmarks.absent import Absent
from benchmarks.meter import cpu_seconds
from benchmarks.peers import peer
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.traffic_signs import CLASSES, signs, trained
from holdfast.attacks import AdversarialPatch
from holdfast.attacks.parts.images import pasted
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.threats.transformations import Patch

WHAT = "a patch of 8x8 pixels learned on the train split of traffic signs, and ART's at equal steps"
SIDE, BATCH, EPOCHS, JITTER, SEED = 8, 64, 3, 3, 0
TARGETS = (1, 5, 14)
"""Speed limits of 30 and 80 km/h, and stop."""

Learn = Callable[[int | None, Patch], Tensor]


def measured() -> Outcome:
    net, table = trained(), []
    sides: dict[str, Learn] = {"AdversarialPatch": partial(_ours, net)}
    notes: list[str] = []
    try:
        peer("art")
        peer("torchvision")
        sides["ART"] = partial(_art, net)
    except Absent as why:
        notes.append(f"ART: {why}")
    found: dict[tuple[str, str], float] = {}
    for who, learn in sides.items():
        for goal in (None, *TARGETS):
            found[who, str(goal)] = _one(net, who, learn, goal, Patch(SIDE, SIDE, "centre"), table)
    near = _one(
        net, "AdversarialPatch", sides["AdversarialPatch"], None, Patch(SIDE, SIDE, "centre", JITTER), table
    )
    means = {who: float(np.mean([found[who, str(goal)] for goal in TARGETS])) for who in sides}
    claims = [
        Claim("accuracy under the patch <= 0.05", found["AdversarialPatch", "None"], 0.05),
        Claim(f"accuracy under it within {JITTER} pixels of its place <= 0.12", near, 0.12),
        Claim("targeted success of the easiest class >= 0.80",
              max(found["AdversarialPatch", str(goal)] for goal in TARGETS), 0.80, least=True),
    ]  # fmt: skip
    if "ART" in sides:
        claims += [
            Claim("mean targeted success over ART's >= 0", means["AdversarialPatch"] - means["ART"], 0.0, least=True),
            Claim("accuracy under it over ART's <= 0", found["AdversarialPatch", "None"] - found["ART", "None"], 0.0),
        ]  # fmt: skip
    config = {
        "side": SIDE,
        "batch": BATCH,
        "epochs": EPOCHS,
        "jitter": JITTER,
        "seed": SEED,
        "targets": TARGETS,
    }
    return Outcome(table, claims, config, {"mean targeted success": means}, notes)


def _one(net: nn.Module, who: str, learn: Learn, goal: int | None, patch: Patch, table: list[Cells]) -> float:
    """Untargeted: the accuracy that is left. Targeted: the share of the others that are taken for the target."""
    x, y = signs("test")
    learned: list[Tensor] = []
    seconds = cpu_seconds(lambda: learned.append(learn(goal, patch)))
    corners = patch.drawn(torch.arange(len(x)), x.shape[1:], Draws(SEED))
    with torch.no_grad():
        clean, attacked = net(x).argmax(1), net(pasted(x, learned[0], corners)).argmax(1)
    if goal is None:
        value = ((clean == y) & (attacked == y)).double().mean().item()
    else:
        others = (y != goal) & (clean != goal)
        value = (attacked[others] == goal).double().mean().item()
    measure = "accuracy" if goal is None else "targeted success"
    table.append({"who": who, "patch": str(patch), "target": goal, "measure": measure, "value": value,
                  "CPU s": seconds})  # fmt: skip
    return value


def _steps(n: int) -> int:
    """As many as there are batches in the epochs, the last of each cut short."""
    return EPOCHS * -(-n // BATCH)


def _ours(net: nn.Module, goal: int | None, patch: Patch) -> Tensor:
    x, y = signs("train")
    batch, threat = ours.batch(x, y), ThreatModel(patch, goal=goal)
    if goal is not None:
        batch = batch.take(y != goal).towards(torch.full_like(y[y != goal], goal))
    attack = AdversarialPatch(examples=len(batch), steps=_steps(len(batch)), batch=BATCH)
    return attack.fit(Classifier(net).eval().requires_grad_(False), batch, threat, rng=Draws(SEED))


def _art(net: nn.Module, goal: int | None, patch: Patch) -> Tensor:
    """ART's with Adam at a twentieth of the box a step, as wide as our own mean step, without turns or scales."""
    from art.attacks.evasion import AdversarialPatchPyTorch
    from art.estimators.classification import PyTorchClassifier

    torch.manual_seed(SEED)
    x, y = signs("train")
    if goal is not None:
        x, y = x[y != goal], torch.full_like(y[y != goal], goal)
    classifier = PyTorchClassifier(
        net, nn.CrossEntropyLoss(), x.shape[1:], CLASSES, clip_values=(0.0, 1.0), device_type="cpu"
    )
    at = (x.shape[2] - SIDE) // 2
    attack = AdversarialPatchPyTorch(
        classifier, rotation_max=0.0, scale_min=1.0, scale_max=1.0001, learning_rate=0.05, max_iter=EPOCHS,
        batch_size=BATCH, patch_shape=(3, SIDE, SIDE), patch_location=(at, at), patch_type="square",
        optimizer="Adam", targeted=goal is not None, verbose=False,
    )  # fmt: skip
    learned, _ = attack.generate(x.numpy(), np.eye(CLASSES, dtype=np.float32)[y.numpy()])
    return torch.from_numpy(learned)[None].float()
