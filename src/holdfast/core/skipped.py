"""Networks whose gradient through residual branches is scaled down in favour of the skip connections, for attacks that
transfer better.

SGM: Wu, Wang, Xia, Bailey & Ma, "Skip connections matter: on the transferability of adversarial examples generated with
ResNets", ICLR 2020, arXiv:2002.05990. Differs from the paper: the ends of the branches are given by name. The paper's
code hooks the ReLUs inside them by the module names of one library, omits the first block of each stage, and divides
the gradient of each block by its standard deviation, which has no effect after a sign or a normalisation.
"""

import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from holdfast.core.errors import UsageError
from holdfast.core.names import kind_of

DECAY = 0.5
"""default fraction of the gradient that passes through a branch"""
_SHOWN = 12
"""largest number of names in a message"""


class Skipped(nn.Module):
    """Network whose gradient is multiplied by `decay` at the end of each residual branch. Its outputs are unchanged."""

    def __init__(self, net: nn.Module, branches: tuple[str, ...], decay: float) -> None:
        super().__init__()
        self.net, self.branches, self.decay = net, branches, decay

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of the network, bitwise unchanged, with gradients that are scaled down in the residual
        branches.
        """
        called: set[str] = set()
        hooks = [
            self.net.get_submodule(name).register_forward_hook(_hook(name, self.decay, called))
            for name in self.branches
        ]
        try:
            logits: Tensor = self.net(x)
        finally:
            for hook in hooks:
                hook.remove()
        if not called:
            raise UsageError(
                f"the network does not call {', '.join(self.branches[:_SHOWN])} (an exported program calls none of "
                "its modules); name modules that it calls, or do not use skip gradients"
            )
        return logits


def skipped(net: nn.Module | Callable[[Tensor], Tensor], branches: str, *, decay: float = DECAY) -> Skipped:
    """Return a network with the same outputs whose gradients prefer its skip connections (SGM, the skip gradient
    method), for use as a surrogate model.

    `branches` is a pattern of module names with `*` for any text, which matches the last module of each residual
    branch, before the addition: `layer*.*.bn2`. The gradient of each branch is multiplied by `decay`; 1 has no effect.
    The authors give 0.5 for a ResNet and 0.2 for a DenseNet in their code's README. Raises `UsageError` if no module
    matches.
    """
    if not isinstance(net, nn.Module):
        raise UsageError(
            f"skipped() got {kind_of(net)}; expected a network, because branches are named by its modules"
        )
    if not 0 <= decay <= 1:
        raise UsageError(f"decay is {decay}; expected the share of the gradient that is kept, from 0 to 1")
    names = [name for name, _ in net.named_modules() if name]
    ends = tuple(name for name in names if fnmatchcase(name, branches))
    if not ends:
        kinds = list(dict.fromkeys(re.sub(r"\d+(?=\.|$)", "*", name) for name in names))
        more = f" and {len(kinds) - _SHOWN} more" if len(kinds) > _SHOWN else ""
        has = f"it has {', '.join(kinds[:_SHOWN])}{more}" if kinds else "it has none"
        raise UsageError(
            f"no module of the network is called {branches!r}; {has}. Name the last module of each residual "
            "branch, as in layer*.*.bn2, or do not use skip gradients"
        )
    return Skipped(net, ends, decay)


def _hook(name: str, decay: float, called: set[str]) -> Callable[[nn.Module, tuple[Any, ...], Any], Tensor]:
    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        called.add(name)
        if not isinstance(output, Tensor):
            raise UsageError(
                f"the module {name} returns {kind_of(output)}; name one that returns a tensor as the end of a "
                "branch"
            )
        if not output.requires_grad:
            return output
        end = output.clone()  # a hook on `output` itself would affect the skip connection too
        end.register_hook(lambda grad: decay * grad)  # type: ignore[no-untyped-call]
        return end

    return hook
