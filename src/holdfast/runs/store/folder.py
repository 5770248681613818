"""Reads and writes the folder of a run, and describes how the settings of two runs differ."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from holdfast.core.chain import canonical, digest
from holdfast.core.errors import OTHER_FOLDER, RESUME, TargetError, UsageError
from holdfast.core.evidence import Columns, Seconds
from holdfast.core.names import kind_of
from holdfast.runs.harness.kinds import KINDS
from holdfast.runs.store import columns as column_files
from holdfast.runs.store.append_log import AppendLog, LogForm
from holdfast.runs.store.columns import Count, Name, is_name, refuse_form, validated
from holdfast.runs.store.files import (
    MANIFEST,
    PART,
    clear_parts,
    content_of,
    flush_folder,
    make_private,
    refuse_no_run,
    usable,
    write_atomically,
)
from holdfast.runs.store.journal import NAME as JOURNAL
from holdfast.runs.store.leases import LEASE, OF_LEASE, Lease, ShardTimes, leased, spent_in
from holdfast.threats.stored import threat_from_json

MOST = 4
"""Largest number of differences that are listed; further ones are only counted."""
_FIRST = ("threat", "suite", "seed")
_DIGITS = 12  # digits of a digest that are shown
_DIGEST = re.compile("[0-9a-f]{64}")


def differences(stored: Mapping[str, Any], requested: Mapping[str, Any]) -> str:
    """Return the differences between the settings of two runs as text, such as `threat: linf:0.1 → linf:0.2; seed: 0 →
    1`.

    The text is empty if no difference can be listed.
    """
    names = dict.fromkeys([*_FIRST, *sorted({*stored, *requested} - {"stages", "functions"}), "stages"])
    lines = [
        *_functions(stored, requested),
        *(line for name in names for line in _of(name, stored.get(name), requested.get(name))),
    ]
    more = [f"and {len(lines) - MOST} more"] if len(lines) > MOST else []
    return "; ".join([*lines[:MOST], *more])


def _of(name: str, stored: Any, requested: Any) -> Iterator[str]:
    try:
        if name == "threat":
            contents = _file_content(stored), _file_content(requested)
            if None not in contents and contents[0] != contents[1]:
                limits = requested["limits"]
                files = [limits[key] for key in ("file", "printable", "shape") if limits.get(key)]
                named = [file.removeprefix("@") for file in files if file.startswith("@")] or files[:1]
                yield f"another content of the file {' or '.join(named)}"
            stored, requested = threat_from_json(stored).text, threat_from_json(requested).text
        elif name == "settings":  # settings by recipe; a different recipe is shown under `recipe`
            common = stored.keys() & requested.keys()
            stored, requested = ({recipe: side[recipe] for recipe in common} for side in (stored, requested))
        elif name == "stages":
            yield from _stages(stored, requested)
            return
    except (
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        TargetError,
    ):  # another version has another format
        pass
    yield from _changes(stored, requested, name)


def _functions(stored: Mapping[str, Any], requested: Mapping[str, Any]) -> Iterator[str]:
    """Differences of the functions of the user, whose digests have keys such as `pgd.training.optimizer`."""
    before, now = (side.get("functions") or {} for side in (stored, requested))
    for key in sorted(before.keys() & now.keys()):
        if before[key] != now[key]:
            recipe, _, name = key.rsplit(".", 2)
            address = stored["settings"][recipe]["training"][name]
            yield f"the function {name} has changed ({address})"
    sides = (
        (before, now, "given before and {} not given now"),
        (now, before, "not given before and {} given now"),
    )
    for these, others, change in sides:
        missing = sorted({key.rpartition(".")[2] for key in these.keys() - others.keys()})
        if missing:
            listed = " and ".join(filter(None, (", ".join(missing[:-1]), missing[-1])))
            noun, verb, be = ("function", "was", "is") if len(missing) == 1 else ("functions", "were", "are")
            yield f"the {noun} {listed} {verb} {change.format(be)}"


def _file_content(threat: Mapping[str, Any]) -> Any:
    """The content of the files of a threat model, or None."""
    return (threat.get("limits") or {}).get("content")


def _stages(stored: Sequence[Mapping[str, Any]], requested: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Differences of the attacks by name; for equal attacks, differences of their settings."""
    for kind in KINDS.values():
        if not kind.listed:
            continue
        sides = [[stage for stage in stages if stage["kind"] == kind.name] for stages in (stored, requested)]
        stored_attacks, requested_attacks = ([stage["attack"] for stage in side] for side in sides)
        if stored_attacks != requested_attacks:
            yield f"{kind.listed}: {', '.join(stored_attacks) or 'none'} → {', '.join(requested_attacks) or 'none'}"
            continue
        for stored_stage, requested_stage in zip(*sides, strict=True):
            yield from _changes(stored_stage["settings"], requested_stage["settings"], stored_stage["attack"])


