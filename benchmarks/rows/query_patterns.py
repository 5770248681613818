"""Attacks with coarse patterns on a guarded model, what they cost with other answers, and streams of one scene.

Every query comes from a new client. A success is an allowed input that the guard accepts and the network misclassifies.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import numpy as np
import torch
from torch import Tensor

from benchmarks.networks import Network, images, network
from benchmarks.parts import part
from benchmarks.queries import QUALITIES, encoded
from benchmarks.record import Cells, Claim, Outcome
from holdfast.attacks import RayS, Square
from holdfast.attacks.protocol import Attack
from holdfast.core.batch import Batch
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.meter import Answering
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Ids, Inputs, Logits
from holdfast.guard.detectors.evasion import OARS, CoarsePatterns, InformedSquare
from holdfast.guard.detectors.queries import QueryDetector, QuerySettings, Screened, for_cameras
from holdfast.guard.query_rule import KEY_VARIABLE, QueryRule, rejecting
from holdfast.guard.rules import Releasing, release_of
from holdfast.guard.state_in_memory import MemoryState
from holdfast.verbs.calibrate import Guard

WHAT = "coarse patterns and other query attacks with the guard, with other answers and budgets; streams of one scene"
NETWORKS: dict[str, tuple[tuple[float, ...], int, int]] = {
    "mnist-cnn": ((0.15, 0.2), 50, 1000),
    "cifar_resnet20": ((8 / 255, 16 / 255), 20, 300),
}
"""values of eps, and images and queries of the attacks with coarse patterns"""
KEY, SEED, FRESH, BUDGETS, RATE = bytes(range(32)), 0, 3000, (100, 300), 0.001
OTHERS, FEWER = 10, 300
"""images of other attacks; their queries, and those of attacks on other answers"""
SCENES, FRAMES, NOISES = 20, 100, (1, 3, 6, 10)
"""streams of each kind, images in each, and standard deviations of sensor noise in 1/255"""
GUARDS = {
    "queries": {"queries": {}},
    "queries for cameras": {"queries": {"cameras": True}},
    "queries and inputs": {
        "queries": {},
        "mahalanobis": {"on": "inputs", "shrinkage": 0.001, "action": "block"},
    },
}


@dataclass(frozen=True, eq=False)
class Arm:
    """What an attack queries: the network with the detectors of a guard, and what is released of the scores."""

    name: str
    guard: Guard | None = None
    queries: int = FEWER
    release: str = "all"
    mixed: Tensor | None = None
    """benign inputs (n, *shape), of which as many are sent as queries; None for none"""


def measured() -> Outcome:
    os.environ[KEY_VARIABLE] = KEY.hex()  # the radius depends on the key
    table: list[Cells] = []
    claims: list[Claim] = []
    for network_name, (radii, n, queries) in NETWORKS.items():
        net = network(network_name)
        guards = {name: _calibrated(net, rules) for name, rules in GUARDS.items()}
        claims += [_false_positives(net, name, guard, table) for name, guard in guards.items()]
        for eps in radii:
            claims += _attacked(net, Linf(eps), n, queries, guards, table)
        claims += _streams(net, guards["queries"], table)
    config = {
        "images": f"{OTHERS} with other attacks than coarse patterns",
        "guard": f"calibrated at {100 * RATE:g} % on the test images from {FRESH} on, of which a fifth fits detectors",
        "benign": f"the first {FRESH} test images",
        "seed": SEED,
    }
    notes = [
        "adaptive: while most queries are rejected, patterns become larger or confined to the content of the image",
        "without a guard, the adaptive attacks are the same as the others",
        "without scores, coarse patterns are a random search; RayS needs labels only",
        "with half of the traffic benign, as many benign images as queries are sent, by other clients",
    ]
    return Outcome(table, claims, config, notes=notes)


def _calibrated(net: Network, rules: Cells) -> Guard:
    shape = list(images(net.data, 1)[0].shape[1:])
    settings = {"mode": "enforce", "false_positives": RATE, "inputs": {"shape": shape}, "rules": rules}
    data = images(net.data, 10_000 - FRESH, "test", FRESH)
    return Guard.from_settings(settings).calibrate(net.module, data, seed=SEED)


def _false_positives(net: Network, name: str, guard: Guard, table: list[Cells]) -> Claim:
    x, _ = images(net.data, FRESH)
    refused = 0
    for row, each in enumerate(x.split(1)):
        decision = guard.before(each, principal=f"client {row}")
        if decision.answered:
            decision = guard.after(decision, net.module(each))
        refused += not decision.answered
    table.append({"network": net.name, "what": "benign images", "guard": name, "refused": refused / len(x)})
    return Claim(
        f"{net.name}, guard of {name}: share of refused benign images <= 0.2 %", refused / len(x), 0.002
    )


def _attacked(
    net: Network, norm: Linf, n: int, limit: int, guards: dict[str, Guard], table: list[Cells]
) -> list[Claim]:
    plain = Arm("no guard", queries=limit)
    queries, cameras, both = (Arm(f"guard of {name}", guard, limit) for name, guard in guards.items())
    digits, labels = (
        Arm(name, release=release) for name, release in (("2 digits", "2"), ("labels", "labels"))
    )
    mixed = replace(
        both, name=f"{both.name}, half of the traffic benign", mixed=images(net.data, 5000, "train")[0]
    )
    claims = []
    for search, arms, adaptive_arms in (
        ("fit", (queries, both, cameras, digits, labels), (queries, both, mixed)),
        ("population", (queries, both, digits), (both,)),
    ):
        attack = CoarsePatterns(search)  # type: ignore[arg-type]
        known = {arm: _row(net, norm, search, attack, n, arm, table) for arm in (plain, *arms)}
        adaptive = replace(attack, adaptive=True)
        name = f"{search}, adaptive"
        informed = {arm: _row(net, norm, name, adaptive, n, arm, table) for arm in adaptive_arms}
        claims += [
            Claim(
                f"{net.name}, {norm}, {what}: success with the guard <= half of that without",
                share,
                known[plain] / 2,
            )
            for what, share in ((search, known[both]), (name, informed[both]))
        ]
    square, settings = Square(), _query_settings(guards["queries"])
    others: list[tuple[str, Attack, tuple[Arm, ...]]] = [
        ("Square", square, (plain, queries, both, digits)),
        ("OARS Square", OARS(), (plain, queries, both)),
        ("informed Square", InformedSquare(settings), (plain, queries, both)),
        ("informed Square", InformedSquare(for_cameras(settings)), (cameras,)),
        ("RayS (labels)", RayS(), (plain, queries, both)),
    ]
    for name, other, arms in others:
        for arm in arms:
            _row(net, norm, name, other, OTHERS, replace(arm, queries=FEWER), table)
    return claims


def _row(net: Network, norm: Linf, name: str, attack: Attack, n: int, arm: Arm, table: list[Cells]) -> float:
    """Add the results of an attack to the table, and return its success."""
    what = f"{net.name} {norm.eps:.4f} {name} {arm.name}"
    cells = part("query-patterns", what, lambda: _cells(net, norm, name, attack, n, arm))["measured"]
    table.append(cells)
    share: float = cells["success"]
    return share


def _cells(net: Network, norm: Linf, name: str, attack: Attack, n: int, arm: Arm) -> Cells:
    x, y = images(net.data, 2 * n)
    with torch.no_grad():
        right = net.module(x).argmax(1) == y
    batch = Batch(x[right][:n], y[right][:n], torch.arange(n))
    screened = _screened(net, norm, batch, arm)
    model = screened if arm.release == "all" else Releasing(screened, release_of(arm.release))
    attack(
        Answering(model, batch) if isinstance(attack, Square | RayS) else model,
        batch,
        ThreatModel(norm, queries=arm.queries),
        rng=Draws(SEED),
    )
    broken, rejected = screened.broken_at, screened.rejected_at[screened.rejected_at > 0].tolist()
    share = float((broken > 0).float().mean())
    return {
            "network": net.name, "what": name, "eps": round(norm.eps, 4), "guard": arm.name, "images": n,
            "queries": arm.queries,
            "success": share,
            **{f"success within {n} queries": float(((broken > 0) & (broken <= n)).float().mean()) for n in BUDGETS},
            "queries to success (median)": median(broken[broken > 0].tolist()) if share else None,
            **({"first rejected query (median)": median(rejected)} if rejected else {}),
    }  # fmt: skip


def _screened(net: Network, norm: Linf, batch: Batch, arm: Arm) -> Screened:
    model = Classifier(net.module)
    if arm.guard is None:
        return Screened(model, batch, norm)
    if arm.guard.pipeline.detectors:
        assert arm.guard.calibration is not None
        model = rejecting(model, arm.guard.pipeline, dict(arm.guard.calibration.scales))
    settings = _query_settings(arm.guard)
    detector = QueryDetector(KEY, MemoryState(), batch.x.shape[1:], settings)
    if arm.mixed is None:
        return Screened(model, batch, norm, detector)
    return _Mixed(model, batch, norm, detector, benign=arm.mixed)


def _query_settings(guard: Guard) -> QuerySettings:
    rule = guard.pipeline.queries
    assert isinstance(rule, QueryRule)
    return rule.detector.settings


@dataclass
class _Mixed(Screened):
    """A guarded model that receives as many benign inputs as queries."""

    benign: Tensor | None = None
    sent: int = 0

    def __call__(self, x: Inputs, ids: Ids | None = None) -> Logits:
        assert self.benign is not None and self.detector is not None
        rows = (self.sent + torch.arange(len(x))) % len(self.benign)
        self.sent += len(x)
        self.detector.score(self.benign[rows], [""] * len(x), 0.0)
        return super().__call__(x, ids)


def _streams(net: Network, guard: Guard, table: list[Cells]) -> list[Claim]:
    """The share of each benign stream of one scene that is refused, and what an attacker gains by `cameras: true`."""
    plain, claims = _query_settings(guard), []
    for kind, scenes in _scenes(net.data):
        cells: Cells = {"network": net.name, "what": f"{SCENES} streams of {FRAMES}: {kind}"}
        for name, settings in (("default", plain), ("cameras", for_cameras(plain))):
            shares, firsts = [], []
            for frames in scenes:
                detector = QueryDetector(KEY, MemoryState(), frames.shape[1:], settings)
                refused = detector.score(frames, ["camera"] * len(frames), 0.0) >= settings.threshold
                shares.append(float(refused.mean()))
                firsts += [int(refused.argmax()) + 1] if refused.any() else []
            cells[f"refused, {name}"] = float(np.mean(shares))
            cells[f"first refused, {name} (median)"] = median(firsts) if firsts else None
        table.append(cells)
        if net.data == "cifar10" and kind.startswith("sensor"):
            what = f"{net.name}, {kind}: share refused with cameras: true <= 1 %"
            claims.append(Claim(what, cells["refused, cameras"], 0.01))
    return claims


def _scenes(data: str) -> Iterator[tuple[str, list[Tensor]]]:
    x, rng = images(data, SCENES)[0], np.random.default_rng(SEED)
    for size in NOISES:
        noisy = [
            each + size / 255 * torch.from_numpy(rng.normal(size=(FRAMES, *each.shape))).float() for each in x
        ]
        yield f"sensor noise {size}/255", [(255 * each.clamp(0, 1)).round() / 255 for each in noisy]
    qualities = rng.integers(len(QUALITIES), size=(SCENES, FRAMES)).tolist()
    varied = partial(zip, strict=True)
    yield (
        "JPEG at changing quality, with noise 1/255",
        [
            torch.stack([encoded(_noisy(each, rng), quality) for quality in chosen])
            for each, chosen in varied(x, qualities)
        ],
    )


def _noisy(x: Tensor, rng: np.random.Generator) -> Tensor:
    return (x + torch.from_numpy(rng.normal(size=x.shape)).float() / 255).clamp(0, 1)
