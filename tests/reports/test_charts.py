import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.reports.charts import Axis, round_step, staircase


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
    drawn = staircase(
        _points(xs, shares),
        "eps",
        width=700,
        height=300,
        logarithmic=logarithmic,
        mark=None if logarithmic else mark,
    )
    if drawn is None:
        assert logarithmic
        assert len(shares) == 1
        return
    assert all(
        0 <= value <= 700 for value in _numbers(_path(drawn, "line")) + _numbers(_path(drawn, "range"))
    )
    for tick in drawn.x_ticks:
        assert drawn.left <= tick.at <= drawn.right + 0.1
    assert 2 <= len(drawn.x_ticks) <= 12
    assert drawn.mark is None or drawn.left <= drawn.mark.x1 <= drawn.right


def test_the_line_holds_each_level_until_the_next():
    drawn = staircase(_points([0, 1, 2], [1, 0.5, 0]), "eps", width=160, height=156, mark=0.5)
    assert _path(drawn, "line") == "M46.0,12.0H94.1V62.0H142.2V112.0H146.0"
    assert drawn.mark.x1 == pytest.approx(70.0, abs=0.1)
    assert drawn.mark.text_y > 62


def test_nothing_is_drawn_of_nothing():
    assert staircase([], "eps", width=100, height=100) is None
    assert staircase(_points([0.0], [1.0]), "eps", width=100, height=100) is None
    assert staircase(_points([0.0], [1.0]), "eps", width=100, height=100, mark=math.inf) is None


@given(top=st.floats(1e-6, 1e9))
def test_steps_are_round_and_few(top):
    step = round_step(top)
    assert top / step <= 6 * (1 + 1e-6)
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - factor) for factor in (1, 2, 5)) < 1e-6


@given(top=st.floats(10, 1e7))
def test_a_logarithmic_axis_begins_at_zero_and_rises(top):
    axis = Axis(top, logarithmic=True)
    places = [axis(value) for value, _ in axis.ticks]
    assert places[0] == 0
    assert places == sorted(places)
    assert axis(top) == pytest.approx(1)
