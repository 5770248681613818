"""CPU time of whole commands in new processes, and that until an assessment shows its first bound: it has one thread
until then, so that an idle machine takes as long.

All modules are compiled before, as in an installed package.
"""

import os
import resource
import subprocess
import sys
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks.record import Cells, Claim, Outcome

WHAT = "short commands on the bundled network: CPU seconds of the process, and the first bound of the robust accuracy"
ROUNDS = 5
COMMANDS = {
    "assess, n = 20": (["assess", "mnist-cnn", "mnist-mini", "-t", "linf:0.1", "-n", "20"], 4.0),
    "demo, n = 100": (["demo"], 20.0),
}
"""Arguments of the commands, and the most CPU seconds that each may take."""
WITHIN_S = 2.0
_SCRIPT = """
import sys, time
sys.path[:0] = {path!r}
from holdfast.verbs.settings import Assess
class Shown(Exception):
    pass
def progress(step):
    if step.seen == step.n:
        print(time.process_time() - start)
        raise Shown
settings = Assess(model="mnist-cnn", data="mnist-mini", threat="linf:0.1", n=1000)
settings.open()
start = time.process_time()
try:
    settings.run(progress=progress, notify=lambda message: None)
except Shown:
    pass
"""


def measured() -> Outcome:
    detail: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with TemporaryDirectory() as compiled:
        for turn in range(1 + ROUNDS):
            for name, (arguments, _) in COMMANDS.items():
                spent = _cpu_s(arguments, compiled)
                if turn:  # the first turn compiles
                    detail[name].append(spent)
        shown = [_until_shown(compiled) for _ in range(ROUNDS)]
    detail["first bound"] = shown
    table: list[Cells] = [
        {
            "command": name,
            "CPU s": median(detail[name]),
            "least": min(detail[name]),
            "most": max(detail[name]),
        }
        for name in COMMANDS
    ]
    claims = [
        Claim(f"holdfast {name}, CPU s <= {most:g}", median(detail[name]), most)
        for name, (_, most) in COMMANDS.items()
    ]
    claims.append(
        Claim(
            f"assess, n = 1,000: CPU s from the opening to the first bound <= {WITHIN_S:g}",
            median(shown),
            WITHIN_S,
        )
    )
    return Outcome(table, claims, {"rounds": ROUNDS}, dict(detail))


def _environment(compiled: str) -> dict[str, str]:
    """The environment of a user, who limits no threads; what Python compiles is kept under `compiled`."""
    own = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONDONTWRITEBYTECODE")
    environment = {name: value for name, value in os.environ.items() if name not in own}
    return {**environment, "PYTHONPYCACHEPREFIX": compiled}


def _cpu_s(arguments: list[str], compiled: str) -> float:
    """CPU seconds of the process of a command, of both kinds, in an empty folder."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "holdfast", *arguments],
            cwd=folder, env=_environment(compiled), capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _until_shown(compiled: str) -> float:
    """CPU seconds until the first bound, of a process in which torch is imported and the files were opened before."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _SCRIPT.format(path=sys.path[:4])],
        env=_environment(compiled), stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout.split()[-1])
