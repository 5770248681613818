"""Policies of the cart-pole that `robust-policy` trains, and PPO beside it, under the strongest of all attackers."""

from functools import partial

import torch

from benchmarks.parts import part
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.rows.control import EPISODES, returns
from holdfast.control.attackers import Ball
from holdfast.control.environments import CartPole
from holdfast.control.hardening import Hardening, Method, hardened
from holdfast.core.draws import Draws

WHAT = "policies by each method of robust-policy: mean return under the strongest attacker, three seeds"
SEEDS, SCALE = (0, 1, 2), (1.0, 1.0, 0.1, 0.5)
METHODS: tuple[Method, ...] = ("search", "ppo", "smooth", "alternating")
BEST_LINEAR = 116
"""mean return at eps 0.1 of the best linear policy that others found"""


def one(method: Method, eps: float, seed: int) -> Cells:
    """The mean return of a trained policy under each attacker."""
    ball = Ball("linf", eps, torch.ones(4))
    steps = hardened(CartPole(), ball, Hardening(method=method), Draws(seed), scale=torch.tensor(SCALE))
    *_, (_, policy) = steps
    return returns(policy, eps)


def measured() -> Outcome:
    table: list[Cells] = []
    detail: Cells = {}
    lowest: dict[tuple[str, float], list[float]] = {}
    for eps, methods in ((0.05, METHODS), (0.1, METHODS[:1])):
        for method in methods:
            for seed in SEEDS:
                name = f"{method} eps {eps} seed {seed}"
                kept = detail[name] = part("control-hardened", name, partial(one, method, eps, seed))
                means = kept["measured"]
                worst = min(means, key=means.__getitem__)
                lowest.setdefault((method, eps), []).append(means[worst])
                cells = {"clean": means["none"], "lowest": means[worst], "attacker": worst}
                table.append({"method": method, "eps": eps, "seed": seed, **cells})
    small, large = (min(lowest["search", eps]) for eps in (0.05, 0.1))
    claims = [
        Claim("search at eps 0.05: lowest mean return of three seeds >= 450", small, 450, least=True),
        Claim(
            f"search at eps 0.1: lowest mean return of three seeds >= {BEST_LINEAR}",
            large,
            BEST_LINEAR,
            least=True,
        ),
    ]
    return Outcome(table, claims, {"episodes": EPISODES, "seeds": SEEDS, "scale": SCALE}, detail)
