"""A run folder: what a run was to measure, what it has measured so far, and the chain that holds it together.

`run.json` says what is measured; `<stage>/<shard>.safetensors` are shards until a stage is complete, then
`<stage>.safetensors`; `chain.jsonl` names the digest of each in turn. Every step may be cut short by a kill and is
taken again by the next process.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.core.chain import canonical, digest
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.evidence import Columns
from holdfast.store import columns as column_files
from holdfast.store import forms
from holdfast.store.differences import differences
from holdfast.store.files import (
    MANIFEST,
    PART,
    clear_parts,
    content_of,
    flush_folder,
    refuse_no_run,
    usable,
    write_atomically,
)
from holdfast.store.forms import refuse_form
from holdfast.store.journal import NAME as JOURNAL
from holdfast.store.leases import NAME as STATE
from holdfast.store.leases import Leases
from holdfast.store.processes import Owner
from holdfast.store.records import Chain, document, parsed, read_chain, read_document

SCHEMA_VERSION = 1
ABOUT = "about.json"
SPLITS = "splits.json"
SAMENESS = ("config", "data", "model", "code")
"""What must not differ between the processes that share a run."""

_SPLIT = {"stage": forms.name, "shard": forms.count, "at": forms.count, "size": forms.count}
_SPLITS = forms.listed(forms.record(_SPLIT))
_SAID = ("created", "command")
_ABOUT = forms.record({}, dict.fromkeys(_SAID, forms.text))
_MANIFEST = forms.record(
    {"digests": forms.record(dict.fromkeys(SAMENESS, forms.text))},
    {
        "config": forms.record({}, {"stages": forms.listed(forms.record({"name": forms.name}))}),
        "plan": forms.record(
            {},
            {
                "stages": forms.listed(forms.name),
                "batch_size": forms.count,
                "shards": forms.listed(forms.listed(forms.count)),
            },
        ),
    },
)
"""What is used to go on with a run and to verify it; `runs` reads more."""

Split = Mapping[str, Any]
"""Memory ran out: in `stage`, `shard`, before row `at`, and `size` examples at once were left."""


@dataclass(frozen=True)
class Stage:
    """Columns of a complete stage."""

    columns: Columns
    reached: int | None = None
    """how many of its shards were measured, where time ran out before the last; the columns are theirs"""


class RunFolder:
    """One process's hold on a run folder."""

    def __init__(self, path: Path, manifest: Mapping[str, Any], chain: Chain, leases: Leases) -> None:
        self.path, self.manifest, self.chain, self.leases = path, manifest, chain, leases

    def look_again(self) -> None:
        """See what another process that works on the run has recorded since."""
        self.chain = read_chain(self.path, mend=False)

    def stage(self, name: str) -> Stage | None:
        """A complete stage; None where it is not."""
        return read_stage(self.path, self.chain, name)

    def shards(self, stage: str) -> dict[int, Columns]:
        """The finished shards of a stage that is not complete; a shard that is not whole is measured again."""
        found: dict[int, Columns] = {}
        folder = self.path / stage
        with usable(folder):
            if folder.is_dir():
                clear_parts(folder)
            for path in sorted(folder.glob(f"*{column_files.SUFFIX}")):
                shard = _shard_of(path)
                try:
                    found[shard] = column_files.read(path).columns
                except TargetError:
                    path.unlink()
        self.leases.reconcile(stage, found)
        return found

    def keep_shard(self, stage: str, shard: int, columns: Columns) -> None:
        """Write one finished shard."""
        self.leases.refuse_lost()
        folder = self.path / stage
        with usable(folder):
            if not folder.is_dir():
                folder.mkdir(exist_ok=True)  # another worker may come first
                flush_folder(self.path)
        column_files.write(_shard_path(folder, shard), columns, {"stage": stage, "shard": shard})

    def shard(self, stage: str, shard: int) -> Columns:
        """One finished shard of a stage that is not complete."""
        return column_files.read(_shard_path(self.path / stage, shard)).columns

    def complete(self, stage: str, columns: Columns, reached: int | None = None) -> None:
        """Write the joined stage, record it, and only then drop its shards."""
        self.leases.refuse_lost()
        path = self.path / f"{stage}{column_files.SUFFIX}"
        splits = [split for split in self.splits() if split["stage"] == stage]
        rows = len(columns["id"])
        found = column_files.write(path, columns, {"stage": stage, "rows": rows})
        record = {"kind": "stage", "name": stage, "file": path.name, "digest": found, "rows": rows}
        cut = {} if reached is None else {"reached": reached}
        self.chain.add(record | ({"splits": splits} if splits else {}) | cut)
        self.drop_shards(stage)

    def drop_shards(self, stage: str) -> None:
        """Delete the shards of a complete stage."""
        folder = self.path / stage
        with usable(folder):
            if folder.is_dir():
                for path in folder.iterdir():
                    path.unlink()
                folder.rmdir()

    def document(self, kind: str) -> dict[str, Any] | None:
        """A recorded document, such as the doubts; None where there is none."""
        return recorded_document(self.path, self.chain, kind)

    def record(self, kind: str, content: Mapping[str, Any]) -> None:
        """Write a document and record its digest; the same document again changes nothing."""
        self.keep(kind, f"{kind}.json", document(content))

    def keep(self, kind: str, name: str, data: bytes) -> None:
        """Write a file and record its digest; the same content again changes nothing."""
        self.leases.refuse_lost()
        path = self.path / name
        known = self.chain.last(kind)
        if (
            known is not None
            and known["digest"] == digest(data)
            and path.exists()
            and path.read_bytes() == data
        ):
            return
        with usable(path):
            write_atomically(path, data)
        if known is None or known["digest"] != digest(data):
            self.chain.add({"kind": kind, "file": path.name, "digest": digest(data)})

    def about(self) -> dict[str, Any]:
        """When the run was begun and by which command."""
        return read_about(self.path)

    def splits(self) -> tuple[Split, ...]:
        """Where memory ran out, in order."""
        return tuple(read_splits(self.path))

    def add_split(self, stage: str, shard: int, at: int, size: int) -> None:
        """Record that memory ran out, before going on."""
        split = {"stage": stage, "shard": shard, "at": at, "size": size}
        with self.leases.alone(), usable(self.path / SPLITS):
            known = self.splits()
            if split not in known:
                write_atomically(self.path / SPLITS, document(_in_order([*known, split])))


