"""The trend of a metric over the runs of one model."""

from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.core.estimate import Estimate
from holdfast.reports.words import label, shown
from holdfast.viewer.shelf import Item

WIDTH, HEIGHT = 720, 220
_EDGE = 10
_LEAST_SPAN = 1e-9  # of values that are all equal


@dataclass(frozen=True)
class Point:
    """A run in a chart: `item` and `estimate`, and its coordinates `x`, `y`, and `low` and `high` of the interval."""

    item: Item
    estimate: Estimate
    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Trend:
    """The values of a metric over the runs that are comparable: one model, one data set, one threat and suite."""

    title: str
    """the finding, as a sentence"""
    alternative: str
    """the chart in words"""
    about: str
    """data, threat and suite of the runs"""
    points: tuple[Point, ...]
    line: str
    """path of the line through the values"""
    top: str
    """largest value of the vertical axis, as text"""
    bottom: str
    """smallest value of the vertical axis, as text"""


def trends(items: Sequence[Item], metric: str) -> list[Trend]:
    """Return the trends of a metric over runs of one model, the longest first. Runs on other data, under other threats,
    of other verbs and with other defences in front of the model are not comparable, and have a trend of their own.
    """
    groups: dict[tuple[str, ...], list[tuple[Item, Estimate]]] = {}
    for item in sorted(items, key=lambda each: (each.entry.created if each.entry else "", each.name)):
        value, entry = item.value(metric), item.entry
        if value is not None and entry is not None and not item.fault:
            group = (entry.data, entry.threat, entry.suite, entry.verb, entry.defence)
            groups.setdefault(group, []).append((item, value))
    return sorted(
        (_trend(group, runs, metric) for group, runs in groups.items()), key=lambda t: -len(t.points)
    )


def _trend(group: tuple[str, ...], runs: Sequence[tuple[Item, Estimate]], metric: str) -> Trend:
    about = ", ".join(part for part in group if part)
    # an infinite end of an interval is drawn at the value
    ends = [(max(e.low, min(e.value, 0.0)), min(e.high, max(e.value, 1.0))) for _, e in runs]
    least, most = min(low for low, _ in ends), max(high for _, high in ends)
    span = max(most - least, _LEAST_SPAN)
    step = (WIDTH - 2 * _EDGE) / max(len(runs) - 1, 1)

    def level(value: float) -> float:
        return round(_EDGE + (HEIGHT - 2 * _EDGE) * (most - value) / span, 1)

    points = tuple(
        Point(item, value, round(_EDGE + step * place, 1), level(value.value), level(low), level(high))
        for place, ((item, value), (low, high)) in enumerate(zip(runs, ends, strict=True))
    )
    return Trend(
        _finding(runs, metric),
        f"{label(metric)} of {len(runs)} runs ({about}), oldest first: "
        + ", ".join(shown(metric, value.value) for _, value in runs[:20])
        + (f" and {len(runs) - 20} more" if len(runs) > 20 else ""),
        about,
        points,
        "M" + "L".join(f"{point.x},{point.y}" for point in points),
        shown(metric, most),
        shown(metric, least),
    )


def _finding(runs: Sequence[tuple[Item, Estimate]], metric: str) -> str:
    """The change from the first to the last run, if their intervals do not overlap."""
    first, last = runs[0][1], runs[-1][1]
    name, values = label(metric), (shown(metric, first.value), shown(metric, last.value))
    if len(runs) == 1:
        return f"One run: {name} {values[1]}"
    if first.high < last.low:
        return f"{name} rose from {values[0]} to {values[1]} over {len(runs)} runs"
    if last.high < first.low:
        return f"{name} fell from {values[0]} to {values[1]} over {len(runs)} runs"
    return (
        f"No difference of {name} is shown between the first ({values[0]}) and the last ({values[1]}) of {len(runs)} "
        "runs: their intervals overlap"
    )


def trend_csv(found: Sequence[Trend], metric: str) -> list[list[str | float | int]]:
    """Return the numbers of trends as rows of a table, with a heading."""
    rows: list[list[str | float | int]] = [["runs", "run", "created", "metric", "value", "low", "high", "n"]]
    for trend in found:
        for point in trend.points:
            created = point.item.entry.created if point.item.entry else ""
            e = point.estimate
            rows.append([trend.about, point.item.name, created, metric, e.value, e.low, e.high, e.n])
    return rows
