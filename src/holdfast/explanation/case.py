"""What an explanation is about: one example or several, with their smallest changes; and its result, a sentence and
figures with their numbers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from holdfast.attacks.fmn import FMN
from holdfast.attacks.pgd import PGD
from holdfast.attacks.protocol import attacked_inputs
from holdfast.core.batch import Batch, decoded, decoded_files, spread
from holdfast.core.constraints import Constraint
from holdfast.core.draws import Draws
from holdfast.core.meter import batch_size_for
from holdfast.core.model import Classifier
from holdfast.core.names import in_255ths
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Labels, Mask, PerExample
from holdfast.explanation.counterfactual import Counterfactual, broken, counterfactual
from holdfast.io.data.labels import Groups
from holdfast.reports import tree
from holdfast.reports.curves import class_name
from holdfast.reports.formats.csv import csv_text
from holdfast.reports.formats.html import fragment
from holdfast.reports.gallery import png, shrunk
from holdfast.reports.terminal import as_lines
from holdfast.reports.tree import Picture
from holdfast.reports.words import amount, plain, size, strict, value_text
from holdfast.reports.write import rendered, write
from holdfast.runs.harness.target import PreparedModel
from holdfast.threats.byte_changes import ByteChanges
from holdfast.threats.byte_differences import Edit, edits_of
from holdfast.threats.domains import BYTES, SIGNAL, TABLE, TEXT, is_image
from holdfast.threats.tables import Table as TableConstraint
from holdfast.threats.tables import table_of

Json = dict[str, Any]
Cell = str | int | float | None


@dataclass(frozen=True)
class Bar:
    """A bar of a chart: its label, its length as a fraction of the longest bar, and its value as text."""

    label: str
    share: float
    text: str


@dataclass(frozen=True)
class Figure:
    """A figure of an explanation, with the numbers that it shows."""

    name: str
    """name of the figure, which is unique in the explanation and does not depend on its numbers"""
    title: str
    """the finding, as a sentence"""
    alternative: str
    """description of the figure for readers who do not see it"""
    headings: tuple[str, ...]
    """names of the columns of `rows`"""
    rows: tuple[tuple[Cell, ...], ...]
    """the numbers of the figure"""
    pictures: tuple[tree.Picture, ...] = ()
    charts: tuple[tree.Chart, ...] = ()
    bars: tuple[Bar, ...] = ()
    tabular: bool = False
    """whether the rows are shown as a table, and not only as CSV"""
    note: str = ""
    """how the figure is read, and what limits it"""
    reason: str = ""
    """why the prediction changes or the model fails, as a sentence, if the figure shows it"""
    columns: int = 0
    """number of pictures in a row; 0 for as many as fit"""
    sounds: tuple[tree.Sound, ...] = ()
    large: bool = False
    """whether the pictures are shown large"""
    blocks: tuple[tree.Block, ...] = ()
    """further blocks, after the pictures"""

    @property
    def csv(self) -> str:
        """The numbers of the figure as CSV."""
        rows = ([float(f"{c:.6g}") if isinstance(c, float) else c for c in row] for row in self.rows)
        return csv_text([self.headings, *rows])

    def to_json(self) -> Json:
        """Return the figure as strict JSON, without its pictures."""
        return {
            "name": self.name,
            "title": self.title,
            "alternative": self.alternative,
            "headings": list(self.headings),
            "rows": [[strict(cell) for cell in row] for row in self.rows],
            "note": self.note,
        }


@dataclass(frozen=True, repr=False)
class Explained:
    """An explanation of one example, or of a model."""

    title: str
    """what is explained, as in `example 17 of mnist`"""
    sentence: str
    """the main finding"""
    figures: tuple[Figure, ...]
    advice: tuple[str, ...] = ()
    """what the user can do about the finding, one sentence each"""
    notes: tuple[str, ...] = ()
    """what was not applicable or not measured, with the reason, and what limits the explanation"""
    facts: tuple[tuple[str, str], ...] = ()
    """model, data, threat and seed, as names and values"""

    def __getitem__(self, name: str) -> Figure:
        """Return a figure by its name. Raises `KeyError` if there is none with this name."""
        for figure in self.figures:
            if figure.name == name:
                return figure
        raise KeyError(f"there is no figure {name!r}; this explanation has {', '.join(self.names)}")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the figures in their order."""
        return tuple(figure.name for figure in self.figures)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the prediction changes or the model fails: the reasons that figures show."""
        return tuple(figure.reason for figure in self.figures if figure.reason)

    @cached_property
    def report(self) -> tree.Report:
        """The explanation as a report."""
        lead = [
            tree.Group(title, (tree.Items(texts),))
            for title, texts in (("Why", self.reasons), ("What you can do", self.advice))
            if texts
        ]
        sections = [_section(figure) for figure in self.figures]
        sections += [tree.Section("Notes", (tree.Items(self.notes),))] if self.notes else []
        sections += [tree.Section("Explained", (tree.Facts(self.facts),), depth="page")] if self.facts else []
        content = {
            "title": self.title,
            "sentence": self.sentence,
            "reasons": list(self.reasons),
            "advice": list(self.advice),
            "notes": list(self.notes),
            "facts": dict(self.facts),
            "figures": [figure.to_json() for figure in self.figures],
        }
        headline = f"{self.title}: {self.sentence}"
        return tree.Report("explain", self.title, headline, content, sections, title=self.sentence, lead=lead)

    def fragment(self, *, level: int = 2) -> str:
        """Return the explanation as HTML without a page around it, which needs the style sheet of reports.

        `level` is the level of its first heading.
        """
        return fragment(self.report, level=level)

    def page(self) -> str:
        """Return the explanation as a self-contained HTML page without scripts."""
        return rendered(self.report, ".html")

    def to_json(self) -> str:
        """Return the explanation as strict JSON, without its pictures."""
        return rendered(self.report, ".json")

    def text(self) -> str:
        """Return the findings as text for a terminal, one line for each figure, and the result in the last one."""
        lines = [f"- {figure.title}" for figure in self.figures]
        for heading, texts in (
            ("Why:", self.reasons),
            ("What you can do:", self.advice),
            ("Notes:", self.notes),
        ):
            lines += ["", heading, *(f"- {text}" for text in texts)] if texts else []
        return as_lines([*lines, *([""] if lines else []), self.report.headline])

    def write(self, path: str | Path) -> Path:
        """Write the explanation in the format of the file suffix, such as `.html`. Return the path."""
        return write(self.report, Path(path))

    def _repr_html_(self) -> str:
        return self.fragment()

    def __repr__(self) -> str:
        return f"<Explained: {self.title}: {self.sentence}>"


def bars(labels: Sequence[str], values: Sequence[float], texts: Sequence[str]) -> tuple[Bar, ...]:
    """Return bars whose longest one has the length 1. Values are at least 0."""
    most = max([*values, 0.0]) or 1.0
    return tuple(
        Bar(label, value / most, text) for label, value, text in zip(labels, values, texts, strict=True)
    )


def _section(figure: Figure) -> tree.Section:
    blocks: list[tree.Block] = []
    if figure.pictures:
        blocks.append(tree.Pictures(figure.pictures, figure.alternative, figure.columns, figure.large))
    if figure.sounds:
        blocks.append(tree.Sounds(figure.sounds))
    blocks += [*figure.charts, *figure.blocks]
    if figure.bars:
        bars = [(bar.label, tree.Cell(bar.text, bar=(bar.share,) * 3)) for bar in figure.bars]
        blocks.append(tree.Table(("name", "value"), bars, figure.alternative))
    if figure.tabular:
        rows: list[tree.Row] = [[value_text(value) for value in row] for row in figure.rows]
        blocks.append(tree.Table(figure.headings, rows, figure.alternative))
    if figure.note:
        blocks.append(tree.Paragraph(figure.note))
    numbers = tree.Code(figure.csv.splitlines(), f"Numbers of the figure {figure.name} as CSV")
    described = (tree.Paragraph(figure.alternative), numbers)
    hidden = f" of the figure {figure.name}"
    blocks.append(tree.Group("Description and numbers", described, folded=True, hidden=hidden, depth="page"))
    return tree.Section(figure.title, blocks, depth="page")


_BLUE, _RED = (0.13, 0.40, 0.67), (0.70, 0.09, 0.17)


@dataclass(frozen=True)
class About:
    """What an explanation is about."""

    model: str
    """name of the model"""
    data: str
    """name of the data"""
    threat: str
    """the threat model in the syntax of the command line"""
    classes: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    """names of the columns of a table; empty for other inputs"""
    seed: int = 0
    digest: str = ""
    """digest of the model"""
    notes: tuple[str, ...] = ()
    examples: bool = True
    """whether pictures and words of examples are shown"""
    sampling_rate: int | None = None
    """number of samples of a second, if the inputs are clips and it is known"""

    def name_of(self, label: int) -> str:
        """Return the name of a class; "rejected" for -1."""
        return "rejected" if label < 0 else class_name(label, self.classes)

    def called(self, label: int) -> str:
        """Return a class for a sentence: its name in quotation marks, or its number."""
        return f"“{self.name_of(label)}”" if 0 <= label < len(self.classes) else self.name_of(label)

    def feature(self, place: int) -> str:
        """Return the name of a column, or its position if it has no name."""
        return self.features[place] if place < len(self.features) else f"feature {place}"

    @property
    def facts(self) -> tuple[tuple[str, str], ...]:
        """Names and values for the end of the page."""
        digest = f", digest {self.digest[:16]}" if self.digest else ""
        return (
            ("model", f"{self.model}{digest}"),
            ("data", self.data),
            ("threat", self.threat),
            ("seed", str(self.seed)),
        )


def distance_text(constraint: Constraint, distance: float, model: Classifier) -> str:
    """Return a distance as text in the unit of eps, such as `0.8/255` under `linf:8/255`."""
    if constraint.bounds_each_value and model.units is None and in_255ths(constraint.eps):
        return f"{plain(distance * 255, 2 if distance * 255 < 10 else 3)}/255"
    if constraint.in_decibels:
        return f"{size(distance, decibels=True)} below the clip" if distance else "0"
    if constraint.counts_changes:
        return amount(round(distance), "pixels" if constraint.counts_pixels else "values")
    if constraint.domain is TABLE:
        return f"{percent(distance / constraint.eps)} of the budget" if constraint.eps else plain(distance)
    return plain(distance)


def allowed_text(about: About, constraint: Constraint, model: Classifier) -> str:
    """Return what the threat model allows, such as `linf:8/255 allows 8/255`."""
    if not math.isfinite(constraint.eps):
        return f"{about.threat} allows changes of any size"
    return f"{about.threat} allows {distance_text(constraint, constraint.eps, model)}"


def certifiable(constraint: Constraint, access: Access) -> bool:
    """Return whether `holdfast certify` applies to a network under a constraint."""
    return constraint.in_input_units and access == "gradients"


def training_advice(about: About, constraint: Constraint, access: Access) -> str:
    """Return how a more robust model is trained."""
    if constraint.domain is TEXT:
        return (
            "Train a more robust model, if it is a network or a pipeline that ends with a linear classifier: holdfast "
            f"harden MODEL DATA --fit TRAIN --threat {about.threat} --recipe masked-words."
        )
    if constraint.domain is BYTES:
        return (
            "Train the model with changed files as well: holdfast assess --save-adversarial stores them. Holdfast does "
            "not harden models of files."
        )
    if access != "gradients":
        return (
            "Train a network (holdfast harden), or train the model with changed examples as well: holdfast assess "
            "--save-adversarial stores them. A model without gradients is not hardened by Holdfast."
        )
    return f"Train a more robust model: holdfast harden MODEL DATA --threat {about.threat} --budget 10min."


def changed_words(x: Tensor, x_adv: Tensor) -> list[tuple[str, str]]:
    """Return the words of a text (1, length) that differ from those of another, each with its replacement. An appended
    word replaces an empty one.
    """
    before, after = (decoded(text)[0].split() for text in (x, x_adv))
    return [(a, b) for a, b in zip_longest(before, after, fillvalue="") if a != b]


def changed_bytes(constraint: Constraint, x: Tensor, x_adv: Tensor) -> tuple[Edit, ...]:
    """Return the edits that change a file (1, length) into another one."""
    assert isinstance(constraint, ByteChanges)
    return edits_of(constraint, decoded_files(x_adv)[0], decoded_files(x)[0])


def listed(texts: Sequence[str], most: int = 3, noun: str = "others") -> str:
    """Return texts as a list in a sentence, of which at most `most` are named.

    >>> listed(["a"]), listed(["a", "b", "c"]), listed(["a", "b", "c", "d"], 2, "more words")
    ('a', 'a, b and c', 'a, b and 2 more words')
    """
    shown = [*texts[:most]] + ([amount(len(texts) - most, noun)] if len(texts) > most else [])
    return " and ".join(part for part in (", ".join(shown[:-1]), shown[-1]) if part)


def picture(x: Tensor, caption: str, model: Classifier) -> Picture:
    """Return the picture of an image (channels, height, width)."""
    low, high = (torch.as_tensor(side) for side in (model.bounds.low, model.bounds.high))
    return Picture(png(shrunk(((x.cpu() - low.cpu()) / (high - low).cpu()).float())), caption)


def signed_picture(values: Tensor, caption: str, scale: float | None = None) -> Picture:
    """Return the picture of values (height, width), red if positive, blue if negative and white if 0.

    `scale` is the absolute value with full colour; without it, it is the largest one.
    """
    values = values.cpu()
    size = float(values.abs().max()) if scale is None else scale
    share = (values / size if size > 0 else values * 0).clamp(-1, 1).float()
    colour = torch.where(
        share[None] >= 0, torch.tensor(_RED)[:, None, None], torch.tensor(_BLUE)[:, None, None]
    )
    return Picture(png(shrunk(1 - share.abs()[None] * (1 - colour))), caption)


def plane(values: Tensor) -> Tensor:
    """Return values of an image (channels, height, width) summed over the channels."""
    return values.sum(0) if values.dim() == 3 else values


def percent(share: float) -> str:
    """Return a fraction as a percentage without decimal places, or with one if it is below 10 %."""
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.2g} %"


_GRID = 28
"""longest side of the attributions whose values are written as CSV"""


@dataclass(frozen=True)
class Case:
    """One example of a model under a threat, with the results that its figures share."""

    target: PreparedModel
    batch: Batch
    """the example (1), with the predicted class as its label"""
    label: int
    threat: ThreatModel
    about: About
    baseline: Inputs
    """input (1, *features) from which integrated gradients start, and which replaces occluded values"""
    rng: Draws
    found: Counterfactual

    @property
    def x(self) -> Inputs:
        """The clean input (1, *features)."""
        return self.batch.x

    @property
    def x_adv(self) -> Inputs:
        """The counterfactual that is shown (1, *features); the clean input if none was found."""
        return self.x if self.found.shown is None else self.found.shown

    @property
    def predicted(self) -> str:
        """Name of the class that is predicted for the clean input."""
        return self.about.called(int(self.batch.y[0]))

    @property
    def explained(self) -> str:
        """Name of what attributions explain: the logit of the predicted class, of two classes minus the other one."""
        predicted = int(self.batch.y[0])
        other = f" minus that of {self.about.called(1 - predicted)}" if self.target.classes == 2 else ""
        return f"the logit of {self.predicted}{other}"

    @property
    def becomes(self) -> str:
        """Name of the class that is predicted for the counterfactual."""
        return self.about.called(self.found.predicted)

    @property
    def misclassified(self) -> bool:
        """Whether the predicted class is not the label."""
        return int(self.batch.y[0]) != self.label

    @property
    def is_text(self) -> bool:
        """Whether the inputs are texts."""
        return self.threat.constraint.domain is TEXT

    @property
    def table(self) -> TableConstraint | None:
        """The constraint if it has the rules of a table, else None."""
        return table_of(self.threat.constraint)

    @property
    def is_file(self) -> bool:
        """Whether the inputs are files."""
        return self.threat.constraint.domain is BYTES

    @property
    def is_signal(self) -> bool:
        """Whether the inputs are clips of sound."""
        return self.threat.constraint.domain is SIGNAL

    @property
    def is_picture(self) -> bool:
        """Whether the inputs are shown as pictures."""
        return is_image(self.x.shape[1:])

    @cached_property
    def noise(self) -> Inputs:
        """The clean input with random noise of the same size as the counterfactual."""
        return random_noise(self)

    @cached_property
    def predicted_of_noise(self) -> int:
        """Class that is predicted for the input with noise."""
        return int(self.target.predicted(self.target.logits(self.noise))[0])


def random_noise(case: Case) -> Inputs:
    """Return the input with random noise of the same distance as the counterfactual, with random signs of the changes
    under constraints that are no balls.
    """
    delta, constraint = case.x_adv - case.x, case.threat.constraint
    bounds = case.target.original.bounds
    signs = case.rng.at("noise").signs(case.batch.ids, *case.x.shape[1:], dtype=case.x.dtype)
    if constraint.in_input_units:
        size = constraint.distance(case.x_adv, case.x)
        length = constraint.distance(signs, torch.zeros_like(signs))
        return bounds.clamp(case.x + signs * float(size[0] / length[0]))
    if case.table is not None:
        # valid rows alone, as a model may fail for a category that the rules do not list
        budget = case.table.resized(case.found.distance)
        return budget.project(case.x + signs * budget.tensors.unit.to(case.x), case.x, bounds)
    order = case.rng.at("places").uniform(case.batch.ids, case.x[0].numel()).argsort(1)
    mixed = delta.flatten(1).gather(1, order).view_as(delta)
    return bounds.clamp(case.x + signs * mixed)


def grid_rows(planes: Sequence[Tensor]) -> tuple[tuple[Cell, ...], ...]:
    """Rows with the position and the value of each plane, averaged to at most `_GRID` pixels along each side."""
    shown = [plane(each) for each in planes]
    height, width = shown[0].shape
    size = (min(height, _GRID), min(width, _GRID))
    pooled = [adaptive_avg_pool2d(each[None, None].float(), size)[0, 0].tolist() for each in shown]
    return tuple(
        (row, column, *(each[row][column] for each in pooled))
        for row in range(size[0])
        for column in range(size[1])
    )


@dataclass(frozen=True)
class Measured:
    """What a run has stored about the examples."""

    ids: Tensor | None = None
    broken: Mask | None = None
    """mask of the examples that the run broke, in the order of `ids`"""
    adversarial_ids: Tensor | None = None
    adversarial: Inputs | None = None
    doubts: Mapping[str, str] = field(default_factory=dict)
    """state of each doubt by its name"""
    groups: Groups | None = None


@dataclass(frozen=True)
class Attacked:
    """The examples with adversarial inputs, which the figures share."""

    target: PreparedModel
    batch: Batch
    threat: ThreatModel
    about: About
    x_adv: Inputs
    """smallest changes that were found; clean inputs where none was found or the example is misclassified"""
    distance: PerExample
    """distances of `x_adv`; 0 for misclassified examples, and infinite if none was found"""
    predicted: Labels
    becomes: Labels
    """predicted classes of `x_adv`"""
    surviving: Mask
    """correct, and not broken inside the constraint"""
    missed: int
    """number of examples that survived the run, and that this search breaks"""
    rng: Draws

    @property
    def hit(self) -> Mask:
        """Correctly classified examples for which an adversarial input was found inside the constraint."""
        return (self.predicted == self.batch.y) & ~self.surviving & (self.distance > 0) & self.found

    @property
    def found(self) -> Mask:
        """Examples for which an adversarial input was found, inside the constraint or not."""
        return self.distance.isfinite()


def attacked(
    target: PreparedModel, batch: Batch, threat: ThreatModel, about: About, known: Measured, rng: Draws
) -> Attacked:
    """Return the examples of `batch` with the smallest changes that a search finds, or that a run has stored."""
    predicted = target.predicted(target.logits(batch.x))
    correct = predicted == batch.y
    x_adv, distance = _smallest(target, batch, threat, rng)
    for row, place in _positions(known.adversarial_ids, batch).items():
        assert known.adversarial is not None
        stored = known.adversarial[place : place + 1].to(batch.x)
        size = threat.constraint.distance(stored, batch.x[row : row + 1])[0]
        if size < distance[row] and bool(broken(target, batch.take(torch.tensor([row])), stored)[0]):
            x_adv[row : row + 1], distance[row] = stored, size
    distance = torch.where(correct, distance, 0.0)
    x_adv = torch.where(spread(correct & distance.isfinite(), x_adv), x_adv, batch.x)
    surviving, missed = correct & (distance > threat.constraint.eps * (1 + 1e-6) + 1e-7), 0
    if known.broken is not None:
        for row, place in _positions(known.ids, batch).items():
            missed += bool(correct[row] & ~surviving[row]) and not bool(known.broken[place])
            surviving[row] &= not bool(known.broken[place])
    becomes = target.predicted(target.logits(x_adv))
    return Attacked(target, batch, threat, about, x_adv, distance, predicted, becomes, surviving, missed, rng)


def _positions(ids: Tensor | None, batch: Batch) -> dict[int, int]:
    """Rows of the batch with the position of their ids in a stored column."""
    if ids is None:
        return {}
    stored = {value: place for place, value in enumerate(ids.tolist())}
    return {row: stored[value] for row, value in enumerate(batch.ids.tolist()) if value in stored}


def _smallest(
    target: PreparedModel, batch: Batch, threat: ThreatModel, rng: Draws
) -> tuple[Inputs, PerExample]:
    """The smallest change of each example that is found, and its size."""
    goal = None if threat.goal is None else torch.full_like(batch.y, threat.goal)
    own = batch.towards(goal)
    constraint = threat.constraint
    if constraint.is_ball and target.original.access == "gradients" and threat.access == "gradients":
        free = replace(threat, constraint=constraint.resized(math.inf))
        pieces = [*own.split(batch_size_for(own.x[:1].numel(), own.x.device.type))]
        parts = [
            attacked_inputs(FMN(), target.queried(target.optimised, some), some, free, rng=rng.at("model"))
            for some in pieces
        ]
        x_adv = torch.cat(parts)
        done = torch.cat([broken(target, a, x) for a, x in zip(pieces, parts, strict=True)])
        distance = torch.where(done, constraint.distance(x_adv, batch.x), torch.inf)
        missed = (distance > constraint.eps).nonzero()[:, 0]
        for rows in torch.split(missed, len(pieces[0])):  # the search may find larger changes alone
            some = own.take(rows)
            allowed = attacked_inputs(
                PGD(), target.queried(target.optimised, some), some, threat, rng=rng.at("allowed")
            )
            hits = broken(target, some, allowed)
            x_adv[rows[hits]] = allowed[hits]
            distance[rows[hits]] = constraint.distance(allowed[hits], batch.x[rows[hits]])
        return x_adv, distance
    points, sizes = [], []
    for row in range(len(own)):
        one = own.take(torch.tensor([row]))
        result = counterfactual(target, one, threat, rng=rng)
        points.append(one.x if result.nearest is None else result.nearest)
        sizes.append(result.distance)
    return torch.cat(points), torch.tensor(sizes, dtype=batch.x.dtype, device=batch.x.device)
