"""The steps of the audit of training data: scores of its examples, and the comparison of a set of examples with the
others.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import gammaln
from torch import Tensor
from torch.nn.functional import cross_entropy

from holdfast.audits.finding import StoredSteps, penultimate
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import Remedy, TargetError, UsageError
from holdfast.core.evidence import Columns
from holdfast.core.model import Classifier
from holdfast.core.types import Ids, Labels, Logits, Mask, PerExample
from holdfast.runs.engine.progress import Notify
from holdfast.runs.engine.run import Run
from holdfast.runs.store.columns import IDS, Form, flag, whole


@dataclass(frozen=True)
class LabelScores:
    """Scores of the labels of examples (n)."""

    loss: PerExample
    """cross-entropy of the label, which is larger for more suspect labels"""
    predicted: Labels
    suspect: Mask
    """whether the label is likely to be wrong"""


def label_scores(logits: Logits, y: Labels) -> LabelScores:
    """Return the scores of the labels `y` (n) from out-of-sample logits (n, classes)."""
    # in float32, so that equal examples have equal losses, whichever instructions computed the last digits
    loss, predicted = cross_entropy(logits, y, reduction="none").float().double(), logits.argmax(1)
    suspect = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    probabilities = logits.softmax(1)
    for label, other, n in _label_errors(probabilities, y):
        rows = (y == label).nonzero()[:, 0]
        margin = probabilities[rows, other] - probabilities[rows, label]
        suspect[rows[margin.argsort(descending=True, stable=True)[:n]]] = True
    return LabelScores(loss, predicted, suspect & (predicted != y))


def _label_errors(probabilities: Tensor, y: Labels) -> list[tuple[int, int, int]]:
    """For pairs of a label and another class, the estimated number of examples with the label whose true class is the
    other one, from the confident joint.
    """
    classes = probabilities.shape[1]
    own = probabilities.gather(1, y[:, None])[:, 0]
    counts = torch.bincount(y, minlength=classes)
    mean_confidence = (
        torch.bincount(y, weights=own, minlength=classes) / counts
    )  # NaN for a class without examples
    above = probabilities >= mean_confidence - 1e-12  # equal confidences have a mean that is rounded
    confident = above.any(1)
    likely = torch.where(above, probabilities, -1.0).argmax(1)
    # only pairs that occur, as a table of all pairs of many classes would not fit into memory
    pairs, joint = torch.unique((y * classes + likely)[confident], return_counts=True)
    label, other = pairs // classes, pairs % classes
    of_label = torch.bincount(label, weights=joint.double(), minlength=classes)
    errors = (joint / of_label[label].clamp(min=1) * counts[label]).round().long()
    rows = torch.stack((label, other, errors), 1)[(label != other) & (errors > 0)]
    return [(a, b, n) for a, b, n in rows.tolist()]


DIRECTIONS = 10
"""number of singular directions of a class"""
FENCE = 3.0
"""an energy is unusual if its logarithm exceeds the median of its class by this many standard deviations, which are
1.4826 times the median absolute deviation"""
SMALLER_SHARE = 0.35
"""largest share of a class of a suspect cluster, as in the paper"""
MIN_SILHOUETTE = 0.5
"""smallest silhouette of suspect clusters. On MNIST with a network of two convolutions, classes with manipulated
examples had 0.63 and others at most 0.42"""
_MOST_ITERATIONS = 100  # of 2-means, which needs about ten


@dataclass(frozen=True)
class FeatureScores:
    """Scores of the examples of one class (n), of which larger ones are more suspect."""

    energy: PerExample
    """squared length of the projection on the top singular directions"""
    clustering: PerExample
    """how much nearer an example is to the centre of the smaller cluster than to that of the larger one"""
    unusual: Mask
    """whether the energy is beyond the fence"""
    clustered: Mask
    """whether an example is in the smaller cluster, if this is small and well separated"""
    share: float
    """share of the smaller cluster"""
    silhouette: float
    """mean silhouette of the clusters, with distances to their centres"""


def feature_scores(features: Tensor, trusted_label: Mask) -> FeatureScores:
    """Return the scores of the examples of one class from their features (n, d). Directions and clusters are those of
    the examples with `trusted_label`; without two of these, all scores are 0.
    """
    n = len(features)
    if int(trusted_label.sum()) < 2:
        zeros, none = features.new_zeros(n), torch.zeros(n, dtype=torch.bool, device=features.device)
        return FeatureScores(zeros, zeros, none, none, 0.0, 0.0)
    centred = features - features[trusted_label].mean(0)
    points = centred @ _directions(centred[trusted_label])
    energy = points.square().sum(1)
    logs = energy.clamp(min=torch.finfo(energy.dtype).tiny).log()
    reference = logs[trusted_label]
    deviation = 1.4826 * (reference - reference.median()).abs().median()
    unusual = logs > reference.median() + FENCE * deviation
    smaller, larger = _centres(points[trusted_label])
    to_smaller, to_larger = (points - smaller).norm(dim=1), (points - larger).norm(dim=1)
    inside = to_smaller < to_larger
    widest = torch.maximum(to_smaller, to_larger)
    silhouettes = (to_smaller - to_larger).abs() / widest.clamp(min=torch.finfo(widest.dtype).tiny)
    share, silhouette = (float(values[trusted_label].double().mean()) for values in (inside, silhouettes))
    suspect = share <= SMALLER_SHARE and silhouette >= MIN_SILHOUETTE
    clustered = inside if suspect else torch.zeros_like(inside)
    return FeatureScores(energy, to_larger - to_smaller, unusual, clustered, share, silhouette)


def _directions(centred: Tensor) -> Tensor:
    """The top singular directions (d, k) of centred features (n, d), from their Gram matrix."""
    vectors: Tensor = torch.linalg.eigh(centred.T @ centred).eigenvectors
    return vectors[:, -DIRECTIONS:]


def _centres(points: Tensor) -> tuple[Tensor, Tensor]:
    """The centres of the smaller and the larger cluster of points (n, k), by 2-means.

    It starts from the two halves of each axis, and the result of the smallest inertia is returned. Without two
    clusters both centres are the mean.
    """
    best, result = float("inf"), (points.mean(0), points.mean(0))
    for axis in range(points.shape[1]):
        second = points[:, axis] > 0
        for _ in range(_MOST_ITERATIONS):
            if bool(second.all()) or not bool(second.any()):
                break
            centres = points[~second].mean(0), points[second].mean(0)
            distances = torch.stack([(points - centre).square().sum(1) for centre in centres])
            inertia = float(distances.min(0).values.sum())
            if inertia < best:
                best, is_first_smaller = inertia, int(second.sum()) * 2 > len(second)
                result = centres if is_first_smaller else centres[::-1]
            moved = distances[1] < distances[0]
            if torch.equal(moved, second):
                break
            second = moved
    return result


LEVEL = 0.01
"""Largest probability that a clean set is flagged, over all classes and scores together."""
FEW = 0.25
"""Largest number of trusted examples, relative to the expected one, that flags a set. A cluster of manipulated examples
has almost no trusted ones, while small differences between sources leave more: the losses of the two splits of
`mnist-mini` had ratios from 0.45."""
DETECTABLE = 0.2
"""Share of manipulated examples of a class that must be detectable for the result `not flagged`."""
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5)
"""Shares of a class, those with the largest scores, in which trusted examples are counted."""
_HALVINGS, _ROUNDING = 40, 1e-6
"""Bisection steps, and the error of the number of examples after them, which has no part in the number."""


@dataclass(frozen=True)
class Tested:
    """The result of the test of one score, in one class or in all."""

    score: str
    label: int | None
    """None for the test of all classes together"""
    examined: int
    """number of examples with the largest scores, for the share with the smallest p-value"""
    trusted: int
    """number of trusted examples among them"""
    expected: float
    """expected number of trusted examples among them in a clean set"""
    p: float
    """p-value after the Bonferroni correction for all shares, classes and scores"""
    excess: int
    """estimated number of examples of the set that a clean set would not have among them"""
    detectable: int | None
    """smallest number of manipulated examples with the largest scores by which the set is expected to be flagged; None
    if there are too few trusted examples"""

    @property
    def flagged(self) -> bool:
        """Whether the set is flagged by this class and score."""
        return self.p <= LEVEL


@dataclass(frozen=True)
class Comparison:
    """The results of all tests."""

    tests: Sequence[Tested]
    detectable: Mapping[int | None, float]
    """the smallest share of the audited examples of each class, and for None of all classes, that is expected to be
    flagged by each score if these examples have the largest ones; 1 if there are too few trusted examples"""
    enough: bool
    """whether the share `DETECTABLE` of each class, its trusted examples included, is flagged by each score"""
    needed: int
    """number of trusted examples of each class with which the share `DETECTABLE` of it is flagged"""

    @property
    def flagged(self) -> list[Tested]:
        """The tests by which the set is flagged, the smallest p-value first."""
        return sorted((test for test in self.tests if test.flagged), key=lambda test: test.p)


def compared(
    scores: Mapping[str, PerExample],
    compares: Mapping[str, Mask],
    y: Labels,
    trusted: Mask,
    *,
    ids: Ids,
    rng: Draws,
) -> Comparison:
    """Compare the scores of the examples that are `trusted` with those of the others, in each class.

    `compares` states for each score which examples are compared. It must not depend on `trusted`, like the scores.
    Examples with equal scores are in random order.
    """
    labels = torch.bincount(y).nonzero()[:, 0].tolist()
    shuffled = rng.at("ties").bits(ids).argsort()
    factor = len(SHARES) * (len(labels) + 1) * len(scores)
    tests, enough = [], True
    for name, values in scores.items():
        ordered = []
        for label in labels:
            rows = shuffled[((y == label) & compares[name])[shuffled]]
            ordered.append(trusted[rows[values[rows].argsort(descending=True, stable=True)]])
            tests.append(_tested(name, label, ordered[-1:], factor))
            smallest = tests[-1].detectable
            enough &= smallest is not None and smallest <= _size(DETECTABLE, len(rows))
        tests.append(_tested(name, None, ordered, factor))
    detectable = {
        label: max(_share(test, y[~trusted]) for test in tests if test.label == label)
        for label in (*labels, None)
    }
    needed = math.ceil(math.log(LEVEL / factor) / math.log(1 - DETECTABLE))
    return Comparison(tests, detectable, enough, needed)


def _share(test: Tested, y: Labels) -> float:
    """The detectable examples of a test as a share of the audited ones, whose labels are `y`."""
    n = len(y) if test.label is None else int((y == test.label).sum())
    return 1.0 if test.detectable is None else min(test.detectable / max(n, 1), 1.0)


def _tested(score: str, label: int | None, ordered: Sequence[Mask], factor: int) -> Tested:
    """The test of some classes, from which examples of each are trusted in the order of their scores."""
    classes = [trusted for trusted in ordered if 0 < int(trusted.sum()) < len(trusted)]
    results = [_counted(score, label, classes, share, factor) for share in SHARES]
    detectable = min((test.detectable for test in results if test.detectable is not None), default=None)
    return replace(min(results, key=lambda test: test.p), detectable=detectable)


def _counted(score: str, label: int | None, classes: Sequence[Mask], share: float, factor: int) -> Tested:
    """The test of the examples with the largest scores, a share of each class. The trusted ones of all classes are
    counted together, and their number is a sum of independent hypergeometric variables.
    """
    examined = counted = 0
    expected = excess = 0.0
    chances, sizes = np.ones(1), []
    for trusted in classes:
        n, n_trusted = len(trusted), int(trusted.sum())
        size = _size(share, n)
        sizes.append((n, n_trusted, size))
        k = int(trusted[:size].sum())
        chances = np.convolve(chances, _hypergeometric(n, n_trusted, size))
        examined, counted, expected = examined + size, counted + k, expected + size * n_trusted / n
        excess += size - k - k * (n - n_trusted) / n_trusted
    tails = np.minimum(1.0, factor * chances.cumsum())
    few = int(FEW * expected)  # largest number of trusted examples that flags a set
    p = float(tails[counted]) if counted <= few else 1.0
    flagging = int((tails[: few + 1] <= LEVEL).sum()) - 1
    detectable = None if flagging < 0 else _detectable(sizes, flagging)
    return Tested(score, label, examined, counted, expected, p, max(0, round(excess)), detectable)


def _detectable(sizes: Sequence[tuple[int, int, int]], flagging: int) -> int:
    """The smallest number of manipulated examples with the largest scores beside which at most `flagging` trusted ones
    are expected among the examined examples. `sizes` are the examples, trusted ones and examined ones of each class,
    and the manipulated examples are the same share of the examined ones of each class.
    """

    def trusted(share: float) -> float:
        """Expected number of trusted examples if a share of the examined examples is manipulated."""
        return sum((1 - share) * size * k / (n - share * size) for n, k, size in sizes)

    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if trusted(middle) <= flagging else (middle, high)
    return math.ceil(high * sum(size for *_, size in sizes) - _ROUNDING)


def _hypergeometric(n: int, n_trusted: int, size: int) -> NDArray[np.float64]:
    """The probability of each number of trusted examples, from 0, among `size` of `n` examples."""
    k = np.arange(min(size, n_trusted) + 1)
    logs = _log_binomial(n_trusted, k) + _log_binomial(n - n_trusted, size - k) - _log_binomial(n, size)
    return np.exp(logs)  # gammaln is infinite where there are fewer untrusted examples than needed


def _log_binomial(n: int, k: NDArray[np.int64] | int) -> NDArray[np.float64]:
    logs: NDArray[np.float64] = gammaln(n + 1) - gammaln(np.add(k, 1)) - gammaln(np.subtract(n + 1, k))
    return logs


def _size(share: float, n: int) -> int:
    return max(1, round(share * n))


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
    """Raise `UsageError` if the audited examples cannot be compared within and between classes: all have the same
    label, or each has a label of its own, as with numbers of examples in place of labels.

    `remedies` are part of the error if all have the same label.
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
