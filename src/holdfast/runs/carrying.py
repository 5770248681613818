"""Transfer of perturbations to and from other data sets: tests whether it is possible for a plan."""

from collections.abc import Sequence
from dataclasses import replace

from holdfast.core.batch import Batch, Data
from holdfast.core.constraints import L0, L1, L2, Linf
from holdfast.core.errors import UsageError
from holdfast.harness import Plan, Target
from holdfast.runs.entry import refuse_data


def with_others(plan: Plan, others: Sequence[Data], sample: Batch, target: Target) -> Plan:
    """Return the plan with a stage that transfers perturbations between the data of the run and `others`.

    `sample` are examples of the run. Raises `UsageError` if the threat model or the data do not allow it.
    """
    if not others:
        return plan
    threat = plan.threat
    if not isinstance(threat.constraint, (Linf, L2, L1, L0)) or threat.constraint.eps == float("inf"):
        raise UsageError(
            "changes are carried across data sets inside a ball of a given size; choose a threat such as linf:8/255, "
            "or leave --across out"
        )
    if threat.goal is not None:
        raise UsageError(
            f"changes that are carried across data sets lead away from whatever the model says, and not to a class; "
            f"leave goal=targeted:{threat.goal} out, or leave --across out"
        )
    if not (threat.gives("gradients") and target.bare.access == "gradients") and not threat.surrogates:
        raise UsageError(
            "changes that are carried across data sets are made from gradients, and the model gives none here; name "
            "one that does with --surrogate MODEL, or leave --across out"
        )
    shape = tuple(sample.x.shape[1:])
    for each in others:
        refuse_data(each)
        other = tuple(each.read(0, 1).x.shape[1:])
        if other != shape:
            raise UsageError(
                f"inputs of {each.name} have shape {other}, and those of the run {shape}; name data of the same shape "
                "with --across DATA"
            )
    return replace(plan, across=True)
