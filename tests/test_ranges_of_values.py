"""Images of another range than those that they are compared with are refused, in both directions."""

import numpy as np
import pytest
import torch

import holdfast
from holdfast.core.batch import Batch
from holdfast.core.errors import UsageError
from holdfast.io.data.layouts import DeclaredData, Ranges
from holdfast.io.data.loaders import as_data
from holdfast.io.models.generators import open_generator
from holdfast.recipes.generated import FileSamples
from holdfast.verbs.opening.declared import refuse_other_range

UNIT = np.random.default_rng(0).random((50, 1, 4, 4)).astype("f4")
RANGES = {"unit": UNIT, "sign": 2 * UNIT - 1, "byte": 255 * UNIT, "standard": (UNIT - 0.13) / 0.31}


def data(x: np.ndarray) -> object:
    return as_data(x, np.zeros(len(x), int), expected=DeclaredData(lenient=True))


@pytest.mark.parametrize("first", RANGES)
@pytest.mark.parametrize("second", RANGES)
def test_another_range_is_refused_in_both_directions(first: str, second: str) -> None:
    refuse_other_range(data(RANGES[first]), data(1.1 * RANGES[first]))
    if first != second:
        with pytest.raises(
            UsageError, match="values from .* to .*, and .* has values from .* in the same range"
        ):
            refuse_other_range(data(RANGES[first]), data(RANGES[second]))


ROWS = np.random.default_rng(1).random((400, 6)).astype("f4")


class Samples:
    """Generator of given examples, in order."""

    def __init__(self, x: np.ndarray) -> None:
        self.x = x

    def sample(self, n: int, seed: int) -> np.ndarray:
        return self.x[seed % 7 :][:n]


@pytest.mark.parametrize("kind", ["sign", "byte", "standard", "unit"])
def test_samples_of_an_object_in_another_range_are_refused_in_both_directions(kind):
    images, y = np.random.default_rng(2).random((520, 1, 4, 4)).astype("f4"), np.arange(520) % 2
    ranges = {
        "unit": images,
        "sign": 2 * images - 1,
        "byte": 255 * images,
        "standard": (images - 0.13) / 0.31,
    }
    first = ranges["sign" if kind == "unit" else "unit"]
    with pytest.raises(UsageError, match=r"samples of .*Samples have values from .* to .*, and the training"):
        holdfast.audit.generator(
            Samples(ranges[kind]),
            (first[:300], y[:300]),
            held_out=(first[300:], y[300:]),
            samples=220,
            latent=0,
        )


def test_the_finding_states_a_narrower_range_that_a_poor_generator_may_have():
    x, y = np.random.default_rng(2).random((520, 1, 4, 4)).astype("f4"), np.arange(520) % 2
    grey = Samples(0.4 + 0.2 * x[::-1].copy())
    result = holdfast.audit.generator(
        grey, (x[:300], y[:300]), held_out=(x[300:], y[300:]), samples=220, latent=0
    )
    ranges = "samples have values from 0.4 to 0.6, and training examples values from"
    assert any(reason.startswith(ranges) for reason in result.content["reasons"])


def test_bytes_of_an_object_are_converted_as_those_of_a_file():
    pixels = np.arange(256, dtype="u1").repeat(8).reshape(64, 32)
    drawn = open_generator(Samples(pixels)).samples(20, 0)
    assert drawn.dtype == torch.float32
    stored = as_data(pixels, np.zeros(64, int), expected=DeclaredData(lenient=True)).read(0, 64).x
    assert {*map(tuple, drawn.tolist())} <= {*map(tuple, stored.tolist())}


@pytest.mark.parametrize("factor", [0.4, 2.5])
def test_rows_of_another_range_are_refused_and_single_large_values_are_not(factor):
    rows = torch.from_numpy(ROWS)
    with pytest.raises(UsageError, match="values from .* to .*, and b has values from"):
        Ranges.of(factor * rows, rows).refuse("a has", "b has")
    far = rows.clone()
    far[0, 0] = 100.0
    assert not Ranges.of(far, rows).differ and not Ranges.of(rows, far).differ
    assert not Ranges.of(torch.full_like(rows, 0.5), rows).differ  # a constant output is no other unit


@pytest.mark.parametrize("kind", ["sign", "byte", "standard"])
def test_generated_images_of_a_file_in_another_range_are_refused_in_both_directions(kind):
    y = torch.zeros(50, dtype=torch.int64)
    unit, other = (Batch(torch.from_numpy(RANGES[name]), y, torch.arange(50)) for name in ("unit", kind))
    FileSamples.of(unit, unit)
    for images, training in ((unit, other), (other, unit)):
        with pytest.raises(UsageError, match="the generated images have values from .* in the same range"):
            FileSamples.of(images, training)
