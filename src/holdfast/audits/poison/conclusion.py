"""The finding of the audit of training data, from the scores of the examples, and the file of suspect examples."""

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import TypedDict

from holdfast.audits.finding import AuditVerdict, Finding, Picture, Table, in_unit_range
from holdfast.audits.poison.audit import METHODS, Scored, scored
from holdfast.audits.poison.comparison import DETECTABLE, LEVEL, Comparison, Tested
from holdfast.audits.stored_steps import StoredSteps
from holdfast.core.batch import Batch
from holdfast.core.errors import TargetError
from holdfast.core.model import Bounds
from holdfast.io.files import replacing
from holdfast.reports.words import amount

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
_RANKED = "Without trusted examples (clean), suspect examples do not show whether the set was manipulated."


class _Settings(TypedDict):
    class_names: list[str] | None


def concluded(steps: StoredSteps) -> Finding:
    """Return the finding of an audit from its stored steps."""
    finding = finding_of(scored(steps), steps.settings(_Settings)["class_names"])
    return replace(finding, pictures=steps.pictures(finding.pictures))


def images_of(batch: Batch, scored: Scored, bounds: Bounds) -> dict[str, Tensor]:
    """Return the images of the most suspect examples."""
    images = batch.take(torch.tensor(scored.suspects()[:_PICTURED], dtype=torch.int64)).x
    low, high = float(torch.as_tensor(bounds.low).min()), float(torch.as_tensor(bounds.high).max())
    return {_SUSPECTS: in_unit_range(images, low, high)}


