"""The catalogue of attacks: `__all__` are the names that suites, configuration files and the command line accept."""

from holdfast.attacks.adversarial_patch import AdversarialPatch
from holdfast.attacks.alma import ALMA
from holdfast.attacks.apgd import APGD
from holdfast.attacks.bandits import Bandits
from holdfast.attacks.bim import BIM
from holdfast.attacks.boundary import Boundary
from holdfast.attacks.carlini_wagner import CarliniWagner
from holdfast.attacks.corruption import Corruption
from holdfast.attacks.ddn import DDN
from holdfast.attacks.deepfool import DeepFool
from holdfast.attacks.ead import EAD
from holdfast.attacks.fab import FAB
from holdfast.attacks.fgsm import FGSM
from holdfast.attacks.flow import Flow
from holdfast.attacks.fmn import FMN
from holdfast.attacks.geoda import GeoDA
from holdfast.attacks.grid_search import GridSearch
from holdfast.attacks.hop_skip_jump import HopSkipJump
from holdfast.attacks.jsma import JSMA
from holdfast.attacks.momentum_pgd import MomentumPGD
from holdfast.attacks.nes import NES
from holdfast.attacks.patch_attack import PatchAttack
from holdfast.attacks.pdpgd import PDPGD
from holdfast.attacks.pgd import PGD
from holdfast.attacks.rays import RayS
from holdfast.attacks.relay import Relay
from holdfast.attacks.sigma_zero import SigmaZero
from holdfast.attacks.sign_opt import SignOPT
from holdfast.attacks.simba import SimBA
from holdfast.attacks.sparse_rs import SparseRS
from holdfast.attacks.spsa import SPSA
from holdfast.attacks.square import Square
from holdfast.attacks.super_deepfool import SuperDeepFool
from holdfast.attacks.surfree import SurFree
from holdfast.attacks.transfer import Transfer
from holdfast.attacks.transform_pgd import TransformPGD
from holdfast.attacks.universal import Universal
from holdfast.attacks.universal_deepfool import UniversalDeepFool
from holdfast.attacks.zoo import ZOO

__all__ = [
    "ALMA",
    "APGD",
    "BIM",
    "DDN",
    "EAD",
    "FAB",
    "FGSM",
    "FMN",
    "JSMA",
    "NES",
    "PDPGD",
    "PGD",
    "SPSA",
    "ZOO",
    "AdversarialPatch",
    "Bandits",
    "Boundary",
    "CarliniWagner",
    "Corruption",
    "DeepFool",
    "Flow",
    "GeoDA",
    "GridSearch",
    "HopSkipJump",
    "MomentumPGD",
    "PatchAttack",
    "RayS",
    "Relay",
    "SigmaZero",
    "SignOPT",
    "SimBA",
    "SparseRS",
    "Square",
    "SuperDeepFool",
    "SurFree",
    "Transfer",
    "TransformPGD",
    "Universal",
    "UniversalDeepFool",
]
