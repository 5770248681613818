"""Models of files: functions from a list of `bytes` to scores, and ONNX files whose input is whole numbers."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.core.batch import decoded_files
from holdfast.core.errors import TargetError
from holdfast.core.names import kind_of
from holdfast.core.outputs import OutputKind
from holdfast.io.files import content_of_file, reason_of, refusing, sha256_of_file
from holdfast.io.models import estimators
from holdfast.io.models.adapting import TextFunction, refuse_no_model
from holdfast.io.onnx.opening import OnnxModel, open_onnx

CONFIG = "config.min.json"
"""File beside an ONNX model of magika that states how the model reads files."""
_MOST_BYTES = 1_000_000
_SIZES = ("beg_size", "mid_size", "end_size", "block_size", "padding_token")


class FileFunction(TextFunction):
    """A function from a list of `bytes`, the contents of files, to scores (n, classes)."""

    def inputs(self, x: Tensor) -> list[bytes]:
        """Return the files in the rows of `x`."""
        return decoded_files(x)

    def forward(self, x: Tensor) -> object:
        """Return the scores of the files in the rows of `x`. Raises `TargetError` if the function fails."""
        try:
            return super().forward(x)
        except (AttributeError, LookupError, OSError, TypeError, ValueError) as error:
            raise TargetError(
                f"the model was called with the contents of {len(x)} files, a list of bytes, and raised "
                f"{type(error).__name__}: {reason_of(error)}; if it takes paths, write each content to a temporary "
                "file in your function"
            ) from error

    def __deepcopy__(self, memo: dict[int, object]) -> "FileFunction":
        """Return the module itself, because a call of the function does not change it."""
        return self


def adapted_file_model(model: object) -> estimators.Adapted | None:
    """Return a model of files as a torch module whose inputs are rows of bytes. Return None if it is such a module
    already.
    """
    if isinstance(model, FileFunction):
        return None
    refuse_no_model(model)
    if not callable(model):
        raise TargetError(
            f"the model is {kind_of(model)}, and the inputs are files; a function from a list of bytes to scores "
            "(n, classes) was expected"
        )
    name = getattr(model, "__qualname__", type(model).__qualname__)
    embeds = isinstance(model, nn.Module) and any(
        isinstance(part, nn.Embedding) and part.num_embeddings >= 256 for part in model.modules()
    )
    if embeds:
        return estimators.Adapted(FileFunction(model), "gradients", "")
    hidden = f"{name} is called with files, and has no embedding of bytes with gradients"
    return estimators.Adapted(FileFunction(model), "scores", hidden)


@dataclass(frozen=True)
class Reading:
    """How a model reads a file: its first and its last bytes as whole numbers."""

    first: int
    """number of values from the beginning of the file"""
    last: int = 0
    """number of values from the end, which follow them"""
    padding: int | None = None
    """value in place of bytes that a short file lacks: after the first, and before the last bytes. None if short files
    are refused"""
    block: int | None = None
    """number of bytes at each end of a file of which whitespace at the outer end is left out; None if nothing is left
    out"""

    def values(self, content: bytes) -> list[int]:
        """Return the values of one file. Raises `TargetError` for a short file without a padding."""
        head = tail = content
        if self.block is not None:
            head, tail = content[: self.block].lstrip(), content[-self.block :].rstrip()
        head, tail = head[: self.first], tail[len(tail) - self.last :] if self.last < len(tail) else tail
        missing = (self.first - len(head)) + (self.last - min(len(tail), self.last))
        if missing and self.padding is None:
            raise TargetError(
                f"a file has {len(content):,} bytes, and the model reads {self.first + self.last:,}; leave out shorter "
                "files, or give FILE.py:FACTORY, where the factory returns a function from a list of bytes to scores "
                "that pads them as in the training of the model"
            )
        tail = tail if self.last else b""
        padding = self.padding or 0
        return [
            *head,
            *[padding] * (self.first - len(head)),
            *[padding] * (self.last - len(tail)),
            *tail,
        ]


class ReadFiles(nn.Module):
    """A network of whole numbers (n, length) that is called with the contents of files."""

    def __init__(self, net: nn.Module, reading: Reading) -> None:
        super().__init__()
        self.net, self.reading = net, reading

    def forward(self, contents: list[bytes]) -> Any:
        """Return the outputs of the network for files."""
        return self.net(torch.tensor([self.reading.values(content) for content in contents]))


def shortest_file(net: object) -> int:
    """Return the smallest number of bytes of a file that a network accepts, which is 1 for any function."""
    reads = net.model if isinstance(net, FileFunction) else None
    if not isinstance(reads, ReadFiles) or reads.reading.padding is not None:
        return 1
    return reads.reading.first + reads.reading.last


def reading_of(path: Path, length: int) -> tuple[Reading, tuple[str, ...] | None, tuple[str, ...]]:
    """Return how the ONNX model in a file reads `length` bytes, the names of its classes if they are known, and notes.

    A file `config.min.json` of magika beside the model states it. Without one, the model reads the first `length` bytes
    of a file, and shorter files are refused. Raises `TargetError` for a damaged file, and for one that states another
    length.
    """
    config_file = path.parent / CONFIG
    if not config_file.is_file():
        return Reading(length), None, (f"the model reads the first {length:,} bytes of each file",)
    content = content_of_file(config_file, "file of the model", most=_MOST_BYTES)
    with refusing(f"{str(config_file)!r} is not JSON", (ValueError, RecursionError)):
        config = json.loads(content)
    stated = config if isinstance(config, dict) else {}
    sizes = [size for name in _SIZES if type(size := stated.get(name)) is int and size >= 0]
    names = stated.get("target_labels_space")
    are_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if len(sizes) < len(_SIZES) or not are_names or not names:
        raise TargetError(
            f"{str(config_file)!r} does not state {', '.join(_SIZES)} and target_labels_space, as magika writes it; "
            "remove it if it is of another program"
        )
    first, middle, last, block, padding = sizes
    if middle or first + last != length:
        raise TargetError(
            f"{str(config_file)!r} states {first:,} first, {middle:,} middle and {last:,} last bytes, and the model "
            f"reads {length:,}; the middle must be 0, and the others together {length:,}"
        )
    note = (
        f"{CONFIG} states that the model reads the first {first:,} and the last {last:,} bytes of a file, without "
        f"whitespace at its ends; thresholds and other rules of magika are not applied"
    )
    return Reading(first, last, padding, block), tuple(names), (note,)


def open_onnx_of_files(path: Path) -> tuple[OnnxModel, tuple[str, ...], OutputKind | None]:
    """Return the ONNX model in a file whose input is whole numbers (n, length) as a model of files, notes on how it
    reads them, and the kind of its outputs if it is known.
    """
    graph = open_onnx(path, whole_numbers=True)
    (length,) = graph.example if len(graph.example) == 1 else (None,)
    if length is None:
        raise TargetError(
            f"{str(path)!r} has inputs of shape {graph.example}, and the inputs are files; whole numbers of shape "
            "(N, length) were expected"
        )
    reading, names, notes = reading_of(path, length)
    net = FileFunction(ReadFiles(graph.net, reading), sha256_of_file(path))
    names = names if names is not None and len(names) == graph.classes else graph.class_names
    return replace(graph, net=net, class_names=names), notes, None if reading.block is None else "probability"
