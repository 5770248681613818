"""The explanation of one example: its counterfactual, attributions before and after the change, a slice of the decision
regions, and training examples near it.
"""

import math
import unicodedata
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.attacks.parts.images import inner
from holdfast.audits.finding import penultimate
from holdfast.certifiers.boundary_geometry import beside, boundary_slices
from holdfast.core.batch import Batch, decoded, decoded_files
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Inputs, Labels
from holdfast.explanation.attribution_figures import attribution_figures
from holdfast.explanation.case import (
    About,
    Case,
    Cell,
    Explained,
    Figure,
    allowed_text,
    certifiable,
    changed_bytes,
    changed_words,
    distance_text,
    grid_rows,
    listed,
    percent,
    picture,
    plane,
    signed_picture,
    training_advice,
)
from holdfast.explanation.counterfactual import changes, counterfactual
from holdfast.reports.charts import PALETTE
from holdfast.reports.gallery import png
from holdfast.reports.tree import Picture
from holdfast.reports.words import amount, feature_value
from holdfast.runs.harness.target import PreparedModel
from holdfast.threats.byte_differences import Edit, characters, hexadecimal
from holdfast.threats.domains import is_image

Checkpoint = Classifier
"""the model with the weights of one epoch of its training"""
_NEAREST = 3
_SUPPORTING = 5


def features(model: Classifier, x: Inputs) -> tuple[Tensor, str]:
    """Return the features (n, d) in which inputs are compared, and their name: those before the last layer of a
    network, or the inputs themselves.
    """
    if any(True for _ in model.parameters()) and model.access == "gradients":
        return penultimate(inner(model), x)[0], "the features before the last layer"
    return x.flatten(1).double().nan_to_num(0), "the inputs"


def neighbour_figure(
    target: PreparedModel, x: Inputs, x_adv: Inputs | None, train: Batch, about: About
) -> Figure:
    """Return the nearest training examples of the clean input, and of the changed one if there is one."""
    of_train, name = features(target.original, train.x)
    pictures: list[Picture] = []
    rows: list[tuple[Cell, ...]] = []
    labels: dict[str, list[str]] = {}
    points = {"the input": x} | ({} if x_adv is None else {"the changed input": x_adv})
    for kind, point in points.items():
        distances = torch.cdist(features(target.original, point)[0], of_train)[0]
        for row in distances.argsort(stable=True)[:_NEAREST].tolist():
            label = about.called(int(train.y[row]))
            labels.setdefault(kind, []).append(label)
            rows.append((kind, int(train.ids[row]), label, float(distances[row])))
            if is_image(x.shape[1:]):
                caption = f"near {kind}: training example {int(train.ids[row])}, label {label}"
                pictures.append(picture(train.x[row], caption, target.original))
    named = [", ".join(dict.fromkeys(each)) for each in labels.values()]
    before, after = named[0], named[-1]
    if x_adv is None:
        when = before
    elif before == after:
        when = f"{before} before and after the change"
    else:
        when = f"{before} before the change, and {after} after it"
    moved = x_adv is not None and set(labels["the input"]).isdisjoint(labels["the changed input"])
    reason = (
        f"In {name}, the changed input is near training examples with the label {after}." if moved else ""
    )
    text = f"Distances are Euclidean in {name}; {amount(len(train), 'training examples')} were compared."
    headings = ("near", "training example", "label", "distance")
    return Figure(
        "neighbours",
        f"The nearest training examples have the label {when}",
        text,
        headings,
        tuple(rows),
        tuple(pictures),
        tabular=True,
        note=text,
        reason=reason,
        columns=_NEAREST,
    )


def tracin(models: Sequence[Classifier], x: Inputs, y: Labels, train: Batch) -> Tensor:
    """Return for each training example the influence (m) on the loss of one example `x` (1) with the label `y` (1).

    A positive value means that training on the example made the loss of `x` smaller. It is summed over the models.
    """
    total = torch.zeros(len(train), dtype=torch.float64)
    for model in models:
        at, logits = penultimate(model, x)
        of_train, of_logits = penultimate(model, train.x)
        error = logits.softmax(1) - F.one_hot(y.cpu(), logits.shape[1])
        errors = of_logits.softmax(1) - F.one_hot(train.y.cpu(), of_logits.shape[1])
        # the gradient of the weights is the outer product of error and features, that of the bias the error
        total += (errors @ error[0]) * (of_train @ at[0] + 1)
    return total


