"""Training examples that are near an input, and those that support a wrong prediction.

Pruthi, Liu, Kale & Sundararajan, "Estimating training data influence by tracing gradient descent", NeurIPS 2020,
arXiv:2002.08484, for TracIn. Differs from the paper: only the gradients of the last linear layer are used, as in its
section on scaling, and all checkpoints have the same learning rate.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.attacks.parts.images import inner
from holdfast.audits.features import penultimate
from holdfast.core.batch import Batch
from holdfast.core.model import Classifier
from holdfast.core.types import Inputs, Labels
from holdfast.explanation.case import About, picture
from holdfast.explanation.explained import Cell, Figure
from holdfast.reports.tree import Picture
from holdfast.reports.words import amount
from holdfast.runs.harness.target import Target
from holdfast.threats.domains import is_image

Checkpoint = Classifier
"""the model with the weights of one epoch of its training"""
_NEAREST = 3
_SUPPORTING = 5


def features(model: Classifier, x: Inputs) -> tuple[Tensor, str]:
    """Return the features (n, d) in which inputs are compared, and their name: those before the last layer of a
    network, or the inputs themselves.
    """
    if any(True for _ in model.parameters()) and model.access == "gradients":
        return penultimate(inner(model), x)[0], "the features before the last layer"
    return x.flatten(1).double().nan_to_num(0), "the inputs"


def neighbour_figure(target: Target, x: Inputs, x_adv: Inputs | None, train: Batch, about: About) -> Figure:
    """Return the nearest training examples of the clean input, and of the changed one if there is one."""
    of_train, name = features(target.bare, train.x)
    pictures: list[Picture] = []
    rows: list[tuple[Cell, ...]] = []
    labels: dict[str, list[str]] = {}
    points = {"the input": x} | ({} if x_adv is None else {"the changed input": x_adv})
    for kind, point in points.items():
        distances = torch.cdist(features(target.bare, point)[0], of_train)[0]
        for row in distances.argsort(stable=True)[:_NEAREST].tolist():
            label = about.called(int(train.y[row]))
            labels.setdefault(kind, []).append(label)
            rows.append((kind, int(train.ids[row]), label, float(distances[row])))
            if is_image(x.shape[1:]):
                caption = f"near {kind}: training example {int(train.ids[row])}, label {label}"
                pictures.append(picture(train.x[row], caption, target.bare))
    named = [", ".join(dict.fromkeys(each)) for each in labels.values()]
    before, after = named[0], named[-1]
    if x_adv is None:
        when = before
    elif before == after:
        when = f"{before} before and after the change"
    else:
        when = f"{before} before the change, and {after} after it"
    moved = x_adv is not None and set(labels["the input"]).isdisjoint(labels["the changed input"])
    reason = (
        f"In {name}, the changed input is near training examples with the label {after}." if moved else ""
    )
    text = f"Distances are Euclidean in {name}; {amount(len(train), 'training examples')} were compared."
    headings = ("near", "training example", "label", "distance")
    return Figure(
        "neighbours",
        f"The nearest training examples have the label {when}",
        text,
        headings,
        tuple(rows),
        tuple(pictures),
        tabular=True,
        note=text,
        reason=reason,
        columns=_NEAREST,
    )


def tracin(models: Sequence[Classifier], x: Inputs, y: Labels, train: Batch) -> Tensor:
    """Return for each training example the influence (m) on the loss of one example `x` (1) with the label `y` (1).

    A positive value means that training on the example made the loss of `x` smaller. It is summed over the models.
    """
    total = torch.zeros(len(train), dtype=torch.float64)
    for model in models:
        at, logits = penultimate(model, x)
        of_train, of_logits = penultimate(model, train.x)
        error = logits.softmax(1) - F.one_hot(y.cpu(), logits.shape[1])
        errors = of_logits.softmax(1) - F.one_hot(train.y.cpu(), of_logits.shape[1])
        # the gradient of the weights is the outer product of error and features, that of the bias the error
        total += (errors @ error[0]) * (of_train @ at[0] + 1)
    return total


def tracin_figure(
    target: Target,
    batch: Batch,
    predicted: Labels,
    train: Batch | None,
    checkpoints: Sequence[Checkpoint],
    about: About,
    notes: list[str],
) -> list[Figure]:
    """Return the figure with the training examples that support a wrong prediction, if there are checkpoints and
    training examples. Otherwise the reason is appended to `notes`.
    """
    if train is None or not checkpoints:
        missing = ["training examples (train)"] if train is None else []
        missing += [] if checkpoints else ["checkpoints of the training (checkpoints)"]
        notes.append(
            "TracIn, which shows the training examples that support this wrong prediction, is not applicable without "
            f"{' and '.join(missing)}."
        )
        return []
    influence = tracin(checkpoints, batch.x, predicted, train)
    chosen = influence.argsort(descending=True, stable=True)[:_SUPPORTING].tolist()
    rows = tuple(
        (int(train.ids[row]), about.called(int(train.y[row])), float(influence[row])) for row in chosen
    )
    pictures = tuple(
        picture(train.x[row], f"training example {int(train.ids[row])}, label {rows[k][1]}", target.bare)
        for k, row in enumerate(chosen)
        if is_image(batch.x.shape[1:])
    )
    name = about.called(int(predicted[0]))
    labels = ", ".join(dict.fromkeys(str(row[1]) for row in rows))
    title = f"The wrong prediction {name} is supported by training examples with the label {labels}"
    text = (
        f"The {amount(len(rows), 'training examples')} with the largest influence (TracIn on the last layer, "
        f"{amount(len(checkpoints), 'checkpoints')})."
    )
    headings = ("training example", "label", "influence")
    return [
        Figure("tracin", title, text, headings, rows, pictures, tabular=True, note=text, reason=f"{title}.")
    ]
