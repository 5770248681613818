"""Benign images and rows of tables that the guard refuses, before and after its calibration."""

import csv
import gzip
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.absent import Absent
from benchmarks.networks import folder, images
from benchmarks.record import Cells, Claim, Outcome
from holdfast.guard.detectors.queries import covered_eps
from holdfast.guard.rules import Action
from holdfast.verbs.calibrate import Guard

WHAT = "benign images and rows of tables that the guard refuses, before and after its calibration"
TABLES = {"adult": "income", "phishing_url": "status", "nsl_kdd_train20": "category"}
"""the column of the classes of each table"""
LEFT_OUT = {"difficulty"}
"""numbers that are no features"""
MOST, BEFORE, CLIENTS, SEED = 12_000, 2000, 1000, 0
RATE, ALLOWED = 0.0005, 0.001
"""the rate that is stated to `calibrate`, which holds on average over calibrations, and the one that fresh inputs may
have"""
RULES = {
    "schema": {"action": "block"},
    "range": {"action": "block"},
    "queries": {"action": "block"},
    "energy": {"action": "block"},
}


@dataclass(frozen=True)
class Parts:
    """Inputs in [0, 1] in random order: for the training of a model, for the calibration, and fresh ones."""

    x: Tensor
    y: Tensor
    calibration: Tensor
    fresh: Tensor


def measured() -> Outcome:
    table: list[Cells] = []
    claims: list[Claim] = []
    for name, parts in _data():
        net = _trained(parts)
        shape = list(parts.fresh.shape[1:])
        settings = {"mode": "enforce", "false_positives": RATE, "inputs": {"shape": shape}, "rules": RULES}
        plain = Guard.from_settings(settings)
        before, would = _refused(plain, net, parts.fresh[:BEFORE])
        stream = [(part, net(part)) for part in parts.calibration.split(500)]
        guard = plain.calibrate_on(stream, name)
        after, _ = _refused(guard, net, parts.fresh)
        assert guard.calibration is not None
        stated, rate = guard.calibration.measured, after / len(parts.fresh)
        radius = guard.calibration.parameters["queries"]["radius"]
        table.append(
            {
                "data": name,
                "values": parts.fresh[0].numel(),
                "equal to another": f"{100 * _equal(parts.fresh):.1f} %",
                "refused before": f"{before} of {min(BEFORE, len(parts.fresh)):,}",
                "fires before": f"{100 * would / min(BEFORE, len(parts.fresh)):.1f} %",
                "calibrated on": guard.calibration.n,
                "stated": f"{100 * stated.low:.3f} to {100 * stated.high:.3f} %",
                "refused after": f"{after} of {len(parts.fresh):,} ({100 * rate:.3f} %)",
                "radius": f"{radius:.2g}",
                "covers eps": f"{covered_eps(radius, shape):.2g}",
            }
        )
        claims += [
            Claim(f"{name}: refused before the calibration <= 0", before, 0),
            Claim(f"{name}: share refused after it <= {ALLOWED:g}", rate, ALLOWED),
            Claim(
                f"{name}: the stated interval contains it", stated.low <= rate <= stated.high, 1, least=True
            ),
        ]
    config: Cells = {
        "rules": "schema, range, queries, energy; all block", "model": "linear", "false_positives": RATE,
        "clients": CLIENTS,
        "order": "random, one input a request, equal rows of a table kept", "seed": SEED,
    }  # fmt: skip
    return Outcome(table, claims, config)


def _data() -> Iterator[tuple[str, Parts]]:
    for name in ("mnist", "cifar10"):
        x, y = images(name, 10_000)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(SEED))
        x = x[order]
        yield name, Parts(*images(name, 5000, "train"), x[:5000], x[5000:])
    for name, label in TABLES.items():
        x, y = _table(name, label)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(SEED))
        x, y, n = x[order], y[order], len(x) // 10
        calibration, fresh = x[n:].chunk(2)
        yield name, Parts(x[:n], y[:n], calibration[:MOST], fresh[:MOST])


def _table(name: str, label: str) -> tuple[Tensor, Tensor]:
    """The columns of a table that contain numbers only, each scaled to [0, 1], and its classes."""
    path = folder("HOLDFAST_DATA", "data") / f"{name}.csv.gz"
    if not path.is_file():
        raise Absent(f"{path.name} is not at hand; HOLDFAST_DATA names its folder")
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        header, *lines = csv.reader(file)
    columns = dict(zip(header, zip(*lines, strict=True), strict=True))
    classes = {text: k for k, text in enumerate(sorted(set(columns[label])))}
    y = torch.tensor([classes[text] for text in columns.pop(label)])
    numbers = [column for key, column in columns.items() if key not in LEFT_OUT and _is_numeric(column)]
    x = torch.tensor([[float(text) for text in column] for column in numbers], dtype=torch.float64).T
    low, high = x.amin(0), x.amax(0)
    x = x[:, high > low]
    return ((x - low[high > low]) / (high - low)[high > low]).float(), y


def _is_numeric(column: tuple[str, ...]) -> bool:
    try:
        return all(float(text) == float(text) for text in column)
    except ValueError:
        return False


def _trained(parts: Parts) -> nn.Module:
    """A linear model."""
    torch.manual_seed(SEED)
    net = nn.Sequential(nn.Flatten(), nn.Linear(parts.x[0].numel(), int(parts.y.max()) + 1))
    optimiser = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(200):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(parts.x), parts.y).backward()
        optimiser.step()
    return net.eval().requires_grad_(False)


def _refused(guard: Guard, net: nn.Module, x: Tensor) -> tuple[int, int]:
    """The number of inputs that the guard refuses, and that it would refuse if all rules were enforced."""
    clients = torch.randint(CLIENTS, (len(x),), generator=torch.Generator().manual_seed(SEED)).tolist()
    refused = would = 0
    for each, client in zip(x.split(1), clients, strict=True):
        decision = guard.before(each, principal=f"client {client}")
        if decision.answered:
            decision = guard.after(decision, net(each))
        refused += not decision.answered
        would += any(row.shadow is Action.BLOCK for row in decision.rows)
    return refused, would


def _equal(x: Tensor) -> float:
    """The share of inputs that are equal to an earlier one."""
    return 1 - len(torch.unique(x, dim=0)) / len(x)
