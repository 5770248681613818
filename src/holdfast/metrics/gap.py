"""Robust generalisation gap: how much higher the robust error is on data that a model was not trained on.

Schmidt et al., "Adversarially Robust Generalization Requires More Data", NeurIPS 2018, arXiv:1804.11285.
"""

from holdfast.core.errors import UsageError
from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Evidence
from holdfast.metrics.columns import robust
from holdfast.metrics.shares import right_probability
from holdfast.ops.statistics import independent_difference


def robust_error_gap(test: Evidence, training: Evidence) -> Estimate:
    """Return the robust error on test data minus that on training data, with its confidence interval.

    Both are results of the same model under the same threat model. The interval is that of two independent samples. A
    gap whose interval is above 0 is overfitting. Raises `UsageError` for results of different models, threat models or
    suites, of the same examples, or of a randomised model.
    """
    _refuse_incomparable(test, training)
    counts: list[int] = []
    for evidence in (test, training):
        if right_probability(evidence) is not None:
            raise UsageError(
                "the gap is defined for deterministic models, and the outputs of this one are random; compare the "
                "robust accuracies of both results instead"
            )
        wrong = ~robust(evidence, "robust_error_gap", None)
        counts += [int(wrong.sum()), len(wrong)]
    return independent_difference(counts[0], counts[1], counts[2], counts[3])


def _refuse_incomparable(test: Evidence, training: Evidence) -> None:
    """Raise `UsageError` for two results whose difference is not that of two data sets."""
    for what, first, second in (
        ("model", test.model.get("name"), training.model.get("name")),
        ("threat model", test.threat.constraint, training.threat.constraint),
        (
            "suite",
            (test.suite, [a.name for a in test.attacks]),
            (training.suite, [a.name for a in training.attacks]),
        ),
    ):
        if first != second:
            raise UsageError(
                f"the results have different settings: the {what} of the first is {first}, and that of the second is "
                f"{second}; assess the same model with the same settings on test and on training data"
            )
    digests = [{bytes(row) for row in each["digest"].numpy()} for each in (test, training)]
    shared = len(digests[0] & digests[1])
    if 2 * shared > len(digests[0]):  # a few duplicates occur in published data sets
        raise UsageError(
            f"{shared} of {len(digests[0])} test examples are training examples; expected test data on which the model "
            "was not trained"
        )
