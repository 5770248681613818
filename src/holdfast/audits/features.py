"""Features that a network computes from inputs before its last layer."""

import torch
from torch import Tensor, nn

from holdfast.core.model import Classifier
from holdfast.core.types import Inputs, Logits

_ROWS = 500  # examples in one forward pass


@torch.no_grad()
def penultimate(model: Classifier, x: Inputs) -> tuple[Tensor, Logits]:
    """Return the inputs of the last linear layer (n, d), or of the last layer with parameters if there is none, and the
    logits, on the CPU. Inputs with pixels are averaged over their pixels.
    """
    layers = [module for module in model.modules() if [*module.parameters(recurse=False)]]
    linear = [module for module in layers if isinstance(module, nn.Linear)]
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        kept.append(inputs[0].flatten(2).mean(2) if inputs[0].dim() > 2 else inputs[0])

    hook = (linear or layers)[-1].register_forward_pre_hook(keep)
    try:
        logits = torch.cat([model(piece) for piece in torch.split(x, _ROWS)])
    finally:
        hook.remove()
    return torch.cat(kept).cpu().double(), logits.cpu().double()
