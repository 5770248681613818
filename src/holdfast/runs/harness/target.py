"""The model under test, and the verdict about an attack on a batch: inputs outside the threat model are refused."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from holdfast.attacks.parts.fast_networks import in_training, quickened
from holdfast.attacks.parts.feature_search import Masking, masking
from holdfast.attacks.protocol import Attack, Itemised, ThresholdAttack, searched
from holdfast.certifiers.patch_masks import MaskedVote
from holdfast.certifiers.smoothing import ATTACKED_DRAWS, JUDGING_DRAWS, SmoothedVotes, smoothed_votes
from holdfast.core.batch import Batch, ForBatch, WithMissing, with_missing, without_missing
from holdfast.core.constraints import L0, L1, L2, Constraint, Linf, allowed
from holdfast.core.draws import Draws
from holdfast.core.errors import BudgetSpent, HoldfastError, TargetError, UsageError
from holdfast.core.evidence import Columns
from holdfast.core.gradients import View, instead
from holdfast.core.meter import (
    Answering,
    Metered,
    Spent,
    for_label,
    freed_memory_kept,
    judging,
    margin,
    no_memory,
)
from holdfast.core.model import (
    EVERY,
    IN_PLACE,
    VOTES,
    Classifier,
    Model,
    evaluating,
    fitted,
    out_of_memory,
)
from holdfast.core.outputs import (
    SAME,
    Aim,
    change,
    refuse_inner,
    refused,
    rejected_as_correct,
    score,
    softly_rejected_as_correct,
    with_aim,
)
from holdfast.core.tasks import LEFT, MEASURED, Task
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Ids, Inputs, Labels, Logits, Mask, Outputs, PerExample
from holdfast.threats.transformations import Patch

if TYPE_CHECKING:
    from holdfast.runs.harness.plan import Plan


_T = TypeVar("_T")
LOOKED_AT = 8
"""Number of examples on which the model is inspected before a measurement."""

REJECTS = (
    "the model rejects inputs with a high detector score: an example survives if its clean input is accepted and "
    "classified correctly, and no attacked input is accepted and misclassified; the attacks use network and detector "
    "together"
)
"""Note on a model with a detector that rejects inputs."""


@dataclass(frozen=True)
class WithDetector(ForBatch):
    """Wrapper of a model with a detector, as an ordinary classifier for attacks. An input that the model rejects counts
    as correctly classified.
    """

    aim: Aim = Aim()

    def __call__(self, x: Inputs, ids: Ids | None = None) -> Logits:
        """Return the logits of the classes that attacks use; see `rejected_as_correct`."""
        y = self.at(self.batch.y, ids)
        logits = self.model(x, ids)
        if self.aim == Aim():
            return rejected_as_correct(logits, y)
        aimed = with_aim(logits, self.aim)
        exact = rejected_as_correct(aimed, y)
        if not self.aim.softness:
            return exact
        return instead(exact, softly_rejected_as_correct(aimed, y, self.aim.softness))


@dataclass(frozen=True)
class WithTask(ForBatch):
    """Wrapper of a model with another task than classes, as a classifier of two classes, "correct" and "wrong", for
    attacks.

    The margin is the share of the score that is left, with the gradient of a surrogate loss, so that attacks go on
    until nothing is left. If they search for errors, such as the one with the smallest change, it is positive only
    while the example counts as correct.
    """

    task: Task
    surrogate: str
    errors: bool

    def __call__(self, x: Inputs, ids: Ids | None = None) -> Logits:
        """Return the logits (n, 2) of "correct" and "wrong"."""
        assert self.batch.truth is not None
        truth = self.at(self.batch.truth, ids)
        outputs = self.model(x, ids)
        fixed = outputs.detach()
        height = (self.task.lead if self.errors else self.task.left)(fixed, truth).to(x.dtype)
        if outputs.requires_grad:
            height = instead(height, -self.task.loss(outputs, truth, self.surrogate))
        return torch.stack((height, torch.zeros_like(height)), 1)


@dataclass(frozen=True)
class PreparedModel:
    """The model under test in two versions: `original`, which judges inputs, and an equivalent frozen copy
    `optimised`, which attacks query.

    Adaptive attacks query `view`, which has the same outputs, and gradients that bypass the parts of the model in
    `masking`.
    """

    original: Classifier
    optimised: Model
    view: Model
    randomised: bool
    classes: int
    notes: tuple[str, ...] = ()
    details: tuple[str, ...] = ()
    """notes on how `optimised` was optimised"""
    in_training: tuple[str, ...] = ()
    """names of the dropout and batch norm layers that were in training mode; the model was measured
    in evaluation mode"""
    masking: Masking = Masking()
    aim: Aim = Aim()
    """how attacks treat the detector of a model that rejects inputs"""
    blind: bool = False
    """whether no gradient of the detector's score reaches an input, for example because the score
    is rounded or binary"""
    blind_view: bool = False
    """whether no gradient of the detector's score reaches an input through `view`"""
    surrogate: str = ""
    """loss that attacks maximise on a model with another task than classes; empty for the first one of the task"""
    _kept: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def once(self, name: str, make: Callable[[], _T]) -> _T:
        """Return the result of `make` for a name, which is computed at the first call and kept for all copies of this
        target, such as the traced graph of the model.
        """
        if name not in self._kept:
            self._kept[name] = make()
        kept: _T = self._kept[name]
        return kept

    @property
    def smoothed(self) -> SmoothedVotes | None:
        """Smoothed classifier that is the model under test; None for another model."""
        return smoothed_votes(self.original)

    @property
    def rejects(self) -> bool:
        """Whether the model has an additional last logit for "rejected", which is not one of the `classes`."""
        return self.original.rejects

    def logits(self, x: Inputs) -> Outputs:
        """Return the logits of the original model for the inputs `x`, or the outputs of another task, computed without
        gradients.
        """
        with torch.no_grad(), judging():
            logits: Outputs = self.original(x)
        return logits

    @property
    def task(self) -> Task | None:
        """What the model returns, if it is not one score for each class."""
        return self.original.task

    def queried(self, model: Model, batch: Batch, *, errors: bool = False) -> Model:
        """Return the model that attacks on a batch query. If the model has a detector, a rejected input counts as
        correctly classified. Values that are missing in the batch stay missing, and fixed features do not change.
        `errors` states that attacks search for examples that do not count as correct.
        """
        fixed = self.original.fixed
        if fixed is not None or batch.x.isnan().any():
            model = WithMissing(model, batch, fixed)
        if self.task is not None:
            return WithTask(model, batch, self.task, self.surrogate or self.task.surrogates[0], errors)
        model = Answering(model, batch) if self.original.remote else model
        return WithDetector(model, batch, self.aim) if self.rejects else model

    def judged_logits(self, logits: Tensor, batch: Batch) -> Logits:
        """Return the logits by which an attacked input is judged, from the outputs of the model. An input that the
        model rejects counts as correctly classified. Those of another task than classes are of "correct" and "wrong"
        (n, 2).
        """
        if self.task is not None:
            return self.correct_logits(logits, batch)
        logits = for_label(logits, batch.y) if self.original.remote else logits
        return rejected_as_correct(logits, batch.y) if self.rejects else logits

    def correct_logits(self, outputs: Tensor, batch: Batch) -> Logits:
        """Return the logits by which a clean input is judged: the outputs of a model of classes, and otherwise those of
        "correct" and "wrong" (n, 2).
        """
        if self.task is None:
            return outputs
        assert batch.truth is not None
        lead = self.task.lead(outputs, batch.truth).to(batch.x.dtype)
        return torch.stack((lead, torch.zeros_like(lead)), 1)

    def predicted(self, logits: Logits) -> Labels:
        """Return the predicted class of each input, or -1 if the detector or the server of the model
        rejects the input.
        """
        best = logits[:, : self.classes].argmax(1)
        if self.original.remote:
            best = torch.where(refused(logits), -1, best)
        return torch.where(self.rejected(logits), -1, best) if self.rejects else best

    def rejected(self, logits: Logits) -> Mask:
        """Return the mask of the inputs that the detector of the model rejects."""
        return logits[:, -1] > logits[:, :-1].amax(1)

    @contextmanager
    def repeatable(self, rng: Draws) -> Iterator[None]:
        """Context manager in which a randomised model uses the random numbers of `rng`. The random state of torch is
        restored on exit.
        """
        if not self.randomised:
            yield
            return
        with torch.random.fork_rng():
            torch.manual_seed(rng.key >> 1)
            yield


