"""`fast` on all 10,000 test images of the MNIST network of TRADES (Zhang et al. 2019), Linf 0.3."""

from benchmarks import ours
from benchmarks.networks import images, network
from benchmarks.parts import part
from benchmarks.record import Claim, Outcome

WHAT = "`fast` on the 10,000 images of the public challenge of TRADES: robust accuracy, cost"
NETWORK, EPS, N, SEEDS = "mnist_trades_smallcnn", 0.3, 10_000, (0,)
AUTOATTACK = 92.81
"""Robust accuracy that its authors publish for AutoAttack; the best known attack gives 92.58."""


def measured() -> Outcome:
    table, detail = [], {}
    net = network(NETWORK)
    x, y = images(net.data, N)

    def one(seed: int) -> dict[str, object]:
        found = ours.by_suite(net.module, x, y, "fast", "Linf", EPS, seed=seed)
        stands = (found["correct"] & ~found["success"]).tolist()
        attacks = [
            {
                "attack": a.name,
                "surviving after": a.surviving_after,
                "CPU s": a.cost.cpu_s,
                "notes": list(a.notes),
            }
            for a in found.attacks
        ]
        return {"stands": "".join(".x"[not s] for s in stands), "attacks": attacks}

    for seed in SEEDS:
        kept = part("trades", f"seed {seed}", lambda seed=seed: one(seed))
        attacks, stands = kept["measured"]["attacks"], kept["measured"]["stands"]
        table.append(
            {
                "seed": seed,
                "robust accuracy, %": 100 * stands.count(".") / N,
                "CPU s": sum(attack["CPU s"] for attack in attacks),
            }
        )
        detail[f"seed {seed}"] = kept
    worst = max(row["robust accuracy, %"] for row in table)
    claims = [Claim(f"robust accuracy under fast, % <= {AUTOATTACK}", worst, AUTOATTACK)]
    config = {"network": NETWORK, "sha256": net.sha256, "eps": EPS, "n": N, "seeds": SEEDS}
    return Outcome(table, claims, config, detail)
