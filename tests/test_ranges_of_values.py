"""Images of another range than those that they are compared with are refused, in both directions."""

import numpy as np
import pytest

from holdfast.api.expecting import refuse_other_range
from holdfast.core.errors import UsageError
from holdfast.io.data.expected import Expected
from holdfast.io.data.memory import as_data

UNIT = np.random.default_rng(0).random((50, 1, 4, 4)).astype("f4")
RANGES = {"unit": UNIT, "sign": 2 * UNIT - 1, "byte": 255 * UNIT, "standard": (UNIT - 0.13) / 0.31}


def data(x: np.ndarray) -> object:
    return as_data(x, np.zeros(len(x), int), expected=Expected(lenient=True))


@pytest.mark.parametrize("first", RANGES)
@pytest.mark.parametrize("second", RANGES)
def test_another_range_is_refused_in_both_directions(first: str, second: str) -> None:
    refuse_other_range(data(RANGES[first]), data(1.1 * RANGES[first]))
    if first != second:
        with pytest.raises(
            UsageError, match="values from .* to .*, and .* has values from .* in the same range"
        ):
            refuse_other_range(data(RANGES[first]), data(RANGES[second]))
