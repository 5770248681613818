"""How each peer is run: a callable of (counted network, x, y, comparison) that returns perturbed inputs."""

import sys
import types
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.comparisons.comparison import Comparison, Reference
from benchmarks.peers import peer


def foolbox(attack: str, **settings: Any) -> Reference:
    def run(model: nn.Module, x: Tensor, y: Tensor, case: Comparison) -> Tensor:
        fb = peer("foolbox")
        wrapped = fb.PyTorchModel(model, bounds=(0, 1), device="cpu")
        found = getattr(fb.attacks, attack)(**settings)(
            wrapped, x, fb.criteria.Misclassification(y), epsilons=case.eps
        )
        out: Tensor = found[1]
        return out

    return run


def torchattacks(attack: str, **settings: Any) -> Reference:
    def run(model: nn.Module, x: Tensor, y: Tensor, case: Comparison) -> Tensor:
        out: Tensor = getattr(peer("torchattacks"), attack)(model, eps=case.eps, **settings)(x, y)
        return out

    return run


def cleverhans(module: str, **settings: Any) -> Reference:
    def run(model: nn.Module, x: Tensor, y: Tensor, case: Comparison) -> Tensor:
        attack = getattr(peer(f"cleverhans.torch.attacks.{module}"), module)
        bounded = {} if case.eps is None else {"eps": case.eps}
        out: Tensor = attack(model, x, y=y, clip_min=0.0, clip_max=1.0, **bounded, **settings)
        return out

    return run


def advlib(attack: str, **settings: Any) -> Reference:
    def run(model: nn.Module, x: Tensor, y: Tensor, case: Comparison) -> Tensor:
        out: Tensor = getattr(peer("adv_lib.attacks"), attack)(model, x, y, **settings)
        return out

    return run


def advertorch(attack: str, **settings: Any) -> Reference:
    def run(model: nn.Module, x: Tensor, y: Tensor, case: Comparison) -> Tensor:
        out: Tensor = getattr(peer("advertorch.attacks"), attack)(model, eps=case.eps, **settings).perturb(
            x, y
        )
        return out

    return run


def art(attack: str, **settings: Any) -> Reference:
    """One evasion attack of ART, without a target."""

    def run(model: nn.Module, x: Tensor, y: Tensor, case: Comparison) -> Tensor:
        estimators, evasion = peer("art.estimators.classification"), peer("art.attacks.evasion")
        loss = torch.nn.CrossEntropyLoss()
        wrapped = estimators.PyTorchClassifier(
            model, loss, tuple(x.shape[1:]), 10, clip_values=(0.0, 1.0), device_type="cpu"
        )
        return torch.from_numpy(getattr(evasion, attack)(wrapped, **settings).generate(x.numpy()))

    return run


def autoattack(part: str, **settings: Any) -> Reference:
    """One attack of the reference AutoAttack; `part` is `module.Class`."""

    def run(model: nn.Module, x: Tensor, y: Tensor, case: Comparison) -> Tensor:
        module, _, name = part.partition(".")
        seed = torch.initial_seed()
        build = getattr(peer(f"autoattack.{module}"), name)
        attack = build(
            model, eps=case.eps, norm=case.norm, seed=seed, device="cpu", verbose=False, **settings
        )
        out: Tensor = attack.perturb(x, y)
        return out

    return run


def sparse(steps: int, step_size: float) -> Reference:
    """PGD-L0 of Croce & Hein 2019 from its authors' repository.

    Its `utils_pt` imports torchvision and moves every batch to CUDA; a stand-in asks the network on this device.
    """

    def run(model: nn.Module, x: Tensor, y: Tensor, case: Comparison) -> Tensor:
        asks = types.ModuleType("utils_pt")
        asks.__dict__.update(
            get_predictions=_predictions, get_predictions_and_gradients=_predictions_and_gradients
        )
        sys.modules["utils_pt"] = asks
        pgd = peer("pgd_attacks_pt")
        np.random.seed(torch.initial_seed())  # noqa: NPY002 - the peer draws from the global state
        settings = {
            "type_attack": "L0", "num_steps": steps + 1, "step_size": step_size, "n_restarts": 1,
            "epsilon": -1, "kappa": -1, "sparsity": int(case.eps or 0),
        }  # fmt: skip
        adv, _ = pgd.PGDattack(model, settings).perturb(x.permute(0, 2, 3, 1).numpy(), y.numpy())
        return torch.from_numpy(adv).permute(0, 3, 1, 2).float()

    return run


def rays(queries: int) -> Reference:
    def run(model: nn.Module, x: Tensor, y: Tensor, case: Comparison) -> Tensor:
        def labels(some: Tensor) -> Tensor:
            with torch.no_grad():
                found: Tensor = model(some).argmax(1)
            return found

        attack = peer("RayS").RayS(types.SimpleNamespace(predict_label=labels), epsilon=0.0)
        with mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor):  # it knows no other device
            attack.attack_hard_label(x, y, query_limit=queries)
        out: Tensor = attack.x_final
        return out

    return run


def _predictions(model: nn.Module, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        logits = model(torch.from_numpy(x).permute(0, 3, 1, 2).float())
    return (logits.argmax(1) == torch.from_numpy(y)).numpy()


def _predictions_and_gradients(
    model: nn.Module, x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    at = torch.from_numpy(x).permute(0, 3, 1, 2).float().requires_grad_()
    label = torch.from_numpy(y)
    with torch.enable_grad():
        logits = model(at)
        (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, label), at)
    return (logits.argmax(1) == label).numpy(), gradient.permute(0, 2, 3, 1).numpy()