@contextmanager
def opened(
    path: Path, manifest: Mapping[str, Any], about: Mapping[str, Any], *, resume: bool, secret: bool = False
) -> Iterator[RunFolder]:
    """Start or go on with a run, alone; in a folder that its owner alone can enter, where it is `secret`.

    `manifest` has `digests` of config, data, model and code, and whatever else says what is measured; `about` is what
    may differ between two equal runs: when, by which command, on what. Raises `UsageError` where the folder is used,
    in use, or of another run; `TargetError` where it cannot be written.
    """
    refuse_used(path, resume=resume)
    wanted: dict[str, Any] = json.loads(canonical({"schema_version": SCHEMA_VERSION, **manifest}))
    with usable(path):
        path.mkdir(parents=True, exist_ok=True)
        if secret:
            path.chmod(0o700)
    leases = Leases(path)
    held = False
    try:
        leases.take_lease()
        held = True
        with usable(path):
            clear_parts(path)
        yield RunFolder(path, _settled(path, wanted, about), _started(path), leases)
    finally:
        leases.close(release=held)


@contextmanager
def joined(path: Path, owner: Owner) -> Iterator[RunFolder]:
    """Work on a run under the lease that another process of this machine holds."""
    leases = Leases(path)
    try:
        leases.serve(owner)
        yield RunFolder(path, read_manifest(path), read_chain(path, mend=False), leases)
    finally:
        leases.close(release=False)


def planned(path: Path) -> dict[str, Any] | None:
    """What the run in a folder measures; None where there is no run yet."""
    return read_manifest(path) if (path / MANIFEST).is_file() else None


def read_manifest(path: Path) -> dict[str, Any]:
    """`run.json`; `TargetError` where there is none or another version wrote it."""
    refuse_no_run(path)
    manifest = read_document(path / MANIFEST)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise TargetError(
            f"{str(path / MANIFEST)!r} has schema version {manifest.get('schema_version')}; this version reads "
            f"{SCHEMA_VERSION}. Install the holdfast that wrote it"
        )
    refuse_form(path / MANIFEST, manifest, _MANIFEST)
    return manifest


def read_about(path: Path) -> dict[str, Any]:
    """When the run was begun and by which command; empty where it was lost, for nothing depends on it.

    The chain does not contain it, so no other field of the file is used.
    """
    if not (path / ABOUT).is_file():
        return {}
    about = read_document(path / ABOUT)
    refuse_form(path / ABOUT, about, _ABOUT)
    return {key: about[key] for key in _SAID if key in about}


