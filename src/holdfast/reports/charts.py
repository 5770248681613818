"""Coordinates of the charts in reports: SVG paths and ticks, which are computed from numbers. Colours and text from
users are not included.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from holdfast.reports.numbers import count_text, number, plain
from holdfast.reports.tree import Drawing, Mark, Path, Tick

_HALF = 0.5
_FEW = 200
"""Below this end, a logarithmic axis has ticks at 2 and 5 between its powers of ten."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 14.0, 12.0, 44.0


@dataclass(frozen=True)
class Axis:
    """The x axis of a chart, as a function that maps values to the range from 0 to 1."""

    top: float
    logarithmic: bool

    def __call__(self, value: float) -> float:
        if self.logarithmic:
            return math.log10(1 + value) / math.log10(1 + self.top)
        return value / self.top

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Values on the axis of a chart at which ticks are drawn, with their labels."""
        if self.logarithmic:
            factors = (1, 2, 5) if self.top < _FEW else (1,)
            powers = range(math.floor(math.log10(max(self.top, 1))) + 1)
            multiples = [factor * 10.0**power for power in powers for factor in factors]
            return [(value, count_text(value)) for value in (0.0, *multiples) if value <= self.top]
        step = round_step(self.top)
        # the tolerance keeps the last tick if the division rounds down
        return [(k * step, plain(k * step)) for k in range(math.floor(self.top / step + 1e-9) + 1)]


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
    """The coordinate system of a chart, which maps values of the x axis and fractions on the y axis to
    SVG coordinates.
    """

    width: float
    height: float
    axis: Axis

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
        return _LEFT + (self.right - _LEFT) * self.axis(value)

    def level(self, share: float) -> float:
        """Return the vertical SVG coordinate of a fraction on the y axis of the chart."""
        return self.bottom - (self.bottom - _TOP) * share


SIZES = (("wide", 720.0, 300.0), ("narrow", 340.0, 260.0))
"""Names and sizes of the two versions of each chart, for wide and for narrow screens, of which CSS shows one.

