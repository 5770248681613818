"""Draw the figures of the documentation from the newest records:

python -m benchmarks.figures
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.networks import ROOT
from benchmarks.record import Cells, newest

FOLDER = ROOT / "docs" / "concepts" / "figures"
_STYLE: dict[Any, Any] = {  # of matplotlib's settings
    "svg.fonttype": "none", "svg.hashsalt": "holdfast", "font.family": "sans-serif", "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11, "legend.frameon": False,
}  # fmt: skip
_RED, _BLUE, _GREY, _GREEN, _BROWN, _VIOLET = "#b3261e", "#1f6feb", "#6e7781", "#1a7f37", "#9a6700", "#8250df"
_COLLECTIONS = {"trajectory": ("one run", _RED), "basins": ("eight runs", _BLUE)}


def places(record: Cells) -> Figure:
    """Plot the sets of a collection and generated sets in the two directions in which the sets differ most."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
    for panel, (source, (name, _)) in zip(panels, _COLLECTIONS.items(), strict=True):
        coordinates = record["detail"][f"{source}, in the two widest directions"]["measured"]
        colours: dict[str, Any] = {"c": coordinates["runs"], "cmap": "tab10", "vmax": 9, "alpha": 0.5}
        panel.scatter(*_columns(coordinates["originals"]), s=60, label="originals", **colours)
        for let_in, marker, label in (
            (True, "x", "generated, admitted"),
            (False, "+", "generated, refused"),
        ):
            some = [
                at
                for at, fine in zip(coordinates["draws"], coordinates["let in"], strict=True)
                if fine is let_in
            ]
            if some:
                colour = "#24292f" if let_in else _RED
                panel.scatter(*_columns(some), s=16, c=colour, marker=marker, linewidths=0.7, label=label)
        share = round(100 * coordinates["variance along them"])
        panel.set(
            title=f"{name}: {share} % of the variance", xlabel="first direction", ylabel="second direction"
        )
        panel.set_aspect("equal", "datalim")
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def regularisers(record: Cells) -> Figure:
    """Plot accuracy, distance and transfer of generated sets for each regulariser."""
    titles = {
        "let in, %": "within a point, %",
        "median accuracy, %": "median accuracy, %",
        "L1 to nearest": "L1 to the nearest set",
        "transfer": "transfer between sets",
    }
    figure, panels = plt.subplots(1, len(titles), figsize=(12, 3.6), layout="constrained")
    for panel, (key, title) in zip(panels, titles.items(), strict=True):
        for source, (name, colour) in _COLLECTIONS.items():
            rows = [row for row in record["table"] if row["collection"] == source]
            points = [(k, row[key]) for k, row in enumerate(rows) if row[key] != ""]
            panel.plot(*_columns(points), "o", color=colour, label=name)
        panel.set(title=title, xlim=(-0.5, len(rows) - 0.5))
        panel.set_xticks(range(len(rows)), _REGULARISERS, rotation=60, ha="right", rotation_mode="anchor")
        if key == "L1 to nearest":
            panel.set_yscale("log")
        else:
            panel.set_ylim(bottom=0)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


_REGULARISERS = ("off", "printed, λ 1", "away, λ 1", "hinge, less", "hinge, more")


def lines(record: Cells) -> Figure:
    """Plot white-box success after each rotation of a chain, and of its controls."""
    figure, panel = plt.subplots(figsize=(7.5, 4), layout="constrained")
    panel = _only(panel)
    rows = [row for row in record["table"] if "after 1" in row]
    for row, colour in zip(rows, (_BLUE, _VIOLET, _GREY, _GREY, _BROWN, _GREEN, _RED, _RED), strict=True):
        values = [row["first"], *(row[f"after {k}"] for k in range(1, 5))]
        dashed = "--" if "1.25" in row["what"] else ":" if "examples" in row["what"] else "-"
        panel.plot(range(5), values, dashed, marker="o", markersize=3, color=colour, label=row["what"])
    panel.set(xlabel="rotations", ylabel="white-box success", ylim=(0, None), xticks=range(5))
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def _only(panel: object) -> Axes:
    assert isinstance(panel, Axes)
    return panel


def _columns(points: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    return [point[0] for point in points], [point[1] for point in points]


FIGURES: dict[str, tuple[str, Callable[[Cells], Figure]]] = {
    "rotation-places": ("draws", places),
    "rotation-regularisers": ("draws", regularisers),
    "rotation-lines": ("rotation-robust", lines),
}
"""Name of a figure, the row of its record, and the function that draws it."""


def main() -> None:
    """Write each figure to `docs/concepts/figures/NAME.svg`, with the date of its record."""
    FOLDER.mkdir(exist_ok=True)
    for name, (row, draw) in FIGURES.items():
        record = newest(row)
        with mpl.rc_context(_STYLE):
            figure = draw(record)
            metadata: dict[str, str | None] = {
                "Date": None,
                "Description": f"{record['command']}, {record['made']}",
            }
            figure.savefig(FOLDER / f"{name}.svg", metadata=metadata)
        plt.close(figure)
        at = Path(FOLDER / f"{name}.svg")
        print(at.relative_to(ROOT))


if __name__ == "__main__":
    main()
