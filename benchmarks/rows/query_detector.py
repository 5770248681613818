"""The stateful query detector: benign streams, attacks spread over workers and clients, OARS beside Blacklight, cost.

OARS: Feng et al., arXiv:2303.06280. Blacklight: Li et al., arXiv:2006.14042, our own with the settings of the paper. A
success of OARS is an allowed input that the defended model accepts and misclassifies (with a target: as the target).
"""

import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import median
from time import process_time

import numpy as np
import torch
from torch import Tensor

from benchmarks.blacklight import Blacklight
from benchmarks.networks import Network, images, network
from benchmarks.queries import CLIPS, ENCODINGS, FRAMES, NOISE, POPULAR, REPEATS, Defended, benign, film
from benchmarks.record import Cells, Claim, Outcome
from holdfast.attacks import HopSkipJump, Square
from holdfast.attacks.protocol import Attack
from holdfast.core.batch import Batch
from holdfast.core.constraints import L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Bounds, Classifier
from holdfast.core.threat import ThreatModel
from holdfast.guard.detectors.evasion import OARS, Base, InformedSquare
from holdfast.guard.detectors.queries import QueryDetector, QuerySettings, Screened, radius_for
from holdfast.guard.state_in_memory import MemoryState
from holdfast.guard.state_in_sqlite import SQLiteState

WHAT = "stateful query detector: benign streams, attacks over workers and clients, OARS, an attacker who knows it, cost"
KEY, SEED, BENIGN, CALIBRATION = bytes(range(32)), 0, 100_000, 20_000
DATA = ("cifar10", "mnist", "fashion_mnist")
NETWORK, ATTACKED, QUERIES, WORKERS, CLIENTS = "cifar_resnet20", 6, 1000, 4, 10
OARS_RUNS: tuple[tuple[Base, Linf | L2, bool, int, int, bool], ...] = (
    ("nes", Linf(8 / 255), False, 30, 1000, True),
    ("square", Linf(8 / 255), True, 10, 500, False),
    ("square", Linf(8 / 255), False, 10, 500, False),
    ("hop_skip_jump", L2(2.0), False, 10, 500, False),
)
"""Attack, constraint, whether each image has a target, images, queries, and whether claims are made."""
INFORMED: tuple[tuple[float, bool, int, bool], ...] = (
    (8 / 255, True, 1000, True),
    (8 / 255, True, 5000, True),
    (8 / 255, False, 1000, False),
    (4 / 255, False, 1000, False),
)
"""Linf radius, whether each image has a target, queries, and whether claims are made: with targets, one query does not
break an image."""
INFORMED_IMAGES = 30
TIMED = 2000


def measured() -> Outcome:
    table: list[Cells] = []
    claims: list[Claim] = []
    radii = {data: radius_for(images(data, CALIBRATION, "train")[0], KEY) for data in DATA}
    for data in DATA:
        claims += _benign(data, radii[data], table)
    net = network(NETWORK)
    radius = radii[net.data]
    for name, attack, threat in (
        ("Square", Square(queries=QUERIES), ThreatModel(Linf(2 / 255))),
        ("HopSkipJump", HopSkipJump(queries=QUERIES), ThreatModel(L2(float("inf")))),
    ):
        claims += _spread(net, name, attack, threat, radius, table)
    for run in OARS_RUNS:
        claims += _oars(net, *run, radius, table)
    for attacker in INFORMED:
        claims += _informed(net, *attacker, radius, table)
    claims += _cost(net.data, radius, table)
    config = {
        "benign": f"{BENIGN} queries: every image once, {POPULAR} images {REPEATS} times and in {ENCODINGS} other "
        f"encodings, {CLIPS} videos of {FRAMES} frames with noise {NOISE:.4f}, retries of the others",
        "radii": {data: round(value, 3) for data, value in radii.items()},
        "network": NETWORK,
        "seed": SEED,
    }
    notes = [
        "a radius is chosen from 20,000 training images, which are also part of the benign stream",
        "Square and HopSkipJump: attacks that break their image with fewer than 50 queries are left out",
        "OARS without a claim: ten images, whose share says little",
        "the detector answers the first queries for an image, which is enough for some images of this network",
        "informed Square: to the detector, all queries differ from the first one by natural changes",
        "its claims are with targets, because without them the first query breaks every fifth image at 8/255",
    ]
    return Outcome(table, claims, config, notes=notes)


