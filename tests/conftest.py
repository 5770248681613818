"""What every test stands on: fixed examples for the properties, one thread, and the real data where it is."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

# Before torch is imported: small networks gain nothing from more threads, and the sums stay in one order.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import gc
import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings

if TYPE_CHECKING:
    from shelf import Shelf

ROOT = Path(__file__).resolve().parents[1]
STARTING = ("holdfast.io.limited.calling", "holdfast.runs.engine.processes")
"""modules that start processes"""

settings.register_profile("fixed", derandomize=True, deadline=None, database=None, max_examples=25)
settings.load_profile("fixed")


def pytest_collection_finish() -> None:
    """Leave what is loaded out of later collections of garbage, which took a twentieth of the time of the tests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def pytest_runtest_setup() -> None:
    """Seed what a test draws without a word, before its fixtures: it draws the same in any order and process."""
    torch.manual_seed(0)


def _folder(variable: str, beside: str) -> Path:
    folder = Path(os.environ.get(variable) or ROOT.parent / "shared" / beside)
    if not folder.is_dir():
        pytest.skip(f"{folder} is no folder; {variable} may name the one that holds them")
    return folder


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The whole real data sets (`HOLDFAST_DATA`); the test is skipped where they are absent."""
    return _folder("HOLDFAST_DATA", "data")


@pytest.fixture(scope="session")
def models_folder() -> Path:
    """Real networks of other people (`HOLDFAST_MODELS`); the test is skipped where they are absent."""
    return _folder("HOLDFAST_MODELS", "models")


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Shelf"]:
    """Finished runs that tests read, made once for all processes of the tests. A test must not change them."""
    from shelf import Shelf

    root = tmp_path_factory.getbasetemp()
    shared = Shelf((root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "shelf")
    yield shared
    shared.refuse_changes()


@pytest.fixture(scope="session", autouse=True)
def _copies_of_a_process() -> Iterator[None]:
    """Start limited processes and workers as copies of one that has imported torch; `new_processes` undoes this."""
    if sys.platform != "linux":
        yield
        return
    from fork_server import ForkServer

    server = ForkServer()
    with pytest.MonkeyPatch.context() as patch:
        for module in STARTING:
            patch.setattr(f"{module}.subprocess", server)
        yield
    server.close()


@pytest.fixture
def new_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start limited processes and workers as users do, by a new process of Python."""
    for module in STARTING:
        monkeypatch.setattr(f"{module}.subprocess", subprocess)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse files here: another process takes 2 s to import torch, and other tests read a file as users do."""
    monkeypatch.setattr("holdfast.io.limited.calling.HERE.limited", True)


@pytest.fixture(scope="session", autouse=True)
def _shapes() -> Iterator[None]:
    """Check at run time that tensors have the shapes that the annotations promise, in whatever a test runs."""
    from holdfast import attacks, core, corruptions, statistics
    from holdfast.recipes import training
    from holdfast.testing.shapes import watching

    packages = (core, statistics, corruptions, attacks, training)
    for package in packages:
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            import_module(module.name)
    with watching(*(package.__name__ for package in packages)):
        yield


@pytest.fixture(autouse=True)
def _fast_if_slow(request: pytest.FixtureRequest) -> Iterator[None]:
    """Check no shapes in slow tests, which call the functions that quick tests call, many more times."""
    from holdfast.testing.shapes import unchecked

    with unchecked() if request.node.get_closest_marker("slow") else nullcontext():
        yield
