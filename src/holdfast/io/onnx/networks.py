"""Opens an ONNX network with one input and one output for verification: as a torch module and in onnxruntime."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from holdfast.core.errors import TargetError
from holdfast.io.limited.calling import read_under_limits
from holdfast.io.onnx.building import Unsupported
from holdfast.io.onnx.converting import convert, random_batch, refuse_unknown_operators
from holdfast.io.onnx.opening import LIMITS, TOLERANCES, Runtime
from holdfast.io.onnx.reading import OnnxFile, bytes_beside, onnx_content, read_onnx


@dataclass(frozen=True, eq=False)
class OnnxNetwork:
    """A network from an ONNX file, as a function of one flat input."""

    net: nn.Module
    """module from inputs (n, *example) to outputs, whose first dimension is n"""
    example: tuple[int, ...]
    """shape of one input of the module, without the batch"""
    input_shape: tuple[int, ...]
    """shape of the input in the file; a free batch size is 1"""
    output_shape: tuple[int, ...]
    """shape of the output in the file for one input"""
    dtype: np.dtype[Any]
    runtime: Callable[[NDArray[Any]], NDArray[Any]]
    """function that returns the output of onnxruntime for an input of the shape in the file"""


class _Each(nn.Module):
    """Wrapper of a network whose file has no batch dimension, or a fixed one; it treats the rows of a batch one by
    one.
    """

    def __init__(self, net: nn.Module, inner: tuple[int, ...]) -> None:
        super().__init__()
        self.net, self.inner = net, inner

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs for the rows of a batch."""

        def of_one(row: Tensor) -> Tensor:
            y: Tensor = self.net(row.reshape(self.inner))
            return y

        y: Tensor = torch.vmap(of_one)(x)
        return y


def open_network(path: Path) -> OnnxNetwork:
    """Return the network in an ONNX file, converted to torch and compared with onnxruntime.

    The whole input is one example, so that its first dimension has the size 1 or is free. Raises `TargetError` with the
    reason if the file cannot be converted: bounds need the operations of the network.
    """
    content = onnx_content(path)
    with read_under_limits(
        "onnx_files", path, LIMITS, content=content, n_bytes_beside=bytes_beside(path), input_shape=None
    ):
        pass  # it is opened here after that has gone well
    file = read_onnx(path, None, content=content)
    runtime = Runtime(file)
    if len(file.outputs) != 1 or len(runtime.outputs) != 1:
        raise TargetError(
            f"{str(path)!r} has the outputs {', '.join(runtime.kinds)}; one output of numbers was expected"
        )
    try:
        refuse_unknown_operators(file)
        net, example = _converted(file)
    except Unsupported as reason:
        raise TargetError(
            f"{str(path)!r} runs only in onnxruntime, because {reason} cannot be imported, and without its operations "
            "no bounds can be computed; export the network with other operators"
        ) from reason
    shape = tuple(size or 1 for size in file.input.shape)

    def run(x: NDArray[Any]) -> NDArray[Any]:
        y: NDArray[Any] = runtime.session.run(
            runtime.outputs, {file.input.name: x.reshape(shape).astype(file.input.dtype)}
        )[0]
        return y

    _compare_network(net, example, file, run, path)
    output = run(np.zeros(shape, file.input.dtype))
    return OnnxNetwork(net, example, shape, output.shape, file.input.dtype, run)


def _converted(file: OnnxFile) -> tuple[nn.Module, tuple[int, ...]]:
    """The module of a file, and the shape of one of its inputs."""
    shape = file.input.shape
    one_row = bool(shape) and shape[0] in (None, 1)
    sizes = tuple(size or 1 for size in shape)
    if one_row:
        try:
            return convert(file, file.outputs[0], batch_size=None), sizes[1:]
        except Unsupported:
            if shape[0] is None:
                raise
    inner = convert(file, file.outputs[0], batch_size=sizes[0] if sizes else 1)
    return _Each(inner, sizes), sizes[1:] if one_row else sizes


def _compare_network(
    net: nn.Module,
    example: tuple[int, ...],
    file: OnnxFile,
    run: Callable[[NDArray[Any]], NDArray[Any]],
    path: Path,
) -> None:
    """Raise an error if the module and onnxruntime differ on random inputs."""
    size = math.prod(example)
    rows = random_batch(file, file.input.shape[0] or 1).flatten()[:size]
    x = torch.stack((rows, 2 * rows - 1)).reshape(2, *example)
    with torch.no_grad():
        imported = net(x).flatten(1).numpy()
    reference = np.stack([run(row.numpy()).reshape(-1) for row in x])
    difference = float(np.abs(imported - reference).max()) if imported.shape == reference.shape else math.inf
    allowed = TOLERANCES[file.input.dtype.name] * max(1.0, float(np.abs(reference).max()))
    if not difference <= allowed:  # a NaN is a difference too
        raise TargetError(
            f"{str(path)!r}: the import differs from onnxruntime by {difference:.3g}; at most {allowed:.3g} was "
            "expected. Please report the model's operators"
        )
