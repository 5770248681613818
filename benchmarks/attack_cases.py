"""Every attack of the catalogue beside a reference implementation, at equal settings.

A `Comparison` names one setting (network, norm, eps or none for a minimum norm, steps) and the references that
have it, each a callable of (counted network, x, y, comparison) that returns perturbed inputs.
"""

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.peers import peer

Reference = Callable[[nn.Module, Tensor, Tensor, "Comparison"], Tensor]


@dataclass(frozen=True)
class Comparison:
    """One attack at one setting, and who else has it."""

    name: str
    norm: str
    eps: float | None
    settings: dict[str, float]
    references: dict[str, Reference]
    network: str = "mnist_cnn_a_adv"
    n: int = 200
    seeds: tuple[int, ...] = (0,)
    note: str = ""
    ours: dict[str, Any] = field(default_factory=dict)


def _foolbox(attack: str, **settings: Any) -> Reference:
    def run(model: nn.Module, x: Tensor, y: Tensor, case: Comparison) -> Tensor:
        fb = peer("foolbox")
        wrapped = fb.PyTorchModel(model, bounds=(0, 1), device="cpu")
        found = getattr(fb.attacks, attack)(**settings)(
            wrapped, x, fb.criteria.Misclassification(y), epsilons=case.eps
        )
        out: Tensor = found[1]
        return out

    return run


def _torchattacks(attack: str, **settings: Any) -> Reference:
    def run(model: nn.Module, x: Tensor, y: Tensor, case: Comparison) -> Tensor:
        out: Tensor = getattr(peer("torchattacks"), attack)(model, eps=case.eps, **settings)(x, y)
        return out

    return run


def _cleverhans(module: str, **settings: Any) -> Reference:
    def run(model: nn.Module, x: Tensor, y: Tensor, case: Comparison) -> Tensor:
        attack = getattr(peer(f"cleverhans.torch.attacks.{module}"), module)
        bounded = {} if case.eps is None else {"eps": case.eps}
        out: Tensor = attack(model, x, y=y, clip_min=0.0, clip_max=1.0, **bounded, **settings)
        return out

    return run


def _advlib(attack: str, **settings: Any) -> Reference:
    def run(model: nn.Module, x: Tensor, y: Tensor, case: Comparison) -> Tensor:
        out: Tensor = getattr(peer("adv_lib.attacks"), attack)(model, x, y, **settings)
        return out

    return run


def _autoattack(part: str, **settings: Any) -> Reference:
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


def _sparse(steps: int, step_size: float) -> Reference:
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


def _rays(queries: int) -> Reference:
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


PGD40 = {"steps": 40, "step_size": 0.01875}
LINF, L2, L1, L0 = float("inf"), 2, 1, 0
UNDEFENDED = "mnist_badnet"
apgd = partial(_autoattack, "autopgd_base.APGDAttack", n_iter=100)
square = partial(_autoattack, "square.SquareAttack", n_queries=1000, p_init=0.8, resc_schedule=True)
minimal = partial(Comparison, eps=None, network=UNDEFENDED, n=100)

