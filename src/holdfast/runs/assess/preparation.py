"""Checks and prepares models, data and threat models for a measurement."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from holdfast.attacks.parts.ascent import gradient
from holdfast.attacks.parts.fast_networks import multiply_adds
from holdfast.attacks.parts.losses import margin_loss
from holdfast.attacks.protocol import Learned
from holdfast.core.batch import UNLABELLED, Batch, Data, off_range
from holdfast.core.chain import canonical, digest
from holdfast.core.constraints import L1, L2, Constraint, Linf, extent
from holdfast.core.errors import OTHER_EXAMPLES, SURROGATE, Remedy, TargetError, UsageError
from holdfast.core.evidence import Columns, Evidence
from holdfast.core.meter import Room
from holdfast.core.model import Bounds, Classifier
from holdfast.core.names import size_text, threat_text
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Inputs, Logits
from holdfast.gates.grammar import Claim
from holdfast.gates.judging import Doubts, judge, refuse_rotation
from holdfast.io.data.data import selected
from holdfast.io.doctor import FILLED, share_filled
from holdfast.io.remote.probing import (
    BYTES,
    before_normalisation,
    extremes,
    outside,
    pixel_divisor,
    range_of_training,
)
from holdfast.runs.assess.certify import refuse_unprovable
from holdfast.runs.assess.request import AssessRequest, DescribedModel
from holdfast.runs.harness.assembly import Context, evidence_from
from holdfast.runs.harness.kinds.passes import MATRIX_ROWS, paired
from holdfast.runs.harness.plan import (
    Plan,
    on_detector,
    refuse_unfitted,
    refuse_what_is_hidden,
    within_budget,
)
from holdfast.runs.harness.stage import Work
from holdfast.runs.harness.target import LOOKED_AT, PreparedModel, base_of, prepared

_PIECE = 1024
"""examples that are read at once to find the range of the labels"""
_WORTH_SHARING = 5_000_000
"""Multiplications for an example above which more threads are faster: between a LeNet and four convolutions without
strides."""


@contextmanager
def enough_threads(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Context manager in which torch uses one thread for a network that is too small to benefit from more.

    For a small network, the synchronisation of threads at every layer costs more than the threads gain, especially on a
    busy machine. The number of threads is restored on exit. If the user set `OMP_NUM_THREADS`, the number is not
    changed.
    """
    small = "OMP_NUM_THREADS" not in os.environ and multiply_adds(model, x) < _WORTH_SHARING
    with threads(1 if small else torch.get_num_threads()):
        yield


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Context manager in which torch uses `n` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def refuse_data(data: Data) -> None:
    """Raise `TargetError` if the data contain no examples."""
    if not len(data):
        raise TargetError(f"{data.name} is empty; at least one example is needed")


def refuse_threat(threat: ThreatModel, bounds: Bounds, x: Tensor, classes: int) -> None:
    """Raise `UsageError` if the threat model is not possible for the model or its inputs.

    For example, eps must not exceed the size of the bounds, and the target class must be a class of the model.
    """
    threat.constraint.refuse_unfit(x)
    eps, farthest = threat.constraint.eps, extent(threat.constraint, x, bounds)
    # The tolerance accepts an eps that is computed from the bounds and rounded.
    if math.isfinite(eps) and eps > farthest * (1 + 1e-6) and not threat.constraint.in_decibels:
        raise UsageError(
            f"eps is {eps:g}, but no two inputs inside the bounds are further apart than {farthest:g} in "
            f"{threat.name}; eps is in the units of the inputs, whose bounds can be declared",
            _smaller_eps(threat, farthest, bounds),
        )
    if threat.goal is not None and not 0 <= threat.goal < classes:
        raise UsageError(
            f"the target class is {threat.goal}, but the model has {classes} classes; give a class from 0 to "
            f"{classes - 1}"
        )


