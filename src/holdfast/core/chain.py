"""The hash chain of evidence and ledgers: each record contains the digest of the record before it."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from holdfast.core.errors import UsageError

GENESIS = "0" * 64
"""value of the previous digest in the first record of a chain"""

_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def canonical(content: object) -> bytes:
    """Return `content` as JSON with sorted keys and no spaces, so that equal contents give equal bytes.

    Raises `ValueError` for NaN and infinity.
    """
    return _ENCODER.encode(content).encode()


def digest(data: bytes) -> str:
    """Return the SHA-256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def refuse_malformed_head(expected: str, command: str) -> None:
    """Raise `UsageError` if a text that a user gave as the head of a hash chain does not have the form of one.

    The head is the digest of the last record: 64 lower-case hexadecimal digits. An empty text is accepted, because no
    head is then compared. `command` is the command line that prints the head; the error names it.
    """
    if expected and not re.fullmatch("[0-9a-f]{64}", expected):
        raise UsageError(
            f"the expected head is {expected[:80]!r}, which is not the head of a chain; 64 hex digits were expected, "
            f"as printed by {command}"
        )


@dataclass(frozen=True)
class Link:
    """One record of a hash chain: its content, and the digest of the previous record."""

    previous: str
    content: Mapping[str, Any]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the digest of the previous record and the content of this record, in hexadecimal."""
        return digest(canonical({"previous": self.previous, "content": self.content}))
