"""Tests in a limited process that the estimator in a `.skops` file can be loaded and called, because native code may
crash on it.
"""

from contextlib import suppress
from pathlib import Path

import torch

from holdfast.io.models.estimators import Estimator, Predictor, interface_of
from holdfast.io.models.skops_files import loaded_estimator


def read(path: Path, content: bytes | None, folder: Path) -> dict[str, object]:
    """Test that loading the estimator in a file and calling it on two rows does not crash the process. Return an empty
    dictionary.

    Raises the errors of `loaded_estimator` and `interface_of`.
    """
    assert content is not None, "the file is read once"
    estimator, _ = loaded_estimator(path, content, trust_code=False)
    if isinstance(estimator, Predictor):
        _call_with_two_rows(Estimator(interface_of(estimator, parallel=False), ""))
    return {}


def _call_with_two_rows(estimator: Estimator) -> None:
    """Call the estimator with two rows, by the same methods as a run does."""
    width = estimator.interface.features
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
    """Import the libraries that load an estimator, before the memory of the process is limited."""
    with suppress(ImportError):  # reported when the file is read
        import skops.io  # noqa: F401
