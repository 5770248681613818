"""Sketches as bytes, as states store them."""

import numpy as np

from holdfast.detectors.fingerprints import Floats


def packed(sketch: Floats) -> bytes:
    """Return a sketch as bytes, in half precision, whose error is far below the radius."""
    return sketch.astype("<f2").tobytes()


def unpacked(content: bytes) -> Floats:
    """Return the sketch that `packed` converted to bytes."""
    return np.frombuffer(content, "<f2").astype(np.float32)
