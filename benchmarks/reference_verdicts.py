"""Make the reference's verdicts: AutoAttack `standard` per example, once, small enough to commit.

    python -m benchmarks.reference_verdicts --peers FOLDER [--only cifar_cnn_a_adv] [--again]

Each file of `benchmarks/references/verdicts/` holds one network, one constraint, one seed: the survivors
after each stage (`clean`, `apgd-ce`, `apgd-t`, `fab-t`, `square`) and one character per example that names
the stage that broke it (`0` wrong when clean, `1`-`4` the stage, `.` robust), for the first n test images.
A file that exists is kept unless `--again` is given.
"""

import argparse
import json
import platform
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.absent import Absent
from benchmarks.meter import Counted
from benchmarks.networks import Network, images, network

FOLDER = Path(__file__).parent / "references" / "verdicts"
STAGES = ("apgd-ce", "apgd-t", "fab-t", "square")


@dataclass(frozen=True)
class Case:
    """One network under one constraint, on the first `n` test images."""

    network: str
    norm: str
    eps: float
    n: int
    seed: int

    @property
    def path(self) -> Path:
        """Where the verdicts of this case are kept."""
        return FOLDER / f"{self.network}-{self.norm.lower()}-{self.eps:.4g}-n{self.n}-seed{self.seed}.json"


def _seeds(name: str, norm: str, eps: float, n: int, seeds: int) -> list[Case]:
    return [Case(name, norm, eps, n, seed) for seed in range(seeds)]


CASES = [
    *_seeds("cifar_cnn_a_adv", "Linf", 2 / 255, 200, 6),
    *_seeds("mnist_cnn_a_adv", "Linf", 0.3, 200, 6),
    *_seeds("single_step", "Linf", 0.3, 200, 6),
    *_seeds("hardened-by-hand", "Linf", 0.2, 200, 6),
    *_seeds("mnist_cnn_a_adv", "L2", 2.0, 100, 6),
    *_seeds("mnist_cnn_a_adv", "L1", 10.0, 100, 6),
    *_seeds("mnist_trades_smallcnn", "Linf", 0.3, 1000, 1),  # the reference takes more than an hour
]


def verdicts(case: Case, net: Network) -> dict[str, object]:
    """Run the reference stage by stage (same seed, same order, survivors only) and name each example's breaker."""
    autoattack = peers.peer("autoattack")
    x, y = images(net.data, case.n)
    counted = Counted(net.module)
    attack = autoattack.AutoAttack(
        counted, norm=case.norm, eps=case.eps, seed=case.seed, version="standard", device="cpu", verbose=False
    )
    with torch.no_grad():
        surviving = net.module(x).argmax(1) == y
    code, survivors, spent = ["." if s else "0" for s in surviving.tolist()], [int(surviving.sum())], []
    for number, stage in enumerate(STAGES, start=1):
        attack.attacks_to_run, start = [stage], time.process_time()
        at = surviving.nonzero().squeeze(1)
        if len(at):
            x_adv = attack.run_standard_evaluation(x[at], y[at], bs=250)
            with torch.no_grad():
                held = net.module(x_adv).argmax(1) == y[at]
            for row in at[~held].tolist():
                code[row] = str(number)
            surviving[at] = held
        survivors.append(int(surviving.sum()))
        spent.append(round(time.process_time() - start, 2))
    return {
        **asdict(case),
        "sha256": net.sha256,
        "verdicts": "".join(code),
        "stages": ["clean", *STAGES],
        "survivors": survivors,
        "stage_cpu_s": spent,
        "cpu_s": round(sum(spent), 2),
        "forwards": counted.forwards,
        "backwards": counted.backwards,
        "reference": {"fra31/auto-attack": peers.version("autoattack"), "version": "standard", "batch": 250},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "made": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", type=Path, help="folder of checkouts; see benchmarks/peers.py")
    parser.add_argument("--only", help="a network's name")
    parser.add_argument("--again", action="store_true", help="make files that exist anew")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    peers.use(chosen.peers)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        if (chosen.only and case.network != chosen.only) or (case.path.exists() and not chosen.again):
            continue
        try:
            found = verdicts(case, network(case.network))
        except Absent as why:
            print(f"skipped {case.path.name}: {why}", flush=True)
            continue
        case.path.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{case.path.name}: {found['survivors']} in {found['cpu_s']} CPU s", flush=True)


if __name__ == "__main__":
    main()