def _smaller_eps(threat: ThreatModel, farthest: float, bounds: Bounds) -> Remedy:
    """Return a threat model with an eps that is possible: the given one divided by 255 if it may be on the scale of
    bytes and the inputs are on that of 0 to 1, or else a fraction of the largest possible one.
    """
    constraint = threat.constraint
    scaled = (
        constraint.in_input_units
        and not threat.unit
        and bounds.width == 1
        and constraint.eps / 255 <= farthest
    )
    largest = max(1.0, farthest // 32) if constraint.counts_changes else farthest * 8 / 255
    eps = constraint.eps / 255 if scaled else largest
    pixels = "px" if constraint.counts_pixels else ""
    change = f"{threat.name}:{size_text(eps, digits=3)}{pixels}"
    text = threat_text(change, threat.goal, threat.access, threat.queries, threat.unit)
    return Remedy("threat", text, reason="(the given eps divided by 255)" if scaled else "")


def small_eps_note(constraint: Constraint, bounds: Bounds, features: int) -> tuple[str, ...]:
    """Return a note for the report if eps is so small that it was probably meant for other bounds: a change of all
    values by the same amount is less than a tenth of an 8-bit pixel step.

    Returns an empty tuple otherwise.
    """
    eps, width = constraint.eps, bounds.width
    divisors: Mapping[type[Constraint], tuple[float, str]] = {
        Linf: (1.0, ""),
        L2: (math.sqrt(features), f", divided by the square root of the {features:,} values of an input,"),
        L1: (float(features), f", divided by the {features:,} values of an input,"),
    }
    divisor, divided = divisors.get(type(constraint), (0.0, ""))
    if not 0 < eps < 0.1 * divisor * width / 255:
        return ()
    step = f"less than a tenth of one step between 256 levels of the bounds, whose width is {width:g}"
    return (f"eps {eps:.3g}{divided} is {step}: check that eps is in the units of the inputs",)


def wide_bounds_note(x: Inputs, bounds: Bounds) -> tuple[str, ...]:
    """Return a note for the report if the inputs `x` fill at most a tenth of the bounds, which were probably meant for
    other inputs. Returns an empty tuple otherwise.
    """
    share, (low, high) = share_filled(x, bounds), extremes(x)
    if not 0 < share <= FILLED:
        return ()
    filled = f"the inputs range from {low:.4g} to {high:.4g}, which is {share:.1%} of the bounds"
    return (
        f"{filled}: check that the bounds are the limits of the inputs and that the inputs are scaled as in training",
    )


def refuse_batch(
    batch: Batch,
    bounds: Bounds,
    classes: int,
    name: str,
    *,
    whole: Data | Batch | None = None,
    remote: bool = False,
    logits: Callable[[Inputs], Logits] | None = None,
) -> None:
    """Raise `TargetError` unless all inputs are floats inside the bounds and all labels are valid classes.

    NaN is a missing value, which is accepted if `logits` returns finite outputs for it. The message contains the range
    of the labels of `whole`, of which the batch is a part. `remote` states whether the model runs on a server.
    """
    x, y = batch.x, batch.y
    if not x.is_floating_point():
        raise TargetError(
            f"the inputs of {name} are {x.dtype}; floats inside the bounds were expected, as x.float() / 255"
        )
    not_finite = ~x.flatten(1).isfinite().all(1)
    if not_finite.any() and (x.isinf().any() or logits is None or not logits(x[not_finite]).isfinite().all()):
        row = int(not_finite.nonzero()[0, 0])
        raise TargetError(
            f"{name} contains NaN or infinity, first in row {int(batch.ids[row])}; replace or remove such rows"
        )
    # normalised data and conversions to float32 leave the bounds by rounding
    if outside(x, bounds).any():
        raise _out_of_range(x, *bounds.like(x), name)
    if len(y) and (int(y.min()) < 0 or int(y.max()) >= classes):
        ends = _range_of_labels(batch if whole is None else whole)
        raise off_range(*ends, classes, name, remote=remote)


def _range_of_labels(data: Data | Batch) -> tuple[int, int]:
    """The smallest and the largest label of all labelled examples."""
    if isinstance(data, Batch):
        labelled = data.y[data.y != UNLABELLED]
        return int(labelled.min()), int(labelled.max())
    pieces = [data.read(start, start + _PIECE).y for start in range(0, len(data), _PIECE)]
    return min(int(y.min()) for y in pieces), max(int(y.max()) for y in pieces)


def _out_of_range(x: Tensor, low: Tensor, high: Tensor, name: str) -> TargetError:
    """Return the error for inputs outside the bounds."""
    lowest, highest = float(x.min()), float(x.max())
    box = f"{float(low.min()):g} to {float(high.max()):g}"
    message = f"the inputs of {name} range from {lowest:.4g} to {highest:.4g}, outside the bounds {box}"
    bounds = range_of_training(lowest, highest)
    if pixel_divisor(lowest, highest, 4) == 255 and float(high.max()) == 1:
        return TargetError(f"{message}; divide them by 255", BYTES)
    if (float(low.min()), float(high.max())) == (0, 1):
        return TargetError(message, before_normalisation(), bounds)
    return TargetError(f"{message}; scale them", bounds)


def refuse_gates(
    claims: Sequence[Claim],
    plan: Plan,
    target: PreparedModel,
    sample: Batch,
    data: Data,
    *,
    paired: bool = False,
) -> None:
    """Raise `UsageError` for a gate whose metric the planned stages do not measure. The message states which setting
    would measure it.

    Gates against a baseline are checked only if the baseline is `paired`, measured by the same plan on the same
    examples. The examples that other runs have in common are known only at the end.
    """
    for claim in claims:
        refuse_rotation(claim)
    checked = [claim for claim in claims if claim.versus is None or (paired and claim.versus == "baseline")]
    if not checked:
        return
    evidence = _as_if_broken(plan, target, sample)
    if getattr(data, "groups", None) is not None:
        evidence = replace(evidence, columns={**evidence.columns, "group": torch.zeros_like(evidence["y"])})
    for claim in checked:
        judge(claim, evidence, Doubts(), baseline=evidence if claim.versus else None)


def _as_if_broken(plan: Plan, target: PreparedModel, sample: Batch) -> Evidence:
    """Evidence with every column of the plan, in which the last attack breaks all correct examples."""
    by_stage: dict[str, Columns] = {}
    for stage in plan.stages():
        work = Work(plan, target, (sample,), Room(len(sample)), by_stage.get("clean", {}))
        by_stage[stage.name] = stage.kind.as_if_broken(stage, work)
    outline = plan.outline(target.classes)
    context = Context({} if target.task is None else {"task": target.task.card()})
    return evidence_from(outline, by_stage, {}, context, randomised=target.randomised)


_SURROGATE_EXAMPLES = 32
"""number of examples on which a surrogate must have at least one nonzero gradient"""


_NO_SURROGATES = Remedy("surrogates", option="--surrogate")


@contextmanager
def readied(
    subject: DescribedModel,
    data: Data,
    device: torch.device,
    *,
    adaptive: bool = False,
    batch_size: int | None = None,
) -> Iterator[tuple[PreparedModel, Batch]]:
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
        enough_threads(base_of(target.original), sample.x),
    ):
        yield target, sample


