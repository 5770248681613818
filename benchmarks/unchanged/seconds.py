"""A process that measures the CPU time of what it reads, one name a line, with the Holdfast on its import path."""

import http.client
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HOLDFAST_GUARD_KEY="5a" * 32)

import torch

from benchmarks import networks
from benchmarks.unchanged.results import folder_with_files, images, printed, served

N = 100
NETWORKS: Mapping[str, str] = {"mnist_cnn_a_adv": "linf:0.3", "cifar_cnn_a_adv": "linf:8/255"}
SUITES: Mapping[str, tuple[str, ...]] = {"PGD-40": ("pgd",), "standard": ("standard",), "fast": ("fast",)}
UPDATE = "one epoch of PGD training"
CROWN = "CROWN, mnist_cnn_a_adv"
REQUESTS = "1,000 requests to a guarded server"


def contestants() -> Mapping[str, Callable[[], float]]:
    """Functions that return the CPU time in seconds of what is timed, by name."""
    return {
        **{
            f"{what}, {network}": partial(_in_this_process, partial(_run, what, network))
            for network in NETWORKS
            for what in (*SUITES, UPDATE)
        },
        CROWN: partial(_in_this_process, _certified),
        REQUESTS: _requests,
    }


def _in_this_process(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def _run(what: str, network: str) -> None:
    import holdfast
    from holdfast import Batch, Classifier, Draws, ThreatModel
    from holdfast.recipes import PGDTraining
    from holdfast.recipes.training.fit import Training

    found = networks.network(network)
    x, y = networks.images(found.data, N)
    threat = NETWORKS[network]
    if what in SUITES:
        holdfast.assess(found.module, (x, y), threat, suite=SUITES[what], seed=0, device="cpu", doubts=False)
        return
    eps = float(threat.partition(":")[2].partition("/")[0]) / (255 if "/" in threat else 1)
    trained = PGDTraining(training=Training(epochs=1))
    examples = Batch(x, y, torch.arange(N))
    list(trained(Classifier(found.module), examples, ThreatModel(holdfast.Linf(eps)), rng=Draws(0)))


def _certified() -> None:
    """Bounds by CROWN of images that a weak attack does not break."""
    import holdfast

    found = networks.network("mnist_cnn_a_adv")
    x, y = networks.images(found.data, 8)
    holdfast.certify(found.module, (x, y), "linf:0.1", "crown", timeout="1h", seed=0, device="cpu")


def _requests(n: int = 1_000) -> float:
    """CPU time of the processes of a server while it answers requests of one image each."""
    x = images(n)
    with folder_with_files():
        printed("calibrate mnist-cnn mnist-mini --guard guard.yaml -n 300 --false-positives 0.05 --seed 0")
        with served("--audit", "audit") as server:
            connection = http.client.HTTPConnection(server.host, timeout=60)
            for image in x[:20]:
                server.post(connection, image[None])
            start = _used(server.process.pid)
            for image in x:
                status, _ = server.post(connection, image[None])
                assert status == 200
            return _used(server.process.pid) - start


def _used(process: int) -> float:
    """CPU time of a process and of those that it started and that run, in seconds."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if process in (int(stat.parent.name), int(fields[1])):
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    known = contestants()
    for line in sys.stdin:
        print(known[line.strip()](), flush=True)