Therefore the text of a chart has the same size on all screens.
"""
Drawings = list[tuple[str, Drawing]]
"""a chart at each of the sizes; empty if there is nothing to draw"""


def _drawn(draw: Callable[[float, float], Drawing | None]) -> Drawings:
    drawings = [(name, draw(width, height)) for name, width, height in SIZES]
    return [(name, drawing) for name, drawing in drawings if drawing is not None]


def staircases(
    points: Sequence[Mapping[str, Any]], axis: str, *, logarithmic: bool = False, mark: float | None = None
) -> Drawings:
    """Return a chart of accuracy, for example as a function of eps, with its confidence band.

    `axis` is the key of the values on the x axis, and `mark` the value of eps at which a vertical line is drawn.
    """
    return _drawn(partial(staircase, points, axis, logarithmic=logarithmic, mark=mark))


def staircase(
    points: Sequence[Mapping[str, Any]],
    axis: str,
    width: float,
    height: float,
    *,
    logarithmic: bool = False,
    mark: float | None = None,
) -> Drawing | None:
    """Return the chart of `staircases` at one size, or None if there are no points to draw."""
    if not points:
        return None
    xs = [number(point[axis]) for point in points]
    marked = mark if mark is not None and math.isfinite(mark) and mark > 0 else None
    top = max(*xs, marked or 0.0) * (1.0 if logarithmic else 1.04)
    if top <= 0:
        return None
    plane = Plane(width, height, Axis(max(top, 10.0) if logarithmic else top, logarithmic))
    starts = [plane.across(x) for x in xs]
    ends = [*starts[1:], plane.right]
    levels = {key: [plane.level(number(point[key])) for point in points] for key in ("value", "low", "high")}
    band = _steps(starts, ends, levels["high"]) + _back(starts, ends, levels["low"])
    x_ticks = (Tick(round(plane.across(value), 1), text) for value, text in plane.axis.ticks)
    line = Path("line", _steps(starts, ends, levels["value"]))
    label = None
    if marked is not None:
        # away from the curve, and inside the chart
        level = plane.level(0.06) if _at(points, axis, marked) > _HALF else plane.level(0.94)
        label = _upright(plane, round(plane.across(marked), 1), level + 4, f"eps {plain(marked)}")
    return _chart(width, height, (Path("range", band), line), x_ticks, _share_ticks(plane), label)


def _upright(plane: "Plane", x: float, text_y: float, text: str) -> Mark:
    """A vertical line with its label at the side where it fits."""
    flip = x > plane.right - 120
    return Mark(x, _TOP, x, plane.bottom, text, x - 6 if flip else x + 6, text_y, "end" if flip else "start")


def _chart(
    width: float,
    height: float,
    paths: tuple[Path, ...],
    x_ticks: Iterable[Tick],
    y_ticks: Iterable[Tick],
    mark: Mark | None = None,
) -> Drawing:
    right, bottom = width - _RIGHT, height - _BOTTOM
    return Drawing(width, height, _LEFT, right, _TOP, bottom, paths, tuple(x_ticks), tuple(y_ticks), mark)


def _at(points: Sequence[Mapping[str, Any]], axis: str, x: float) -> float:
    """The fraction of a curve at a value of the horizontal axis."""
    return next((number(point["value"]) for point in reversed(points) if number(point[axis]) <= x), 1.0)


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
    axis = Axis(float(max(point["epoch"] for point in points)), logarithmic=False)

    def draw(width: float, height: float) -> Drawing:
        plane = Plane(width, height, axis)
        paths = tuple(
            Path(
                f"line line-{k}",
                "M"
                + "L".join(
                    f"{plane.across(point['epoch']):.1f},{plane.level(point[key]):.1f}" for point in points
                ),
                name,
            )
            for k, (key, name) in enumerate(lines, 1)
        )
        x_ticks = (Tick(round(plane.across(value), 1), text) for value, text in axis.ticks)
        mark = _upright(plane, round(plane.across(marked), 1), plane.level(0.06) + 4, "checkpoint")
        return _chart(width, height, paths, x_ticks, _share_ticks(plane), mark)

    return _drawn(draw)


def _share_ticks(plane: Plane) -> list[Tick]:
    return [Tick(round(plane.level(k / 4), 1), f"{25 * k} %") for k in range(5)]


def rates(lines: Sequence[Mapping[str, Any]], least: float) -> Drawings:
    """Return a chart of lines on two logarithmic axes. Values below `least` are drawn at `least`."""
    return _drawn(partial(_rates, lines, least))


def _rates(lines: Sequence[Mapping[str, Any]], least: float, width: float, height: float) -> Drawing:
    right, bottom, decades = width - _RIGHT, height - _BOTTOM, max(-math.log10(least), 1.0)

    def place(value: float) -> float:
        return 1 + math.log10(max(value, least)) / decades

    def across(value: float) -> float:
        return _LEFT + (right - _LEFT) * place(value)

    def upward(value: float) -> float:
        return bottom - (bottom - _TOP) * place(value)

    drawn = [line for line in lines if line["points"]]
    paths = tuple(
        Path(
            f"line line-{k}",
            "M" + "L".join(f"{across(x):.1f},{upward(y):.1f}" for x, y in line["points"]),
            str(line["name"]),
        )
        for k, line in enumerate(drawn, 1)
    )
    ticks = [10.0**-power for power in range(math.floor(decades + 1e-9) + 1)]
    x_ticks = (Tick(round(across(value), 1), f"{value:g}") for value in ticks)
    y_ticks = (Tick(round(upward(value), 1), f"{value:g}") for value in ticks)
    return _chart(width, height, paths, x_ticks, y_ticks)


def bands(bounds: Sequence[tuple[float, float]], mark: float | None = None) -> Drawings:
    """Return a chart of lower and upper bounds, in the order of the lower bounds: the area below the lower bounds, that
    between both, and the line of the upper bounds.

    An infinite upper bound ends at the top of the chart and has no line.
    """
    return _drawn(partial(_bands, bounds, mark))


def _bands(
    bounds: Sequence[tuple[float, float]], mark: float | None, width: float, height: float
) -> Drawing | None:
    ordered = sorted(bounds)
    marked = mark if mark is not None and math.isfinite(mark) and mark > 0 else 0.0
    finite = [value for pair in ordered for value in pair if math.isfinite(value)]
    top = max([*finite, marked], default=0.0) * 1.08
    if not ordered or top <= 0:
        return None
    step = round_step(top, 5)
    right, bottom = width - _RIGHT, height - _BOTTOM
    edges = [_LEFT + (right - _LEFT) * place / len(ordered) for place in range(len(ordered) + 1)]
    starts, ends = edges[:-1], edges[1:]
    low = [_level(value, top, bottom) for value, _ in ordered]
    high = [_level(value, top, bottom) for _, value in ordered]
    floor = [bottom] * len(ordered)
    upper = "".join(
        f"M{start:.1f},{y:.1f}H{end:.1f}"
        for start, end, y, (_, value) in zip(starts, ends, high, ordered, strict=True)
        if math.isfinite(value)
    )
    paths = (
        Path("between", _steps(starts, ends, high) + _back(starts, ends, low)),
        Path("proved", _steps(starts, ends, low) + _back(starts, ends, floor)),
        Path("upper", upper),
    )
    values = [k * step for k in range(math.floor(top / step + 1e-9) + 1)]
    y_ticks = (Tick(round(_level(value, top, bottom), 1), plain(value)) for value in values)
    level = round(_level(marked, top, bottom), 1)
    label = Mark(_LEFT, level, right, level, f"eps {plain(marked)}", right - 4, level - 6, "end")
    return _chart(width, height, paths, (), y_ticks, label if marked else None)


def _level(value: float, top: float, bottom: float) -> float:
    """The vertical coordinate of a value, at most that of the top of the chart."""
    return bottom - (bottom - _TOP) * min(value / top, 1.0)
