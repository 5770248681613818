"""The catalogue of attacks: `__all__` is what a suite, a config file and the command line may name."""

from holdfast.attacks.apgd import APGD
from holdfast.attacks.bandits import Bandits
from holdfast.attacks.bim import BIM
from holdfast.attacks.carlini_wagner import CarliniWagner
from holdfast.attacks.corruption import Corruption
from holdfast.attacks.ddn import DDN
from holdfast.attacks.deepfool import DeepFool
from holdfast.attacks.fab import FAB
from holdfast.attacks.fgsm import FGSM
from holdfast.attacks.fmn import FMN
from holdfast.attacks.momentum_pgd import MomentumPGD
from holdfast.attacks.nes import NES
from holdfast.attacks.pgd import PGD
from holdfast.attacks.rays import RayS
from holdfast.attacks.simba import SimBA
from holdfast.attacks.sparse_rs import SparseRS
from holdfast.attacks.spsa import SPSA
from holdfast.attacks.square import Square
from holdfast.attacks.zoo import ZOO

__all__ = [
    "APGD",
    "BIM",
    "DDN",
    "FAB",
    "FGSM",
    "FMN",
    "NES",
    "PGD",
    "SPSA",
    "ZOO",
    "Bandits",
    "CarliniWagner",
    "Corruption",
    "DeepFool",
    "MomentumPGD",
    "RayS",
    "SimBA",
    "SparseRS",
    "Square",
]
