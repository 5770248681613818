"""The catalogue of recipes: each trains a new model that is harder to break; `__all__` are the accepted names."""

from holdfast.recipes.atta import ATTA
from holdfast.recipes.cure import CURE
from holdfast.recipes.curriculum import CurriculumTraining
from holdfast.recipes.ensemble import EnsembleTraining
from holdfast.recipes.free import FreeTraining
from holdfast.recipes.gradient_regularisation import GradientRegularisation
from holdfast.recipes.hat import HAT
from holdfast.recipes.ikl import IKL
from holdfast.recipes.jacobian import JacobianRegularisation
from holdfast.recipes.lipschitz import LipschitzConstraint
from holdfast.recipes.llr import LLR
from holdfast.recipes.margin import MarginTraining
from holdfast.recipes.mart import MART
from holdfast.recipes.multi_norm import MultiNormTraining
from holdfast.recipes.pgd_training import PGDTraining
from holdfast.recipes.score import SCORE
from holdfast.recipes.single_step import SingleStep
from holdfast.recipes.standard import Standard
from holdfast.recipes.trades import TRADES
from holdfast.recipes.vat import VAT

__all__ = [
    "ATTA",
    "CURE",
    "HAT",
    "IKL",
    "LLR",
    "MART",
    "SCORE",
    "TRADES",
    "VAT",
    "CurriculumTraining",
    "EnsembleTraining",
    "FreeTraining",
    "GradientRegularisation",
    "JacobianRegularisation",
    "LipschitzConstraint",
    "MarginTraining",
    "MultiNormTraining",
    "PGDTraining",
    "SingleStep",
    "Standard",
]
