"""The peers' PGD under Linf from a uniform start, at the same steps and step size; weights as users hand them over."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.peers import peer

Run = Callable[[nn.Module, Tensor, Tensor, float, int, float], Tensor]
"""(network, x, y, eps, steps, step size) -> perturbed inputs"""


def torchattacks(net: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, size: float) -> Tensor:
    found: Tensor = peer("torchattacks").PGD(net, eps=eps, alpha=size, steps=steps)(x, y)
    return found


def foolbox(net: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, size: float) -> Tensor:
    fb = peer("foolbox")
    attack = fb.attacks.LinfPGD(abs_stepsize=size, steps=steps)
    found: Tensor = attack(
        fb.PyTorchModel(net, (0, 1), device="cpu"), x, fb.criteria.Misclassification(y), epsilons=eps
    )[1]
    return found


def cleverhans(net: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, size: float) -> Tensor:
    attack = peer("cleverhans.torch.attacks.projected_gradient_descent").projected_gradient_descent
    found: Tensor = attack(net, x, eps, size, steps, float("inf"), clip_min=0.0, clip_max=1.0, y=y)
    return found


def art(net: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, size: float) -> Tensor:
    peer("art.attacks.evasion")
    classifier = peer("art.estimators.classification").PyTorchClassifier(
        net, torch.nn.CrossEntropyLoss(), tuple(x.shape[1:]), 10, clip_values=(0.0, 1.0), device_type="cpu"
    )
    attack = peer("art.attacks.evasion").ProjectedGradientDescentPyTorch(
        classifier,
        eps=eps,
        eps_step=size,
        max_iter=steps,
        num_random_init=1,
        batch_size=len(x),
        verbose=False,
    )
    return torch.from_numpy(attack.generate(x.numpy(), y.numpy()))


def adv_lib(
    net: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, size: float, loss: str = "ce"
) -> Tensor:
    attack = peer("adv_lib.attacks").pgd_linf
    found: Tensor = attack(net, x, y, ε=eps, steps=steps, absolute_step_size=size, loss_function=loss)
    return found


def apgd(net: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, size: float) -> Tensor:
    """The reference's APGD-CE at as many steps; it chooses its own step sizes."""
    attack = peer("autoattack.autopgd_base").APGDAttack
    found: Tensor = attack(net, n_iter=steps, eps=eps, seed=torch.initial_seed(), device="cpu").perturb(x, y)
    return found


PEERS: dict[str, Run] = {
    "torchattacks": torchattacks,
    "foolbox": foolbox,
    "cleverhans": cleverhans,
    "art": art,
    "adv-lib CE": adv_lib,
    "adv-lib DLR": partial(adv_lib, loss="dlr"),
}
