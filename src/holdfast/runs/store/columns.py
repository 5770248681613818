"""Reads and writes column files: safetensors files with the columns of a stage, and metadata as sorted JSON. Equal
columns give equal bytes.

The JSON contains a digest of the columns, so a truncated or altered file is detected without other files.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.core.chain import canonical, digest
from holdfast.core.errors import TargetError
from holdfast.runs.store.files import content_of, usable, write_atomically

if TYPE_CHECKING:  # torch is imported when a file is read or written, not for the ledger of a pool alone
    from torch import Tensor

    from holdfast.core.evidence import Columns

SUFFIX = ".safetensors"
_KEY = "holdfast"
_VERSION = 1


@dataclass(frozen=True)
class ColumnFile:
    """The content of a column file: the columns of a stage, and metadata."""

    columns: "dict[str, Tensor]"
    about: Mapping[str, Any] = field(default_factory=dict)
    """metadata that were passed to `encode`"""
    digest: str = ""
    """SHA-256 of the bytes of the file, in hex"""


def encode(columns: "Columns", about: Mapping[str, Any]) -> bytes:
    """Return the bytes of a column file with the given columns and metadata. Equal content gives equal bytes."""
    from safetensors.torch import save

    tensors = {name: values.clone() for name, values in sorted(_plain(columns).items())}
    metadata = {"schema_version": _VERSION, "about": dict(about), "columns": content_digest(tensors)}
    return save(tensors, metadata={_KEY: canonical(metadata).decode()})


def decode(data: bytes, name: str) -> ColumnFile:
    """Return the content of a column file from its bytes. Raises `TargetError`, which contains `name`, if the bytes
    were altered.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = json.loads(header["__metadata__"][_KEY])
        tensors = load(data)
        version, expected, about = metadata["schema_version"], metadata["columns"], metadata["about"]
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TargetError(
            f"{name!r} is not a column file, or is truncated: {error}; restore it from a copy"
        ) from error
    if version != _VERSION:
        raise TargetError(
            f"{name!r} has schema version {version}; this version reads {_VERSION}. Install the holdfast that wrote it"
        )
    if content_digest(tensors) != expected:
        raise TargetError(f"{name!r} was changed after it was written; restore it from a copy")
    return ColumnFile(tensors, about, digest(data))


def write(path: Path, columns: "Columns", about: Mapping[str, Any]) -> str:
    """Write a column file atomically, and return its SHA-256 in hex."""
    data = encode(columns, about)
    with usable(path):
        write_atomically(path, data)
    return digest(data)


def read(path: Path) -> ColumnFile:
    """Return the content of a column file, after verification of the digest that the file contains."""
    return decode(content_of(path), str(path))


def content_digest(tensors: "Mapping[str, Tensor]") -> str:
    """Return the SHA-256 of the names, types, shapes and values of tensors, in hex."""
    import torch

    sha = hashlib.sha256()
    for name, values in sorted(_plain(tensors).items()):
        sha.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        sha.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _plain(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    return {name: values.detach().cpu().contiguous() for name, values in tensors.items()}
