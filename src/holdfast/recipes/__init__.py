"""The catalogue of recipes: each trains a new model that is harder to break; `__all__` is what may be named."""

from holdfast.recipes.pgd_training import PGDTraining
from holdfast.recipes.standard import Standard
from holdfast.recipes.trades import TRADES

__all__ = ["TRADES", "PGDTraining", "Standard"]
