"""What every test stands on: fixed examples for the properties, one thread, and the real data where it is."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

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
    from fork_server import ForkServer
    from shelf import Shelf

ROOT = Path(__file__).resolve().parents[1]
STARTING = ("holdfast.io.sandbox.calling", "holdfast.runs.engine.processes")
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


def _start_processes_by(monkeypatch: pytest.MonkeyPatch, starting: object) -> None:
    for module in STARTING:
        monkeypatch.setattr(f"{module}.subprocess", starting)


@pytest.fixture(scope="session", autouse=True)
def _copies_of_a_process() -> Iterator["ForkServer | None"]:
    """Start limited processes and workers as copies of one that has imported torch; `new_processes` undoes this."""
    if sys.platform != "linux":
        yield None
        return
    from fork_server import ForkServer

    server = ForkServer()
    with pytest.MonkeyPatch.context() as patch:
        _start_processes_by(patch, server)
        yield server
    server.close()


@pytest.fixture
def started_copies(_copies_of_a_process: "ForkServer | None") -> None:
    """The process that is copied runs before the test changes paths and folders."""
    if _copies_of_a_process is not None:
        _copies_of_a_process.start()


@pytest.fixture
def new_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start limited processes and workers as users do, by a new process of Python."""
    _start_processes_by(monkeypatch, subprocess)


@pytest.fixture(scope="session", autouse=True)
def _unflushed() -> Iterator[None]:
    """Do not flush files to the disk: this protects from power cuts, which tests do not cause, and takes most of the
    time of a short run.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture
def process_limits(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """A function that states whether this process has limits already, so that it parses files itself."""

    def set_limited(limited: bool) -> None:
        monkeypatch.setattr("holdfast.io.sandbox.calling.HERE.limited", limited)

    return set_limited


@pytest.fixture
def in_this_process(process_limits: Callable[[bool], None]) -> None:
    """Parse files here: another process takes 2 s to import torch, and other tests read a file as users do."""
    process_limits(True)


@pytest.fixture
def set_limit(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, object], None]:
    """A function that changes a limit of the package (a size, a number or a time), so that a small test reaches it."""

    def set_limit(name: str, value: object) -> None:
        monkeypatch.setattr(name, value)

    return set_limit


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that shows `now`, in place of `time.perf_counter`."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No optional library is installed."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[str]], None]:
    """A function that sets the words of the command by which this process was started."""

    def set_words(words: Sequence[str]) -> None:
        monkeypatch.setattr(sys, "argv", list(words))

    return set_words


@pytest.fixture
def temporary_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of temporary files is the one of the test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def power_of_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """A power of drift tests without simulations, which take seconds."""
    from holdfast.monitoring.watching import Power

    power = Power("inputs: feature 0", 0.3, None, None, errors=False)
    monkeypatch.setattr("holdfast.monitoring.watching.power_of", lambda *arguments: power)


@pytest.fixture
def set_guard_accuracy(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., float]], None]:
    """A function that replaces the accuracy that a guard against overfitting measures with an attack of some steps."""

    def set_accuracy(accuracy: Callable[..., float]) -> None:
        monkeypatch.setattr("holdfast.recipes.training.follow_up.OverfittingGuard._right", accuracy)

    return set_accuracy


@pytest.fixture
def before_updates(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., object]], None]:
    """A function that lets another one be called with the loop, the epoch, the step and the examples of each update."""
    from holdfast.recipes.training.fit import _Loop

    update = _Loop._update

    def observe(observer: Callable[..., object]) -> None:
        def observed(loop: object, epoch: int, step: int, rows: object) -> object:
            observer(loop, epoch, step, rows)
            return update(loop, epoch, step, rows)

        monkeypatch.setattr(_Loop, "_update", observed)

    return observe


@pytest.fixture
def noise_multiplier_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Private training adds noise of one standard deviation, without opacus, which would compute it from the budget."""
    monkeypatch.setattr("holdfast.recipes.dp_sgd.noise_multiplier", lambda *_: 1.0)


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
