"""How the peers' attacks on labels alone are run: callables of (counted network, x, y, comparison) that return inputs.

What stops a peer that is no part of its algorithm is put out of its way: ART is given a network that takes its
float64 inputs and, where it asks for `numpy.mat`, the name that numpy 2 has for it; Foolbox is given the starts
that its own default looks for, and images without one are returned as they were; the code of SurFree's authors,
which lets no budget end an image, is stopped by the network, and what it holds then is taken.
"""

import contextlib
import io
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.comparisons.comparison import Comparison, Reference
from benchmarks.peers import peer

_BASIS = {"basis_type": "dct", "dct_type": "full", "function": "constant", "frequence_range": [0, 0.5]}
_ORDERS: dict[str, Any] = {"L2": 2, "Linf": np.inf}


def foolbox(attack: str, **settings: Any) -> Reference:
    """A decision attack of Foolbox; HopSkipJump one image at a time, for its normals share one length over a batch."""

    def run(model: nn.Module, x: Tensor, y: Tensor, case: Comparison) -> Tensor:
        fb = peer("foolbox")
        wrapped = fb.PyTorchModel(model, bounds=(0, 1), device="cpu")
        blended = fb.attacks.LinearSearchBlendedUniformNoiseAttack(directions=50, steps=50)
        single = attack == "HopSkipJumpAttack"
        chosen = {"constraint": case.norm.lower()} if single else {}
        out = x.clone()
        for part in torch.arange(len(x)).split(1 if single else len(x)):
            starts = blended.run(wrapped, x[part], fb.criteria.Misclassification(y[part]))
            with torch.no_grad():
                broken = model(starts).argmax(1) != y[part]
            found, starts = part[broken], starts[broken]
            if len(found):
                out[found] = getattr(fb.attacks, attack)(**chosen, **settings).run(
                    wrapped, x[found], fb.criteria.Misclassification(y[found]), starting_points=starts
                )
        return out

    return run


def cleverhans(**settings: Any) -> Reference:
    """HopSkipJump of CleverHans, which asks for one image after the other."""

    def run(model: nn.Module, x: Tensor, y: Tensor, case: Comparison) -> Tensor:
        attack = peer("cleverhans.torch.attacks.hop_skip_jump_attack").hop_skip_jump_attack
        order = _ORDERS[case.norm]
        with torch.no_grad():
            out: Tensor = attack(model, x, norm=order, constraint=order, verbose=False, **settings)
        return out

    return run


def art(attack: str, **settings: Any) -> Reference:
    """A decision attack of ART, which asks for one image after the other."""

    def run(model: nn.Module, x: Tensor, y: Tensor, case: Comparison) -> Tensor:
        evasion, classification = peer("art.attacks.evasion"), peer("art.estimators.classification")
        np.random.seed(torch.initial_seed())  # noqa: NPY002 - the peer draws from the global state
        classifier = classification.PyTorchClassifier(
            _Single(model), loss=nn.CrossEntropyLoss(), input_shape=tuple(x.shape[1:]), nb_classes=10,
            clip_values=(0.0, 1.0), device_type="cpu",
        )  # fmt: skip
        with mock.patch.object(np, "mat", np.asmatrix, create=True):
            found = getattr(evasion, attack)(classifier, verbose=False, **settings).generate(
                x.numpy(), y.numpy()
            )
        return torch.from_numpy(found).float()

    return run


def surfree(queries: int, **settings: Any) -> Reference:
    """SurFree from its authors' repository, with the cosine basis of the paper; one image at a time."""

    def run(model: nn.Module, x: Tensor, y: Tensor, case: Comparison) -> Tensor:
        attack = peer("surfree").SurFree
        out = x.clone()
        for k in range(len(x)):
            one = attack(steps=queries, max_queries=10 * queries, quantification=False, **settings)
            with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(_SpentError):
                one(_Stopping(model, queries), x[k : k + 1], y[k : k + 1], basis_params=_BASIS)
            if one.best_advs is not None:
                out[k] = one.best_advs[0]
        return out

    return run


class _SpentError(Exception):
    """The budget of an image is spent."""


class _Stopping:
    """A network that answers for one image so many times."""

    def __init__(self, inner: nn.Module, queries: int) -> None:
        self._inner, self._left = inner, queries

    def __call__(self, x: Tensor) -> Tensor:
        self._left -= len(x)
        if self._left < 0:
            raise _SpentError
        out: Tensor = self._inner(x)
        return out


class _Single(nn.Module):
    """A network that takes inputs of any float type."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x.float())
        return out
