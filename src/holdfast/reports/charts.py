"""Coordinates of the charts in reports: SVG paths and ticks, which are computed from numbers. Colours and text from
users are not included.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.reports.numbers import count_text, number, plain

_HALF = 0.5
_FEW = 200
"""Below this end, a logarithmic axis has ticks at 2 and 5 between its powers of ten."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 14.0, 12.0, 44.0


@dataclass(frozen=True)
class Tick:
    """A tick on an axis of a chart, with its coordinate and its label."""

    at: float
    text: str


@dataclass(frozen=True)
class Staircase:
    """The coordinates of a chart of accuracy as a decreasing step function, with its confidence band and its axes."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    line: str
    band: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    mark: float | None
    """horizontal coordinate of the eps of the threat model; None if no line is drawn there"""
    mark_text: float
    """vertical coordinate of the label of the mark, away from the curve"""


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


def staircase(
    points: Sequence[Mapping[str, Any]],
    axis: str,
    *,
    width: float,
    height: float,
    logarithmic: bool = False,
    mark: float | None = None,
) -> Staircase | None:
    """Return the coordinates of a chart of accuracy, for example as a function of eps, or None if there are no points
    to draw.

    `axis` is the key of the values on the x axis, and `mark` the value at which a vertical line is drawn.
    """
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
    return Staircase(
        width=width,
        height=height,
        left=_LEFT,
        right=plane.right,
        top=_TOP,
        bottom=plane.bottom,
        line=_steps(starts, ends, levels["value"]),
        band=_steps(starts, ends, levels["high"]) + _back(starts, ends, levels["low"]),
        x_ticks=tuple(Tick(round(plane.across(value), 1), text) for value, text in plane.axis.ticks),
        y_ticks=tuple(Tick(round(plane.level(k / 4), 1), f"{25 * k} %") for k in range(5)),
        mark=None if marked is None else round(plane.across(marked), 1),
        mark_text=plane.level(0.06)
        if marked is not None and _at(points, axis, marked) > _HALF
        else plane.level(0.94),
    )


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


@dataclass(frozen=True)
class Rates:
    """The coordinates of lines on two logarithmic axes from the same lowest value to 1."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    lines: tuple[tuple[str, str], ...]
    """name and SVG path of each line"""
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


def rates(lines: Sequence[Mapping[str, Any]], least: float, *, width: float, height: float) -> Rates:
    """Return the coordinates of lines on two logarithmic axes. Values below `least` are drawn at `least`."""
    right, bottom, decades = width - _RIGHT, height - _BOTTOM, max(-math.log10(least), 1.0)

    def place(value: float) -> float:
        return 1 + math.log10(max(value, least)) / decades

    def across(value: float) -> float:
        return _LEFT + (right - _LEFT) * place(value)

    def upward(value: float) -> float:
        return bottom - (bottom - _TOP) * place(value)

    paths = [
        (str(line["name"]), "M" + "L".join(f"{across(x):.1f},{upward(y):.1f}" for x, y in line["points"]))
        for line in lines
        if line["points"]
    ]
    ticks = [10.0**-power for power in range(math.floor(decades + 1e-9) + 1)]
    return Rates(
        width,
        height,
        _LEFT,
        right,
        _TOP,
        bottom,
        tuple(paths),
        tuple(Tick(round(across(value), 1), f"{value:g}") for value in ticks),
        tuple(Tick(round(upward(value), 1), f"{value:g}") for value in ticks),
    )


@dataclass(frozen=True)
class Bands:
    """The coordinates of a chart of two bounds for each of several examples, as two step functions, with its axes."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    proved: str
    """area below the lower bounds"""
    between: str
    """area between both bounds"""
    upper: str
    """line of the upper bounds, interrupted where they are infinite"""
    y_ticks: tuple[Tick, ...]
    mark: float | None
    """vertical coordinate of the eps of the threat model; None if it is infinite"""


def bands(
    bounds: Sequence[tuple[float, float]], *, width: float, height: float, mark: float | None = None
) -> Bands | None:
    """Return the coordinates of a chart of lower and upper bounds, in the order of the lower bounds.

    The result is None if there is nothing to draw.

    An infinite upper bound ends at the top of the chart.
    """
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
    # an upper bound that no attack found has no line
    lines = [
        f"M{start:.1f},{y:.1f}H{end:.1f}"
        for start, end, y, (_, value) in zip(starts, ends, high, ordered, strict=True)
        if math.isfinite(value)
    ]
    return Bands(
        width=width,
        height=height,
        left=_LEFT,
        right=right,
        top=_TOP,
        bottom=bottom,
        proved=_steps(starts, ends, low) + _back(starts, ends, floor),
        between=_steps(starts, ends, high) + _back(starts, ends, low),
        upper="".join(lines),
        y_ticks=tuple(
            Tick(round(_level(k * step, top, bottom), 1), plain(k * step))
            for k in range(math.floor(top / step + 1e-9) + 1)
        ),
        mark=round(_level(marked, top, bottom), 1) if marked else None,
    )


def _level(value: float, top: float, bottom: float) -> float:
    """The vertical coordinate of a value, at most that of the top of the chart."""
    return bottom - (bottom - _TOP) * min(value / top, 1.0)
