"""The audit of privacy: its arithmetic, randomised response, and trainings without and with differential privacy."""

import math
import statistics
import time

import numpy as np
import torch
from torch import Tensor, nn

import holdfast
from benchmarks.networks import images
from benchmarks.record import Cells, Claim, Outcome
from holdfast.audits.privacy import epsilon_from_guesses, epsilon_from_rates
from holdfast.core.batch import Batch
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.recipes import DPSGD
from holdfast.recipes.training.fit import Training

WHAT = "bounds of epsilon: closed forms, randomised response, and one-run audits of trainings on MNIST"
RUNS, GUESSES = 1000, 2000
TRAININGS, OVERFITTED = 20, 5
IMAGES, TEST = 2000, 2000
EPSILON, DELTA = 2.0, 1e-5
HOW = Training(epochs=12, batch=256, lr=5e-3)


def measured() -> Outcome:
    started = time.process_time()
    table: list[Cells] = []
    all_right, most = epsilon_from_guesses(100, 100), epsilon_from_guesses(600, 1000)
    claims = [
        Claim("100 of 100 guesses right: bound >= 3.49", all_right, 3.49, least=True),
        Claim("600 of 1,000 guesses right: difference from 0.297 <= 0.001", abs(most - 0.297), 0.001),
    ]
    for epsilon, least in ((1.0, 0.9), (3.0, 2.75)):
        bounds, rates = _randomised_response(epsilon)
        table.append(_row(f"randomised response, epsilon {epsilon:g}: one run", bounds, epsilon))
        table.append(_row(f"randomised response, epsilon {epsilon:g}: rates", rates, epsilon))
        above = float(np.mean(np.array(bounds) > epsilon))
        claims += [
            Claim(f"randomised response, epsilon {epsilon:g}: mean bound >= {least}",
                  statistics.mean(bounds), least, least=True),
            Claim(f"randomised response, epsilon {epsilon:g}: share above the truth <= 0.07", above, 0.07),
        ]  # fmt: skip
    x, y = images("mnist", IMAGES, "train")
    test = images("mnist", TEST)
    overfitted = [
        _audited(x[:1000], y[:1000], seed, private=False, canaries=100, test=test)
        for seed in range(OVERFITTED)
    ]
    private = [_audited(x, y, seed, private=True, canaries=400, test=test) for seed in range(TRAININGS)]
    for name, found in (("without noise, 100 canaries", overfitted), ("DP-SGD, 400 canaries", private)):
        bounds = [bound for bound, _ in found]
        accuracy = statistics.mean(accuracy for _, accuracy in found)
        table.append({**_row(name, bounds, EPSILON), "test accuracy": round(accuracy, 4)})
    n_within = sum(bound <= EPSILON for bound, _ in private)
    claims += [
        Claim("training without noise, 100 canaries: smallest bound of 5 seeds > 2",
              min(bound for bound, _ in overfitted), EPSILON, least=True),
        Claim(f"DP-SGD with epsilon 2: trainings of {TRAININGS} with a bound <= 2 >= 18", n_within, 18, least=True),
    ]  # fmt: skip
    config = {
        "images": f"{IMAGES} of MNIST (1,000 without noise)", "network": "784-64-10", "epsilon": EPSILON,
        "delta": DELTA, "epochs": HOW.epochs, "batch": HOW.batch, "CPU seconds": round(time.process_time() - started),
    }  # fmt: skip
    detail = {"without noise": overfitted, "dp-sgd": private}
    return Outcome(table, claims, config, detail)


def _row(what: str, bounds: list[float], epsilon: float) -> Cells:
    above = sum(bound > epsilon for bound in bounds)
    return {
        "what": what, "runs": len(bounds), "mean bound": round(statistics.mean(bounds), 3),
        "largest": round(max(bounds), 3), "above epsilon": above,
    }  # fmt: skip


def _randomised_response(epsilon: float) -> tuple[list[float], list[float]]:
    """Bounds of runs in which each answer is right with the probability that epsilon allows: from all guesses, and from
    the rates of as many members as others."""
    rng, chance = np.random.default_rng(74), 1 / (1 + math.exp(-epsilon))
    halves = rng.binomial(GUESSES // 2, chance, (RUNS, 2)).tolist()
    known = {count: epsilon_from_guesses(count, GUESSES) for count in {sum(pair) for pair in halves}}
    n = GUESSES // 2
    return (
        [known[sum(pair)] for pair in halves],
        [epsilon_from_rates(hits, n, n - rejected, n) for hits, rejected in halves],
    )


def _network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))


def _overfitted(x: Tensor, y: Tensor, seed: int) -> nn.Module:
    net = _network()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net


def _private(x: Tensor, y: Tensor, seed: int) -> nn.Module:
    model = Classifier(_network())
    recipe = DPSGD(epsilon=EPSILON, delta=DELTA, training=HOW)
    checkpoints = recipe(model, Batch(x, y, torch.arange(len(x))), ThreatModel(Linf(0.0)), rng=Draws(seed))
    *_, last = checkpoints
    last.put_into(model)
    return model


def _audited(
    x: Tensor, y: Tensor, seed: int, *, private: bool, canaries: int, test: tuple[Tensor, Tensor]
) -> tuple[float, float]:
    """Bound of the audit of one training, and accuracy of the network on test images."""
    nets = []

    def fit(x: Tensor, y: Tensor, seed: int) -> nn.Module:
        nets.append(_private(x, y, seed) if private else _overfitted(x, y, seed))
        return nets[-1]

    found = holdfast.audit.privacy(
        _network(),
        (x, y),
        train=fit,
        epsilon=EPSILON,
        delta=DELTA,
        canaries=canaries,
        seed=seed,
        device="cpu",
    )
    with torch.no_grad():
        right = (nets[0].eval()(test[0]).argmax(1) == test[1]).double().mean()
    return found.facts["epsilon_lower"], float(right)