@contextmanager
def prepared(model: Classifier, sample: Batch, *, adaptive: bool = False) -> Iterator[PreparedModel]:
    """Context manager that puts the model into eval mode, yields it as the target of a measurement, and restores it on
    exit. Inside it, the process keeps freed memory.

    With `adaptive`, the parts of the model are searched for causes of gradient masking.
    """
    left_in_training = in_training(model)
    refuse_inner(model, outermost=model.rejects)
    with freed_memory_kept(), evaluating(model, frozen=True), fitted(base_of(model), sample.x):
        target = _inspected(model, sample, left_in_training)
        yield _with_view(target, sample) if adaptive and model.access == "gradients" else target


def base_of(model: Classifier) -> Classifier:
    """Return the base classifier of a smoothed one, or of a vote over masks; another model is returned unchanged."""
    return model.net.base if isinstance(model.net, SmoothedVotes | MaskedVote) else model


def _inspected(model: Classifier, sample: Batch, left_in_training: tuple[str, ...]) -> PreparedModel:
    base = base_of(model)  # the votes on a base are as random as the base, which is many times cheaper
    state = _generators(sample.x.device)
    logits = _first_logits(base, sample)
    # a model may use its random numbers rarely, for example in every tenth call
    n_calls = 1 if torch.equal(state, _generators(sample.x.device)) else VOTES
    again = (_first_logits(base, sample) for _ in range(n_calls))
    randomised = any(bool((change(logits.flatten(1), each.flatten(1)) > SAME).any()) for each in again)
    quick, details = _attacked(model, sample, randomised=randomised)
    filling = () if base.batches is None or base.batches == EVERY else (base.batches.description,)
    if base.rewrites:
        filling = (*filling, IN_PLACE)
    class_logits = logits[:, :-1] if model.rejects else logits
    notes = (
        *filling,
        *_remarks(class_logits.flatten(1), randomised=randomised),
        *((REJECTS,) if model.rejects else ()),
        *(() if model.task is None else (_task_note(model.task),)),
    )
    blind = model.rejects and model.access == "gradients" and _blind(quick, sample)
    classes = class_logits.shape[1] if model.task is None else 2
    target = PreparedModel(model, quick, quick, randomised, classes, notes, details, left_in_training)
    return replace(target, blind=blind, blind_view=blind)


