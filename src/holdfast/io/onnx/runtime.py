"""Runs models in onnxruntime. The module does not import torch, so that a process that only runs a file starts fast."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdfast.core.errors import TargetError, importing

MISSING = "an .onnx model is opened with packages that are missing"


def session(content: bytes, threads: int) -> Any:
    """Return an onnxruntime session of a model on the CPU. Raises `TargetError` if onnxruntime rejects the model."""
    onnxruntime = importing("onnxruntime", MISSING, "onnx")
    options = onnxruntime.SessionOptions()
    # Only fatal errors: onnxruntime would print warnings to the terminal besides the exception that is reported here.
    options.log_severity_level = 4
    # By default onnxruntime uses all cores, also in each of several worker processes.
    options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common public class
        raise TargetError(
            f"onnxruntime rejects the model: {_first_line(error)}. Export it in float32, and from scikit-learn with "
            "options={'zipmap': False}"
        ) from error


def run_session(running: Any, outputs: list[str], name: str, batch: NDArray[Any]) -> list[NDArray[Any]]:
    """Return the outputs of an onnxruntime session on a batch (n, *features). Raises `TargetError` if onnxruntime
    rejects the batch.

    `name` is the name of the input, and `outputs` lists the names of the outputs.
    """
    try:
        outputs_of_batch: list[NDArray[Any]] = running.run(outputs, {name: batch})
    except Exception as error:  # as above
        raise TargetError(
            f"onnxruntime rejects inputs of shape {batch.shape}: {_first_line(error)}; check the shape of the data"
        ) from error
    return outputs_of_batch


def some_inputs(shape: tuple[int | None, ...], dtype: np.dtype[Any], n: int) -> NDArray[Any]:
    """Return `n` random inputs in [0, 1) with the given shape. Sizes that the model leaves open are 1. The inputs are
    the same in every call.
    """
    sizes = [n, *(size or 1 for size in shape[1:])]
    return np.random.default_rng(n).random(sizes, np.float32).astype(dtype)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
