"""A pool of parameter sets that take turns at serving: each sealed on the disk, and a ledger of what became of it.

`pool.json` says what the sets are of and which key seals them, `sets/<name>.sealed` hold their weights, `ledger.jsonl`
and `ledger.head` where each stands. All of it is secret: the folder has mode 0700, the files 0600.

Every step may be cut short by a kill; the ledger's entry is what makes it done. A set is written as `….sealed.new`,
then entered, then given its name: who opens the pool next sweeps away a new file without an entry, and gives one with
an entry its name. No kill leaves a named file without an entry: the ledger was shortened, and the pool is refused.
"""

import json
import secrets
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from operator import itemgetter
from pathlib import Path
from typing import Any

from torch import Tensor

from holdfast.core.chain import canonical, digest
from holdfast.core.errors import Inconclusive, TargetError, UsageError
from holdfast.store import columns as column_files
from holdfast.store.authentic import HEAD, LedgerKey
from holdfast.store.columns import ColumnFile, content_digest
from holdfast.store.files import (
    PART,
    POOL_MANIFEST,
    PRIVATE,
    flush_folder,
    refusal_in_pool,
    usable,
    write_atomically,
)
from holdfast.store.ledger import LOCK, Ledger
from holdfast.store.locking import locked
from holdfast.store.manifest import (
    NEW,
    SCHEMA_VERSION,
    SEALED,
    SETS,
    bound,
    end_migration,
    open_manifest,
    refuse_begun,
    refuse_no_set,
    refuse_other_head,
    refuse_unsaid,
    unsealed,
)
from holdfast.store.records import document
from holdfast.store.sealing import Seal, begun_seal, found_seal, refuse_unready
from holdfast.store.standing import Member, Role, Serving

NAME_DIGITS = 16
"""Hex digits of a set's digest that are its name."""


