"""Spoken digits under snr:40dB and snr:30dB: the suite `fast` beside a plain PGD loop, noise, and the peers."""

from collections.abc import Callable, Iterator
from functools import partial
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.absent import Absent
from benchmarks.parts import part
from benchmarks.peers import peer
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.spoken_digits import clips, trained
from holdfast.attacks.suites import suite
from holdfast.core.batch import Batch
from holdfast.core.constraints import allowed
from holdfast.core.draws import Draws
from holdfast.core.meter import margin
from holdfast.core.model import Bounds, Classifier
from holdfast.core.threat import ThreatModel
from holdfast.runs.harness.measure import measure_plan
from holdfast.runs.harness.plan import Plan
from holdfast.runs.harness.stage import Member
from holdfast.threats.parsing import parse_threat
from holdfast.threats.signals import Scaled

WHAT = "spoken digits, 300 clips, three networks: share left by `fast`, by a plain PGD loop, by noise, and by peers"
N, SEEDS, STEPS, THREATS = 300, (0, 1, 2), 40, ("snr:40dB", "snr:30dB")
PEER_N, PASSES = 60, 84
"""Clips for the comparison with peers at 40 dB, where some are left, and the number of forward and backward passes that
peers make, which is that of `quick` for a clip that survives it."""
QUICK = f"quick on {PEER_N} clips, %"


def opened(seed: int, n: int = N) -> tuple[Classifier, Batch]:
    """The network of a seed, and `n` test clips, evenly spaced over the test set."""
    x, y, _ = clips()["test"]
    rows = torch.linspace(0, len(x) - 1, n).round().long()
    return Classifier(trained(seed), bounds=Bounds(-1.0, 1.0)).eval(), Batch(x[rows], y[rows], rows)


def right(model: Classifier, batch: Batch, x: Tensor) -> Tensor:
    """Mask of the clips that are classified correctly."""
    with torch.no_grad():
        return torch.cat(
            [margin(model(x[rows]), batch.take(rows)) > 0 for rows in torch.arange(len(x)).split(100)]
        )


def left(model: Classifier, batch: Batch, threat: ThreatModel, x_adv: Tensor) -> float:
    """Share of all clips, in %, that are right and are not broken by allowed inputs."""
    inside = allowed(threat.constraint, x_adv, batch.x, model.bounds)
    broken = inside & ~right(model, batch, x_adv)
    return 100 * (right(model, batch, batch.x) & ~broken).double().mean().item()


def left_by_suite(model: Classifier, batch: Batch, threat: ThreatModel, name: str) -> float:
    """Share of all clips, in %, that a suite leaves."""
    members = tuple(map(Member.of, suite(name, threat.constraint).specs))
    evidence = measure_plan(model, [batch], Plan(members, threat, 0), batch_size=100)
    return 100 * (evidence["correct"] & ~evidence["success"]).double().mean().item()


def in_coordinates(model: Classifier, batch: Batch, threat: ThreatModel) -> Scaled:
    """The coordinates in which all clips have the same radius."""
    coordinates = threat.constraint.coordinates(batch, model.bounds)
    assert isinstance(coordinates, Scaled)
    return coordinates


class Shown(nn.Module):
    """A network for attacks on images (n, 1, 1, samples) in [0, 1], as peers expect: the coordinates of all clips of a
    batch in order.
    """

    def __init__(self, net: nn.Module, coordinates: Scaled) -> None:
        super().__init__()
        self.net, self.scale = net, coordinates.scale[:, None]

    def forward(self, u: Tensor) -> Tensor:
        out: Tensor = self.net(((2 * u.flatten(1) - 1) * self.scale[: len(u)]).clamp(-1, 1))
        return out


