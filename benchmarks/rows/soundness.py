"""Certificates of random small networks beside an exact solver, and of networks with a hidden counterexample."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from itertools import pairwise
from multiprocessing import get_context

import numpy as np
import torch
from scipy.optimize import Bounds as Box
from scipy.optimize import LinearConstraint, milp
from torch import Tensor, nn

from benchmarks.record import Cells, Claim, Outcome
from holdfast import Batch, Classifier, Linf, ThreatModel
from holdfast.certifiers.branching import BranchAndBound
from holdfast.certifiers.provers import IBP, Crown, CrownIBP, prepared_graph

WHAT = (
    "10,000 certificates of random small networks beside a mixed-integer solver, and hidden counterexamples"
)
NETWORKS, PLANTED = 10_000, 200
TIMEOUT_S = 10.0
Layers = list[tuple[np.ndarray, np.ndarray]]
"""matrices and offsets of the linear layers of a network, with a ReLU between each two"""


class Chain(nn.Module):
    """Linear layers or convolutions with ReLUs between them, and the normalisation of inputs in front."""

    def __init__(self, convolutional: bool, rng: torch.Generator) -> None:
        super().__init__()

        def pick(low: int, high: int) -> int:
            return int(torch.randint(low, high, (), generator=rng))

        self.shape: tuple[int, ...] = (1, 3, 3) if convolutional else (pick(2, 5),)
        if convolutional:
            channels = pick(1, 3)
            layers = [
                nn.Conv2d(1, channels, 2),
                nn.Conv2d(channels, 2, 2, padding=1),
                nn.Linear(18, pick(2, 4)),
            ]
        else:
            sizes = [self.shape[0], *(pick(3, 9) for _ in range(pick(1, 4))), pick(2, 4)]
            layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        for layer in layers:
            layer.weight.data = (
                torch.randn(layer.weight.shape, generator=rng) * 1.2 / layer.weight[0].numel() ** 0.5
            )
            layer.bias.data = torch.randn(layer.bias.shape, generator=rng) * 0.3
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        x = (x - 0.5) / 0.25
        for k, layer in enumerate(self.layers):
            x = layer(x.flatten(1) if isinstance(layer, nn.Linear) else x)
            x = x.relu() if k < len(self.layers) - 1 else x
        return x

    def matrices(self) -> Layers:
        """The layers as matrices in float64, for an input before its normalisation."""
        layers: Layers = []
        shape = self.shape
        for k, layer in enumerate(self.layers):
            shape = (int(np.prod(shape)),) if isinstance(layer, nn.Linear) else shape
            exact = layer.double()
            zero = exact(torch.zeros(1, *shape, dtype=torch.float64))
            eye = torch.eye(int(np.prod(shape)), dtype=torch.float64).view(-1, *shape)
            matrix, offset = (exact(eye) - zero).flatten(1).t(), zero.flatten()
            if k == 0:
                matrix, offset = (
                    matrix * 4,
                    offset - matrix @ torch.full((matrix.shape[1],), 2.0, dtype=torch.float64),
                )
            layers.append((matrix.detach().numpy(), offset.detach().numpy()))
            shape = tuple(zero.shape[1:])
        self.float()
        return layers


class Hidden(nn.Module):
    """A chain with a narrow cone at one input, around which another class wins. Elsewhere the cone has no gradient."""

    def __init__(self, chain: Chain, at: Tensor, y: int, depth: float, width: float) -> None:
        super().__init__()
        self.chain = chain
        self.register_buffer("at", at)
        self.y, self.depth, self.width = y, depth, width

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        logits = self.chain(x)
        away = (x - self.at).abs().flatten(1).sum(1, keepdim=True)
        cone = (self.width - away).relu() * (self.depth / self.width)
        columns = [cone if k == self.y else torch.zeros_like(cone) for k in range(logits.shape[1])]
        return logits - torch.cat(columns, 1)


def measured() -> Outcome:
    return outcome(NETWORKS, PLANTED)


def outcome(n: int, planted: int) -> Outcome:
    """The row, with so many networks of both kinds."""
    wrong: list[Cells] = []
    table = []
    # processes, because threads would share the interpreter; results do not depend on their number
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), torch.set_num_threads, (1,)) as processes:
        for name, count, made in (("random", n, _random), ("hidden counterexample", planted, _hidden)):
            verdicts = {"certified": 0, "broken": 0, "unknown": 0}
            judged = processes.map(_judged, [made] * count, range(count), chunksize=20)
            for seed, (verdict, why) in enumerate(judged):
                verdicts[verdict] += 1
                if why:
                    wrong.append({"networks": name, "seed": seed, "verdict": verdict, "why": why})
            table.append(
                {"networks": name, "n": count, **verdicts, "wrong": sum(w["networks"] == name for w in wrong)}
            )
    hidden = next(row for row in table if row["networks"] != "random")
    claims = [
        Claim("wrong verdicts == 0", len(wrong), 0),
        Claim("certificates of networks with a hidden counterexample == 0", hidden["certified"], 0),
        Claim(
            "share of random networks that are decided >= 0.99",
            1 - table[0]["unknown"] / max(n, 1),
            0.99,
            least=True,
        ),
    ]
    config = {"networks": n, "planted": planted, "timeout_s": TIMEOUT_S, "seeds": "0 to n - 1"}
    return Outcome(table, claims, config, {"wrong": wrong})


Case = tuple[nn.Module, Chain, Tensor, float]
"""network, its chain, input (1, *shape), eps"""


def _random(seed: int) -> Case:
    rng = torch.Generator().manual_seed(seed)
    chain = Chain(seed % 3 == 0, rng)
    x = torch.rand(1, *chain.shape, generator=rng)
    return chain, chain, x, float(torch.rand((), generator=rng) * 0.2 + 0.01)


def _hidden(seed: int) -> Case:
    rng = torch.Generator().manual_seed(1_000_000 + seed)
    chain = Chain(False, rng)
    x = torch.rand(1, *chain.shape, generator=rng)
    eps = float(torch.rand((), generator=rng) * 0.1 + 0.02)
    at = (x + eps * (2 * torch.rand(x.shape, generator=rng) - 1)).clamp(0, 1)
    logits = chain(at)[0].detach()
    y = int(chain(x).argmax())
    depth = float(logits[y] - logits.amin()) + 1.0
    return Hidden(chain, at, y, depth, eps / 20), chain, x, eps


def _judged(made: Callable[[int], Case], seed: int) -> tuple[str, str]:
    """The verdict about one network, and what is wrong with it, if anything."""
    net, chain, x, eps = made(seed)
    model = Classifier(net).eval().requires_grad_(False)
    y = model(x).argmax(1)
    batch, threat = Batch(x, y, torch.tensor([seed])), ThreatModel(Linf(eps))
    graph = prepared_graph(model, batch)
    proofs = [
        p.on(graph, model, threat)(batch) for p in (IBP(), CrownIBP(), Crown(), BranchAndBound(TIMEOUT_S))
    ]
    certified, broken = any(bool(p.certified) for p in proofs), bool(proofs[-1].broken)
    verdict = "certified" if certified else "broken" if broken else "unknown"
    if certified and broken:
        return verdict, "certified by one method and broken by another"
    low, high = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
    if broken:
        inside = bool(((proofs[-1].x_adv >= low - 1e-6) & (proofs[-1].x_adv <= high + 1e-6)).all())
        beaten = int(model(proofs[-1].x_adv).argmax(1)) != int(y)
        return verdict, "" if inside and beaten else "the counterexample is not one"
    if isinstance(net, Hidden):
        return verdict, "certified although the hidden input is misclassified" if certified else ""
    worst = _worst(chain.matrices(), low.flatten().double().numpy(), high.flatten().double().numpy(), int(y))
    if certified and worst is not None and _margin(chain.matrices(), worst, int(y)) <= 0:
        return verdict, "the solver found an input that is misclassified in rational arithmetic"
    return verdict, ""


def _worst(layers: Layers, low: np.ndarray, high: np.ndarray, y: int) -> np.ndarray | None:
    """The input with the smallest margin by a mixed-integer program with one binary variable for each ReLU; None if the
    smallest margin is clearly positive.
    """
    best: tuple[float, np.ndarray | None] = (1e-4, None)
    for other in range(len(layers[-1][1])):
        if other == y:
            continue
        value, x = _minimum(layers, low, high, layers[-1][0][y] - layers[-1][0][other])
        value += layers[-1][1][y] - layers[-1][1][other]
        if x is not None and value < best[0]:
            best = value, x
    return best[1]


def _minimum(
    layers: Layers, low: np.ndarray, high: np.ndarray, row: np.ndarray
) -> tuple[float, np.ndarray | None]:
    hidden = layers[:-1]
    n, sizes = len(low), [len(offset) for _, offset in hidden]
    total = n + 2 * sum(sizes)  # the input, and for each ReLU its output and its sign
    lower, upper = np.zeros(total), np.full(total, np.inf)
    lower[:n], upper[:n] = low, high
    rows, least, most = [], [], []
    at, before, a, b = n, (0, n), low, high
    for (matrix, offset), size in zip(hidden, sizes, strict=True):
        centre, radius = (a + b) / 2, (b - a) / 2
        middle, spread = matrix @ centre + offset, np.abs(matrix) @ radius
        a, b = middle - spread - 1e-6, middle + spread + 1e-6
        for k in range(size):
            out, sign = at + k, at + size + k
            upper[sign] = 1
            upper[out] = max(b[k], 0.0)
            pre = np.zeros(total)
            pre[before[0] : before[1]] = -matrix[k]
            pre[out] = 1
            first, second, third = pre.copy(), pre.copy(), np.zeros(total)
            second[sign] = -min(a[k], 0.0)
            third[out], third[sign] = 1, -max(b[k], 0.0)
            rows += [first, second, third]
            least += [offset[k], -np.inf, -np.inf]
            most += [np.inf, offset[k] - min(a[k], 0.0), 0.0]
        before, at = (at, at + size), at + 2 * size
        a, b = np.maximum(a, 0), np.maximum(b, 0)
    cost = np.zeros(total)
    cost[before[0] : before[1]] = row
    whole = np.zeros(total)
    place = n
    for size in sizes:
        whole[place + size : place + 2 * size] = 1
        place += 2 * size
    found = milp(
        cost,
        integrality=whole,
        bounds=Box(lower, upper),
        constraints=LinearConstraint(np.array(rows), least, most),
    )
    return (float(found.fun), found.x[:n]) if found.success else (np.inf, None)


def _margin(layers: Layers, x: np.ndarray, y: int) -> Fraction:
    """The margin of an input in rational arithmetic, with the weights as they are stored."""
    values: Sequence[Fraction] = [Fraction(float(each)) for each in x]
    for k, (matrix, offset) in enumerate(layers):
        values = [
            sum((Fraction(float(w)) * v for w, v in zip(line, values, strict=True)), Fraction(float(shift)))
            for line, shift in zip(matrix, offset, strict=True)
        ]
        if k < len(layers) - 1:
            values = [max(v, Fraction(0)) for v in values]
    return values[y] - max(v for k, v in enumerate(values) if k != y)
