"""Surrogate models: moved to the device of the target, prepared in the same way, and refused if unsuitable."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from holdfast.core.batch import Batch
from holdfast.core.corruptions import Corruptions
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.transformations import Transformations
from holdfast.harness import Plan, Target, prepared
from holdfast.ops.ascent import gradient
from holdfast.ops.losses import margin_loss
from holdfast.runs.order import Subject
from holdfast.runs.preparing import placed

_LOOKED_AT = 32
"""number of examples on which a surrogate must have at least one nonzero gradient"""


def with_surrogates(
    plan: Plan, stack: ExitStack, surrogates: Sequence[Subject], sample: Batch, target: Target
) -> Plan:
    """The plan with surrogates of the attacker, prepared until `stack` is closed.

    Raises `UsageError` or `TargetError` for a threat model without surrogates or an unsuitable surrogate.
    """
    if not surrogates:
        return plan
    if isinstance(plan.threat.constraint, Corruptions):
        raise UsageError("nothing is made on a surrogate under common corruptions; leave --surrogate out")
    if isinstance(plan.threat.constraint, Transformations):
        raise UsageError(
            f"nothing is made on a surrogate under {plan.threat.constraint}, for images are transformed as wholes; "
            "leave --surrogate out"
        )
    ready = tuple(_ready(one, stack, sample, target).quick for one in surrogates)
    return replace(
        plan, threat=replace(plan.threat, surrogates=ready), matrix=not plan.smallest and not plan.alone
    )


def _ready(surrogate: Subject, stack: ExitStack, sample: Batch, target: Target) -> Target:
    name = surrogate.card.get("name", "")
    if surrogate.model.access != "gradients":
        raise UsageError(
            f"the surrogate {name} gives {surrogate.model.access} only, and examples are made from gradients; "
            "name a model that torch can differentiate"
        )
    stack.enter_context(placed(surrogate.model, sample.x.device))
    try:
        found = stack.enter_context(prepared(surrogate.model, sample))
    except TargetError as error:
        shape = tuple(sample.x.shape[1:])
        raise TargetError(
            f"the surrogate {name} does not take the model's inputs {shape}: {error}"
        ) from error
    if found.classes != target.classes:
        raise TargetError(
            f"the surrogate {name} has {found.classes} classes, the model {target.classes}; "
            "name one that was trained on the same classes"
        )
    if found.rejects:
        raise UsageError(
            f"the surrogate {name} rejects inputs, and examples are made on a network alone; "
            "name the one without its detector"
        )
    if found.randomised:
        raise UsageError(
            f"the surrogate {name} draws at random, so what is made on it could not be made again; "
            "wrap it in a factory that fixes its draws"
        )
    lost = int(found.logits(sample.x).isnan().any(1).sum())
    if lost:
        raise TargetError(
            f"the surrogate {name} returns NaN for {lost} of the first {len(sample)} examples, and NaN leads nowhere; "
            f"look for a division or a logarithm of zero with holdfast doctor"
        )
    _refuse_flat(name, found, sample)
    return found


def _refuse_flat(name: str, found: Target, sample: Batch) -> None:
    """Raise `UsageError` for a surrogate without a gradient, since examples are computed from gradients."""
    few = next(iter(sample.split(_LOOKED_AT)))
    slope, _ = gradient(found.bare, few, margin_loss)
    if not slope.any():
        raise UsageError(
            f"the surrogate {name} passes no gradient back to any of the first {len(few)} examples, and examples are "
            "made from gradients; take out what cuts them (detach, no_grad, rounding), or name another model"
        )
