"""The catalogue of attacks: `__all__` is what a suite, a config file and the command line may name."""

from holdfast.attacks.apgd import APGD
from holdfast.attacks.fab import FAB
from holdfast.attacks.pgd import PGD
from holdfast.attacks.square import Square

__all__ = ["APGD", "FAB", "PGD", "Square"]