def plain_pgd(model: Classifier, batch: Batch, threat: ThreatModel) -> Tensor:
    """A loop that anybody would write: normalised gradients of cross-entropy, steps of eps / 4, from the clip."""
    size = batch.x.norm(dim=1, keepdim=True) * threat.eps
    delta = torch.zeros_like(batch.x)
    for _ in range(STEPS):
        delta.requires_grad_()
        loss = F.cross_entropy(model((batch.x + delta).clamp(-1, 1)), batch.y, reduction="sum")
        (grad,) = torch.autograd.grad(loss, delta)
        grad = grad * (batch.x != 0).flip(1).cummax(1).values.flip(1)
        delta = delta.detach() + size / 4 * grad / grad.norm(dim=1, keepdim=True).clamp_min(1e-12)
        delta = delta * (size / delta.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(1)
    return (batch.x + delta).clamp(-1, 1)


def _torchattacks(name: str, shown: nn.Module, u: Tensor, y: Tensor, eps: float) -> Tensor:
    package = peer("torchattacks")
    if name == "PGDL2":
        attack = package.PGDL2(shown, eps=eps, alpha=eps / 10, steps=PASSES)
    else:
        attack = package.APGD(shown, norm="L2", eps=eps, steps=PASSES, n_restarts=1)
    found: Tensor = attack(u, y)
    return found


def _art(shown: nn.Module, u: Tensor, y: Tensor, eps: float) -> Tensor:
    peer("art")
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        shown, nn.CrossEntropyLoss(), tuple(u.shape[1:]), 10, clip_values=(0.0, 1.0), device_type="cpu"
    )
    attack = ProjectedGradientDescentPyTorch(
        classifier, norm=2, eps=eps, eps_step=eps / 10, max_iter=PASSES, batch_size=len(u), verbose=False
    )
    return torch.from_numpy(attack.generate(u.numpy(), y.numpy()))


PEERS: dict[str, Callable[[nn.Module, Tensor, Tensor, float], Tensor]] = {
    "torchattacks PGDL2": partial(_torchattacks, "PGDL2"),
    "torchattacks APGD": partial(_torchattacks, "APGD"),
    "ART PGD": _art,
}


def _by_peers(
    model: Classifier, batch: Batch, threat: ThreatModel, notes: list[str]
) -> Iterator[tuple[str, float]]:
    coordinates = in_coordinates(model, batch, threat)
    assert isinstance(model.net, nn.Module)
    shown = Shown(model.net, coordinates).eval()
    u = (coordinates.batch.x[:, None, None] + 1) / 2
    for name, attack in PEERS.items():
        try:
            found = attack(shown, u, batch.y, threat.eps / 2).detach()
        except (Absent, ImportError) as why:
            notes.append(f"{name}: {why}")
            continue
        yield name, left(model, batch, threat, coordinates.inputs(2 * found.flatten(1) - 1, batch.ids))


def _measured(seed: int, text: str) -> Cells:
    """The shares of one network under one threat, and why peers are missing."""
    (model, batch), threat = opened(seed), parse_threat(text)
    notes: list[str] = []
    noise = threat.constraint.sample(batch, model.bounds, Draws(seed).at("noise"))
    row: Cells = {
        "seed": seed,
        "threat": text,
        "clean, %": 100 * right(model, batch, batch.x).double().mean().item(),
        "noise, %": left(model, batch, threat, noise),
        "plain PGD-40, %": left(model, batch, threat, plain_pgd(model, batch, threat)),
        "fast, %": left_by_suite(model, batch, threat, "fast"),
    }
    if text == THREATS[0]:
        some = opened(seed, PEER_N)[1]
        row[QUICK] = left_by_suite(model, some, threat, "quick")
        row |= dict(_by_peers(model, some, threat, notes))
    return {"row": row, "notes": notes}


def measured() -> Outcome:
    found = [
        part("sound", f"{text} {seed}", partial(_measured, seed, text))["measured"]
        for text in THREATS
        for seed in SEEDS
    ]
    table: list[Cells] = [each["row"] for each in found]
    notes = [note for each in found for note in each["notes"]]
    claims = [
        Claim("lowest clean accuracy, % >= 94", min(row["clean, %"] for row in table), 94, least=True),
        Claim(
            "largest loss by noise of 40 dB, points <= 2",
            max(row["clean, %"] - row["noise, %"] for row in table if row["threat"] == THREATS[0]),
            2,
        ),
    ]
    for text in THREATS:
        rows = [row for row in table if row["threat"] == text]
        worst = max(row["fast, %"] - row["plain PGD-40, %"] for row in rows)
        claims.append(
            Claim(f"{text}: left by fast - left by plain PGD-40, points, worst seed <= 0", worst, 0)
        )
    beside = [
        (row[QUICK], min(row[name] for name in PEERS if name in row)) for row in table if "ART PGD" in row
    ]
    if beside:
        worst = max(ours - best for ours, best in beside)
        claims.append(Claim("left by quick - left by the best peer, points, worst seed <= 0", worst, 0))
    config = {
        "n": N, "n for peers": PEER_N, "seeds": SEEDS, "steps": STEPS, "passes of peers": PASSES,
        "network": "spoken_digits.py",
    }  # fmt: skip
    detail = {text: mean(row["fast, %"] for row in table if row["threat"] == text) for text in THREATS}
    return Outcome(table, claims, config, detail, sorted(set(notes)))
