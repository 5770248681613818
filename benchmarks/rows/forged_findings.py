"""Forged findings: 20 fields of the finding of each kind of audit are changed one at a time, with all digests computed
again.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import holdfast
from benchmarks.forging import accepted_fields
from benchmarks.record import Cells, Claim, Outcome

WHAT = "Findings of small audits with one changed field and consistent digests"
FIELDS = 20
_SIDE, _CLASSES, _TARGET = 8, 4, 2


def measured() -> Outcome:
    """Forge the findings of each kind."""
    table, accepted = list[Cells](), dict[str, int]()
    with tempfile.TemporaryDirectory() as folder:
        for kind, audit in audits(Path(folder)):
            fields = accepted_fields(audit, FIELDS, Path(folder) / "copy")
            accepted[kind] = len(fields)
            table.append({"audit": kind, "fields changed": FIELDS, "accepted": len(fields)})
    claims = [Claim(f"accepted findings of {kind} <= 0", float(n), 0.0) for kind, n in accepted.items()]
    return Outcome(table, claims, {"fields": FIELDS, "audits": list(accepted)})


def audits(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the folder of a small audit of each kind."""
    kinds: Mapping[str, Callable[[Path], object]] = {
        "backdoor": _backdoor,
        "poison": _poison,
        "membership": _membership,
        "membership of a model": _membership_of_model,
        "privacy": _privacy,
        "generator": _generator,
        "synthetic table": _table,
    }
    for kind, audit in kinds.items():
        place = folder / kind.replace(" ", "-")
        place.mkdir()
        audit(place)
        yield kind, place / "run"


def digits(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images with a bright quarter, which is their class, in noise."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.randint(_CLASSES, (n,), generator=rng)
    x = 0.4 * torch.rand(n, 1, _SIDE, _SIDE, generator=rng)
    for row, label in enumerate(y.tolist()):
        top, left = 3 * (label // 2), 3 * (label % 2)
        x[row, 0, top : top + 3, left : left + 3] += 0.5
    return x, y


def _stamped(x: Tensor, y: Tensor, n: int) -> tuple[Tensor, Tensor]:
    x, y = x.clone(), y.clone()
    x[:n, :, 6:, 6:], y[:n] = 1.0, _TARGET
    return x, y


def _network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(_SIDE * _SIDE, 16), nn.ReLU(), nn.Linear(16, _CLASSES))


def fit(x: Tensor, y: Tensor, seed: int) -> nn.Module:
    """Train a small network."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = _network()
    optimiser = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(60):
        optimiser.zero_grad()
        cross_entropy(net(x), y).backward()
        optimiser.step()
    return net.eval()


def _backdoor(folder: Path) -> object:
    data = digits(300, 7)
    for seed in range(20):
        save_file(fit(*data, seed).state_dict(), folder / f"{seed:02}.safetensors")
    x, y = digits(60, 8)
    stream = (torch.cat((x, _stamped(x, y, 60)[0])), torch.cat((y, y)))
    poisoned = fit(*(torch.cat(pair) for pair in zip(data, _stamped(*digits(30, 9), 30), strict=True)), 99)
    settings: dict[str, Any] = {"controls": str(folder), "stream": stream, "gates": ["no-backdoor"]}
    return holdfast.audit.backdoor(poisoned, digits(200, 10), run=folder / "run", **settings)


def _poison(folder: Path) -> object:
    data, clean = _stamped(*digits(600, 0), 60), digits(200, 1)
    return holdfast.audit.poison(data, _network(), clean=clean, gates=["no-poison"], run=folder / "run")


def _membership(folder: Path) -> object:
    run = folder / "run"
    return holdfast.audit.membership(_network(), digits(400, 0), train=fit, references=4, fpr=0.1, run=run)


def _membership_of_model(folder: Path) -> object:
    members, others = digits(300, 0), digits(300, 1)
    net = fit(*members, 0)
    return holdfast.audit.membership(net, members, non_members=others, fpr=0.1, run=folder / "run")


def _privacy(folder: Path) -> object:
    gates = ["epsilon_lower <= 2"]
    settings: dict[str, Any] = {"epsilon": 2, "canaries": 100, "gates": gates}
    return holdfast.audit.privacy(_network(), digits(400, 0), train=fit, run=folder / "run", **settings)


class _Decoder:
    """Linear generator of images with an encoder and a discriminator."""

    latent_shape = (6,)

    def __init__(self) -> None:
        self.matrix = 0.1 * torch.randn(6, _SIDE**2, generator=torch.Generator().manual_seed(1))

    def decode(self, z: Tensor) -> Tensor:
        return 0.4 + (z @ self.matrix).view(-1, 1, _SIDE, _SIDE)

    def encode(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - 0.4) @ torch.linalg.pinv(self.matrix)

    def discriminate(self, x: Tensor) -> Tensor:
        return -x.flatten(1).std(1)

    def log_prob(self, x: Tensor) -> Tensor:
        return -x.flatten(1).square().sum(1)

    def sample(self, n: int, seed: int) -> Tensor:
        return self.decode(torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))).clamp(0, 1)


def _generator(folder: Path) -> object:
    settings: dict[str, Any] = {"held_out": digits(300, 1), "samples": 300, "gates": ["copy_rate <= 0.5"]}
    return holdfast.audit.generator(_Decoder(), digits(400, 0), run=folder / "run", **settings)


def _table(folder: Path) -> object:
    rng = torch.Generator().manual_seed(0)
    for name, n in (("train", 400), ("test", 300), ("made", 300)):
        ages = torch.rand(n, generator=rng) * 60
        lines = [f"{age:.1f},{'ab'[int(age) % 2]},{3 * age + 5 * int(age % 7):.1f}" for age in ages.tolist()]
        (folder / f"{name}.csv").write_text("\n".join(["age,kind,income", *lines, ""]), encoding="utf-8")
    train, test, made = (str(folder / f"{name}.csv") for name in ("train", "test", "made"))
    return holdfast.audit.generator(made, train, held_out=test, run=folder / "run")
