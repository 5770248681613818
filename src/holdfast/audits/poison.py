"""The finding of the audit of training data, and the list of the suspect examples."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import TypedDict

from holdfast.audits.finding import AuditVerdict, Finding, Picture, StoredSteps, Table, in_unit_range
from holdfast.audits.poison_steps import DETECTABLE, LEVEL, METHODS, Comparison, Scored, Tested, scored
from holdfast.core.batch import Batch
from holdfast.core.errors import TargetError
from holdfast.core.model import Bounds
from holdfast.io.files import replacing
from holdfast.reports.words import amount, capitalized, percent

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


_SUSPECTS = "suspects"
_LISTED, _PICTURED = 20, 40
"""Numbers of suspect examples that the report lists, and shows as pictures."""

_DIFFERENT_SOURCE = (
    "The comparison assumes that the trusted examples are a random sample of the same source, such as rows of the set "
    "that were drawn at random and checked. With another sample a clean set may be flagged too."
)
_MISSED = (
    "Poisons that were adapted to these methods, correctly labelled poisons, and clusters that are smaller than the "
    "detectable share are not found."
)
_REAL_ERRORS = (
    "Real data sets contain label errors and unusual examples. A suspect example is to be looked at, and is no proof "
    "of manipulation."
)
_RANKED = (
    "Without trusted examples (clean), suspect examples do not show whether the set was manipulated, and no share of "
    "manipulated examples is detected."
)
_ERRORS_ONLY = (
    "The set has label errors, or labels that were changed on purpose; these cannot be distinguished. No cluster of "
    "manipulated inputs was found."
)
_EXPLAINED = (
    "Wrong labels explain the difference of the features: it is not significant among the examples whose label is "
    "predicted by a network that was not trained on them."
)


class _Settings(TypedDict):
    class_names: list[str] | None


def concluded(steps: StoredSteps) -> Finding:
    """Return the finding of an audit from its stored steps."""
    finding = finding_of(scored(steps), steps.settings(_Settings)["class_names"])
    return replace(finding, pictures=steps.pictures(finding.pictures))


def images_of(batch: Batch, scored: Scored, bounds: Bounds) -> dict[str, Tensor]:
    """Return the images of the most suspect examples."""
    images = batch.take(torch.tensor(suspects_of(scored).rows[:_PICTURED], dtype=torch.int64)).x
    low, high = float(torch.as_tensor(bounds.low).min()), float(torch.as_tensor(bounds.high).max())
    return {_SUSPECTS: in_unit_range(images, low, high)}


def finding_of(scored: Scored, names: Sequence[str] | None = None) -> Finding:
    """Return the finding of an audit from its scores. `names` are those of the classes."""
    suspects, kind = suspects_of(scored), kind_of(scored)
    verdict, headline, reasons = _verdict(scored, suspects, names)
    examples, comparison = scored.examples, scored.comparison
    facts: dict[str, Any] = {
        "examples": examples.n,
        "trusted": examples.n_trusted,
        "suspects": len(suspects.rows),
        "flagged_by": {name: int(scored.flags[name][: examples.n].sum()) for name in METHODS},
        "ordered_by": suspects.order,
        "out_of_sample_accuracy": float((~scored.contradicted).double().mean()),
    }
    if comparison is not None:
        facts |= {
            "p": min(test.p for test in comparison.tests),
            "level": LEVEL,
            "found": kind,
            "label_errors_only": kind == "labels",
            "tests": [{**vars(test), "flagged": test.flagged} for test in comparison.tests],
            "detectable_share": {
                "all" if label is None else str(label): share
                for label, share in comparison.detectable.items()
            },
        }
    compared = () if comparison is None else (_DIFFERENT_SOURCE,)
    return Finding(
        verdict,
        headline,
        reasons,
        facts,
        tables=(_classes(scored, names), *_listed(scored, suspects, names)),
        pictures=_pictures(scored, suspects, names),
        limits=(*compared, _MISSED, _REAL_ERRORS),
    )


def write_suspects(path: Path, scored: Scored, names: Sequence[str] | None = None) -> None:
    """Write all suspect examples to a CSV file, with the columns of the table in the report.

    Raises `TargetError` if the file cannot be written.
    """
    suspects = suspects_of(scored)
    text = io.StringIO(newline="")
    lines = csv.writer(text)
    lines.writerow(_HEADINGS)
    for cells in _rows(scored, suspects, len(suspects.rows), names):
        lines.writerow([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in cells])
    try:
        with replacing(path) as file:
            file.write(text.getvalue().encode())
    except OSError as error:
        raise TargetError(f"{path} cannot be written: {error.strerror or error}") from error


def _verdict(
    scored: Scored, suspects: Suspects, names: Sequence[str] | None
) -> tuple[AuditVerdict, str, tuple[str, ...]]:
    examples, comparison = scored.examples, scored.comparison
    counted = f"{amount(len(suspects.rows), 'suspect examples')} of {examples.n:,}"
    by_method = ", ".join(f"{name} {int(scored.flags[name][: examples.n].sum())}" for name in METHODS)
    rules = f"Examples that each method flags: {by_method}. Lowest-loss isolation flags 1 % of any set."
    order = (_order(suspects, names, supported=kind_of(scored) is not None),) if suspects.rows else ()
    if comparison is None:
        return (
            "unclear",
            f"{counted}, and no trusted examples to compare the set with",
            (rules, *order, _RANKED),
        )
    seen = (f"{capitalized(_unseen(comparison))}.", *_too_few(comparison, names))
    reasons = (rules, *(_found(test, names) for test in comparison.flagged), *order, *seen)
    if comparison.flagged:
        of_labels = [test for test in comparison.flagged if test.score == "labels"]
        texts = []
        if scored.of_features:
            texts.append(f"examples of {_where(scored.of_features, names)} are unlike the trusted ones")
        if of_labels or not scored.of_features:
            where = _where(of_labels or comparison.flagged, names)
            texts.append(f"more labels of {where} are wrong than among the trusted examples")
        if not scored.of_features:
            explained = (_EXPLAINED,) if len(of_labels) < len(comparison.flagged) else ()
            reasons = (*reasons, *explained, _ERRORS_ONLY)
        return "flagged", f"{', and '.join(texts)} ({counted})", reasons
    if not comparison.enough:
        text = (
            f"there are too few trusted examples to find a manipulation of {100 * DETECTABLE:g} % of each class; give "
            f"about {comparison.needed} of each ({counted})"
        )
        return "unclear", text, reasons
    return (
        "not flagged",
        f"no class differs from its trusted examples ({counted}); {_unseen(comparison)}",
        reasons,
    )


def _where(tests: Sequence[Tested], names: Sequence[str] | None) -> str:
    of = sorted({test.label for test in tests if test.label is not None})
    listed = f"class{'es' if len(of) > 1 else ''} {', '.join(_named(label, names) for label in of)}"
    return listed if of else "all classes together"


def _found(test: Tested, names: Sequence[str] | None) -> str:
    where = "All classes together" if test.label is None else f"Class {_named(test.label, names)}"
    return (
        f"{where}, {test.score}: {test.trusted} of the {test.examined} examples with the "
        f"largest scores are trusted, {test.expected:.1f} are expected in a clean set; p = {test.p:.2g} after "
        f"correction, about {test.excess} examples too many."
    )


def _order(suspects: Suspects, names: Sequence[str] | None, *, supported: bool) -> str:
    """A sentence that states the order of the list, and what it rests on."""
    where = ", ".join(_named(label, names) for label in suspects.evident)
    by = f"of {', '.join(OF_FEATURES[:-1])} and {OF_FEATURES[-1]}"
    text = {
        "labels": "The suspect examples are ordered by their labels (score labels)",
        "features": f"The suspect examples are ordered by their features (ranks {by}), those of class {where} first",
        "both": f"The suspect examples are ordered by features and labels: first those of class {where} with unusual "
        f"features (ranks {by}), then the others by the score labels",
    }[suspects.order]
    return f"{text}{', by which the set is flagged' if supported else '; no test supports this order'}."


def _unseen(comparison: Comparison) -> str:
    """A clause that states which shares of manipulated examples are too small to flag a set."""
    shares, together = comparison.detectable, comparison.detectable[None]
    of_class = [share for label, share in shares.items() if label is not None and share < 1]
    below = []
    if of_class:
        least, most = percent(min(of_class)), percent(max(of_class))
        below.append(f"below {least} of a class" if least == most else f"below {least} to {most} of a class")
    if together < 1:
        below.append(f"below {percent(together)} of all examples")
    share = f"a share {' or '.join(below)}" if below else "no share of manipulated examples"
    return f"{share} is {'not ' if below else ''}seen with these trusted examples"


def _too_few(comparison: Comparison, names: Sequence[str] | None) -> tuple[str, ...]:
    """A sentence that names the classes of which no share of manipulated examples is seen."""
    shares = comparison.detectable.items()
    few = [_named(label, names) for label, share in shares if label is not None and share == 1]
    return (
        (f"Too few trusted examples of: {', '.join(few)}. No share of these classes is seen.",) if few else ()
    )


def _classes(scored: Scored, names: Sequence[str] | None) -> Table:
    n, y = scored.examples.n, scored.examples.y
    headings = ["class", "examples", "suspect", "smaller cluster %", "silhouette"]
    tested = scored.comparison
    p = {} if tested is None else {(test.label, test.score): test.p for test in tested.tests}
    rows: list[list[str | float | int]] = []
    for label in sorted({*y[:n].tolist()}):
        own = y[:n] == label
        first, suspect = int(own.nonzero()[0]), int((scored.n_methods[own] > 0).sum())
        clusters = (100 * float(scored.share[first]), float(scored.silhouette[first]))
        p_values = [p[label, name] for name in METHODS if p]
        seen = [] if tested is None else [100 * tested.detectable[label]]
        rows.append([_named(label, names), int(own.sum()), suspect, *clusters, *seen, *p_values])
    if tested is not None:
        headings += ["detectable %", *(f"p {name}" for name in METHODS)]
    note = f"p after correction for all tests; the set is flagged at {LEVEL} or less" if tested else ""
    return Table("Classes", headings, rows, note)


_HEADINGS = ("index", "class", "predicted", "reason", *METHODS, "flagged by")
"""columns of the table of suspect examples, in reports and in the file"""


def _rows(
    scored: Scored, suspects: Suspects, n: int, names: Sequence[str] | None
) -> list[list[str | float | int]]:
    """The first `n` suspect examples under `_HEADINGS`."""
    return [
        [
            _index(scored, row),
            _named(int(scored.examples.y[row]), names),
            _named(int(scored.predicted[row]), names),
            reason,
            *(float(scored.scores[name][row]) for name in METHODS),
            ", ".join(_flagging(scored, row)),
        ]
        for row, reason in zip(suspects.rows[:n], suspects.reasons, strict=False)
    ]


def _listed(scored: Scored, suspects: Suspects, names: Sequence[str] | None) -> tuple[Table, ...]:
    rows = _rows(scored, suspects, _LISTED, names)
    note = f"the first {len(rows)} of {len(suspects.rows)}; larger scores are more suspect"
    return (Table("Suspect examples", _HEADINGS, rows, note),) if rows else ()


def _pictures(scored: Scored, suspects: Suspects, names: Sequence[str] | None) -> tuple[Picture, ...]:
    shown = suspects.rows[:_PICTURED]
    captions = [
        f"{_index(scored, row)}: {_named(int(scored.examples.y[row]), names)} ({', '.join(_flagging(scored, row))})"
        for row in shown
    ]
    title = f"The {len(shown)} most suspect of {amount(len(suspects.rows), 'suspect examples')}"
    return (Picture(_SUSPECTS, title, captions),) if shown else ()


def _flagging(scored: Scored, row: int) -> list[str]:
    return [name for name in METHODS if bool(scored.flags[name][row])]


def _index(scored: Scored, row: int) -> int:
    return int(scored.examples.ids[row])


def _named(label: int, names: Sequence[str] | None) -> str:
    return str(label) if names is None or label >= len(names) else names[label]
