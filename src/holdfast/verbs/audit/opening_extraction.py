"""Opens the model, the pools, the guard and the controls of `holdfast audit extraction`."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from holdfast.attacks.suites import is_possible, kind_of_change
from holdfast.audits.audit import AuditRequest, AuditStart, PreparedAudit
from holdfast.audits.extraction_copies import small_copy
from holdfast.audits.extraction_steps import (
    NOISE,
    OTHER,
    OWN,
    SENT,
    Design,
    ExtractionRequest,
    Screen,
    measure,
    refuse_few,
)
from holdfast.audits.finding import Images
from holdfast.core.batch import UNLABELLED, Batch, Data, fingerprints_of
from holdfast.core.draws import Draws
from holdfast.core.errors import NoSplit, Placeholder, Remedy, TargetError, UsageError
from holdfast.core.model import Classifier
from holdfast.core.types import Inputs, Logits, Mask
from holdfast.guard.guard import GuardPipeline
from holdfast.guard.query_rule import derived_key, guard_key
from holdfast.guard.rules import QUERIES, Action, Incoming
from holdfast.guard.state_in_memory import MemoryState
from holdfast.rotation.collecting import with_fresh_weights
from holdfast.runs.assess.request import DescribedModel
from holdfast.runs.assess.served_runs import attach, finish, journaled, served_by
from holdfast.runs.engine.run import Run
from holdfast.runs.harden.attempt_training import refuse_untrainable
from holdfast.settings.groups import ExampleSelection
from holdfast.settings.guard_settings import read_guard_settings
from holdfast.verbs.audit.extraction import AuditExtraction
from holdfast.verbs.audit.opening_ownership import prepared_ownership
from holdfast.verbs.opening import declared, resolve
from holdfast.verbs.opening.arguments import beside
from holdfast.verbs.opening.guard import (
    guard_digest,
    guard_pipeline,
    query_radius,
    query_rule,
    stored_calibration,
)
from holdfast.verbs.opening.plans import device_of

_COMPARED, _SHARE = 2000, 0.2
"""largest number of test examples unless the settings select some, and share of a pool that is used as them"""
_ATTACKED = 250
"""number of test examples that are attacked on the largest copies"""
_GUARDED = 256
"""number of queries that the guard sees at once"""


@contextmanager
def prepared_extraction(settings: AuditExtraction, start: AuditStart) -> Iterator[PreparedAudit]:
    """Open the model and the data of an audit, and yield it."""
    if settings.suspect is not None:
        yield prepared_ownership(settings, start)
        return
    with journaled(start.folder, resume=start.resume, keep=settings.keep_answers):
        opened = _opened(settings)
        model, device = opened.subject.model, torch.device(device_of(settings.device))
        served = served_by(model)
        request = _request(settings, opened, device)
        about = _about(settings, opened, request, str(device))

        def audit(run: Run) -> Images:
            attach(served)
            images = measure(run, model, request)
            if served is not None:
                finish(served)
                run.document(SENT, lambda: {"rows": served.sent.totals.rows.total()})
            return images

        yield PreparedAudit(about, audit)


@dataclass(frozen=True)
class _Opened:
    subject: DescribedModel
    evaluation: Batch
    pools: Mapping[str, Inputs]
    names: Mapping[str, str]
    """names of the pools whose inputs are data"""
    about: Mapping[str, Any]
    """name, digest and number of the data"""
    shared: Mapping[str, int]
    """number of inputs of each pool that are test examples, and were left out"""
    notes: tuple[str, ...]


def _opened(settings: AuditExtraction) -> _Opened:
    subject = resolve.open_seeded(settings.model_copy(update={"guard": None}))
    model = subject.model
    if model.rejects:
        raise UsageError("the model has a detector of its own; audit the network inside")
    if settings.data is None and settings.pool is None:
        raise UsageError(
            "data and pool are missing; give examples to compare copies on (data), or inputs to send (pool)",
            Remedy("pool", Placeholder("DATA")),
        )
    data, own = (None, None) if settings.data is None else _test_examples(settings, model)
    other = None if settings.pool is None else _pool(settings, model, data)
    first = data if data is not None else other
    assert first is not None
    subject = declared.with_found_properties(subject, (), first)
    rng, pools, names = Draws(settings.seed).at("extraction"), dict[str, Inputs](), dict[str, str]()
    if data is not None:
        evaluation = data.read(0, len(data))
        if own is not None and len(own):
            pools[OWN], names[OWN] = own.x, data.name
    if other is not None:
        inputs = other.read(0, len(other))
        if data is None:
            order = rng.at("evaluation").bits(inputs.ids).argsort()
            n = max(1, min(_COMPARED, int(_SHARE * len(inputs))))
            evaluation, inputs = inputs.take(order[:n]), inputs.take(order[n:])
        elif inputs.example_shape != evaluation.example_shape:
            raise UsageError(
                f"the inputs of the pool {other.name} have the shape {inputs.example_shape}, and the examples of "
                f"{data.name} {evaluation.example_shape}; expected inputs of the same shape",
                Remedy("pool"),
            )
        pools[OTHER], names[OTHER] = inputs.x, other.name
    pools, shared = _without(pools, evaluation)
    about = {"name": first.name, "digest": first.digest, "n": len(evaluation)}
    if data is not None and other is not None:
        about["pool"] = {"name": other.name, "digest": other.digest, "n": len(other)}
    return _Opened(
        subject, evaluation, pools, names, about, shared, (*subject.notes, *declared.notes_of(data, other))
    )


def _test_examples(settings: AuditExtraction, model: Classifier) -> tuple[Data, Batch]:
    """The examples on which copies are compared, and those of the same kind that may be sent: the train split, or the
    others. Half of the examples are compared if the others are the only pool.
    """
    everything = resolve.open_examples(settings, model, selection=ExampleSelection())
    train = resolve.open_train_split(settings, model, first=everything, selection=ExampleSelection())
    n = len(everything)
    if train is None and settings.pool is None:
        n = max(1, n // 2)
    usual = ExampleSelection(sample=min(_COMPARED, n))
    data = resolve.open_examples(settings, model, selection=resolve.selection_or(settings, usual))
    if train is not None:
        return data, train.read(0, len(train))
    rest = everything.read(0, len(everything))
    return data, rest.take(~torch.isin(rest.ids, data.read(0, len(data)).ids))


def _pool(settings: AuditExtraction, model: Classifier, first: Data | None) -> Data:
    """The train split of a pool if it has one, which is usually the largest, and otherwise all of it."""
    source = beside(settings, settings.pool)
    properties = declared.expected(settings, model, source, lenient=True, first=first)
    properties = replace(properties, needs_labels=False)
    if isinstance(source.data, str) and source.split is None:
        with suppress(NoSplit):
            train = source.model_copy(update={"split": "train"})
            return resolve.open_beside(settings, train, properties)
    return resolve.open_beside(settings, source, properties)


def _without(pools: Mapping[str, Inputs], evaluation: Batch) -> tuple[dict[str, Inputs], dict[str, int]]:
    """The pools without the inputs of test examples, and how many these are."""
    known, kept, shared = set(evaluation.fingerprints()), dict[str, Inputs](), dict[str, int]()
    for name, x in pools.items():
        unknown = torch.tensor([each not in known for each in fingerprints_of(x)])
        kept[name], shared[name] = x[unknown], int((~unknown).sum())
        if not len(kept[name]):
            raise UsageError(
                f"all {len(x):,} inputs of the pool {name} are test examples, on which copies are compared",
                Remedy("pool", Placeholder("DATA")),
            )
    return kept, shared


def _request(settings: AuditExtraction, opened: _Opened, device: torch.device) -> ExtractionRequest:
    model = opened.subject.model.to(device)
    evaluation, threat = opened.evaluation.to(device), declared.opened_threat(settings)
    if not evaluation.x.is_floating_point() or kind_of_change(threat.constraint) == "text":
        raise UsageError("the inputs are texts, and copies are trained on numbers; audit a model of numbers")
    if model.classes is None:
        with torch.no_grad():
            model.classes = model(evaluation.x[:1]).shape[1]
    budgets = settings.queries
    refuse_few(budgets, model.classes)
    attacked = min(_ATTACKED, len(evaluation))
    if not is_possible("transfer", threat.constraint, "scores") or not threat.constraint.is_ball:
        attacked = 0
    pools = {name: x.to(device) for name, x in opened.pools.items()}
    rows = torch.arange(budgets[-1], device=device)
    low, high = model.bounds.like(evaluation.x)
    noise = Draws(settings.seed).at("extraction", "noise").uniform(rows, *evaluation.example_shape)
    pools[NOISE] = low + (high - low) * noise.to(evaluation.x.dtype)
    labels_only = model.access == "labels"
    design = Design(
        {name: len(x) for name, x in pools.items()},
        budgets,
        model.classes,
        labels_only,
        attacked,
        exact=not labels_only and evaluation.x[0].numel() < budgets[-1],
        guarded=settings.guard is not None,
        remote=model.remote,
    )
    if (evaluation.y == UNLABELLED).any():
        evaluation = evaluation.labelled(torch.full_like(evaluation.y, UNLABELLED))
    screen = None if settings.guard is None else _screen(settings.guard, model)
    fresh = partial(fresh_copy, model, next(iter(pools.values())), model.classes)
    return ExtractionRequest(design, evaluation, pools, fresh, threat, screen, settings.seed)


def is_own_architecture(model: Classifier) -> bool:
    """Return whether the copies have the architecture of the model: that of a network whose weights are known here."""
    try:
        refuse_untrainable(model)
        with_fresh_weights(model, Draws(0), "own")
    except (TargetError, UsageError):
        return False
    return True


def fresh_copy(model: Classifier, x: Inputs, classes: int, rng: Draws) -> Classifier:
    """Return a network with random weights: of the architecture of the model if it is a network, and otherwise a small
    one for inputs like `x` (n, …).
    """
    if is_own_architecture(model):
        return with_fresh_weights(model, rng, "own")
    return small_copy(x, classes, model.bounds, rng)


def _about(
    settings: AuditExtraction, opened: _Opened, request: ExtractionRequest, device: str
) -> AuditRequest:
    design, notes = request.design, list(opened.notes)
    notes += [
        f"{n:,} of the inputs of the pool {name} ({opened.names[name]}) are test examples, and were left out"
        for name, n in opened.shared.items()
        if n
    ]
    about = dict(opened.about)
    if settings.guard is not None:
        about["guard"] = guard_digest(read_guard_settings(Path(settings.guard)))
    return AuditRequest(
        "extraction",
        {
            **vars(design),
            "pools": [
                {
                    "name": name,
                    "n": n,
                    "data": opened.names.get(name, ""),
                    "shared": opened.shared.get(name, 0),
                }
                for name, n in design.pools.items()
            ],
            "budgets": list(design.budgets),
            "threat": str(settings.threat),
            "own_architecture": is_own_architecture(opened.subject.model),
        },
        {**opened.subject.card, "digest": opened.subject.digest},
        about,
        design.steps(),
        seed=settings.seed,
        device=device,
        notes=notes,
    )


def _screen(guard: str, model: Classifier) -> Screen:
    """Return the function that passes a stream of queries through a guard with an empty state.

    Raises `UsageError` for a guard with rules that never fire, because it was not calibrated.
    """
    path = Path(guard)
    settings = read_guard_settings(path)
    calibration = stored_calibration(settings, path)
    key = derived_key(guard_key(path), QUERIES)  # that of the calibration

    def opened() -> GuardPipeline:
        queries = None
        if settings.rules.queries is not None:
            queries = query_rule(
                settings, query_radius(settings.rules.queries, calibration), key, MemoryState()
            )
        return guard_pipeline(settings, queries, calibration)

    if unfitted := opened().unfitted:
        raise UsageError(
            f"the rules {', '.join(unfitted)} of the guard {guard!r} never fire without a calibration; run holdfast "
            "calibrate first"
        )

    def screen(x: Inputs, logits: Logits, keys: int) -> Mapping[str, Mask]:
        names = ("flagged", "stateful", "refused")
        pipeline, masks = opened(), {name: torch.zeros(len(x), dtype=torch.bool) for name in names}
        for start in range(0, len(x), _GUARDED):
            rows = range(start, min(start + _GUARDED, len(x)))
            requests = [Incoming(x[row : row + 1].cpu(), f"key-{row % keys}") for row in rows]
            decisions = pipeline.before_many(requests)
            pairs = zip(rows, decisions, strict=True)
            outputs = [logits[row : row + 1] if decision.answered else None for row, decision in pairs]
            final = pipeline.after_many(decisions, outputs, network=_network(model))
            for row, decision in zip(rows, final, strict=True):
                scores = [score for each in decision.rows for score in each.scores]
                masks["flagged"][row] = any(score.fired for score in scores)
                masks["stateful"][row] = any(score.fired and score.rule == QUERIES for score in scores)
                masks["refused"][row] = not decision.answered or decision.action >= Action.ABSTAIN
        return masks

    return screen


def _network(model: Classifier) -> Callable[[Inputs], Logits]:
    @torch.no_grad()
    def network(x: Inputs) -> Logits:
        logits: Logits = model(x)
        return logits

    return network