def _task_note(task: Task) -> str:
    """Note on what accuracy means for a model with another task than classes."""
    return (
        f"the task of the model is {task.name}: accuracy is the share of {task.noun}s that count as correct: "
        f"{task.correct_if}; attacks go on after an {task.noun} is broken, and the metrics of the task are computed "
        f"on the input of each {task.noun} with the lowest score"
    )


def _attacked(model: Classifier, sample: Batch, *, randomised: bool) -> tuple[Model, tuple[str, ...]]:
    """The copy of a model that attacks query, with notes on it."""
    smoothed = smoothed_votes(model)
    if smoothed is not None:
        how = (
            f"attacks query the mean probabilities of {ATTACKED_DRAWS} draws of the noise, and inputs are judged by "
            f"the most frequent class in {JUDGING_DRAWS} others; a query is {ATTACKED_DRAWS} forward passes of the "
            f"base classifier, and a judgement {JUDGING_DRAWS}"
        )
        return smoothed.network(), (how,) if model.access == "gradients" else ()
    if model.task is not None or (base_of(model) is not model and model.access != "gradients"):
        return model, ()  # no attack queries it, and a test of a copy is many forward passes
    # a faster copy is tested by its outputs, which a randomised model does not repeat
    return (model, ()) if randomised else quickened(model, sample.x)


