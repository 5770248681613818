"""The steps of the audit of a generator: its samples, their features, their quality, copies among them, and what each
part of the audit (`parts.py`) measures.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from holdfast.audits.features import penultimate
from holdfast.audits.finding import Finding
from holdfast.audits.generator.copies import copies
from holdfast.audits.generator.parts import Context, Part
from holdfast.audits.generator.quality import label_entropy, quality
from holdfast.audits.generator.report import Measured, finding_of, joined
from holdfast.core.batch import Batch, fingerprints_of
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.evidence import Columns
from holdfast.core.model import Classifier
from holdfast.io.models.generators import OpenedGenerator
from holdfast.runs.engine.run import Run

SAMPLES, FEATURES = "samples", "features"
"""Names of the stages of an audit."""
LEAST = 200
"""smallest number of held-out examples: the threshold of copies is the lowest percent of one half of them"""
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

    @property
    def steps(self) -> tuple[str, ...]:
        """Names of the stages in their order."""
        return (SAMPLES, FEATURES, *(part.name for part in self.parts))


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
    known = {*how.training.fingerprints()}
    shared = sum(mark in known for mark in how.held_out.fingerprints())
    # rows of tables may be equal by chance
    if shared > (len(how.held_out) // 2 if how.extractor is None else 0):
        raise UsageError(
            f"{shared:,} of {len(how.held_out):,} held-out examples are among the training examples, so that copies "
            "cannot be told from new samples; give examples that the generator was not trained on"
        )


def generator_finding(run: Run, how: GeneratorAudit, prefix: str = "") -> Finding:
    """Take the steps of the audit, and return the finding. The names of the stages begin with `prefix`."""

    def drawn() -> Columns:
        samples = _in_space_of(how.draw(), how)
        return {"id": torch.arange(len(samples)), "x": samples}

    samples = run.stage(prefix + SAMPLES, drawn).columns["x"]

    def features() -> Columns:
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

    quality_found = _concluded(how, samples, run.stage(prefix + FEATURES, features).columns)
    found, lacking = list[tuple[str, Finding]](), list[tuple[str, str]]()
    for part in how.parts:
        context = Context(
            samples, how.training, how.held_out, how.generator, how.device, how.rng.at(part.name)
        )
        if missing := part.missing(context):
            run.stage(prefix + part.name, _nothing)
            lacking.append((part.title, missing))
            continue
        columns = run.stage(prefix + part.name, partial(part.measure, context)).columns
        found.append((part.name, part.concluded(columns, context)))
    return joined(quality_found, found, lacking)


def _nothing() -> Columns:
    return {"id": torch.empty(0, dtype=torch.int64)}


def _in_space_of(samples: Tensor, how: GeneratorAudit) -> Tensor:
    """Return samples with the shape of the training examples; a missing channel of grey images is added. Raises
    `UsageError` for another shape or range.
    """
    shape, expected = tuple(samples.shape[1:]), how.training.example_shape
    if [size for size in shape if size != 1] != [size for size in expected if size != 1]:
        raise UsageError(
            f"samples have shape {shape}, and training examples {expected}; the same shape was expected"
        )
    low, high = float(samples.min()), float(samples.max())
    lowest, highest = float(how.training.x.min()), float(how.training.x.max())
    width = highest - lowest
    # columns of tables may have other extremes, which the comparison of columns shows
    if how.extractor is not None and (low < lowest - width / 2 or high > highest + width / 2):
        raise UsageError(
            f"samples have values from {low:g} to {high:g}, and training examples from {lowest:g} to {highest:g}; "
            "scale the samples to the range of the training examples"
        )
    return samples.view(-1, *expected)


def _concluded(how: GeneratorAudit, samples: Tensor, columns: Columns) -> Finding:
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
    measured = Measured(
        quality(sets["samples"][:n], reference),
        quality(sets["held_out"][:n], reference),
        copies(samples, how.training.x, how.held_out.x),
        label_entropy(columns["samples.class"], classes),
        label_entropy(columns["training.class"], classes),
        classes,
        len({*fingerprints_of(samples)}),
        dimensions,
        len(reference),
    )
    return finding_of(measured, samples, how.training.x)


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
