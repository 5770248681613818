"""Reads and writes the lines of the ledger of a pool. The entries form a public hash chain, and each is authenticated
with a key that is derived from the key of the pool.

A line contains the entry, the digests of the chain, a counter, and an HMAC-SHA-256 (RFC 2104) over the entry, the
counter and the digest of the entry before. `ledger.head` contains the number and the digest of the last entry,
authenticated in the same way, so that entries missing at the end of the ledger are detected. An older copy of both
files is not detected; see `Head`.
"""

import hashlib
import hmac
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.core.chain import GENESIS, Link, canonical
from holdfast.core.errors import TargetError
from holdfast.runs.store.encryption import Seal
from holdfast.runs.store.files import PRIVATE, refusal_in_pool, usable, write_atomically
from holdfast.runs.store.records import FIELDS, document, read_document, read_links, record_lines

HEAD = "ledger.head"
WAY_OUT = "restore it from a copy; until then no set of this pool is served"
_PURPOSE = "pool ledger, schema 2"
_FIELDS = FIELDS | {"counter", "mac"}


@dataclass(frozen=True)
class Head:
    """The number and the digest of the last entry of the ledger of a pool.

    A copy of it that is stored elsewhere identifies the ledger up to that entry: an older copy of the whole folder does
    not contain the entry.
    """

    entries: int
    """number of the entry, from 1"""
    digest: str
    """digest of the entry in the chain, 64 hex digits"""


@dataclass(frozen=True)
class LedgerKey:
    """The key that authenticates the entries of the ledger of a pool."""

    key: bytes = field(repr=False)

    @classmethod
    def of(cls, seal: Seal, pool: str) -> "LedgerKey":
        """Return the key that authenticates the ledger of a pool. It is derived from the encryption key and the id of
        the pool.
        """
        return cls(seal.derived(_PURPOSE, pool))

    def of_entry(self, counter: int, link: Link) -> str:
        """Return the HMAC of a ledger entry, its position and the digest of the previous entry, in hex."""
        return self._mac(
            {"kind": "entry", "counter": counter, "previous": link.previous, "content": link.content}
        )

    def of_head(self, head: Head) -> str:
        """Return the HMAC of the number and the digest of the last ledger entry, in hex."""
        return self._mac({"kind": "head", "entries": head.entries, "digest": head.digest})

    def _mac(self, message: Mapping[str, Any]) -> str:
        return hmac.new(self.key, canonical(message), hashlib.sha256).hexdigest()


def authenticated_line(link: Link, counter: int, key: LedgerKey) -> bytes:
    """Return a ledger entry as a line of the ledger file, with its counter and its HMAC."""
    record = {"content": link.content, "previous": link.previous, "digest": link.digest}
    return canonical({**record, "counter": counter, "mac": key.of_entry(counter, link)}) + b"\n"


def read_entries(
    path: Path,
    lines: bytes,
    check: Callable[[Mapping[str, Any]], None],
    key: LedgerKey | None,
    *,
    previous: str = GENESIS,
    first: int = 1,
) -> list[Link]:
    """Return the entries in the complete lines of the ledger of a pool, after verification.

    The first entry must have the number `first`, and `previous` is the digest of the entry before it. Without a `key`,
    only the public chain and the counters are verified. `check` raises a `ValueError`, `KeyError` or `TypeError` for an
    invalid entry. Raises `TargetError` with the number of the first invalid entry.
    """
    records = [_record(line) for line in record_lines(lines)]
    for position, record in enumerate(records, first):
        if record is not None and not {"counter", "mac"} <= record.keys():
            raise TargetError(
                f"entry {position} of {str(path)!r} has no authentication, which this format requires; {WAY_OUT}"
            )
    # The public chain is checked first, so that a damaged entry is reported as damaged and not as a wrong HMAC.
    links = read_links(
        path, lines, check, previous=previous, first=first, fields=_FIELDS, noun="entry", way_out=WAY_OUT
    )
    for position, (link, record) in enumerate(zip(links, records, strict=True), first):
        assert record is not None
        # `type(...) is int`, because True equals 1.
        if record["counter"] != position or type(record["counter"]) is not int:
            raise TargetError(
                f"entry {position} of {str(path)!r} has the counter {record['counter']!r}; {position} was expected: "
                f"entries were removed, added or moved; {WAY_OUT}"
            )
        if key is not None and not _equal(record["mac"], key.of_entry(position, link)):
            raise TargetError(
                f"entry {position} of {str(path)!r} was not written with the pool's key: its HMAC is wrong, so it was "
                f"changed, or copied from another ledger; {WAY_OUT}"
            )
    return links


def _record(line: bytes) -> dict[str, Any] | None:
    """A line as an object; None if it is none, which `read_links` refuses."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _equal(actual: object, expected: str) -> bool:
    """Compare in constant time, so that the time of a comparison reveals nothing about the expected HMAC."""
    return isinstance(actual, str) and hmac.compare_digest(
        actual.encode("utf-8", "replace"), expected.encode()
    )


# --- the head


def write_head(path: Path, head: Head, key: LedgerKey) -> None:
    """Write the number and the digest of the last ledger entry to a file, with an HMAC. Raises `OSError`."""
    content = {"entries": head.entries, "digest": head.digest, "mac": key.of_head(head)}
    write_atomically(path, document(content), PRIVATE)


def read_head(path: Path, key: LedgerKey | None) -> Head | None:
    """Return the number and the digest of the last ledger entry from the file that stores them, or None if the file
    does not exist.

    Raises `TargetError` if the head was not written with the key of the pool.
    """
    with usable(path, refusal_in_pool):
        if not path.exists():
            return None
    content = read_document(path)
    # The content is not trusted yet: without the key the HMAC below is not verified.
    entries, digest = content.get("entries"), content.get("digest")
    if type(entries) is not int or entries < 1 or not isinstance(digest, str):
        raise TargetError(f"{str(path)!r} does not contain the head of a ledger; {WAY_OUT}")
    head = Head(entries, digest)
    if key is not None and not _equal(content.get("mac"), key.of_head(head)):
        raise TargetError(
            f"{str(path)!r} was not written with the pool's key: its HMAC is wrong, so it was changed, or copied from "
            f"another pool; {WAY_OUT}"
        )
    return head


def refuse_shortened(path: Path, head: Head | None, digests: list[str]) -> None:
    """Raise `TargetError` if entries at the end of a ledger are missing, according to its `head` file. `digests` are
    the digests of the entries that exist.
    """
    if head is None:
        if digests:
            raise TargetError(
                f"{str(path.with_name(HEAD))!r} is missing, which contains the number of entries of {path.name}; "
                "restore both from a copy; until then no set of this pool is served"
            )
    elif head.entries > max(len(digests), 1):  # a first entry that a kill interrupted does not count
        raise TargetError(
            f"{str(path)!r} has {len(digests)} entries, but {HEAD} records {head.entries}: entries at the end are "
            f"missing; {WAY_OUT}"
        )
    elif digests and digests[head.entries - 1] != head.digest:
        raise TargetError(
            f"entry {head.entries} of {str(path)!r} has the digest {digests[head.entries - 1][:16]}…, but {HEAD} "
            f"records {head.digest[:16]}…: one of the two files is from another time or another pool; {WAY_OUT}"
        )