def tracin_figure(
    target: PreparedModel,
    batch: Batch,
    predicted: Labels,
    train: Batch | None,
    checkpoints: Sequence[Checkpoint],
    about: About,
    notes: list[str],
) -> list[Figure]:
    """Return the figure with the training examples that support a wrong prediction, if there are checkpoints and
    training examples. Otherwise the reason is appended to `notes`.
    """
    if train is None or not checkpoints:
        missing = ["training examples (train)"] if train is None else []
        missing += [] if checkpoints else ["checkpoints of the training (checkpoints)"]
        notes.append(
            "TracIn, which shows the training examples that support this wrong prediction, is not applicable without "
            f"{' and '.join(missing)}."
        )
        return []
    influence = tracin(checkpoints, batch.x, predicted, train)
    chosen = influence.argsort(descending=True, stable=True)[:_SUPPORTING].tolist()
    rows = tuple(
        (int(train.ids[row]), about.called(int(train.y[row])), float(influence[row])) for row in chosen
    )
    pictures = tuple(
        picture(train.x[row], f"training example {int(train.ids[row])}, label {rows[k][1]}", target.original)
        for k, row in enumerate(chosen)
        if is_image(batch.x.shape[1:])
    )
    name = about.called(int(predicted[0]))
    labels = ", ".join(dict.fromkeys(str(row[1]) for row in rows))
    title = f"The wrong prediction {name} is supported by training examples with the label {labels}"
    text = (
        f"The {amount(len(rows), 'training examples')} with the largest influence (TracIn on the last layer, "
        f"{amount(len(checkpoints), 'checkpoints')})."
    )
    headings = ("training example", "label", "influence")
    return [
        Figure("tracin", title, text, headings, rows, pictures, tabular=True, note=text, reason=f"{title}.")
    ]


_SIDE = 33
"""points along each side of the slice"""
_TOP = 0.05
"""share of the pixels that counts as few"""
_COLOURS = ("light blue", "orange", "green", "pink", "yellow", "red", "blue", "brown", "black")
"""names of the colours of `PALETTE` in its order, and of that of all further classes"""


