"""Coordinates of the charts in reports, and the part of a report about the geometry of the decision boundary."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from holdfast.core.evidence import Table as StoredTable
from holdfast.core.names import fraction_of
from holdfast.reports import tree, words
from holdfast.reports.curves import class_name
from holdfast.reports.gallery import png
from holdfast.reports.tree import Drawing, Mark, Path, Tick
from holdfast.reports.words import NOT_A_NUMBER_WORDS, count_text, number, plain, strict

_HALF = 0.5
_FEW = 200
"""Below this end, a logarithmic axis has ticks at 2 and 5 between its powers of ten."""
_BEYOND, _APART = 1.06, 0.15
"""length of an axis of counts relative to that to its last tick, so that the label is not cut off; and the least
distance of its ticks, as a fraction of the axis"""
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 14.0, 12.0, 44.0


@dataclass(frozen=True)
class Axis:
    """An axis of a chart."""

    place: Callable[[float], float]
    """function from a value to the fraction of the axis at which it is drawn"""
    ticks: Sequence[tuple[float, str]] = ()
    """values at which ticks are drawn, with their labels"""


def linear_axis(top: float, most: int = 6) -> Axis:
    """Return an axis from 0 to `top` with at most `most` steps between ticks. Larger values are drawn at its end."""
    step = round_step(top, most)
    # the tolerance keeps the last tick if the division rounds down
    values = [k * step for k in range(math.floor(top / step + 1e-9) + 1)]
    return Axis(lambda value: min(value / top, 1.0), [(value, plain(value)) for value in values])


def logarithmic_axis(top: float) -> Axis:
    """Return an axis of the logarithms of one plus the values, from 0 to `top`."""
    factors = (1, 2, 5) if top < _FEW else (1,)
    powers = range(math.floor(math.log10(max(top, 1))) + 1)
    values = [0.0, *(factor * 10.0**power for power in powers for factor in factors)]
    ticks = [(value, count_text(value)) for value in values if value <= top]
    return Axis(lambda value: math.log10(1 + value) / math.log10(1 + top), ticks)


def axis_of_decades(least: float) -> Axis:
    """Return a logarithmic axis from `least` to 1. Smaller values are drawn at its beginning."""
    n = max(-math.log10(least), 1.0)
    values = [10.0**-power for power in range(math.floor(n + 1e-9) + 1)]
    ticks = [(value, f"{value:g}") for value in values]
    return Axis(lambda value: 1 + math.log10(max(value, least)) / n, ticks)


def axis_of_decibels(least: float, top: float) -> Axis:
    """Return a logarithmic axis from the ratio `least` to `top`, with ticks in decibels below 1, which fall along
    it.
    """
    first, last = -20 * math.log10(least), -20 * math.log10(top)
    step = round_step(first - last)
    values = [k * step for k in range(math.ceil(last / step - 1e-9), math.floor(first / step + 1e-9) + 1)]
    return Axis(
        lambda value: max(0.0, (first + 20 * math.log10(max(value, least))) / (first - last)),
        [(fraction_of(value), plain(value)) for value in values[::-1]],
    )


_SHARES = Axis(lambda share: share, [(k / 4, f"{25 * k} %") for k in range(5)])
"""axis of fractions"""


def round_step(top: float, most: int = 6) -> float:
    """Return the distance between the ticks of a chart: the smallest 1, 2 or 5 times a power of ten with at most `most`
    steps from 0 to `top`.
    """
    raw = top / most
    power = 10.0 ** math.floor(math.log10(raw))
    # without the tolerance, rounding could select the next larger step
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))


@dataclass(frozen=True)
class Plane:
    """The coordinate system of a chart, which maps values of its two axes to SVG coordinates."""

    width: float
    height: float
    x: Axis
    y: Axis = _SHARES

    @property
    def right(self) -> float:
        """Horizontal SVG coordinate of the right end of the chart."""
        return self.width - _RIGHT

    @property
    def bottom(self) -> float:
        """Vertical SVG coordinate of the x axis of the chart, where the fraction is 0."""
        return self.height - _BOTTOM

    def across(self, value: float) -> float:
        """Return the horizontal SVG coordinate of a value on the x axis of the chart."""
        return _LEFT + (self.right - _LEFT) * self.x.place(value)

    def level(self, value: float) -> float:
        """Return the vertical SVG coordinate of a value on the y axis of the chart."""
        return self.bottom - (self.bottom - _TOP) * self.y.place(value)

    def line(self, points: Iterable[tuple[float, float]]) -> str:
        """Return the SVG path of straight lines between points."""
        return "M" + "L".join(f"{self.across(x):.1f},{self.level(y):.1f}" for x, y in points)

    def upright(self, x: float, text_y: float, text: str) -> Mark:
        """Return a vertical line with its label at the side where it fits."""
        flip = x > self.right - 120
        side = x - 6 if flip else x + 6
        return Mark(x, _TOP, x, self.bottom, text, side, text_y, "end" if flip else "start")

    def drawing(self, *paths: Path, mark: Mark | None = None) -> Drawing:
        """Return the chart with these paths, with the ticks of both axes."""
        x_ticks = tuple(Tick(round(self.across(value), 1), text) for value, text in self.x.ticks)
        y_ticks = tuple(Tick(round(self.level(value), 1), text) for value, text in self.y.ticks)
        return Drawing(
            self.width, self.height, _LEFT, self.right, _TOP, self.bottom, paths, x_ticks, y_ticks, mark
        )


SIZES = (("wide", 720.0, 300.0), ("narrow", 340.0, 260.0))
"""Names and sizes of the two versions of each chart, for wide and for narrow screens, of which CSS shows one.

