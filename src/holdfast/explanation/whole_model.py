"""The explanation of a model: which examples break, what they become, which parts of inputs attacks use, and where the
features of clean and of adversarial inputs part.

Tsuzuku & Sato, "On the structural sensitivity of deep convolutional networks to the directions of Fourier basis
functions", CVPR 2019, arXiv:1809.04098, for frequencies; Athalye, Carlini & Wagner, "Obfuscated gradients give a false
sense of security", ICML 2018, arXiv:1802.00420, for plateaus of the loss as a sign of masked gradients.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from holdfast.attacks.fmn import FMN
from holdfast.attacks.parts.losses import margin, margin_loss
from holdfast.audits.features import penultimate
from holdfast.certifiers.slices import beside
from holdfast.core.batch import Batch
from holdfast.core.constraints import L0
from holdfast.core.draws import Draws
from holdfast.core.per_example import spread
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Inputs, Labels, Mask, PerExample
from holdfast.explanation.attributions import has_gradients
from holdfast.explanation.counterfactual import BALLS, broken, changes, counterfactual
from holdfast.explanation.explained import Bar, Cell, Explained, Figure, bars
from holdfast.explanation.wording import (
    About,
    distance_text,
    is_picture,
    percent,
    picture,
    plane,
    signed_picture,
)
from holdfast.io.data.example_groups import Groups
from holdfast.reports.numbers import plain
from holdfast.runs.harness import Target

_CLUSTERS = 4
_ROUNDS = 20  # of k-means
_BINS = 8
_BANDS = 4
_LINES = 16  # examples of the loss surface
_STEPS = 33  # points on each line
_FLAT = 1e-3
"""share of the range of the loss below which a step counts as flat"""
_PLATEAU, _CLIFF = 0.5, 0.3
"""shares of flat steps, and of the range in one step, from which a loss surface is a plateau with cliffs"""
_MASKING = ("zero-gradient", "shattered", "loss-spread", "black-box", "noise")
"""doubts that are about masked gradients"""


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

    target: Target
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
    rng: Draws

    @property
    def hit(self) -> Mask:
        """Correctly classified examples for which an adversarial input was found inside the constraint."""
        return (self.predicted == self.batch.y) & ~self.surviving & (self.distance > 0) & self.found

    @property
    def found(self) -> Mask:
        """Examples for which an adversarial input was found, inside the constraint or not."""
        return self.distance.isfinite()

    def named(self, label: int) -> str:
        """Return the name of a class."""
        return self.about.name_of(label)


def explain_model(
    target: Target,
    batch: Batch,
    threat: ThreatModel,
    about: About,
    *,
    rng: Draws,
    measured: Measured | None = None,
) -> Explained:
    """Explain how a model breaks on the examples of `batch`.

    Adversarial inputs are computed again, unless the run stored them. An example counts as broken if the run or this
    search breaks it.
    """
    known = Measured() if measured is None else measured
    case = _attacked(target, batch, threat, about, known, rng)
    notes = list(about.notes)
    figures = [_margins(case), _classes(case), *_groups(case, known.groups)]
    if bool(case.hit.any()):
        figures += [_confusion(case), *_clusters(case, notes)]
        if is_picture(batch.x.shape[1:]):
            figures += [_frequencies(case), _regions(case)]
        elif threat.constraint.name != "text":
            figures.append(_columns(case))
    else:
        notes.append("No correctly classified example was broken, so what attacks use is not shown.")
    smooth = True
    if isinstance(threat.constraint, BALLS) and has_gradients(target.bare, batch.x):
        surface, smooth = _surface(case, known.doubts)
        figures.append(surface)
        figures += _layers(case, notes)
    else:
        notes.append("The loss surface and the layers need a ball of a norm and a model with gradients.")
    title = f"{about.model} on {len(batch)} examples of {about.data}"
    return Explained(
        title,
        _sentence(case, smooth=smooth),
        tuple(figures),
        _advice(case, smooth=smooth),
        tuple(notes),
        about.facts,
    )


def _attacked(
    target: Target, batch: Batch, threat: ThreatModel, about: About, known: Measured, rng: Draws
) -> Attacked:
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
    surviving = correct & (distance > threat.constraint.eps * (1 + 1e-6) + 1e-7)
    if known.broken is not None:
        for row, place in _positions(known.ids, batch).items():
            surviving[row] &= not bool(known.broken[place])
    becomes = target.predicted(target.logits(x_adv))
    return Attacked(target, batch, threat, about, x_adv, distance, predicted, becomes, surviving, rng)


def _positions(ids: Tensor | None, batch: Batch) -> dict[int, int]:
    """Rows of the batch with the position of their ids in a stored column."""
    if ids is None:
        return {}
    stored = {value: place for place, value in enumerate(ids.tolist())}
    return {row: stored[value] for row, value in enumerate(batch.ids.tolist()) if value in stored}


def _smallest(target: Target, batch: Batch, threat: ThreatModel, rng: Draws) -> tuple[Inputs, PerExample]:
    """The smallest change of each example that is found, and its size."""
    goal = None if threat.goal is None else torch.full_like(batch.y, threat.goal)
    own = batch.towards(goal)
    constraint = threat.constraint
    if isinstance(constraint, BALLS) and target.bare.access == "gradients" and threat.access == "gradients":
        free = replace(threat, constraint=constraint.resized(math.inf))
        parts = [
            FMN()(target.queried(target.quick, some), some, free, rng=rng.at("model"))
            for some in own.split(256)
        ]
        x_adv = torch.cat(parts)
        done = torch.cat([broken(target, a, x) for a, x in zip(own.split(256), parts, strict=True)])
        distance = constraint.distance(x_adv, batch.x)
        return x_adv, torch.where(done, distance, torch.inf)
    points, sizes = [], []
    for row in range(len(own)):
        one = own.take(torch.tensor([row]))
        result = counterfactual(target, one, threat, rng=rng)
        points.append(one.x if result.nearest is None else result.nearest)
        sizes.append(result.distance)
    return torch.cat(points), torch.tensor(sizes, dtype=batch.x.dtype, device=batch.x.device)


def _sentence(case: Attacked, *, smooth: bool) -> str:
    n, surviving = len(case.batch), int(case.surviving.sum())
    wrong = int((case.predicted != case.batch.y).sum())
    text = (
        f"{surviving} of {n} examples survive {case.about.threat}, and {wrong} are misclassified when clean"
    )
    if bool(case.hit.any()):
        (old, new), count = _pairs(case).most_common(1)[0]
        text += f"; the most frequent change is {case.named(old)} to {case.named(new)}, of {count} examples"
    return text if smooth else f"{text}; the loss has plateaus with cliffs, a sign of masked gradients"


def _advice(case: Attacked, *, smooth: bool) -> tuple[str, ...]:
    advice = []
    if not smooth:
        advice.append(
            "Read the doubts of an assessment (holdfast assess) before its robust accuracy, and the adaptive attacks."
        )
    share = float(case.surviving.float().mean())
    clean = float((case.predicted == case.batch.y).float().mean())
    if share < 0.9 * clean:
        threat = case.about.threat
        advice.append(
            f"Train a more robust model: holdfast harden MODEL DATA --threat {threat} --budget 10min."
        )
    if bool(case.hit.any()):
        (old, new), count = _pairs(case).most_common(1)[0]
        if count > 0.3 * int(case.hit.sum()) and count > 2:
            advice.append(
                f"Look at the labels and add training examples between {case.named(old)} and {case.named(new)}."
            )
    return tuple(advice) or (
        "Certify the surviving examples (holdfast certify), since an attack that fails proves nothing.",
    )


def _pairs(case: Attacked) -> Counter[tuple[int, int]]:
    hit = case.hit
    return Counter(zip(case.batch.y[hit].tolist(), case.becomes[hit].tolist(), strict=True))


def _margins(case: Attacked) -> Figure:
    """Histogram of the smallest distances."""
    eps, found = case.threat.constraint.eps, case.found & (case.predicted == case.batch.y)
    sizes = case.distance[found].double()
    if not len(sizes):
        return Figure("margins", "No change was found that breaks an example", "No bars.", ("distance",), ())
    top = max(float(sizes.quantile(0.95)), min(eps, float(sizes.max())) if math.isfinite(eps) else 0.0) or 1.0
    edges = torch.linspace(0, top, _BINS + 1, dtype=torch.float64)
    counts = [int(((sizes > low) & (sizes <= high)).sum()) for low, high in pairwise(edges)]
    counts[0] += int((sizes <= 0).sum())
    counts.append(int((sizes > top).sum()))
    text = [distance_text(case.threat.constraint, float(edge), case.target.bare) for edge in edges]
    labels = [f"up to {edge}" for edge in text[1:]] + ["above"]
    median = distance_text(case.threat.constraint, float(sizes.median()), case.target.bare)
    none = int((~case.found).sum())
    note = f"For {none} examples no change was found." if none else ""
    rows = tuple((float(a), float(b), c) for a, b, c in zip(edges[:-1], edges[1:], counts[:-1], strict=True))
    return Figure(
        "margins",
        f"Half of the examples break within {median}; the threat is {case.about.threat}",
        f"Histogram of the smallest change that breaks an example: {', '.join(map(str, counts))} examples.",
        ("from", "to", "examples"),
        (*rows, (top, math.inf, counts[-1])),
        bars=bars(labels, counts, [str(count) for count in counts]),
        note=note,
    )


def _shares(case: Attacked, of: Labels, names: Mapping[int, str], name: str, noun: str) -> Figure:
    rows: list[tuple[str, int, float, float]] = []
    for value in sorted(set(of.tolist())):
        chosen = of == value
        clean = float((case.predicted == case.batch.y)[chosen].float().mean())
        rows.append((names[value], int(chosen.sum()), clean, float(case.surviving[chosen].float().mean())))
    worst = min(rows, key=lambda row: row[3])
    shown = tuple(Bar(f"{label} ({n})", robust, percent(robust)) for label, n, _, robust in rows)
    return Figure(
        name,
        f"The {noun} {worst[0]} is the weakest: {percent(worst[3])} of its examples survive",
        f"Robust accuracy of each {noun}, with its number of examples in brackets.",
        (noun, "examples", "clean accuracy", "robust accuracy"),
        tuple(rows),
        bars=shown,
        note="With few examples in a row, differences may be due to chance.",
    )


def _classes(case: Attacked) -> Figure:
    labels = {value: case.named(value) for value in set(case.batch.y.tolist())}
    return _shares(case, case.batch.y, labels, "classes", "class")


def _groups(case: Attacked, groups: Groups | None) -> list[Figure]:
    if groups is None or len(groups.places) != len(case.batch):
        return []
    places = torch.from_numpy(groups.places.copy()).to(case.predicted.device)
    return [_shares(case, places, dict(enumerate(groups.names)), "groups", "group")]


def _confusion(case: Attacked) -> Figure:
    """Which class becomes which."""
    pairs = _pairs(case)
    rows = tuple((case.named(old), case.named(new), count) for (old, new), count in pairs.most_common())
    (old, new), count = pairs.most_common(1)[0]
    of = sum(n for (label, _), n in pairs.items() if label == old)
    return Figure(
        "confusion",
        f"Under attack, {case.named(old)} becomes {case.named(new)} in {count} of {of} broken examples",
        f"{len(rows)} pairs of a label and the class that is predicted under attack, the most frequent first.",
        ("label", "becomes", "examples"),
        rows,
        tabular=True,
    )


def _clusters(case: Attacked, notes: list[str]) -> list[Figure]:
    """Clusters of broken examples by the features of their adversarial inputs, each with its medoid."""
    hit = case.hit.nonzero()[:, 0]
    if case.target.bare.access != "gradients" or len(hit) < 2 * _CLUSTERS:
        notes.append(f"Clusters need {2 * _CLUSTERS} broken examples and a network with gradients.")
        return []
    points = penultimate(case.target.bare, case.x_adv[hit])[0]
    points = (points - points.mean(0)) / points.std(0).clamp_min(1e-9)
    assigned, centres = _k_means(points, case.rng)
    rows: list[tuple[Cell, ...]] = []
    pictures = []
    order = assigned.bincount(minlength=_CLUSTERS).argsort(descending=True, stable=True).tolist()
    for number, cluster in enumerate(order, 1):
        members = (assigned == cluster).nonzero()[:, 0]
        if not len(members):
            continue
        medoid = int(
            hit[members[torch.cdist(points[members], centres[cluster : cluster + 1])[:, 0].argmin()]]
        )
        (new, count), *_ = Counter(case.becomes[hit[members]].tolist()).most_common(1)
        labels = Counter(case.named(label) for label in case.batch.y[hit[members]].tolist())
        shown = ", ".join(f"{label} ({n})" for label, n in labels.most_common(3))
        example = int(case.batch.ids[medoid])
        rows.append((f"cluster {number}", len(members), case.named(new), count, shown, example))
        if is_picture(case.batch.x.shape[1:]):
            caption = f"cluster {number}, example {example}: {case.named(int(case.batch.y[medoid]))}"
            becomes = case.named(int(case.becomes[medoid]))
            pictures += [
                picture(case.batch.x[medoid], caption, case.target.bare),
                picture(case.x_adv[medoid], f"{caption} becomes {becomes}", case.target.bare),
            ]
    first = rows[0]
    title = f"{first[1]} of {len(hit)} broken examples form one cluster, most of which become {first[2]}"
    text = f"{len(rows)} clusters (k-means on the features before the last layer), each with its central example."
    headings = ("cluster", "examples", "become", "of them", "labels", "central example")
    return [Figure("clusters", title, text, headings, tuple(rows), tuple(pictures), tabular=True, note=text)]


def _k_means(points: Tensor, rng: Draws) -> tuple[Tensor, Tensor]:
    """Clusters of points (n, d), from starts that are far from each other."""
    first = rng.at("clusters").uniform(torch.tensor([0]), 1)[0, 0]
    chosen = [int(first * len(points))]
    for _ in range(_CLUSTERS - 1):
        chosen.append(int(torch.cdist(points, points[chosen]).amin(1).argmax()))
    centres = points[chosen].clone()
    for _ in range(_ROUNDS):
        assigned = torch.cdist(points, centres).argmin(1)
        for cluster in range(_CLUSTERS):
            if bool((assigned == cluster).any()):
                centres[cluster] = points[assigned == cluster].mean(0)
    return torch.cdist(points, centres).argmin(1), centres


def _frequencies(case: Attacked) -> Figure:
    """The energy of the changes in rings of the spectrum, beside that of the images."""
    images = case.batch.x[case.hit].double()
    delta = case.x_adv[case.hit].double() - images
    flat = images - images.mean((2, 3), keepdim=True)
    height, width = images.shape[2:]
    fy, fx = torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None]
    radius = (fy**2 + fx**2).sqrt() / 0.5
    band = (radius * _BANDS).long().clamp_max(_BANDS - 1)
    shares = []
    for each in (delta, flat):
        power = torch.fft.fft2(each).abs().square().sum(1)
        power = power / power.sum((1, 2), keepdim=True).clamp_min(1e-30)
        mean = power.mean(0)
        shares.append([float(mean[band == k].sum()) for k in range(_BANDS)])
    labels = [f"{100 * k // _BANDS} to {100 * (k + 1) // _BANDS} % of the highest" for k in range(_BANDS)]
    high = sum(shares[0][_BANDS // 2 :])
    clean = sum(shares[1][_BANDS // 2 :])
    rows = tuple((label, a, b) for label, a, b in zip(labels, *shares, strict=True))
    return Figure(
        "frequencies",
        f"{percent(high)} of the changes have frequencies in the upper half (images: {percent(clean)})",
        "Bars: energy of the changes by frequency, lowest first.",
        ("frequencies", "share of the changes", "share of the images"),
        rows,
        bars=bars(
            labels, shares[0], [f"{percent(a)}; images {percent(b)}" for a, b in zip(*shares, strict=True)]
        ),
    )


def _regions(case: Attacked) -> Figure:
    """The mean absolute change of each pixel."""
    change = (case.x_adv - case.batch.x)[case.hit].abs()
    change = change / spread(change.flatten(1).sum(1).clamp_min(1e-12), change)
    mean = plane(change.mean(0))
    height, width = mean.shape
    middle = mean[height // 4 : height - height // 4, width // 4 : width - width // 4]
    share, area = float(middle.sum() / mean.sum()), middle.numel() / mean.numel()
    rows = tuple((row, column, float(mean[row, column])) for row in range(height) for column in range(width))
    title = f"{percent(share)} of the changes lie in the middle {percent(area)} of the image"
    text = "Mean share of the change of each pixel over the broken examples; darker red is more."
    shown = (signed_picture(mean, "where attacks change images"),)
    return Figure("regions", title, text, ("row", "column", "mean share"), rows, shown, note=text)


def _columns(case: Attacked) -> Figure:
    """The columns of a table that attacks change."""
    change = changes(case.x_adv, case.batch.x)[case.hit].flatten(1).double().mean(0)
    order = change.argsort(descending=True, stable=True).tolist()
    rows = tuple((case.about.feature(k), float(change[k])) for k in order if change[k] > 0)
    title = f"Attacks change {rows[0][0]} most often: in {percent(rows[0][1])} of the broken examples"
    text = "Share of the broken examples in which each column changes."
    shown = tuple(Bar(name, share, percent(share)) for name, share in rows[:12])
    return Figure("columns", title, text, ("column", "share of the broken examples"), rows, bars=shown)


def _surface(case: Attacked, doubts: Mapping[str, str]) -> tuple[Figure, bool]:
    """The loss along the change and a random direction, and whether it is smooth."""
    rows_of = ((case.distance > 0) & (case.predicted == case.batch.y)).nonzero()[:, 0][:_LINES]
    chosen = case.batch.take(rows_of)
    eps = case.threat.constraint.eps
    gradient_step = _signed_step(case, chosen, eps)
    flats, cliffs, table = [], [], list[tuple[Cell, ...]]()
    random = beside(
        gradient_step, case.rng.at("surface").normal(chosen.ids, *chosen.x.shape[1:], dtype=chosen.x.dtype)
    )
    places = torch.linspace(0, 1.5, _STEPS)
    for row in range(len(chosen)):
        for name, direction in (("attack", gradient_step[row]), ("random", random[row])):
            points = case.target.bare.bounds.clamp(
                chosen.x[row] + spread(places.to(chosen.x), chosen.x) * direction
            )
            one = Batch(points, chosen.y[row].expand(_STEPS), chosen.ids[row].expand(_STEPS))
            loss = -margin(case.target.judged_logits(case.target.logits(points), one.y), one).double()
            steps = loss.diff().abs()
            extent = float((loss.max() - loss.min()).clamp_min(1e-12))
            still = float(steps.max()) <= 1e-9
            flats.append(1.0 if still else float((steps <= _FLAT * extent).double().mean()))
            cliffs.append(0.0 if still else float(steps.max()) / extent)
            table += [
                (int(chosen.ids[row]), name, float(p), float(v)) for p, v in zip(places, loss, strict=True)
            ]
    flat = sorted(flats)[len(flats) // 2] if flats else 0.0
    cliff = sorted(cliffs)[len(cliffs) // 2] if cliffs else 0.0
    smooth = not (flat >= _PLATEAU and (cliff >= _CLIFF or flat >= 1 - 1e-9))
    raised = [name for name in _MASKING if doubts.get(name) == "raised"]
    title = (
        "The loss changes smoothly along the attack"
        if smooth
        else "The loss has plateaus with cliffs, a sign of masking"
    )
    text = (
        f"Median over {len(chosen)} examples and two directions: {percent(flat)} of the steps are flat, and the "
        f"largest step is {percent(cliff)} of the range."
    )
    note = text
    if doubts:
        note += f" Doubts of the run about masking that are raised: {', '.join(raised) or 'none'}."
    shown = tuple(
        Bar(name, value, percent(value)) for name, value in (("flat steps", flat), ("largest step", cliff))
    )
    headings = ("example", "direction", "distance in eps", "loss (minus the margin)")
    return Figure("surface", title, text, headings, tuple(table), bars=shown, note=note), smooth


def _signed_step(case: Attacked, chosen: Batch, eps: float) -> Inputs:
    """The change of the size eps in the direction of the gradient; of the found change if the gradient is zero."""
    x = chosen.x.detach().clone().requires_grad_()
    with torch.enable_grad():
        loss = margin_loss(case.target.bare(x), chosen).sum()
    (grad,) = torch.autograd.grad(loss, x, materialize_grads=True, allow_unused=True)
    constraint = case.threat.constraint
    assert isinstance(constraint, BALLS)
    if isinstance(constraint, L0):
        return grad.sign() * case.target.bare.bounds.width * 0.1
    step = constraint.steepest(grad, chosen.x, case.target.bare.bounds)
    zero = grad.flatten(1).abs().amax(1) == 0
    sizes = constraint.distance(step, torch.zeros_like(step)).clamp_min(1e-12)
    scaled = step * spread((eps if math.isfinite(eps) else 1.0) / sizes, step)
    random = case.rng.at("flat").signs(chosen.ids, *chosen.x.shape[1:], dtype=chosen.x.dtype) * eps
    return torch.where(spread(zero, scaled), random, scaled)


def _layers(case: Attacked, notes: list[str]) -> list[Figure]:
    """The relative change of the outputs of each layer by the attack and by noise of the same size."""
    net = case.target.bare.net
    rows_of = (case.found & (case.distance > 0)).nonzero()[:, 0][:64]
    leaves = (
        [(name, m) for name, m in net.named_modules() if name and not [*m.children()]]
        if isinstance(net, nn.Module)
        else []
    )
    if len(leaves) < 2 or not len(rows_of):
        notes.append(
            "The layers are not compared, because the network has no named layers or nothing was broken."
        )
        return []
    x, x_adv = case.batch.x[rows_of], case.x_adv[rows_of]
    delta = (x_adv - x).flatten(1)
    order = case.rng.at("layers").uniform(case.batch.ids[rows_of], delta.shape[1]).argsort(1)
    signs = case.rng.at("signs").signs(case.batch.ids[rows_of], delta.shape[1], dtype=x.dtype)
    noise = case.target.bare.bounds.clamp(x + (delta.gather(1, order) * signs).view_as(x))
    outputs = [_outputs(case.target, leaves, points) for points in (x, x_adv, noise)]
    rows: list[tuple[str, float, float, float]] = []
    for name in outputs[0]:
        clean, changed, noisy = (each[name].flatten(1).double() for each in outputs)
        size = clean.norm(dim=1).clamp_min(1e-12)
        a, b = (float(((v - clean).norm(dim=1) / size).mean()) for v in (changed, noisy))
        rows.append((name, a, b, a / max(b, 1e-12)))
    if not rows:
        return []
    first = next((row for row in rows if row[3] >= 2), None)
    most = max(rows, key=lambda row: row[3])
    if first is None:
        title = f"The attack moves no features twice as far as noise (at most {most[3]:.2g} times, {most[0]})"
    else:
        title = f"Clean and adversarial features part at layer {first[0]}: {first[3]:.2g} times the effect of noise"
    text = (
        f"Relative change of the outputs of each layer, {len(rows_of)} examples: by the attack, by noise of the same "
        "size, and their ratio."
    )
    shown = bars([row[0] for row in rows], [row[3] for row in rows], [plain(row[3], 2) for row in rows])
    headings = ("layer", "change by the attack", "change by noise", "ratio")
    return [Figure("layers", title, text, headings, tuple(rows), bars=shown, note=text)]


def _outputs(target: Target, leaves: list[tuple[str, nn.Module]], x: Inputs) -> dict[str, Tensor]:
    """The outputs of the layers for some inputs, by the names of the layers."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> object:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and len(output) == len(x):
                kept[name] = output.detach()

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in leaves]  # type: ignore[arg-type]
    try:
        target.logits(x)
    finally:
        for hook in hooks:
            hook.remove()
    return kept
