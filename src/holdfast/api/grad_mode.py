"""Ensures that gradients can be computed during a run, even if the caller has disabled them in torch."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parameter import is_lazy


@contextmanager
def gradients() -> Iterator[None]:
    """Context manager that enables gradients, even under `no_grad` or `inference_mode`; also used as a decorator."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def differentiable(net: nn.Module) -> nn.Module:
    """Return the network, or a copy of it if it was created under `torch.inference_mode` and so cannot be used in a
    backward pass.
    """
    tensors = (*net.parameters(), *net.buffers())
    is_inference = any(not is_lazy(tensor) and tensor.is_inference() for tensor in tensors)
    return copy.deepcopy(net) if is_inference else net
