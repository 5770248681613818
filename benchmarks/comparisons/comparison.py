"""One attack at one setting, ours and those of the peers that have it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from holdfast.attacks.protocol import Attack

Reference = Callable[[nn.Module, Tensor, Tensor, "Comparison"], Tensor]
UNDEFENDED = "mnist_badnet"


@dataclass(frozen=True)
class Comparison:
    """What both sides share: network, images, constraint (no eps for a minimum norm), and the settings."""

    name: str
    norm: str
    eps: float | None
    settings: Mapping[str, float]
    ours: Mapping[str, Attack]
    """by what the table calls it: at the reference's own loss, and at ours where that differs"""
    references: Mapping[str, Reference]
    network: str = "mnist_cnn_a_adv"
    n: int = 200
    seeds: tuple[int, ...] = (0,)
    note: str = ""
