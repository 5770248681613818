"""The explanation of one example: its counterfactual, attributions before and after the change, a slice through the
decision regions, and the nearest training examples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from holdfast.certifiers.slices import beside, boundary_slices
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.tables.table import Table
from holdfast.core.texts import decoded
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Inputs
from holdfast.explanation.attributions import (
    Integrated,
    default_window,
    gradient,
    has_gradients,
    integrated_gradients,
    logits_of_class,
    occlusion,
    rank_correlation,
    smooth_gradient,
    top_overlap,
)
from holdfast.explanation.counterfactual import BALLS, Counterfactual, changes, counterfactual
from holdfast.explanation.explained import Bar, Cell, Explained, Figure, Picture, bars
from holdfast.explanation.neighbours import Checkpoint, neighbour_figure, tracin_figure
from holdfast.explanation.wording import (
    About,
    distance_text,
    is_picture,
    percent,
    picture,
    plane,
    signed_picture,
)
from holdfast.reports.geometry import PALETTE
from holdfast.reports.numbers import plain
from holdfast.runs.harness import Target

_DRAWS = 16
"""noises of SmoothGrad"""
_SIDE = 41
"""points along each side of the slice"""
_GRID = 28
"""longest side of the attributions whose values are written as CSV"""
_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
_MOST_COLUMNS = 12
"""columns of a table that are shown"""


@dataclass(frozen=True)
class Case:
    """One example of a model under a threat, with the results that its figures share."""

    target: Target
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
        return self.about.name_of(int(self.batch.y[0]))

    @property
    def becomes(self) -> str:
        """Name of the class that is predicted for the counterfactual."""
        return self.about.name_of(self.found.predicted)


def explain_example(
    target: Target,
    batch: Batch,
    threat: ThreatModel,
    about: About,
    *,
    rng: Draws,
    baseline: Inputs | None = None,
    stored: Inputs | None = None,
    train: Batch | None = None,
    checkpoints: Sequence[Checkpoint] = (),
) -> Explained:
    """Explain the prediction of a model for one example, `batch` (1).

    The counterfactual starts from the predicted class, also if it is wrong. `baseline` (1, *features) is the lowest
    valid value if it is None. `stored` is an adversarial input of an earlier run; `train` contains training examples,
    and `checkpoints` the model at several epochs of its training.
    """
    with target.repeatable(rng):
        predicted = target.predicted(target.logits(batch.x))
    label = int(batch.y[0])
    own = batch.labelled(predicted.clamp_min(0))
    if threat.goal is not None:
        own = own.towards(torch.full_like(own.y, threat.goal))
    start = stored if stored is not None and int(predicted[0]) == label else None
    found = counterfactual(target, own, threat, rng=rng, stored=start)
    low, _ = target.bare.bounds.like(batch.x)
    of = low.expand_as(batch.x).clone() if baseline is None else baseline.to(batch.x)
    case = Case(target, own, label, threat, about, of, rng, found)
    figures, notes = [_change(case)], list(about.notes)
    if found.shown is not None and not is_text(case):
        figures.append(_places(case))
    more, remarks = _attributions(case)
    figures += more
    notes += remarks
    if found.shown is not None and isinstance(threat.constraint, BALLS):
        figures.append(_slice(case))
    if train is None:
        notes.append(
            "The nearest training examples are not shown, because no training examples were given (train, "
            "or --train on the command line)."
        )
    elif not is_text(case):
        figures.append(neighbour_figure(target, case.x, case.x_adv, train, about))
    if int(predicted[0]) != label:
        figures += tracin_figure(target, batch, predicted, train, checkpoints, about, notes)
    title = f"example {int(batch.ids[0])} of {about.data}"
    return Explained(title, _sentence(case), tuple(figures), _advice(case), tuple(notes), about.facts)


def is_text(case: Case) -> bool:
    """Return whether the inputs are texts."""
    return case.threat.constraint.name == "text"


def _sentence(case: Case) -> str:
    """The finding in one sentence."""
    wrong = int(case.batch.y[0]) != case.label
    name = f"Predicted as {case.predicted}"
    name += f", and the label is {case.about.name_of(case.label)}" if wrong else ", which is right"
    if case.found.shown is None:
        return f"{name}; no change allowed by {case.about.threat} was found that changes the prediction"
    size = distance_text(case.threat.constraint, case.found.distance, case.target.bare)
    where = "" if case.found.inside else f", which is outside of {case.about.threat}"
    text = f"{name}; it becomes {case.becomes} at {size}{where}"
    if is_text(case):
        return f"{text}: {_changed_words(case)} changed"
    values = case.x[0].numel()
    changed = int(changes(case.x_adv, case.x).sum())
    if not is_picture(case.x.shape[1:]):
        return f"{text}, with {changed} of {values} columns changed"
    share, top = _concentration(case)
    return f"{text}; {percent(share)} of the change lies in {percent(top)} of the pixels"


def _changed_words(case: Case) -> str:
    count = len(_words(case))
    return f"{count} word{'' if count == 1 else 's'}"


def _concentration(case: Case, share: float = 0.05) -> tuple[float, float]:
    """The fraction of the change in the most changed pixels, and the fraction of the pixels that these are."""
    change = _pixel_change(case).flatten()
    k = max(1, round(share * change.numel()))
    total = float(change.sum())
    return (float(change.topk(k).values.sum()) / total if total else 0.0), k / change.numel()


def _pixel_change(case: Case) -> Tensor:
    change = (case.x_adv - case.x)[0].abs().nan_to_num(0)
    return plane(change)


def _advice(case: Case) -> tuple[str, ...]:
    if case.found.shown is None:
        return (
            "Assess more examples with holdfast assess; one robust example is no evidence for the model.",
        )
    if not case.found.inside:
        return (
            f"This example is robust as far as the search shows; {case.about.threat} allows smaller changes only.",
        )
    share, top = (0.0, 0.0) if is_text(case) else _concentration(case)
    advice = [f"Train against such changes with holdfast harden MODEL DATA --threat {case.about.threat}."]
    if share > 0.6 and top <= 0.06:
        advice.append("The change is concentrated on few values: try a threat with l0 or a patch as well.")
    if int(case.batch.y[0]) != case.label:
        advice.insert(
            0, "The clean input is already misclassified: check its label, and training examples like it."
        )
    return tuple(advice)


def _values(case: Case, x: Inputs) -> list[Cell]:
    """Values of a row of a table in the units of the data."""
    units, rules = case.target.bare.units, getattr(case.threat.constraint, "rules", None)
    row = x if units is None else units.normalisation.done(x)
    shown: list[Cell] = []
    for place, value in enumerate(row.flatten().tolist()):
        categories = () if rules is None else rules.columns[rules.names[place]].values
        shown.append(categories[int(value)] if categories and not math.isnan(value) else value)
    return shown


def _words(case: Case) -> list[tuple[str, str]]:
    before, after = (decoded(x)[0].split() for x in (case.x, case.x_adv))
    size = max(len(before), len(after))
    pairs = zip(before + [""] * (size - len(before)), after + [""] * (size - len(after)), strict=True)
    return [(a, b) for a, b in pairs if a != b]


def _change(case: Case) -> Figure:
    """The input, its change and the counterfactual, beside random noise of the same size."""
    if case.found.shown is None:
        title = f"No counterfactual was found with {case.found.attack}"
        shown = (picture(case.x[0], "the input", case.target.bare),) if is_picture(case.x.shape[1:]) else ()
        note = "An example for which a search finds nothing may still be broken by another one."
        return Figure("change", title, title, ("attack",), ((case.found.attack,),), shown, note=note)
    size = distance_text(case.threat.constraint, case.found.distance, case.target.bare)
    title = f"{case.predicted} becomes {case.becomes} at {size}"
    note = (
        f"Found by {case.found.attack}. The model and the constraint were applied again to every input shown."
    )
    if is_text(case):
        rows: list[tuple[Cell, ...]] = [(a, b) for a, b in _words(case)]
        texts = [decoded(x)[0] for x in (case.x, case.x_adv)]
        alternative = f"The text “{texts[0]}” becomes “{texts[1]}”."
        return Figure("change", title, alternative, ("word", "becomes"), tuple(rows), tabular=True, note=note)
    if not is_picture(case.x.shape[1:]):
        return _changed_columns(case, title, note)
    return _changed_pixels(case, title, note)


def _changed_columns(case: Case, title: str, note: str) -> Figure:
    before, after = _values(case, case.x), _values(case, case.x_adv)
    order = (case.x_adv - case.x).abs().nan_to_num(0).flatten().argsort(descending=True, stable=True)
    changed = changes(case.x_adv, case.x).flatten().tolist()
    rows = [(case.about.feature(k), before[k], after[k]) for k in order.tolist() if changed[k]]
    alternative = f"{len(rows)} of {len(before)} columns change, listed with both values."
    return Figure(
        "change", title, alternative, ("column", "value", "becomes"), tuple(rows), tabular=True, note=note
    )


def _changed_pixels(case: Case, title: str, note: str) -> Figure:
    model, nearest, noise = case.target.bare, case.found.nearest, random_noise(case)
    assert nearest is not None
    delta, sparse = (nearest - case.x)[0], case.found.sparse
    largest = float(delta.abs().max())
    judged = case.about.name_of(int(case.target.predicted(case.target.logits(noise))[0]))
    pictures = [
        picture(case.x[0], f"the input, predicted as {case.predicted}", model),
        signed_picture(plane(delta), f"the smallest change, at most {plain(largest)} (red up, blue down)"),
        picture(nearest[0], f"the nearest counterfactual, predicted as {case.becomes}", model),
    ]
    if sparse is not None:
        other = case.about.name_of(int(case.target.predicted(case.target.logits(sparse))[0]))
        count = int((plane((sparse - case.x)[0].abs()) > 0).sum())
        pictures.append(
            picture(sparse[0], f"the sparse one, {count} pixels changed, predicted as {other}", model)
        )
    pictures.append(picture(noise[0], f"random noise of the same size, predicted as {judged}", model))
    rows = _grid_rows((case.x[0], delta, (case.x_adv - case.x)[0]))
    alternative = f"{len(pictures)} pictures: " + "; ".join(p.caption for p in pictures) + "."
    headings = ("row", "column", "input", "smallest change", "shown change")
    return Figure("change", title, alternative, headings, rows, tuple(pictures), note=note)


def random_noise(case: Case) -> Inputs:
    """Return the input with random noise of the same distance as the counterfactual, with random signs of the changes
    under constraints that are no balls.
    """
    delta, constraint = case.x_adv - case.x, case.threat.constraint
    bounds = case.target.bare.bounds
    signs = case.rng.at("noise").signs(case.batch.ids, *case.x.shape[1:], dtype=case.x.dtype)
    if isinstance(constraint, BALLS) and constraint.name != "l0":
        size = constraint.distance(case.x_adv, case.x)
        length = constraint.distance(signs, torch.zeros_like(signs))
        return bounds.clamp(case.x + signs * float(size[0] / length[0]))
    if isinstance(constraint, Table):
        # valid rows alone, as a model may fail for a category that the rules do not list
        budget = constraint.resized(case.found.distance)
        return budget.project(case.x + signs * constraint.tensors.unit.to(case.x), case.x, bounds)
    order = case.rng.at("places").uniform(case.batch.ids, case.x[0].numel()).argsort(1)
    mixed = delta.flatten(1).gather(1, order).view_as(delta)
    return bounds.clamp(case.x + signs * mixed)


def _grid_rows(planes: Sequence[Tensor]) -> tuple[tuple[Cell, ...], ...]:
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


def _places(case: Case) -> Figure:
    """How concentrated the change is."""
    change = _pixel_change(case).flatten()
    total = float(change.sum()) or 1.0
    ordered = change.sort(descending=True).values
    noun = "pixels" if is_picture(case.x.shape[1:]) else "columns"
    rows = []
    for share in _SHARES:
        k = max(1, round(share * len(change)))
        rows.append((k, k / len(change), float(ordered[:k].sum()) / total))
    rows = sorted(set(rows))
    share, top = _concentration(case)
    title = f"{percent(share)} of the change lies in {percent(top)} of the {noun}"
    return Figure(
        "concentration",
        title,
        f"Bars: share of the change in the most changed {noun}, from {rows[0][0]} to {rows[-1][0]} of them.",
        (noun, "share of all", "share of the change"),
        tuple(rows),
        bars=tuple(Bar(f"{k} {noun} ({percent(part)})", s, percent(s)) for k, part, s in rows),
    )


def _attributions(case: Case) -> tuple[list[Figure], list[str]]:
    """Figures of the attributions of the clean input, with noise and after the change, and notes."""
    if is_text(case):
        return [_word_effects(case)], []
    notes: list[str] = []
    inputs = torch.cat((case.x, random_noise(case), case.x_adv)) if case.found.shown is not None else case.x
    classes = case.batch.y.expand(len(inputs))
    baseline = case.baseline.expand_as(inputs)
    model, methods = case.target.bare, dict[str, Tensor]()
    integrated: Integrated | None = None
    if has_gradients(model, inputs) and not inputs.isnan().any():
        methods["gradient"] = gradient(model, inputs, classes)
        methods["SmoothGrad"] = smooth_gradient(model, inputs, classes, smoothing_noise(case, inputs))
        integrated = integrated_gradients(model, inputs, baseline, classes)
        methods["integrated gradients"] = integrated.values
    else:
        reason = "has missing values" if inputs.isnan().any() else "gives no gradients"
        notes.append(
            f"The {'input' if inputs.isnan().any() else 'model'} {reason}, so occlusion is shown, and not gradients, "
            "SmoothGrad and integrated gradients."
        )
    methods["occlusion"] = occlusion(model, inputs, baseline, classes, *default_window(inputs.shape[1:]))
    figures = [_attribution_figure(case, methods, integrated)]
    if len(inputs) == 3:
        figures.append(_stability(methods))
    return figures, notes


def smoothing_noise(case: Case, inputs: Inputs) -> Tensor:
    """Return the noise of SmoothGrad (draws, n, *features), the same for each input, with a tenth of the range of the
    input as its standard deviation. Under rules of a table, the range is that of each column, and categories and
    columns without limits do not change.
    """
    x, constraint = case.x, case.threat.constraint
    draws = [
        case.rng.at("smooth", k).normal(case.batch.ids, *x.shape[1:], dtype=x.dtype) for k in range(_DRAWS)
    ]
    spread = (x.amax() - x.amin()).clamp_min(1e-6) / 10
    if isinstance(constraint, Table):
        rules = constraint.tensors
        width = (rules.high - rules.low).nan_to_num(0, posinf=0)
        spread = torch.where(rules.category | rules.grouped, 0, width).to(x) / 10
    return torch.stack([(spread * drawn).expand_as(inputs) for drawn in draws])


def _attribution_figure(case: Case, methods: dict[str, Tensor], integrated: Integrated | None) -> Figure:
    kinds = ("clean", "with noise", "after the change")[: len(next(iter(methods.values())))]
    signs = (
        "red raises it, blue"
        if is_picture(case.x.shape[1:])
        else "a positive value raises it, a negative one"
    )
    note = f"Attributions of the logit of {case.predicted}: {signs} lowers it."
    if integrated is not None:
        gap = float(integrated.gap.max())
        note += (
            f" Integrated gradients sum to the difference of the logits up to {100 * gap:.2g} % "
            f"({integrated.nodes} nodes)."
        )
    pairs = [(name, k, kind) for name in methods for k, kind in enumerate(kinds)]
    title = f"What the logit of {case.predicted} depends on, before and after the change"
    alternative = f"For each of {', '.join(methods)}: attributions of the input {', '.join(kinds)}."
    headings = [f"{name}, {kind}" for name, _, kind in pairs]
    if is_picture(case.x.shape[1:]):
        scales = {name: float(plane(values[0]).abs().max()) for name, values in methods.items()}
        shown = tuple(signed_picture(plane(methods[n][k]), f"{n}, {kind}", scales[n]) for n, k, kind in pairs)
        rows = _grid_rows([methods[name][k] for name, k, _ in pairs])
        return Figure(
            "attributions", title, alternative, ("row", "column", *headings), rows, shown, note=note
        )
    order = methods["occlusion"].abs().nan_to_num(0).amax(0).flatten().argsort(descending=True, stable=True)
    table: tuple[tuple[Cell, ...], ...] = tuple(
        (case.about.feature(p), *(float(methods[n][k].flatten()[p]) for n, k, _ in pairs))
        for p in order.tolist()
    )
    top = tuple(row for row in table[:_MOST_COLUMNS])
    left = (
        f" The {len(table) - len(top)} columns with smaller effects are left out."
        if len(top) < len(table)
        else ""
    )
    return Figure(
        "attributions", title, alternative, ("column", *headings), top, tabular=True, note=note + left
    )


def _stability(methods: dict[str, Tensor]) -> Figure:
    """How much each attribution changes by the attack and by noise of the same size."""
    rows: tuple[tuple[str, float, float, float, float], ...] = tuple(
        (
            name,
            rank_correlation(values[0], values[2]),
            rank_correlation(values[0], values[1]),
            top_overlap(values[0], values[2]),
            top_overlap(values[0], values[1]),
        )
        for name, values in methods.items()
    )
    mean = [sum(column) / len(rows) for column in ([r[1] for r in rows], [r[2] for r in rows])]
    more = "more" if mean[0] < mean[1] - 0.02 else "no more"
    title = f"The attack moves the attributions {more} than noise of the same size"
    text = f"Rank correlation with the clean attribution: {mean[0]:.2f} after the change, {mean[1]:.2f} with noise."
    headings = (
        "method",
        "correlation, change",
        "correlation, noise",
        "overlap of top 5 %, change",
        "overlap, noise",
    )
    return Figure("stability", title, text, headings, rows, tabular=True, note=text)


def _word_effects(case: Case) -> Figure:
    """The fall of the logit when one word is left out, before and after the change."""
    rows: list[tuple[Cell, ...]] = []
    from holdfast.core.texts import encoded  # late: few inputs are texts

    inputs = {"clean": case.x} | ({} if case.found.shown is None else {"changed": case.x_adv})
    for kind, x in inputs.items():
        words = decoded(x)[0].split()
        if len(words) < 2:
            continue
        without = [" ".join(words[:k] + words[k + 1 :]) for k in range(len(words))]
        points = encoded([*without, " ".join(words)], x.shape[1]).to(x)
        logits = logits_of_class(case.target.bare, points, case.batch.y.expand(len(points)))
        effects = (logits[-1] - logits[:-1]).tolist()
        rows += [(kind, word, effect) for word, effect in zip(words, effects, strict=True)]
    top = sorted(rows, key=lambda row: -abs(float(row[2] or 0)))[:_MOST_COLUMNS]
    title = f"The word “{top[0][1]}” has the largest effect" if top else "The text has one word"
    shown = bars(
        [f"{r[1]} ({r[0]})" for r in top],
        [abs(float(r[2] or 0)) for r in top],
        [plain(float(r[2] or 0)) for r in top],
    )
    text = f"Fall of the logit of {case.predicted} when one word is left out; the largest effects first."
    return Figure(
        "attributions", title, text, ("text", "word", "fall of the logit"), tuple(rows), bars=shown, note=text
    )


def _slice(case: Case) -> Figure:
    """The predicted classes in the plane of the change and a random direction, with the circle of eps."""
    constraint, x = case.threat.constraint, case.x
    nearest = case.found.nearest
    assert nearest is not None
    across = nearest - x
    up = beside(across, case.rng.at("slice").normal(case.batch.ids, *x.shape[1:], dtype=x.dtype))
    size = float(constraint.distance(nearest, x)[0])
    eps = constraint.eps if math.isfinite(constraint.eps) else size
    reach = min(max(1.6, 1.4 * eps / size if size else 1.6), 12.0)
    grid = boundary_slices(
        case.target.bare, x, across, up, bounds=case.target.bare.bounds, side=_SIDE, reach=reach
    )[0].long()
    steps = torch.linspace(-reach, reach, _SIDE, dtype=x.dtype, device=x.device)
    t, s = (
        each.reshape(-1, *[1] * (x.dim() - 1)) for each in torch.meshgrid(steps.flip(0), steps, indexing="ij")
    )
    points = x + s * across + t * up
    inside = (constraint.distance(points, x.expand_as(points)) <= eps).view(_SIDE, _SIDE).cpu()
    predicted = torch.where(grid < 0, -1 - grid, grid)
    own = int(case.batch.y[0])
    same = float((predicted == own)[inside].float().mean())
    classes = [own, *(k for k in sorted(set(predicted.flatten().tolist())) if k != own)]
    rows = tuple(
        (
            float(steps[column]),
            float(steps.flip(0)[row]),
            int(predicted[row, column]),
            int(inside[row, column]),
        )
        for row in range(_SIDE)
        for column in range(_SIDE)
    )
    key = ", ".join(f"{_COLOURS[min(k, 8)]} {case.about.name_of(c)}" for k, c in enumerate(classes))
    title = f"{percent(same)} of the plane inside eps keeps the prediction {case.predicted}"
    text = (
        "The plane through the input (white dot), the nearest counterfactual (black dot, right of it) and a random "
        f"direction; the black line is eps. Colours: {key}."
    )
    headings = ("along the change", "along a random direction", "predicted class", "inside eps")
    drawn = _slice_picture(predicted, inside, classes, reach)
    return Figure("slice", title, text, headings, rows, (drawn,), note=text)


_COLOURS = ("light blue", "orange", "green", "pink", "yellow", "red", "blue", "brown", "black")


def _slice_picture(predicted: Tensor, inside: Tensor, classes: Sequence[int], reach: float) -> Picture:
    from holdfast.reports.gallery import png

    shown = torch.zeros(3, _SIDE, _SIDE)
    for place, value in enumerate(classes):
        colour = PALETTE[place] if place < len(PALETTE) else "#000000"
        rgb = torch.tensor([int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)])[:, None, None]
        shown = torch.where(predicted == value, rgb, shown)
    scale = 5
    big = shown.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    fine = inside.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    edge = torch.zeros_like(fine)
    edge[1:] |= fine[1:] != fine[:-1]
    edge[:, 1:] |= fine[:, 1:] != fine[:, :-1]
    big = torch.where(edge, 0.0, big)
    middle = scale * _SIDE // 2
    along = min(middle + round(scale * (_SIDE - 1) / 2 / reach), scale * _SIDE - 3)
    big[:, middle - 2 : middle + 3, middle - 2 : middle + 3] = 1.0
    big[:, middle - 2 : middle + 3, along - 2 : along + 3] = 0.0
    return Picture(png(big), "slice through the decision regions")
