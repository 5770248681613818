"""Certificates of networks with smooth activations: what optimised lines and divisions prove beyond CROWN."""

import time
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.networks import images
from benchmarks.record import Cells, Claim, Outcome
from holdfast import Batch, Classifier, Linf, ThreatModel
from holdfast.certifiers.branching import AlphaCrown, BranchAndBound
from holdfast.certifiers.protocol import Proofs, Prover
from holdfast.certifiers.provers import Crown

WHAT = (
    "MNIST networks with tanh, sigmoid and GELU at the eps where CROWN certifies half: what other methods add"
)
ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "gelu": nn.GELU}
SIZES, N, TRAINED, EPOCHS, SEED = (784, 50, 50, 10), 200, 10_000, 12, 0
"""layers, examples, and training images, which come after the examples in the test set's order"""
TIMEOUT_S, REQUIRED, HALVINGS = 2.5, 10, 8


def measured() -> Outcome:
    torch.set_num_threads(1)
    table = [_of_network(name) for name in ACTIVATIONS]
    claims = [
        Claim(f"{row['network']}: examples certified beyond CROWN, of {N} >= {REQUIRED}", row["beyond CROWN"], REQUIRED,
              least=True)
        for row in table
    ]  # fmt: skip
    config: Cells = {"layers": list(SIZES), "n": N, "timeout_s": TIMEOUT_S, "seed": SEED, "epochs": EPOCHS}
    return Outcome(table, claims, config)


def _trained(activation: type[nn.Module], x: Tensor, y: Tensor) -> nn.Module:
    torch.manual_seed(SEED)
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(SIZES):
        layers += [nn.Linear(before, after), activation()]
    net = nn.Sequential(*layers[:-1])
    optimiser = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(128):
            optimiser.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimiser.step()
    return net


def _of_network(name: str) -> Cells:
    x, y = images("mnist", N + TRAINED)
    model = Classifier(_trained(ACTIVATIONS[name], x[N:], y[N:])).eval().requires_grad_(False)
    batch = Batch(x[:N], y[:N], torch.arange(N))
    right = model(batch.x).argmax(1) == batch.y
    eps = _halving(model, batch, right)
    row: Cells = {"network": name, "eps": round(eps, 5), "clean, %": 100 * float(right.double().mean())}
    known = torch.zeros(N, dtype=torch.bool)
    for prover in (Crown(), AlphaCrown(TIMEOUT_S), BranchAndBound(TIMEOUT_S)):
        left = (right & ~known).nonzero()[:, 0]
        begun = time.process_time()
        proofs = _proved(prover, model, batch.take(left), eps)
        seconds = time.process_time() - begun
        known[left] = proofs.certified
        row[prover.name] = int(known.sum())
        row[f"{prover.name}, CPU s an example"] = round(seconds / max(1, len(left)), 2)
    return {**row, "broken": int(proofs.broken.sum()), "beyond CROWN": row["branch-and-bound"] - row["crown"]}


def _proved(prover: Prover, model: Classifier, batch: Batch, eps: float) -> Proofs:
    return prover.ready(model, batch, ThreatModel(Linf(eps)))(batch)


def _halving(model: Classifier, batch: Batch, right: Tensor) -> float:
    """The eps at which CROWN certifies half of the examples, by bisection."""
    low, high = 0.0, 0.1
    for _ in range(HALVINGS):
        eps = (low + high) / 2
        certified = int((_proved(Crown(), model, batch, eps).certified & right).sum())
        low, high = (eps, high) if certified > len(batch) / 2 else (low, eps)
    return (low + high) / 2
