"""The hash chain of evidence and ledgers: each record contains the digest of the record before it."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

GENESIS = "0" * 64
"""Predecessor's digest in the first record."""


def canonical(content: object) -> bytes:
    """JSON with sorted keys and no spaces: equal contents give equal bytes. NaN and infinity raise `ValueError`."""
    return json.dumps(
        content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode()


def digest(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Link:
    """One record of a chain: its content, and the digest of the record before it."""

    previous: str
    content: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 over the predecessor's digest and the content."""
        return digest(canonical({"previous": self.previous, "content": self.content}))


def broken_at(links: Iterable[Link], previous: str = GENESIS) -> int | None:
    """Position of the first record whose `previous` is not the digest of the record before it; None if all match.

    The first record must contain `previous`, the digest of the record before these links.
    """
    for position, link in enumerate(links):
        if link.previous != previous:
            return position
        previous = link.digest
    return None
