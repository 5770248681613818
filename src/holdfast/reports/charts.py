"""Geometry of the page's drawings: numbers in, SVG paths and ticks out; no colours, and no text of users."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.reports.numbers import count, number, plain

_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 14.0, 12.0, 44.0


@dataclass(frozen=True)
class Tick:
    """A mark on an axis."""

    at: float
    text: str


@dataclass(frozen=True)
class Staircase:
    """An accuracy that falls step by step, its band, and the axes around it, in the units of the view box."""

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
    """where the threat's own eps stands"""


@dataclass(frozen=True)
class Axis:
    """Where a value of the x axis stands, between 0 and 1."""

    top: float
    logarithmic: bool

    def __call__(self, value: float) -> float:
        if self.logarithmic:
            return math.log10(1 + value) / math.log10(1 + self.top)
        return value / self.top

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Round values and how they are written."""
        if self.logarithmic:
            powers = [10.0**power for power in range(math.floor(math.log10(max(self.top, 1))) + 1)]
            return [(value, count(value)) for value in (0.0, *powers)]
        step = round_step(self.top)
        return [(k * step, plain(k * step)) for k in range(math.floor(self.top / step + 1e-9) + 1)]


def round_step(top: float, most: int = 6) -> float:
    """The smallest 1, 2 or 5 times a power of ten that cuts 0..top into at most `most` parts."""
    raw = top / most
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))


def staircase(
    points: Sequence[Mapping[str, Any]],
    axis: str,
    *,
    width: float,
    height: float,
    logarithmic: bool = False,
    mark: float | None = None,
) -> Staircase | None:
    """The curve of a summary, drawn to a size; None where there is nothing to draw."""
    if not points:
        return None
    xs = [number(point[axis]) for point in points]
    marked = mark if mark is not None and math.isfinite(mark) and mark > 0 else None
    top = max(*xs, marked or 0.0) * (1.0 if logarithmic else 1.04)
    if top <= 0:
        return None
    scale = Axis(max(top, 10.0) if logarithmic else top, logarithmic)
    left, right, floor = _LEFT, width - _RIGHT, height - _BOTTOM

    def place(x: float) -> float:
        return left + (right - left) * scale(x)

    def level(y: float) -> float:
        return floor - (floor - _TOP) * y

    across = [place(x) for x in xs]
    rise = {key: [level(number(point[key])) for point in points] for key in ("value", "low", "high")}
    ends = [*across[1:], right]
    back = "".join(
        f"L{end:.1f},{y:.1f}L{start:.1f},{y:.1f}"
        for start, end, y in reversed(list(zip(across, ends, rise["low"], strict=True)))
    )
    return Staircase(
        width=width,
        height=height,
        left=left,
        right=right,
        top=_TOP,
        bottom=floor,
        line=_steps(across, ends, rise["value"]),
        band=_steps(across, ends, rise["high"]) + back + "Z",
        x_ticks=tuple(Tick(round(place(value), 1), text) for value, text in scale.ticks),
        y_ticks=tuple(
            Tick(round(level(share), 1), f"{100 * share:.0f} %") for share in (0, 0.25, 0.5, 0.75, 1)
        ),
        mark=None if marked is None else round(place(marked), 1),
    )


def _steps(starts: Sequence[float], ends: Sequence[float], levels: Sequence[float]) -> str:
    """A path that holds each level until the next one begins."""
    first = f"M{starts[0]:.1f},{levels[0]:.1f}H{ends[0]:.1f}"
    return first + "".join(f"V{y:.1f}H{end:.1f}" for y, end in zip(levels[1:], ends[1:], strict=True))
