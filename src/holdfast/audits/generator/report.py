"""The finding of an audit of a generator: its verdict, the table of measures, and the samples nearest to training
examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from holdfast.audits.finding import AuditVerdict, Finding, Picture, Table, in_unit_range
from holdfast.audits.generator.copies import Copies
from holdfast.audits.generator.parts import shown
from holdfast.audits.generator.quality import Quality
from holdfast.core.evidence import Columns
from holdfast.core.types import PerExample
from holdfast.reports.numbers import percent

_COLLAPSED = 0.01
"""recall up to which a generator with realistic samples counts as collapsed"""
_REALISTIC = 0.5
"""precision from which samples count as realistic"""
_SHOWN = 6
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
    "Copies are found by their distance in the space of the inputs. A copy that is shifted, mirrored or recoloured may "
    "be missed."
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

    @property
    def copied(self) -> bool:
        """Whether the samples contain more copies than held-out examples would."""
        return self.copies.rate.low > self.copies.held_out.high


def finding_of(measured: Measured) -> Finding:
    """Return the finding: `flagged` if samples are copies of training examples, or if the generator has collapsed."""
    copied, held_out = measured.copies.rate, measured.copies.held_out
    frechet, floor = measured.samples.frechet, measured.floor.frechet
    verdict: AuditVerdict = "flagged" if measured.copied or measured.collapsed else "not flagged"
    collapse = (
        "; the generator has collapsed: its samples are like few training examples"
        if measured.collapsed
        else ""
    )
    headline = (
        f"{percent(copied.value)} of the samples are copies of training examples ({percent(copied.low)} to "
        f"{percent(copied.high)}; held-out examples: {percent(held_out.value)}), and the Fréchet distance is "
        f"{frechet.value:.3g} ({floor.value:.3g} for held-out examples){collapse}"
    )
    rule = (
        f"a sample is a copy if it is nearer to a training example than {measured.copies.threshold:.4g}, as 1 % of the "
        "held-out examples are"
    )
    variety = f"{measured.distinct:,} of {len(measured.copies.distance):,} samples are different"
    if measured.classes > 1:
        variety += (
            f"; their predicted classes have an entropy of {measured.entropy:.3f} (training examples: "
            f"{measured.training_entropy:.3f})"
        )
    reasons = [rule, variety]
    if measured.collapsed:
        reasons.insert(
            0, f"the samples cover {percent(measured.samples.recall.value)} of the training examples (recall)"
        )
    return Finding(
        verdict,
        headline,
        reasons,
        _facts(measured),
        {"frechet": frechet, "copy_rate": copied},
        (_measures(measured),),
        (_pairs(measured),),
        limits=(_FEATURES if measured.classes > 1 else _SCALED_COLUMNS, _DISTANCE, _TOGETHER),
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
        "copy_rate": measured.copies.rate.value,
        "held_out_copy_rate": measured.copies.held_out.value,
        "copy_threshold": measured.copies.threshold,
        "collapsed": measured.collapsed,
        "distinct": measured.distinct,
        "label_entropy": measured.entropy,
        "training_label_entropy": measured.training_entropy,
        "features": measured.features,
        **{f.name: getattr(measured.samples, f.name).value for f in fields(Quality)},
        "floor": {f.name: getattr(measured.floor, f.name).value for f in fields(Quality)},
    }


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


def _pairs(measured: Measured) -> Picture:
    """The samples that are nearest to a training example, each beside that example."""
    closest = _closest(measured.copies.distance)
    captions = [
        caption
        for distance, row in zip(
            measured.copies.distance[closest], measured.copies.nearest[closest], strict=True
        )
        for caption in (
            f"sample, distance {float(distance):.3g}",
            f"its nearest training example, row {int(row)}",
        )
    ]
    state = "are copies" if measured.copied else "are not nearer than held-out examples"
    return Picture(_NEAREST, f"The samples nearest to training examples {state}", captions, together=2)


def images_of(samples: Tensor, training: Tensor, columns: Columns) -> dict[str, Tensor]:
    """Return the images of the samples that are nearest to a training example, each beside that example."""
    closest = _closest(columns["distance"])
    pairs = (samples[closest], training[columns["nearest"][closest].to(training.device)].to(samples))
    both = torch.stack(pairs, 1).flatten(0, 1)
    return {_NEAREST: in_unit_range(both, float(both.min()), float(both.max()))}


def _closest(distance: PerExample) -> Tensor:
    return distance.argsort(stable=True)[:_SHOWN]
