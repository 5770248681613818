"""The explanation of a model: which examples break, what they become, and where its layers change."""

import math
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from holdfast.attacks.parts.images import inner
from holdfast.attacks.parts.losses import margin, margin_loss
from holdfast.audits.finding import penultimate
from holdfast.certifiers.boundary_geometry import beside
from holdfast.core.batch import Batch, decoded_files, spread
from holdfast.core.draws import Draws
from holdfast.core.meter import batch_size_for
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Inputs, Labels
from holdfast.explanation.case import (
    About,
    Attacked,
    Bar,
    Cell,
    Explained,
    Figure,
    Measured,
    allowed_text,
    attacked,
    bars,
    certifiable,
    changed_bytes,
    changed_words,
    distance_text,
    listed,
    percent,
    picture,
    plane,
    signed_picture,
    training_advice,
)
from holdfast.explanation.counterfactual import changes, has_gradients
from holdfast.io.data.labels import Groups
from holdfast.reports.words import amount, plain
from holdfast.runs.harness.target import PreparedModel
from holdfast.threats.domains import BYTES, SIGNAL, TABLE, TEXT, is_image

_LINES = 16  # examples of the loss surface
_STEPS = 33  # points on each line
_FLAT = 1e-3
"""share of the range of the loss below which a step counts as flat"""
_PLATEAU, _CLIFF = 0.5, 0.3
"""shares of flat steps, and of the range in one step, from which a loss surface is a plateau with cliffs"""
_MASKING = ("zero-gradient", "shattered", "loss-spread", "black-box", "noise")
"""doubts that are about masked gradients"""


def surface_figure(case: Attacked, doubts: Mapping[str, str]) -> tuple[Figure, bool]:
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
            points = case.target.original.bounds.clamp(
                chosen.x[row] + spread(places.to(chosen.x), chosen.x) * direction
            )
            one = Batch(points, chosen.y[row].expand(_STEPS), chosen.ids[row].expand(_STEPS))
            loss = -margin(case.target.judged_logits(case.target.logits(points), one), one).double()
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
        f"Median over {amount(len(chosen), 'examples')} and two directions: {percent(flat)} of the steps are flat, and "
        f"the largest step is {percent(cliff)} of the range."
    )
    note = text
    if doubts:
        note += f" Doubts of the run about masking that are raised: {', '.join(raised) or 'none'}."
    shown = tuple(
        Bar(name, value, percent(value)) for name, value in (("flat steps", flat), ("largest step", cliff))
    )
    headings = ("example", "direction", "distance in eps", "loss (minus the margin)")
    reason = "" if smooth else f"{title}: attacks by gradients may miss changes."
    return Figure(
        "surface", title, text, headings, tuple(table), bars=shown, note=note, reason=reason
    ), smooth


def _signed_step(case: Attacked, chosen: Batch, eps: float) -> Inputs:
    """The change of the size eps in the direction of the gradient; of the found change if the gradient is zero."""
    x = chosen.x.detach().clone().requires_grad_()
    with torch.enable_grad():
        loss = margin_loss(case.target.original(x), chosen).sum()
    (grad,) = torch.autograd.grad(loss, x, materialize_grads=True, allow_unused=True)
    constraint = case.threat.constraint
    if constraint.counts_changes:
        return grad.sign() * case.target.original.bounds.width * 0.1
    step = constraint.steepest(grad, chosen.x, case.target.original.bounds)
    zero = grad.flatten(1).abs().amax(1) == 0
    sizes = constraint.distance(step, torch.zeros_like(step)).clamp_min(1e-12)
    scaled = step * spread((eps if math.isfinite(eps) else 1.0) / sizes, step)
    random = case.rng.at("flat").signs(chosen.ids, *chosen.x.shape[1:], dtype=chosen.x.dtype) * eps
    return torch.where(spread(zero, scaled), random, scaled)


