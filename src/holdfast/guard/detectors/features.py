"""Features of an inner layer of a network, for detectors that need them."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from holdfast.core.errors import UsageError

_SHOWN = 12
"""number of names that a message lists"""


@contextmanager
def features_of(
    network: nn.Module | Callable[[Tensor], Tensor], layer: str
) -> Iterator[Callable[[], Tensor]]:
    """Context manager that yields a function which returns the outputs of a layer (n, d) in all calls of the network
    since its last call. Images of features are averaged over their pixels, as in the paper of the Mahalanobis detector.

    `layer` is the name of a module, as in `layer4` or `0.2`. Raises `UsageError` if the network has no such module.

    >>> net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    >>> with features_of(net, "0") as taken:
    ...     _ = net(torch.zeros(4, 3))
    ...     taken().shape
    torch.Size([4, 5])
    """
    modules = dict(network.named_modules()) if isinstance(network, nn.Module) else {}
    if not layer or layer not in modules:
        names = [name for name in modules if name]
        known = ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
        raise UsageError(f"the network has no layer {layer!r}; it has {known or 'none, as it is a function'}")
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: object) -> None:
        if not isinstance(output, Tensor) or output.dim() < 2:
            raise UsageError(
                f"the layer {layer} returns {type(output).__name__}; name one that returns (n, d, …)"
            )
        outputs.append(output.flatten(2).mean(2) if output.dim() > 2 else output)

    def taken() -> Tensor:
        parts = torch.cat(outputs)
        outputs.clear()
        return parts

    hook = modules[layer].register_forward_hook(keep)
    try:
        yield taken
    finally:
        hook.remove()


def layer_before_last_linear(net: object) -> str | None:
    """Return the name of the layer without parts that precedes the last linear layer; None if there is none."""
    if not isinstance(net, nn.Module):
        return None
    leaves = [(name, module) for name, module in net.named_modules() if name and not list(module.children())]
    linear = [place for place, (_, module) in enumerate(leaves) if isinstance(module, nn.Linear)]
    return leaves[linear[-1] - 1][0] if linear and linear[-1] else None


class LastFeatures:
    """Function that returns the outputs of a layer (n, …) in the last call of a network by the same thread, which it
    forgets; None if there was none, if they are no tensor, or if there is no such layer. Copies of the network share
    it.
    """

    def __init__(self, network: object, layer: str | None) -> None:
        self._last = threading.local()
        modules = dict(network.named_modules()) if isinstance(network, nn.Module) else {}
        if layer is not None and layer in modules:
            modules[layer].register_forward_hook(self._keep)

    def __deepcopy__(self, memo: object) -> "LastFeatures":
        return self

    def _keep(self, module: nn.Module, inputs: object, output: object) -> None:
        self._last.output = output

    def __call__(self) -> Tensor | None:
        output, self._last.output = getattr(self._last, "output", None), None
        return output if isinstance(output, Tensor) and output.dim() > 1 else None
