"""Coordinates of the charts in reports: SVG paths and ticks, which are computed from numbers. Colours and text from
users are not included.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.reports.numbers import count_text, number, plain
from holdfast.reports.tree import Drawing, Mark, Path, Tick

_HALF = 0.5
_FEW = 200
"""Below this end, a logarithmic axis has ticks at 2 and 5 between its powers of ten."""
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
    points: Sequence[Mapping[str, Any]], key: str, *, logarithmic: bool = False, mark: float | None = None
) -> Drawings:
    """Return a chart of accuracy, for example as a function of eps, with its confidence band.

    `key` is that of the values on the x axis, and `mark` the value of eps at which a vertical line is drawn.
    """
    xs = [number(point[key]) for point in points]
    marked = mark if mark is not None and math.isfinite(mark) and mark > 0 else None
    top = max(*xs, marked or 0.0) if xs else 0.0
    if top <= 0:
        return []
    axis = logarithmic_axis(max(top, 10.0)) if logarithmic else linear_axis(top * 1.04)
    return [(name, _staircase(plane, points, xs, marked)) for name, plane in _planes(axis)]


def _staircase(
    plane: Plane, points: Sequence[Mapping[str, Any]], xs: Sequence[float], marked: float | None
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
        label = plane.upright(round(plane.across(marked), 1), level + 4, f"eps {plain(marked)}")
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