def _benign(data: str, radius: float, table: list[Cells]) -> list[Claim]:
    """False positives of a stream, and of a camera that does not move, which is a known one."""
    shape = images(data, 1)[0].shape[1:]
    detector = QueryDetector(KEY, MemoryState(), shape, radius=radius)
    fired, clients, n = 0, dict.fromkeys(("client", "camera"), 0), 0
    for x, names in _batches(benign(data, BENIGN, np.random.default_rng(SEED)), 50):
        suspicious = detector.score(x, names, 0.1 * n) >= detector.settings.threshold
        n, fired = n + len(x), fired + int(suspicious.sum())
        for name, each in zip(names, suspicious, strict=True):
            clients[name.split()[0]] += int(each)
    still = torch.cat([film(images(data, 1)[0][0], np.random.default_rng(k), still=True) for k in range(20)])
    scores = detector.score(still, ["still"] * len(still), 0.1 * n)
    first = int(np.argmax(scores >= detector.settings.threshold)) if scores.max() >= 10 else len(still)
    table.append({"what": f"benign, {data}", "queries": n, "suspicious": fired, "of clients": clients["client"],
                  "of cameras": clients["camera"], "frames of a still camera before it is": first})  # fmt: skip
    return [Claim(f"{data}: suspicious share of benign queries <= 0.1 %", fired / n, 0.001)]


def _batches(stream: Iterable[tuple[Tensor, str]], size: int) -> Iterable[tuple[Tensor, list[str]]]:
    rows, names = [], []
    for x, name in stream:
        rows.append(x)
        names.append(name)
        if len(rows) == size:
            yield torch.stack(rows), names
            rows, names = [], []
    if rows:
        yield torch.stack(rows), names


def _spread(
    net: Network, name: str, attack: Attack, threat: ThreatModel, radius: float, table: list[Cells]
) -> list[Claim]:
    """An attack whose queries go to four handles of one SQLite file and come from ten clients; all are answered."""
    x, y = _correct(net, ATTACKED)
    firsts, suspicious = [], []
    with tempfile.TemporaryDirectory() as folder:
        states = [SQLiteState(Path(folder) / "state.db") for _ in range(WORKERS)]
        detectors = [QueryDetector(KEY, state, x.shape[1:], radius=radius) for state in states]
        counts = [0] * len(x)
        scores: list[list[float]] = [[] for _ in x]

        def watched(queries: Tensor, ids: Tensor | None = None) -> np.ndarray:
            assert ids is not None
            for query, example in zip(queries, ids.tolist(), strict=True):
                at = counts[example] = counts[example] + 1
                detector = detectors[at % WORKERS]
                scores[example].append(detector.score(query[None], [f"client {at % CLIENTS}"], 0.01 * at)[0])
            return np.zeros(len(queries), bool)

        model = _Watched(net, watched)
        attack(model, Batch(x, y, torch.arange(len(x))), threat, rng=Draws(SEED))
        for each in scores:
            over = np.array(each) >= detectors[0].settings.threshold
            firsts.append(int(over.argmax()) + 1 if over.any() else QUERIES + 1)
            suspicious.append(float(over.mean()))
        for state in states:
            state.close()
    long = [k for k, n in enumerate(counts) if n >= 50]
    found = [firsts[k] <= QUERIES for k in long]
    table.append({"what": f"{name}, {WORKERS} workers, {CLIENTS} clients", "images": len(long),
                  "queries": sum(counts[k] for k in long), "detected": float(np.mean(found)),
                  "first suspicious query (median)": median(firsts[k] for k in long),
                  "suspicious": float(np.mean([suspicious[k] for k in long]))})  # fmt: skip
    return [
        Claim(
            f"{name}: share of attacks detected within {QUERIES} queries >= 0.99",
            float(np.mean(found)),
            0.99,
            least=True,
        )
    ]