def model_digest(subject: DescribedModel, target: PreparedModel) -> str:
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
    plan: Plan, stack: ExitStack, surrogates: Sequence[DescribedModel], sample: Batch, target: PreparedModel
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
    ready = tuple(_ready(surrogate, stack, sample, target).optimised for surrogate in surrogates)
    return replace(
        plan, threat=replace(plan.threat, surrogates=ready), matrix=not plan.smallest and not plan.alone
    )


def _ready(
    surrogate: DescribedModel, stack: ExitStack, sample: Batch, target: PreparedModel
) -> PreparedModel:
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


def _refuse_flat(name: str, prepared_surrogate: PreparedModel, sample: Batch) -> None:
    """Raise `UsageError` for a surrogate without a gradient, since examples are computed from gradients."""
    examples = next(iter(sample.split(_SURROGATE_EXAMPLES)))
    input_gradient, _ = gradient(prepared_surrogate.original, examples, margin_loss)
    if not input_gradient.any():
        raise UsageError(
            f"the {name} passes no gradient back to any of the first {len(examples)} examples, and examples "
            "are computed from gradients; remove the operation that stops them (detach, no_grad, rounding), or give "
            "another model"
        )


def with_others(plan: Plan, others: Sequence[Data], sample: Batch, target: PreparedModel) -> Plan:
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
    if not (threat.gives("gradients") and target.original.access == "gradients") and not threat.surrogates:
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
    subject: DescribedModel,
    data: Data,
    request: AssessRequest,
    target: PreparedModel,
    sample: Batch,
    stack: ExitStack,
) -> Plan:
    """Complete the plan of a requested assessment for its model and data, after checking that it can be measured.
    Surrogates remain prepared until `stack` is closed.

    Raises an error for what cannot be measured. Gates are not checked.
    """
    bare = target.original
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
    undivided = [stage.title for stage in plan.stages() if not stage.kind.sharded]
    if request.until is not None and undivided:
        raise UsageError(
            f"until measures the examples in blocks, and the step {undivided[0]} needs all at once",
            Remedy("until"),
        )
    if request.until is not None and plan.baseline is not None:
        raise UsageError(
            "until measures the examples in blocks, and the baseline has stored adversarial examples for all of them",
            Remedy("until"),
        )
    return plan


def learning_examples(plan: Plan, target: PreparedModel, data: Data, fit: Data | None) -> Batch | None:
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
    limits = (target.original.bounds, target.classes, fit.name)
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
