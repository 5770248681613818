"""An ensemble of three adversarially trained networks, and a mix of one of them with an accurate network: CIFAR-10.

The parts are kept as they are done, so that the row may be run in pieces.
"""

import time
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import holdfast
from benchmarks.networks import images
from benchmarks.parts import RUNS, part
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.rows.cifar_hardening import MEAN, STD
from holdfast.attacks.pgd import PGD
from holdfast.core.batch import Batch
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.io.models.architectures import ResidualBlock
from holdfast.io.models.composed import fitted
from holdfast.metrics.shares import robust, suite_robust
from holdfast.recipes import SingleStep, Standard
from holdfast.recipes.training.fit import Training
from holdfast.recipes.training.recipe import Recipe
from holdfast.statistics.intervals import paired_difference
from holdfast.verbs.opening.arguments import ModelLike

WHAT = "CIFAR-10, Linf 8/255: an ensemble of three small adversarially trained networks, and a mix with an accurate one"
ROW, EPS, TRAINED, FITTED, N = "ensembles", 8 / 255, 48_000, 1_000, 1_000
WIDTH = 16
HOW = Training(epochs=6, optimizer="sgd", lr=0.1, augment="crop-flip", layout="channels-last")
NETWORKS: dict[str, tuple[int, Recipe]] = {
    "robust-0": (0, SingleStep(training=HOW)),
    "robust-1": (1, SingleStep(training=HOW)),
    "robust-2": (2, SingleStep(training=HOW)),
    "accurate": (3, Standard(training=HOW)),
}
"""Seed and recipe of each network."""


def network() -> nn.Module:
    """A residual network whose first layer halves the image, so that three minutes suffice for six epochs."""
    return nn.Sequential(
        nn.Conv2d(3, WIDTH, 3, 2, 1, bias=False),
        nn.BatchNorm2d(WIDTH),
        nn.ReLU(),
        ResidualBlock(WIDTH, WIDTH, 1),
        ResidualBlock(WIDTH, 2 * WIDTH, 2),
        ResidualBlock(2 * WIDTH, 4 * WIDTH, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * WIDTH, 10),
    )


def _weights(name: str) -> Path:
    return RUNS / ROW / f"{name}.safetensors"


@cache
def _training() -> Batch:
    x, y = images("cifar10", TRAINED, split="train")
    return Batch(x, y, torch.arange(len(x)))


def _trained(name: str) -> Cells:
    """Train a network, and keep its weights in the cache."""
    seed, recipe = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = network()
    model = Classifier(net, mean=MEAN, std=STD, classes=10)
    data = _training()
    begun = time.process_time()
    *_, last = recipe(model, data, ThreatModel(Linf(EPS)), rng=Draws(seed).at("training"))
    spent = time.process_time() - begun
    last.put_into(model)
    _weights(name).parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in net.state_dict().items()}, _weights(name))
    return {"cpu_s": round(spent, 1), "parameters": sum(p.numel() for p in model.parameters())}


def trained(name: str) -> Cells:
    """What the training of a network took; its weights are in the cache afterwards."""
    if not _weights(name).is_file():
        (RUNS / ROW).mkdir(parents=True, exist_ok=True)
    return part(ROW, name, lambda: _trained(name))["measured"]  # type: ignore[no-any-return]


def reopened(name: str) -> Classifier:
    """A trained network."""
    net = network()
    net.load_state_dict(load_file(_weights(name)))
    return Classifier(net, mean=MEAN, std=STD, classes=10).eval()


def mix_parameters() -> dict[str, float]:
    """The parameters of the mix, fitted on training images that follow those of the trainings."""

    def fitted_parameters() -> dict[str, float]:
        x, y = images("cifar10", FITTED, "train", TRAINED)
        net, batch = reopened("robust-0"), Batch(x, y, torch.arange(len(x)))
        x_adv = PGD(steps=10, drop=False)(net, batch, ThreatModel(Linf(EPS)), rng=Draws(0).at("fit"))
        with torch.no_grad():
            return fitted(net(x), net(x_adv), y)

    return part(ROW, "mix-parameters", fitted_parameters)["measured"]  # type: ignore[no-any-return]


