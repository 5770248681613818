"""Access to the columns of evidence for the computation of metrics, and the error for a metric whose attack was not
run.
"""

import math

from torch import Tensor

from holdfast.core.errors import UsageError
from holdfast.core.evidence import Evidence
from holdfast.core.remedies import Remedy
from holdfast.core.types import Mask, PerExample

ATTACKED_INPUT = (Remedy("suite", "standard", reason="whose fixed PGD-40 pass measures it"),)
"""remedies for a metric of attacked inputs"""
MINIMUM_NORM = (
    Remedy("curve", True),
    Remedy("suite", "minimum-norm", reason="whose attacks search for the smallest change"),
)
"""remedies for a metric of smallest changes"""
ATTACKED = "run at least one attack"


class Absent(UsageError):
    """Error for a metric whose attack was not run. Its message states how to measure the metric."""


def column(evidence: Evidence, name: str, way_out: str = "", remedies: tuple[Remedy, ...] = ()) -> Tensor:
    """Return a column of the evidence by its name. Raises `Absent` with the advice `way_out` and the remedies if the
    evidence does not contain it.
    """
    if name not in evidence:
        advice = f"; {way_out}" if way_out else ""
        raise Absent(f"this run measured no {name.replace('_', ' ')}{advice}", *remedies)
    return evidence[name]


def within(distance: PerExample, eps: float) -> Mask:
    """Return the mask of the perturbations whose size is at most `eps`. A small tolerance permits rounding errors."""
    return distance.double() <= eps * (1 + 1e-6) + 1e-7


def untargeted(evidence: Evidence, metric: str) -> None:
    """Raise `Absent` if the threat model has a target class, for a metric that is defined only for
    untargeted attacks.
    """
    if evidence.threat.goal is not None:
        raise Absent(
            f"{metric} does not exist under goal=targeted:{evidence.threat.goal}; use targeted_success_rate, or "
            "leave the goal out"
        )


def broken_examples(evidence: Evidence, metric: str, eps: float | None) -> Mask:
    """Return the mask of the correct examples that an attack broke with a change of at most `eps`, by default the eps
    of the run.

    For another eps the distances of the minimum-norm attacks are used.
    """
    untargeted(evidence, metric)
    eps_of_run = evidence.threat.constraint.eps
    if eps is None and math.isinf(eps_of_run):
        raise Absent(f"{metric} needs an eps in a minimum-norm run; write {metric}@EPS, as in {metric}@0.5")
    if eps is None or (eps == eps_of_run and "distance" not in evidence):
        return column(evidence, "success", ATTACKED) & evidence["correct"]
    way_out = f"this run attacked at eps={eps_of_run:g} only"
    broken = within(column(evidence, "distance", way_out, MINIMUM_NORM), eps)
    return evidence["correct"] & (broken | evidence["success"] if eps == eps_of_run else broken)


def robust(evidence: Evidence, metric: str, eps: float | None = None) -> Mask:
    """Return the mask of the examples that are classified correctly both without an attack and under every attack of
    the run.
    """
    return evidence["correct"] & ~broken_examples(evidence, metric, eps)


def suite_robust(evidence: Evidence, metric: str) -> Mask:
    """Return the mask of the examples that are classified correctly both without an attack and under every attack of
    the suite. Other attacks of the run are ignored.
    """
    untargeted(evidence, metric)
    if math.isinf(evidence.threat.constraint.eps):
        usual = evidence.threat.with_size(0.5)
        raise Absent(f"{metric} needs an eps", Remedy("threat", usual))
    return evidence["correct"] & ~column(evidence, "suite_success", ATTACKED)
