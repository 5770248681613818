"""What importing the attacks costs after torch, beside the peers, each in a fresh interpreter.

Every contestant is imported once before, so that all of them are compiled, as an installed package is.
"""

import os
import subprocess
import sys
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks.absent import Absent
from benchmarks.record import Cells, Claim, Outcome

WHAT = "import of the attacks: CPU milliseconds after torch"
ROUNDS = 7
MODULES = {
    "holdfast.attacks": "holdfast.attacks",
    "foolbox": "foolbox.attacks",
    "torchattacks": "torchattacks",
    "art": "art.attacks.evasion",
    "cleverhans": "cleverhans.torch.attacks.projected_gradient_descent",
    "autoattack": "autoattack",
}
_SCRIPT = """
import sys, time
sys.path[:0] = {path!r}
import torch
start = time.process_time()
import {module}
print(1000 * (time.process_time() - start))
"""


def measured() -> Outcome:
    detail: dict[str, list[float]] = {}
    notes: list[str] = []
    with TemporaryDirectory() as compiled:
        for name in MODULES:
            try:
                _imported(name, compiled)
            except Absent as why:
                notes.append(str(why))
            else:
                detail[name] = []
        for _ in range(ROUNDS):
            for name, spent in detail.items():
                spent.append(_imported(name, compiled))
    table: list[Cells] = [
        {"module": name, "CPU ms": median(spent), "least": min(spent), "most": max(spent)}
        for name, spent in detail.items()
    ]
    claims = [
        Claim("import holdfast.attacks after torch, CPU ms <= 50", median(detail["holdfast.attacks"]), 50.0)
    ]
    return Outcome(table, claims, {"rounds": ROUNDS}, detail, notes)


def _imported(name: str, compiled: str) -> float:
    """CPU milliseconds of one import; what Python compiles on the way is kept under `compiled`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPYCACHEPREFIX": compiled}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _SCRIPT.format(path=sys.path[:4], module=MODULES[name])],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    if done.returncode:
        raise Absent(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout.split()[-1])