def finding_of(scored: Scored, names: Sequence[str] | None = None) -> Finding:
    """Return the finding of an audit from its scores. `names` are those of the classes."""
    suspects = scored.suspects()
    verdict, headline, reasons = _verdict(scored, len(suspects), names)
    examples, comparison = scored.examples, scored.comparison
    facts: dict[str, Any] = {
        "examples": examples.n,
        "trusted": examples.n_trusted,
        "suspects": len(suspects),
        "flagged_by": {name: int(scored.flags[name][: examples.n].sum()) for name in METHODS},
        "out_of_sample_accuracy": float((scored.predicted == examples.y)[: examples.n].double().mean()),
    }
    if comparison is not None:
        facts |= {
            "p": min(test.p for test in comparison.tests),
            "level": LEVEL,
            "label_errors_only": verdict == "flagged" and not _of_inputs(comparison),
            "tests": [{**vars(test), "flagged": test.flagged} for test in comparison.tests],
            "detectable_share": {str(label): share for label, share in comparison.detectable.items()},
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


def write_suspects(path: Path, scored: Scored) -> None:
    """Write the suspect examples to a CSV file: row number, class, score of each method, and the methods that flag it.

    Raises `TargetError` if the file cannot be written.
    """
    text = io.StringIO(newline="")
    lines = csv.writer(text)
    lines.writerow(["index", "class", *METHODS, "flagged"])
    for row in scored.suspects():
        scores = [f"{float(scored.scores[name][row]):.6g}" for name in METHODS]
        label = int(scored.examples.y[row])
        lines.writerow([_index(scored, row), label, *scores, " ".join(_flagging(scored, row))])
    try:
        with replacing(path) as file:
            file.write(text.getvalue().encode())
    except OSError as error:
        raise TargetError(f"{path} cannot be written: {error.strerror or error}") from error


def _verdict(
    scored: Scored, n_suspects: int, names: Sequence[str] | None
) -> tuple[AuditVerdict, str, tuple[str, ...]]:
    examples, comparison = scored.examples, scored.comparison
    counted = f"{amount(n_suspects, 'suspect examples')} of {examples.n:,}"
    by_method = ", ".join(f"{name} {int(scored.flags[name][: examples.n].sum())}" for name in METHODS)
    rules = f"Examples that each method flags: {by_method}. Lowest-loss isolation flags 1 % of any set."
    if comparison is None:
        return "unclear", f"{counted}, and no trusted examples to compare the set with", (rules, _RANKED)
    reasons = (rules, *(_found(test, names) for test in comparison.flagged), _detectable(comparison, names))
    if comparison.flagged:
        inputs = _of_inputs(comparison)
        of = sorted({test.label for test in inputs or comparison.flagged if test.label is not None})
        where = f"class{'es' if len(of) > 1 else ''} {', '.join(_named(label, names) for label in of)}"
        where = where if of else "all classes together"
        if inputs:
            return "flagged", f"examples of {where} are unlike the trusted ones ({counted})", reasons
        text = f"more labels of {where} are wrong than among the trusted examples ({counted})"
        return "flagged", text, (*reasons, _ERRORS_ONLY)
    if max(comparison.detectable.values()) > DETECTABLE:
        text = (
            f"there are too few trusted examples to find a manipulation of {100 * DETECTABLE:g} % of each class; give "
            f"about {comparison.needed} of each ({counted})"
        )
        return "unclear", text, reasons
    return "not flagged", f"no class differs from its trusted examples ({counted})", reasons


_ERRORS_ONLY = (
    "Only the test of the labels is significant. The set has label errors, or labels that were changed on purpose; "
    "these cannot be distinguished. No cluster of manipulated inputs was found."
)


def _of_inputs(comparison: Comparison) -> list[Tested]:
    """The significant tests of scores other than that of the labels."""
    return [test for test in comparison.flagged if test.score != "labels"]


def _found(test: Tested, names: Sequence[str] | None) -> str:
    where = "All classes together" if test.label is None else f"Class {_named(test.label, names)}"
    return (
        f"{where}, {test.score}: {test.trusted} of the {test.examined} examples with the "
        f"largest scores are trusted, {test.expected:.1f} are expected in a clean set; p = {test.p:.2g} after "
        f"correction, about {test.excess} examples too many."
    )


def _detectable(comparison: Comparison, names: Sequence[str] | None) -> str:
    """A sentence that states how small a cluster can be flagged."""
    few = [_named(label, names) for label, share in comparison.detectable.items() if share == 1]
    if few:
        return f"Too few trusted examples of: {', '.join(few)}."
    share = f"{100 * max(comparison.detectable.values()):g} %"
    return (
        f"With these trusted examples a cluster of {share} of any class with the largest scores is flagged."
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
        rows.append([_named(label, names), int(own.sum()), suspect, *clusters, *p_values])
    if tested is not None:
        headings += [f"p {name}" for name in METHODS]
    note = f"p after correction for all tests; the set is flagged at {LEVEL} or less" if tested else ""
    return Table("Classes", headings, rows, note)


def _listed(scored: Scored, suspects: list[int], names: Sequence[str] | None) -> tuple[Table, ...]:
    rows: list[list[str | float | int]] = [
        [
            _index(scored, row),
            _named(int(scored.examples.y[row]), names),
            _named(int(scored.predicted[row]), names),
            *(float(scored.scores[name][row]) for name in METHODS),
            ", ".join(_flagging(scored, row)),
        ]
        for row in suspects[:_LISTED]
    ]
    note = f"the first {len(rows)} of {len(suspects)}; larger scores are more suspect" if rows else ""
    title, headings = "Suspect examples", ["index", "class", "predicted", *METHODS, "flagged by"]
    return (Table(title, headings, rows, note),) if rows else ()


def _pictures(scored: Scored, suspects: list[int], names: Sequence[str] | None) -> tuple[Picture, ...]:
    shown = suspects[:_PICTURED]
    captions = [
        f"{_index(scored, row)}: {_named(int(scored.examples.y[row]), names)} ({', '.join(_flagging(scored, row))})"
        for row in shown
    ]
    title = f"The {len(shown)} most suspect of {amount(len(suspects), 'suspect examples')}"
    return (Picture(_SUSPECTS, title, captions),) if shown else ()


def _flagging(scored: Scored, row: int) -> list[str]:
    return [name for name in METHODS if bool(scored.flags[name][row])]


def _index(scored: Scored, row: int) -> int:
    return int(scored.examples.ids[row])


def _named(label: int, names: Sequence[str] | None) -> str:
    return str(label) if names is None or label >= len(names) else names[label]
