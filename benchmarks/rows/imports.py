"""What importing the attacks costs after torch, beside the peers, each in a fresh interpreter."""

import os
import subprocess
import sys
from statistics import median

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
    table: list[Cells] = []
    detail: dict[str, list[float]] = {name: [] for name in MODULES}
    notes: list[str] = []
    for _ in range(ROUNDS):
        for name, module in MODULES.items():
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", _SCRIPT.format(path=sys.path[:4], module=module)],
                capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
            )  # fmt: skip
            if done.returncode == 0:
                detail[name].append(float(done.stdout.split()[-1]))
            elif not detail[name]:
                reason = f"{name}: {done.stderr.strip().splitlines()[-1]}"
                notes += [reason] if reason not in notes else []
    for name, spent in detail.items():
        if spent:
            table.append({"module": name, "CPU ms": median(spent), "least": min(spent), "most": max(spent)})
    claims = [
        Claim("import holdfast.attacks after torch, CPU ms <= 50", median(detail["holdfast.attacks"]), 50.0)
    ]
    return Outcome(table, claims, {"rounds": ROUNDS}, detail, notes)
