"""Proofs from the structure of the trees that a score is monotone in some features.

If no tree decreases the score of a class when a feature increases, an attacker who can only increase such features
cannot lower the score, whatever the size of the change. The proof uses the trees and not the constraint that a training
declared.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from holdfast.certifiers.trees.ensemble import Ensemble, Flags, Floats, Integers

Direction = Literal[1, -1]
"""1 for a score that does not decrease when a feature increases, -1 for one that does not increase"""


def monotone_in(ensemble: Ensemble, features: Sequence[int], direction: Direction, class_index: int) -> bool:
    """Return whether every tree proves that the score of a class is monotone in each of the features.

    With one output, the score is that of the class minus that of the other one. The test is exact for each tree: leaves
    that differ only in the feature are compared. A sum of trees may be monotone although one of the trees is not, which
    is not proved. A missing value stays missing.
    """
    single = ensemble.value.shape[1] == 1
    added = ensemble.lead(class_index, 1 - class_index)[0] if single else ensemble.value[:, class_index]
    return _all_monotone(ensemble, added * direction, features)


def proved_unchanged(
    ensemble: Ensemble, ranks: Integers, features: Sequence[int], direction: Direction = 1
) -> Flags:
    """Return for each row, given by its ranks (`Ensemble.ranks`), whether its class is proved to stay the same when the
    features increase by any amounts, or decrease with a `direction` of -1.

    It is proved if the lead of the predicted class over each other one does not decrease.
    """
    predictions, scores = ensemble.predictions(ranks), ensemble.scores(ranks)
    if scores.shape[1] == 1:
        scores = np.concatenate((np.zeros_like(scores), scores), 1)
    proved = np.zeros(len(ranks), dtype=np.bool_)
    for label in np.unique(predictions).tolist():
        others = [other for other in range(ensemble.classes) if other != label]
        leads = (ensemble.lead(label, other)[0] * direction for other in others)
        if all(_all_monotone(ensemble, added, features) for added in leads):
            lead = scores[:, label] - scores[:, others].max(1)
            # the sums of the changed row are rounded as well
            firm = lead >= 0 if ensemble.smallest_difference else lead > ensemble.rounding
            proved |= (predictions == label) & firm
    return proved


def _all_monotone(ensemble: Ensemble, added: Floats, features: Sequence[int]) -> bool:
    return all(_does_not_decrease(ensemble, added, int(root), features) for root in ensemble.roots)


def _does_not_decrease(ensemble: Ensemble, added: Floats, root: int, features: Sequence[int]) -> bool:
    """Return whether what one tree adds does not decrease when any of the features increases."""
    leaves = list(_leaves(ensemble, root, {}))
    used = sorted({feature for _, box in leaves for feature in box})
    if not set(used) & set(features):
        return True
    value = added[[leaf for leaf, _ in leaves]]
    apart = np.zeros((len(leaves), len(leaves)), dtype=np.int64)
    boxes = {}
    for feature in used:
        everything = (0, len(ensemble.cuts[feature]), True)
        low, high, missing = map(
            np.array, zip(*(box.get(feature, everything) for _, box in leaves), strict=True)
        )
        common = np.maximum(low[:, None], low) <= np.minimum(high[:, None], high)
        separate = ~(common | (missing[:, None] & missing))
        apart += separate
        boxes[feature] = low, high, separate
    for feature in set(used) & set(features):
        low, high, separate = boxes[feature]
        present = low <= high
        increases = (low[:, None] < high) & present[:, None] & present
        if (increases & (apart == separate) & (value[:, None] > value)).any():
            return False
    return True


def _leaves(
    ensemble: Ensemble, node: int, box: Mapping[int, tuple[int, int, bool]]
) -> Iterator[tuple[int, Mapping[int, tuple[int, int, bool]]]]:
    """Yield the leaves of a tree that rows can reach, with the smallest and the largest rank of each feature on the
    path, and whether it may be missing.
    """
    feature, cut = int(ensemble.feature[node]), int(ensemble.cut[node])
    if feature < 0:
        yield node, box
        return
    low, high, missing = box.get(feature, (0, len(ensemble.cuts[feature]), True))
    to_left = bool(ensemble.missing_left[node])
    for child, side in (
        (int(ensemble.left[node]), (low, min(high, cut - 1), missing and to_left)),
        (int(ensemble.right[node]), (max(low, cut), high, missing and not to_left)),
    ):
        if side[0] <= side[1] or side[2]:
            yield from _leaves(ensemble, child, {**box, feature: side})
