"""Figures of the attributions of one example: what its prediction depends on, and how a change moves that."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from scipy.special import stdtrit
from torch import Tensor

from holdfast.core.batch import decoded, decoded_files, encoded, encoded_files
from holdfast.core.types import Inputs
from holdfast.explanation import counterfactual
from holdfast.explanation.case import Case, Cell, Figure, bars, grid_rows, listed, plane, signed_picture
from holdfast.reports.words import amount, plain
from holdfast.threats.byte_changes import ByteChanges
from holdfast.threats.byte_differences import characters, hexadecimal

_DRAWS = 16
"""noises of SmoothGrad"""
_PARTS = 24
"""parts of a clip whose effects are compared"""
_WINDOWS = 16
"""windows of a file, and then of the window with the largest effect, whose effects are compared"""
_MOST_COLUMNS = 12
"""columns of a table that are shown"""


def attribution_figures(case: Case) -> tuple[list[Figure], list[str]]:
    """Return figures of the attributions of the clean input, with noise and after the change, and notes."""
    if case.is_text:
        return [_word_effects(case)], []
    if case.is_file:
        return [_window_effects(case)], []
    notes: list[str] = []
    inputs = torch.cat((case.x, case.noise, case.x_adv)) if case.found.shown is not None else case.x
    classes = case.batch.y.expand(len(inputs))
    baseline = case.baseline.expand_as(inputs)
    model, methods = case.target.optimised, dict[str, Tensor]()
    integrated: counterfactual.Integrated | None = None
    if counterfactual.has_gradients(case.target.original, inputs) and not inputs.isnan().any():
        methods["gradient"] = counterfactual.gradient(model, inputs, classes)
        methods["SmoothGrad"] = counterfactual.smooth_gradient(
            model, inputs, classes, smoothing_noise(case, inputs)
        )
        integrated = counterfactual.integrated_gradients(model, inputs, _start(case, inputs), classes)
        methods["integrated gradients"] = integrated.values
    else:
        reason = "The input has missing values" if inputs.isnan().any() else "The model gives no gradients"
        notes.append(f"{reason}, so gradient, SmoothGrad and integrated gradients are not shown.")
    windows = _parts(inputs.shape[1:]) if case.is_signal else counterfactual.default_window(inputs.shape[1:])
    methods["occlusion"] = counterfactual.occlusion(model, inputs, baseline, classes, *windows)
    figures = [_attribution_figure(case, methods, integrated)]
    if len(inputs) == 3:
        figures.append(_stability(methods))
    return figures, notes


def _parts(shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return window and stride of the parts of a clip, one after the other, with all channels."""
    part = (*shape[:-1], -(-shape[-1] // _PARTS))
    return part, part


def _of_parts(case: Case, values: Tensor) -> Tensor:
    """Return the sums (n, parts) of attributions over the parts of a clip."""
    length = _parts(case.x.shape[1:])[0][-1]
    of_times = values.reshape(len(values), -1, values.shape[-1]).sum(1)
    return torch.stack([part.sum(1) for part in torch.split(of_times, length, 1)], 1)


def _part_name(case: Case, place: int) -> str:
    """Return the time of a part of a clip, in seconds if the sampling rate is known; of short clips in milliseconds."""
    length, rate = _parts(case.x.shape[1:])[0][-1], case.about.sampling_rate
    start, stop = place * length, min((place + 1) * length, case.x.shape[-1])
    if rate is None:
        return f"samples {start} to {stop}"
    if case.x.shape[-1] < rate / 2:
        return f"{1000 * start / rate:.1f} to {1000 * stop / rate:.1f} ms"
    return f"{start / rate:.2f} to {stop / rate:.2f} s"


def _start(case: Case, inputs: Inputs) -> Inputs:
    """Where integrated gradients start. Categories and one-hot columns of a table remain those of the inputs, because
    no value between two categories exists.
    """
    start, table = case.baseline.expand_as(inputs), case.table
    if table is None:
        return start
    rules = table.tensors
    return torch.where((rules.category | rules.grouped).to(inputs.device), inputs, start)


def smoothing_noise(case: Case, inputs: Inputs) -> Tensor:
    """Return the noise of SmoothGrad (draws, n, *features), the same for each input, with a tenth of the range of the
    input as its standard deviation. Under rules of a table, the range is that of each column, and categories and
    columns without limits do not change.
    """
    x, table = case.x, case.table
    draws = [
        case.rng.at("smooth", k).normal(case.batch.ids, *x.shape[1:], dtype=x.dtype) for k in range(_DRAWS)
    ]
    spread = (x.amax() - x.amin()).clamp_min(1e-6) / 10
    if table is not None:
        rules = table.tensors
        width = (rules.high - rules.low).nan_to_num(0, posinf=0)
        spread = torch.where(rules.category | rules.grouped, 0, width).to(x) / 10
    return torch.stack([(spread * drawn).expand_as(inputs) for drawn in draws])


def _attribution_figure(
    case: Case, methods: dict[str, Tensor], integrated: counterfactual.Integrated | None
) -> Figure:
    kinds = ("clean", "with noise", "after the change")[: len(next(iter(methods.values())))]
    pairs = [(name, k, kind) for name in methods for k, kind in enumerate(kinds)]
    alternative = f"For each of {', '.join(methods)}: attributions of the input {', '.join(kinds)}."
    headings = [f"{name}, {kind}" for name, _, kind in pairs]
    note = "" if integrated is None else f" {_completeness(case, integrated)}"
    if case.is_picture:
        scales = {name: float(plane(values[0]).abs().max()) for name, values in methods.items()}
        shown = tuple(signed_picture(plane(methods[n][k]), f"{n}, {kind}", scales[n]) for n, k, kind in pairs)
        return Figure(
            "attributions",
            f"What {case.explained} depends on, before and after the change",
            alternative,
            ("row", "column", *headings),
            grid_rows([methods[name][k] for name, k, _ in pairs]),
            shown,
            note=f"Red pixels raise {case.explained}, and blue ones lower it.{note}",
            columns=len(kinds),
        )
    if case.is_signal:
        methods = {name: _of_parts(case, values) for name, values in methods.items()}
    noun = "part" if case.is_signal else "column"

    def name_of(place: int) -> str:
        return _part_name(case, place) if case.is_signal else case.about.feature(place)

    order = methods["occlusion"].abs().nan_to_num(0)[0].flatten().argsort(descending=True, stable=True)
    table: tuple[tuple[Cell, ...], ...] = tuple(
        (name_of(p), *(float(methods[n][k].flatten()[p]) for n, k, _ in pairs))
        for p in order[:_MOST_COLUMNS].tolist()
    )
    names = [name_of(p) for p in order[:3].tolist() if methods["occlusion"][0].flatten()[p] != 0]
    title = (
        f"The prediction {case.predicted} depends most on {listed(names)}"
        if names
        else f"No {noun} has an effect"
    )
    reading = f"A positive value raises {case.explained}, and a negative one lowers it.{note}"
    left = len(order) - len(table)
    if left > 0:
        reading += (
            f" {amount(left, noun + 's')} with smaller effects {'is' if left == 1 else 'are'} not listed."
        )
    reason = f"{title}." if names and case.found.inside else ""
    return Figure(
        "attributions",
        title,
        alternative,
        (noun, *headings),
        table,
        tabular=True,
        note=reading,
        reason=reason,
    )


def _completeness(case: Case, integrated: counterfactual.Integrated) -> str:
    """What integrated gradients explain, and which share of it they miss."""
    start = (
        "the median of each column among the inputs"
        if case.x.dim() == 2
        else "an input of the lowest values among the inputs"
    )
    start = "silence" if case.is_signal else start
    fixed = case.table is not None and bool(case.table.tensors.category.any())
    kept = ", while categories keep their values" if fixed else ""
    return (
        f"Integrated gradients divide the difference of the logit from that of {start}{kept}; "
        f"{100 * float(integrated.gap.max()):.2g} % of the difference is not attributed (completeness gap, with "
        f"{amount(integrated.nodes, 'nodes')})."
    )


def _stability(methods: dict[str, Tensor]) -> Figure:
    """How much each attribution changes by the attack and by noise of the same size."""
    rows: tuple[tuple[str, float, float, float, float], ...] = tuple(
        (
            name,
            counterfactual.rank_correlation(values[0], values[2]),
            counterfactual.rank_correlation(values[0], values[1]),
            counterfactual.top_overlap(values[0], values[2]),
            counterfactual.top_overlap(values[0], values[1]),
        )
        for name, values in methods.items()
    )
    mean = [sum(column) / len(rows) for column in ([r[1] for r in rows], [r[2] for r in rows])]
    low, high = _interval([noise - change for _, change, noise, _, _ in rows])
    title = "The change moves the attributions about as much as noise of the same size"
    if low > 0 or high < 0:
        title = (
            f"The change moves the attributions {'more' if low > 0 else 'less'} than noise of the same size"
        )
    text = (
        f"Mean rank correlation with the clean attribution: {mean[0]:.2f} after the change, {mean[1]:.2f} with noise; "
        f"95 % interval of the difference over the methods: {low:.2f} to {high:.2f}."
        if len(rows) > 1
        else f"Rank correlation with the clean attribution: {mean[0]:.2f} after the change, {mean[1]:.2f} with noise; "
        "one method has no interval."
    )
    headings = (
        "method",
        "correlation, change",
        "correlation, noise",
        "overlap of top 5 %, change",
        "overlap, noise",
    )
    return Figure("stability", title, text, headings, rows, tabular=True, note=text)


def _interval(differences: list[float]) -> tuple[float, float]:
    """The 95 % interval of Student's t of the mean of a few differences; unlimited for a single one."""
    n = len(differences)
    mean = sum(differences) / n
    if n < 2:
        return -math.inf, math.inf
    error = (sum((each - mean) ** 2 for each in differences) / (n - 1) / n) ** 0.5
    return mean - stdtrit(n - 1, 0.975) * error, mean + stdtrit(n - 1, 0.975) * error


def _word_effects(case: Case) -> Figure:
    """The fall of the logit when one word is left out, before and after the change."""
    rows: list[tuple[Cell, ...]] = []
    inputs = {"clean": case.x} | ({} if case.found.shown is None else {"changed": case.x_adv})
    for kind, x in inputs.items():
        words = decoded(x)[0].split()
        if len(words) < 2:
            continue
        without = [" ".join(words[:k] + words[k + 1 :]) for k in range(len(words))]
        points = encoded([*without, " ".join(words)], x.shape[1]).to(x)
        logits = counterfactual.logits_of_class(
            case.target.original, points, case.batch.y.expand(len(points))
        )
        effects = (logits[-1] - logits[:-1]).tolist()
        rows += [(kind, word, effect) for word, effect in zip(words, effects, strict=True)]
    top = sorted(rows, key=lambda row: -abs(float(row[2] or 0)))[:_MOST_COLUMNS]
    clean = [str(word) for kind, word, fall in top if kind == "clean" and float(fall or 0) > 0]
    named = listed([f"“{word}”" for word in [*dict.fromkeys(clean)][:3]]) if clean else "no single word"
    title = f"The prediction {case.predicted} depends most on {named}"
    reason = f"{title}." if clean and case.found.inside else ""
    shown = bars(
        [f"{r[1]} ({r[0]})" for r in top],
        [abs(float(r[2] or 0)) for r in top],
        [plain(float(r[2] or 0)) for r in top],
    )
    text = f"Fall of {case.explained} when one word is left out; the largest effects first."
    return Figure(
        "attributions",
        title,
        text,
        ("text", "word", "fall of the logit"),
        tuple(rows),
        bars=shown,
        note=text,
        reason=reason,
    )


@dataclass(frozen=True)
class _Window:
    """Neighbouring bytes of a file, and the fall of the logit when they become zero."""

    start: int
    stop: int
    fall: float

    @property
    def name(self) -> str:
        one = self.stop - self.start == 1
        return f"byte 0x{self.start:x}" if one else f"bytes 0x{self.start:x} to 0x{self.stop - 1:x}"


def _window_effects(case: Case) -> Figure:
    """The fall of the logit when the bytes in a window of a file become zero, before and after the change."""
    (content,) = decoded_files(case.x)
    constraint, windows = case.threat.constraint, {"clean": _windows(case, case.x)}
    assert isinstance(constraint, ByteChanges)
    if case.found.shown is not None:
        windows["changed"] = _windows(case, case.x_adv)
    places = constraint.places(content).change
    rows = tuple(
        (
            kind,
            each.start,
            each.stop - 1,
            hexadecimal(part := file[each.start : each.stop]),
            characters(part),
            int(((places >= each.start) & (places < each.stop)).sum()) if kind == "clean" else None,
            each.fall,
        )
        for kind, x in (("clean", case.x), ("changed", case.x_adv))
        for file in decoded_files(x)
        for each in windows.get(kind, ())
    )
    most = _most_important(windows["clean"])
    title = f"The prediction {case.predicted} depends on no single window of the file"
    if most is not None:
        shown = characters(content[most.start : most.stop])
        title = f"The prediction {case.predicted} depends most on {most.name} (“{shown}”)"
    text = (
        f"Fall of {case.explained} when the bytes in a window become zero; the largest effects first. The window with "
        f"the largest effect is divided into {_WINDOWS} further ones, down to single bytes."
    )
    headings = ("file", "first offset", "last offset", "bytes", "characters", "bytes that may change")
    top = sorted(
        ((f"{each.name} ({kind})", each.fall) for kind in windows for each in windows[kind]),
        key=lambda pair: -abs(pair[1]),
    )[:_MOST_COLUMNS]
    return Figure(
        "attributions",
        title,
        text,
        (*headings, "fall of the logit"),
        rows,
        bars=bars(
            [name for name, _ in top], [abs(fall) for _, fall in top], [plain(fall) for _, fall in top]
        ),
        note=text,
        reason=f"{title}." if most is not None and case.found.inside else "",
    )


def _most_important(windows: Sequence[_Window]) -> _Window | None:
    """Return the shortest window that has half of the largest effect, inside the window with this effect."""
    largest = max(windows, key=lambda each: each.fall, default=None)
    if largest is None or largest.fall <= 0:
        return None
    inside = (each for each in windows if largest.start <= each.start and each.stop <= largest.stop)
    return min(
        (each for each in inside if each.fall >= largest.fall / 2), key=lambda each: each.stop - each.start
    )


def _windows(case: Case, x: Inputs) -> list[_Window]:
    """Return windows of a file (1, length) with their effects: of the file, and of its window with the largest one."""
    (content,) = decoded_files(x)
    start, stop, found = 0, len(content), list[_Window]()
    while stop - start > 1:
        edges = sorted({start + (stop - start) * k // _WINDOWS for k in range(_WINDOWS + 1)})
        without = [
            content[:first] + bytes(after - first) + content[after:] for first, after in pairwise(edges)
        ]
        points = encoded_files([*without, content], x.shape[1]).to(x)
        logits = counterfactual.logits_of_class(
            case.target.original, points, case.batch.y.expand(len(points))
        )
        falls = (logits[-1] - logits[:-1]).tolist()
        found += [_Window(*edge, fall) for edge, fall in zip(pairwise(edges), falls, strict=True)]
        largest = max(found[-len(falls) :], key=lambda each: abs(each.fall))
        if largest.fall == 0:
            break
        start, stop = largest.start, largest.stop
    return found
