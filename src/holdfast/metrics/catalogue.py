"""The functions of all metrics by name, and the computation of a metric from evidence."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

from holdfast.core.errors import Placeholder, Remedy, UsageError
from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Evidence
from holdfast.metrics import comparisons, predictions, shares, tasks
from holdfast.metrics.comparisons import transfer_success
from holdfast.metrics.names import METRICS, OF_ANY_TASK, OF_TASKS, TASKS
from holdfast.metrics.shares import Absent

Metric = Callable[[Evidence], Estimate]
"""function `metric(evidence)` that returns an `Estimate`"""

PLAIN: Mapping[str, Metric] = {
    "clean_accuracy": shares.clean_accuracy,
    "clean_error_rate": shares.clean_error_rate,
    "suite_robust_accuracy": shares.suite_robust_accuracy,
    "rejection_rate": shares.rejection_rate,
    **predictions.DETECTION_METRICS,
    "targeted_success_rate": shares.targeted_success_rate,
    "trigger_success_rate": shares.trigger_success_rate,
    "transfer_success": transfer_success,
    **predictions.PERTURBATIONS,
    "robust_margin": predictions.robust_margin,
    "adversarial_radius": predictions.adversarial_radius,
    "precision": predictions.precision,
    "recall": predictions.recall,
    "f1": predictions.f1,
    "attacked_precision": partial(predictions.precision, of="attacked"),
    "attacked_recall": partial(predictions.recall, of="attacked"),
    "attacked_f1": partial(predictions.f1, of="attacked"),
    "defensive_entropy": predictions.defensive_entropy,
    "defensive_entropy_rise": predictions.defensive_entropy_rise,
    "defensive_margin": predictions.defensive_margin,
    "calibration_error": predictions.calibration_error,
    "attacked_calibration_error": partial(predictions.calibration_error, of="attacked"),
    "corruption_error_rate": predictions.corruption_error_rate,
    "worst_corruption": predictions.worst_corruption,
    **predictions.ACCURACIES,
    **tasks.PLAIN,
}
"""metrics of one run, by name"""


class AtEps(Protocol):
    """Protocol of a metric that can be computed for another perturbation radius eps than that of the run."""

    def __call__(self, evidence: Evidence, *, eps: float | None = ...) -> Estimate:
        """Return the metric at `eps`, or at the eps of the run if it is None."""


BY_EPS: Mapping[str, AtEps] = {
    "object_recall": tasks.object_recall,
    "robust_accuracy": shares.robust_accuracy,
    "certified_accuracy": shares.certified_accuracy,
    "robust_error_rate": shares.robust_error_rate,
    "robustness_score": shares.robustness_score,
    "worst_class": shares.worst_class,
    "worst_group": shares.worst_group,
    "attack_success_rate": shares.attack_success_rate,
    "perturbed_share": shares.perturbed_share,
}
"""metrics of one run that can be computed at another eps, by name"""

PAIRED: Mapping[str, Callable[[Evidence, Evidence], Estimate]] = {
    "regression": comparisons.regression,
    "clean_accuracy_drop": comparisons.clean_accuracy_drop,
    "mce": predictions.mce,
}
"""metrics that compare a run with its baseline, by name"""


def estimate(
    name: str,
    evidence: Evidence,
    *,
    eps: float | None = None,
    baseline: Evidence | None = None,
) -> Estimate:
    """Return the value and the confidence interval of the metric `name`, computed from the evidence of a run.

    Raises `Absent`, a usage error with advice, if the attack that measures it was not run.
    """
    _refuse_other_task(name, evidence)
    if name in PAIRED:
        if baseline is None:
            raise Absent(f"{name} compares two runs", Remedy("baseline", Placeholder("RUN")))
        return PAIRED[name](evidence, baseline)
    if name in BY_EPS:
        return BY_EPS[name](evidence, eps=eps)
    if name not in PLAIN:
        raise UsageError(
            f"there is no metric {name!r}; the metrics are {', '.join([*PLAIN, *BY_EPS, *PAIRED])}"
        )
    if eps is not None:
        raise UsageError(f"{name} has no value at another eps; write {name} without @{eps:g}")
    return PLAIN[name](evidence)


def _refuse_other_task(name: str, evidence: Evidence) -> None:
    """Raise `Absent` for a metric of models with another task."""
    task = evidence.model.get("task", {}).get("name", "classes")
    own = TASKS.get(task, {})
    if (name in OF_TASKS if task == "classes" else name not in OF_ANY_TASK) and name not in own:
        raise Absent(
            f"{name} is no metric of a model of {task}; its metrics are {', '.join((*own, *sorted(OF_ANY_TASK)))}"
            if own
            else f"{name} is no metric of a model of classes"
        )
    if name in own and not name.startswith("clean_") and math.isinf(evidence.threat.constraint.eps):
        raise Absent(f"{name} needs an eps, and this run searched for smallest changes")


def missing(evidence: Evidence, baseline: Evidence | None) -> tuple[str, ...]:
    """Return the reason why the mean corruption error (mCE) cannot be computed although both runs measured corruptions;
    otherwise an empty tuple.

    The result is empty if mCE has a value, or if a run did not measure corruptions.
    """
    if baseline is None or not predictions.measured(evidence) or not predictions.measured(baseline):
        return ()
    try:
        predictions.refuse_incomparable(evidence, baseline)
    except Absent as why:
        return (why.on_command_line(),)
    return ()


def estimates(evidence: Evidence, *, baseline: Evidence | None = None) -> dict[str, Estimate]:
    """Return all metrics that can be computed from the evidence of a run, by name, in the order of the
    list of metrics.
    """
    values = {}
    for name in METRICS:
        try:
            values[name] = estimate(name, evidence, baseline=baseline)
        except Absent:
            continue
    return values
