"""Opens damaged files in a process that is started again when it ends, and judges what came of it."""

import multiprocessing
import os
import shutil
from collections import Counter
from dataclasses import dataclass, field, replace
from multiprocessing import forkserver
from pathlib import Path
from types import TracebackType
from typing import Self
from unittest.mock import patch

from fuzzing.files import CANARY, File, beside, good
from fuzzing.worker import SLACK, limit, serve
from holdfast.io.sandbox.calling import _ENVIRONMENT
from store.test_foreign import rewritten

SECONDS = 60
"""for one file"""
_RENEWED = 250
"""files after which the process is started again, so that what its libraries keep does not add up"""
_PRELOADED = [
    "torch",
    "holdfast.io.data.data",
    "holdfast.io.models.models",
    "holdfast.verbs.configuration",
    "pyarrow.parquet",
    "onnx.inliner",
    "onnxruntime",
    "skops.io",
    "xgboost",
    "lightgbm",
    "torch.export.pt2_archive._package",
    "pytest",
]
"""what is imported once, before the processes begin; those of a test import its main module, which is pytest"""


@dataclass(frozen=True)
class Outcome:
    """What came of one file."""

    code: int
    """the exit code of the command line"""
    text: str = ""
    stage: str = "main"
    """`parser` where the process was within the parser that has a process of its own"""
    n_bytes: int = 0
    """memory at the peak, beyond what was in use before"""
    seconds: float = 0.0
    """of CPU"""
    died: bool = False
    fault: str = ""
    """why this must not be; nothing where it may"""


@dataclass
class Tally:
    """What came of all files of a format."""

    codes: Counter[int] = field(default_factory=Counter)
    died: int = 0
    n_bytes: int = 0
    seconds: float = 0.0
    faults: int = 0

    def add(self, outcome: Outcome) -> None:
        """Count one more."""
        self.codes[outcome.code] += 1
        self.died += outcome.died
        self.n_bytes = max(self.n_bytes, outcome.n_bytes)
        self.seconds += outcome.seconds
        self.faults += bool(outcome.fault)

    def __str__(self) -> str:
        codes = ", ".join(f"exit {code}: {n}" for code, n in sorted(self.codes.items()))
        return (
            f"{self.codes.total()} files ({codes}), parser ended {self.died} times, peak {self.n_bytes / 1e6:.0f} MB, "
            f"{self.seconds:.1f} s of CPU, {self.faults} faults"
        )


class Opener:
    """Opens damaged files of one format, in a folder of its own."""

    def __init__(self, form: str, folder: Path) -> None:
        self.form, self.folder, self.tally = form, folder, Tally()
        self.limit = limit(form) + SLACK
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOADED)
        with patch.dict(os.environ, _ENVIRONMENT):
            forkserver.ensure_running()
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.join()

    def _start(self) -> None:
        self._connection, theirs = self._context.Pipe()
        first = self._written(good(self.form)[0], self.folder / "good")
        arguments = self.form, str(self.folder), str(first), theirs
        self._process = self._context.Process(target=serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self._opened = 0
        started = self._answer()
        assert started.code == 0, f"the good file was not opened: {started}"

    @property
    def place(self) -> Path:
        """The folder of the file that was opened last."""
        return self.folder / "opened"

    def _written(self, file: File, folder: Path) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        for each in (*beside(self.form), file):
            (folder / each.name).parent.mkdir(parents=True, exist_ok=True)
            (folder / each.name).write_bytes(each.content)
        if file.sealed:
            rewritten(folder, file.name)
        return folder / file.name

    def __call__(self, file: File) -> Outcome:
        """What comes of a file."""
        return self.opened(self._written(file, self.place))

    def opened(self, path: Path) -> Outcome:
        """What comes of the file at a path."""
        if self._opened >= _RENEWED:
            self.__exit__(None, None, None)
            self._start()
        self._opened += 1
        self._connection.send(str(path))
        outcome = self._answer()
        canary = self.folder / CANARY
        if canary.exists():
            outcome = replace(outcome, fault="its code ran")
            canary.rename(self.folder / f"{CANARY}-{self.tally.codes.total()}")
        self.tally.add(outcome)
        if outcome.died:
            self._start()
        return outcome

    def _answer(self) -> Outcome:
        stage = "main"
        try:
            while self._connection.poll(SECONDS):
                found = self._connection.recv()
                if isinstance(found, tuple):
                    return self._judged(*found)
                stage = found
        except EOFError:
            return self._ended(stage)
        self._process.kill()
        self._process.join()
        return Outcome(-1, "", stage, died=True, fault=f"it took more than {SECONDS} s")

    def _ended(self, stage: str) -> Outcome:
        """The process ended: that of a user goes on where it was within the parser, and says so with exit code 3."""
        self._process.join()
        text = f"the process ended with status {self._process.exitcode}"
        tail = (self.folder / "output").read_text(errors="replace")[-2000:]
        fault = "" if stage == "parser" else f"{text}:\n{tail}"
        return Outcome(3 if stage == "parser" else -1, text, stage, died=True, fault=fault)

    def _judged(self, code: int, text: str, n_bytes: int, seconds: float) -> Outcome:
        fault = ""
        if code not in (0, 2, 3):
            fault = f"an internal error:\n{text}"
        elif n_bytes > self.limit:
            fault = f"it took {n_bytes / 1e6:,.0f} MB"
        return Outcome(code, text, "main", n_bytes, seconds, fault=fault)