def _blind(model: Model, sample: Batch) -> bool:
    """Whether no gradient of the detector's score reaches the inputs, or points between them and noise.

    A score may be constant at clean inputs or far away from them, so several points are tested.
    """
    noise = Draws(0).at("detector").uniform(sample.ids, *sample.x.shape[1:], dtype=sample.x.dtype)
    for share in (0.0, 0.1, 0.3, 1.0):
        low, high = model.bounds.like(sample.x)
        x = (sample.x + share * (low + noise * (high - low) - sample.x)).requires_grad_()
        try:
            with torch.enable_grad():
                scores = score(model(x))
        except TargetError:  # reported by the first attack that needs a gradient
            return True
        if scores.requires_grad:
            (grad,) = torch.autograd.grad(scores.sum(), x, materialize_grads=True)
            if grad.any():
                return False
    return True


def _with_view(target: PreparedModel, sample: Batch) -> PreparedModel:
    try:
        masked = masking(target.original, sample.x)
    except UsageError:
        raise
    except Exception:  # noqa: BLE001  a network may fail in any way
        note = "the stages of the model cannot be inspected one by one, so adaptive attacks bypass none"
        return replace(target, notes=(*target.notes, note))
    if not masked:
        return target
    view = View(target.original, masked.replacements, masked.steps)
    return replace(target, view=view, masking=masked, blind_view=target.blind and _blind(view, sample))


