"""Enables gradients for a verb in any context, and makes networks usable in a backward pass."""

import copy
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

P = ParamSpec("P")
T = TypeVar("T")


def with_gradients(verb: Callable[P, T]) -> Callable[P, T]:
    """Return the verb with gradients enabled, even if it is called under `no_grad` or `inference_mode`."""

    @wraps(verb)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.inference_mode(False), torch.enable_grad():
            return verb(*args, **kwargs)

    return called


def differentiable(net: nn.Module) -> nn.Module:
    """Return the network, or a copy if it was created under `inference_mode` and cannot be used in a backward pass."""
    tensors = (*net.parameters(), *net.buffers())
    made_there = any(not is_lazy(tensor) and tensor.is_inference() for tensor in tensors)
    return copy.deepcopy(net) if made_there else net
