"""A pool of parameter sets for a rotation. Each set is encrypted on the disk, and a ledger records its state.

`pool.json` describes the sets and the key, `sets/<name>.sealed` contain the parameters, and `ledger.jsonl` and
`ledger.head` the states. All files are secret: folders have mode 0700, files 0600.

Every step may be interrupted by a kill, and is valid once its entry is in the ledger. A set is written as
`….sealed.new`, entered in the ledger, and renamed. The next process that opens the pool deletes a new file without an
entry, and renames one with an entry. A kill never leaves a file with its final name and without an entry; such a file
means that the ledger was truncated, and the pool is refused.
"""

import json
import secrets
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.core.chain import canonical, digest
from holdfast.core.errors import Inconclusive, TargetError, UsageError
from holdfast.rotation.ledger import (
    HEAD,
    LOCK,
    NEW,
    SCHEMA_VERSION,
    SEALED,
    SETS,
    Ledger,
    bound,
    ledger_key,
    open_manifest,
    opened_set,
    refuse_begun,
    refuse_no_set,
    refuse_other_files,
    refuse_other_head,
    refuse_other_manifest,
    refuse_unserialisable,
    unsealed,
)
from holdfast.rotation.ledger_state import Role, Serving, SetRecord
from holdfast.runs.store import columns as column_files
from holdfast.runs.store.columns import ColumnFile, content_digest
from holdfast.runs.store.encryption import Seal, existing_seal, new_seal, refuse_unready
from holdfast.runs.store.files import (
    PART,
    POOL_MANIFEST,
    PRIVATE,
    flush_folder,
    refusal_in_pool,
    usable,
    write_atomically,
)
from holdfast.runs.store.folder import document
from holdfast.runs.store.leases import locked

if TYPE_CHECKING:
    from torch import Tensor

NAME_DIGITS = 16
"""Number of hex digits in the name of a set, which are the first digits of its digest."""