class Pool:
    """One process's hold on a pool; several may hold one."""

    def __init__(self, path: Path, manifest: Mapping[str, Any], seal: Seal, ledger: Ledger) -> None:
        self.path, self.manifest, self.seal, self.ledger = path, manifest, seal, ledger
        self._said: dict[str, Mapping[str, Any]] = {}  # of sets, once opened: it never changes

    @classmethod
    def begun(cls, path: Path, about: Mapping[str, Any]) -> "Pool":
        """A new pool, in a new folder or one that holds other things; `about` says what its sets are of.

        The key is that of the environment, else a new one beside the folder: `pool.seal.source` names which.
        """
        refuse_unready()
        refuse_unsaid(about)
        if path.is_dir():
            refuse_begun(path)
        with usable(path, refusal_in_pool):
            (path / SETS).mkdir(parents=True, exist_ok=True)
            for folder in (path, path / SETS):
                folder.chmod(0o700)
        file = path / POOL_MANIFEST
        with locked(path / LOCK):
            refuse_begun(path)
            seal = begun_seal(path)
            known = {"schema_version": SCHEMA_VERSION, "id": secrets.token_hex(8), "key": seal.id}
            manifest: dict[str, Any] = json.loads(canonical({**known, "about": about}))
            with usable(file, refusal_in_pool):
                write_atomically(file, document(manifest), PRIVATE)
            ledger = Ledger.begun(path, LedgerKey.of(seal, manifest["id"]), digest(document(manifest)))
        return cls(path, manifest, seal, ledger)

    @classmethod
    def held(cls, path: Path, *, expect_head: str = "") -> "Pool":
        """A pool that was begun; `TargetError` where its key, its ledger or a set that is needed does not hold.

        With `expect_head`, the head of its ledger as it was at some time, also where the ledger does not contain that.
        """
        manifest = open_manifest(path)
        seal = found_seal(path)
        seal.refuse_other(manifest["key"], path / POOL_MANIFEST)
        ledger = Ledger(path, LedgerKey.of(seal, manifest["id"]))
        end_migration(path)
        if ledger.manifest != digest(document(manifest)):
            raise TargetError(
                f"{str(path / POOL_MANIFEST)!r} is not what the ledger recorded; restore it from a copy"
            )
        refuse_other_head(path, expect_head, ledger.entry_of)
        pool = cls(path, manifest, seal, ledger)
        pool._sweep()
        return pool

    @property
    def shown(self) -> str:
        """Its folder, as it is typed in a shell."""
        return shlex.quote(str(self.path))

    @contextmanager
    def alone_at(self, step: str) -> Iterator[None]:
        """No other process is at this step of the pool meanwhile; `InUse` at once where one is. A dead one is not."""
        where = f"another process is at {step} in {str(self.path)!r}"
        in_use = f"{where}; wait until it has ended or stop it, then start again"
        with locked(self.path / f"{step}.lock", 0.0, in_use=in_use):
            yield

    # --- sets

    def add(
        self,
        weights: Mapping[str, Tensor],
        about: Mapping[str, Any],
        *,
        bases: Sequence[str] = (),
        why: str = "",
        role: Role = "service",
    ) -> str:
        """Take in a set as a candidate, or as a base that never serves; its name, which follows from the weights alone.

        Weights that are here already, whatever became of them, are not taken in again: what was said first stands.
        """
        refuse_no_set(weights)
        refuse_unsaid(about)
        full = content_digest(weights)
        name = full[:NAME_DIGITS]
        plain, path = column_files.encode(weights, about), self._path(name)
        new, sealed = (
            path.with_name(path.name + NEW),
            self.seal.seal(plain, bound(self.manifest["id"], f"{SETS}/{name}")),
        )
        with self.ledger.alone(), usable(new, refusal_in_pool):
            known = self._known(name)
            if known is not None and (known.deleted or known.digest != full):
                raise UsageError(f"{name!r} was deleted, or names another set; draw another")
            if known is not None and self._settled(path):
                return name
            try:
                write_atomically(new, sealed, PRIVATE)
                if known is None:
                    self.ledger.candidate(name, full, bases, why, role=role)
            except (OSError, TargetError, UsageError):
                with suppress(OSError):  # a full disk is not filled further
                    new.unlink(missing_ok=True)
                raise
            self._name(path)
        return name

    def weights(self, name: str) -> dict[str, Tensor]:
        """The weights of a set, as they were taken in."""
        return self._opened(name).columns

    def about(self, name: str) -> Mapping[str, Any]:
        """What was said of a set when it was taken in."""
        if name not in self._said or self.ledger.member(name).deleted:
            self._said[name] = self._opened(name).about
        return self._said[name]

    def delete(self, name: str, why: str = "") -> None:
        """Delete the weights of a set that is no candidate to serve, nor exposed; the ledger keeps its name."""
        with self.ledger.alone():
            self.ledger.delete(name, why)
            with usable(self._path(name), refusal_in_pool):
                self._path(name).unlink(missing_ok=True)

    # --- what becomes of them

    @property
    def serving(self) -> Serving | None:
        """The set that answers now."""
        return self.ledger.serving

    @property
    def ahead(self) -> tuple[str, ...]:
        """The admitted sets that wait to serve and are not exposed, in the order in which they will."""
        return self.ledger.ahead

    def admit(self, name: str, why: str = "", *, canary: str = "", against: Sequence[str] = ()) -> None:
        """A candidate may serve, or a set that waits still may.

        `canary` is a digest of its answers to known inputs, to tell it by once loaded; `against` are the exposed sets
        that it was judged against: it serves only while those are all that are exposed.
        """
        self.ledger.admit(name, why, canary=canary, against=against)

    def refuse(self, name: str, why: str) -> None:
        """A candidate may not serve, or a set that waits may no longer."""
        self.ledger.refuse(name, why)

    @property
    def unjudged(self) -> tuple[str, ...]:
        """Sets of `ahead` that were not judged against everything exposed by now."""
        return self.ledger.unjudged

    def serve(self, name: str, why: str = "", *, unjudged: bool = False) -> Serving:
        """An admitted set serves from now on, if its file is whole; what served before is retired by the same entry.

        `UsageError` for one that was not judged against everything exposed, unless `unjudged`.
        """
        with self.ledger.alone():
            self.ledger.member(name)
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
        """Let a set that waits serve: the first admitted, or which `choose` says. A kill leaves the old one or the new.

        `choose` is given those that were judged against everything exposed; where there is none, with `unjudged`, the
        others. With `epoch`, only if that one still lasts: what set two processes off at once then swaps once. Raises
        `Inconclusive`, and leaves what serves, where no such set waits.
        """
        with self.ledger.alone():
            now = self.serving
            if epoch is not None and now is None:
                raise Inconclusive(
                    f"epoch {epoch} is over, and nothing serves in {str(self.path)!r}; swap without naming an epoch"
                )
            if epoch is not None and now is not None and now.epoch != epoch:
                return now
            old = self.unjudged
            waiting = [name for name in self.ahead if name not in old] or (list(old) if unjudged else [])
            if not waiting:
                still = "nothing serves yet" if now is None else f"{now.name!r} goes on serving"
                raise Inconclusive(self._none_waits(still, len(old)))
            return self.serve(choose(waiting), why, unjudged=unjudged)

    def _none_waits(self, still: str, unjudged: int) -> str:
        if not unjudged:
            return f"no admitted set waits in {str(self.path)!r}, so {still}; draw and admit more"
        return (
            f"no admitted set waits in {str(self.path)!r} that was judged against everything exposed by now "
            f"({unjudged} were admitted before), so {still}; judge them with holdfast rotate admit {self.shown}, "
            f"or let one serve without that by holdfast rotate swap {self.shown} --unjudged"
        )

    def retire(self, name: str, why: str = "") -> None:
        """An admitted set will not serve, or the serving one stops and none takes its place."""
        self.ledger.retire(name, why)

    def expose(self, name: str, why: str, *, automatic: bool = False) -> None:
        """An attacker may hold a set: after the next swap it serves no more, and what comes is tested against it.

        `automatic` where a set made from it was admitted, and it was not reported as stolen. A report after that counts
        as a new exposure.
        """
        self.ledger.expose(name, why, automatic=automatic)

    def answered(self, epoch: int, answers: Mapping[str, int], others: int = 0) -> None:
        """Answers that principals, by pseudonyms in the ledger, and others had in an epoch, beside those before."""
        self.ledger.answered(epoch, {self.pseudonym(who): n for who, n in answers.items()}, others)

    def pseudonym(self, principal: str) -> str:
        """What the ledger calls a principal, as in `pool.ledger.terms[-1].answers.get(pool.pseudonym("alice"))`."""
        return self.seal.pseudonym(principal, f"{self.manifest['id']}/principal")

    # --- what else is secret

    def keep(self, name: str, columns: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Seal tensors that belong to the pool, as its generator, under a name; what was there is replaced."""
        sealed, path = (
            self.seal.seal(column_files.encode(columns, about), bound(self.manifest["id"], name)),
            self._kept(name),
        )
        with self.ledger.alone(), usable(path, refusal_in_pool):
            write_atomically(path, sealed, PRIVATE)

    def kept(self, name: str) -> ColumnFile | None:
        """What was kept under a name; None if nothing was."""
        path = self._kept(name)
        return self._unsealed(path, name) if path.exists() else None

    def drop(self, name: str) -> None:
        """Delete what was kept under a name, if anything was."""
        with self.ledger.alone(), usable(self._kept(name), refusal_in_pool):
            self._kept(name).unlink(missing_ok=True)

    # --- files

    def _path(self, name: str) -> Path:
        return self.path / SETS / f"{name}{SEALED}"

    def _kept(self, name: str) -> Path:
        if not (name.isascii() and name.isidentifier()):
            raise UsageError(f"{name!r} cannot be the name of a file; letters, digits and '_' were expected")
        return self.path / f"{name}{SEALED}"

    def _known(self, name: str) -> Member | None:
        return next((member for member in self.ledger.members if member.name == name), None)

    def _name(self, path: Path) -> None:
        """Give the new file of a set that the ledger has its name."""
        path.with_name(path.name + NEW).replace(path)
        flush_folder(path.parent)

    def _settled(self, path: Path) -> bool:
        """Whether the file of a set that the ledger has is there, if only because a killed process had written it."""
        with usable(path, refusal_in_pool):
            if not path.exists():
                with self.ledger.alone():
                    if path.with_name(path.name + NEW).exists():
                        self._name(path)
            return path.exists()

    def _opened(self, name: str) -> ColumnFile:
        member, path = self.ledger.member(name), self._path(name)
        if member.deleted:
            raise UsageError(f"the weights of {name!r} were deleted; they cannot be had again")
        self._settled(path)
        found = self._unsealed(path, f"{SETS}/{name}")
        if content_digest(found.columns) != member.digest:
            raise TargetError(
                f"{str(path)!r} is not the set that the ledger recorded; restore it from a copy"
            )
        return found

    def _unsealed(self, path: Path, name: str) -> ColumnFile:
        with usable(path, refusal_in_pool):
            data = path.read_bytes()
        return column_files.decode(unsealed(self.seal, self.manifest, data, name, path), str(path))

    def _sweep(self) -> None:
        """End or undo what an interrupted process began.

        Raises `TargetError` for a set without an entry, and for one that is gone though it serves, may serve, or is
        what others are tested against.
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
                    self._name(new.with_name(new.name.removesuffix(NEW)))
                else:
                    new.unlink()
            for path in sorted(sets.glob(f"*{SEALED}")):
                if path.stem not in members:
                    raise TargetError(
                        f"{str(path)!r} is in no entry of {str(self.ledger.path)!r}, which was shortened; restore that "
                        f"from a copy, or remove the set if it was put there. Until then nothing of it is served"
                    )
                if members[path.stem].deleted:
                    path.unlink()
            for member in members.values():
                self._refuse_gone(member)

    def _refuse_gone(self, member: Member) -> None:
        if member.needed and not self._path(member.name).exists():
            raise TargetError(
                f"{str(self._path(member.name))!r} is gone, though the ledger has it as {member.standing}; restore it "
                f"from a copy"
            )
