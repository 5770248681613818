"""The stateful query detector as a rule of the guard, and the key of its fingerprints."""

import hashlib
import hmac
import os
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from holdfast.core.errors import HoldfastError, TargetError, UsageError
from holdfast.core.normalisation import per_channel
from holdfast.guard.detectors.queries import QueryDetector
from holdfast.guard.guard import QueryResult
from holdfast.guard.rules import InputSchema
from holdfast.io.files import open_regular
from holdfast.runs.store.encryption import KEY_BYTES
from holdfast.runs.store.files import create_private

KEY_VARIABLE = "HOLDFAST_GUARD_KEY"
"""environment variable with the key of a guard; it takes precedence over the key file"""
_HEX = re.compile(f"[0-9a-fA-F]{{{2 * KEY_BYTES}}}")


@dataclass(frozen=True)
class QueryRule:
    """A query detector that receives inputs in the range of the schema, scaled to [0, 1]."""

    detector: QueryDetector
    schema: InputSchema
    clock: Callable[[], float] = time.time
    """function that returns the time in seconds"""

    def score(self, x: Tensor, principals: Sequence[str], sent: Tensor | None = None) -> QueryResult:
        """Return the scores (n) of queries (n, *shape), and add them to the state. `sent` are the queries as they were
        sent, if `x` was rounded.
        """
        result = self.detector.examine(
            scaled(x, self.schema), principals, self.clock(), x if sent is None else sent
        )
        lost = any(detail.lost for detail in result.details)
        return QueryResult(torch.from_numpy(result.scores), self.detector.state.fail if lost else None)


def scaled(x: Tensor, schema: InputSchema) -> Tensor:
    """Return inputs scaled from the range of the schema to [0, 1], in float32."""
    x = x.float()
    if schema.low == (0.0,) and schema.high == (1.0,):
        return x
    low, high = (per_channel(ends, x) for ends in (schema.low, schema.high))
    return (x - low) / (high - low)


def guard_key(path: Path | None) -> bytes:
    """Return the key of a guard from the environment or from its key file, which is written if it does not exist.

    The key file is that of the settings with the ending `.key`. Without a file of settings the key is random, and lost
    with the process. Raises `TargetError` if other users may read the file or if it contains no key, and
    `UsageError` for an invalid key in the environment.
    """
    text = os.environ.get(KEY_VARIABLE)
    if text is not None:
        return _parsed(text, KEY_VARIABLE, UsageError)
    if path is None:
        return secrets.token_bytes(KEY_BYTES)
    file = key_file_of_guard(path)
    try:
        if not os.path.lexists(file):
            create_private(file, secrets.token_hex(KEY_BYTES).encode() + b"\n")
        with os.fdopen(
            open_regular(file, follow=True), "rb"
        ) as opened:  # the file that is tested is the one that is read
            mode = os.fstat(opened.fileno()).st_mode & 0o777
            text = opened.read(1024).decode("ascii", "replace").strip()
    except FileExistsError:  # another process was faster
        return guard_key(path)
    except OSError as error:
        raise TargetError(
            f"the key of the guard {str(file)!r} cannot be read or written: {error.strerror}; set {KEY_VARIABLE}"
        ) from error
    if os.name != "nt" and mode & 0o077:
        raise TargetError(
            f"{str(file)!r} has mode {mode:04o}, so that other users can read the key; run chmod 600 on it, or remove "
            "it and the state of the query detector for a new key"
        )
    return _parsed(text, repr(str(file)), TargetError)


def key_file_of_guard(path: Path) -> Path:
    """Return the path of the key file of a guard whose settings are in `path`."""
    return path.with_suffix(".key")


def derived_key(key: bytes, purpose: str) -> bytes:
    """Return a key for one purpose, from which neither the key of the guard nor keys of other purposes follow."""
    return hmac.new(key, f"holdfast guard {purpose}".encode(), hashlib.sha256).digest()


def _parsed(text: str, source: str, error: type[HoldfastError]) -> bytes:
    if not _HEX.fullmatch(text):
        raise error(
            f"{source} contains {len(text)} characters that are not a key; {2 * KEY_BYTES} hex digits were expected, "
            f'as python -c "import secrets; print(secrets.token_hex({KEY_BYTES}))" generates them'
        )
    return bytes.fromhex(text)
