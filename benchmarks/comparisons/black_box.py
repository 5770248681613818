"""Attacks that see scores or labels alone."""

from functools import partial

import numpy as np

from benchmarks.comparisons.asking import art
from benchmarks.comparisons.comparison import UNDEFENDED, Comparison
from benchmarks.comparisons.running import autoattack, rays
from holdfast.attacks import GeoDA, RayS, Square

square = partial(autoattack, "square.SquareAttack", n_queries=1000, p_init=0.8, resc_schedule=True)

COMPARISONS = [
    *(
        Comparison(
            f"square-{norm.lower()}", norm, eps, {"queries": 1000}, {"holdfast": Square(queries=1000)},
            {"AutoAttack": square()}, seeds=(0, 1, 2), network=UNDEFENDED, n=100,
        )
        for norm, eps in (("Linf", 0.15), ("L2", 2.0), ("L1", 15.0))
    ),
    *(
        Comparison(
            f"rays-{queries}", "Linf", None, {"queries": queries}, {"holdfast": RayS(queries=queries)},
            {"RayS": rays(queries)}, network=UNDEFENDED, n=100,
        )
        for queries in (300, 1000, 3000)
    ),
    Comparison(
        "geoda-linf", "Linf", None, {"queries": 1000}, {"holdfast": GeoDA(queries=1000)},
        {"ART": art("GeoDA", norm=np.inf, max_iter=1000, sub_dim=14)}, network=UNDEFENDED, n=100,
    ),
]  # fmt: skip
