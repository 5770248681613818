"""The list of the suspect examples: what its order rests on, and why each example is on it.

The list is ordered by the scores that the evidence supports. If a set is flagged, the evidence is its comparison with
trusted examples. Otherwise unusual features are evidence in a class in which many examples have them whose label is
predicted by networks that were not trained on these examples: wrong labels have unusual features as well, but are not
predicted. Classes of tables with extreme values have such examples by nature. Then trusted examples have them too, or
several classes have them, so that one class alone is evidence.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from holdfast.audits.poison.audit import METHODS, Scored

Kind = Literal["labels", "features", "both"]
"""what is suspect: labels that are wrong, features that are unlike those of the class, or both"""
OF_FEATURES = tuple(name for name in METHODS if name != "labels")
"""methods that score features and losses, by which a manipulated input is found"""
UNUSUAL, FEWEST, RARE = 0.01, 3, 0.5
"""If a set is not flagged: the smallest share and number of examples of a class with predicted labels and unusual
energies that are evidence, and the largest share of them among trusted examples, relative to that among the others.
In subsets of MNIST and Fashion-MNIST without manipulated inputs, also with wrong labels, a class had at most 0.8 % of
them; with BadNets or Blended on 1 % of the set, the target class had 1.5 to 9 %."""


@dataclass(frozen=True)
class Suspects:
    """The suspect examples, the most suspect ones first."""

    rows: list[int]
    reasons: list[Kind]
    """for each row what is suspect of the example"""
    order: Kind
    """scores by which the rows are ordered: those of labels, those of features, or first those of features in the
    classes `evident` and then those of labels"""
    evident: tuple[int, ...]
    """classes in which features are evidence"""


def kind_of(scored: Scored) -> Kind | None:
    """Return the kind of manipulation by which a set is flagged; None if it is not flagged."""
    if scored.comparison is None or not scored.comparison.flagged:
        return None
    if not scored.of_features:
        return "labels"
    return "both" if any(test.score == "labels" for test in scored.comparison.flagged) else "features"


def suspects_of(scored: Scored) -> Suspects:
    """Return the list of the suspect examples.

    In the order of features, the examples that most methods flag are first, then those with the largest mean rank of
    their scores in their class.
    """
    n, kind = scored.examples.n, kind_of(scored)
    y, by_label = scored.examples.y[:n], scored.scores["labels"][:n]
    flags = {name: scored.flags[name][:n] for name in METHODS}
    unusual = flags["energy"] | flags["clustering"]
    evident = _unusual_classes(scored) if kind is None else _significant_classes(scored)
    in_evidence = torch.isin(y, torch.tensor(evident, dtype=torch.int64))
    of_labels = flags["labels"] | scored.contradicted
    of_features = unusual & (~of_labels | in_evidence)
    order: Kind = "labels" if not evident else "features" if kind == "features" else "both"
    key = by_label
    if evident:
        rank = torch.zeros(n, dtype=torch.float64)
        for label in sorted({*y.tolist()}):
            rows = (y == label).nonzero()[:, 0]
            for name in OF_FEATURES:
                place = scored.scores[name][rows].argsort(stable=True).argsort(stable=True)
                rank[rows] += place.double() / len(rows)
        by_features = torch.stack([flags[name] for name in OF_FEATURES]).sum(0) + rank / (
            len(OF_FEATURES) + 1
        )
        first = unusual & in_evidence
        rest = by_features if order == "features" else by_label
        key = torch.where(first, by_features + 1 + rest.abs().max(), rest)
    ordered = key.argsort(descending=True, stable=True)
    rows = ordered[scored.n_methods[ordered] > 0].tolist()
    reasons: list[Kind] = [
        "both" if of_labels[row] and of_features[row] else "labels" if of_labels[row] else "features"
        for row in rows
    ]
    return Suspects(rows, reasons, order, evident)


def _significant_classes(scored: Scored) -> tuple[int, ...]:
    """The classes with a significant test of features; all classes for a test of all classes together."""
    of_class = {test.label for test in scored.of_features}
    significant = sorted(label for label in of_class if label is not None)
    everything = torch.bincount(scored.examples.y).nonzero()[:, 0].tolist() if of_class else []
    return tuple(significant or everything)


def _unusual_classes(scored: Scored) -> tuple[int, ...]:
    """The class of a set that is not flagged in which unusual features are evidence, if there is one."""
    y, trusted = scored.examples.y, scored.examples.trusted
    predicted = scored.predicted == y
    classes = []
    for label in torch.bincount(y).nonzero()[:, 0].tolist():
        own = predicted & (y == label)
        unusual = own & scored.flags["energy"]
        n, n_unusual = int((own & ~trusted).sum()), int((unusual & ~trusted).sum())
        expected = n_unusual * int((own & trusted).sum()) / max(n, 1)
        is_rare = int((unusual & trusted).sum()) <= RARE * expected
        if n_unusual >= FEWEST and n_unusual > UNUSUAL * n and is_rare:
            classes.append(label)
    return tuple(classes) if len(classes) == 1 else ()