def _assessed(name: str) -> Cells:
    """Which of the first images a model classifies correctly, which survive `fast`, and which every pass."""
    model: ModelLike
    if name == "ensemble":
        model = holdfast.open_model("ensemble:", members=[reopened(f"robust-{k}") for k in range(3)])
    elif name == "mix":
        arguments = {key: repr(value) for key, value in mix_parameters().items()}
        members = [reopened("accurate"), reopened("robust-0")]
        model = holdfast.open_model("mixed:", members=members, model_args=arguments)
    else:
        model = reopened(name)
    begun = time.process_time()
    result = holdfast.assess(
        model, images("cifar10", N), f"linf:{EPS!r}", "fast", doubts=False, device="cpu",
        run=RUNS / ROW / f"assessed-{name}", resume=True,
    )  # fmt: skip
    evidence = result.evidence
    masks = {
        "clean": evidence["correct"],
        "fast": suite_robust(evidence, name),
        "robust": robust(evidence, name),
    }
    transfer = result.summary()["transfer"]
    return {
        "masks": {key: mask.int().tolist() for key, mask in masks.items()},
        "cpu_s": round(time.process_time() - begun, 1),
        "transfer": transfer,
    }


def measured() -> Outcome:
    trainings = {name: trained(name) for name in NETWORKS}
    found = {
        name: part(ROW, f"assessed-{name}", lambda name=name: _assessed(name))["measured"]  # type: ignore[misc]
        for name in (*NETWORKS, "ensemble", "mix")
    }
    masks = {
        name: {key: torch.tensor(mask, dtype=torch.bool) for key, mask in one["masks"].items()}
        for name, one in found.items()
    }
    table = [_row(name, masks[name], found[name], trainings.get(name)) for name in found]
    best = max(
        (name for name in NETWORKS if name != "accurate"), key=lambda name: _share(masks[name]["robust"])
    )
    gains = {
        f"ensemble - {best}, {key}": _paired(masks["ensemble"][key], masks[best][key])
        for key in ("clean", "fast", "robust")
    }
    gains |= {
        f"mix - {other}, {key}": _paired(masks["mix"][key], masks[other][key])
        for other in ("robust-0", "accurate")
        for key in ("clean", "robust")
    }
    harmonic = {name: _harmonic(masks[name]) for name in ("mix", "robust-0", "accurate")}
    ahead = 100 * (_share(masks["ensemble"]["robust"]) - _share(masks[best]["robust"]))
    claims = [
        Claim(f"robust accuracy, ensemble - {best}, points > 0", ahead, 0.05, least=True),
        Claim(
            "harmonic mean, mix - the better of its parts, points > 0",
            harmonic["mix"] - max(harmonic["robust-0"], harmonic["accurate"]), 0.05, least=True,
        ),
    ]  # fmt: skip
    config: Cells = {
        "eps": EPS, "n": N, "epochs": HOW.epochs, "recipe": "n-fgsm", "training images": TRAINED,
        "seeds": {name: seed for name, (seed, _) in NETWORKS.items()}, "mix": mix_parameters(),
        "combined": "mean of logits",
    }  # fmt: skip
    detail: Cells = {
        "paired": gains, "trainings": trainings,
        "transfer": {name: found[name]["transfer"] for name in ("ensemble", "mix")},
    }  # fmt: skip
    notes = [
        (
            "one run of each network; `robust` counts every pass, which for the ensemble and the mix includes examples "
            "that are computed on each member"
        ),
        *(f"{name}: {text} points" for name, text in gains.items()),
    ]
    return Outcome(table, claims, config, detail, notes)


def _row(name: str, masks: dict[str, Tensor], found: Cells, training: Cells | None) -> Cells:
    return {
        "model": name,
        **{f"{key}, %": round(100 * _share(mask), 1) for key, mask in masks.items()},
        "harmonic mean, %": round(_harmonic(masks), 1),
        "training, CPU s": None if training is None else training["cpu_s"],
        "assessment, CPU s": found["cpu_s"],
    }


def _share(mask: Tensor) -> float:
    return float(mask.double().mean())


def _harmonic(masks: dict[str, Tensor]) -> float:
    """Harmonic mean of clean and robust accuracy in %."""
    clean, survived = _share(masks["clean"]), _share(masks["robust"])
    return 200 * clean * survived / (clean + survived) if survived else 0.0


def _paired(first: Tensor, second: Tensor) -> str:
    gain = paired_difference(first, second)
    return f"{100 * gain.value:+.1f} ({100 * gain.low:+.1f} to {100 * gain.high:+.1f})"
