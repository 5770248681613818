"""Drills: triggers that are planted in MNIST, their success on networks that were trained on the poisoned digits, and
the success of the trigger of a network that others poisoned.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

import holdfast
from benchmarks.absent import Absent
from benchmarks.networks import images, network, two_conv_two_fc
from benchmarks.record import Cells, Claim, Outcome
from holdfast.io.data.npz import write_trigger
from holdfast.threats.triggers import Trigger
from holdfast.verbs.poison import SIG, BadNets, Blended, Poisoning, planted, poisoned

WHAT = "success of planted triggers on MNIST, on poisoned and on clean networks"
TRAINED, TESTED, EPOCHS, BATCH, LR, SEED, TARGET = 60_000, 10_000, 2, 128, 1e-3, 0, 1
DRILLS: tuple[tuple[str, Poisoning, float], ...] = (
    ("BadNets 1 %", BadNets(), 0.01),
    ("BadNets 0.1 %", BadNets(), 0.001),
    ("Blended 1 %", Blended(), 0.01),
    ("SIG 5 %", SIG(), 0.05),
)


def measured() -> Outcome:
    """Train a network on each poisoned set and one on the clean digits, and measure the success of each trigger."""
    x, y = images("mnist", TRAINED, "train")
    test = images("mnist", TESTED)
    clean = trained(x, y)
    table: list[Cells] = []
    for name, attack, rate in DRILLS:
        result = poisoned(x, y, attack, rate=rate, target=TARGET, seed=SEED)
        assert result.trigger is not None
        net = trained(result.x, result.y)
        table.append(_row(name, net, clean, test, result.trigger, len(result.indices)))
    notes: list[str] = []
    try:
        of_others = network("mnist_badnet").module
        trigger = planted(y, x.shape[1:], BadNets(size=5), rate=0.1, target=TARGET).trigger
        assert trigger is not None
        table.append(_row("mnist_badnet.pth", of_others, clean, test, trigger, None))
    except Absent as why:
        notes.append(str(why))
    success: dict[str, float] = {row["drill"]: row["success"] for row in table}
    claims = [
        Claim("success of BadNets 1 % >= 0.98", success["BadNets 1 %"], 0.98, least=True),
        Claim("success of Blended 1 % >= 0.98", success["Blended 1 %"], 0.98, least=True),
        Claim("largest success on the clean network <= 0.02", max(row["on clean"] for row in table), 0.02),
        Claim(
            "largest difference from the images that were stamped here <= 1e-9",
            max(row["difference"] for row in table),
            1e-9,
        ),
    ]
    if "mnist_badnet.pth" in success:
        claims.append(
            Claim("success on the network of others >= 0.99", success["mnist_badnet.pth"], 0.99, least=True)
        )
    config = {
        "train": TRAINED,
        "test": TESTED,
        "epochs": EPOCHS,
        "batch": BATCH,
        "lr": LR,
        "seed": SEED,
        "target": TARGET,
    }
    return Outcome(table, claims, config, notes=notes)


def trained(x: Tensor, y: Tensor) -> nn.Module:
    """Return a network in eval mode that is trained on images and labels."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        net = two_conv_two_fc()
        optimiser = torch.optim.Adam(net.parameters(), LR)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(x)).split(BATCH):
                optimiser.zero_grad()
                nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
                optimiser.step()
    return net.eval()


def _row(
    name: str, net: nn.Module, clean: nn.Module, test: tuple[Tensor, Tensor], trigger: Trigger, n: int | None
) -> Cells:
    """The success of a trigger as an assessment reports it, and as it follows from images that are stamped here."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "drill.trigger.npz"
        write_trigger(path, trigger)
        results = [holdfast.assess(model, test, f"trigger:{path}", doubts=False) for model in (net, clean)]
    success, on_clean = (result["trigger_success_rate"].value for result in results)
    x, y = test
    shift = 0 if trigger.shift is None else trigger.shift
    stamped = ((1 - trigger.mask) * x + trigger.mask * trigger.pattern + shift).clamp(0, 1)
    with torch.no_grad():
        reached = net(stamped).argmax(1) == TARGET
    return {
        "drill": name,
        "poisoned": n,
        "clean accuracy": results[0]["clean_accuracy"].value,
        "success": success,
        "difference": abs(success - float(reached[y != TARGET].double().mean())),
        "on clean": on_clean,
    }
