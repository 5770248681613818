"""The part of a report about the geometry of the decision boundary: distances, Lipschitz constants and slices."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from holdfast.core.evidence import Table
from holdfast.reports.charts import Bands, bands
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


def geometry_results(table: Table, classes: Sequence[str], *, norm: str, unit: str, method: str) -> Json:
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


def band_charts(
    results: Mapping[str, Any] | None, sizes: Sequence[tuple[str, float, float]]
) -> list[tuple[str, Bands]]:
    """Return the charts of the bounds of distances, by the names of their sizes. There are none without a proved bound.

    `sizes` are names, widths and heights.
    """
    if results is None or not results["proved"]:
        return []
    pairs = [(number(row["lower"]), number(row["upper"])) for row in results["rows"]]
    mark = number(results["eps"]) if results["one_radius"] else None
    drawn = [(name, bands(pairs, width=width, height=height, mark=mark)) for name, width, height in sizes]
    return [(name, chart) for name, chart in drawn if chart is not None]


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
