"""The HTML report of a run, which is self-contained and has no scripts, for screen, dark mode and print."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from holdfast.core.names import line
from holdfast.reports import attacks, certification, detector, geometry, notes, numbers, rotation, words
from holdfast.reports.charts import Staircase, staircase
from holdfast.reports.terminal import FIRST, STATE_SIGNS

if TYPE_CHECKING:
    from jinja2 import Environment

MOST_CLASS_ROWS = 20
"""Largest number of classes in the chart. If there are more, the worst classes are shown."""
MOST_EXAMPLES = 6
"""Number of examples that a page shows before it is expanded. A notebook shows no more, since its file stores the
pictures."""
MOST_CURVE_ROWS = 30
"""Largest number of rows in the table of a curve."""
SIZES = (("wide", 720.0, 300.0), ("narrow", 340.0, 260.0))
"""Names and sizes of the two versions of each curve, for wide and for narrow screens, of which CSS shows one.

Therefore the text of a chart has the same size on all screens.
"""


def page(summary: Mapping[str, Any]) -> str:
    """Return the HTML report of one run, created from its summary."""
    threat = summary["threat"]
    sign, verdict_text = words.verdict_of(summary)
    return render(
        "report.html.j2",
        s=summary,
        verdict_sign=sign,
        verdict_word=verdict_text,
        title=words.capitalized(words.title(summary)),
        training=summary.get("training"),
        main=words.main_metric(summary),
        **metric_parts(words.shown_metrics(summary)),
        shown_examples=MOST_EXAMPLES,
        open_doubts=words.open_doubts(summary),
        passes=attacks.passes_outside(summary),
        hardest=_hardest(summary["attacks"]),
        by_distance=attacks.by_distance(summary),
        classes=_worst(summary["per_class"]),
        groups_lead=_groups_lead(summary),
        eps_charts=_charts(summary["curves"]["eps"], "eps", mark=numbers.number(threat["eps"])),
        query_charts=_charts(summary["curves"]["queries"], "queries", logarithmic=True),
        geometry=summary.get("geometry"),
        detector=detector.detector(summary),
        detector_columns=detector.COLUMNS,
        query_detector=summary.get("query_detector"),
        band_charts=geometry.band_charts(summary.get("geometry"), SIZES),
        remarks=summary["notes"],
        details=summary["details"],
        attacker_names=rotation.NAMES,
        adaptive=_adaptive(summary),
        proof=certification.certification_table(summary),
        proof_lines=certification.certification_lines(summary),
        **_doubts(summary["doubts"]),
    )


def metric_parts(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the `metrics` that a page shows first, and `more_metrics`, the others, which are in an element that
    readers open.
    """
    first = {name: estimate for name, estimate in metrics.items() if name in FIRST}
    return {
        "metrics": first,
        "more_metrics": {name: estimate for name, estimate in metrics.items() if name not in first},
    }


def _groups_lead(summary: Mapping[str, Any]) -> str:
    """The sentence above the table of the groups, if there are some."""
    if not summary.get("groups"):
        return ""
    from holdfast.reports.groups import table  # only for runs with groups

    return words.sentences(table(summary["groups"], summary["noun"]).description)


def _adaptive(summary: Mapping[str, Any]) -> list[words.TextTable]:
    """The tables of an adaptive search; none without one."""
    if not any(attack.get("search") for attack in summary["attacks"]):
        return []
    from holdfast.reports.adaptive import tables  # only for runs with adaptive attacks

    return list(tables(summary))


