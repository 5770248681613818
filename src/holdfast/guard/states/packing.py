"""Sketches as bytes, as states store them."""

from collections.abc import Sequence

import numpy as np

from holdfast.guard.detectors.fingerprints import Floats


def sketch_bytes(sketch: Floats) -> bytes:
    """Return a sketch as bytes, in half precision, whose error is far below the radius."""
    return sketch.astype("<f2").tobytes()


def sketches_from(contents: Sequence[bytes]) -> Floats:
    """Return the sketches (n, 64) that `sketch_bytes` converted to bytes. They are converted together, which is faster
    than one by one.
    """
    width = len(contents[0]) // 2 if contents else 0
    return np.frombuffer(b"".join(contents), "<f2").astype(np.float32).reshape(len(contents), width)
