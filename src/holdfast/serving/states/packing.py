"""Sketches as bytes, as states store them."""

import numpy as np

from holdfast.detectors.fingerprints import Floats


def sketch_bytes(sketch: Floats) -> bytes:
    """Return a sketch as bytes, in half precision, whose error is far below the radius."""
    return sketch.astype("<f2").tobytes()


def sketch_from(content: bytes) -> Floats:
    """Return the sketch that `sketch_bytes` converted to bytes."""
    return np.frombuffer(content, "<f2").astype(np.float32)
