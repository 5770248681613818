"""How the peers' attacks on labels alone are run: a callable of (counted network, x, y, comparison) each.

SurFree's authors keep their code under names that Foolbox and Python's own modules also have, so it is imported with
its folder in front and taken out of the way again.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.comparisons.comparison import Comparison, Reference
from benchmarks.peers import peer

Build = Callable[[Any], Any]


def art(attack: str, **settings: Any) -> Reference:
    """An attack of ART, which asks one image at a time."""

    def run(model: nn.Module, x: Tensor, y: Tensor, case: Comparison) -> Tensor:
        evasion, classifiers = peer("art.attacks.evasion"), peer("art.estimators.classification")
        np.random.seed(torch.initial_seed())  # noqa: NPY002 - the peer draws from the global state
        wrapped = classifiers.PyTorchClassifier(
            model, loss=nn.CrossEntropyLoss(), input_shape=tuple(x.shape[1:]), nb_classes=10, clip_values=(0.0, 1.0),
            device_type="cpu",
        )  # fmt: skip
        quiet = getattr(evasion, attack)(wrapped, verbose=False, **settings)
        return torch.from_numpy(quiet.generate(x.numpy(), y.numpy())).float()

    return run


def surfree(**settings: Any) -> Reference:
    """SurFree from its authors' repository, with the DCT basis of the paper."""

    def run(model: nn.Module, x: Tensor, y: Tensor, case: Comparison) -> Tensor:
        attack = peer("surfree").SurFree(quantification=False, **settings)
        basis = {"basis_type": "dct", "dct_type": "full", "function": "constant", "frequence_range": [0, 0.5]}
        with torch.no_grad(), _silence():
            out: Tensor = attack(model, x, y, basis_params=basis)
        return out

    return run
