"""Loads one estimator from a `.skops` file and calls it with two rows, because native code may crash on it."""

from pathlib import Path

import torch

from holdfast.sources.estimators import Estimator, Predictor, asked_of
from holdfast.sources.skops_files import loaded_estimator


def read(path: Path, content: bytes | None, folder: Path) -> dict[str, object]:
    """Load the estimator and call it. Return an empty dictionary if the process does not crash.

    Raises the errors of `loaded_estimator` and `asked_of`.
    """
    assert content is not None, "the file is read once"
    found, _ = loaded_estimator(path, content, trust_code=False)
    if isinstance(found, Predictor):
        _ask(Estimator(asked_of(found, parallel=False), ""))
    return {}


def _ask(estimator: Estimator) -> None:
    """Call the estimator with two rows, by the same methods as a run does."""
    width = estimator.asked.features
    if width is None:
        return
    rows = torch.stack((torch.zeros(width), torch.ones(width)))
    try:
        estimator.settle(rows)
        estimator(rows)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - it needs other rows: the run reports it with the user's data
        return


def prepare() -> None:
    """Import the libraries before memory is limited."""
    try:
        import skops.io  # noqa: F401
    except ImportError:
        return  # reported when the file is read