COMPARISONS = [
    Comparison("fgsm", "Linf", 0.3, {}, {"torchattacks": _torchattacks("FGSM"), "foolbox": _foolbox("FGSM")}),
    Comparison(
        "bim", "Linf", 0.3, {"steps": 40, "step_size": 0.01},
        {"torchattacks": _torchattacks("BIM", alpha=0.01, steps=40),
         "foolbox": _foolbox("LinfBasicIterativeAttack", abs_stepsize=0.01, steps=40)},
    ),
    Comparison(
        "pgd-linf", "Linf", 0.3, PGD40,
        {"torchattacks": _torchattacks("PGD", alpha=0.01875, steps=40),
         "foolbox": _foolbox("LinfPGD", abs_stepsize=0.01875, steps=40),
         "adv-lib": _advlib("pgd_linf", ε=0.3, steps=40, absolute_step_size=0.01875)},
        seeds=(0, 1, 2, 3, 4),
    ),
    Comparison(
        "pgd-l2", "L2", 2.0, {"steps": 40, "step_size": 0.125},
        {"foolbox": _foolbox("L2PGD", abs_stepsize=0.125, steps=40),
         "torchattacks": _torchattacks("PGDL2", alpha=0.125, steps=40)},
        seeds=(0, 1, 2),
    ),
    Comparison(
        "pgd-l1", "L1", 10.0, {"steps": 40, "step_size": 0.625},
        {"foolbox SLIDE": _foolbox("SparseL1DescentAttack", abs_stepsize=0.625, steps=40),
         "foolbox PGD": _foolbox("L1PGD", abs_stepsize=0.625, steps=40),
         "cleverhans SLIDE": _cleverhans("sparse_l1_descent", eps_iter=0.625, nb_iter=40, rand_init=True)},
        seeds=(0, 1, 2),
    ),
    Comparison(
        "pgd-l0", "L0", 25, {"steps": 40}, {"sparse-imperceivable-attacks": _sparse(40, 30000 / 255)},
        seeds=(0, 1, 2), note="the authors' MNIST step size, on the L1-normalised gradient",
    ),
    Comparison(
        "momentum-pgd", "Linf", 0.3, {"steps": 40, "step_size": 0.01875, "decay": 1.0},
        {"torchattacks": _torchattacks("MIFGSM", alpha=0.01875, steps=40, decay=1.0),
         "foolbox": _foolbox("MIFGSM", abs_stepsize=0.01875, steps=40, momentum=1.0)},
    ),
    *(
        Comparison(f"apgd-ce-{norm.lower()}", norm, eps, {"steps": 100}, {"AutoAttack": apgd(loss="ce")},
                   seeds=(0, 1, 2))
        for norm, eps in (("Linf", 0.3), ("L2", 2.0))
    ),
    Comparison(
        "apgd-ce-l1", "L1", 10.0, {"steps": 100}, {"AutoAttack": apgd(loss="ce", use_largereps=True)},
        seeds=(0, 1, 2),
    ),
    Comparison("apgd-dlr-linf", "Linf", 0.3, {"steps": 100}, {"AutoAttack": apgd(loss="dlr")}, seeds=(0, 1, 2)),
    *(
        Comparison(
            f"apgd-t-{norm.lower()}", norm, eps, {"steps": 100, "targets": 9},
            {"AutoAttack": _autoattack("autopgd_base.APGDAttack_targeted", n_iter=100)},
        )
        for norm, eps in (("Linf", 0.3), ("L2", 2.0))
    ),
    *(
        Comparison(
            f"fab{'-t' if targeted else ''}-{norm.lower()}", norm, eps, {"steps": 100},
            {"AutoAttack": _autoattack("fab_pt.FABAttack_PT", n_iter=100, n_restarts=1, targeted=targeted)},
            n=50,
        )
        for norm, eps in (("Linf", 0.3), ("L2", 2.0), ("L1", 10.0))
        for targeted in (False, True)
    ),
    *(
        Comparison(f"square-{norm.lower()}", norm, eps, {"queries": 1000}, {"AutoAttack": square()}, seeds=(0, 1, 2),
                   network=UNDEFENDED, n=100)
        for norm, eps in (("Linf", 0.15), ("L2", 2.0), ("L1", 15.0))
    ),
    *(
        minimal(f"rays-{queries}", "Linf", settings={"queries": queries}, references={"RayS": _rays(queries)})
        for queries in (300, 1000, 3000)
    ),
    minimal(
        "deepfool-l2", "L2", settings={"steps": 50},
        references={"adv-lib": _advlib("df", steps=50, norm=2), "foolbox": _foolbox("L2DeepFoolAttack", steps=50)},
    ),
    minimal(
        "deepfool-linf", "Linf", settings={"steps": 50},
        references={"adv-lib": _advlib("df", steps=50, norm=LINF),
                    "foolbox": _foolbox("LinfDeepFoolAttack", steps=50)},
    ),
    minimal(
        "cw-l2", "L2", settings={"searches": 9, "steps": 100, "lr": 0.01},
        references={"adv-lib": _advlib("carlini_wagner_l2", binary_search_steps=9, max_iterations=100),
                    "cleverhans": _cleverhans("carlini_wagner_l2", n_classes=10, lr=0.01, binary_search_steps=9,
                                              max_iterations=100)},
    ),
    minimal(
        "cw-linf", "Linf", settings={"steps": 100}, references={
            "adv-lib": _advlib("carlini_wagner_linf", max_iterations=100)}, n=50,
    ),
    *(
        minimal(
            f"ddn-{steps}", "L2", settings={"steps": steps},
            references={"adv-lib": _advlib("ddn", steps=steps, levels=None),
                        "foolbox": _foolbox("DDNAttack", steps=steps)},
        )
        for steps in (20, 100)
    ),
    *(
        minimal(
            f"fmn-{label.lower()}", label, settings={"steps": 100},
            references={"adv-lib": _advlib("fmn", norm=norm, steps=100),
                        "foolbox": _foolbox(foolbox, steps=100)},
        )
        for label, norm, foolbox in (("L0", L0, "L0FMNAttack"), ("L1", L1, "L1FMNAttack"), ("L2", L2, "L2FMNAttack"),
                                     ("Linf", LINF, "LInfFMNAttack"))
    ),
]  # fmt: skip
