"""Attacks that see scores alone, each at an exact number of queries."""

import contextlib
import importlib.util
import io
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.absent import Absent
from benchmarks.comparisons.comparison import UNDEFENDED, Comparison, Reference
from benchmarks.comparisons.running import advertorch, cleverhans, torchattacks
from benchmarks.peers import peer
from holdfast.attacks import NES, SPSA, ZOO, Bandits, SimBA, SparseRS

PAIRS, STEPS = 25, 20
"""Two queries a pair make 1,000, for peers that do not count the looks between the steps."""


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


def bandits(queries: int, mode: str, **settings: Any) -> Reference:
    """Bandits of its authors, a script for three colour channels on CUDA: run from its text, with stand-ins.

    It goes on from an image that it has broken, so what first broke the network inside the constraint is kept for it.
    """

    def run(model: nn.Module, x: Tensor, y: Tensor, case: Comparison) -> Tensor:
        spec = importlib.util.find_spec("main")
        if spec is None or spec.origin is None:
            raise Absent("the authors' Bandits wants a checkout named blackbox-bandits under --peers")
        text = Path(spec.origin).read_text().replace('IMAGENET_PATH = ""', 'IMAGENET_PATH = "none"', 1)
        vision, script, kept = mock.MagicMock(), {"__name__": "bandits"}, _Kept(model, x, y, case)
        vision.transforms.functional.normalize = lambda image, mean, std: image
        names = {
            "torchvision": vision, "torchvision.datasets": vision.datasets, "torchvision.transforms": vision.transforms,
            "torchvision.transforms.functional": vision.transforms.functional,
        }  # fmt: skip
        with (
            mock.patch.dict(sys.modules, names),
            mock.patch.object(torch, "set_default_tensor_type"),
            mock.patch.object(Tensor, "cuda", lambda tensor: tensor),
            contextlib.redirect_stdout(io.StringIO()),
            torch.no_grad(),
        ):
            exec(compile(text, spec.origin, "exec"), script)
            asked: Any = script["make_adversarial_examples"]
            args = SimpleNamespace(
                mode=mode, max_queries=queries + 2, epsilon=case.eps, batch_size=len(x), gradient_iters=1, nes=False,
                tiling=True, log_progress=False, **settings,
            )  # fmt: skip
            asked(x.clone(), y, args, kept, x.shape[-1])
        return kept.found

    return run


class _Kept(nn.Module):
    """Asks a network, and keeps of each image the first input inside ball and box that it has wrong."""

    def __init__(self, inner: nn.Module, x: Tensor, y: Tensor, case: Comparison) -> None:
        super().__init__()
        self.inner, self.found = inner, x.clone()
        self._x, self._y, self._order, self._eps = (
            x,
            y,
            2 if case.norm == "L2" else torch.inf,
            case.eps or 0.0,
        )
        self._open = torch.ones_like(y, dtype=torch.bool)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x)
        size = torch.linalg.vector_norm((x - self._x).flatten(1), self._order, dim=1)
        inside = (size <= self._eps * (1 + 1e-6)) & (x >= 0).flatten(1).all(1) & (x <= 1).flatten(1).all(1)
        new = self._open & inside & (logits.argmax(1) != self._y)
        self.found[new], self._open = x[new], self._open & ~new
        return logits


spsa = partial(torchattacks, "SPSA", nb_iter=STEPS, nb_sample=PAIRS)
cleverhans_spsa = cleverhans("spsa", norm=np.inf, nb_iter=STEPS, spsa_samples=PAIRS, learning_rate=0.01)
zoo = partial(
    art, "ZooAttack", probabilities=True, max_iter=4, binary_search_steps=1, nb_parallel=125, use_resize=False,
    use_importance=False, initial_const=10.0,
)  # fmt: skip


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
            {"ART": art("SimBA", probabilities=True, attack=kind, max_iter=500, epsilon=0.2, **more)},
            network=UNDEFENDED, n=200, note="the paper's step, at two queries; beyond eps is no success",
        )
        for basis, kind, more in (("pixels", "px", {}), ("cosines", "dct", {"freq_dim": 14, "stride": 7}))
    ),
    *(
        Comparison(
            f"estimated-{suffix}", "Linf", eps, {"queries": 1000},
            {"SPSA": SPSA(queries=1000), "NES": NES(queries=1000)},
            {"torchattacks SPSA": spsa(lr=0.01), "torchattacks SPSA, steps of eps / 5": spsa(lr=eps / 5),
             "cleverhans SPSA": cleverhans_spsa},
            network=name, n=200, seeds=(0, 1, 2),
        )
        for suffix, name, eps in (("mnist", UNDEFENDED, 0.1), ("cifar", "cifar_cnn_a_adv", 4 / 255))
    ),
    Comparison(
        "nes", "Linf", 0.1, {"queries": 1000}, {"holdfast": NES(queries=1000)},
        {"advertorch": advertorch("NESAttack", nb_samples=PAIRS, nb_iter=STEPS, eps_iter=0.1 / 5)},
        network=UNDEFENDED, n=200, seeds=(0, 1, 2),
    ),
    *(
        Comparison(
            f"bandits-{norm.lower()}", norm, eps, {"queries": 1000}, {"holdfast": Bandits(queries=1000)},
            {"authors": bandits(1000, norm.lower(), tile_size=16, image_lr=eps * step, **more)},
            network="cifar_cnn_a_adv", n=200, seeds=(0, 1, 2),
            note="the authors' settings for ImageNet, their steps in proportion to eps",
        )
        for norm, eps, step, more in (
            ("Linf", 4 / 255, 0.2, {"fd_eta": 0.1, "online_lr": 100, "exploration": 1.0}),
            ("L2", 0.5, 0.1, {"fd_eta": 0.01, "online_lr": 0.1, "exploration": 0.01}),
        )
    ),
    Comparison(
        "zoo", "L2", 2.0, {"queries": 1000}, {"holdfast": ZOO(queries=1000, searches=1)},
        {f"ART, lr {lr}": zoo(learning_rate=lr) for lr in (0.01, 0.1)}, network=UNDEFENDED, n=50,
    ),
]  # fmt: skip
