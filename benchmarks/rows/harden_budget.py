"""How much of a budget of two minutes `harden` uses: by a real clock, alone and beside busy processes."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.hardened import Examples, made, shares
from benchmarks.networks import images, network
from benchmarks.record import Cells, Claim, Outcome

WHAT = "the share of a budget of two minutes that planning and training use, on three networks and under load"
ROW, BUDGET, RECIPE, N, SUITE = "harden-budget", "120s", "auto", 100, "quick"
PLACES = (("mnist-cnn", "linf:0.3", 0), ("mnist-cnn-hardened", "linf:0.3", 0), ("cifar_resnet20", "linf:8/255", 0),
          ("mnist-cnn", "linf:0.3", 2))  # fmt: skip
"""Networks, threats, and processes beside the training that keep a core busy each."""
LEAST, MOST, TRAINED = 0.8, 1.1, 10_000


def measured() -> Outcome:
    table: list[Cells] = []
    claims: list[Claim] = []
    detail: Cells = {}
    for name, threat, busy in PLACES:
        net, place = network(name), f"{name}, {busy} beside"
        module = net.module.requires_grad_()
        test, known = _images(net.data, "test", N), _images(net.data, "train", TRAINED)
        with _loaded(busy):
            found = made(
                ROW, place, module, test, threat, RECIPE, BUDGET, suite=SUITE, n=N, fit=known, doubts=False
            )
        card, detail[place] = found["measured"], found
        used = card["cost"]["budget_used"]
        table.append({"network": name, "busy processes": busy, "recipe": card["recipe"], "epochs": card["epochs"],
                      "first plan, epochs": card["plan"]["attempts"][0]["epochs"], "plans": card["cost"]["plans"],
                      "used, %": 100 * used, "ended by": card["ended_by"], **shares(card)})  # fmt: skip
        claims += [
            Claim(f"{place}: share of the budget that is used >= {LEAST:g}", used, LEAST, least=True),
            Claim(f"{place}: share of the budget that is used <= {MOST:g}", used, MOST),
        ]
    config: Cells = {"budget": BUDGET, "recipe": RECIPE, "trained on": TRAINED, "n": N, "suite": SUITE}
    return Outcome(table, claims, config, detail)


def _images(data: str, split: str, n: int) -> Examples:
    return images(data, n, split)


@contextmanager
def _loaded(busy: int) -> Iterator[None]:
    """Within it so many processes compute without end."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()
