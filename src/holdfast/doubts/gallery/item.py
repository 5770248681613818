"""The description of a model with masked gradients in the gallery of such models."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from holdfast.core.batch import Batch

EPS = 0.15
"""Smallest Linf radius, in steps of 0.025, at which at most 5 % of 500 digits are robust on the undefended twin."""


@dataclass(frozen=True)
class Item:
    """A model with masked gradients: its name, its paper, and the function that builds it.

    Its twin is the undefended network of `small_networks`, unless it has its own. The masked model contains the weights
    of its twin, or is a network that is trained in a similar way.
    """

    name: str
    source: str
    """the paper that proposed the defence, or that showed how it masks gradients"""
    build: Callable[[Batch, nn.Module], nn.Module]
    """function that builds the masked model from training digits and the undefended twin"""
    eps: float = EPS
    """smallest Linf radius, in steps of 0.025, at which at most 5 % of 500 digits are robust on the twin"""
    twin: Callable[[nn.Module], nn.Module] | None = None
    """function that returns the twin, with the weights of a built model; None if it is the undefended network"""
