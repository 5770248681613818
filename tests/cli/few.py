"""A part of the training images of mnist-mini, with which a training of the command line takes a fifth of the time."""

from pathlib import Path

import numpy as np

from holdfast import bundled

FEW = ["--fit", "few.npz"]
"""the option that names the file of `write_few` in the current folder"""


def write_few(n: int = 1000) -> None:
    """Write `few.npz` into the current folder."""
    with np.load(Path(bundled.__path__[0]) / "mnist-mini.npz") as images:
        x = images["x_train"][:n, None].astype(np.float32) / 255
        np.savez("few.npz", x_train=x, y_train=images["y_train"][:n].astype(np.int64))