def explain_example(
    target: PreparedModel,
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
    predicted = target.predicted(target.logits(batch.x))
    label = int(batch.y[0])
    own = batch.labelled(predicted.clamp_min(0))
    if threat.goal is not None:
        own = own.towards(torch.full_like(own.y, threat.goal))
    start = stored if stored is not None and int(predicted[0]) == label else None
    found = counterfactual(target, own, threat, rng=rng, stored=start)
    low, _ = target.original.bounds.like(batch.x)
    of = low.expand_as(batch.x).clone() if baseline is None else baseline.to(batch.x)
    case = Case(target, own, label, threat, about, of, rng, found)
    figures, notes = [_change(case)], list(about.notes)
    more, remarks = attribution_figures(case)
    figures += more
    notes += remarks
    if found.shown is not None and threat.constraint.in_input_units:
        figures.append(_slice(case))
    if train is None:
        notes.append(
            "The nearest training examples are not shown, because no training examples were given (train, "
            "or --train on the command line)."
        )
    elif not case.is_text and not case.is_file:
        figures.append(neighbour_figure(target, case.x, found.shown, train, about))
    if int(predicted[0]) != label:
        figures += tracin_figure(target, batch, predicted, train, checkpoints, about, notes)
    title = f"example {int(batch.ids[0])} of {about.data}"
    return Explained(title, _sentence(case), tuple(figures), _advice(case), tuple(notes), about.facts)


def _sentence(case: Case) -> str:
    """The finding in one or two sentences."""
    wrong = f", although the label is {case.about.called(case.label)}"
    start = f"Predicted as {case.predicted}{wrong if case.misclassified else ', which is right'}."
    if case.found.shown is None:
        return f"{start} No change that {case.about.threat} allows was found that changes the prediction."
    size = distance_text(case.threat.constraint, case.found.distance, case.target.original)
    edits = _edits(case)
    if edits:
        cost = "" if case.is_text or case.is_file else f" ({size})"
        return f"{start} It becomes {case.becomes} if {listed(edits, noun='more changes')}{cost}."
    allowed = allowed_text(case.about, case.threat.constraint, case.target.original)
    only = "" if case.found.inside else "only "
    return f"{start} It becomes {case.becomes} {only}with a change of {size}; {allowed}."


def _edits(case: Case) -> list[str]:
    """The changes of a text, a file or a row of a table, one clause each; none for other inputs."""
    if case.is_text:
        return [
            f"“{old}” becomes “{new}”{_unusual(old, new)}" if old else f"“{new}” is appended"
            for old, new in changed_words(case.x, case.x_adv)
        ]
    if case.is_file:
        edits = changed_bytes(case.threat.constraint, case.x, case.x_adv)
        return [_edit_clause(edit, len(decoded_files(case.x)[0])) for edit in edits]
    if case.table is None:
        return []
    return [
        f"{name} changes from {feature_value(old)} to {feature_value(new)}"
        for name, old, new in _changed_values(case)
    ]


def _edit_clause(edit: Edit, length: int) -> str:
    """The change of some bytes of a file of a length, as in `0x3c changes from 50 to 4b`."""
    if edit.before:
        old, new = hexadecimal(edit.before, 4), hexadecimal(edit.after, 4)
        return f"0x{edit.offset:x} changes from {old} to {new}"
    number = amount(len(edit.after), "bytes")
    verb = "is" if len(edit.after) == 1 else "are"
    place = "appended" if edit.offset == length else f"inserted at 0x{edit.offset:x}"
    return f"{number} ({hexadecimal(edit.after, 4)}) {verb} {place}"


def _unusual(old: str, new: str) -> str:
    """The names of new characters of a word that look like others or are invisible."""
    names = [unicodedata.name(c, "unknown").lower() for c in new if c not in old and not c.isascii()]
    return f" (with {listed(names)})" if names else ""


def _concentration(case: Case) -> str:
    """How much of the smallest change of an image lies in the most changed pixels."""
    assert case.found.nearest is not None
    change = plane((case.found.nearest - case.x)[0].abs()).flatten()
    k = max(1, round(_TOP * change.numel()))
    share = float(change.topk(k).values.sum()) / (float(change.sum()) or 1.0)
    return f"{percent(share)} of the smallest change lies in {percent(k / change.numel())} of the pixels."


def _changed_share(case: Case) -> float:
    """The share of the pixels that change in the counterfactual that is shown."""
    return float((plane((case.x_adv - case.x)[0].abs()) > 0).float().mean())


def _advice(case: Case) -> tuple[str, ...]:
    constraint = case.threat.constraint
    advice = ["Check the label, and look at training examples like this one."] if case.misclassified else []
    proves = certifiable(constraint, case.target.original.access)
    if case.found.shown is None:
        if proves:
            advice.append(
                "Certify the example (holdfast certify), because another search may still find a change."
            )
        advice.append(
            "Assess more examples (holdfast assess), because one example is no evidence about the model."
        )
        return tuple(advice)
    if not case.found.inside:
        proof = " Prove that there is none (holdfast certify)." if proves else ""
        return (*advice, f"The search finds no change inside {case.about.threat}.{proof}")
    advice.append(training_advice(case.about, constraint, case.target.original.access))
    if case.table is not None:
        names = listed([str(name) for name, *_ in _changed_values(case)], noun="more columns")
        advice.append(
            f"Ask whether an attacker can really change {names} like this. If not, state it in the rules "
            "(change: none, up or down, or a higher cost), and assess the model again."
        )
    elif case.is_picture and not constraint.counts_changes and _changed_share(case) <= _TOP:
        advice.append("Assess the model with a threat with l0 or a patch as well, as few pixels suffice.")
    return tuple(advice)


def _values(case: Case, x: Inputs) -> list[float | str]:
    """Values of a row of a table in the units of the data."""
    units, rules = case.target.original.units, None if case.table is None else case.table.rules
    row = x if units is None else units.normalisation.done(x)
    shown: list[float | str] = []
    for place, value in enumerate(row.flatten().tolist()):
        categories = () if rules is None else rules.columns[rules.names[place]].values
        shown.append(categories[int(value)] if categories and not math.isnan(value) else value)
    return shown


def _changed_values(case: Case) -> list[tuple[str, float | str, float | str]]:
    """The changed columns of a row of a table with both values, the largest changes first."""
    before, after = _values(case, case.x), _values(case, case.x_adv)
    change = (case.x_adv - case.x).abs().nan_to_num(0).flatten()
    if case.table is not None:
        change = change / case.table.tensors.unit.to(change)
    changed = changes(case.x_adv, case.x).flatten().tolist()
    order = change.argsort(descending=True, stable=True).tolist()
    return [(case.about.feature(k), before[k], after[k]) for k in order if changed[k]]


def _change(case: Case) -> Figure:
    """The input, its change and the counterfactual, beside random noise of the same size."""
    if case.found.shown is None:
        title = f"No counterfactual was found with {case.found.attack}"
        shown = (picture(case.x[0], "the input", case.target.original),) if case.is_picture else ()
        note = "An example for which a search finds nothing may still be broken by another one."
        return Figure("change", title, title, ("attack",), ((case.found.attack,),), shown, note=note)
    size = distance_text(case.threat.constraint, case.found.distance, case.target.original)
    title = f"{case.predicted} becomes {case.becomes}"
    title += "" if case.is_text or case.is_file else f" at {size}"
    note = (
        f"Found by {case.found.attack}. The model and the constraint were applied again to every input shown."
    )
    if case.is_text:
        texts = [decoded(x)[0] for x in (case.x, case.x_adv)]
        alternative = f"The text “{texts[0]}” becomes “{texts[1]}”."
        rows = tuple(changed_words(case.x, case.x_adv))
        note = f"{alternative} {note}"
        return Figure("change", title, alternative, ("word", "becomes"), rows, tabular=True, note=note)
    if case.is_file:
        return _changed_file(case, title, note)
    if case.is_picture:
        return _changed_pixels(case, title, note)
    if case.is_signal:
        return _changed_sound(case, title, note)
    values = tuple(_changed_values(case))
    alternative = f"{len(values)} of {amount(case.x[0].numel(), 'columns')} with both values."
    headings = ("column", "value", "becomes")
    reason = _noise_reason(case)
    return Figure("change", title, alternative, headings, values, tabular=True, note=note, reason=reason)


def _changed_file(case: Case, title: str, note: str) -> Figure:
    """The changed bytes of a file as numbers and as characters."""
    edits = changed_bytes(case.threat.constraint, case.x, case.x_adv)
    number = sum(max(len(edit.before), len(edit.after)) for edit in edits)
    length = len(decoded_files(case.x)[0])
    alternative = (
        f"{amount(number, 'bytes')} changed, inserted or appended in a file of {amount(length, 'bytes')}."
    )
    rows = tuple(
        (
            f"0x{edit.offset:x}",
            hexadecimal(edit.before),
            hexadecimal(edit.after),
            characters(edit.before),
            characters(edit.after),
        )
        for edit in edits
    )
    headings = ("offset", "bytes", "become", "characters", "become characters")
    return Figure("change", title, alternative, headings, rows, tabular=True, note=note)


def _changed_sound(case: Case, title: str, note: str) -> Figure:
    """The spectrograms and sounds of a clip, of the counterfactual and of random noise of the same size."""
    from holdfast.reports.sounds import heard, snr, spectrograms  # late: few inputs are clips

    x, x_adv, noise = case.x[0].cpu(), case.x_adv[0].cpu(), case.noise[0].cpu()
    judged = case.about.called(case.predicted_of_noise)
    captions = (
        f"the input, predicted as {case.predicted}",
        f"the counterfactual, predicted as {case.becomes}",
        "the change",
        f"the input with random noise of the same size, predicted as {judged}",
    )
    urls = spectrograms((x, x_adv, x_adv - x, noise), x, case.about.sampling_rate)
    pictures = tuple(Picture(url, caption) for url, caption in zip(urls, captions, strict=True))
    played = (each for place, each in enumerate(captions) if place != 2)
    sounds = heard((x, x_adv, noise), tuple(played), x, case.about.sampling_rate)
    ratio = snr(x, x_adv)
    size = "" if ratio is None else f"The change is {ratio:.1f} dB below the clip (signal-to-noise ratio). "
    alternative = "Spectrograms in one scale of 80 dB: " + "; ".join(captions) + "."
    rows = (("signal-to-noise ratio in dB", ratio if ratio is not None else math.inf),)
    return Figure(
        "change",
        title,
        alternative,
        ("measure", "value"),
        rows,
        pictures,
        sounds=sounds,
        note=f"{size}{note}",
        reason=_noise_reason(case),
    )


def _noise_reason(case: Case) -> str:
    """Whether random noise of the same size changes the prediction as well, if the change is inside the constraint."""
    if not case.found.inside:
        return ""
    what = "A random valid change" if case.table is not None else "Random noise"
    sensitive = "the direction of the change, not to its size"
    if case.threat.constraint.counts_changes:
        what, sensitive = "A change of other values", "the places of the change, not to its size"
    if case.predicted_of_noise != int(case.batch.y[0]):
        becomes = case.about.called(case.predicted_of_noise)
        return f"{what} of the same size changes the prediction as well, to {becomes}: the boundary is near."
    return f"{what} of the same size leaves the prediction at {case.predicted}: the model is sensitive to {sensitive}."


def _changed_pixels(case: Case, title: str, note: str) -> Figure:
    model, nearest, noise = case.target.original, case.found.nearest, case.noise
    assert nearest is not None
    delta, sparse = (nearest - case.x)[0], case.found.sparse
    largest = distance_text(case.threat.constraint, float(delta.abs().max()), model)
    pictures = [
        picture(case.x[0], f"the input, predicted as {case.predicted}", model),
        signed_picture(
            plane(delta), f"the smallest change, amplified (red up, blue down), at most {largest}"
        ),
        picture(nearest[0], f"the nearest counterfactual, predicted as {case.becomes}", model),
    ]
    if sparse is not None:
        other = case.about.called(int(case.target.predicted(case.target.logits(sparse))[0]))
        count = amount(int((plane((sparse - case.x)[0].abs()) > 0).sum()), "pixels")
        text = f"a counterfactual with {count} changed, by the full eps, predicted as {other}"
        pictures.append(picture(sparse[0], text, model))
    judged = case.about.called(case.predicted_of_noise)
    pictures.append(picture(noise[0], f"random noise of the same size, predicted as {judged}", model))
    rows = grid_rows((case.x[0], delta, (case.x_adv - case.x)[0]))
    alternative = f"{len(pictures)} pictures: " + "; ".join(p.caption for p in pictures) + "."
    headings = ("row", "column", "input", "smallest change", "shown change")
    reason, note = _noise_reason(case), f"{_concentration(case)} {note}"
    if sparse is not None and _changed_share(case) <= _TOP:
        reason += f" A change of {percent(_changed_share(case))} of the pixels suffices."
    return Figure("change", title, alternative, headings, rows, tuple(pictures), note=note, reason=reason)


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
        case.target.optimised, x, across, up, bounds=case.target.original.bounds, side=_SIDE, reach=reach
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
    key = ", ".join(f"{_COLOURS[min(k, 8)]} {case.about.called(c)}" for k, c in enumerate(classes))
    title = f"{percent(same)} of the plane inside eps keeps the prediction {case.predicted}"
    text = (
        "The plane through the input (white dot), the nearest counterfactual (black dot, right of it) and a random "
        f"direction; the black line is eps. Colours: {key}."
    )
    headings = ("along the change", "along a random direction", "predicted class", "inside eps")
    drawn = _slice_picture(predicted, inside, classes, reach)
    return Figure("slice", title, text, headings, rows, (drawn,), note=text)


def _slice_picture(predicted: Tensor, inside: Tensor, classes: Sequence[int], reach: float) -> Picture:
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
