"""The steps of the audit of training data: cross-fitted networks, one network that is trained on all examples, and the
scores of each example.

The score of the lowest losses is that of Li et al., "Anti-backdoor learning", NeurIPS 2021, arXiv:2110.11571. Differs
from the paper: the loss is that of the network after the training, without gradient ascent on low losses. With it the
1 % lowest losses on MNIST contained fewer manipulated examples (0.00 against 0.22 for a stamp on 1 %).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from holdfast.audits.features import penultimate
from holdfast.audits.finding import StoredSteps
from holdfast.audits.poison.comparison import Comparison, Tested, compared
from holdfast.audits.poison.scores import LabelScores, feature_scores, label_scores
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.evidence import Columns
from holdfast.core.model import Classifier
from holdfast.core.remedies import Remedy
from holdfast.core.types import Ids, Labels, Logits, Mask, PerExample
from holdfast.runs.engine.progress import Notify
from holdfast.runs.engine.run import Run
from holdfast.runs.store.columns import IDS, Form, flag, whole

EPOCHS = 4
"""number of epochs of each network, after which manipulated examples differ most and labels are not memorised"""
FOLDS = 3
"""number of networks that are trained without a part of the examples"""
METHODS = ("energy", "clustering", "labels", "loss")
"""names of the methods, each with its own score"""
LOWEST = 0.01
"""share of the examples that lowest-loss isolation flags in any set, as in the paper"""

Train = Callable[[Batch, Draws], Classifier]
"""function that trains a network with fresh weights on examples"""


EXAMPLES, SCORES = "examples", "scores"
"""names of the stages with the labels of the examples, and with their scores by the network that is trained on all"""


@dataclass(frozen=True)
class PoisonRequest:
    """The examples of an audit of training data, and its settings."""

    batch: Batch
    """the examples that are audited, followed by the trusted ones"""
    n_trusted: int
    """number of trusted examples; 0 for none"""
    seed: int = 0

    @property
    def n(self) -> int:
        """Number of examples that are audited."""
        return len(self.batch) - self.n_trusted

    @property
    def rng(self) -> Draws:
        """Random numbers of the audit."""
        return Draws(self.seed).at("poison")

    def steps(self) -> tuple[str, ...]:
        """Return the names of the steps, in their order."""
        return (EXAMPLES, *(f"fold-{fold}" for fold in range(FOLDS)), SCORES)


@dataclass(frozen=True)
class Examples:
    """The audited examples, followed by the trusted ones, without their inputs."""

    ids: Ids
    y: Labels
    n_trusted: int

    @property
    def n(self) -> int:
        """Number of examples that are audited."""
        return len(self.ids) - self.n_trusted

    @property
    def trusted(self) -> Mask:
        """Whether each example is trusted."""
        return torch.arange(len(self.ids)) >= self.n


@dataclass(frozen=True)
class Scored:
    """The scores of the audited examples, of which larger ones are more suspect, and the comparison of the set."""

    examples: Examples
    scores: dict[str, PerExample]
    """scores of all examples, by method"""
    flags: dict[str, Mask]
    """whether a method flags each example"""
    predicted: Tensor
    """class that a network predicts which was not trained on the example"""
    share: PerExample
    """share of the smaller cluster of the class of each example"""
    silhouette: PerExample
    """silhouette of the clusters of the class of each example"""
    comparison: Comparison | None
    """None without trusted examples"""
    of_features: Sequence[Tested] = ()
    """if the set is flagged, the significant tests of scores of features among the examples whose label is predicted by
    a network that was not trained on them. Wrong labels have unusual features, and are not among these examples"""

    @property
    def n_methods(self) -> Tensor:
        """The number of methods that flag each audited example; 0 if it is only lowest-loss isolation, which flags a
        share of any set.
        """
        flags = torch.stack([self.flags[name][: self.examples.n] for name in METHODS])
        return torch.where(flags[: METHODS.index("loss")].any(0), flags.sum(0), 0)

    @property
    def contradicted(self) -> Mask:
        """Whether the label of each audited example is not the class that a network predicts which was not trained on
        it.
        """
        return (self.predicted != self.examples.y)[: self.examples.n]


def refuse_unscorable(batch: Batch, *remedies: Remedy) -> None:
    """Raise `UsageError` if the labels of the audited examples do not form classes. `remedies` are those for a single
    class.
    """
    counts = torch.bincount(batch.y)
    if int((counts > 0).sum()) < 2:
        raise UsageError(
            f"all {len(batch)} examples have the label {int(batch.y[0])}; a network learns nothing from one class, so "
            "give all classes of the training data",
            *remedies,
        )
    if int(counts.max()) == 1:
        raise UsageError(
            f"each of the {len(batch)} examples has a label of its own; the methods compare examples of the same "
            "class, so give labels of classes, and not numbers of examples"
        )


def with_trusted(batch: Batch, trusted: Batch, *remedies: Remedy) -> PoisonRequest:
    """Return the request for examples beside trusted ones. Audited examples that are trusted themselves are left out.

    Raises `UsageError` if the trusted examples have other classes, for which `remedies` are further ones, or another
    shape.
    """
    if batch.example_shape != trusted.example_shape:
        raise UsageError(
            f"the trusted examples have shape {trusted.example_shape} and the audited ones {batch.example_shape}; give "
            "trusted examples of the same shape",
            Remedy("clean"),
        )
    differing = {*batch.y.tolist()} ^ {*trusted.y.tolist()}
    if differing:
        listed = ", ".join(map(str, sorted(differing)))
        raise UsageError(
            f"the audited and the trusted examples must have the same classes, and only one of them has examples of "
            f"{listed}; give trusted examples of the same classes",
            *remedies,
            Remedy("clean"),
        )
    known = {*zip(trusted.fingerprints(), trusted.y.tolist(), strict=True)}
    audited = zip(batch.fingerprints(), batch.y.tolist(), strict=True)
    kept = torch.tensor([pair not in known for pair in audited], device=batch.y.device)
    if not bool(kept.any()):
        raise UsageError(
            "all examples are among the trusted ones, so there is nothing to audit", Remedy("clean")
        )
    batch = batch.take(kept)
    ids = torch.cat((batch.ids, trusted.ids + batch.ids.max() + 1))  # unique, as draws need
    both = Batch(torch.cat((batch.x, trusted.x.to(batch.x))), torch.cat((batch.y, trusted.y)), ids)
    return PoisonRequest(both, len(trusted))


def measure(run: Run, request: PoisonRequest, train: Train, notify: Notify) -> None:
    """Take the steps of the audit that are not stored in the run.

    Cost: four trainings, three of them on two thirds of the examples.
    """
    batch, rng = request.batch, request.rng
    ids = batch.ids.cpu()
    run.stage(
        EXAMPLES, lambda: {"id": ids, "label": batch.y.cpu(), "trusted": torch.arange(len(ids)) >= request.n}
    )
    fold_of = folds(ids, rng).to(batch.ids.device)

    def left_out(fold: int) -> Columns:
        notify(f"training network {fold + 1} of {FOLDS + 1}, without a third of the examples")
        rows = fold_of == fold
        model = train(batch.take(~rows), rng.at("fold", fold))
        _, logits = penultimate(model, batch.take(rows).x)
        return {"id": batch.ids[rows].cpu(), "logits": _finite(logits)}

    parts = [run.stage(f"fold-{fold}", partial(left_out, fold)).columns["logits"] for fold in range(FOLDS)]
    labels = label_scores(_in_order(parts, fold_of.cpu()), batch.y.cpu())

    def all_scores() -> Columns:
        notify(f"training network {FOLDS + 1} of {FOLDS + 1}, on all examples")
        return _columns(batch, train(batch, rng.at("all")), ~labels.suspect)

    run.stage(SCORES, all_scores)


def folds(ids: Ids, rng: Draws) -> Tensor:
    """Return the fold of each example, in which the network is not trained on it."""
    order = rng.at("fold").bits(ids).argsort(stable=True)
    fold_of = torch.empty_like(order)
    fold_of[order] = torch.arange(len(order)) % FOLDS
    return fold_of


def scored(steps: StoredSteps) -> Scored:
    """Return the scores of the stored steps of an audit. Raises `TargetError` if they contradict each other."""
    stored = steps.columns(EXAMPLES, {"id": IDS, "label": whole("n"), "trusted": flag("n")})
    examples = Examples(stored["id"], stored["label"], int(stored["trusted"].sum()))
    n, rng = len(examples.ids), steps.rng("poison")
    if not torch.equal(examples.trusted, stored["trusted"] == 1) or not examples.n:
        raise steps.refuse(
            EXAMPLES, "trusted examples at other places", "audited examples followed by trusted ones"
        )
    fold_of, parts = folds(examples.ids, rng), list[Tensor]()
    for fold in range(FOLDS):
        ids = examples.ids[fold_of == fold]
        columns = steps.columns(f"fold-{fold}", {"id": IDS, "logits": Form(("n", "classes"))}, n=len(ids))
        if not torch.equal(columns["id"], ids):
            raise steps.refuse(f"fold-{fold}", "other ids", "those of the fold")
        parts.append(columns["logits"])
    classes = {part.shape[1] for part in parts}
    if len(classes) > 1 or int(examples.y.max()) >= min(classes):
        raise steps.refuse(
            EXAMPLES, f"labels up to {int(examples.y.max())}", f"the classes of {sorted(classes)} logits"
        )
    labels = label_scores(_in_order(parts, fold_of), examples.y)
    return _judged(examples, labels, steps.columns(SCORES, _FORMS, n=n), rng)


_FORMS = {
    **{name: Form() for name in ("loss", "energy", "clustering", "share", "silhouette")},
    "unusual": flag("n"),
    "clustered": flag("n"),
}


def _in_order(parts: Sequence[Tensor], fold_of: Tensor) -> Logits:
    """The logits of all examples from those of the folds."""
    logits = torch.empty(len(fold_of), parts[0].shape[1], dtype=torch.float64)
    for fold, part in enumerate(parts):
        logits[fold_of == fold] = part
    return logits


def _finite(logits: Logits) -> Logits:
    if not logits.isfinite().all():
        raise TargetError(
            "the trained network returns values that are not finite, so that examples cannot be scored; expected a "
            "training that converges"
        )
    return logits


def _columns(batch: Batch, model: Classifier, trusted_label: Mask) -> Columns:
    """The scores by the features and the losses of the network that was trained on all examples."""
    (features, logits), y = penultimate(model, batch.x), batch.y.cpu()
    _finite(logits)
    columns = {
        name: torch.zeros(len(batch), dtype=torch.bool if name in ("unusual", "clustered") else torch.float64)
        for name in ("energy", "clustering", "share", "silhouette", "unusual", "clustered")
    }
    for label in torch.bincount(y).nonzero()[:, 0].tolist():
        rows = y == label
        result = feature_scores(features[rows], trusted_label[rows])
        for name, column in columns.items():
            column[rows] = torch.as_tensor(getattr(result, name), dtype=column.dtype)
    loss = cross_entropy(logits, y, reduction="none")
    return {"id": batch.ids.cpu(), "loss": loss, **columns}


def _judged(examples: Examples, labels: LabelScores, columns: Columns, rng: Draws) -> Scored:
    """Apply the rules for examples, and compare the set with the trusted examples. Where a score differs from that of
    the trusted ones, the examples that are too many are flagged as well.
    """
    loss, n, everything = columns["loss"], examples.n, torch.ones(len(examples.ids), dtype=torch.bool)
    lowest = torch.zeros(len(loss), dtype=torch.bool)
    lowest[loss[:n].argsort(stable=True)[: max(1, round(LOWEST * n))]] = True
    scores = {
        "energy": columns["energy"],
        "clustering": columns["clustering"],
        "labels": labels.loss,
        "loss": -loss,
    }
    rules = (columns["unusual"] == 1, columns["clustered"] == 1, labels.suspect, lowest)
    flags = {name: flagged.clone() for name, flagged in zip(METHODS, rules, strict=True)}
    comparison, of_features = None, list[Tested]()
    if examples.n_trusted:
        # wrong labels alone must not look like manipulated inputs
        compares = {name: everything if name == "labels" else ~labels.suspect for name in METHODS}
        y, trusted = examples.y, examples.trusted
        comparison = compared(scores, compares, y, trusted, ids=examples.ids, rng=rng)
        for test in comparison.flagged:
            in_class = everything if test.label is None else y == test.label
            rows = (in_class & compares[test.score] & ~trusted).nonzero()[:, 0]
            order = scores[test.score][rows].argsort(descending=True, stable=True)
            flags[test.score][rows[order[: test.excess]]] = True
        if comparison.flagged:
            features = {name: values for name, values in scores.items() if name != "labels"}
            compares = dict.fromkeys(features, labels.predicted == y)
            of_features = compared(features, compares, y, trusted, ids=examples.ids, rng=rng).flagged
    return Scored(
        examples,
        scores,
        flags,
        labels.predicted,
        columns["share"],
        columns["silhouette"],
        comparison,
        of_features,
    )
