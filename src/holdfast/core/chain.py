"""The hash chain that evidence and ledgers share: each record names the digest of the one before it."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

GENESIS = "0" * 64
"""What the first record names as its predecessor."""


def canonical(content: object) -> bytes:
    """JSON with sorted keys and no spaces: the same content, the same bytes. NaN and infinity are refused."""
    return json.dumps(
        content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode()


def digest(data: bytes) -> str:
    """SHA-256 in hex."""
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
    """Position of the first record that does not follow from the one before it; None if the chain holds.

    The first must follow from `previous`, the digest of what went before these links.
    """
    for position, link in enumerate(links):
        if link.previous != previous:
            return position
        previous = link.digest
    return None
