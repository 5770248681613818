"""Sessions of onnxruntime. They need no torch, so that the process that tries a file first starts fast."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdfast.core.errors import TargetError, UsageError


def session(content: bytes, threads: int) -> Any:
    """A session of onnxruntime on the CPU; `TargetError` where it refuses the model."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError('opening an .onnx model needs pip install "holdfast[onnx]"') from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors share no class that is public
        raise TargetError(
            f"onnxruntime refuses the model: {_first_line(error)}. Export it in float32, and from scikit-learn with "
            "options={'zipmap': False}"
        ) from error


def run(running: Any, outputs: list[str], name: str, batch: NDArray[Any]) -> list[NDArray[Any]]:
    """The outputs of a session on a batch (n, *features); `TargetError` where it refuses the batch."""
    try:
        found: list[NDArray[Any]] = running.run(outputs, {name: batch})
    except Exception as error:  # as above
        raise TargetError(
            f"onnxruntime refuses inputs of shape {batch.shape}: {_first_line(error)}"
        ) from error
    return found


def some_inputs(shape: tuple[int | None, ...], dtype: np.dtype[Any], n: int) -> NDArray[Any]:
    """`n` examples in [0, 1), one size wherever the shape leaves it free; the same ones each time."""
    sizes = [n, *(size or 1 for size in shape[1:])]
    return np.random.default_rng(n).random(sizes, np.float32).astype(dtype)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
