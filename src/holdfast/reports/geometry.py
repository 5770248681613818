"""The part of a report about the geometry of the decision boundary: distances, Lipschitz constants and slices."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from holdfast.core.evidence import Table as StoredTable
from holdfast.reports import tree
from holdfast.reports.charts import bands
from holdfast.reports.curves import class_name
from holdfast.reports.gallery import png
from holdfast.reports.numbers import NOT_A_NUMBER_WORDS, number, plain, strict

Json = dict[str, Any]

PALETTE = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#d55e00", "#0072b2", "#5a3d2b")
"""Colours of the classes of a slice, beginning with the label: those of Okabe & Ito, "Color Universal Design", 2008,
which readers with colour blindness distinguish, and a brown. Further classes are black."""
_FURTHER, _PALE = "#000000", 0.45
KINDS = {
    "slice_attacks": "plane of two attacks",
    "slice_random": "plane of an attack and a random direction",
}
"""Columns of slices, with the descriptions of their planes."""


def geometry_results(
    table: StoredTable, classes: Sequence[str], *, norm: str, unit: str, method: str
) -> Json:
    """Return the geometry of the decision boundary for the summary of a run.

    `norm` is the name of the norm of the threat, such as `Linf`; `unit` describes an example, such as `image`, and
    `method` is the name of the prover.
    """
    columns = table.columns
    return {
        "norm": norm,
        "unit": unit,
        "method": method,
        "proved": not bool(columns["lower"].isnan().any()),
        "eps": strict(float(columns["radius"].amax())),
        "one_radius": bool((columns["radius"] == columns["radius"][0]).all()),
        "rows": [_row(columns, row, tuple(classes)) for row in range(len(table))],
    }


def _row(columns: Mapping[str, Tensor], row: int, classes: tuple[str, ...]) -> Json:
    label = int(columns["y"][row])
    numbers = ("margin", "lower", "upper", "radius", "lipschitz_below", "lipschitz_above")
    return {
        "id": int(columns["id"][row]),
        "label": class_name(label, classes),
        "prediction": class_name(int(columns["prediction"][row]), classes),
        "rival": class_name(int(columns["rival"][row]), classes),
        **{name: strict(float(columns[name][row])) for name in numbers},
        "slices": [
            {"plane": plane, **_slice(columns[name][row].long(), label, classes)}
            for name, plane in KINDS.items()
            if name in columns
        ],
    }


def _slice(grid: Tensor, label: int, classes: tuple[str, ...]) -> Json:
    """A slice as a picture, with the names of its colours in the order of their areas after the label. Colours are pale
    outside of the bounds.
    """
    predicted = torch.where(grid < 0, -1 - grid, grid)
    areas = predicted.flatten().bincount()
    order = areas.argsort(descending=True, stable=True).tolist()
    shown = [
        value for value in (label, *(k for k in order if k != label)) if value < len(areas) and areas[value]
    ]
    # the first colour is that of the label, also where it is absent
    free = (*PALETTE[1:], *[_FURTHER] * len(shown))
    others = dict(zip([value for value in shown if value != label], free, strict=False))
    colours = {value: PALETTE[0] if value == label else others[value] for value in shown}
    picture = torch.zeros(3, *grid.shape)
    for value, colour in colours.items():
        rgb = torch.tensor([int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)])[:, None, None]
        picture = torch.where(
            predicted == value, torch.where(grid < 0, rgb + _PALE * (1 - rgb), rgb), picture
        )
    return {
        "picture": png(picture),
        "side": len(grid),
        "key": [{"name": class_name(value, classes), "colour": colour} for value, colour in colours.items()],
    }


def section(results: Mapping[str, Any]) -> tree.Section:
    """Return the section of the geometry of the decision boundary: distances, Lipschitz constants and slices."""
    unit, rows = results["unit"], results["rows"]
    n = f"{len(rows)} {unit}{'' if len(rows) == 1 else 's'}"
    lead = f"the decision boundary around the first {n}. Distances are in {results['norm']}"
    table = tree.Group(
        "Distances and Lipschitz constants", (_distances(results), tree.Paragraph(_distances_note(results)))
    )
    blocks: list[tree.Block] = [*_band_chart(results), table]
    if rows[0]["slices"]:
        side = rows[0]["slices"][0]["side"]
        note = (
            f"Predicted classes on a plane through each {unit}, which is the white circle. The cross is the "
            "adversarial example of the attack. Colours are pale where a value is outside of the range of valid "
            f"inputs. These pictures show what the model predicts at {side} × {side} points; nothing about other "
            "points or other directions is proved."
        )
        entries = [_slices(row, unit) for row in rows[:_MOST_SLICES]]
        gallery = tree.Gallery(entries, _MOST_SLICES, "slices", "page")
        blocks.append(tree.Group("Slices of the decision boundary", (tree.Paragraph(note), gallery)))
    return tree.Section("Geometry", blocks, lead, "geometry", "Geometry", "page")


_MOST_SLICES = 6
"""number of examples whose slices are shown"""


def _band_chart(results: Mapping[str, Any]) -> Iterator[tree.Chart]:
    """The chart of the bounds of distances; none without a proved bound."""
    unit, rows = results["unit"], results["rows"]
    pairs = [(number(row["lower"]), number(row["upper"])) for row in rows]
    drawings = bands(pairs, number(results["eps"]) if results["one_radius"] else None)
    if results["proved"] and drawings:
        caption = (
            f"Each column is one {unit}. Proved: no input within the dark area is misclassified (bounds of the method "
            f"{results['method']}). Found: an attack found a misclassified input at the black line. The distance to "
            "the decision boundary is in the light area between them. Without a line, no attack found one."
        )
        alternative = (
            f"Proved and attacked distance of {len(rows)} {unit}s, sorted by the proved distance; the numbers are in "
            "the table below."
        )
        axis = f"{unit}s, sorted by the proved distance"
        yield tree.Chart(drawings, axis, alternative, caption, "Distance to the decision boundary")


def _distances(results: Mapping[str, Any]) -> tree.Table:
    rows = []
    for row in results["rows"]:
        right = row["prediction"] == row["label"]
        beside = f"then {row['rival']}" if right else f"misclassified as {row['prediction']}"
        upper = "–" if row["upper"] == "inf" else f"≤ {rounded_up(row['upper'])}"
        proved = (f"≥ {rounded_down(row['lower'])}", f"≤ {rounded_up(row['lipschitz_above'])}")
        lower, above = proved if results["proved"] else ("–", "–")
        name = tree.Cell(f"#{row['id']}", (f"{row['label']}, {beside}",))
        rows.append(
            (name, plain(row["margin"]), lower, upper, f"≥ {rounded_down(row['lipschitz_below'])}", above)
        )
    headings = (
        results["unit"],
        "margin",
        "distance, proved",
        "distance, attacked",
        "Lipschitz constant, estimated",
        "Lipschitz constant, proved",
    )
    return tree.Table(headings, rows, extra=frozenset({1}))


def _distances_note(results: Mapping[str, Any]) -> str:
    unit = results["unit"]
    within = plain(results["eps"]) if results["one_radius"] else "the attacked distance"
    proved = (
        ""
        if results["proved"]
        else " Nothing is proved about this model, because it has an operation without sound bounds."
    )
    return (
        "The margin is the logit of the label minus that of the next class. Its Lipschitz constant is its largest "
        f"change for a change of the {unit} by one unit of {results['norm']}, within {within} of the {unit}. The "
        "estimate is the largest of some sampled gradients: the true constant is at least as large. The proved bound "
        f"is at least the true constant, and often much larger.{proved}"
    )


def _slices(row: Mapping[str, Any], unit: str) -> tree.Group:
    crossed = row["upper"] != "inf" and row["prediction"] == row["label"]
    pictures = [
        tree.Picture(
            each["picture"],
            each["plane"],
            f"Predicted classes around {unit} {row['id']} in the {each['plane']}: "
            f"{', '.join(entry['name'] for entry in each['key'])}.",
            key=tuple((entry["name"], entry["colour"]) for entry in each["key"]),
            side=each["side"],
            crossed=crossed,
        )
        for each in row["slices"]
    ]
    return tree.Group(f"#{row['id']}, label {row['label']}", (tree.Pictures(pictures, columns=2),))


def rounded_down(value: float | str, digits: int = 3) -> str:
    """Return a number as text, rounded down to a few significant digits, as for a certified bound."""
    return _rounded(value, digits, math.floor)


def rounded_up(value: float | str, digits: int = 3) -> str:
    """Return a number as text, rounded up to a few significant digits."""
    return _rounded(value, digits, math.ceil)


def _rounded(value: float | str, digits: int, towards: Any) -> str:
    amount = number(value) if not isinstance(value, str) else NOT_A_NUMBER_WORDS[value]
    if not math.isfinite(amount) or amount == 0:
        return plain(amount)
    unit = 10.0 ** (math.floor(math.log10(abs(amount))) - digits + 1)
    # a number with few digits stays as it is
    ratio = amount / unit
    steps = round(ratio) if abs(ratio - round(ratio)) < 1e-9 else towards(ratio)
    return plain(steps * unit, digits + 1)
