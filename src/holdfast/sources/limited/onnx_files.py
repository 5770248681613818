"""Parses an `.onnx` file and runs it once, in onnxruntime and without torch."""

from collections.abc import Sequence
from pathlib import Path

from holdfast.sources.onnx.reading import read_onnx
from holdfast.sources.onnx.runtime import run, session, some_inputs

TRIED = 3
"""examples of the trial, where the file leaves the batch free"""


def read(
    path: Path, content: bytes | None, folder: Path, input_shape: Sequence[int] | None
) -> dict[str, object]:
    """Nothing, where the file can be parsed and run; else raises as `read_onnx`, `session` and `run` do."""
    assert content is not None, "the file is read once"
    file = read_onnx(path, input_shape, content=content)
    running = session(file.content, threads=1)
    batch = some_inputs(file.input.shape, file.input.dtype, file.input.shape[0] or TRIED)
    run(running, [output.name for output in running.get_outputs()], file.input.name, batch)
    return {}


def prepare() -> None:
    """Import the libraries before memory is limited."""
    try:
        import onnx
        import onnx.inliner
        import onnx.numpy_helper  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError:
        return  # said when the file is read
