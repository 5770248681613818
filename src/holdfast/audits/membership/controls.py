"""Controls of an audit of membership: members that differ in kind, duplicates, and probabilities that were rounded."""

import math

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.types import Mask, PerExample

_WIDTH, _FEATURES, _FOLDS = 256, 512, 5
_RIDGE = 0.1  # of the number of training examples, in units of the variance of a feature
_DISTINCT, _COMPARED = 0.9, 5000


def width(members: int, non_members: int) -> float:
    """Return how far the area under the curve of a control may be from 1/2: 0.05, or three standard deviations of that
    of a random score if these are more.
    """
    return max(0.05, 3 * math.sqrt((members + non_members + 1) / (12 * members * non_members)))


def blind_scores(examples: Batch, member: Mask, classes: int, rng: Draws) -> PerExample:
    """Return the scores of a classifier that tells members from non-members by their inputs and labels alone, in
    five-fold cross-validation.

    It is a ridge regression on the inputs (a random projection of large ones), on random features of them, and on the
    labels. It does not use the audited model, so that what it finds is a difference between the data.
    """
    inputs = torch.nan_to_num(examples.x.flatten(1).double().cpu())
    if inputs.shape[1] > _WIDTH:
        dimensions = torch.arange(inputs.shape[1])
        inputs = inputs @ rng.at("projection").normal(dimensions, _WIDTH, dtype=torch.float64)
    inputs = _standardised(inputs)
    weights = rng.at("features").normal(torch.arange(inputs.shape[1]), _FEATURES, dtype=torch.float64)
    random = (
        inputs @ weights / math.sqrt(inputs.shape[1])
        + rng.at("shift").normal(torch.zeros(1, dtype=torch.int64), _FEATURES, dtype=torch.float64)
    ).relu()
    labels = torch.nn.functional.one_hot(examples.y.cpu(), classes).double()
    features = _standardised(torch.cat((inputs, random, labels), 1))
    folds = rng.at("fold").uniform(torch.arange(len(inputs))).argsort(stable=True) % _FOLDS
    target = member.double() - member.double().mean()
    score = torch.empty_like(target)
    for fold in range(_FOLDS):
        fitted = folds != fold
        a = features[fitted]
        gram = a.T @ a + _RIDGE * len(a) * torch.eye(a.shape[1], dtype=torch.float64)
        score[~fitted] = features[~fitted] @ torch.linalg.solve(gram, a.T @ target[fitted])
    return score


def refuse_shared(members: Batch, non_members: Batch) -> None:
    """Raise `UsageError` if an input occurs among the members and among the non-members."""
    known = {print_: int(row) for print_, row in zip(members.fingerprints(), members.ids, strict=True)}
    both = [
        (known[print_], int(row))
        for print_, row in zip(non_members.fingerprints(), non_members.ids, strict=True)
        if print_ in known
    ]
    if both:
        raise UsageError(
            f"{len(both):,} of the {len(non_members):,} non-members are also among the members, such as row "
            f"{both[0][1]} (row {both[0][0]} of the members); remove them from the non-members"
        )


def first_copies(examples: Batch) -> Batch:
    """Return the examples without those whose input occurred before."""
    seen: set[bytes] = set()
    kept = []
    for row, print_ in enumerate(examples.fingerprints()):
        if print_ not in seen:
            seen.add(print_)
            kept.append(row)
    return (
        examples
        if len(kept) == len(examples)
        else examples.take(torch.tensor(kept, device=examples.x.device))
    )


def is_rounded(signal: PerExample) -> bool:
    """Return whether more than a tenth of the signals of distinct inputs are equal to another one. Sums of the same
    rounded probabilities differ in their last digits, so that signals are compared to five decimals, and only some:
    among very many, equal ones occur by chance.
    """
    some = signal[:_COMPARED].round(decimals=5)
    return len(torch.unique(some)) < _DISTINCT * len(some)


def are_labels(logits: Tensor) -> bool:
    """Return whether outputs (n, classes) contain only labels: each row has one value for the predicted class and one
    for all others.
    """
    top = logits.max(1, keepdim=True).values
    rest = torch.where(logits == top, -torch.inf, logits).max(1, keepdim=True).values
    two = ((logits == top) | (logits == rest)).all(1) & ((logits == top).sum(1) == 1)
    same = len(torch.unique(top)) == 1 and len(torch.unique(rest)) == 1
    return logits.shape[1] > 1 and same and bool(two.all())


def _standardised(features: Tensor) -> Tensor:
    return (features - features.mean(0)) / features.std(0, correction=0).clamp_min(1e-6)
