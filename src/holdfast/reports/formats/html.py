"""Reports as HTML: a self-contained page without scripts, for screen, dark mode and print, and HTML for notebooks."""

import base64
import hashlib
from collections.abc import Callable
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, TextIO, get_args

from holdfast.core.names import line
from holdfast.reports import words
from holdfast.reports.tree import Block, Chart, Report, shown_in, text_of

if TYPE_CHECKING:
    from jinja2 import Environment


def render(report: Report, file: TextIO) -> None:
    """Write a report as an HTML page. A content security policy with the hash of its style sheet forbids other styles
    and scripts.
    """
    from markupsafe import Markup

    style = template_text("report.css")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    # the style sheet is a file of this package
    file.write(filled("report.html.j2", r=report, style=Markup(style), style_digest=digest))  # noqa: S704


def notebook(report: Report) -> str:
    """Return the main results of a report as HTML for display in a notebook, without a style sheet."""
    return filled("notebook.html.j2", r=report)


def fragment(report: Report, *, level: int = 2) -> str:
    """Return the verdict and the sections of a report as HTML without a page around them, which needs the style sheet
    of reports. `level` is the level of its first heading.
    """
    return filled("fragment.html.j2", r=report, level=level)


def svg(chart: Chart) -> str:
    """Return a chart as an SVG file of its own, with the names of its lines."""
    return filled("svg.html.j2", c=chart)


def filled(template: str, **content: Any) -> str:
    """Return HTML from a Jinja template that is filled with the given content. Strings are escaped."""
    labels: dict[str, int] = {}

    def unique(label: str) -> str:
        """The label of a region, numbered if the page has others with the same label."""
        labels[label] = labels.get(label, 0) + 1
        return label if labels[label] == 1 else f"{label}, {labels[label]}"

    return _environment().get_template(template).render(unique=unique, **content)


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
    # the type of a block, as in `b is table`
    environment.tests |= {kind.__name__.lower(): _is_a(kind) for kind in get_args(Block)}
    environment.filters |= {
        "percent": words.percent,
        "plain": words.plain,
        "count": words.count_text,
        "picture": _picture,
        "sound": _sound,
        "label": words.label,
        "capitalized": words.capitalized,
        "sentences": words.sentences,
        "cell": text_of,
    }
    environment.globals |= {
        "shown": words.shown,
        "amount": words.amount,
        "verdicts": words.VERDICTS,
        "signs": words.STATE_SIGNS,
        "in_notebook": lambda depth: shown_in("notebook", depth),
    }
    return environment


def _is_a(kind: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, kind)


def _printable_value(value: Any) -> Any:
    """Remove control characters, bidirectional marks and commands of CI systems from plain strings; other values are
    unchanged.
    """
    return line(value) if type(value) is str else value


def _picture(address: str) -> str:
    """A data URL of a PNG; other addresses are replaced by an empty string, since a summary may come from elsewhere."""
    return address if address.startswith("data:image/png;base64,") else ""


def _sound(address: str) -> str:
    """A data URL of a `.wav` file; others are replaced as those of pictures are."""
    return address if address.startswith("data:audio/wav;base64,") else ""
