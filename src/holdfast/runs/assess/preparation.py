"""Prepares models and data for a measurement: moves the model to its device, and prepares surrogates and further data
sets.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch

from holdfast.attacks.parts.ascent import gradient
from holdfast.attacks.parts.losses import margin_loss
from holdfast.attacks.protocol import Learned
from holdfast.core.batch import Batch, Data
from holdfast.core.chain import canonical, digest
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Classifier
from holdfast.core.remedies import OTHER_EXAMPLES, SURROGATE, Remedy
from holdfast.io.data.selection import selected
from holdfast.runs.assess.certify import refuse_unprovable
from holdfast.runs.assess.checks import enough_threads, refuse_batch, refuse_data, refuse_threat
from holdfast.runs.assess.request import AssessRequest, Subject
from holdfast.runs.harness import (
    LOOKED_AT,
    MATRIX_ROWS,
    Plan,
    Target,
    on_detector,
    paired,
    prepared,
    refuse_unfitted,
    refuse_what_is_hidden,
    within_budget,
)
from holdfast.runs.harness.target import base_of

_SURROGATE_EXAMPLES = 32
"""number of examples on which a surrogate must have at least one nonzero gradient"""


_NO_SURROGATES = Remedy("surrogates", option="--surrogate")


@contextmanager
def readied(
    subject: Subject,
    data: Data,
    device: torch.device,
    *,
    adaptive: bool = False,
    batch_size: int | None = None,
) -> Iterator[tuple[Target, Batch]]:
    """Context manager that prepares the attacked model on its device, and restores the model on exit.

    Yields the prepared model and the examples with which it was inspected, at most `batch_size`. With `adaptive`, parts
    of the model that hide the gradient are detected as well.
    """
    # a server has a limit of its own on the rows of a request
    most = LOOKED_AT if batch_size is None or subject.model.remote else batch_size
    sample = data.read(0, min(LOOKED_AT, most, len(data))).to(device)
    with (
        placed(subject.model, device),
        prepared(subject.model, sample, adaptive=adaptive) as target,
        enough_threads(base_of(target.bare), sample.x),
    ):
        yield target, sample


def model_digest(subject: Subject, target: Target) -> str:
    """Return the SHA-256 that identifies the attacked model in the manifest of a run, in hex."""
    return digest(canonical([subject.digest, target.randomised]))


@contextmanager
def placed(model: Classifier, device: torch.device) -> Iterator[None]:
    """Context manager that moves a model to a device, and back on exit."""
    parameter = next(model.parameters(), None)
    old_device = parameter.device if parameter is not None else device
    model.to(device)
    try:
        yield
    finally:
        model.to(old_device)


def with_surrogates(
    plan: Plan, stack: ExitStack, surrogates: Sequence[Subject], sample: Batch, target: Target
) -> Plan:
    """Add the surrogate models of the attacker to the plan of an assessment. They remain prepared until `stack` is
    closed.

    Raises `UsageError` or `TargetError` if the threat model does not allow surrogates or a surrogate does not fit the
    model.
    """
    if not surrogates:
        return plan
    why = plan.threat.constraint.without_surrogates()
    if why:
        raise UsageError(f"surrogates are not used {why}", _NO_SURROGATES)
    ready = tuple(_ready(surrogate, stack, sample, target).quick for surrogate in surrogates)
    return replace(
        plan, threat=replace(plan.threat, surrogates=ready), matrix=not plan.smallest and not plan.alone
    )


def _ready(surrogate: Subject, stack: ExitStack, sample: Batch, target: Target) -> Target:
    role = "member" if surrogate.card.get("member") else "surrogate"
    name = f"{role} {surrogate.card.get('name', '')}"
    if surrogate.model.access != "gradients":
        raise UsageError(
            f"the {name} gives only {surrogate.model.access}, but examples are computed from gradients; "
            "give a model that torch can differentiate"
        )
    stack.enter_context(placed(surrogate.model, sample.x.device))
    try:
        prepared_surrogate = stack.enter_context(prepared(surrogate.model, sample))
    except TargetError as error:
        shape = tuple(sample.x.shape[1:])
        raise TargetError(
            f"the {name} does not accept the inputs of the model, of shape {shape}: {error.message}"
        ) from error
    if prepared_surrogate.classes != target.classes:
        raise TargetError(
            f"the {name} has {prepared_surrogate.classes} classes, but the model has {target.classes}; "
            "give one that was trained on the same classes"
        )
    if prepared_surrogate.rejects:
        raise UsageError(
            f"the {name} has a detector that rejects inputs, but examples are computed on a network without "
            "a detector; give the network without its detector"
        )
    if prepared_surrogate.randomised:
        raise UsageError(
            f"the {name} is randomised, so its examples could not be reproduced; "
            "wrap it in a factory that fixes its random numbers"
        )
    n_nan = int(prepared_surrogate.logits(sample.x).isnan().any(1).sum())
    if n_nan:
        raise TargetError(
            f"the {name} returns NaN for {n_nan} of the first {len(sample)} examples, from which no example "
            "can be computed; look for a division or a logarithm of zero with holdfast doctor"
        )
    _refuse_flat(name, prepared_surrogate, sample)
    return prepared_surrogate


def _refuse_flat(name: str, prepared_surrogate: Target, sample: Batch) -> None:
    """Raise `UsageError` for a surrogate without a gradient, since examples are computed from gradients."""
    examples = next(iter(sample.split(_SURROGATE_EXAMPLES)))
    input_gradient, _ = gradient(prepared_surrogate.bare, examples, margin_loss)
    if not input_gradient.any():
        raise UsageError(
            f"the {name} passes no gradient back to any of the first {len(examples)} examples, and examples "
            "are computed from gradients; remove the operation that stops them (detach, no_grad, rounding), or give "
            "another model"
        )


def with_others(plan: Plan, others: Sequence[Data], sample: Batch, target: Target) -> Plan:
    """Add a stage to the plan of an assessment that transfers perturbations between the data of the run and the data
    sets `others`.

    `sample` are examples of the run. Raises `UsageError` if the threat model, the model or the data do not allow it.
    """
    if not others:
        return plan
    threat = plan.threat
    if not threat.constraint.is_ball or threat.constraint.eps == float("inf"):
        raise UsageError(
            "the transfer between data sets needs a threat model with a norm and a finite eps",
            Remedy("threat", threat.with_change("linf:8/255")),
            Remedy("across"),
        )
    if threat.goal is not None:
        raise UsageError(
            "perturbations for the transfer between data sets lead away from the prediction, and not to a target "
            f"class; leave goal=targeted:{threat.goal} out of the threat",
            Remedy("across"),
        )
    if not (threat.gives("gradients") and target.bare.access == "gradients") and not threat.surrogates:
        raise UsageError(
            "perturbations for the transfer between data sets are computed from gradients, but the model has none",
            replace(SURROGATE, reason="for a model that has some"),
            Remedy("across"),
        )
    shape = tuple(sample.x.shape[1:])
    for dataset in others:
        refuse_data(dataset)
        shape_of_dataset = tuple(dataset.read(0, 1).x.shape[1:])
        if shape_of_dataset != shape:
            raise UsageError(
                f"inputs of {dataset.name} have shape {shape_of_dataset}; those of the run have shape {shape}: data of "
                "the same shape were expected"
            )
    return replace(plan, across=True)


def plan_for(
    subject: Subject, data: Data, request: AssessRequest, target: Target, sample: Batch, stack: ExitStack
) -> Plan:
    """Complete the plan of a requested assessment for its model and data, after checking that it can be measured.
    Surrogates remain prepared until `stack` is closed.

    Raises an error for what cannot be measured. Gates are not checked.
    """
    bare = target.bare
    given = request.plan.threat
    threat = replace(given, constraint=given.constraint.in_bounds(bare.bounds))
    request = replace(request, plan=replace(request.plan, threat=threat))
    limits = (bare.bounds, target.classes, data.name)
    refuse_batch(sample, *limits, whole=data, remote=bare.remote, logits=target.logits)
    if target.rejects and threat.constraint.drawn_at_random:
        raise UsageError(
            "common corruptions are drawn at random and not chosen against a detector, but this model has one; "
            "measure the network without its detector",
            Remedy("threat", "linf:8/255"),
        )
    refuse_threat(threat, bare.bounds, sample.x, target.classes)
    plan = with_surrogates(request.plan, stack, request.surrogates, sample, target)
    plan = with_others(plan, request.across, sample, target)
    plan = refuse_what_is_hidden(plan, subject.model.access, subject.model.hides)
    plan = within_budget(on_detector(plan, rejects=target.rejects), randomised=target.randomised)
    refuse_unfitted(plan, fit=request.fit is not None)
    refuse_unprovable(plan, target, sample, request.verb)
    return plan


def learning_examples(plan: Plan, target: Target, data: Data, fit: Data | None) -> Batch | None:
    """Return the examples on which learned attacks are fitted, as many as the attack that needs the most examples.

    Returns None if no attack is learned or `fit` is None. Raises `UsageError` if their shape is not that of `data`.
    """
    sizes = [m.attack.examples for m in plan.members if isinstance(m.attack, Learned)]
    if not sizes or fit is None:
        return None
    batch, shape = fit.read(0, min(max(sizes), len(fit))), data.read(0, 1).x.shape[1:]
    if batch.x.shape[1:] != shape:
        raise UsageError(
            f"inputs of {fit.name}, on which attacks are learned, have shape {tuple(batch.x.shape[1:])}, but "
            f"those of {data.name} have shape {tuple(shape)}",
            replace(OTHER_EXAMPLES, reason="for examples of the same kind"),
        )
    limits = (target.bare.bounds, target.classes, fit.name)
    refuse_batch(batch, *limits, whole=fit, logits=target.logits)
    return _typed(batch, data)


def paired_sets(plan: Plan, data: Data, others: Sequence[Data]) -> tuple[Batch, ...]:
    """Return random samples of equal size from all data sets between which perturbations are transferred, with their
    inputs in the order of the pairs.
    """
    if not plan.across:
        return ()
    sets, seed = (data, *others), plan.seed
    n = min(MATRIX_ROWS, *map(len, sets))
    samples = (selected(dataset, n=None, sample=n, seed=seed).read(0, n) for dataset in sets)
    return tuple(paired(_typed(batch, data), seed, place) for place, batch in enumerate(samples))


def _typed(batch: Batch, data: Data) -> Batch:
    """Inputs of other data, converted to the data type of those of the run."""
    return batch.at(batch.x.to(data.read(0, 1).x.dtype))
