"""Tests in a limited process that an `.onnx` file can be parsed and run on one and on three inputs, with onnxruntime
and without torch.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from holdfast.core.errors import TargetError
from holdfast.io.onnx.reading import read_onnx, run_session, session, some_inputs
from holdfast.io.sandbox.sandbox_main import is_out_of_memory

TRIED = (3, 1)
"""Numbers of examples of the trials, if the batch size is free."""


def read(
    path: Path,
    content: bytes | None,
    folder: Path,
    input_shape: Sequence[int] | None,
    constants: Mapping[str, float],
    *,
    whole_numbers: bool,
    texts: bool,
    columns: Mapping[str, Sequence[str]] | None,
) -> dict[str, object]:
    """Test that an `.onnx` file can be parsed and run. Return an empty dictionary if this is possible.

    Raises the errors of `read_onnx`, `session` and `run_session`.
    """
    assert content is not None, "the file is read once"
    kinds = {"whole_numbers": whole_numbers, "texts": texts}
    file = read_onnx(path, input_shape, content=content, constants=constants, columns=columns, **kinds)
    running = session(file.content, threads=1)
    outputs = [output.name for output in running.get_outputs()]
    for k, n in enumerate(TRIED if file.input.shape[0] is None else (file.input.shape[0],)):
        batch = some_inputs(file.input, n)
        try:
            run_session(running, outputs, file, batch)
        except TargetError as error:
            if k == 0 or is_out_of_memory(error.__cause__):
                raise
    return {}


def prepare() -> None:
    """Import the libraries that read ONNX files, before the memory of the process is limited."""
    with suppress(ImportError):  # reported when the file is read
        import onnx
        import onnx.inliner
        import onnx.numpy_helper  # noqa: F401
        import onnxruntime  # noqa: F401
