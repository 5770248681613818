"""What one masked model of the gallery is."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from holdfast.core.batch import Batch

EPS = 0.15
"""The smallest Linf radius, in steps of 0.025, at which at most 5 % of 500 digits stand on the undefended twin."""


@dataclass(frozen=True)
class Item:
    """A masked model; its twin is the network of `training.undefended`, which it wraps or was trained like."""

    name: str
    source: str
    """the paper that proposed it, or that showed how it masks"""
    build: Callable[[Batch, nn.Module], nn.Module]
    """from digits to train on and the undefended twin to the masked model"""
    eps: float = EPS