def _changes(stored: object, requested: object, path: str) -> Iterator[str]:
    """`PGD.steps: 3 → 5` for every value that differs."""
    if isinstance(stored, dict) and isinstance(requested, dict):
        for name in sorted({*stored, *requested}):
            yield from _changes(stored.get(name), requested.get(name), f"{path}.{name}")
    elif stored != requested:
        yield f"{path}: {_shown(stored)} → {_shown(requested)}"


def _shown(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, str):
        return value[:_DIGITS] if _DIGEST.fullmatch(value) else value
    return json.dumps(value)


CHAIN = "chain.jsonl"
COLUMNS = ".safetensors"
"""Suffix of the names of column files and of files with weights."""


Chain = AppendLog
"""The hash chain of a run: a record for each file, oldest first."""


def read_chain(folder: Path, *, repair: bool) -> Chain:
    """Return the hash chain of the run in a folder. If `repair` is true, an incomplete last line, which may remain
    after a kill, is removed.

    Raises `TargetError` with the first invalid record.
    """
    chain = AppendLog(folder / CHAIN, _FORM)
    if repair:
        chain.repair()
    elif chain.read():
        raise TargetError(
            f"the last record of {str(folder / CHAIN)!r} is truncated; resuming removes it", RESUME
        )
    return chain


def _refuse_outside(content: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a record of a file outside the run folder or with a wrong name; runs may be untrusted."""
    kind, stage = content["kind"], content.get("name", "")
    of_stage = kind == "stage"
    has_valid_names = is_name(kind) and (is_name(stage) if of_stage else stage == "")
    files = [MANIFEST] if kind == "run" else [f"{stage if of_stage else kind}{COLUMNS}"]
    files += [] if of_stage or kind == "run" else [f"{kind}.json"]
    if not has_valid_names or content["file"] not in files or not isinstance(content["digest"], str):
        raise ValueError(content["file"])
    reached, splits = content.get("reached"), content.get("splits", [])
    if not isinstance(reached, int | None) or not isinstance(splits, list):
        raise ValueError(reached)


_FORM = LogForm(_refuse_outside)


def document(content: object) -> bytes:
    """Return JSON content as the bytes of a sorted and indented document. Equal content gives equal bytes."""
    return (json.dumps(content, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def read_document(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file. Raises `TargetError` if it is not a JSON object."""
    return parsed(path, content_of(path))


def parsed(path: Path, data: bytes) -> dict[str, Any]:
    """Return the JSON object that the bytes of a file contain. Raises `TargetError` for any other content, for an
    object with a repeated key, and for infinities and NaN, which strict JSON cannot contain.
    """
    try:
        content = json.loads(
            data, object_pairs_hook=_without_repeats, parse_float=_finite, parse_constant=_finite
        )
    except (ValueError, RecursionError) as error:
        raise TargetError(f"{str(path)!r} is not valid JSON: {error}; restore it from a copy") from error
    if not isinstance(content, dict):
        raise TargetError(f"{str(path)!r} contains {kind_of(content)}; an object was expected")
    return content


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {text[:60]} is not finite")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        ((repeated, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {repeated[:60]!r} is repeated")
    return content


