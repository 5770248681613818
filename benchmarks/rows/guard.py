"""The guard: false positives of the combined rules, CPU time of a request, and detectors under attacks."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

import holdfast
from benchmarks.networks import images, network
from benchmarks.record import Cells, Claim, Outcome
from holdfast.core.batch import Batch
from holdfast.core.model import Classifier
from holdfast.doubts.gallery import undefended
from holdfast.guard.detectors.outputs import features_of
from holdfast.statistics.intervals import combined_thresholds
from holdfast.verbs.calibrate import Guard

WHAT = "the guard: false positives of its combined rules, CPU time of a request, and detectors under attacks"
FITTED, N, EPS, SEED = 2000, 100, 0.2, 0
SPLITS, CALIBRATED, RATES = 1000, 4000, (0.01, 0.001)
REQUESTS, ROUNDS = 400, 5
MOST_MS = 1.0
DETECTORS = ("energy", "mahalanobis", "squeezing", "stability")
LAYER = "1.layer3"
"""of the ResNet-20; its features are computed anyway"""
COSTED = {
    "schema, range": "schema: {}, range: {}",
    "energy": "energy: {}",
    "queries": "queries: {}",
    "default: schema, range, queries, energy": "schema: {}, range: {}, queries: {}, energy: {}",
    "mahalanobis, on logits": "mahalanobis: {}",
    "mahalanobis, on features": f"mahalanobis: {{on: features, layer: {LAYER}}}",
    "squeezing": "squeezing: {}",
    "stability": "stability: {}",
    "squeezing of the inputs (defence)": "schema: {}",
}
"""Names and rules of the guards whose CPU time is measured."""
DEFENCE = {"squeezing of the inputs (defence)": "{bits: 5, median: 2}"}
"""Squeezes of the inputs of some of them."""
DEFAULT = "default: schema, range, queries, energy"


def measured() -> Outcome:
    training, labels = images("mnist", FITTED, "train")
    net = undefended(Batch(training, labels, torch.arange(FITTED)))
    x, y = images("mnist", 10_000)
    table: list[Cells] = []
    claims: list[Claim] = []
    with tempfile.TemporaryDirectory() as folder:
        rates = _false_positives(net, x, y, Path(folder))
        for rate, found in rates.items():
            table.append(
                {"what": f"false positives, calibrated to {100 * rate:g} %", "value": f"{100 * found:.3f} %"}
            )
            claims.append(
                Claim(f"combined rate calibrated to {rate:g}, mean of {SPLITS} splits", found, 1.05 * rate)
            )
        costs = _costs(Path(folder))
        for name, cost in costs.items():
            table.append({"what": f"CPU of a request: {name}", "value": f"{cost:.3f} ms"})
        claims.append(Claim("CPU ms of a request, default guard <= 1", costs[DEFAULT], MOST_MS))
        table += _attacked(net, x, y, Path(folder))
    config: Cells = {"data": "mnist", "network": "of the gallery", "n": N, "eps": EPS, "fitted on": FITTED,
                     "calibrated on": CALIBRATED, "splits": SPLITS, "requests": REQUESTS, "seed": SEED}  # fmt: skip
    return Outcome(table, claims, config)


def _guard(folder: Path, name: str, rules: str, shape: tuple[int, ...], defence: str = "{}") -> Guard:
    path = folder / f"{name}.yaml"
    path.write_text(
        f"inputs: {{shape: {list(shape)}}}\nrules: {{{rules}}}\ndefence: {defence}\n", encoding="utf-8"
    )
    return Guard.from_yaml(path)


def _false_positives(net: nn.Module, x: Tensor, y: Tensor, folder: Path) -> dict[float, float]:
    """The mean share of new inputs on which one of four detectors fires, over random splits."""
    guard = _guard(folder, "rates", ", ".join(f"{name}: {{}}" for name in DETECTORS), tuple(x.shape[1:]))
    ready = guard.calibrate(net, (x[:5000], y[:5000]), false_positives=0.01)
    pipeline = ready.pipeline
    scores = []
    for part in x[5000:].split(500):
        with torch.no_grad():
            seen = pipeline.observation(part, net(part), network=net)
        scores.append(torch.stack([*pipeline.detected(seen).values()]))
    columns = torch.cat(scores, 1)
    n = columns.shape[1] // 5 * 4
    generator, found = torch.Generator().manual_seed(SEED), {}
    for rate in RATES:
        shares = []
        for _ in range(SPLITS):
            order = torch.randperm(columns.shape[1], generator=generator)
            limits = combined_thresholds([*columns[:, order[:n]]], rate)
            assert limits is not None
            fired = (columns[:, order[n:]] > torch.tensor(limits)[:, None]).any(0)
            shares.append(float(fired.double().mean()))
        found[rate] = sum(shares) / SPLITS
    return found


def _costs(folder: Path) -> dict[str, float]:
    """CPU milliseconds of one request with one image of CIFAR size, the median of rounds; the model is not counted."""
    net = network("cifar_resnet20").module
    model = Classifier(net).eval().requires_grad_(False)
    x, y = images("cifar10", REQUESTS + FITTED)
    benign, x = (x[REQUESTS:], y[REQUESTS:]), x[:REQUESTS]
    with torch.no_grad(), features_of(net, LAYER) as taken:
        outputs, features = model(x), taken()
    costs = {}
    for name, rules in COSTED.items():
        defence = DEFENCE.get(name, "{}")
        guard = _guard(folder, f"cost{len(costs)}", rules, tuple(x.shape[1:]), defence)
        if "mahalanobis" in rules:
            guard = guard.calibrate(net, benign, false_positives=0.01)

        def request(row: int, guard: Guard = guard) -> None:
            one = slice(row, row + 1)
            decision = guard.before(x[one], principal="client")
            guard.after(decision, outputs[one], features[one], network=model)

        costs[name] = _cpu_ms(request)
    costs["one forward pass of the model, for comparison"] = _cpu_ms(lambda row: model(x[row : row + 1]))
    return costs


def _cpu_ms(request: Callable[[int], object]) -> float:
    """CPU milliseconds of a request, the median of rounds."""
    rounds = []
    for _ in range(ROUNDS):
        begin = time.process_time()
        with torch.no_grad():
            for row in range(REQUESTS):
                request(row)
        rounds.append(1000 * (time.process_time() - begin) / REQUESTS)
    return median(rounds)


def _attacked(net: nn.Module, x: Tensor, y: Tensor, folder: Path) -> list[Cells]:
    """Each detector under attacks that know it and that do not, on inputs that were not used for the calibration."""
    data, threat = (x[9000 : 9000 + N], y[9000 : 9000 + N]), f"linf:{EPS:g}"
    bare = holdfast.assess(net, data, threat, "quick", seed=SEED, doubts=False)
    rows: list[Cells] = [
        {"what": "no guard", "value": "", "robust": round(bare.metrics["robust_accuracy"].value, 3)}
    ]
    for name in DETECTORS:
        guard = _guard(folder, f"only-{name}", f"{name}: {{}}", tuple(x.shape[1:]))
        guard.calibrate(net, (x[:5000], y[:5000]), false_positives=0.01)
        model = holdfast.open_model(net, guard=str(folder / f"only-{name}.yaml"))
        result = holdfast.assess(model, data, threat, "quick", seed=SEED, doubts=False)
        value = {key: round(estimate.value, 3) for key, estimate in result.metrics.items()}
        rows.append(
            {
                "what": f"{name}, calibrated to 1 %",
                "value": "",
                "robust": value["robust_accuracy"],
                "rejected when clean": value["rejection_rate"],
                "AUROC oblivious": value["oblivious_detection_auroc"],
                "AUROC": value["detection_auroc"],
                "detected at 5 % oblivious": value["oblivious_detection_rate_at_5_percent"],
                "detected at 5 %": value["detection_rate_at_5_percent"],
                "detected at 1 %": value["detection_rate_at_1_percent"],
            }
        )
    return rows