class Pool:
    """An open pool of parameter sets. Several processes may use one pool at the same time."""

    def __init__(self, path: Path, manifest: Mapping[str, Any], seal: Seal, ledger: Ledger) -> None:
        self.path, self.manifest, self.seal, self.ledger = path, manifest, seal, ledger
        self._metadata: dict[str, Mapping[str, Any]] = {}  # metadata of opened sets, which never change

    @classmethod
    def create(cls, path: Path, about: Mapping[str, Any]) -> "Pool":
        """Create a pool in a folder and return it. The folder may contain other files. `about` is metadata that
        describes the parameter sets.

        The key is that in the environment; if there is none, a new one is written next to the folder. See
        `pool.seal.source`.
        """
        refuse_unready()
        refuse_unserialisable(about)
        if path.is_dir():
            refuse_begun(path)
        with usable(path, refusal_in_pool):
            (path / SETS).mkdir(parents=True, exist_ok=True)
            for folder in (path, path / SETS):
                folder.chmod(0o700)
        file = path / POOL_MANIFEST
        with locked(path / LOCK):
            refuse_begun(path)
            seal = new_seal(path)
            identity = {"schema_version": SCHEMA_VERSION, "id": secrets.token_hex(8), "key": seal.id}
            manifest: dict[str, Any] = json.loads(canonical({**identity, "about": about}))
            with usable(file, refusal_in_pool):
                write_atomically(file, document(manifest), PRIVATE)
            ledger = Ledger.create(path, ledger_key(seal, manifest["id"]), digest(document(manifest)))
        return cls(path, manifest, seal, ledger)

    @classmethod
    def open(cls, path: Path, *, expect_head: str = "") -> "Pool":
        """Open the existing pool in a folder and return it. Raises `TargetError` if its key, its ledger or a required
        set is invalid.

        `expect_head` is an earlier head of the ledger, which the ledger must contain; empty for none.
        """
        manifest = open_manifest(path)
        seal = existing_seal(path)
        seal.refuse_other(manifest["key"], path / POOL_MANIFEST)
        ledger = Ledger(path, ledger_key(seal, manifest["id"]))
        refuse_other_manifest(path, manifest, ledger.manifest)
        refuse_other_head(path, expect_head, ledger.entry_of)
        pool = cls(path, manifest, seal, ledger)
        pool._recover()
        return pool

    @property
    def shown(self) -> str:
        """Path of the folder of the pool, quoted for a shell."""
        return shlex.quote(str(self.path))

    @contextmanager
    def alone_at(self, step: str) -> Iterator[None]:
        """Context manager in which no other process performs the same step of the rotation. Raises `InUse` immediately
        if one does.
        """
        where = f"another process runs {step} in {str(self.path)!r}"
        in_use = f"{where}; wait until it ends or stop it, then start again"
        with locked(self.path / f"{step}.lock", 0.0, in_use=in_use):
            yield

    # --- sets

    def add(
        self,
        weights: "Mapping[str, Tensor]",
        about: Mapping[str, Any],
        *,
        bases: Sequence[str] = (),
        why: str = "",
        role: Role = "service",
    ) -> str:
        """Add a parameter set to the pool, as a candidate or as a base that never serves. Return its name, which
        consists of the first digits of its digest.

        If the pool contains the set already, it is not added again, and its metadata and state do not change. Raises
        `UsageError` if the set was deleted.
        """
        refuse_no_set(weights)
        refuse_unserialisable(about)
        set_digest = content_digest(weights)
        name = set_digest[:NAME_DIGITS]
        content, path = column_files.encode(weights, about), self._path(name)
        new_file, sealed = (
            path.with_name(path.name + NEW),
            self.seal.seal(content, bound(self.manifest["id"], f"{SETS}/{name}")),
        )
        # Under the lock, so that two processes that add the same set write one entry.
        with self.ledger.alone(), usable(new_file, refusal_in_pool):
            existing = self._member(name)
            if existing is not None and (existing.deleted or existing.digest != set_digest):
                raise UsageError(f"{name!r} was deleted, or is the name of another set; draw another set")
            if existing is not None and self._has_file(path):
                return name
            try:
                write_atomically(new_file, sealed, PRIVATE)
                if existing is None:
                    self.ledger.candidate(name, set_digest, bases, why, role=role)
            except (OSError, TargetError, UsageError):
                with suppress(OSError):  # free space on a full disk
                    new_file.unlink(missing_ok=True)
                raise
            self._rename_new(path)
        return name

    def weights(self, name: str) -> "dict[str, Tensor]":
        """Return the decrypted parameters and buffers of a set, by the names of the tensors."""
        return self._opened(name).columns

    def about(self, name: str) -> Mapping[str, Any]:
        """Return the metadata that was stored with a parameter set."""
        if name not in self._metadata or self.ledger.member(name).deleted:
            self._metadata[name] = self._opened(name).about
        return self._metadata[name]

    def delete(self, name: str, why: str = "") -> None:
        """Delete the parameters of a set that does not serve, does not wait to serve and is not stolen. Its ledger
        entries remain.
        """
        with self.ledger.alone():
            # The entry comes before the file is deleted, so that a missing file without an entry always means damage.
            self.ledger.delete(name, why)
            with usable(self._path(name), refusal_in_pool):
                self._path(name).unlink(missing_ok=True)

    # --- states of sets

    @property
    def serving(self) -> Serving | None:
        """The serving set of the pool, or None if no set serves."""
        return self.ledger.serving

    @property
    def ahead(self) -> tuple[str, ...]:
        """Names of the admitted sets that wait to serve and are not stolen, in the order of their admission."""
        return self.ledger.ahead

    def admit(self, name: str, why: str = "", *, canary: str = "", against: Sequence[str] = ()) -> None:
        """Record that a candidate is admitted, or that an admitted set was assessed again and remains admitted.

        `canary` is the fingerprint of the answers of the set to known inputs, which is verified when the set is loaded.
        `against` are the stolen sets against which it was judged; it may serve only as long as there are no others.
        """
        self.ledger.admit(name, why, canary=canary, against=against)

    def refuse(self, name: str, why: str) -> None:
        """Record that a candidate, or an admitted set that waits to serve, is refused."""
        self.ledger.refuse(name, why)

    @property
    def candidates(self) -> tuple[str, ...]:
        """Names of the sets that are neither admitted nor refused and may serve, in the order in which they were
        added.
        """
        waiting = (
            member for member in self.ledger.members if member.state == "candidate" and member.exposed is None
        )
        return tuple(member.name for member in waiting if not member.deleted)

    @property
    def unjudged(self) -> tuple[str, ...]:
        """Names of the admitted sets that wait to serve, but were not assessed against all stolen sets."""
        return self.ledger.unjudged

    def serve(self, name: str, why: str = "", *, unjudged: bool = False) -> Serving:
        """Make an admitted set with a valid file the serving set, and retire the previous serving set, in a single
        ledger entry.

        Raises `UsageError` for a set that was not judged against all stolen sets, unless `unjudged`.
        """
        with self.ledger.alone():
            self.ledger.member(name)
            # Decrypted and checked before the entry is written: a set with a damaged file must not serve.
            self._opened(name)
            return self.ledger.serve(name, why, unjudged=unjudged)

    def swap(
        self,
        *,
        epoch: int | None = None,
        why: str = "",
        choose: Callable[[Sequence[str]], str] = itemgetter(0),
        unjudged: bool = False,
    ) -> Serving:
        """Make an admitted set that waits the serving set: the first one, or the one that the function `choose`
        returns.

        `choose` receives the names of the waiting sets that were judged against all stolen sets; if there are none and
        `unjudged` is true, those of the other waiting sets. With `epoch`, the swap takes place only if that epoch is
        current, so that two processes with the same trigger swap only once. After a kill, either the old or the new set
        serves. Raises `Inconclusive`, and changes nothing, if no such set waits.
        """
        with self.ledger.alone():
            serving = self.serving
            if epoch is not None and serving is None:
                raise Inconclusive(
                    f"epoch {epoch} has ended, and no set serves in {str(self.path)!r}; swap without an epoch"
                )
            if epoch is not None and serving is not None and serving.epoch != epoch:
                return serving
            unjudged_names = self.unjudged
            waiting = [name for name in self.ahead if name not in unjudged_names] or (
                list(unjudged_names) if unjudged else []
            )
            if not waiting:
                serving_text = "no set serves yet" if serving is None else f"{serving.name!r} still serves"
                raise Inconclusive(self._none_waits(serving_text, len(unjudged_names)))
            return self.serve(choose(waiting), why, unjudged=unjudged)

    def _none_waits(self, serving_text: str, unjudged: int) -> str:
        if not unjudged:
            admit = f"judge the drawn sets with holdfast rotate admit {self.shown}"
            way_out = admit if self.candidates else "draw and admit more sets"
            return f"{str(self.path)!r} contains no waiting admitted set, so {serving_text}; {way_out}"
        return (
            f"no waiting set in {str(self.path)!r} was judged against all stolen sets ({unjudged} were admitted before "
            f"the last theft was listed), so {serving_text}; judge them with holdfast rotate admit {self.shown}, or "
            f"use one without that with holdfast rotate swap {self.shown} --unjudged"
        )

    def retire(self, name: str, why: str = "") -> None:
        """Retire an admitted set or the serving set of the pool. After the serving set is retired, no set serves."""
        self.ledger.retire(name, why)

    def expose(self, name: str, why: str, *, automatic: bool = False) -> None:
        """List a parameter set as stolen. If it is the serving set, it is replaced at the next swap. New sets are
        tested against it.

        `automatic` means that the set is listed because a set made from it was admitted, and not because of a reported
        theft. A later report counts as a new theft.
        """
        self.ledger.expose(name, why, automatic=automatic)

    def answered(self, epoch: int, answers: Mapping[str, int], others: int = 0) -> None:
        """Record further numbers of requests that were answered in a period of service, by caller. Only pseudonyms of
        the callers are stored.

        `others` is the number of answers to callers without a name.
        """
        self.ledger.answered(epoch, {self.pseudonym(caller): n for caller, n in answers.items()}, others)

    def pseudonym(self, principal: str) -> str:
        """Return the pseudonym under which the pool stores a caller, as in
        `pool.ledger.terms[-1].answers.get(pool.pseudonym("alice"))`.
        """
        return self.seal.pseudonym(principal, f"{self.manifest['id']}/principal")

    # --- other encrypted tensors

    def keep(self, name: str, columns: "Mapping[str, Tensor]", about: Mapping[str, Any]) -> None:
        """Encrypt tensors, such as those of the pool's generator, and store them in the pool under a name. Earlier
        tensors of this name are replaced.
        """
        sealed, path = (
            self.seal.seal(column_files.encode(columns, about), bound(self.manifest["id"], name)),
            self._kept(name),
        )
        with self.ledger.alone(), usable(path, refusal_in_pool):
            write_atomically(path, sealed, PRIVATE)

    def kept(self, name: str) -> ColumnFile | None:
        """Return the tensors that `keep` stored in the pool under a name, or None if there are none."""
        path = self._kept(name)
        return unsealed(self.seal, self.manifest, path, name) if path.exists() else None

    def drop(self, name: str) -> None:
        """Delete the tensors that `keep` stored in the pool under a name, if there are any."""
        with self.ledger.alone(), usable(self._kept(name), refusal_in_pool):
            self._kept(name).unlink(missing_ok=True)

    # --- files

    def _path(self, name: str) -> Path:
        return self.path / SETS / f"{name}{SEALED}"

    def _kept(self, name: str) -> Path:
        if not (name.isascii() and name.isidentifier()):
            raise UsageError(f"{name!r} is not a valid file name; letters, digits and '_' were expected")
        return self.path / f"{name}{SEALED}"

    def _member(self, name: str) -> SetRecord | None:
        return next((member for member in self.ledger.members if member.name == name), None)

    def _rename_new(self, path: Path) -> None:
        """Rename the new file of a set that is in the ledger."""
        path.with_name(path.name + NEW).replace(path)
        flush_folder(path.parent)

    def _has_file(self, path: Path) -> bool:
        """Whether the file of a set that is in the ledger exists; renames it if a killed process did not."""
        with usable(path, refusal_in_pool):
            if not path.exists():
                with self.ledger.alone():
                    if path.with_name(path.name + NEW).exists():
                        self._rename_new(path)
            return path.exists()

    def _opened(self, name: str) -> ColumnFile:
        member, path = self.ledger.member(name), self._path(name)
        if member.deleted:
            raise UsageError(f"the parameters of {name!r} were deleted and cannot be recovered")
        self._has_file(path)
        return opened_set(self.seal, self.manifest, path, member)

    def _recover(self) -> None:
        """Complete or undo steps of an interrupted process.

        Raises `TargetError` for a set without an entry, and for a missing set that serves, waits, or is stolen.
        """
        sets = self.path / SETS
        with self.ledger.alone(), usable(sets, refusal_in_pool):
            members = {member.name: member for member in self.ledger.members}
            for folder in (self.path, sets):
                parts = (folder / f".{name}{PART}" for name in (POOL_MANIFEST, HEAD))
                for part in (*folder.glob(f".*{SEALED}*{PART}"), *parts):
                    part.unlink(missing_ok=True)
            for new in sets.glob(f"*{SEALED}{NEW}"):
                if new.name.removesuffix(SEALED + NEW) in members:
                    self._rename_new(new.with_name(new.name.removesuffix(NEW)))
                else:
                    new.unlink()
            refuse_other_files(self.path, members)
            for member in members.values():
                if member.deleted:
                    self._path(member.name).unlink(missing_ok=True)