SCHEMA_VERSION = 2
ABOUT = "about.json"
SPLITS = "splits.json"
_OTHER = {
    "config": "another configuration",
    "data": "other data",
    "model": "another model",
    "code": "other code",
}
SAMENESS = tuple(_OTHER)
"""Names of the digests that must be equal in all processes and attempts of a run."""


_LATEST = 253_402_300_799
"""last second of the year 9999, after which a time cannot be shown"""


class Split(TypedDict):
    """An out-of-memory event in `stage` and `shard`, before row `at`. After it, batches have `size` examples."""

    stage: Name
    shard: Count
    at: Count
    size: Count


class _About(TypedDict, total=False):
    created: str
    times: dict[Name, Annotated[float, Field(ge=0, le=_LATEST, allow_inf_nan=False)]]
    """time of each document, in seconds since 1970"""


class _Stage(TypedDict):
    name: Name


class _Config(TypedDict, total=False):
    stages: list[_Stage]


class _Plan(TypedDict, total=False):
    stages: list[Name]
    batch_size: Count
    shards: list[list[Count]]


class _Digests(TypedDict):
    config: str
    data: str
    model: str
    code: str


class _Manifest(TypedDict):
    """Fields that are used to resume and verify a run; `runs/documents/record.py` has more."""

    digests: _Digests
    config: NotRequired[_Config]
    plan: NotRequired[_Plan]
    opening: NotRequired[dict[str, Any]]


@dataclass(frozen=True)
class StoredStage:
    """The stored columns of a finished stage, and the number of measured shards if time ran out."""

    columns: Columns
    reached: int | None = None
    """number of measured shards if time ran out; the columns contain only these"""
    about: Mapping[str, Any] = field(default_factory=dict)
    """plain values that describe the columns, such as the accuracy of a trained network"""


