import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.reports.charts import growth, logarithmic_axis, round_step, staircases


def _points(xs, shares):
    return [
        {"eps": x, "value": y, "low": y / 2, "high": (1 + y) / 2} for x, y in zip(xs, shares, strict=True)
    ]


def _path(drawn, look):
    return next(path.d for path in drawn.paths if path.look == look)


def _numbers(path):
    return [float(found) for found in re.findall(r"-?\d+\.?\d*", path)]


shares = st.lists(st.floats(0, 1), min_size=1, max_size=30)


@pytest.mark.parametrize("logarithmic", [False, True])
@given(shares=shares, scale=st.floats(1e-4, 1e6), mark=st.floats(1e-5, 1e6))
def test_everything_is_drawn_inside_the_box(logarithmic, shares, scale, mark):
    xs = [scale * k for k in range(len(shares))]
    drawings = staircases(
        _points(xs, shares), "eps", logarithmic=logarithmic, mark=None if logarithmic else mark
    )
    assert drawings or (logarithmic and len(shares) == 1)
    for _, drawn in drawings:
        numbers = _numbers(_path(drawn, "line")) + _numbers(_path(drawn, "range"))
        assert all(0 <= value <= drawn.width for value in numbers)
        for tick in drawn.x_ticks:
            assert drawn.left <= tick.at <= drawn.right + 0.1
        assert 2 <= len(drawn.x_ticks) <= 12
        assert drawn.mark is None or drawn.left <= drawn.mark.x1 <= drawn.right


def test_the_line_holds_each_level_until_the_next():
    (_, drawn), _ = staircases(_points([0, 1, 2], [1, 0.5, 0]), "eps", mark=0.5)
    assert _path(drawn, "line") == "M46.0,12.0H363.3V134.0H680.6V256.0H706.0"
    assert drawn.mark.x1 == pytest.approx(204.7, abs=0.1)
    assert drawn.mark.text_y > 134


def test_a_chart_without_points_has_no_drawings():
    assert staircases([], "eps") == []
    assert staircases(_points([0.0], [1.0]), "eps") == []
    assert staircases(_points([0.0], [1.0]), "eps", mark=math.inf) == []


@given(top=st.floats(1e-6, 1e9))
def test_steps_are_round_and_few(top):
    step = round_step(top)
    assert top / step <= 6 * (1 + 1e-6)
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - factor) for factor in (1, 2, 5)) < 1e-6


@given(top=st.floats(10, 1e7))
def test_a_logarithmic_axis_begins_at_zero_and_rises(top):
    axis = logarithmic_axis(top)
    places = [axis.place(value) for value, _ in axis.ticks]
    assert places[0] == 0
    assert places == sorted(places)
    assert axis.place(top) == pytest.approx(1)


def test_labels_of_counts_neither_overlap_nor_leave_the_chart():
    counts = (500, 18_000, 20_000)
    for _, drawing in growth([{"name": "line", "points": [(n, 0.5) for n in counts]}]):
        assert [tick.text for tick in drawing.x_ticks] == ["500", "20,000"]
        assert drawing.x_ticks[-1].at + 20 <= drawing.width  # half the width of the label in pixels
