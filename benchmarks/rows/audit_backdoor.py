"""The audit of a model: planted backdoors and clean networks against control networks, and STRIP."""

import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.networks import images, network, two_conv_two_fc
from benchmarks.parts import RUNS, part
from benchmarks.record import Cells, Claim, Outcome
from holdfast.audits.backdoor import BackdoorRequest, finding_of, measure, suspect
from holdfast.audits.backdoor_controls import Controls, SizeCache, predicted
from holdfast.audits.backdoor_triggers import Inversion, Inverted, Strip
from holdfast.audits.backdoor_triggers import measured as audited
from holdfast.audits.finding import StoredSteps
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.model import Bounds, Classifier
from holdfast.runs.engine.progress import ignore
from holdfast.runs.engine.run import Run
from holdfast.statistics.intervals import auroc
from holdfast.threats.triggers import Trigger
from holdfast.verbs.poison import POISONINGS, poisoned

ROW, WHAT = "audit-backdoor", "planted backdoors and clean networks against 20 control networks, and STRIP"
EPOCHS, BATCH, TARGET, CLEAN = 2, 64, 1, 2000
CONTROLS, OTHERS, PLANTED, PUBLISHED = range(20), range(100, 110), 200, range(300, 320)
"""Seeds of the controls, of further clean networks, of the planted ones, and of the controls of the published one."""
DRILLS = (("badnets", 0.01), ("badnets", 0.001), ("blended", 0.01))
PUBLISHED_TARGET = 1
HALF = 30_000
"""Number of training images of the controls of the published network, in one epoch: its accuracy is lower."""
STRIP_AUROC = {"badnets": 0.99, "blended": 0.98}
STREAM = 1000
"""Number of clean and of triggered test images that STRIP separates."""

_STRIP_NOTE = (
    "STRIP first used the mean of both images, with an AUROC of 0.999 (BadNets) and 0.615 (Blended). The sum was "
    "chosen on networks with other triggers, targets and seeds."
)


@dataclass(frozen=True)
class Timed(Inversion):
    """The inversion, which appends its CPU seconds and the number of classes of each call to a list."""

    seconds: list[tuple[int, float]] = field(default_factory=list)

    def __call__(
        self, model: Classifier, x: Tensor, y: Tensor, classes: Sequence[int], *, rng: Draws
    ) -> Inverted:
        started = time.process_time()
        result = super().__call__(model, x, y, classes, rng=rng)
        self.seconds.append((len(classes), time.process_time() - started))
        return result


_SHOWN = (
    *("network", "clean", "attack success", "verdict", "p", "class", "size", "ratio", "success on controls"),
    *("index", "in square", "CPU s"),
)


def measured() -> Outcome:
    """Train and audit the networks. Each network, and each part, is kept when it is done."""
    x, y = images("mnist", 60_000, "train")
    rows = {f"{attack}-{rate}": partial(_drill, x, y, attack, rate) for attack, rate in DRILLS}
    rows |= {"published": partial(_published, x, y)}
    rows |= {f"clean-{seed}": partial(_clean, x, y, seed) for seed in OTHERS}
    rows |= {f"strip-{attack}": partial(_strip, x, y, attack) for attack in STRIP_AUROC}
    parts = {name: part(ROW, name, measure) for name, measure in rows.items()}
    found = {name: each["measured"] for name, each in parts.items()}
    clean = [found[f"clean-{seed}"] for seed in OTHERS]
    audits = [each for name, each in found.items() if not name.startswith("strip")]
    claims = [
        *(_flagged(found[f"{attack}-{rate}"], TARGET) for attack, rate in DRILLS),
        Claim("clean networks flagged, of ten <= 2", sum(row["verdict"] == "flagged" for row in clean), 2),
        Claim("largest CPU seconds of ten classes <= 40", max(row["CPU s"] for row in audits), 40),
        _flagged(found["published"], PUBLISHED_TARGET),
        Claim(
            "peak of its mask in the planted square >= 1", found["published"]["peak in square"], 1, least=True
        ),
        *(
            Claim(
                f"AUROC of STRIP, {attack} >= {least}", found[f"strip-{attack}"]["AUROC"], least, least=True
            )
            for attack, least in STRIP_AUROC.items()
        ),
    ]
    table = [{name: row[name] for name in _SHOWN if name in row} for row in audits]
    table += [found[f"strip-{attack}"] for attack in STRIP_AUROC]
    config = {"epochs": EPOCHS, "batch": BATCH, "clean images": CLEAN, "controls": len(CONTROLS)}
    config |= {
        "seeds": f"0-19 controls, 100-109 clean, {PLANTED} planted, 300-319 controls of the published one, of one epoch"
    }
    return Outcome(table, claims, config, parts, [_STRIP_NOTE])


def _flagged(row: Cells, label: int) -> Claim:
    right = row["verdict"] == "flagged" and row["class"] == label
    return Claim(f"{row['network']}: p, if the class is right, <= 0.05", row["p"] if right else 1.0, 0.05)


def _clean_images() -> Batch:
    x, y = images("mnist", 10_000)
    rows = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return Batch(x, y, torch.arange(len(y))).take(rows)


def _net(name: str, make: Callable[[], nn.Module], train: Callable[[nn.Module], None]) -> nn.Module:
    """Return a network that is trained once, and kept in a file."""
    path, net = RUNS / ROW / f"{name}.safetensors", make()
    if path.is_file():
        net.load_state_dict(load_file(path))
        return net.eval()
    train(net)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(net.state_dict(), path)
    return net.eval()