class RunFolder:
    """The folder of a run for which this process has the lease, so that it may write to the folder."""

    def __init__(self, path: Path, manifest: Mapping[str, Any], chain: Chain, lease: Lease) -> None:
        self.path, self.manifest, self.chain, self.lease = path, manifest, chain, lease

    def stage(self, name: str) -> StoredStage | None:
        """Return a complete stage of the run, or None if it is not complete. Shard files of a complete stage that
        remain after a kill are deleted.
        """
        stage = read_stage(self.path, self.chain, name)
        if stage is not None:
            self.drop_shards(name)
        return stage

    def shards(self, stage: str) -> dict[int, Columns]:
        """Return the columns of the finished shards of an incomplete stage, by the index of the shard.

        Invalid shards are deleted, so that they are measured again.
        """
        columns_of_shards: dict[int, Columns] = {}
        folder = self.path / stage
        with usable(folder):
            if folder.is_dir():
                clear_parts(folder)
            for path in sorted(folder.glob(f"*{column_files.SUFFIX}")):
                shard = _shard_of(path)
                try:
                    columns_of_shards[shard] = column_files.read(path).columns
                except TargetError:
                    path.unlink()
        return columns_of_shards

    def keep_shard(self, stage: str, shard: int, columns: Columns) -> None:
        """Write the columns of a finished shard to the run folder."""
        self.lease.refuse_lost()
        folder = self.path / stage
        with usable(folder):
            if not folder.is_dir():
                make_private(folder)
                flush_folder(self.path)  # otherwise a power failure could remove the folder with its files
        column_files.write(_shard_path(folder, shard), columns, {"stage": stage, "shard": shard})

    def complete(
        self,
        stage: str,
        columns: Columns,
        reached: int | None = None,
        about: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Write the columns of a finished stage, record their digest in the chain, and then delete the shard files of
        the stage.
        """
        self.lease.refuse_lost()
        path = self.path / f"{stage}{column_files.SUFFIX}"
        splits = [split for split in self.splits() if split["stage"] == stage]
        rows = len(columns["id"])
        file_digest = column_files.write(path, columns, {"stage": stage, "rows": rows, **about})
        record = {"kind": "stage", "name": stage, "file": path.name, "digest": file_digest, "rows": rows}
        time_limit_entry = {} if reached is None else {"reached": reached}
        self.chain.add(record | ({"splits": splits} if splits else {}) | time_limit_entry)
        self.drop_shards(stage)

    def drop_shards(self, stage: str) -> None:
        """Delete the shard files of a complete stage."""
        folder = self.path / stage
        with usable(folder):
            if folder.is_dir():
                for path in folder.iterdir():
                    path.unlink()
                folder.rmdir()

    def document(self, kind: str) -> dict[str, Any] | None:
        """Return a JSON document of the run, such as the doubts, after verification of its digest, or None if it is not
        recorded.
        """
        return recorded_document(self.path, self.chain, kind)

    def record(self, kind: str, content: Mapping[str, Any]) -> None:
        """Write a JSON document to the run folder, and record its digest in the chain. Writing the same document again
        changes nothing.
        """
        self.keep(kind, f"{kind}.json", document(content))

    def keep(self, kind: str, name: str, data: bytes) -> None:
        """Write a file to the run folder, and record its digest in the chain. Writing the same content again changes
        nothing.
        """
        self.lease.refuse_lost()
        path = self.path / name
        recorded = self.chain.last(kind)
        if (
            recorded is not None
            and recorded["digest"] == digest(data)
            and path.exists()
            and path.read_bytes() == data
        ):
            return
        with usable(path):
            write_atomically(path, data)
        if recorded is None or recorded["digest"] != digest(data):
            self.chain.add({"kind": kind, "file": path.name, "digest": digest(data)})

    def begin(self, stage: str, shard: int) -> None:
        """Record that an attempt to measure a shard begins."""
        self.lease.begin(stage, shard)

    def spend(self, stage: str, shard: int, seconds: Seconds, *, done: bool) -> None:
        """Add CPU and wall-clock time to the recorded time of a shard."""
        self.lease.spend(stage, shard, seconds)

    def spent(self, stage: str) -> Seconds:
        """Return the CPU and wall-clock time of a stage, summed over all attempts."""
        times = spent_in(self.path).get(stage, ShardTimes())
        return Seconds(times.cpu_s, times.wall_s)

    def about(self) -> dict[str, Any]:
        """Return the start time of the run."""
        return read_about(self.path)

    def add_about(self, more: Mapping[str, Any]) -> None:
        """Write values to the file of the start time, which is not in the chain."""
        self.lease.refuse_lost()
        file = self.path / ABOUT
        with usable(file):
            write_atomically(file, document((read_document(file) if file.is_file() else {}) | dict(more)))

    def splits(self) -> tuple[Split, ...]:
        """Return the events of the run in which memory ran out and a batch was split, in a fixed order."""
        return tuple(read_splits(self.path))

    def add_split(self, stage: str, shard: int, at: int, size: int) -> None:
        """Record that memory ran out in a shard, before the run continues with smaller batches."""
        split = Split(stage=stage, shard=shard, at=at, size=size)
        self.lease.refuse_lost()
        with usable(self.path / SPLITS):
            splits = self.splits()
            if split not in splits:
                write_atomically(self.path / SPLITS, document(_in_order([*splits, split])))


@contextmanager
def open_run_folder(
    path: Path, manifest: Mapping[str, Any], about: Mapping[str, Any], *, resume: bool
) -> Iterator[RunFolder]:
    """Context manager that starts or resumes a run in a folder, and takes the exclusive lease of the folder.

    `manifest` contains the `digests` of config, data, model and code, and the description of the measurements. `about`
    contains what may differ between equal runs, such as the time and the command. Raises
    `UsageError` if the folder contains other files, is in use, or contains another run, and `TargetError` if it cannot
    be written.

    A new run that ends with one of these errors before anything is measured leaves no folder, so that the corrected
    command can use the same one.
    """
    refuse_used(path, resume=resume)
    # Through JSON, so that it has the types of the stored manifest with which it is compared, such as lists for
    # tuples.
    requested: dict[str, Any] = json.loads(canonical({"schema_version": SCHEMA_VERSION, **manifest}))
    with usable(path):
        make_private(path)
    has_lease, is_new = False, not (path / MANIFEST).exists()
    try:
        with leased(path) as lease:
            has_lease = True
            with usable(path):
                clear_parts(path)  # with the lease, because unfinished files may belong to a running process
            stored = _stored_or_new_manifest(path, requested, about)
            yield RunFolder(path, stored, _started_chain(path), lease)
    except (UsageError, TargetError):
        if has_lease and is_new:
            _remove_unused(path)
        raise


def _remove_unused(path: Path) -> None:
    """Remove the files of a run in which nothing is measured, and the folder if nothing else is in it and no other
    process has its lease by now.
    """
    files = [*path.iterdir()]
    of_run = [file for file in files if file.name in {ABOUT, MANIFEST, CHAIN, *OF_LEASE} - {LEASE}]
    if len(of_run) == len(files) and len(read_chain(path, repair=False).links) <= 1:
        for file in of_run:
            file.unlink()
        path.rmdir()


def stored_manifest(path: Path) -> dict[str, Any] | None:
    """Return the manifest of the run in a folder, or None if there is none."""
    return read_manifest(path) if (path / MANIFEST).is_file() else None


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the content of `run.json`. Raises `TargetError` if it is missing, invalid, or of an unknown version."""
    refuse_no_run(path)
    manifest = read_document(path / MANIFEST)
    version = manifest.get("schema_version")
    if version != SCHEMA_VERSION:
        raise TargetError(
            f"{str(path / MANIFEST)!r} has schema version {version}; this version reads "
            f"{SCHEMA_VERSION}. Install the holdfast that wrote it"
        )
    refuse_form(path / MANIFEST, manifest, _Manifest)
    return manifest


def read_about(path: Path) -> dict[str, Any]:
    """Return the start time of a run, and the times of its documents if these are stored. The result is empty if the
    file with them is missing.

    The file is not part of the chain, so other fields in it are ignored. Its command line is a record for the owner of
    the run, and is never shown, since it could be any command.
    """
    if not (path / ABOUT).is_file():
        return {}
    about: dict[str, Any] = validated(path / ABOUT, read_document(path / ABOUT), _About)
    return about


def read_stage(path: Path, chain: Chain, name: str) -> StoredStage | None:
    """Return a complete stage of the run in a folder, or None if it is not complete. No lease is needed."""
    recorded = chain.last("stage", name)
    if recorded is None:
        return None
    file = path / str(recorded["file"])
    file_content = column_files.read(file)
    if file_content.digest != recorded["digest"]:
        raise TargetError(f"{str(file)!r} is not the {name} that the chain recorded; restore it from a copy")
    about = {key: value for key, value in file_content.about.items() if key not in ("stage", "rows")}
    return StoredStage(file_content.columns, recorded.get("reached"), about)


def recorded_document(path: Path, chain: Chain, kind: str) -> dict[str, Any] | None:
    """Return a JSON document of a run after verification of its digest, or None if the chain of the run does not list
    it.
    """
    recorded = chain.last(kind)
    if recorded is None:
        return None
    file = path / str(recorded["file"])
    data = content_of(file)
    if digest(data) != recorded["digest"]:
        raise TargetError(f"{str(file)!r} is not what the chain recorded; restore it from a copy")
    return parsed(file, data)


def refuse_used(path: Path, *, resume: bool) -> None:
    """Raise `UsageError` if a run cannot use a folder: it contains other files, or it contains a run and `resume` is
    false.
    """
    with usable(path):
        if not path.is_dir():
            return
        names = sorted(entry.name for entry in path.iterdir())
    names_before_manifest = OF_LEASE | {ABOUT, JOURNAL}
    run_files = [n for n in names if n in names_before_manifest or (n.startswith(".") and n.endswith(PART))]
    if len(run_files) == len(names):
        return
    if MANIFEST not in names:
        foreign_file = next(name for name in names if name not in run_files)
        raise UsageError(
            f"{str(path)!r} is not a run folder (it contains {foreign_file!r})",
            replace(OTHER_FOLDER, reason="for an empty or a new folder"),
        )
    if not resume:
        raise UsageError(f"{str(path)!r} contains a run already", RESUME, OTHER_FOLDER)
    read_manifest(path)  # refuses another schema version before the model is opened


def _stored_or_new_manifest(path: Path, manifest: dict[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest in the folder, which is written if it is missing.

    Raises `UsageError` if the folder contains another run.
    """
    if (path / MANIFEST).exists():
        stored = read_manifest(path)
        _refuse_other_run(path, stored, manifest)
        return stored
    with usable(path):
        # The manifest is written last, because its presence marks the folder as a run.
        write_atomically(path / ABOUT, document(about))
        write_atomically(path / MANIFEST, document(manifest))
    return manifest


def _refuse_other_run(path: Path, stored: Mapping[str, Any], requested: Mapping[str, Any]) -> None:
    differing = [key for key in SAMENESS if stored["digests"].get(key) != requested["digests"][key]]
    if not differing:
        return
    details = (
        differences(stored.get("config", {}), requested.get("config", {})) if "config" in differing else ""
    )
    shown_details = f" ({details})" if details else ""
    changed = [side.get("config", {}).get("functions") for side in (stored, requested)]
    way = "use the settings of that run"
    if differing == ["code"]:
        way = "resume it with the version of Holdfast that wrote it"
    elif changed[0] != changed[1]:
        way = "use the settings of that run, with its functions restored"
    raise UsageError(
        f"{str(path)!r} is a run with {' and '.join(_OTHER[key] for key in differing)}{shown_details}, so it cannot be "
        "resumed",
        replace(OTHER_FOLDER, reason=f"{OTHER_FOLDER.reason}, or {way}"),
    )


def _started_chain(path: Path) -> Chain:
    """The chain, with a first record for the manifest."""
    chain = read_chain(path, repair=True)
    if not chain.links:
        chain.add({"kind": "run", "file": MANIFEST, "digest": _digest_of(path / MANIFEST)})
    refuse_altered(path, chain)
    return chain


def refuse_altered(path: Path, chain: Chain) -> None:
    """Raise `TargetError` if the manifest of a run does not match its digest in the first record of the chain."""
    if chain.links and chain.links[0].content.get("digest") != _digest_of(path / MANIFEST):
        raise TargetError(f"{str(path / MANIFEST)!r} is not what the chain recorded; restore it from a copy")


def _digest_of(file: Path) -> str:
    return digest(content_of(file))


def _shard_path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}{column_files.SUFFIX}"


def _shard_of(path: Path) -> int:
    # The length is limited, because int() refuses thousands of digits with an error of its own.
    has_shard_number = path.stem.isascii() and path.stem.isdecimal() and len(path.stem) < 20
    if not has_shard_number or path.name != _shard_path(path.parent, int(path.stem)).name:
        raise TargetError(
            f"{str(path)!r} is not a shard of this run (shards have names such as 00012{column_files.SUFFIX}); "
            "remove it"
        )
    return int(path.stem)


def _in_order(splits: Sequence[Split]) -> list[Split]:
    """The events ordered by stage, shard and row, independent of the order of the workers."""
    stages = list(dict.fromkeys(split["stage"] for split in splits))
    return sorted(splits, key=lambda s: (stages.index(s["stage"]), s["shard"], s["at"], -s["size"]))


def read_splits(path: Path) -> list[Split]:
    """Return the events of a run in which memory ran out and a batch was split, in order. Raises `TargetError` for an
    invalid file.
    """
    file = path / SPLITS
    if not file.exists():
        return []
    try:
        content = json.loads(content_of(file))
    except (ValueError, RecursionError) as error:
        raise TargetError(f"{str(file)!r} was changed after it was written: {error}; restore it") from error
    splits: list[Split] = validated(file, content, list[Split])
    return splits
