"""A small model and small data in float64, where no kernel's rounding can tip a verdict."""

import torch

from holdfast.attacks import FMN, PGD
from holdfast.attacks.parts.losses import cross_entropy
from holdfast.core.constraints import Linf
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.gates.grammar import parse
from holdfast.io.data.loaders import as_data
from holdfast.runs.assess.request import AssessRequest, DescribedModel
from holdfast.runs.harness.plan import Plan
from holdfast.runs.harness.stage import Member

N, FEATURES, CLASSES = 40, 12, 4
FAST = Member("PGD", PGD(steps=3, loss=cross_entropy))
SMALLEST = Member("FMN", FMN(steps=10))
THOROUGH = Member("PGD-again", PGD(steps=6, restarts=2))


def network(seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, last = torch.nn.Linear(FEATURES, 16).double(), torch.nn.Linear(16, CLASSES).double()
    with torch.no_grad():
        for weight in (*hidden.parameters(), *last.parameters()):
            weight.copy_(torch.randn(weight.shape, generator=g, dtype=torch.float64) / 2)
    return torch.nn.Sequential(torch.nn.Flatten(), hidden, torch.nn.ReLU(), last).eval()


def subject(net=None, digest="a" * 64):
    return DescribedModel(
        Classifier(network() if net is None else net), digest, {"name": "fake", "digest": digest}
    )


def data(n=N, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, FEATURES, generator=g, dtype=torch.float64)
    y = network()(x).argmax(1)
    y[::9] = (y[::9] + 1) % CLASSES  # some are wrong from the start
    return as_data(x, y)


def plan(*members, **changes):
    settings = {"suite": "fake@1", "attacked": True, "doubts": "free", "seed": 3, **changes}
    return Plan(members or (FAST, THOROUGH), settings.pop("threat", ThreatModel(Linf(0.06))), **settings)


def order(*members, gates=("robust_accuracy >= 0.1",), batch_size=None, shard_size=20, **changes):
    fields = {
        name: changes.pop(name)
        for name in ("time_budget_s", "accepted", "command", "workers")
        if name in changes
    }
    claims = tuple(map(parse, gates))
    return AssessRequest(
        plan(*members, **changes), claims, batch_size=batch_size, shard_size=shard_size, **fields
    )


def settled(run):
    """Bytes of everything that must be equal between equal runs; nothing temporary may lie beside it."""
    found = {path.relative_to(run).as_posix(): path for path in sorted(run.rglob("*")) if path.is_file()}
    beside = {"about.json", "times.jsonl", "lease.lock"}
    assert beside <= set(found)
    assert not [
        name for name in found if name.startswith(".") or "wal" in name or "shm" in name or "/" in name
    ]
    return {name: path.read_bytes() for name, path in found.items() if name not in beside}