def _generators(device: torch.device) -> Tensor:
    """States of torch's random generators. A forward pass that changes them is randomised, if only rarely."""
    states = [torch.get_rng_state()]
    return torch.cat([*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states)


def _first_logits(model: Classifier, sample: Batch) -> Outputs:
    try:
        with torch.no_grad():
            logits: Outputs = model(sample.x)
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            raise no_memory(len(sample), error) from error
        raise
    return logits


def _remarks(logits: Logits, *, randomised: bool) -> tuple[str, ...]:
    """Notes on the model that a reader needs before the numbers: constant, NaN or randomised outputs."""
    remarks = []
    n_nan = int(logits.isnan().any(1).sum())
    if n_nan:
        share = f"{n_nan} of the first {len(logits)} examples"
        text = f"the model returns NaN for {share}; these count as wrong predictions"
        remarks.append(f"{text}; look for a division or a logarithm of zero with holdfast doctor")
    elif len(logits) > 1 and bool((logits == logits[0]).all()):
        text = f"the model gives each of {len(logits)} examples the same output, so that there is nothing to attack"
        remarks.append(f"{text}; check its weights and its preprocessing with holdfast doctor")
    if randomised:
        remarks.append(
            f"the outputs of the model are random: an example is broken if most of {VOTES} evaluations are wrong, and "
            f"robust accuracy is the mean share of correct ones over {VOTES} new evaluations; the suite rand attacks "
            "the average of the outputs"
        )
    return tuple(remarks)


LOST = "lost"
"""Name of the column of the gallery with the score that an example lost, for another task than classes."""

GALLERY = 12
"""Largest number of broken examples that are stored for the report."""

NORMS: Mapping[str, Constraint] = {"linf": Linf(), "l2": L2(), "l1": L1(), "l0": L0()}
"""Norms in which distances are measured under all threat models; for `l0`, see `distance_norms`."""

DISTANCES = ("distance", *(f"distance_{norm}" for norm in NORMS))
"""Names of the columns with the size of the change of each example."""


def distance_norms(threat: Constraint) -> Mapping[str, Constraint]:
    """Return the norms in which sizes of changes are measured. For L0, changed pixels are counted if the threat model
    counts pixels, otherwise changed values.
    """
    return {**NORMS, "l0": L0(per="pixel")} if threat.counts_pixels else NORMS


def unattacked(clean: Columns) -> dict[str, Tensor]:
    """Return the columns of an attack for examples that were not attacked. The distance is 0 for a misclassified clean
    input, otherwise infinite.
    """
    n = len(clean["id"])
    zeros = torch.zeros(n, dtype=torch.int64)
    distance = torch.where(clean["correct"], torch.inf, 0.0).float()
    return {
        # copies, because the kinds of stages write results into these columns
        "id": clean["id"].clone(),
        "ran": torch.zeros(n, dtype=torch.bool),
        "success": torch.zeros(n, dtype=torch.bool),
        "prediction": clean["prediction"].clone(),
        "right": clean["right"].clone(),
        "right_fresh": clean["right"].clone(),
        "height": clean["margin"].clone(),
        "distance": distance.clone(),
        **{f"distance_{norm}": distance.clone() for norm in NORMS},
        "queries": zeros.clone(),
        "first_success": zeros.clone(),
        "backwards": zeros.clone(),
        "dead": torch.zeros(n, dtype=torch.bool),
        **{name: values.clone() for name, values in clean.items() if name.startswith(MEASURED)},
    }


def judge_inputs(
    plan: "Plan", target: PreparedModel, batch: Batch, x_adv: Inputs, rng: Draws
) -> dict[str, Tensor]:
    """Judge inputs that were found outside the stages of a plan, for example by probes, and return the results as the
    columns of an attack.
    """
    batch, x_adv = aimed(batch, plan.threat), with_missing(x_adv, batch.x, target.original.fixed)
    x_adv = plan.threat.constraint.as_stored(x_adv, batch.x, target.original.bounds)
    with target.repeatable(rng.at(int(batch.ids[0]))):
        clean = measured_by_task(target, target.logits(batch.x), batch) if target.task is not None else {}
        _, columns = verdict_of(plan, target, batch, x_adv)
        columns |= stored_inputs(
            plan, target, batch, x_adv, columns, batch.ids, clean.get(f"{MEASURED}{LEFT}")
        )
    zeros = torch.zeros_like(batch.ids)
    columns |= {"queries": zeros, "first_success": zeros, "backwards": zeros}
    return {name: values.cpu() for name, values in columns.items()}


def verdict_of(
    plan: "Plan", target: PreparedModel, batch: Batch, x_adv: Inputs
) -> tuple[Logits, dict[str, Tensor]]:
    """Evaluate the original model on attacked inputs, and return its logits and the results as columns, such as
    `success` and the distances.

    `success` is true for a wrong prediction inside the threat model.
    """
    outputs, right, right_fresh = votes(
        target, batch, x_adv, lambda logits: target.judged_logits(logits, batch)
    )
    logits = outputs if target.task is None else target.correct_logits(outputs, batch)
    if target.smoothed is not None:
        right = right_fresh = _unless_shown(target.smoothed, batch, x_adv, right)
    # a tie counts against the model
    wrong, constraint = ~(right > 0.5), plan.threat.constraint
    distance = constraint.distance(x_adv, batch.x)
    infinite = torch.full_like(distance, torch.inf)
    return logits, {
        "id": batch.ids,
        "ran": torch.ones_like(wrong),
        "success": wrong & _allowed(plan.threat, x_adv, batch, target),
        "prediction": target.predicted(logits),
        "right": right,
        "right_fresh": right_fresh,
        "height": margin(target.judged_logits(outputs, batch), batch),
        "distance": torch.where(wrong, distance, infinite).float(),
        **{
            f"distance_{name}": torch.where(wrong, norm.distance(x_adv, batch.x), infinite).float()
            for name, norm in distance_norms(constraint).items()
        },
        **measured_by_task(target, outputs, batch),
    }


def _allowed(threat: ThreatModel, x_adv: Inputs, batch: Batch, target: PreparedModel) -> Mask:
    """The mask of the inputs inside the threat model, also with regard to the objects in the images."""
    constraint = threat.constraint
    inside = allowed(constraint, x_adv, batch.x, target.original.bounds)
    return inside & constraint.in_place(x_adv, batch) if isinstance(constraint, Patch) else inside


def measured_by_task(target: PreparedModel, outputs: Tensor, batch: Batch) -> Mapping[str, Tensor]:
    """Return the columns of a model with another task than classes, from its outputs; none for other models."""
    if target.task is None:
        return {}
    assert batch.truth is not None
    return {
        f"{MEASURED}{name}": values for name, values in target.task.measured(outputs, batch.truth).items()
    }


def _unless_shown(smoothed: SmoothedVotes, batch: Batch, x_adv: Inputs, right: Tensor) -> Tensor:
    """The shares of correct evaluations, in which a smoothed classifier counts as correct unless new draws of the noise
    show that it is wrong.
    """
    rows = (~(right > 0.5)).nonzero()[:, 0]
    shown = smoothed.refuted(batch.take(rows).at(x_adv[rows]))
    right = right.clone()
    right[rows] = (~shown).to(right.dtype)
    return right


def cost_columns(spent: Spent) -> dict[str, Tensor]:
    """Return the cost of an attack as columns: for each example the numbers of queries and of backward passes, and the
    first successful query.
    """
    return {"queries": spent.queries, "first_success": spent.first_success, "backwards": spent.backwards}


def stored_inputs(
    plan: "Plan",
    target: PreparedModel,
    batch: Batch,
    x_adv: Inputs,
    judged: Columns,
    missed: Ids,
    clean: PerExample | None = None,
) -> dict[str, Tensor]:
    """Return the adversarial inputs of an attack that are stored: a few for the report or, if the plan requires it, all
    of them. `judged` are the columns of their verdict, and `missed` the ids of the examples that nothing else broke.

    With another task than classes, `clean` is the score of each clean input. The inputs are then those that lost most
    of it, most first, and those for the report come with the truth and with what the model returned for both inputs.
    If the plan runs only the attacks, all inputs are included, even unsuccessful ones.
    """
    if clean is None:
        stored = shown = (judged["success"] & torch.isin(batch.ids, missed)).nonzero()[:, 0]
    else:
        lost = clean.to(batch.x.device) - judged[f"{MEASURED}{LEFT}"]
        stored = lost.argsort(descending=True, stable=True)
        stored = shown = stored[lost[stored] > 0]  # of the others the clean input is the worst case
    shown = shown[: GALLERY if plan.shown else 0]
    columns = {"gallery.id": batch.ids[shown], "gallery.x": batch.x[shown], "gallery.x_adv": x_adv[shown]}
    if clean is not None and plan.shown:
        assert target.task is not None
        assert batch.truth is not None
        some = shown if len(shown) else lost[:1].argsort()  # models may not accept a batch without inputs
        before, after = (target.task.shown(target.logits(x[some]))[: len(shown)] for x in (batch.x, x_adv))
        columns |= {"gallery.clean": before, "gallery.output": after}
        columns |= {f"gallery.{LOST}": lost[shown], "gallery.truth": batch.truth[shown].to(before.dtype)}
    if plan.keep_adversarial:
        columns |= {"adversarial.id": batch.ids[stored], "adversarial.x": x_adv[stored]}
    if plan.alone:
        columns |= {"adversarial.id": batch.ids, "adversarial.x": x_adv}
    return columns


def aimed(batch: Batch, threat: ThreatModel) -> Batch:
    """Return the batch with the target class of a targeted threat model, or unchanged if the threat model is
    untargeted.
    """
    return batch if threat.goal is None else batch.towards(torch.full_like(batch.y, threat.goal))


def returned(
    attack: Attack, threat: ThreatModel, target: PreparedModel, batch: Batch, rng: Draws
) -> tuple[Inputs, Spent]:
    """Run an attack on a batch, and return the resulting inputs and the cost. Raises `HoldfastError` if an input
    violates the threat model.

    If the query budget of the attack ran out, the inputs are the best ones that it had found before.
    """
    if isinstance(attack, ThresholdAttack):
        attack = _reading(attack, target)
    complete = without_missing(batch, target.original.bounds)
    # labels show no score, but whether an example counts as correct
    errors = threat.constraint.eps == torch.inf or threat.access == "labels"
    queried = target.queried(target.optimised, batch, errors=errors)
    meter = Metered(queried, complete, threat, graded=target.task is not None and not errors)
    items: Mapping[str, Tensor] = {}
    try:
        if isinstance(attack, Itemised):
            (x_adv, items), coordinates = searched(attack.itemised, meter, complete, threat, rng=rng)
        else:
            x_adv, coordinates = searched(attack, meter, complete, threat, rng=rng)
        x_adv = x_adv if coordinates is None else coordinates.inputs(x_adv, batch.ids).detach()
    except BudgetSpent:
        x_adv = meter.adversarial()
    if x_adv.shape != batch.x.shape or x_adv.dtype != batch.x.dtype:
        raise HoldfastError(
            f"{type(attack).__name__} returned {x_adv.dtype} of shape {tuple(x_adv.shape)} for inputs "
            f"{batch.x.dtype} of shape {tuple(batch.x.shape)}; an attack must return inputs of the same type and shape"
        )
    x_adv = with_missing(x_adv, batch.x, target.original.fixed)
    legal = _allowed(threat, x_adv, batch, target)
    if not legal.all():
        worst = int((~legal).nonzero()[0, 0])
        distance = float(threat.constraint.distance(x_adv[worst : worst + 1], batch.x[worst : worst + 1]))
        raise HoldfastError(
            f"{type(attack).__name__} left the threat model on example {int(batch.ids[worst])}: "
            f"distance {distance:.6g}, allowed {threat.constraint.eps:.6g} inside the bounds; "
            f"report it as a bug of the attack"
        )
    return x_adv.detach(), replace(meter.spent, items=items)


def _reading(attack: ThresholdAttack, target: PreparedModel) -> Attack:
    """Return the attack with the thresholds of the model, if it is a tree ensemble whose thresholds can be read."""
    from holdfast.certifiers.tree_reading import has_trees, inner_values

    if not has_trees(target.original):
        return attack
    return attack.reading(target.once("thresholds", lambda: inner_values(target.original)))


def votes(
    target: PreparedModel, batch: Batch, x: Inputs, judged_logits: Callable[[Logits], Tensor]
) -> tuple[Outputs, Tensor, Tensor]:
    """Return the logits of the original model, and two independent estimates of the fraction of forward passes in which
    each input is classified correctly.

    The second fraction is computed from new votes. `judged_logits` computes the logits that are judged. A deterministic
    model is evaluated once. Ties and NaN count as wrong.
    """

    def is_correct(logits: Logits) -> Mask:
        return margin(judged_logits(logits), batch) > 0

    logits = target.logits(x)
    if not target.randomised:
        right = is_correct(logits).float()
        return logits, right, right

    def share() -> Tensor:
        return torch.stack([is_correct(target.logits(x)).double() for _ in range(VOTES)]).mean(0)

    # the worst case is chosen by the first estimate, so that only the second one is unbiased for it
    return logits, share(), share()


def digests(batch: Batch) -> Tensor:
    """Return the SHA-256 of each example's input and label or truth, (n, 32) uint8, by which comparisons of runs
    pair examples.
    """
    labels = [label.to_bytes(8, "little", signed=True) for label in batch.y.tolist()]
    if batch.truth is not None:
        labels = [truth.contiguous().numpy().tobytes() for truth in batch.truth.cpu()]
    rows = zip(batch.x.detach().cpu().contiguous().flatten(1).numpy(), labels, strict=True)
    digests = b"".join(hashlib.sha256(row.tobytes() + label).digest() for row, label in rows)
    return torch.frombuffer(bytearray(digests), dtype=torch.uint8).view(-1, 32)