def layer_figures(case: Attacked, notes: list[str]) -> list[Figure]:
    """The relative change of the outputs of each layer by the attack and by noise of the same size."""
    net = inner(case.target.original).net
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
    noise = case.target.original.bounds.clamp(x + (delta.gather(1, order) * signs).view_as(x))
    changes: dict[str, list[Tensor]] = {}
    n_at_once = max(1, batch_size_for(delta.shape[1], x.device.type) // 3)  # three inputs of each example
    for some in torch.split(torch.arange(len(x)), n_at_once):
        outputs = _outputs(case.target, leaves, torch.cat([each[some] for each in (x, x_adv, noise)]))
        for name, features in outputs.items():
            clean, changed, noisy = features.flatten(1).double().chunk(3)
            size = clean.norm(dim=1).clamp_min(1e-12)
            relative = torch.stack([(each - clean).norm(dim=1) / size for each in (changed, noisy)])
            changes.setdefault(name, []).append(relative)
    rows: list[tuple[str, float, float, float]] = []
    for name, parts in changes.items():
        a, b = torch.cat(parts, 1).mean(1).tolist()
        rows.append((name, a, b, a / max(b, 1e-12)))
    if not rows:
        return []
    first = next((row for row in rows if row[3] >= 2), None)
    most = max(rows, key=lambda row: row[3])
    if first is None:
        title = f"The attack moves no features twice as far as noise (at most {most[3]:.2g} times, at layer {most[0]})"
    else:
        title = (
            f"Layer {first[0]} is the first whose features the attack moves at least twice as far as noise "
            f"({first[3]:.2g} times)"
        )
    text = (
        f"Relative change of the outputs of each layer, {amount(len(rows_of), 'examples')}: by the attack, by noise of "
        "the same size, and their ratio."
    )
    shown = bars([row[0] for row in rows], [row[3] for row in rows], [plain(row[3], 2) for row in rows])
    headings = ("layer", "change by the attack", "change by noise", "ratio")
    reason = "" if first is None else f"{title}."
    return [Figure("layers", title, text, headings, tuple(rows), bars=shown, note=text, reason=reason)]


def _outputs(target: PreparedModel, leaves: list[tuple[str, nn.Module]], x: Inputs) -> dict[str, Tensor]:
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


_CLUSTERS = 4
_ROUNDS = 20  # of k-means
_BINS = 8
_BANDS = 4
_ACCURATE = 0.8
"""accuracy on clean examples below which it is named as the first thing to improve"""
_LEAST = 5
"""examples of a class from which its robust accuracy is stated as a reason"""


def explain_model(
    target: PreparedModel,
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
    case = attacked(target, batch, threat, about, known, rng)
    notes = list(about.notes)
    figures = [_classes(case), *_groups(case, known.groups)]
    if threat.constraint.domain not in (TEXT, BYTES):  # whose changes have one size
        figures.insert(0, _margins(case))
    if bool(case.hit.any()):
        figures += [_confusion(case), *_clusters(case, notes)]
        if is_image(batch.x.shape[1:]):
            figures += [_frequencies(case), _regions(case)]
        elif threat.constraint.domain is BYTES:
            figures += _byte_places(case)
        elif threat.constraint.domain is not TEXT:
            figures += [] if threat.constraint.domain is SIGNAL else [_columns(case)]
        elif about.examples:
            figures += _words(case)
    else:
        notes.append("No correctly classified example was broken, so what attacks use is not shown.")
    smooth = True
    if threat.constraint.is_ball and has_gradients(target.original, batch.x):
        surface, smooth = surface_figure(case, known.doubts)
        figures.append(surface)
        figures += layer_figures(case, notes)
    else:
        notes.append(
            "The loss surface and the layers are not shown, because they need a threat with a norm and a model with "
            "gradients."
        )
    title = f"{about.model} on {amount(len(batch), 'examples')} of {about.data}"
    return Explained(
        title,
        _sentence(case, smooth=smooth),
        tuple(figures),
        _advice(case, smooth=smooth),
        tuple(notes),
        about.facts,
    )


def _sentence(case: Attacked, *, smooth: bool) -> str:
    n, surviving = len(case.batch), int(case.surviving.sum())
    wrong = int((case.predicted != case.batch.y).sum())
    text = f"{surviving} of {amount(n, 'examples')} {'survives' if surviving == 1 else 'survive'} {case.about.threat}"
    if wrong:
        text += f"; {wrong} {'is' if wrong == 1 else 'are'} misclassified without an attack"
    if case.missed:
        text += f"; {case.missed} that survived the run {'is' if case.missed == 1 else 'are'} broken by this search"
    if bool(case.hit.any()):
        (old, new), count = _pairs(case).most_common(1)[0]
        if count > 1:
            pair = f"{case.about.called(old)} to {case.about.called(new)}"
            text += f"; the most frequent change is {pair} ({amount(count, 'examples')})"
    return text if smooth else f"{text}; the loss has plateaus with cliffs, a sign of masked gradients"


def _advice(case: Attacked, *, smooth: bool) -> tuple[str, ...]:
    advice, constraint = [], case.threat.constraint
    if not smooth:
        advice.append(
            "Read the doubts of an assessment (holdfast assess --adaptive) before you rely on its robust accuracy."
        )
    if case.missed:
        advice.append(
            f"Assess the model with more attacks (holdfast assess --suite standard), as those of the run missed "
            f"{amount(case.missed, 'examples')}."
        )
    share = float(case.surviving.float().mean())
    clean = float((case.predicted == case.batch.y).float().mean())
    if clean < _ACCURATE:
        advice.append(
            f"Improve the accuracy without an attack first ({percent(clean)}), which limits the robust accuracy."
        )
    if share < 0.9 * clean:
        advice.append(training_advice(case.about, constraint, case.target.original.access))
    if constraint.domain is TABLE and bool(case.hit.any()):
        name = case.about.feature(int(_changed_share(case).argmax()))
        advice.append(
            f"Ask whether an attacker can really change {name} within the rules. If not, state it there (change: none, "
            "up or down, or a higher cost), and assess the model again."
        )
    if bool(case.hit.any()) and case.target.classes > 2:
        (old, new), count = _pairs(case).most_common(1)[0]
        if count > 0.3 * int(case.hit.sum()) and count > 2:
            pair = f"{case.about.called(old)} and {case.about.called(new)}"
            advice.append(f"Check the labels of {pair}, and add training examples between them.")
    if not advice:
        way = (
            "Certify the surviving examples (holdfast certify)"
            if certifiable(constraint, case.target.original.access)
            else "Assess the model with further attacks (holdfast assess)"
        )
        advice.append(f"{way}, since an attack that fails proves nothing.")
    return tuple(advice)


def _pairs(case: Attacked) -> Counter[tuple[int, int]]:
    hit = case.hit
    return Counter(zip(case.batch.y[hit].tolist(), case.becomes[hit].tolist(), strict=True))


def _margins(case: Attacked) -> Figure:
    """Histogram of the smallest distances."""
    constraint, correct = case.threat.constraint, case.predicted == case.batch.y
    eps = constraint.eps
    # an example that the run broke breaks inside the constraint, also if this search found only a larger change
    broken = correct & ~case.surviving
    distance = torch.where(broken, case.distance.clamp(max=eps), case.distance).double()
    found = distance.isfinite()
    sizes = distance[correct & found]
    if not len(sizes):
        return Figure("margins", "No change was found that breaks an example", "No bars.", ("distance",), ())
    top = max(float(sizes.quantile(0.95)), min(eps, float(sizes.max())) if math.isfinite(eps) else 0.0) or 1.0
    edges = torch.linspace(0, top, _BINS + 1, dtype=torch.float64)
    counts = [int(((sizes > low) & (sizes <= high)).sum()) for low, high in pairwise(edges)]
    counts[0] += int((sizes <= 0).sum())
    counts.append(int((sizes > top).sum()))
    text = [distance_text(constraint, float(edge), case.target.original) for edge in edges]
    labels = [f"up to {edge}" for edge in text[1:]] + ["above"]
    none = int((correct & ~found).sum())
    rows = tuple((float(a), float(b), c) for a, b, c in zip(edges[:-1], edges[1:], counts[:-1], strict=True))
    median = float(distance[correct].sort().values[(int(correct.sum()) - 1) // 2])
    allowed = "" if constraint.domain is TABLE else allowed_text(case.about, constraint, case.target.original)
    size = distance_text(constraint, median, case.target.original)
    title = f"Half of the correctly classified examples break within {size}"
    few = "Fewer than half of the correctly classified examples break"
    near = median < eps * (1 - 1e-6)
    reason = f"{title}{', and ' * bool(allowed)}{allowed}: they are close to the decision boundary."
    return Figure(
        "margins",
        "; ".join(part for part in (title if math.isfinite(median) else few, allowed) if part),
        f"Histogram of the smallest change that breaks an example: {', '.join(map(str, counts))} examples.",
        ("from", "to", "examples"),
        (*rows, (top, math.inf, counts[-1])),
        bars=bars(labels, counts, [str(count) for count in counts]),
        note=f"For {amount(none, 'examples')} no change was found." if none else "",
        reason=reason if near else "",
    )


def _shares(case: Attacked, of: Labels, names: Mapping[int, str], name: str, noun: str) -> Figure:
    rows: list[tuple[str, int, float, float]] = []
    for value in sorted(set(of.tolist())):
        chosen = of == value
        clean = float((case.predicted == case.batch.y)[chosen].float().mean())
        rows.append((names[value], int(chosen.sum()), clean, float(case.surviving[chosen].float().mean())))
    # of several values with the lowest share, the one with the most examples
    worst = min(rows, key=lambda row: (row[3], -row[1]))
    mean = float(case.surviving.float().mean())
    ties = [label for label, _, _, robust in rows if robust == worst[3] and label != worst[0]]
    left = round(worst[3] * worst[1])
    survive = "survives" if 1 in (left, worst[1]) else "survive"
    title = f"The {noun} {worst[0]} is the weakest: {left} of its {amount(worst[1], 'examples')} {survive}"
    if ties:
        others = f"{ties[0]} has" if len(ties) == 1 else f"{len(ties)} others have"
        title += f"; {others} the same share"
    weak = worst[1] >= _LEAST and worst[3] < mean - 0.1 and len(rows) > 2
    reason = f"{title}; of all examples, {percent(mean)} survive." if weak else ""
    if mean in (0, 1):
        title = f"{'All examples' if mean else 'No examples'} of any {noun} survive"
    shown = tuple(Bar(f"{label} ({n})", robust, percent(robust)) for label, n, _, robust in rows)
    return Figure(
        name,
        title,
        f"Robust accuracy of each {noun}, with its number of examples in brackets.",
        (noun, "examples", "clean accuracy", "robust accuracy"),
        tuple(rows),
        bars=shown,
        note="With few examples in a row, differences may be due to chance.",
        reason=reason,
    )


def _classes(case: Attacked) -> Figure:
    labels = {value: case.about.called(value) for value in set(case.batch.y.tolist())}
    return _shares(case, case.batch.y, labels, "classes", "class")


def _groups(case: Attacked, groups: Groups | None) -> list[Figure]:
    if groups is None or len(groups.places) != len(case.batch):
        return []
    places = torch.from_numpy(groups.places.copy()).to(case.predicted.device)
    return [_shares(case, places, dict(enumerate(groups.names)), "groups", "group")]


def _confusion(case: Attacked) -> Figure:
    """Which class becomes which."""
    pairs = _pairs(case)
    rows = tuple(
        (case.about.name_of(old), case.about.name_of(new), count) for (old, new), count in pairs.most_common()
    )
    (old, new), count = pairs.most_common(1)[0]
    of = amount(sum(n for (label, _), n in pairs.items() if label == old), "broken examples")
    title = f"Under attack, {case.about.called(old)} becomes {case.about.called(new)} in {count} of {of}"
    return Figure(
        "confusion",
        title if count > 1 else "No change from one class to another occurs twice",
        f"{amount(len(rows), 'pairs')} of a label and the class predicted under attack, the most frequent first.",
        ("label", "becomes", "examples"),
        rows,
        tabular=True,
    )


def _clusters(case: Attacked, notes: list[str]) -> list[Figure]:
    """Clusters of broken examples by the features of their adversarial inputs, each with its medoid."""
    hit = case.hit.nonzero()[:, 0]
    if case.target.original.access != "gradients" or len(hit) < 2 * _CLUSTERS:
        notes.append(
            f"Clusters of broken examples are not shown, because they need {2 * _CLUSTERS} of them and a network with "
            "gradients."
        )
        return []
    points = penultimate(inner(case.target.original), case.x_adv[hit])[0]
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
        labels = Counter(case.about.name_of(label) for label in case.batch.y[hit[members]].tolist())
        shown = ", ".join(f"{label} ({n})" for label, n in labels.most_common(3))
        example = int(case.batch.ids[medoid])
        rows.append((f"cluster {number}", len(members), case.about.called(new), count, shown, example))
        if case.about.examples and is_image(case.batch.x.shape[1:]):
            caption = f"cluster {number}, example {example}: {case.about.name_of(int(case.batch.y[medoid]))}"
            becomes = case.about.name_of(int(case.becomes[medoid]))
            pictures += [
                picture(case.batch.x[medoid], caption, case.target.original),
                picture(case.x_adv[medoid], f"{caption} becomes {becomes}", case.target.original),
            ]
    first = rows[0]
    title = f"{first[1]} of {len(hit)} broken examples form one cluster, most of which become {first[2]}"
    text = f"{amount(len(rows), 'clusters')} (k-means on the features before the last layer), with central examples."
    headings = ("cluster", "examples", "become", "of them", "labels", "central example")
    shown_pictures = tuple(pictures)
    return [
        Figure(
            "clusters", title, text, headings, tuple(rows), shown_pictures, tabular=True, note=text, columns=2
        )
    ]


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
    """The energy of the changes in rings of the spectrum, beside that of the images and that of white noise."""
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
    # white noise has the same energy at all frequencies
    shares.append([float((band == k).double().mean()) for k in range(_BANDS)])
    labels = [f"{100 * k // _BANDS} to {100 * (k + 1) // _BANDS} % of the highest" for k in range(_BANDS)]
    high, clean, noise = (sum(each[_BANDS // 2 :]) for each in shares)
    beside = f"of the images, {percent(clean)}; of white noise, {percent(noise)}"
    return Figure(
        "frequencies",
        f"{percent(high)} of the energy of the changes is in the upper half of the frequencies; {beside}",
        "Bars: energy of the changes by frequency, lowest first.",
        ("frequencies", "share of the changes", "share of the images", "share of white noise"),
        tuple(zip(labels, *shares, strict=True)),
        bars=bars(
            labels,
            shares[0],
            [
                f"{percent(a)}; images {percent(b)}; noise {percent(c)}"
                for a, b, c in zip(*shares, strict=True)
            ],
        ),
        reason=f"The changes are finer than the images: {percent(high)} of their energy is in the upper half of the "
        f"frequencies ({beside})."
        if high > 1.5 * clean
        else "",
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
    title = f"{percent(share)} of the change lies in the middle {percent(area)} of the image"
    text = "Mean share of the change of each pixel over the broken examples; darker red is more."
    shown = (signed_picture(mean, "where attacks change images"),)
    return Figure("regions", title, text, ("row", "column", "mean share"), rows, shown, note=text)


def _changed_share(case: Attacked) -> Tensor:
    """The share of the broken examples in which each column changes."""
    return changes(case.x_adv, case.batch.x)[case.hit].flatten(1).double().mean(0)


def _columns(case: Attacked) -> Figure:
    """The columns of a table that attacks change."""
    change = _changed_share(case)
    order = change.argsort(descending=True, stable=True).tolist()
    rows = tuple((case.about.feature(k), float(change[k])) for k in order if change[k] > 0)
    most = [name for name, share in rows if share == rows[0][1]]
    what = listed(most, noun="more columns")
    title = f"Attacks change {what} most often: in {percent(rows[0][1])} of the broken examples"
    text = "Share of the broken examples in which each column changes."
    shown = tuple(Bar(name, share, percent(share)) for name, share in rows[:12])
    headings = ("column", "share of the broken examples")
    return Figure("columns", title, text, headings, rows, bars=shown, reason=f"{title}.")


def _words(case: Attacked) -> list[Figure]:
    """The words of texts that attacks change."""
    places = case.hit.nonzero()[:, 0].tolist()
    pairs = [changed_words(case.batch.x[k : k + 1], case.x_adv[k : k + 1]) for k in places]
    counts = Counter(word for found in pairs for word in {(old or new).lower() for old, new in found})
    rows = tuple((word, count) for word, count in counts.most_common())
    if not rows:
        return []
    named = listed([f"“{word}”" for word, _ in rows], noun="other words")
    title = f"Attacks change or append most often: {named}"
    text = f"Words that change in {amount(len(places), 'broken texts')}, the most frequent first."
    shown = bars([w for w, _ in rows[:12]], [n for _, n in rows[:12]], [str(n) for _, n in rows[:12]])
    headings = ("word", "broken texts")
    return [Figure("words", title, text, headings, rows, bars=shown, note=text, reason=f"{title}.")]


def _byte_places(case: Attacked) -> list[Figure]:
    """The places of files that attacks change."""
    places, counts = case.hit.nonzero()[:, 0].tolist(), Counter[str]()
    for k in places:
        x, x_adv = case.batch.x[k : k + 1], case.x_adv[k : k + 1]
        length, edits = len(decoded_files(x)[0]), changed_bytes(case.threat.constraint, x, x_adv)
        names = {f"0x{each.offset:x}" for edit in edits if edit.before for each in edit.singles()}
        names |= {"the end" if edit.offset == length else "an insertion" for edit in edits if not edit.before}
        counts.update(names)
    rows = counts.most_common()
    if not rows:
        return []
    named = listed([name for name, _ in rows], noun="other places")
    title = f"Attacks change or add bytes most often at {named}"
    text = f"Places with new bytes in {amount(len(places), 'broken files')}, the most frequent first."
    shown = bars([w for w, _ in rows[:12]], [n for _, n in rows[:12]], [str(n) for _, n in rows[:12]])
    headings = ("place", "broken files")
    return [Figure("places", title, text, headings, tuple(rows), bars=shown, note=text, reason=f"{title}.")]