class _Watched:
    """A network whose queries are shown to a function."""

    def __init__(self, net: Network, watch: Callable[[Tensor, Tensor | None], np.ndarray]) -> None:
        self.net, self.watch, self.bounds = net, watch, Bounds()

    def __call__(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        self.watch(x, ids)
        with torch.no_grad():
            logits: Tensor = self.net.module(x)
        return logits


def _oars(
    net: Network, base: Base, constraint: Linf | L2, targeted: bool, n: int, queries: int, claimed: bool,
    radius: float, table: list[Cells],
) -> list[Claim]:  # fmt: skip
    x, y = _correct(net, n)
    target = (y + 1 + torch.arange(n) % 9) % 10 if targeted else None
    batch, shares = Batch(x, y, torch.arange(n), target), {}
    blacklight = Blacklight(KEY, x.shape[1:])
    detector = QueryDetector(KEY, MemoryState(), x.shape[1:], radius=radius)
    defences: dict[str, Callable[[Tensor], np.ndarray]] = {
        "Blacklight": lambda q: blacklight.score(q) >= blacklight.settings.threshold,
        "holdfast": partial(_rejected, detector),
    }
    for who, rejects in defences.items():
        model = Defended(net.module, rejects)
        x_adv = OARS(base=base, queries=queries)(model, batch, ThreatModel(constraint), rng=Draws(SEED))
        with torch.no_grad():
            predicted = net.module(x_adv).argmax(1)
        success = predicted == target if target is not None else predicted != y
        shares[who] = float(success.float().mean())
        table.append({"what": f"OARS {base}, {constraint}{', targets' if targeted else ''}", "who": who, "images": n,
                      "queries": model.n_queries, "rejected": model.n_rejected / model.n_queries,
                      "success": shares[who], "CPU ms / query": 1e3 * model.cpu_s / model.n_queries})  # fmt: skip
    if not claimed:
        return []
    what = f"OARS {base}, {constraint}, {queries} queries: success"
    return [
        Claim(f"{what} against Blacklight >= 0.7", shares["Blacklight"], 0.7, least=True),
        Claim(f"{what} against holdfast <= 0.1", shares["holdfast"], 0.1),
    ]


def _informed(
    net: Network, eps: float, targeted: bool, queries: int, claimed: bool, radius: float, table: list[Cells]
) -> list[Claim]:
    """An attacker who knows the detector except for its key, and uses a new client for each query."""
    x, y = _correct(net, INFORMED_IMAGES)
    target = (y + 1 + torch.arange(len(y)) % 9) % 10 if targeted else None
    batch, norm, shares = Batch(x, y, torch.arange(len(y)), target), Linf(eps), {}
    settings = QuerySettings(radius=radius)
    for who in ("no detector", "holdfast"):
        detector = QueryDetector(KEY, MemoryState(), x.shape[1:], settings) if who == "holdfast" else None
        model = Screened(Classifier(net.module), batch, norm, detector)
        InformedSquare(settings, queries=queries)(model, batch, ThreatModel(norm), rng=Draws(SEED))
        broken_at, firsts = model.broken_at, model.rejected_at[model.rejected_at > 0].tolist()
        shares[who] = float((broken_at > 0).float().mean())
        table.append({"what": f"informed Square, {norm}{', targets' if targeted else ''}", "who": who,
                      "images": len(x), "queries": int(model.queries.sum()), "success": shares[who],
                      "success within 10 queries": float(((broken_at > 0) & (broken_at <= 10)).float().mean()),
                      **({"detected": len(firsts) / len(x),
                          "first suspicious query (median)": median(firsts)} if firsts else {})})  # fmt: skip
    if not claimed:
        return []
    what = f"informed Square, {norm}, targets, {queries} queries: success"
    return [
        Claim(f"{what} without a detector >= 0.7", shares["no detector"], 0.7, least=True),
        Claim(f"{what} against holdfast <= 0.1", shares["holdfast"], 0.1),
    ]


def _rejected(detector: QueryDetector, x: Tensor) -> np.ndarray:
    clients = [f"client {row}" for row in range(len(x))]
    return detector.score(x, clients, 0.0) >= detector.settings.threshold


def _correct(net: Network, n: int) -> tuple[Tensor, Tensor]:
    """The first test images that the network classifies correctly."""
    x, y = images(net.data, 2 * n)
    with torch.no_grad():
        right = net.module(x).argmax(1) == y
    return x[right][:n], y[right][:n]


def _cost(data: str, radius: float, table: list[Cells]) -> list[Claim]:
    """CPU time of single queries with a state in SQLite that holds many clusters."""
    x = images(data, CALIBRATION + TIMED, "train")[0]
    with tempfile.TemporaryDirectory() as folder:
        state = SQLiteState(Path(folder) / "state.db")
        detector = QueryDetector(KEY, state, x.shape[1:], radius=radius)
        for part in x[:CALIBRATION].split(100):
            detector.score(part, ["client"] * len(part), 0.0)
        noise = 8 / 255 * torch.randn(TIMED, *x.shape[1:]).sign()
        kinds = {
            "different": x[CALIBRATION:],
            "first near duplicate": (x[1 : TIMED + 1] + noise).clamp(0, 1),
            "attack": (x[:1] + noise).clamp(0, 1),
        }
        cells: Cells = {"what": f"cost, SQLite, {CALIBRATION} clusters", "queries": TIMED}
        for name, queries in kinds.items():
            began = process_time()
            for k, query in enumerate(queries):
                detector.score(query[None], [f"client {k % CLIENTS}"], 1.0)
            cells[f"CPU ms / query, {name}"] = 1e3 * (process_time() - began) / TIMED
        state.close()
    table.append(cells)
    return [Claim(f"CPU ms / query, {name} <= 1", cells[f"CPU ms / query, {name}"], 1) for name in kinds]
