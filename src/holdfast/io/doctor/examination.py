"""Runs the checks of `holdfast doctor` on a model and its data, and a shorter selection of the checks before an
assessment.
"""

from collections.abc import Callable, Iterator

from holdfast.attacks.parts.fast_networks import in_training
from holdfast.core.batch import Batch, Data
from holdfast.core.errors import TargetError, UnclearOutput
from holdfast.core.meter import Room, batch_size_for, in_room
from holdfast.core.model import IN_PLACE, Classifier, evaluating, fitted
from holdfast.io.doctor import behaviour
from holdfast.io.doctor.readings import (
    Examined,
    Finding,
    class_orders,
    labels_from_one,
    layouts,
    outputs_in_batches,
    outputs_of,
    units,
)
from holdfast.io.remote.probing import settle_output, settle_predictions
from holdfast.threats.domains import Domain


def examine(model: Classifier, data: Data, *, domain: Domain | None = None) -> tuple[Finding, ...]:
    """Run all checks of `holdfast doctor` on a model and a data set, and return their findings. The train or eval mode
    of the model is restored. `domain` is that of the inputs if it is known. The values of texts are code points, whose
    range is not checked, and clips have no normalisation of images.

    At most 64 rows are sent to a served model; this number includes the rows that were sent when the data were opened,
    if those were counted. Raises `TargetError` if the model can be run on the data neither in this layout nor with the
    channels last.
    """
    if not len(data):
        raise TargetError(f"{data.name} contains no examples; expected at least one")
    if model.remote:
        return behaviour.examine_served(model, data, domain)
    batch = behaviour.spread_examples(data, behaviour.SAMPLE, model)
    left_in_training = in_training(model)
    room = Room(batch_size_for(batch.x[0].numel(), "cpu"))
    with evaluating(model, frozen=True), fitted(model, batch.x):
        unclear = tuple(_unclear_output(model, data))
        differs = tuple(_predictions(model, data))
        strange = tuple(behaviour.strange_classes(data))

        def found(batch_size: int) -> tuple[Finding, ...]:
            return behaviour.without_estimates(
                _findings(model, batch, left_in_training, data, batch_size, domain)
            )

        findings = () if unclear else in_room(found, room, 0, len(batch))
        if strange:  # these findings already explain wrong labels
            findings = tuple(finding for finding in findings if finding.check != "labels")
        return (*strange, *unclear, *differs, *findings)


def misfit(
    model: Classifier,
    batch: Batch,
    batch_size: int,
    names: tuple[str, ...] | None = None,
    domain: Domain | None = None,
) -> tuple[Finding | None, int]:
    """Return a finding if the data do not fit the model, otherwise None, together with the number of forward passes
    that were made.

    The function checks labels, layout, normalisation, scale and value range, of texts and files only labels. `names`
    are the class names in the order of their numbers, if the labels of the data are names, and `domain` is that of the
    inputs if it is known. The model must be in eval mode, and the inputs inside its bounds. The cost is one forward
    pass for each example if the model is correct on nearly all of them, otherwise about fifteen.
    """
    logits = outputs_in_batches(model, batch.x, batch_size)
    examined = Examined(model, batch, (), logits, batch_size, names=names, domain=domain)
    of_labels = () if model.task is not None else (class_orders, labels_from_one)
    checks = (*of_labels, *(() if _of_symbols(domain) else (layouts, units)))
    problem = next(
        (problem for check in checks for problem in check(examined) if problem.level == "problem"), None
    )
    return problem, len(batch) + sum(examined.calls)


def _of_symbols(domain: Domain | None) -> bool:
    """Return whether inputs are sequences of symbols, which have no layout and no units."""
    return domain is not None and domain.of_symbols


def _unclear_output(model: Classifier, data: Data) -> Iterator[Finding]:
    """Yield a finding if the model has one output per example that may be a logit or a probability."""
    try:
        settle_output(model, data)
    except UnclearOutput as error:
        yield behaviour.unclear_output(error)


def _predictions(model: Classifier, data: Data) -> Iterator[Finding]:
    """Yield a finding if an estimator's largest score belongs to another class than its prediction."""
    for note in settle_predictions(model, data):
        yield Finding(
            "predictions", "warning", note, "if this is not intended, give an estimator without a threshold"
        )


def _findings(
    model: Classifier,
    batch: Batch,
    left_in_training: tuple[str, ...],
    data: Data,
    batch_size: int,
    domain: Domain | None,
) -> Iterator[Finding]:
    wrong_layout = _layout(model, batch)
    if wrong_layout is not None:
        yield wrong_layout
        return
    yield from behaviour.batch_sizes(model)
    if model.rewrites:
        yield Finding("in place", "warning", IN_PLACE, "write x = x - mean in its code instead of x -= mean")
    classes = outputs_of(model, batch.x[:1]).shape[1] - model.rejects
    ends = behaviour.range_of_labels(data, batch)
    if not _of_symbols(domain):
        yield from behaviour.range_of_values(model, batch.x, data)
    yield from behaviour.labels_outside(*ends, classes, remote=model.remote, class_labels=model.class_labels)
    y, rows = behaviour.known_labels(batch.y, classes, ends)
    batch = Batch(behaviour.moved_inside(model, batch.x, batch.x)[rows], y, batch.ids[rows])
    logits, names = outputs_in_batches(model, batch.x, batch_size), behaviour.names_of_labels(data)
    examined = Examined(model, batch, left_in_training, logits, batch_size, names=names, domain=domain)
    for check in _CHECKS:
        if check not in _OF_NUMBERS or not _of_symbols(domain):
            yield from check(examined)


def _layout(model: Classifier, batch: Batch) -> Finding | None:
    """Return a finding if the model rejects the inputs but accepts them with the channels last, else None."""
    try:
        outputs_of(model, batch.x[:2])
    except TargetError as refused:
        if batch.x.dim() != 4:
            raise
        try:
            outputs_of(model, batch.x[:2].permute(0, 2, 3, 1).contiguous())
        except TargetError:
            raise refused from None
        return Finding(
            "layout",
            "problem",
            f"the model refuses inputs of shape {tuple(batch.x.shape[1:])}, but accepts them with the channels last",
            "wrap it so that it permutes its input: x.permute(0, 2, 3, 1)",
        )
    return None


_CHECKS: tuple[Callable[[Examined], Iterator[Finding]], ...] = (
    behaviour.outputs,
    behaviour.label_findings,
    behaviour.accuracy_of,
    units,
    behaviour.steadiness_findings,
    behaviour.gradient_findings,
)
_OF_NUMBERS = (units, behaviour.gradient_findings)
"""Checks whose meaning needs inputs that are numbers."""
