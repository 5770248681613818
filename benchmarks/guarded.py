"""The default guard, calibrated on a network, and its state with the queries of earlier clients."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from torch import Tensor

from benchmarks.networks import ROOT, images
from benchmarks.retrying import collage
from holdfast.verbs.opening.guard import open_guard

CALIBRATION, SEED = 5000, 1
"""test images for the calibration"""
GUARD = """\
schema_version: 1
mode: enforce
inputs: {{shape: {shape}}}
rules: {{schema: {{}}, queries: {{}}, energy: {{}}}}
"""


def holdfast(*words: str) -> list[str]:
    """A command of Holdfast."""
    return [sys.executable, "-m", "holdfast", *words]


def environment() -> dict[str, str]:
    """The environment of a command of Holdfast, with one thread and this repository."""
    paths = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(filter(None, paths))
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": path}


def done(command: Sequence[str], folder: Path) -> str:
    """Run a command in a folder, and return its output. Raises `RuntimeError` with its messages if it fails."""
    ended = subprocess.run(
        command, check=False, cwd=folder, env=environment(), capture_output=True, text=True
    )
    if ended.returncode:
        raise RuntimeError(ended.stderr)
    return ended.stdout


@contextmanager
def serving(folder: Path, *words: str) -> Iterator[tuple[int, str]]:
    """Context manager that runs `holdfast serve` in a folder, and returns its port and the URL of the operator's port.
    Its messages are in `serve.log`.
    """
    log = folder / "serve.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            holdfast("serve", *words, "--port", "0", "--admin-port", "0"),
            cwd=folder, env=environment(), stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        while (found := re.search(r"metrics: (http://\S+)/metrics", log.read_text())) is None:
            if process.poll() is not None:
                raise RuntimeError(log.read_text())
            time.sleep(0.1)
        served = re.search(r"serving http://[^/]*:(\d+)/", log.read_text())
        assert served is not None
        yield int(served[1]), found[1]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def calibrate(folder: Path, name: str, data: str = "cifar10") -> None:
    """Write net.py with a network, guard.yaml and its calibration into a folder."""
    code = f"from benchmarks.networks import network\n\n\ndef make():\n    return network({name!r}).module\n"
    (folder / "net.py").write_text(code)
    x, y = images(data, CALIBRATION)
    (folder / "guard.yaml").write_text(GUARD.format(shape=list(x.shape[1:])))
    np.savez(folder / "benign.npz", x=x.numpy(), y=y.numpy())
    words = holdfast("calibrate", "net.py:make", "benign.npz", "--guard", "guard.yaml")
    subprocess.run(words, cwd=folder, env=environment(), check=True, capture_output=True)
    (folder / "benign.npz").unlink()


def fill(folder: Path, x: Tensor, n: int) -> None:
    """Let the query detector of the guard in a folder see `n` different inputs of a hundred clients."""
    queries, rng = open_guard(folder / "guard.yaml").queries, np.random.default_rng(SEED)
    assert queries is not None
    for k in range(0, n, 250):
        queries.score(collage(x, rng, 250), [f"earlier client {k // 250 % 100}"] * 250)