Therefore the text of a chart has the same size on all screens.
"""
Drawings = list[tuple[str, Drawing]]
"""a chart at each of the sizes; empty if there is nothing to draw"""


def _planes(x: Axis, y: Axis = _SHARES) -> Iterator[tuple[str, Plane]]:
    """The coordinate system of each size, with the name of the size."""
    return ((name, Plane(width, height, x, y)) for name, width, height in SIZES)


def staircases(
    points: Sequence[Mapping[str, Any]],
    key: str,
    *,
    logarithmic: bool = False,
    decibels: bool = False,
    mark: float | None = None,
) -> Drawings:
    """Return a chart of accuracy, for example as a function of eps, with its confidence band.

    `key` is that of the values on the x axis, and `mark` the value of eps at which a vertical line is drawn. With
    `decibels` the axis shows ratios in decibels.
    """
    xs = [number(point[key]) for point in points]
    marked = mark if mark is not None and math.isfinite(mark) and mark > 0 else None
    top = max(*xs, marked or 0.0) if xs else 0.0
    if top <= 0:
        return []
    axis = logarithmic_axis(max(top, 10.0)) if logarithmic else linear_axis(top * 1.04)
    if decibels:
        axis = axis_of_decibels(min(x for x in (*xs, top) if x > 0) / 2, top * 1.04)
    label = "" if marked is None else f"eps {words.size(marked, decibels=decibels)}"
    return [(name, _staircase(plane, points, xs, marked, label)) for name, plane in _planes(axis)]


def _staircase(
    plane: Plane,
    points: Sequence[Mapping[str, Any]],
    xs: Sequence[float],
    marked: float | None,
    text: str,
) -> Drawing:
    starts = [plane.across(x) for x in xs]
    ends = [*starts[1:], plane.right]
    levels = {key: [plane.level(number(point[key])) for point in points] for key in ("value", "low", "high")}
    band = _steps(starts, ends, levels["high"]) + _back(starts, ends, levels["low"])
    line = Path("line", _steps(starts, ends, levels["value"]))
    label = None
    if marked is not None:
        # away from the curve, and inside the chart
        share = next(
            (number(point["value"]) for point, x in zip(points[::-1], xs[::-1], strict=True) if x <= marked),
            1.0,
        )
        level = plane.level(0.06) if share > _HALF else plane.level(0.94)
        label = plane.upright(round(plane.across(marked), 1), level + 4, text)
    return plane.drawing(Path("range", band), line, mark=label)


def _steps(starts: Sequence[float], ends: Sequence[float], levels: Sequence[float]) -> str:
    """The start of an SVG path of steps, which is constant at each level until the next one begins."""
    first = f"M{starts[0]:.1f},{levels[0]:.1f}H{ends[0]:.1f}"
    return first + "".join(f"V{y:.1f}H{end:.1f}" for y, end in zip(levels[1:], ends[1:], strict=True))


def _back(starts: Sequence[float], ends: Sequence[float], levels: Sequence[float]) -> str:
    """The end of a closed SVG path: the steps from right to left, so that the area below the first steps is filled."""
    steps = reversed(list(zip(starts, ends, levels, strict=True)))
    return "".join(f"L{end:.1f},{y:.1f}H{start:.1f}" for start, end, y in steps) + "Z"


LOOKS = ("solid", "dashed", "dotted")
"""looks of the lines of a chart of several, in their order"""


def epochs(points: Sequence[Mapping[str, Any]], lines: Sequence[tuple[str, str]], marked: float) -> Drawings:
    """Return a chart of fractions over the epochs of a training. `lines` are the keys of the fractions with their
    names, and `marked` is the epoch of the checkpoint.
    """
    axis, drawings = linear_axis(float(max(point["epoch"] for point in points))), []
    for size, plane in _planes(axis):
        paths = [
            Path(f"line line-{k}", plane.line((point["epoch"], point[key]) for point in points), name)
            for k, (key, name) in enumerate(lines, 1)
        ]
        mark = plane.upright(round(plane.across(marked), 1), plane.level(0.06) + 4, "checkpoint")
        drawings.append((size, plane.drawing(*paths, mark=mark)))
    return drawings


def rates(lines: Sequence[Mapping[str, Any]], least: float) -> Drawings:
    """Return a chart of lines on two logarithmic axes. Values below `least` are drawn at `least`."""
    axis, drawings = axis_of_decades(least), []
    drawn = [line for line in lines if line["points"]]
    for size, plane in _planes(axis, axis):
        paths = [
            Path(f"line line-{k}", plane.line(line["points"]), str(line["name"]))
            for k, line in enumerate(drawn, 1)
        ]
        drawings.append((size, plane.drawing(*paths)))
    return drawings


def growth(lines: Sequence[Mapping[str, Any]]) -> Drawings:
    """Return a chart of lines of fractions over counts on a logarithmic axis, with ticks at counts whose labels fit."""
    drawn = [line for line in lines if line["points"]]
    counts = sorted({count for line in drawn for count, _ in line["points"]})
    width = _BEYOND * math.log(counts[-1] / counts[0]) or 1.0
    axis = Axis(lambda count: math.log(count / counts[0]) / width)
    shown = counts[-1:]
    for n in counts[-2::-1]:
        if axis.place(shown[0]) - axis.place(n) >= _APART:
            shown.insert(0, n)
    axis = replace(axis, ticks=[(n, count_text(n)) for n in shown])
    drawings = []
    for size, plane in _planes(axis):
        paths = [
            Path(f"line line-{k}", plane.line(line["points"]), str(line["name"]))
            for k, line in enumerate(drawn, 1)
        ]
        drawings.append((size, plane.drawing(*paths)))
    return drawings


def series(lines: Sequence[tuple[str, Sequence[float]]]) -> Drawings:
    """Return a chart of named series of values, each over its steps 0, 1, 2, …"""
    every = [value for _, values in lines for value in values]
    low, high = min(every), max(every)
    step = round_step(max(high - low, 1e-6), 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    last = max(last, first + 1)
    ticks = [(k * step, plain(k * step)) for k in range(first, last + 1)]
    y = Axis(lambda value: (value / step - first) / (last - first), ticks)
    x = linear_axis(float(max(*(len(values) for _, values in lines), 2) - 1))
    return [
        (
            size,
            plane.drawing(
                *(
                    Path(f"line line-{k}", plane.line(enumerate(values)), name)
                    for k, (name, values) in enumerate(lines, 1)
                )
            ),
        )
        for size, plane in _planes(x, y)
    ]


def bands(bounds: Sequence[tuple[float, float]], mark: float | None = None) -> Drawings:
    """Return a chart of lower and upper bounds, in the order of the lower bounds: the area below the lower bounds, that
    between both, and the line of the upper bounds.

    An infinite upper bound ends at the top of the chart and has no line.
    """
    ordered = sorted(bounds)
    marked = mark if mark is not None and math.isfinite(mark) and mark > 0 else 0.0
    finite = [value for pair in ordered for value in pair if math.isfinite(value)]
    top = max([*finite, marked], default=0.0) * 1.08
    if not ordered or top <= 0:
        return []
    planes = _planes(Axis(lambda place: place / len(ordered)), linear_axis(top, 5))
    return [(name, _bands(plane, ordered, marked)) for name, plane in planes]


def _bands(plane: Plane, ordered: Sequence[tuple[float, float]], marked: float) -> Drawing:
    edges = [plane.across(place) for place in range(len(ordered) + 1)]
    starts, ends = edges[:-1], edges[1:]
    low, high = ([plane.level(value) for value in side] for side in zip(*ordered, strict=True))
    upper = "".join(
        f"M{start:.1f},{y:.1f}H{end:.1f}"
        for start, end, y, (_, value) in zip(starts, ends, high, ordered, strict=True)
        if math.isfinite(value)
    )
    paths = (
        Path("between", _steps(starts, ends, high) + _back(starts, ends, low)),
        Path("proved", _steps(starts, ends, low) + _back(starts, ends, [plane.bottom] * len(ordered))),
        Path("upper", upper),
    )
    level, right = round(plane.level(marked), 1), plane.right
    label = Mark(_LEFT, level, right, level, f"eps {plain(marked)}", right - 4, level - 6, "end")
    return plane.drawing(*paths, mark=label if marked else None)


Json = dict[str, Any]

PALETTE = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#d55e00", "#0072b2", "#5a3d2b")
"""Colours of the classes of a slice, beginning with the label: those of Okabe & Ito, "Color Universal Design", 2008,
which readers with colour blindness distinguish, and a brown. Further classes are black."""
_FURTHER, _PALE = "#000000", 0.45
KINDS = {
    "slice_attacks": "plane of two attacks",
    "slice_random": "plane of an attack and a random direction",
}
"""Columns of slices, with the descriptions of their planes."""


def geometry_results(
    table: StoredTable, classes: Sequence[str], *, norm: str, unit: str, method: str
) -> Json:
    """Return the geometry of the decision boundary for the summary of a run.

    `norm` is the name of the norm of the threat, such as `Linf`; `unit` describes an example, such as `image`, and
    `method` is the name of the prover.
    """
    columns = table.columns
    return {
        "norm": norm,
        "unit": unit,
        "method": method,
        "proved": not bool(columns["lower"].isnan().any()),
        "eps": strict(float(columns["radius"].amax())),
        "one_radius": bool((columns["radius"] == columns["radius"][0]).all()),
        "rows": [_row(columns, row, tuple(classes)) for row in range(len(table))],
    }


def _row(columns: Mapping[str, Tensor], row: int, classes: tuple[str, ...]) -> Json:
    label = int(columns["y"][row])
    numbers = ("margin", "lower", "upper", "radius", "lipschitz_below", "lipschitz_above")
    return {
        "id": int(columns["id"][row]),
        "label": class_name(label, classes),
        "prediction": class_name(int(columns["prediction"][row]), classes),
        "rival": class_name(int(columns["rival"][row]), classes),
        **{name: strict(float(columns[name][row])) for name in numbers},
        "slices": [
            {"plane": plane, **_slice(columns[name][row].long(), label, classes)}
            for name, plane in KINDS.items()
            if name in columns
        ],
    }


def _slice(grid: Tensor, label: int, classes: tuple[str, ...]) -> Json:
    """A slice as a picture, with the names of its colours in the order of their areas after the label. Colours are pale
    outside of the bounds.
    """
    predicted = torch.where(grid < 0, -1 - grid, grid)
    areas = predicted.flatten().bincount()
    order = areas.argsort(descending=True, stable=True).tolist()
    shown = [
        value for value in (label, *(k for k in order if k != label)) if value < len(areas) and areas[value]
    ]
    # the first colour is that of the label, also where it is absent
    free = (*PALETTE[1:], *[_FURTHER] * len(shown))
    others = dict(zip([value for value in shown if value != label], free, strict=False))
    colours = {value: PALETTE[0] if value == label else others[value] for value in shown}
    picture = torch.zeros(3, *grid.shape)
    for value, colour in colours.items():
        rgb = torch.tensor([int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)])[:, None, None]
        picture = torch.where(
            predicted == value, torch.where(grid < 0, rgb + _PALE * (1 - rgb), rgb), picture
        )
    return {
        "picture": png(picture),
        "side": len(grid),
        "key": [{"name": class_name(value, classes), "colour": colour} for value, colour in colours.items()],
    }


def geometry_section(results: Mapping[str, Any]) -> tree.Section:
    """Return the section of the geometry of the decision boundary: distances, Lipschitz constants and slices."""
    unit, rows = results["unit"], results["rows"]
    n = f"{len(rows)} {unit}{'' if len(rows) == 1 else 's'}"
    lead = f"the decision boundary around the first {n}. Distances are in {results['norm']}"
    table = tree.Group(
        "Distances and Lipschitz constants", (_distances(results), tree.Paragraph(_distances_note(results)))
    )
    blocks: list[tree.Block] = [*_band_chart(results), table]
    if rows[0]["slices"]:
        side = rows[0]["slices"][0]["side"]
        note = (
            f"Predicted classes on a plane through each {unit}, which is the white circle. The cross is the "
            "adversarial example of the attack. Colours are pale where a value is outside of the range of valid "
            f"inputs. These pictures show what the model predicts at {side} × {side} points; nothing about other "
            "points or other directions is proved."
        )
        entries = [_slices(row, unit) for row in rows[:_MOST_SLICES]]
        gallery = tree.Gallery(entries, _MOST_SLICES, "slices", "page")
        blocks.append(tree.Group("Slices of the decision boundary", (tree.Paragraph(note), gallery)))
    return tree.Section("Geometry", blocks, lead, "geometry", "Geometry", "page")


_MOST_SLICES = 6
"""number of examples whose slices are shown"""


def _band_chart(results: Mapping[str, Any]) -> Iterator[tree.Chart]:
    """The chart of the bounds of distances; none without a proved bound."""
    unit, rows = results["unit"], results["rows"]
    pairs = [(number(row["lower"]), number(row["upper"])) for row in rows]
    drawings = bands(pairs, number(results["eps"]) if results["one_radius"] else None)
    if results["proved"] and drawings:
        caption = (
            f"Each column is one {unit}. Proved: no input within the dark area is misclassified (bounds of the method "
            f"{results['method']}). Found: an attack found a misclassified input at the black line. The distance to "
            "the decision boundary is in the light area between them. Without a line, no attack found one."
        )
        alternative = (
            f"Proved and attacked distance of {len(rows)} {unit}s, sorted by the proved distance; the numbers are in "
            "the table below."
        )
        axis = f"{unit}s, sorted by the proved distance"
        yield tree.Chart(drawings, axis, alternative, caption, "Distance to the decision boundary")


def _distances(results: Mapping[str, Any]) -> tree.Table:
    rows = []
    for row in results["rows"]:
        right = row["prediction"] == row["label"]
        beside = f"then {row['rival']}" if right else f"misclassified as {row['prediction']}"
        upper = "–" if row["upper"] == "inf" else f"≤ {rounded_up(row['upper'])}"
        proved = (f"≥ {rounded_down(row['lower'])}", f"≤ {rounded_up(row['lipschitz_above'])}")
        lower, above = proved if results["proved"] else ("–", "–")
        name = tree.Cell(f"#{row['id']}", (f"{row['label']}, {beside}",))
        rows.append(
            (name, plain(row["margin"]), lower, upper, f"≥ {rounded_down(row['lipschitz_below'])}", above)
        )
    headings = (
        results["unit"],
        "margin",
        "distance, proved",
        "distance, attacked",
        "Lipschitz constant, estimated",
        "Lipschitz constant, proved",
    )
    return tree.Table(headings, rows, extra=frozenset({1}))


def _distances_note(results: Mapping[str, Any]) -> str:
    unit = results["unit"]
    within = plain(results["eps"]) if results["one_radius"] else "the attacked distance"
    proved = (
        ""
        if results["proved"]
        else " Nothing is proved about this model, because it has an operation without sound bounds."
    )
    return (
        "The margin is the logit of the label minus that of the next class. Its Lipschitz constant is its largest "
        f"change for a change of the {unit} by one unit of {results['norm']}, within {within} of the {unit}. The "
        "estimate is the largest of some sampled gradients: the true constant is at least as large. The proved bound "
        f"is at least the true constant, and often much larger.{proved}"
    )


def _slices(row: Mapping[str, Any], unit: str) -> tree.Group:
    crossed = row["upper"] != "inf" and row["prediction"] == row["label"]
    pictures = [
        tree.Picture(
            each["picture"],
            each["plane"],
            f"Predicted classes around {unit} {row['id']} in the {each['plane']}: "
            f"{', '.join(entry['name'] for entry in each['key'])}.",
            key=tuple((entry["name"], entry["colour"]) for entry in each["key"]),
            side=each["side"],
            crossed=crossed,
        )
        for each in row["slices"]
    ]
    return tree.Group(f"#{row['id']}, label {row['label']}", (tree.Pictures(pictures, columns=2),))


def rounded_down(value: float | str, digits: int = 3) -> str:
    """Return a number as text, rounded down to a few significant digits, as for a certified bound."""
    return _rounded(value, digits, math.floor)


def rounded_up(value: float | str, digits: int = 3) -> str:
    """Return a number as text, rounded up to a few significant digits."""
    return _rounded(value, digits, math.ceil)


def _rounded(value: float | str, digits: int, towards: Any) -> str:
    amount = number(value) if not isinstance(value, str) else NOT_A_NUMBER_WORDS[value]
    if not math.isfinite(amount) or amount == 0:
        return plain(amount)
    unit = 10.0 ** (math.floor(math.log10(abs(amount))) - digits + 1)
    # a number with few digits stays as it is
    ratio = amount / unit
    steps = round(ratio) if abs(ratio - round(ratio)) < 1e-9 else towards(ratio)
    return plain(steps * unit, digits + 1)