def _doubts(doubts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The doubts of a page: at most `_SHOWN_DOUBTS` that are always visible, raised ones first, and the others."""
    raised = [doubt for doubt in doubts if doubt["state"] == "raised"]
    calm = words.grouped_doubts(sorted(doubts, key=lambda doubt: _STATES.index(doubt["state"])))
    shown = max(_SHOWN_DOUBTS - len(raised), 0)
    return {
        "raised": raised[:_SHOWN_DOUBTS],
        "calm": calm[:shown],
        "more_raised": raised[_SHOWN_DOUBTS:],
        "more_calm": calm[shown:],
        "n_more": len(raised[_SHOWN_DOUBTS:]) + sum(map(len, calm[shown:])),
    }


def fragment(summary: Mapping[str, Any], later_gates: Sequence[Mapping[str, Any]] = ()) -> str:
    """Return the main results of a run as HTML for display in a notebook: the verdict, gates, attacks, metrics, doubts
    and a few examples.

    `later_gates` contains gates that were judged after the run.
    """
    sign, verdict_text = words.verdict_of(summary)
    distance = attacks.by_distance(summary)
    headings = attacks.SMALLEST if distance else attacks.STANDING
    rows = [attacks.row(attack, distance=distance) for attack in summary["attacks"]]
    metrics = [
        (
            words.label(name),
            words.shown(name, e["value"]),
            words.interval(name, e),
            numbers.count_text(e["n"]),
        )
        for name, e in words.shown_metrics(summary).items()
        if name in FIRST
    ]
    return filled(
        "notebook.html.j2",
        gates=[*summary["gates"], *later_gates],
        examples=summary["examples"][:MOST_EXAMPLES],
        s=summary,
        sign=sign,
        word="" if words.only_trained(summary) else verdict_text,
        proof=certification.certification_table(summary),
        proof_lines=certification.certification_lines(summary),
        title=attacks.title(summary),
        headings=headings,
        rows=[[cells[heading] for heading in headings] for cells in rows],
        metrics=metrics,
        notes=notes.shown_notes(summary),
    )


_SHOWN_DOUBTS = 5
"""Number of doubts above the pictures of a page; the others are in an element that readers open."""
_STATES = ("raised", "answered", "not measured", "clear", "not applicable")


def render(template: str, **content: Any) -> str:
    """Return an HTML page from a Jinja template that is filled with the given content and with the style sheet of
    reports.

    A content security policy with the hash of the style sheet forbids other styles and scripts.
    """
    from markupsafe import Markup

    # the hash in the policy is that of this exact text, so no filter may change it
    style = template_text("report.css")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    # the style sheet is a file of this package, so it needs no escaping
    return _environment().get_template(template).render(style=Markup(style), style_digest=digest, **content)  # noqa: S704


def filled(template: str, **content: Any) -> str:
    """Return HTML from a Jinja template that is filled with the given content, without a style sheet. Strings are
    escaped.
    """
    return _environment().get_template(template).render(**content)


def template_text(name: str) -> str:
    """Return the text of a file in the folder of templates."""
    return resources.files("holdfast.reports").joinpath("templates", name).read_text(encoding="utf-8")


@cache
def _environment() -> "Environment":
    from jinja2 import DictLoader, Environment, StrictUndefined

    folder = resources.files("holdfast.reports").joinpath("templates")
    names = sorted(file.name for file in folder.iterdir() if file.name.endswith(".html.j2"))
    environment = Environment(
        # from package resources, which need not be files
        loader=DictLoader({name: template_text(name) for name in names}),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable_value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": numbers.percent,
        "plain": numbers.plain,
        "feature_value": numbers.feature_value,
        "count": numbers.count_text,
        "duration": numbers.seconds_text,
        "number": numbers.number,
        "picture": _picture,
        "label": words.label,
        "definition": words.definition,
        "condition": words.condition_text,
        "every_nth": _every_nth,
        "capitalized": words.capitalized,
        "sentences": words.sentences,
        "down": geometry.rounded_down,
        "up": geometry.rounded_up,
    }
    environment.globals |= {
        "shown": words.shown,
        "shown_of_gate": words.shown_of_gate,
        "interval": words.interval,
        "interval_of_gate": words.interval_of_gate,
        "is_share": words.is_share,
        "amount": words.amount,
        "left_out": attacks.left_out,
        "verdicts": words.VERDICTS,
        "signs": STATE_SIGNS,
    }
    return environment


def _printable_value(value: Any) -> Any:
    """Remove control characters, bidirectional marks and commands of CI systems from plain strings; other values are
    unchanged.
    """
    return line(value) if type(value) is str else value


def _picture(address: str) -> str:
    """A data URL of a PNG; other addresses are replaced by an empty string, since a summary may come from elsewhere."""
    return address if address.startswith("data:image/png;base64,") else ""


def _every_nth(rows: list[Any]) -> list[Any]:
    """About thirty rows at most, evenly spaced, including the last one."""
    stride = max(1, -(-len(rows) // MOST_CURVE_ROWS))
    return rows[::stride] + ([rows[-1]] if rows and (len(rows) - 1) % stride else [])


def _hardest(attacks: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The attack that broke most examples."""
    return max(
        attacks, key=lambda attack: attack["surviving_before"] - attack["surviving_after"], default=None
    )


def _worst(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The classes in the chart, in their order."""
    worst = sorted(rows, key=lambda row: numbers.number(row["robust_accuracy"]["value"]))[:MOST_CLASS_ROWS]
    return sorted(worst, key=lambda row: int(row["class"]))


def _charts(
    points: list[dict[str, Any]], axis: str, *, logarithmic: bool = False, mark: float | None = None
) -> list[tuple[str, Staircase]]:
    drawn = [
        (name, staircase(points, axis, width=width, height=height, logarithmic=logarithmic, mark=mark))
        for name, width, height in SIZES
    ]
    return [(name, chart) for name, chart in drawn if chart is not None]
