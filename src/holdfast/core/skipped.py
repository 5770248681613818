"""Gradients that prefer skip connections: what flows back through the residual branches of a network counts less.

SGM: Wu, Wang, Xia, Bailey & Ma, "Skip connections matter: on the transferability of adversarial examples generated with
ResNets", ICLR 2020, arXiv:2002.05990. Differs from the paper: the ends of the branches are named, where its code hooks
the ReLUs inside them by the names that one library gives these, passes over the first block of each stage and divides
what comes out of each block by its spread, which a sign or a norm undoes.
"""

import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from holdfast.core.errors import UsageError

DECAY = 0.5
"""Share of the gradient that a branch keeps where nothing else is said."""
_SHOWN = 12
"""Names in a message."""


class Skipped(nn.Module):
    """A network whose gradient is `decay` times what it was wherever it passes the end of a branch; see `skipped`."""

    def __init__(self, net: nn.Module, branches: tuple[str, ...], decay: float) -> None:
        super().__init__()
        self.net, self.branches, self.decay = net, branches, decay

    def forward(self, x: Tensor) -> Tensor:
        """What the network says, to the bit; it bears its hooks for this call alone."""
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
                f"the network never calls {', '.join(self.branches[:_SHOWN])}, as an exported program calls none of "
                "its modules; name modules that it calls, or leave skip gradients out"
            )
        return logits


def skipped(net: nn.Module | Callable[[Tensor], Tensor], branches: str, *, decay: float = DECAY) -> Skipped:
    """The network for a surrogate, with gradients that prefer its skip connections (SGM).

    `branches` is a pattern over the names of its modules, `*` for anything, that names the last module of each residual
    branch, before the two ways are added: `layer*.*.bn2`. Each takes `decay` of the gradient; 1 leaves it as it is.
    The authors give 0.5 for a ResNet and 0.2 for a DenseNet in their code's README.
    """
    if not isinstance(net, nn.Module):
        raise UsageError(
            f"skipped() was given a {type(net).__name__}; its branches are named by modules, so give a network"
        )
    if not 0 <= decay <= 1:
        raise UsageError(f"decay is {decay}; expected the share of the gradient that is kept, from 0 to 1")
    names = [name for name, _ in net.named_modules() if name]
    found = tuple(name for name in names if fnmatchcase(name, branches))
    if not found:
        kinds = list(dict.fromkeys(re.sub(r"\d+(?=\.|$)", "*", name) for name in names))
        more = f" and {len(kinds) - _SHOWN} more" if len(kinds) > _SHOWN else ""
        has = f"it has {', '.join(kinds[:_SHOWN])}{more}" if kinds else "it has none"
        raise UsageError(
            f"no module of the network is called {branches!r}; {has}. Name the last module of each residual branch, as "
            "in layer*.*.bn2, or leave skip gradients out"
        )
    return Skipped(net, found, decay)


def _hook(name: str, decay: float, called: set[str]) -> Callable[[nn.Module, tuple[Any, ...], Any], Tensor]:
    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        called.add(name)
        if not isinstance(output, Tensor):
            raise UsageError(
                f"the module {name} returns a {type(output).__name__}; name one that returns a tensor as the end of a "
                "branch"
            )
        if not output.requires_grad:
            return output
        end = output.clone()  # an identity would hand on what the skip connection has, too
        end.register_hook(lambda grad: decay * grad)  # type: ignore[no-untyped-call]
        return end

    return hook
