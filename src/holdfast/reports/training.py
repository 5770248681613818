"""The training curve as an SVG: held-out accuracy, clean and under attack, for each epoch."""

from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.reports.charts import Axis, Plane

_WIDTH, _HEIGHT = 640.0, 320.0
_LINES = (
    ("clean", "clean, held out", "#1f6feb", ""),
    ("robust", "attacked, held out", "#b3261e", ""),
    ("accuracy", "training examples", "#6e7781", ' stroke-dasharray="4 3"'),
)
_STYLE = "text{font:12px system-ui,sans-serif;fill:#24292f} path,line{fill:none}"


def curve_svg(points: Sequence[Mapping[str, Any]]) -> str:
    """An SVG of the curve; each point has `epoch`, `clean`, `robust` and `accuracy`. The best point is marked."""
    plane = Plane(_WIDTH, _HEIGHT, Axis(float(max(point["epoch"] for point in points)), logarithmic=False))
    parts = [f'<rect width="{_WIDTH:g}" height="{_HEIGHT:g}" fill="#fff"/>']
    for k in range(5):
        at = plane.level(k / 4)
        parts += [
            f'<line x1="{plane.across(0):.1f}" x2="{plane.right:.1f}" y1="{at:.1f}" y2="{at:.1f}" stroke="#d0d7de"/>',
            f'<text x="{plane.across(0) - 6:.1f}" y="{at + 4:.1f}" text-anchor="end">{25 * k} %</text>',
        ]
    for value, text in plane.axis.ticks:
        parts += [_text(plane.across(value), plane.bottom + 18, text)]
    parts += [_text((plane.across(0) + plane.right) / 2, plane.bottom + 36, "epochs")]
    parts += [_line(points, plane, key, colour, dashes) for key, _, colour, dashes in _LINES]
    best = max(points, key=lambda point: (point["robust"], point["clean"]))
    x, y = plane.across(best["epoch"]), plane.level(best["robust"])
    parts += [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#b3261e"><title>the checkpoint</title></circle>'
    ]
    for k, (_, name, colour, _) in enumerate(_LINES):
        at = plane.bottom - 14 - 18 * (len(_LINES) - 1 - k)
        parts += [
            f'<rect x="{plane.right - 150:.1f}" y="{at - 9:.1f}" width="12" height="4" fill="{colour}"/>',
            f'<text x="{plane.right - 132:.1f}" y="{at:.1f}">{name}</text>',
        ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img"'
    about = "<title>accuracy over the epochs of the training</title>"
    return "\n".join([f"{head}>", about, f"<style>{_STYLE}</style>", *parts, "</svg>"]) + "\n"


def _line(points: Sequence[Mapping[str, Any]], plane: Plane, key: str, colour: str, dashes: str) -> str:
    """A line through one quantity over the epochs; a dot if there is only one epoch."""
    places = [(plane.across(point["epoch"]), plane.level(point[key])) for point in points]
    if len(places) == 1:
        return f'<circle cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3" fill="{colour}"/>'
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    return f'<path d="{path}" stroke="{colour}" stroke-width="2"{dashes}/>'


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{text}</text>'
