"""Layers as matrices, and what these say of how far the layers stretch."""

import torch
from torch import Tensor, nn

from holdfast.recipes.lipschitz import layers, order_of

_NORMS = {"linf": torch.inf, "l2": 2, "l1": 1}


def matrix(layer: nn.Module, shape: torch.Size) -> Tensor:
    """The linear part of a layer on inputs of that shape, (outputs, inputs)."""
    basis = torch.eye(shape.numel(), dtype=torch.float64).view(-1, *shape)
    with torch.no_grad():
        return (layer(basis) - layer(torch.zeros_like(basis))).flatten(1).T


def gains(net, x, constraint):
    """The exact gain of each layer by its name."""
    norm = _NORMS[order_of(constraint)]
    found = layers(net, x).items()
    return {
        name: torch.linalg.matrix_norm(matrix(layer, shape[1:]), norm).item()
        for name, (layer, shape) in found
    }
