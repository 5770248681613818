"""A process that measures the CPU time of what it reads, one name a line, with the Holdfast on its import path."""

import os
import sys
import time
from collections.abc import Callable, Mapping

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import torch

N = 100
NETWORKS: Mapping[str, str] = {"mnist_cnn_a_adv": "linf:0.3", "cifar_cnn_a_adv": "linf:8/255"}
SUITES: Mapping[str, tuple[str, ...]] = {"PGD-40": ("pgd",), "standard": ("standard",), "fast": ("fast",)}
UPDATE = "one epoch of PGD training"


def contestants() -> Mapping[str, Callable[[], object]]:
    """What is timed, by name."""
    return {
        f"{what}, {network}": (lambda what=what, network=network: _run(what, network))
        for network in NETWORKS
        for what in (*SUITES, UPDATE)
    }


def _run(what: str, network: str) -> None:
    import holdfast
    from benchmarks import networks
    from holdfast import Batch, Classifier
    from holdfast.core.draws import Draws
    from holdfast.core.threat import ThreatModel
    from holdfast.recipes import PGDTraining
    from holdfast.recipes.training.fit import Training
    from holdfast.recipes.training.recipe import trained_as

    found = networks.network(network)
    x, y = networks.images(found.data, N)
    threat = NETWORKS[network]
    if what in SUITES:
        holdfast.assess(found.module, (x, y), threat, suite=SUITES[what], seed=0, device="cpu", doubts=False)
        return
    eps = float(threat.partition(":")[2].partition("/")[0]) / (255 if "/" in threat else 1)
    trained = trained_as(PGDTraining(), Training(epochs=1))
    list(
        trained(
            Classifier(found.module),
            Batch(x, y, torch.arange(N)),
            ThreatModel(holdfast.Linf(eps)),
            rng=Draws(0),
        )
    )


if __name__ == "__main__":
    known = contestants()
    for line in sys.stdin:
        start = time.process_time()
        known[line.strip()]()
        print(time.process_time() - start, flush=True)
