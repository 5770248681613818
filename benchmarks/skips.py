"""Skip gradients as their authors' code takes them: hooks on ReLU modules, which a functional network must be given.

csdongxian/skip-connections-matter, `utils_sgm.py`: of modules named `relu`, those of each stage's first block left out,
the gradient is multiplied by gamma; what comes out of each block is divided by its standard deviation.
"""

from copy import deepcopy
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers import peer


class _Spelt(nn.Module):
    """A residual block of the CIFAR ResNets that calls one ReLU module twice, as torchvision's does."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.inner, self.relu = block, nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        block = self.inner
        y = block.bn2(block.conv2(self.relu(block.bn1(block.conv1(x)))))
        if block.down:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, block.o // 4, block.o // 4))
        out: Tensor = self.relu(x + y)
        return out


def spelt(module: nn.Module) -> nn.Module:
    """The same network with ReLU modules in its residual blocks."""
    twin = deepcopy(module)
    for group in twin.modules():
        if isinstance(group, nn.Sequential):
            for place, block in enumerate(group):
                if "bn2" in dict(block.named_children()):
                    group[place] = _Spelt(block)
    return twin.eval()


def hooked(module: nn.Module, gamma: float) -> nn.Module:
    """The same network with ReLU modules and the authors' hooks."""
    twin = spelt(module)
    peer("utils_sgm").register_hook_for_resnet(twin, arch="resnet18", gamma=gamma)
    return twin
