"""The ledger of a pool as an authenticated log: its key, the form of its entries, and the file with its head."""

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from holdfast.core.chain import Link, canonical
from holdfast.core.errors import TargetError
from holdfast.rotation.pool.ledger_state import well_formed
from holdfast.runs.store.append_log import AppendLog, Head, LogForm, Take, equal
from holdfast.runs.store.encryption import Seal
from holdfast.runs.store.files import PRIVATE, refusal_in_pool, usable, write_atomically
from holdfast.runs.store.records import document, read_document

LEDGER, HEAD = "ledger.jsonl", "ledger.head"
WAY_OUT = "restore it from a copy; until then no set of this pool is served"
_PURPOSE = "pool ledger, schema 2"


def ledger_key(seal: Seal, pool: str) -> bytes:
    """Return the key that authenticates the ledger of a pool. It is derived from the encryption key and the id of the
    pool.
    """
    return seal.derived(_PURPOSE, pool)


def ledger_log(folder: Path, key: bytes | None, take: Take) -> AppendLog:
    """Return the ledger in the folder of a pool as a log. `take` receives each entry and its number.

    Without a `key`, only the public chain and the numbers are verified, and nothing can be added.
    """
    form = LogForm(well_formed, "entry", WAY_OUT, refusal_in_pool, authenticated=True, key=key)
    return AppendLog(folder / LEDGER, form, take, LedgerHead(folder / HEAD, key))


@dataclass(frozen=True)
class LedgerHead:
    """The file with the number and the digest of the last entry of a ledger, and an HMAC of both.

    Entries that are missing at the end of the ledger are detected by it. Without a `key`, the HMAC is not verified.
    """

    path: Path
    key: bytes | None

    def write(self, head: Head) -> None:
        """Replace the stored head. Raises `OSError`."""
        content = {"entries": head.entries, "digest": head.digest, "mac": self._mac(head)}
        write_atomically(self.path, document(content), PRIVATE)

    def read(self) -> Head | None:
        """Return the stored head, or None if the file does not exist. Raises `TargetError` if it was not written with
        the key of the pool.
        """
        with usable(self.path, refusal_in_pool):
            if not self.path.exists():
                return None
        content = read_document(self.path)
        # The content is not trusted yet: without the key the HMAC below is not verified.
        entries, digest = content.get("entries"), content.get("digest")
        if type(entries) is not int or entries < 1 or not isinstance(digest, str):
            raise TargetError(f"{str(self.path)!r} does not contain the head of a ledger; {WAY_OUT}")
        head = Head(entries, digest)
        if self.key is not None and not equal(content.get("mac"), self._mac(head)):
            raise TargetError(
                f"{str(self.path)!r} was not written with the pool's key: its HMAC is wrong, so it was changed, or "
                f"copied from another pool; {WAY_OUT}"
            )
        return head

    def refuse_shortened(self, head: Head | None, links: Sequence[Link]) -> None:
        """Raise `TargetError` if entries are missing at the end of a ledger, according to the stored `head`."""
        path = self.path.with_name(LEDGER)
        if head is None:
            if links:
                raise TargetError(
                    f"{str(self.path)!r} is missing, which contains the number of entries of {path.name}; restore both "
                    "from a copy; until then no set of this pool is served"
                )
        elif head.entries > max(len(links), 1):  # a first entry that a kill interrupted does not count
            raise TargetError(
                f"{str(path)!r} has {len(links)} entries, but {HEAD} records {head.entries}: entries at the end are "
                f"missing; {WAY_OUT}"
            )
        elif links and (digest := links[head.entries - 1].digest) != head.digest:
            raise TargetError(
                f"entry {head.entries} of {str(path)!r} has the digest {digest[:16]}…, but {HEAD} records "
                f"{head.digest[:16]}…: one of the two files is from another time or another pool; {WAY_OUT}"
            )

    def _mac(self, head: Head) -> str:
        assert self.key is not None, "the head is written with the key only"
        message = canonical({"kind": "head", "entries": head.entries, "digest": head.digest})
        return hmac.new(self.key, message, hashlib.sha256).hexdigest()
