"""The process with limited memory that opens the files of one format as the command line does."""

import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from fuzzing.files import CLASSES, FEATURES, SIDE
from holdfast.core.errors import HoldfastError
from holdfast.core.model import Bounds
from holdfast.io.models.models import Declared, open_model
from holdfast.io.sandbox import calling, sandbox_main
from holdfast.io.sandbox.sandbox_main import is_out_of_memory

SLACK = 200 * 10**6
"""memory beyond the limit that opening a file may take"""
MAIN_BYTES = 2**30
"""memory for a format that the process of the user itself parses"""
_CPU_SECONDS = 10**6
INTERNAL = 5


def _data(path: Path, label: str | None = None) -> None:
    from holdfast.io.data.data import open_data

    data = open_data(str(path), label=label)
    data.read(0, min(2, len(data)))
    assert data.digest


def _model(path: Path, *shape: int, arch: str | None = None, **arguments: str) -> None:
    declared = Declared(bounds=Bounds(0.0, 1.0))
    opened = open_model(str(path), arch=arch, model_args=arguments, declared=declared)
    opened.model(torch.rand(2, *shape))


def _described(path: Path) -> None:
    """Rows of the shape that the named network takes."""
    declared = Declared(bounds=Bounds(0.0, 1.0))
    opened = open_model(str(path), declared=declared)
    flat = opened.architecture["architecture"] == "mlp"
    opened.model(torch.rand(2, FEATURES) if flat else torch.rand(2, 1, 4, 4))


def _onnx(path: Path) -> None:
    from holdfast.io.onnx.reading import OnnxInput, read_onnx

    opened = open_model(str(path), declared=Declared(bounds=Bounds(0.0, 1.0)))
    found: OnnxInput = read_onnx(path).input
    opened.model(torch.rand(2, *(size or 1 for size in found.shape[1:])))


def _configuration(path: Path) -> None:
    from holdfast.verbs.configuration import validate

    validate(path)


def _run(folder: Path) -> None:
    """Verify a run and write its reports; one must not keep the other from being tried."""
    from holdfast.core.catalogue import names
    from holdfast.runs.documents.record import consistent
    from holdfast.verbs.reports import report, verify

    with suppress(HoldfastError):
        verify(folder)
    result = report(folder)
    with consistent(folder):
        for suffix in names("reports"):
            result.write(f"report{suffix}")


_SMALL_MLP = {"features": str(FEATURES), "classes": str(CLASSES), "width": "3", "depth": "1"}
_OPEN: Mapping[str, Callable[[Path], None]] = {
    "npz": _data,
    "csv": partial(_data, label="label"),
    "csv.gz": partial(_data, label="label"),
    "parquet": partial(_data, label="label"),
    "images": lambda path: _data(path.parents[1]),
    "safetensors": _described,
    "pt": lambda path: _model(path, FEATURES, arch="mlp", **_SMALL_MLP),
    "pt2": lambda path: _model(path, 1, SIDE, SIDE),
    "onnx": _onnx,
    "skops": lambda path: _model(path, FEATURES),
    "xgboost.json": lambda path: _model(path, FEATURES),
    "xgboost.ubj": lambda path: _model(path, FEATURES),
    "lightgbm.txt": lambda path: _model(path, FEATURES),
    "yaml": _configuration,
    "run": lambda path: _run(path.parent),
}


PARSED_APART = (
    "csv",
    "csv.gz",
    "parquet",
    "pt",
    "pt2",
    "onnx",
    "skops",
    "xgboost.json",
    "xgboost.ubj",
    "lightgbm.txt",
)
"""formats that a limited process parses"""


def limit(form: str) -> int:
    """Bytes that a file of a few kilobytes may take; those of the process of its parser where it has one."""
    from holdfast.io.data import tables
    from holdfast.io.models import exported, skops_files, trees, weights
    from holdfast.io.onnx import opening

    parsers = {
        "csv": tables,
        "csv.gz": tables,
        "parquet": tables,
        "pt": weights,
        "pt2": exported,
        "onnx": opening,
        "skops": skops_files,
        "xgboost.json": trees,
        "xgboost.ubj": trees,
        "lightgbm.txt": trees,
    }
    return parsers[form].LIMITS.spare_bytes if form in parsers else MAIN_BYTES


def _memory(key: str) -> int:
    """A number of bytes in the state of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def _reset_peak() -> int:
    """Memory in use, which the peak starts from again."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _exit_code(form: str, path: Path) -> tuple[int, str]:
    """What the command line ends with, and what was raised."""
    try:
        _OPEN[form](path)
    except HoldfastError as error:
        if form not in PARSED_APART and is_out_of_memory(error.__cause__):
            return INTERNAL, f"memory ran out in the process of the run: {error}"
        return error.exit_code, f"{type(error).__name__}: {error}"
    except OSError as error:
        return 3, f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001 - an internal error, which is a fault
        return INTERNAL, traceback.format_exc()
    return 0, ""


def serve(form: str, folder: str, first: str, answers: Connection) -> None:
    """Open the file `first` without a limit, for its imports, and then each file whose path comes, under limits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.chdir(folder)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open("output", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    torch.set_num_threads(1)
    calling.HERE.limited = True
    parse = sandbox_main.answers_of

    def answered(*request: Any) -> Mapping[str, Any]:
        answers.send("parser")
        found = parse(*request)
        answers.send("main")
        return found

    warm = _exit_code(form, Path(first))
    sandbox_main.answers_of = answered
    sandbox_main.apply(limit(form), _CPU_SECONDS)
    answers.send((*warm, 0, 0.0))
    while path := answers.recv():
        before, start = _reset_peak(), _cpu()
        code, text = _exit_code(form, Path(path))
        answers.send((code, text, _memory("VmHWM") - before, _cpu() - start))


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
