"""The steps of the audit of a generator, and its finding."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields, replace
from functools import partial
from typing import Annotated, NotRequired

import torch
from pydantic import Field, Strict
from torch import Tensor
from typing_extensions import TypedDict

from holdfast.audits.finding import (
    AuditVerdict,
    Finding,
    Images,
    Picture,
    Size,
    StoredSteps,
    Table,
    in_unit_range,
    penultimate,
)
from holdfast.audits.generator import copies
from holdfast.audits.generator.attacks import Autoencoder, Discriminator, Membership
from holdfast.audits.generator.backdoor import BackdoorScan
from holdfast.audits.generator.copies import FORMS, Copies, Quality, TablePart, copies_of, measured_copies
from holdfast.audits.generator.sensitivity import Context, LatentChange, Part, share_and_range, shown
from holdfast.core.batch import Batch, fingerprints_of
from holdfast.core.catalogue import AUDITS
from holdfast.core.draws import Draws
from holdfast.core.errors import Need, UsageError
from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Columns
from holdfast.core.model import Classifier
from holdfast.core.types import PerExample
from holdfast.gates.grammar import parse
from holdfast.io.data.layouts import Ranges
from holdfast.io.models.generators import OpenedGenerator
from holdfast.reports.words import percent
from holdfast.runs.engine.run import Run
from holdfast.runs.store.columns import Form, whole
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
class GeneratorMeasurements:
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


def finding_of(measured: GeneratorMeasurements) -> Finding:
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
        (_measure_blocks(measured), _shares(copies), *_listed(copies)),
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


def _facts(measured: GeneratorMeasurements) -> dict[str, object]:
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


def _measure_blocks(measured: GeneratorMeasurements) -> Table:
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


SAMPLES, FEATURES, MEASURED, MISSING = "samples", "features", "measured", "missing"
"""Names of the steps of an audit: the samples, the features of all examples, the distances and measures from which
quality and copies are computed, and what the generator lacks for each part."""
LEAST = 200
"""smallest number of held-out examples: the threshold of copies is the lowest percent of one half of them"""
ALWAYS = ("frechet", "copy_rate", "near_copy_rate")
"""Metrics that every audit measures; the others are those of its parts."""
COMPARED = 10_000
"""largest number of training examples with which the quality is measured; its time grows with their square"""
_SETS = ("samples", "training", "held_out")


@dataclass(frozen=True)
class GeneratorAudit:
    """What an audit of a generator compares."""

    training: Batch
    held_out: Batch
    n: int
    """number of samples"""
    draw: Callable[[], Tensor]
    """function that returns the samples (n, *features)"""
    extractor: Callable[[], Classifier] | None
    """function that returns the network whose features are compared, on `device`; None for tables, whose scaled columns
    are compared"""
    device: torch.device
    rng: Draws
    generator: OpenedGenerator | None = None
    """None for a file of samples"""
    parts: tuple[Part, ...] = ()
    """further parts of the audit, whether they apply or not"""
    rows: tuple[Tensor, Tensor, Tensor] | None = None
    """for tables, the same samples, training and held-out examples with the values of the files, which are compared
    byte for byte"""
    compares_ranges: bool = True
    """whether samples in another range than the training examples are refused"""

    @property
    def steps(self) -> tuple[str, ...]:
        """Names of the stages in their order."""
        return (SAMPLES, FEATURES, MEASURED, MISSING, *(part.name for part in self.parts))


def refuse_incomparable(how: GeneratorAudit) -> None:
    """Raise `UsageError` if the held-out examples are too few, have another shape, or are training examples."""
    if len(how.held_out) < LEAST:
        raise UsageError(
            f"there are {len(how.held_out)} held-out examples; at least {LEAST} were expected, because the threshold "
            "of copies is the lowest percent of the distances of one half of them"
        )
    if how.held_out.example_shape != how.training.example_shape:
        raise UsageError(
            f"held-out examples have shape {how.held_out.example_shape}, and training examples "
            f"{how.training.example_shape}; the same shape was expected"
        )
    known = Counter(how.training.fingerprints())
    shared = sum(mark in known for mark in how.held_out.fingerprints())
    repeating = sum(count for count in known.values() if count > 1) / len(how.training)
    # rows of columns with few values repeat by nature, among the training examples too
    most = (1 + repeating) / 2 * len(how.held_out) if len(how.training.example_shape) == 1 else 0
    if shared > most:
        raise UsageError(
            f"{shared:,} of {len(how.held_out):,} held-out examples are among the training examples, so that copies "
            "cannot be told from new samples; give examples that the generator was not trained on"
        )


def needs_of(how: GeneratorAudit, gates: Sequence[str]) -> tuple[Need, ...]:
    """Return what the steps of an audit need. The gate on its verdict needs no metric."""
    metrics = [gate for gate in gates if gate.strip() != AUDITS["generator"].gate]
    return tuple(Need("gates", partial(_refuse_unmeasured, gate, how)) for gate in metrics)


def _refuse_unmeasured(gate: str, how: GeneratorAudit) -> None:
    """Raise `UsageError` if no part of the audit that applies measures the metric of a gate."""
    metric = parse(gate, AUDITS["generator"].metrics).metric
    if metric in ALWAYS:
        return
    samples = how.training.x[:1].expand(how.n, *how.training.example_shape)  # only their number matters
    lacking = "rows of tables"
    for part in how.parts:
        if metric in part.metrics:
            context = Context(samples, how.training, how.held_out, how.generator, how.device, how.rng)
            lacking = part.missing(context)
            if not lacking:
                return
    raise UsageError(f"gate {gate!r} cannot be judged: {metric} needs {lacking}; leave the gate out")


def measure(run: Run, how: GeneratorAudit, prefix: str = "") -> Images:
    """Take the steps of the audit, and return its images. The names of the steps begin with `prefix`."""

    def drawn() -> Columns:
        samples = _in_space_of(how.draw(), how)
        return {"id": torch.arange(len(samples)), "x": samples}

    samples = run.stage(prefix + SAMPLES, drawn).columns["x"]
    features = run.stage(prefix + FEATURES, partial(_features, how, samples)).columns
    measures = run.stage(prefix + MEASURED, partial(_measures, how, samples, features)).columns
    contexts = {
        part: Context(samples, how.training, how.held_out, how.generator, how.device, how.rng.at(part.name))
        for part in how.parts
    }
    missing = run.document(
        prefix + MISSING, lambda: {part.name: part.missing(context) for part, context in contexts.items()}
    )
    nothing: Columns = {"id": torch.empty(0, dtype=torch.int64)}
    columns = {
        part: run.stage(
            prefix + part.name, (lambda: nothing) if missing[part.name] else partial(part.measure, context)
        ).columns
        for part, context in contexts.items()
    }

    def images() -> dict[str, Tensor]:
        found = images_of(samples, how.training.x, measures)
        if how.training.x.dim() == 4:
            for part in how.parts:
                found |= {} if missing[part.name] else part.images(columns[part], contexts[part])
        return found

    return images


class _Settings(TypedDict):
    latent: Annotated[float, Strict(), Field(ge=0, le=1e9)]
    condition: Size | None
    columns: NotRequired[list[str]]


def concluded(steps: StoredSteps) -> Finding:
    """Return the finding of an audit from its stored steps."""
    finding = finding_of_steps(steps)
    return replace(finding, pictures=steps.pictures(finding.pictures))


def finding_of_steps(steps: StoredSteps) -> Finding:
    """Return the finding of an audit from its stored steps, with all pictures."""
    settings = steps.settings(_Settings)
    parts = parts_of(settings["latent"], settings["condition"], settings.get("columns"))
    missing = steps.document(MISSING, dict[str, str])
    found, lacking = list[tuple[str, Finding]](), list[tuple[str, str]]()
    for part in parts:
        if missing.get(part.name):
            lacking.append((part.title, missing[part.name]))
        else:
            found.append((part.name, part.concluded(steps.columns(part.name, part.forms()))))
    return joined(finding_of(_measured(steps)), found, lacking)


def parts_of(latent: float, condition: int | None, columns: Sequence[str] | None = None) -> tuple[Part, ...]:
    """Return the parts of the audit beside quality and copies. `columns` are the names of those of a table."""
    search = (LatentChange(latent, condition), Autoencoder(latent), Discriminator(latent))
    tables = () if columns is None else (TablePart(tuple(columns)),)
    return (*tables, *(search if latent else ()), Membership(), BackdoorScan())


def _in_space_of(samples: Tensor, how: GeneratorAudit) -> Tensor:
    """Return samples with the shape of the training examples; a missing channel of grey images is added. Raises
    `UsageError` for another shape or range.
    """
    shape, expected = tuple(samples.shape[1:]), how.training.example_shape
    if [size for size in shape if size != 1] != [size for size in expected if size != 1]:
        raise UsageError(
            f"samples have shape {shape}, and training examples {expected}; the same shape was expected"
        )
    placed = samples.view(-1, *expected).to(how.training.x.dtype)
    if how.extractor is None or not how.compares_ranges:  # columns of tables may have other extremes
        return placed
    ranges = Ranges.of(placed, how.training.x)
    if how.generator is None:
        ranges.refuse("the samples of the file have", "the training examples have")
    elif not ranges.may_be_poor:  # else the finding states them
        ranges.refuse(f"the samples of {how.generator.name} have", "the training examples have")
    return placed


def _features(how: GeneratorAudit, samples: Tensor) -> Columns:
    """The features of all examples, and their predicted classes."""
    columns, classes = dict[str, Tensor](), 1
    extractor = None if how.extractor is None else how.extractor()
    for name, x in zip(_SETS, (samples, how.training.x, how.held_out.x), strict=True):
        if extractor is None:
            found, predicted = x.double(), torch.zeros(len(x), dtype=torch.int64)
        else:
            found, logits = penultimate(extractor, x.to(how.device))
            predicted, classes = logits.argmax(1), logits.shape[1]
        columns |= {f"{name}.features": found, f"{name}.class": predicted}
    n = len(samples)
    return {"id": torch.arange(n), **columns, "classes": torch.full((n,), classes)}


def _measures(how: GeneratorAudit, samples: Tensor, columns: Columns) -> Columns:
    """All from which quality and copies are computed without features and examples."""
    sets = dict(zip(_SETS, standardised(*(columns[f"{name}.features"] for name in _SETS)), strict=True))
    dimensions, n = sets["training"].shape[1], min(len(samples), len(how.held_out))
    if min(n, len(how.training)) <= dimensions:
        raise UsageError(
            f"{min(n, len(how.training))} examples are compared by {dimensions} features, and a Fréchet distance needs "
            f"more examples than features; give at least {dimensions + 1} samples, training and held-out examples, or "
            "a network with fewer features"
        )
    classes, reference = int(columns["classes"][0]), sets["training"]
    if len(reference) > COMPARED:  # a random part, because a file may be sorted by class
        order = how.rng.at("reference").bits(torch.arange(len(reference))).argsort(stable=True)
        reference = reference[order[:COMPARED]]
    return {
        "id": torch.arange(len(samples)),
        **measured_copies((samples, how.training.x, how.held_out.x), how.rows),
        "ranges": torch.tensor(astuple(Ranges.of(samples, how.training.x)), dtype=torch.float64),
        **{
            f"{name}.values": copies.measured_values(sets[name][:n], reference)
            for name in ("samples", "held_out")
        },
        **{
            f"{name}.classes": torch.bincount(columns[f"{name}.class"], minlength=classes)
            for name in ("samples", "training")
        },
        "numbers": torch.tensor([n, len({*fingerprints_of(samples)}), dimensions, len(reference)]),
    }


_FORMS = {
    **FORMS,
    "ranges": Form((2, 2)),
    "samples.values": Form((copies.MEASURES, copies.VALUES)),
    "held_out.values": Form((copies.MEASURES, copies.VALUES)),
    "samples.classes": whole("classes", high=2**31),
    "training.classes": whole("classes", high=2**31),
    "numbers": whole(4, low=1),
}


def _measured(steps: StoredSteps) -> GeneratorMeasurements:
    columns = steps.columns(MEASURED, _FORMS)
    n, distinct, features, reference = columns["numbers"].tolist()
    counts = [columns[f"{name}.classes"] for name in ("samples", "training")]
    if not all(int(each.sum()) for each in counts):
        raise steps.refuse(MEASURED, "no predicted classes", "the class of each sample")
    return GeneratorMeasurements(
        copies.quality_of(columns["samples.values"], n),
        copies.quality_of(columns["held_out.values"], n),
        copies_of(columns),
        Ranges(*((low, high) for low, high in columns["ranges"].tolist())),
        copies.label_entropy(counts[0]),
        copies.label_entropy(counts[1]),
        len(counts[0]),
        distinct,
        features,
        reference,
    )


def standardised(samples: Tensor, training: Tensor, held_out: Tensor) -> tuple[Tensor, ...]:
    """Return the features with mean 0 and standard deviation 1 on the training examples, without constant ones."""
    mean, deviation = training.mean(0), training.std(0)
    varying = deviation > 1e-6 * deviation.max().clamp_min(1e-12)
    if not bool(varying.any()) or not float(deviation.max()) > 0:
        raise UsageError(
            "the features of all training examples are the same, so that nothing can be compared; give another network"
        )
    return tuple(
        ((each - mean) / deviation.clamp_min(1e-12))[:, varying] for each in (samples, training, held_out)
    )
