"""Compare every attack with a reference implementation, once, and commit the numbers.

    python -m benchmarks.compare_attacks reference --peers FOLDER [--only NAME]
    python -m benchmarks.compare_attacks ours [--only NAME]

Both sides see the same images of the same network at the same settings; each run is judged here, by the bare
network on the returned inputs, never by the attack. Written to `benchmarks/references/attacks/`, a file each:
share of examples that end misclassified inside the constraint (those wrong when clean count), for a minimum norm the
median distance over all with inf kept, forwards and backwards per image, CPU seconds of one thread.
"""

import argparse
import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.absent import Absent
from benchmarks.comparisons import COMPARISONS, Comparison
from benchmarks.meter import Counted, cpu_seconds
from benchmarks.networks import images, network

FOLDER = Path(__file__).parent / "references" / "attacks"
ORDERS = {"Linf": float("inf"), "L2": 2, "L1": 1, "L0": 0}


def distances(x_adv: Tensor, x: Tensor, norm: str) -> Tensor:
    """Distance of each perturbed input, in double precision; L0 counts values that moved by more than 1e-6."""
    delta = (x_adv.double() - x.double()).flatten(1)
    if norm == "L0":
        return (delta.abs() > 1e-6).sum(1).double()
    return torch.linalg.vector_norm(delta, ORDERS[norm], dim=1)


def verdicts(
    module: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, case: Comparison
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Who is wrong when clean, who is wrong after, and whose returned input is inside the box and the ball."""
    with torch.no_grad():
        clean_wrong, wrong = module(x).argmax(1) != y, module(x_adv.float()).argmax(1) != y
    legal = ((x_adv >= -1e-6) & (x_adv <= 1 + 1e-6)).flatten(1).all(1) & ~x_adv.isnan().flatten(1).any(1)
    if case.eps is not None:
        legal &= distances(x_adv, x, case.norm) <= case.eps * (1 + 1e-5) + 1e-6
    return clean_wrong, wrong, legal


def judged(module: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, case: Comparison) -> dict[str, Any]:
    """What the bare network says of the returned inputs; inputs outside the box or the ball are no success."""
    clean_wrong, wrong, legal = verdicts(module, x, y, x_adv, case)
    away = distances(x_adv, x, case.norm)
    success = (wrong & legal) | clean_wrong
    least = torch.where(clean_wrong, 0.0, torch.where(success, away, torch.inf))
    row: dict[str, Any] = {"success": round(success.double().mean().item(), 4)}
    if case.eps is None:
        row["median_distance"] = round(least.quantile(0.5, interpolation="lower").item(), 5)
    illegal = int((~legal & ~clean_wrong).sum()) if case.eps is not None else int((~legal).sum())
    return row | ({"outside": illegal} if illegal else {})


def reference(case: Comparison, who: str, module: nn.Module, x: Tensor, y: Tensor) -> list[dict[str, Any]]:
    """One row per seed for one reference implementation."""
    rows = []
    for seed in case.seeds:
        torch.manual_seed(seed)
        counted, found = Counted(module), []
        spent = cpu_seconds(lambda c=counted, f=found: f.append(case.references[who](c, x.clone(), y, case)))  # type: ignore[misc]
        rows.append(
            {"seed": seed, **judged(module, x, y, found[0].detach(), case),
             "forwards": round(counted.forwards / len(x), 1), "backwards": round(counted.backwards / len(x), 1),
             "cpu_s": round(spent, 2)}
        )  # fmt: skip
    return rows


def setting(case: Comparison, sha256: str) -> dict[str, Any]:
    """What both sides share: network, images, constraint, settings."""
    shared = {"network": case.network, "sha256": sha256, "n": case.n, "norm": case.norm, "eps": case.eps}
    return {**shared, **case.settings, **({"note": case.note} if case.note else {})}


def _reference_side(case: Comparison) -> dict[str, Any]:
    net = network(case.network)
    x, y = images(net.data, case.n)
    found: dict[str, Any] = {}
    for who in case.references:
        try:
            found[who] = reference(case, who, net.module, x, y)
        except Absent as why:
            print(f"skipped {case.name} by {who}: {why}", flush=True)
            continue
        except Exception as error:  # noqa: BLE001 - a peer that raises is a result of its own
            found[who] = [{"raises": f"{type(error).__name__}: {error}"[:200]}]
        print(case.name, who, found[who][0], flush=True)
    return found


def _our_side(case: Comparison) -> dict[str, Any]:
    from benchmarks import ours

    net = network(case.network)
    x, y = images(net.data, case.n)
    sides: dict[str, Any] = {}
    for who, attack in case.ours.items():
        rows = []
        for seed in case.seeds:
            found = ours.assessed(net.module, x, y, [attack], case.norm, case.eps, seed=seed)
            broken = ~found["correct"] | found["success"]
            if case.eps is None:
                broken = ours.distance(found, case.norm).isfinite()
            row: dict[str, Any] = {"seed": seed, "success": round(broken.double().mean().item(), 4)}
            if case.eps is None:
                row["median_distance"] = round(ours.median_distance(found, case.norm), 5)
            spent = found.cost
            row |= {
                "forwards": round(spent.forwards / case.n, 1),
                "backwards": round(spent.backwards / case.n, 1),
                "cpu_s": round(spent.cpu_s, 2),
            }
            rows.append(row)
        sides[who] = rows
        print(case.name, who, rows[0], flush=True)
    return sides


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("side", choices=["reference", "ours"])
    parser.add_argument("--peers", type=Path, help="folder of checkouts; see benchmarks/peers.py")
    parser.add_argument("--only", help="comparisons whose name starts so")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    peers.use(chosen.peers)
    for case in COMPARISONS:
        if chosen.only and not case.name.startswith(chosen.only):
            continue
        try:
            found = _reference_side(case) if chosen.side == "reference" else _our_side(case)
            _keep(case, chosen.side, found)
        except Absent as why:
            print(f"skipped {case.name}: {why}", flush=True)


def _keep(case: Comparison, side: str, found: dict[str, Any]) -> None:
    """Put one side of one comparison into its file, which holds both."""
    file = FOLDER / f"{case.name}.json"
    whole: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    versions = {name: peers.version(name) for name in (*peers.DISTRIBUTIONS, *peers.CHECKOUTS)}
    made = {
        "command": f"python -m benchmarks.compare_attacks {side}" + " --peers FOLDER" * (side == "reference"),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": {"torch": torch.__version__, "python": platform.python_version()}
        | (versions if side == "reference" else {}),
        "threads": 1,
    }
    whole["setting"] = setting(case, network(case.network).sha256)
    whole[side] = {"made": made, "rows": found}
    file.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
