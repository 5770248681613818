"""The catalogue of attacks: `__all__` is what a suite, a config file and the command line may name."""

from holdfast.attacks.pgd import PGD

__all__ = ["PGD"]