def read_stage(path: Path, chain: Chain, name: str) -> Stage | None:
    """A complete stage, for readers who hold no lease."""
    recorded = chain.last("stage", name)
    if recorded is None:
        return None
    file = path / str(recorded["file"])
    found = column_files.read(file)
    if found.digest != recorded["digest"]:
        raise TargetError(f"{str(file)!r} is not the {name} that the chain recorded; restore it from a copy")
    return Stage(found.columns, recorded.get("reached"))


def recorded_document(path: Path, chain: Chain, kind: str) -> dict[str, Any] | None:
    """A document that the chain names, checked against it."""
    known = chain.last(kind)
    if known is None:
        return None
    file = path / str(known["file"])
    data = content_of(file)
    if digest(data) != known["digest"]:
        raise TargetError(f"{str(file)!r} is not what the chain recorded; restore it from a copy")
    return parsed(file, data)


def refuse_used(path: Path, *, resume: bool) -> None:
    """`UsageError` where a folder holds what is no run, or one that nobody asked to go on with."""
    with usable(path):
        if not path.is_dir():
            return
        names = sorted(entry.name for entry in path.iterdir())
    begun = (ABOUT, JOURNAL)
    ours = [n for n in names if n in begun or n.startswith(STATE) or (n.startswith(".") and n.endswith(PART))]
    if len(ours) == len(names):
        return
    if MANIFEST not in names:
        other = next(name for name in names if name not in ours)
        raise UsageError(
            f"{str(path)!r} is no run folder (it holds {other!r}); name an empty or a new folder with --run DIR"
        )
    if not resume:
        raise UsageError(
            f"{str(path)!r} holds a run already; go on with it by --resume, or name another folder with --run DIR"
        )


def _settled(path: Path, manifest: dict[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest on disk, which is the given one where there was none."""
    if (path / MANIFEST).exists():
        known = read_manifest(path)
        _refuse_another(path, known, manifest)
        return known
    with usable(path):
        write_atomically(path / ABOUT, document(about))
        write_atomically(path / MANIFEST, document(manifest))
    return manifest


def _refuse_another(path: Path, known: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differing = [what for what in SAMENESS if known["digests"].get(what) != wanted["digests"][what]]
    if not differing:
        return
    details = differences(known.get("config", {}), wanted.get("config", {})) if "config" in differing else ""
    shown = f" ({details})" if details else ""
    raise UsageError(
        f"{str(path)!r} is a run of another {' and another '.join(differing)}{shown}, so it cannot be resumed with "
        f"this one; name another folder with --run DIR, or repeat the run as it was"
    )


def _started(path: Path) -> Chain:
    """The chain, whose first record names the manifest."""
    chain = read_chain(path, mend=True)
    if not chain.links:
        chain.add({"kind": "run", "file": MANIFEST, "digest": _digest_of(path / MANIFEST)})
    refuse_altered(path, chain)
    return chain


def refuse_altered(path: Path, chain: Chain) -> None:
    """`TargetError` where the manifest is not the one that the first record of the chain names."""
    if chain.links and chain.links[0].content.get("digest") != _digest_of(path / MANIFEST):
        raise TargetError(f"{str(path / MANIFEST)!r} is not what the chain recorded; restore it from a copy")


def _digest_of(file: Path) -> str:
    return digest(content_of(file))


def _shard_path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}{column_files.SUFFIX}"


def _shard_of(path: Path) -> int:
    ours = path.stem.isascii() and path.stem.isdecimal() and len(path.stem) < 20
    if not ours or path.name != _shard_path(path.parent, int(path.stem)).name:
        raise TargetError(
            f"{str(path)!r} is no shard of this run, whose names are like 00012{column_files.SUFFIX}; remove it"
        )
    return int(path.stem)


def _in_order(splits: Sequence[Split]) -> list[Split]:
    """By stage, shard and row, whoever came first."""
    stages = list(dict.fromkeys(split["stage"] for split in splits))
    return sorted(splits, key=lambda s: (stages.index(s["stage"]), s["shard"], s["at"], -s["size"]))


def read_splits(path: Path) -> list[Split]:
    """Where memory ran out in a run, in order."""
    file = path / SPLITS
    if not file.exists():
        return []
    try:
        splits: Sequence[Split] = json.loads(content_of(file))
    except (ValueError, RecursionError) as error:
        raise TargetError(f"{str(file)!r} was changed after it was written: {error}; restore it") from error
    refuse_form(file, splits, _SPLITS)
    return [{key: split[key] for key in _SPLIT} for split in splits]
