"""A pool of parameter sets that take turns at serving: each sealed on the disk, and a ledger of what became of it.

`pool.json` says what the sets are of and which key seals them, `sets/<name>.sealed` hold their weights, `ledger.jsonl`
where each stands. All of it is secret: the folder has mode 0700, the files 0600.

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
from holdfast.store.columns import ColumnFile, content_digest
from holdfast.store.files import PART, PRIVATE, flush_folder, refusal_in_pool, usable, write_atomically
from holdfast.store.ledger import Ledger
from holdfast.store.locking import locked
from holdfast.store.records import document, read_document
from holdfast.store.sealing import Seal, begun_seal, found_seal, refuse_unready
from holdfast.store.standing import Member, Serving

MANIFEST = "pool.json"
SETS = "sets"
SEALED = ".sealed"
NEW = ".new"
"""How the name of a set's file ends until the ledger has it."""
SCHEMA_VERSION = 1
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
        _refuse_unsaid(about)
        if path.is_dir():
            _refuse_begun(path, Ledger(path))
        with usable(path, refusal_in_pool):
            (path / SETS).mkdir(parents=True, exist_ok=True)
            for folder in (path, path / SETS):
                folder.chmod(0o700)
        ledger, file = Ledger(path), path / MANIFEST
        with ledger.alone():
            _refuse_begun(path, ledger)
            seal = begun_seal(path)
            known = {"schema_version": SCHEMA_VERSION, "id": secrets.token_hex(8), "key": seal.id}
            manifest: dict[str, Any] = json.loads(canonical({**known, "about": about}))
            with usable(file, refusal_in_pool):
                write_atomically(file, document(manifest), PRIVATE)
            ledger.begin(digest(document(manifest)))
        return cls(path, manifest, seal, ledger)

    @classmethod
    def held(cls, path: Path) -> "Pool":
        """A pool that was begun; `TargetError` where its key, its ledger or a set that is needed does not hold."""
        ledger = Ledger(path)
        if not _stands(path, ledger):
            _refuse_part(path, ledger)
            raise TargetError(
                f"{str(path)!r} is no pool, or was never begun to the end; begin it with holdfast rotate collect MODEL "
                f"DATA --run {shlex.quote(str(path))}, or in Python with Pool.begun"
            )
        manifest = read_document(path / MANIFEST)
        if manifest.get("schema_version") != SCHEMA_VERSION:
            raise TargetError(
                f"{str(path / MANIFEST)!r} has schema version {manifest.get('schema_version')}; this version reads "
                f"{SCHEMA_VERSION}. Install the holdfast that wrote it"
            )
        if ledger.manifest != digest(document(manifest)):
            raise TargetError(
                f"{str(path / MANIFEST)!r} is not what the ledger recorded; restore it from a copy"
            )
        seal = found_seal(path)
        seal.refuse_other(manifest["key"], path / MANIFEST)
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
    ) -> str:
        """Take in a set as a candidate; its name, which follows from the weights alone.

        Weights that are here already, whatever became of them, are not taken in again: what was said first stands.
        """
        _refuse_no_set(weights)
        _refuse_unsaid(about)
        full = content_digest(weights)
        name = full[:NAME_DIGITS]
        plain, path = column_files.encode(weights, about), self._path(name)
        new, sealed = path.with_name(path.name + NEW), self.seal.seal(plain, self._inside(name))
        with self.ledger.alone(), usable(new, refusal_in_pool):
            known = self._known(name)
            if known is not None and (known.deleted or known.digest != full):
                raise UsageError(f"{name!r} was deleted, or names another set; draw another")
            if known is not None and self._settled(path):
                return name
            try:
                write_atomically(new, sealed, PRIVATE)
                if known is None:
                    self.ledger.candidate(name, full, bases, why)
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

    def admit(self, name: str, why: str = "", *, canary: str = "") -> None:
        """A candidate may serve, or a set that waits still may.

        `canary` is a digest of its answers to known inputs, to tell it by once loaded.
        """
        self.ledger.admit(name, why, canary=canary)

    def refuse(self, name: str, why: str) -> None:
        """A candidate may not serve, or a set that waits may no longer."""
        self.ledger.refuse(name, why)

    def serve(self, name: str, why: str = "") -> Serving:
        """An admitted set serves from now on, if its file is whole; what served before is retired by the same entry."""
        with self.ledger.alone():
            self.ledger.member(name)
            self._opened(name)
            return self.ledger.serve(name, why)

    def swap(
        self,
        *,
        epoch: int | None = None,
        why: str = "",
        choose: Callable[[Sequence[str]], str] = itemgetter(0),
    ) -> Serving:
        """Let a set that waits serve: the first admitted, or which `choose` says. A kill leaves the old one or the new.

        With `epoch`, only if that one still lasts: what set two processes off at once then swaps once. Raises
        `Inconclusive`, and leaves what serves, where no set waits.
        """
        with self.ledger.alone():
            now = self.serving
            if epoch is not None and now is None:
                raise Inconclusive(
                    f"epoch {epoch} is over, and nothing serves in {str(self.path)!r}; swap without naming an epoch"
                )
            if epoch is not None and now is not None and now.epoch != epoch:
                return now
            if not self.ahead:
                still = "nothing serves yet" if now is None else f"{now.name!r} goes on serving"
                raise Inconclusive(
                    f"no admitted set waits in {str(self.path)!r}, so {still}; draw and admit more"
                )
            return self.serve(choose(self.ahead), why)

    def retire(self, name: str, why: str = "") -> None:
        """An admitted set will not serve, or the serving one stops and none takes its place."""
        self.ledger.retire(name, why)

    def expose(self, name: str, why: str) -> None:
        """An attacker may hold a set: after the next swap it serves no more, and what comes is tested against it."""
        self.ledger.expose(name, why)

    def answered(self, epoch: int, answers: Mapping[str, int], others: int = 0) -> None:
        """Answers that principals, by pseudonyms in the ledger, and others had in an epoch, beside those before."""
        self.ledger.answered(epoch, {self.pseudonym(who): n for who, n in answers.items()}, others)

    def pseudonym(self, principal: str) -> str:
        """What the ledger calls a principal, as in `pool.ledger.terms[-1].answers.get(pool.pseudonym("alice"))`."""
        return self.seal.pseudonym(principal, self._bound("principal"))

    # --- what else is secret

    def keep(self, name: str, columns: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Seal tensors that belong to the pool, as its generator, under a name; what was there is replaced."""
        sealed, path = (
            self.seal.seal(column_files.encode(columns, about), self._bound(name)),
            self._kept(name),
        )
        with self.ledger.alone(), usable(path, refusal_in_pool):
            write_atomically(path, sealed, PRIVATE)

    def kept(self, name: str) -> ColumnFile | None:
        """What was kept under a name; None if nothing was."""
        path = self._kept(name)
        return self._unsealed(path, self._bound(name)) if path.exists() else None

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

    def _inside(self, name: str) -> str:
        return self._bound(f"{SETS}/{name}")

    def _bound(self, name: str) -> str:
        """The name that a file is bound to: pools that share a key cannot exchange theirs."""
        return f"{self.manifest['id']}/{name}"

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
        found = self._unsealed(path, self._inside(name))
        if content_digest(found.columns) != member.digest:
            raise TargetError(
                f"{str(path)!r} is not the set that the ledger recorded; restore it from a copy"
            )
        return found

    def _unsealed(self, path: Path, bound: str) -> ColumnFile:
        with usable(path, refusal_in_pool):
            data = path.read_bytes()
        return column_files.decode(self.seal.open(data, bound, path), str(path))

    def _sweep(self) -> None:
        """End or undo what an interrupted process began.

        Raises `TargetError` for a set without an entry, and for one that is gone though it serves, may serve, or is
        what others are tested against.
        """
        sets = self.path / SETS
        with self.ledger.alone(), usable(sets, refusal_in_pool):
            members = {member.name: member for member in self.ledger.members}
            for folder in (self.path, sets):
                for part in (*folder.glob(f".*{SEALED}*{PART}"), folder / f".{MANIFEST}{PART}"):
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
        state = member.state if member.exposed is None else "exposed"
        needed = state in ("admitted", "serving", "exposed") and not member.deleted
        if needed and not self._path(member.name).exists():
            raise TargetError(
                f"{str(self._path(member.name))!r} is gone, though the ledger has it as {state}; restore it from a copy"
            )


def _refuse_unsaid(about: Mapping[str, Any]) -> None:
    """`UsageError` for what JSON cannot say."""
    try:
        canonical(about)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"what is said of it cannot be kept: {error}; expected text, finite numbers, lists and mappings of them"
        ) from error


def _refuse_no_set(weights: Mapping[str, Tensor]) -> None:
    """`UsageError` for what is no state dict with numbers in it."""
    if not weights:
        raise UsageError("the set holds no parameters; give the state dict of a network")
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise UsageError(f"{name} of the set is a {type(value).__name__}; a tensor was expected")
        if bool(value.isnan().any()):
            raise UsageError(
                f"{name} of the set holds values that are no numbers: its training diverged; leave it out"
            )


def stands(path: Path) -> bool:
    """Whether a pool was begun in a folder, to the end."""
    return _stands(path, Ledger(path))


def _stands(path: Path, ledger: Ledger) -> bool:
    with usable(path, refusal_in_pool):
        return (path / MANIFEST).is_file() and ledger.entries > 0


def _refuse_begun(path: Path, ledger: Ledger) -> None:
    """`UsageError` where a pool stands already."""
    if _stands(path, ledger):
        raise UsageError(f"{str(path)!r} holds a pool already; go on with it, or name another folder")
    _refuse_part(path, ledger)


def _refuse_part(path: Path, ledger: Ledger) -> None:
    """`TargetError` where there is a part of a pool that was not just being begun."""
    sealed = any((path / SETS).glob(f"*{SEALED}"))
    for lost, known in ((MANIFEST, ledger.entries > 0), (ledger.path.name, sealed)):
        if known:
            raise TargetError(
                f"{str(path)!r} holds a pool whose {lost} is gone; restore it from a copy, or name another folder"
            )
