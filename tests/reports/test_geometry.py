"""The part of the report about geometry: numbers rounded in the safe direction, pictures, and what is not proved."""

import base64
import io
import re

import pytest
import torch
from PIL import Image

from holdfast.core.evidence import Table
from holdfast.reports.charts import PALETTE, bands, geometry_results, rounded_down, rounded_up
from reports import made


def table(**columns):
    grid = torch.zeros(3, 5, 5, dtype=torch.int16)
    grid[:, :, 3:] = 2  # class 2 on the right
    grid[:, 0] = -1 - grid[:, 0]  # the first row is outside of the bounds
    whole = {
        "id": torch.tensor([7, 8, 9]),
        "y": torch.zeros(3, dtype=torch.int64),
        "prediction": torch.tensor([0, 0, 2]),
        "rival": torch.full((3,), 2),
        "margin": torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64),
        "lower": torch.tensor([0.12345, 0.0555, 0.0], dtype=torch.float64),
        "upper": torch.tensor([0.15551, torch.inf, 0.0], dtype=torch.float64),
        "radius": torch.full((3,), 0.1, dtype=torch.float64),
        "lipschitz_below": torch.tensor([3.14159, 2.0, 1.0], dtype=torch.float64),
        "lipschitz_above": torch.tensor([31.4159, 20.0, 10.0], dtype=torch.float64),
        "slice_attacks": grid,
        "slice_random": grid,
    }
    return Table("example", {**whole, **columns})


def page(results):
    text = made.page({**made.summarised(made.evidence()), "geometry": results})
    start = text.index('<section aria-labelledby="geometry">')
    return text[start : text.index("</section>", start)]


def results(**columns):
    return geometry_results(
        table(**columns), ["<b>a</b>", "b", "c"], norm="Linf", unit="image", method="crown"
    )


@pytest.mark.parametrize(
    "value, down, up",
    [
        (0.12345, "0.123", "0.124"),
        (0.1, "0.1", "0.1"),
        (0.3, "0.3", "0.3"),
        (0.0, "0", "0"),
        (1999.6, "1,990", "2,000"),
        ("inf", "∞", "∞"),
        (9.999e-4, "0.000999", "0.001"),
    ],
)
def test_certified_numbers_are_rounded_in_the_safe_direction(value, down, up):
    assert (rounded_down(value), rounded_up(value)) == (down, up)


def test_a_report_shows_what_is_proved_and_what_is_estimated():
    section = page(results())
    for text in (
        "≥ 0.123",
        "≤ 0.156",
        "≥ 3.14",
        "≤ 31.5",
        "misclassified as c",
        "bounds of the method crown",
    ):
        assert text in section
    assert "&lt;b&gt;a&lt;/b&gt;" in section and "<b>a</b>" not in section
    assert section.count("<image ") == 6
    assert "style=" not in section  # the security policy of the page forbids it
    assert (
        section.count('class="broken-mark"') == 2
    )  # none for the image without an adversarial example or label


def test_a_report_without_proofs_shows_no_proved_numbers():
    nothing = torch.full((3,), torch.nan, dtype=torch.float64)
    section = page(results(lower=nothing, lipschitz_above=nothing))
    assert "Nothing is proved about this model" in section
    assert "Distance to the decision boundary" not in section and "≥ 0.123" not in section


def test_a_slice_has_the_colours_of_its_key_and_pale_ones_outside():
    (row, *_), (label, other) = results()["rows"], PALETTE[:2]
    content = base64.b64decode(row["slices"][0]["picture"].partition(",")[2])
    picture = Image.open(io.BytesIO(content)).convert("RGB")
    shown = ["#" + "".join(f"{part:02x}" for part in picture.getpixel(place)) for place in ((0, 2), (4, 2))]
    assert shown == [label, other]
    assert row["slices"][0]["key"] == [{"name": "<b>a</b>", "colour": label}, {"name": "c", "colour": other}]
    assert sum(picture.getpixel((0, 0))) > sum(picture.getpixel((0, 2)))


def _path(chart, look):
    return next(path.d for path in chart.paths if path.look == look)


def test_bands_are_sorted_and_lie_inside_the_chart():
    (_, chart), _ = bands([(0.3, 0.5), (0.1, float("inf")), (0.0, 0.0)], 0.2)
    proved, between, upper = (_path(chart, look) for look in ("proved", "between", "upper"))
    heights = [float(y) for y in re.findall(r"[,VL]([\d.]+)(?=[HVLZ])", proved)][:3]
    assert heights == sorted(heights, reverse=True)  # downwards is lower in a picture
    numbers = [float(each) for path in (proved, between, upper) for each in re.findall(r"[\d.]+", path)]
    assert all(0 <= each <= 720 for each in numbers)
    assert upper.count("M") == 2  # no line for the infinite bound
    assert chart.bottom > chart.mark.y1 > chart.top
    assert bands([]) == []
    assert bands([(0.0, 0.0)]) == []
