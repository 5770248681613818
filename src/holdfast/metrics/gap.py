"""Robust generalisation gap: how much higher the robust error is on data that a model was not trained on.

Schmidt et al., "Adversarially Robust Generalization Requires More Data", NeurIPS 2018, arXiv:1804.11285.
"""

from holdfast.core.estimate import Estimate
from holdfast.statistics.intervals import independent_difference


def robust_error_gap(robust: int, n: int, robust_in_training: int, n_training: int) -> Estimate:
    """Return the robust error on `n` examples that a model was not trained on minus that on `n_training` training
    examples, with its 95 % confidence interval.

    `robust` and `robust_in_training` are the numbers of examples that the same attack does not break. The interval is
    that of two independent samples. A gap whose interval is above 0 is overfitting.
    """
    return independent_difference(n - robust, n, n_training - robust_in_training, n_training)
