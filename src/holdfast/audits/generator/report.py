"""The finding of an audit of a generator: its verdict, the table of measures, and the samples nearest to training
examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from holdfast.audits.finding import AuditVerdict, Finding, Picture, Table, in_unit_range
from holdfast.audits.generator.copies import Copies, Quality
from holdfast.audits.generator.parts import share_and_range, shown
from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Columns
from holdfast.core.types import PerExample
from holdfast.io.data.layouts import Ranges
from holdfast.reports.numbers import percent
from holdfast.statistics.repeats import LEVEL

_COLLAPSED = 0.01
"""recall up to which a generator with realistic samples counts as collapsed"""
_REALISTIC = 0.5
"""precision from which samples count as realistic"""
_SHOWN, _LISTED = 6, 20
_NEAREST = "nearest"
_NAMES = {
    "frechet": "Fréchet distance",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
}
_SCALED_COLUMNS = (
    "The measures of quality compare the columns of the tables, scaled to standard deviation 1; rare values of a "
    "category weigh more than frequent ones."
)
_FEATURES = (
    "The measures of quality compare features of one network. A difference that this network does not see is not "
    "measured."
)
_DISTANCE = (
    "Near copies are found by their distance in the space of the inputs. A copy that is shifted, mirrored or "
    "recoloured may be missed."
)
_TOGETHER = (
    "Samples that are all copies have the best possible quality. Read it together with the share of copies."
)


@dataclass(frozen=True)
class Measured:
    """What an audit of a generator measured."""

    samples: Quality
    floor: Quality
    """the same measures for as many held-out examples: what a perfect generator would reach"""
    copies: Copies
    ranges: Ranges
    """of the samples, and of the training examples"""
    entropy: float
    """entropy of the predicted classes of the samples, from 0 to 1"""
    training_entropy: float
    classes: int
    """number of classes of the network; 1 for tables, whose scaled columns are the features"""
    distinct: int
    """number of different samples"""
    features: int
    """number of features that are compared"""
    reference: int
    """number of training examples with which the quality is measured"""

    @property
    def collapsed(self) -> bool:
        """Whether the samples look like training examples, but only like few of them."""
        quality = self.samples
        return quality.recall.value <= _COLLAPSED and quality.precision.value >= _REALISTIC


def finding_of(measured: Measured) -> Finding:
    """Return the finding: `flagged` if samples are copies of training examples, or nearly, or if the generator has
    collapsed.
    """
    copies = measured.copies
    frechet, floor = measured.samples.frechet, measured.floor.frechet
    is_flagged = copies.copied or copies.nearly_copied or measured.collapsed
    collapse = (
        "; the generator has collapsed: its samples are like few training examples"
        if measured.collapsed
        else ""
    )
    headline = (
        f"{percent(copies.rate.value)} of the samples are copies of training examples "
        f"({_beside(copies.rate, copies.held_out)}), {percent(copies.near.value)} are near copies "
        f"({_beside(copies.near, copies.near_held_out)}), and the Fréchet distance is {frechet.value:.3g} "
        f"({floor.value:.3g} for held-out examples){collapse}"
    )
    variety = f"{measured.distinct:,} of {len(copies.distance):,} samples are different"
    if measured.classes > 1:
        variety += (
            f"; their predicted classes have an entropy of {measured.entropy:.3f} (training examples: "
            f"{measured.training_entropy:.3f})"
        )
    reasons = [_on_copies(copies), _on_near_copies(copies), variety]
    if measured.ranges.differ and measured.classes > 1:
        ranges = measured.ranges.sentence("samples have", "training examples")
        reasons.insert(0, f"{ranges}; if their units are others, no measure of this audit is meaningful")
    if measured.collapsed:
        reasons.insert(
            0, f"the samples cover {percent(measured.samples.recall.value)} of the training examples (recall)"
        )
    return Finding(
        "flagged" if is_flagged else "not flagged",
        headline,
        reasons,
        _facts(measured),
        {"frechet": frechet, "copy_rate": copies.rate, "near_copy_rate": copies.near},
        (_measures(measured), _shares(copies), *_listed(copies)),
        (_pairs(copies),),
        limits=(_FEATURES if measured.classes > 1 else _SCALED_COLUMNS, _DISTANCE, _TOGETHER),
    )


def _beside(samples: Estimate, held_out: Estimate) -> str:
    return f"{share_and_range(samples)[1]}; held-out examples: {percent(held_out.value)}"


def _on_copies(copies: Copies) -> str:
    """A sentence on the number of copies, and why it decides or not."""
    k, n = int(copies.is_copy.sum()), len(copies.is_copy)
    other, m = int(copies.is_repeat.sum()), len(copies.is_repeat)
    counted = f"{k:,} of {n:,} samples and {other:,} of {m:,} held-out examples equal a training example byte for byte"
    if not k:
        return counted
    if not copies.repeating:
        return f"{counted}; by chance, at most {max(copies.expected, 0.001):.2g} samples are expected to"
    why = (
        "rows repeat by nature"
        if other
        else f"columns have so few values that {copies.expected:.2g} samples may do so by chance"
    )
    comparison = "more often" if copies.copied else "not more often beyond chance"
    return f"{counted}; {why}, and samples do {comparison} than held-out examples (p = {copies.p:.2g})"


def _on_near_copies(copies: Copies) -> str:
    return (
        "a sample that is no copy is a near copy if it is nearer to a training example than "
        f"{copies.threshold:.4g}, as 1 % of the held-out examples are"
    )


def joined(
    quality: Finding, found: Sequence[tuple[str, Finding]], lacking: Sequence[tuple[str, str]]
) -> Finding:
    """Return the finding of quality and copies with those of the parts, by name, and a table of the parts that do not
    apply, each with what is missing.
    """
    parts = [part for _, part in found]
    verdicts = {quality.verdict, *(part.verdict for part in parts)}
    order: tuple[AuditVerdict, ...] = ("flagged", "unclear", "not flagged")
    verdict = next(each for each in order if each in verdicts)
    table = Table(
        "Not applicable",
        ("part", "missing"),
        lacking,
        "What the generator or the data lack for a part of the audit.",
        texts=True,
    )
    return replace(
        quality,
        verdict=verdict,
        headline="; ".join([quality.headline, *(part.headline for part in parts if part.headline)]),
        reasons=[*quality.reasons, *(reason for part in parts for reason in part.reasons)],
        facts={**quality.facts, **{name: dict(part.facts) for name, part in found}},
        metrics={
            **quality.metrics,
            **{name: value for part in parts for name, value in part.metrics.items()},
        },
        tables=[
            *quality.tables,
            *(table for part in parts for table in part.tables),
            *([table] if lacking else []),
        ],
        pictures=[*quality.pictures, *(picture for part in parts for picture in part.pictures)],
        curves=[curve for part in parts for curve in part.curves],
        limits=[*quality.limits, *(limit for part in parts for limit in part.limits)],
    )


def _facts(measured: Measured) -> dict[str, object]:
    return {
        "copies": int(measured.copies.is_copy.sum()),
        "copy_rate": measured.copies.rate.value,
        "held_out_copy_rate": measured.copies.held_out.value,
        "copies_expected": measured.copies.expected,
        "rows_repeat": measured.copies.repeating,
        "near_copy_rate": measured.copies.near.value,
        "held_out_near_copy_rate": measured.copies.near_held_out.value,
        "copy_threshold": measured.copies.threshold,
        "collapsed": measured.collapsed,
        "distinct": measured.distinct,
        "label_entropy": measured.entropy,
        "training_label_entropy": measured.training_entropy,
        "features": measured.features,
        **{f.name: getattr(measured.samples, f.name).value for f in fields(Quality)},
        "floor": {f.name: getattr(measured.floor, f.name).value for f in fields(Quality)},
    }


def _shares(copies: Copies) -> Table:
    rows = [
        ("copies", *share_and_range(copies.rate), *share_and_range(copies.held_out)),
        ("near copies", *share_and_range(copies.near), *share_and_range(copies.near_held_out)),
    ]
    return Table(
        "Copies of training examples",
        ("samples", "share", "interval", "held-out", "interval"),
        rows,
        "A copy equals a training example byte for byte. A near copy does not, and is nearer to one than 99 % of one "
        "half of the held-out examples; the column held-out is the other half. The generator is flagged if a sample is "
        "a copy and no held-out example is. Where rows repeat by nature, it is flagged if the share of samples is "
        f"larger than that of held-out examples (p <= {LEVEL:g}). It is flagged for near copies if the intervals are "
        "apart. Samples without copies are flagged for copies with a probability of at most 5 %.",
    )


def _listed(copies: Copies) -> tuple[Table, ...]:
    """A table of the copies; none without any."""
    found = copies.is_copy.nonzero()[:, 0]
    if not len(found):
        return ()
    rows = [(int(place), int(copies.nearest[place])) for place in found[:_LISTED]]
    more = "" if len(found) <= _LISTED else f" The first {_LISTED} of {len(found):,} are listed."
    return (
        Table(
            "Samples that equal a training example",
            ("sample", "training example"),
            rows,
            f"Rows from 0; of equal training examples the first.{more}",
        ),
    )


def _measures(measured: Measured) -> Table:
    rows = [
        (title, *shown(getattr(measured.samples, name)), *shown(getattr(measured.floor, name)))
        for name, title in _NAMES.items()
    ]
    n = measured.samples.frechet.n
    return Table(
        "Quality of the samples",
        ("measure", "samples", "interval", "held-out", "interval"),
        rows,
        f"{n:,} samples and {n:,} held-out examples, each compared with {measured.reference:,} training examples by "
        f"{measured.features} features. The column held-out is what a perfect generator would reach. Lower is better "
        "for the Fréchet distance and KID, and higher for the others.",
    )


def _pairs(copies: Copies) -> Picture:
    """The samples that are nearest to a training example, each beside that example."""
    captions = [
        caption
        for place in _closest(copies.distance).tolist()
        for caption in (
            "sample, a copy"
            if copies.is_copy[place]
            else f"sample, distance {float(copies.distance[place]):.3g}",
            f"its nearest training example, row {int(copies.nearest[place])}",
        )
    ]
    k = int(copies.is_copy.sum())
    title = f"The samples nearest to training examples; {k:,} of {len(copies.distance):,} samples are copies"
    return Picture(_NEAREST, title, captions, together=2)


def images_of(samples: Tensor, training: Tensor, columns: Columns) -> dict[str, Tensor]:
    """Return the images of the samples that are nearest to a training example, each beside that example."""
    closest = _closest(columns["distance"])
    pairs = (samples[closest], training[columns["nearest"][closest].to(training.device)].to(samples))
    both = torch.stack(pairs, 1).flatten(0, 1)
    return {_NEAREST: in_unit_range(both, float(both.min()), float(both.max()))}


def _closest(distance: PerExample) -> Tensor:
    return distance.argsort(stable=True)[:_SHOWN]
