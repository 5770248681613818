"""Loads one estimator from a `.skops` file and calls it with two rows, because native code might crash on it."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.sources.skops_files import loaded_estimator

_METHODS = ("predict", "predict_proba", "decision_function")


def read(path: Path, content: bytes | None, folder: Path) -> dict[str, object]:
    """Return an empty result if the estimator can be loaded and called without a crash. Raises the errors of
    `loaded`.
    """
    assert content is not None, "the file is read once"
    estimator, _ = loaded_estimator(path, content, trust_code=False)
    width = getattr(estimator, "n_features_in_", None)
    if isinstance(width, int):
        rows = np.stack((np.zeros(width, np.float32), np.ones(width, np.float32)))
        for method in _METHODS:
            _ask(estimator, method, rows)
    return {}


def _ask(estimator: Any, method: str, rows: Any) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            getattr(estimator, method, lambda rows: None)(rows)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - it needs other rows or column names: the run reports it with the user's data
        return


def prepare() -> None:
    """Import the libraries before memory is limited."""
    try:
        import skops.io  # noqa: F401
    except ImportError:
        return  # reported when the file is read
