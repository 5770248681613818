"""Attacks that see scores alone, each at an exact number of queries."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.comparisons.comparison import UNDEFENDED, Comparison, Reference
from benchmarks.peers import peer
from holdfast.attacks import SimBA, SparseRS


def sparse_rs(queries: int, alpha_init: float) -> Reference:
    """Sparse-RS of its authors, on values: a picture's channels are laid side by side, as their `eval.py` does."""

    def run(model: nn.Module, x: Tensor, y: Tensor, case: Comparison) -> Tensor:
        attack = peer("rs_attacks").RSAttack(
            lambda wide: model(wide.reshape(-1, *x.shape[1:])), norm="L0", eps=int(case.eps or 0), n_queries=queries,
            p_init=alpha_init, seed=torch.initial_seed(), verbose=False, device="cpu",
        )  # fmt: skip
        _, found = attack.perturb(x.reshape(len(x), 1, x.shape[2], -1), y)
        out: Tensor = found.reshape(x.shape)
        return out

    return run


def art(name: str, *, probabilities: bool, **settings: Any) -> Reference:
    """An attack of ART, which takes one image after the other."""

    def run(model: nn.Module, x: Tensor, y: Tensor, case: Comparison) -> Tensor:
        np.random.seed(torch.initial_seed())  # noqa: NPY002 - the peer draws from the global state
        asked = nn.Sequential(model, nn.Softmax(1)) if probabilities else model
        classifier = peer("art.estimators.classification").PyTorchClassifier(
            asked.eval(), nn.CrossEntropyLoss(), x.shape[1:], 10, clip_values=(0.0, 1.0), device_type="cpu"
        )
        attack = getattr(peer("art.attacks.evasion"), name)(classifier, verbose=False, **settings)
        return torch.from_numpy(attack.generate(x.numpy(), np.eye(10)[y.numpy()])).to(x.dtype)

    return run


COMPARISONS = [
    *(
        Comparison(
            f"sparse-rs{suffix}", "L0", 10, {"queries": 1000, "alpha_init": 0.3},
            {"holdfast": SparseRS(queries=1000)}, {"Sparse-RS": sparse_rs(1000, 0.3)},
            network=name, n=200, seeds=(0, 1, 2),
        )
        for suffix, name in (("", UNDEFENDED), ("-cifar", "cifar_cnn_a_adv"))
    ),
    *(
        Comparison(
            f"simba-{basis}", "L2", 2.0, {"queries": 1000}, {"holdfast": SimBA(queries=1000, basis=basis)},
            {f"ART, steps of {size}": art("SimBA", probabilities=True, attack=kind, max_iter=500, epsilon=size, **more)
             for size in (0.2, 0.4)},
            network=UNDEFENDED, n=50, note="two queries a step; a sum of steps beyond eps is no success",
        )
        for basis, kind, more in (("pixels", "px", {}), ("cosines", "dct", {"freq_dim": 14, "stride": 7}))
    ),
]  # fmt: skip
