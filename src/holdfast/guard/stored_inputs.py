"""Encrypted storage of the inputs on which a rule of the guard fired, with retention and deletion.

Each request is one file. Its name has the time, the pseudonym of the principal and the identifier of the request, so
that files are deleted by age and by principal without decrypting them.
"""

import json
import os
import re
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from holdfast.core.errors import TargetError, UsageError
from holdfast.guard.rules import RequestDecision
from holdfast.io.files import open_regular
from holdfast.runs.store.encryption import Seal
from holdfast.runs.store.files import PRIVATE, write_atomically

_SUFFIX = ".inputs"
_NAME = re.compile(rf"[0-9]{{12,}}-[0-9a-f]+-[^-]*\{_SUFFIX}")
_DAY_S = 86_400.0
_PURGE_EVERY = 100
"""number of stored requests after which expired ones are deleted"""


@dataclass(frozen=True)
class StoredRequest:
    """The stored inputs of one request."""

    request: str
    """identifier of the request, as in the audit chain"""
    time_s: float
    """time of the request in seconds since 1970"""
    x: Tensor
    """inputs (k, *shape) on which a rule fired, as the model received them"""
    rows: tuple[int, ...]
    """their positions in the request"""
    scores: tuple[dict[str, float], ...]
    """scores of each of them, by rule"""


@dataclass(eq=False)
class StoredInputs:
    """A folder with the encrypted inputs of flagged requests. Several processes may use one folder."""

    folder: Path
    seal: Seal
    retention_s: float = 30 * _DAY_S
    """seconds after which stored inputs are deleted"""
    max_bytes: int = 2**30
    """size of the folder above which the oldest inputs are deleted"""
    clock: Callable[[], float] = time.time
    failures: int = 0
    """number of requests that could not be stored"""
    _added: int = 0
    _lock: Lock = field(default_factory=Lock, repr=False)

    def __post_init__(self) -> None:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise TargetError(
                f"the folder {str(self.folder)!r} for inputs cannot be created: {error.strerror}; give another folder"
            ) from error
        self.purge()

    def add(self, decision: RequestDecision) -> bool:
        """Store the inputs of a request on which a rule fired, and return whether they could be stored. A full disk is
        counted in `failures`, and never fails the request.
        """
        rows = [k for k, row in enumerate(decision.rows) if any(score.fired for score in row.scores)]
        x = decision.x
        if not rows or x is None or not x.dim() or len(x) != len(decision.rows):
            return True  # a request without inputs has nothing to store
        scores = [{s.rule: s.value for s in decision.rows[k].scores} for k in rows]
        now = self.clock()
        x = x[rows].detach().cpu().contiguous()
        header = {
            "request": decision.request,
            "time_s": now,
            "rows": rows,
            "scores": [{name: repr(value) for name, value in row.items()} for row in scores],
            "dtype": str(x.dtype).removeprefix("torch."),
            "shape": list(x.shape),
        }
        content = json.dumps(header).encode() + b"\n" + x.view(torch.uint8).numpy().tobytes()
        name = f"{int(now):012d}-{self.pseudonym(decision.principal)}-{decision.request}{_SUFFIX}"
        try:
            write_atomically(self.folder / name, self.seal.seal(content, name), PRIVATE)
        except OSError:
            with self._lock:
                self.failures += 1
            return False
        with self._lock:
            self._added += 1
            due = self._added % _PURGE_EVERY == 0
        if due:
            self.purge()
        return True

    def read(self, *, newest_first: bool = False) -> Iterator[StoredRequest]:
        """Yield the stored requests, the oldest first or the newest first. Raises `TargetError` for a file that was
        changed.
        """
        for path in sorted(self._files(), reverse=newest_first):
            try:
                with os.fdopen(open_regular(path), "rb") as file:
                    content = file.read()
            except FileNotFoundError:  # deleted meanwhile by another process
                continue
            header, _, values = self.seal.open(content, path.name, path).partition(b"\n")
            yield _parsed(json.loads(header), values)

    def by_pseudonym(self) -> Counter[str]:
        """Return the number of stored requests by the pseudonym of their principal. No file is decrypted."""
        return Counter(path.name.split("-")[1] for path in self._files())

    def delete(self, *, principal: str | None = None, request: str | None = None) -> int:
        """Delete the stored inputs of a principal or of one request, and return the number of deleted requests."""
        if (principal is None) == (request is None):
            raise UsageError("delete() takes a principal or a request; give one of them")
        middle = None if principal is None else self.pseudonym(principal)
        return self._remove(
            path
            for path in self._files()
            if (middle == path.name.split("-")[1] if middle else path.name.endswith(f"-{request}{_SUFFIX}"))
        )

    def purge(self) -> int:
        """Delete expired inputs, and the oldest ones while the folder is too large. Return their number."""
        paths, oldest = self._files(), self.clock() - self.retention_s
        expired = [path for path in paths if int(path.name.split("-")[0]) < oldest]
        kept = paths[len(expired) :]
        sizes = [_size(path) for path in kept]
        excess, first = sum(sizes) - self.max_bytes, 0
        while excess > 0:
            excess -= sizes[first]
            first += 1
        return self._remove([*expired, *kept[:first]])

    def _files(self) -> list[Path]:
        """The stored files, the oldest first, without files of other names and links."""
        return sorted(path for path in self.folder.iterdir() if _NAME.fullmatch(path.name) and _is_file(path))

    def pseudonym(self, principal: str) -> str:
        """Return the pseudonym of a principal in the names of the files."""
        return self.seal.pseudonym(principal, "guard/principal")

    def _remove(self, paths: Iterator[Path] | list[Path]) -> int:
        removed = 0
        for path in paths:
            try:
                path.unlink()
            except FileNotFoundError:
                continue
            removed += 1
        return removed


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _parsed(header: dict[str, Any], values: bytes) -> StoredRequest:
    flat = torch.from_numpy(np.frombuffer(values, dtype=np.uint8).copy())
    x = flat.view(getattr(torch, header["dtype"])).view(header["shape"])
    scores = tuple({name: float(value) for name, value in row.items()} for row in header["scores"])
    return StoredRequest(header["request"], header["time_s"], x, tuple(header["rows"]), scores)
