"""Adversarial training with PGD-7: CPU time of our engine over the bare loop of its passes, beside others."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import ours
from benchmarks.networks import images, two_conv_two_fc
from benchmarks.peers import peer
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.side_by_side import FLOOR, ratio, timed
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.recipes import PGDTraining
from holdfast.recipes.training.fit import Training

WHAT = (
    "adversarial training with PGD-7, batches of 128: CPU time over the bare loop of k + 1 passes, one thread"
)
STEPS, BATCH, UPDATES, ROUNDS = 7, 128, 8, 21
SETTINGS = (("mnist", 1, 28, 0.3), ("cifar10", 3, 32, 8 / 255))
LR = 1e-3


def measured() -> Outcome:
    table: list[Cells] = []
    claims, detail, notes = [], {}, []
    for data, channels, side, eps in SETTINGS:
        x, y = images(data, BATCH * UPDATES, split="train")
        torch.manual_seed(0)
        net = two_conv_two_fc(channels, side)
        contestants: dict[str, Callable[[], object]] = {
            FLOOR: partial(_bare, net, x, y, eps),
            "holdfast": partial(_holdfast, net, x, y, eps, "ema"),
            "holdfast, weights not averaged": partial(_holdfast, net, x, y, eps, "none"),
            "torchattacks in a loop": partial(_torchattacks, net, x, y, eps),
            "ART": partial(_art, net, x, y, eps),
        }
        seconds, absent = timed(contestants, ROUNDS)
        notes += [f"{who}: {why}" for who, why in absent.items()]
        table += [{"data": data, "who": who, "cost / floor": ratio(seconds, who)} for who in seconds]
        claims.append(Claim(f"{data}: ours / floor <= 1.05", ratio(seconds, "holdfast"), 1.05))
        detail[data] = seconds
    config: Cells = {"steps": STEPS, "batch": BATCH, "updates": UPDATES, "rounds": ROUNDS, "lr": LR}
    return Outcome(table, claims, config, detail, notes)


def _bare(net: nn.Module, x: Tensor, y: Tensor, eps: float) -> None:
    """The loop as papers write it: signed steps from a random start, then an update."""
    net = deepcopy(net)
    optimizer = torch.optim.AdamW(net.parameters(), LR)
    for some, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
        delta = torch.empty_like(some).uniform_(-eps, eps)
        for _ in range(STEPS):
            delta.requires_grad_()
            loss = F.cross_entropy(net((some + delta).clamp(0, 1)), labels)
            (grad,) = torch.autograd.grad(loss, delta)
            delta = (delta.detach() + 2.5 * eps / STEPS * grad.sign()).clamp(-eps, eps)
        _update(net, optimizer, (some + delta).clamp(0, 1), labels)


def _update(net: nn.Module, optimizer: torch.optim.Optimizer, x_adv: Tensor, labels: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(net(x_adv), labels).backward()
    optimizer.step()


def _holdfast(net: nn.Module, x: Tensor, y: Tensor, eps: float, averaging: Literal["ema", "none"]) -> None:
    how = Training(epochs=1, batch=BATCH, lr=LR, averaging=averaging)
    threat = ThreatModel(ours.constraint("Linf", eps))
    list(PGDTraining(steps=STEPS, training=how)(Classifier(net), ours.batch(x, y), threat, rng=Draws(0)))


def _torchattacks(net: nn.Module, x: Tensor, y: Tensor, eps: float) -> None:
    net = deepcopy(net)
    attack = peer("torchattacks").PGD(net, eps=eps, alpha=2.5 * eps / STEPS, steps=STEPS)
    optimizer = torch.optim.AdamW(net.parameters(), LR)
    for some, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
        _update(net, optimizer, attack(some, labels), labels)


def _art(net: nn.Module, x: Tensor, y: Tensor, eps: float) -> None:
    peer("art.defences.trainer")
    net = deepcopy(net)
    classifier = peer("art.estimators.classification").PyTorchClassifier(
        net, nn.CrossEntropyLoss(), tuple(x.shape[1:]), 10, optimizer=torch.optim.AdamW(net.parameters(), LR),
        clip_values=(0.0, 1.0), device_type="cpu",
    )  # fmt: skip
    trainer = peer("art.defences.trainer").AdversarialTrainerMadryPGD(
        classifier,
        nb_epochs=1,
        batch_size=BATCH,
        eps=eps,
        eps_step=2.5 * eps / STEPS,
        max_iter=STEPS,
        num_random_init=1,
    )
    trainer.fit(x.numpy(), F.one_hot(y, 10).numpy())