def _train(x: Tensor, y: Tensor, seed: int, epochs: int, net: nn.Module) -> None:
    """Train a network from weights that are sampled by the seed."""
    torch.manual_seed(seed)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.reset_parameters()
    optimiser, rng = torch.optim.Adam(net.parameters(), 1e-3), torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(y), generator=rng)[: len(y) // BATCH * BATCH].view(-1, BATCH):
            optimiser.zero_grad()
            cross_entropy(net(x[rows]), y[rows]).backward()
            optimiser.step()


def _controls(
    folder: str, seeds: range, make: Callable[[], nn.Module], x: Tensor, y: Tensor, epochs: int
) -> Path:
    """Train the control networks, and return their folder."""
    for seed in seeds:
        _net(f"{folder}/{seed}", make, partial(_train, x, y, seed, epochs))
    return RUNS / ROW / folder


def _audit(name: str, net: nn.Module, folder: Path) -> tuple[Cells, Trigger]:
    """Return the row of an audited network, and its most unusual trigger."""
    model, batch = Classifier(net), _clean_images().take(torch.arange(CLEAN))
    cache, timed = SizeCache(folder.with_suffix(".json")), Timed()
    request = BackdoorRequest(batch, 10, Controls.of_folder(folder), sizes=cache, inversion=timed)
    measure(run := Run(request.steps()), model, request, ignore)
    settings = {"classes": 10, "controls": request.n_controls, "stream": False, "class_names": None}
    settings["train_controls"] = None
    manifest = {"config": {"settings": settings}, "data": {"n": CLEAN}, "seed": 0}
    found = audited(StoredSteps(manifest, run.store))
    facts, all_images = (finding := finding_of(found)).facts, _clean_images()
    clean = float((predicted(model, all_images.x) == all_images.y).double().mean())
    cells = {"network": name, "clean": clean, "verdict": finding.verdict}
    cells |= {column: facts[column] for column in ("p", "class", "size", "ratio", "index", "sizes")}
    cells |= {"success on controls": facts["success_on_controls"]}
    together = [seconds for classes, seconds in timed.seconds if classes == 10]
    own = sum(seconds for classes, seconds in timed.seconds if classes < 10)
    return cells | {"CPU s": max([own, *together]), "of controls": facts["ratios_of_controls"]}, suspect(
        found
    )


def _small(x: Tensor, y: Tensor) -> Path:
    return _controls("controls", CONTROLS, two_conv_two_fc, x, y, EPOCHS)


def _clean(x: Tensor, y: Tensor, seed: int) -> Cells:
    net = _net(f"clean-{seed}", two_conv_two_fc, partial(_train, x, y, seed, EPOCHS))
    return _audit(f"clean, seed {seed}", net, _small(x, y))[0]


def _drilled(x: Tensor, y: Tensor, attack: str, rate: float) -> tuple[nn.Module, Trigger, float]:
    """Return a network with a planted backdoor, its trigger, and the success of the attack."""
    drill = poisoned(x, y, POISONINGS[attack](), rate=rate, target=TARGET, seed=PLANTED)
    assert drill.trigger is not None
    train = partial(_train, drill.x, drill.y, PLANTED, EPOCHS)
    net, trigger = _net(f"{attack}-{rate}", two_conv_two_fc, train), drill.trigger
    batch = _clean_images()
    stamped = trigger.stamped(batch.x[batch.y != TARGET], Bounds())
    return net, trigger, float((predicted(Classifier(net), stamped) == TARGET).double().mean())


def _drill(x: Tensor, y: Tensor, attack: str, rate: float) -> Cells:
    net, _, success = _drilled(x, y, attack, rate)
    cells, _ = _audit(f"{attack}, {100 * rate:g} %", net, _small(x, y))
    return cells | {"attack success": success}


def _published(x: Tensor, y: Tensor) -> Cells:
    published = network("mnist_badnet").module
    folder = _controls("published", PUBLISHED, partial(deepcopy, published), x[:HALF], y[:HALF], 1)
    cells, trigger = _audit("published BadNet", published, folder)
    square = trigger.mask[..., -5:, -5:]
    batch = _clean_images()
    stamped = batch.x[batch.y != PUBLISHED_TARGET].clone()
    stamped[..., -5:, -5:] = 1.0
    success = float((predicted(Classifier(published), stamped) == PUBLISHED_TARGET).double().mean())
    places = {"peak in square": int(square.max() == trigger.mask.max())}
    return cells | places | {"in square": float(square.sum() / trigger.mask.sum()), "attack success": success}


def _strip(x: Tensor, y: Tensor, attack: str) -> Cells:
    net, trigger, success = _drilled(x, y, attack, 0.01)
    batch, model, strip = _clean_images(), Classifier(net), Strip()
    overlays, calibration = batch.x[:STREAM], batch.take(torch.arange(STREAM, 2 * STREAM))
    stream = batch.take(batch.y != TARGET)
    stream = stream.take(torch.arange(len(stream) - STREAM, len(stream)))
    scored = partial(strip.entropy, model, clean=overlays, rng=Draws(0))
    limit = strip.threshold(scored(calibration.x, calibration.ids))
    clean, stamped = scored(stream.x, stream.ids), scored(trigger.stamped(stream.x, Bounds()), stream.ids)
    return {
        "network": f"STRIP, {attack} 1 %",
        "attack success": success,
        "AUROC": auroc(-clean, -stamped).value,
        "detected": float((stamped < limit).double().mean()),
        "false positives": float((clean < limit).double().mean()),
    }
