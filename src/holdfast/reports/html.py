"""One page for people: self-contained, no script, no request to anywhere, readable in print and in the dark."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from holdfast.core.names import printable
from holdfast.reports import attacks, charts, notes, numbers, rotation, words
from holdfast.reports.terminal import FIRST, STATE_SIGNS

if TYPE_CHECKING:
    from jinja2 import Environment

MOST_CLASS_ROWS = 20
"""Classes drawn, the worst of them where there are more."""
MOST_EXAMPLES = 6
"""Examples that a page shows at once, the others unfold; a notebook shows no more, for its file keeps the pictures."""
MOST_CURVE_ROWS = 30
"""Rows of the table under a curve."""
SIZES = (("wide", 720.0, 300.0), ("narrow", 340.0, 260.0))
"""Each curve is drawn for a desk and for a phone, so that its letters keep their size; a style rule shows one."""


def page(summary: Mapping[str, Any]) -> str:
    """The report of one run, made from its summary alone."""
    threat = summary["threat"]
    return render(
        "report.html.j2",
        s=summary,
        verdict_sign=words.VERDICTS[summary["verdict"]][0],
        verdict_word=words.VERDICTS[summary["verdict"]][1],
        title=words.capitalized(words.title(summary)),
        main=words.main_metric(summary),
        metrics=words.told_metrics(summary),
        shown_examples=MOST_EXAMPLES,
        open_doubts=words.open_doubts(summary),
        hardest=_hardest(summary["attacks"]),
        by_distance=attacks.by_distance(summary),
        classes=_worst(summary["per_class"]),
        eps_charts=_charts(summary["curves"]["eps"], "eps", mark=numbers.number(threat["eps"])),
        query_charts=_charts(summary["curves"]["queries"], "queries", logarithmic=True),
        remarks=notes.remarks(summary),
        details=notes.details(summary),
        attacker_names=rotation.NAMES,
        raised=[doubt for doubt in summary["doubts"] if doubt["state"] == "raised"],
        calm=words.grouped_doubts(sorted(summary["doubts"], key=lambda doubt: _STATES.index(doubt["state"]))),
    )


def fragment(summary: Mapping[str, Any], asked: Sequence[Mapping[str, Any]] = ()) -> str:
    """The verdict, gates, attacks, main metrics, doubts and a few examples, as a notebook shows them in its own style.

    `asked` are gates that were asked after the run.
    """
    sign, word = words.VERDICTS[summary["verdict"]]
    distance = attacks.by_distance(summary)
    headings = attacks.SMALLEST if distance else attacks.STANDING
    rows = [attacks.row(attack, distance=distance) for attack in summary["attacks"]]
    metrics = [
        (words.label(name), words.shown(name, e["value"]), words.interval(name, e), numbers.count(e["n"]))
        for name, e in words.told_metrics(summary).items()
        if name in FIRST
    ]
    return filled(
        "notebook.html.j2",
        gates=[*summary["gates"], *asked],
        examples=summary["examples"][:MOST_EXAMPLES],
        s=summary,
        sign=sign,
        word=word,
        title=attacks.title(summary),
        headings=headings,
        rows=[[cells[heading] for heading in headings] for cells in rows],
        metrics=metrics,
        notes=notes.spoken(summary),
    )


_STATES = ("raised", "answered", "not measured", "clear", "not applicable")


def render(template: str, **content: Any) -> str:
    """Fill a template; the style sheet is allowed by its hash, so that no other style and no script can run."""
    from markupsafe import Markup

    style = _read("report.css")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return _environment().get_template(template).render(style=Markup(style), style_digest=digest, **content)  # noqa: S704


def filled(template: str, **content: Any) -> str:
    """Fill a template that brings no style, every string of a user escaped."""
    return _environment().get_template(template).render(**content)


def _read(name: str) -> str:
    return resources.files("holdfast.reports").joinpath("templates", name).read_text(encoding="utf-8")


@cache
def _environment() -> "Environment":
    from jinja2 import DictLoader, Environment, StrictUndefined

    pages = ("report", "comparison", "notebook", "notebook-comparison", "parts")
    names = [f"{page}.html.j2" for page in pages]
    environment = Environment(
        loader=DictLoader({name: _read(name) for name in names}),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": numbers.percent,
        "plain": numbers.plain,
        "count": numbers.count,
        "duration": numbers.seconds,
        "number": numbers.number,
        "picture": _picture,
        "label": words.label,
        "definition": words.definition,
        "asked": words.asked,
        "every_nth": _every_nth,
        "capitalized": words.capitalized,
        "sentences": words.sentences,
    }
    environment.globals |= {
        "shown": words.shown,
        "interval": words.interval,
        "is_share": words.is_share,
        "amount": words.amount,
        "left_out": attacks.left_out,
        "verdicts": words.VERDICTS,
        "signs": STATE_SIGNS,
    }
    return environment


def _shown(value: Any) -> Any:
    """Strings of users without control characters and marks that turn the direction of writing; ours as they are."""
    return printable(value) if type(value) is str else value


def _picture(address: str) -> str:
    """The address of a picture; anything but an embedded PNG is refused, for a summary may come from elsewhere."""
    return address if address.startswith("data:image/png;base64,") else ""


def _every_nth(rows: list[Any]) -> list[Any]:
    """At most about thirty rows, evenly spread, the last one kept."""
    stride = max(1, -(-len(rows) // MOST_CURVE_ROWS))
    return rows[::stride] + ([rows[-1]] if rows and (len(rows) - 1) % stride else [])


def _hardest(attacks: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The attack that broke most."""
    return max(attacks, key=lambda attack: attack["standing_before"] - attack["standing_after"], default=None)


def _worst(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The classes to draw, in their order."""
    worst = sorted(rows, key=lambda row: numbers.number(row["robust_accuracy"]["value"]))[:MOST_CLASS_ROWS]
    return sorted(worst, key=lambda row: int(row["class"]))


def _charts(
    points: list[dict[str, Any]], axis: str, *, logarithmic: bool = False, mark: float | None = None
) -> list[tuple[str, charts.Staircase]]:
    drawn = [
        (name, charts.staircase(points, axis, width=width, height=height, logarithmic=logarithmic, mark=mark))
        for name, width, height in SIZES
    ]
    return [(name, chart) for name, chart in drawn if chart is not None]
