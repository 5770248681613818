"""What the tests of sources share: where real models and real data lie, when they are there."""

import os
from pathlib import Path

import pytest

_BESIDE = Path(__file__).resolve().parents[3] / "shared"


def _folder(variable: str, name: str) -> Path:
    folder = Path(os.environ.get(variable, _BESIDE / name))
    if not folder.is_dir():
        pytest.skip(f"no folder of real {name}: set {variable}")
    return folder


@pytest.fixture(scope="session")
def real_models() -> Path:
    """Networks that nobody here trained."""
    return _folder("HOLDFAST_MODELS", "models")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Data sets as they were handed over."""
    return _folder("HOLDFAST_REAL_DATA", "data")
