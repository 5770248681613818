"""Verifies that a run folder matches its hash chain."""

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from typing_extensions import TypedDict

from holdfast.core.catalogue import names
from holdfast.core.chain import digest, refuse_malformed_head
from holdfast.core.errors import RESUME, TargetError
from holdfast.runs.store import columns as column_files
from holdfast.runs.store.columns import required, validated
from holdfast.runs.store.files import (
    CHECKPOINTS,
    CLIPS,
    MANIFEST,
    PART,
    SERVED,
    content_of,
)
from holdfast.runs.store.folder import (
    ABOUT,
    CHAIN,
    SPLITS,
    Chain,
    read_chain,
    read_document,
    read_manifest,
    read_splits,
)
from holdfast.runs.store.journal import NAME as ANSWERS
from holdfast.runs.store.leases import OF_LEASE

_BESIDE = OF_LEASE | {CHAIN, ABOUT, SPLITS, SERVED, ANSWERS, "report.json", "curve.svg"}
"""Files of a run that are not in its chain: times, hosts, attempts, and files for resuming it."""
_EVIDENCE = re.compile(
    r".+\.safetensors|(run|doubts|verdict|adaptive|nodes|rotation|before|after|checked(-\d+)?|training|card|finding)\.json",
    re.IGNORECASE,
)
"""Names of files that readers interpret as evidence."""
_CLIP = re.compile(r"\w[\w .-]*/\d+\.wav")
"""Paths of clips in their folder, which lead to no other folder; runs may be untrusted."""


class _Clips(TypedDict):
    """Content of the document with the digests of the saved clips."""

    files: dict[Annotated[str, required(_CLIP.fullmatch, "FOLDER/ID.wav")], str]


_MOST_NOTES = 20
_DEEPEST = 2
"""number of runs around an inner one: the measurements of a hardening within an adaptation have two"""


@dataclass(frozen=True)
class Verified:
    """The result of the verification of a run folder in which no fault was found."""

    head: str
    """digest of the last record; a copy of it that is stored elsewhere distinguishes this run from any other"""
    records: int
    files: int
    complete: bool
    """whether the verdict is recorded, so that the run is finished"""
    notes: tuple[str, ...] = ()
    """notes on files of the folder that are neither in the chain nor known otherwise"""


def verify(path: Path, *, expect_head: str = "") -> Verified:
    """Verify the hash chain of a run folder and the digests of all its files. Raises `TargetError` with the first fault
    that is found. `expect_head` is an earlier head, which the chain must contain; empty for none. Raises
    `UsageError` if it is no digest.

    Files outside the chain (times, hosts, attempts, reports) are not verified. A file that is in no record is refused
    if its name is that of evidence; otherwise the notes mention it.
    """
    refuse_malformed_head(expect_head, f"holdfast verify {shlex.quote(str(path))}")
    outer = _verified(path)
    if expect_head and expect_head not in {link.digest for link in read_chain(path, repair=False).links}:
        raise TargetError(
            f"no record of the chain of {str(path)!r} has the digest {expect_head[:16]}… that was expected: the folder "
            "is another run, or it was written again. Restore the copy whose head was noted, and find out how it was "
            "replaced"
        )
    inner = list(_all_within(path, outer, _DEEPEST))
    notes = [*outer.notes, *(note for verified in inner for note in verified.notes)]
    n_unlisted = len(notes) - _MOST_NOTES
    more = [f"{n_unlisted} more files are in no record of the chain"] if n_unlisted > 0 else []
    return Verified(outer.head, outer.records, outer.files, outer.complete, tuple(notes[:_MOST_NOTES] + more))


def _verified(path: Path) -> Verified:
    """Verify one folder, without the runs inside it."""
    read_manifest(path)
    chain = read_chain(path, repair=False)
    if not chain.links or chain.links[0].content.get("file") != MANIFEST:
        raise TargetError(
            f"the chain of {str(path)!r} does not begin with {MANIFEST}; restore it from a copy"
        )
    newest = {str(link.content["file"]): link.content for link in chain.links}
    # A second record could replace the manifest after the measurements.
    if newest[MANIFEST] != chain.links[0].content:
        raise TargetError(f"the chain of {str(path)!r} contains {MANIFEST} twice; restore it from a copy")
    for name, recorded in newest.items():
        _check_file(path / name, recorded)
    _check_splits(path, chain)
    _check_inner_runs(path, newest)
    clips = _checked_clips(path, newest)
    complete = chain.last("verdict") is not None
    notes = tuple(f"{str(file)!r} is in no record of the chain" for file in _strays(path, newest, clips))
    return Verified(chain.head, len(chain.links), len(newest), complete, notes)


def _check_file(file: Path, recorded: Any) -> None:
    if not file.is_file():
        raise TargetError(f"{str(file)!r} is missing, but the chain records it; restore it from a copy")
    data = content_of(file)
    if digest(data) != recorded["digest"]:
        raise TargetError(
            f"{str(file)!r} was changed: its SHA-256 is {digest(data)[:16]}…, the chain recorded "
            f"{str(recorded['digest'])[:16]}…; restore it from a copy"
        )
    if recorded["kind"] == "stage":
        column_files.decode(data, str(file))


def _check_splits(path: Path, chain: Chain) -> None:
    """Verify that the file of splits matches the splits of complete stages in the chain."""
    splits = read_splits(path)
    for link in chain.links:
        if link.content["kind"] != "stage":
            continue
        stage = link.content["name"]
        if [split for split in splits if split["stage"] == stage] != link.content.get("splits", []):
            raise TargetError(
                f"{str(path / SPLITS)!r} was changed: the chain has other splits for {stage}; restore it"
            )


def _check_inner_runs(path: Path, recorded: Mapping[str, Any]) -> None:
    """Verify that the folder of an inner run exists if a document names its chain."""
    for name in recorded:
        within = path / Path(name).stem
        if name.endswith(".json") and "chain" in read_document(path / name) and not within.is_dir():
            raise TargetError(
                f"{str(within)!r} is missing, but {name!r} contains its chain; restore it from a copy"
            )


def _checked_clips(path: Path, recorded: Mapping[str, Any]) -> set[Path] | None:
    """Verify the saved clips of a run, whose digests are in a document of the run, and return their paths, or None
    without such a document.
    """
    name = f"{CLIPS}.json"
    if name not in recorded:
        return None
    digests = validated(path / name, read_document(path / name), _Clips)["files"]
    for clip, expected in digests.items():
        _check_file(path / CLIPS / clip, {"kind": CLIPS, "digest": expected})
    return {path / CLIPS / clip for clip in digests}


def _strays(path: Path, recorded: Mapping[str, Any], clips: set[Path] | None) -> Iterator[Path]:
    """Yield files that are neither in the chain, nor among the verified `clips`, nor known otherwise. Raises
    `TargetError` for those named like evidence.
    """
    for file in sorted(path.iterdir()):
        expected = file.name in recorded or file.name in _BESIDE or _is_rest(file)
        if file.name == CLIPS and clips is not None:
            for each in sorted(file.rglob("*")):
                if (each.is_symlink() or not each.is_dir()) and each not in clips:
                    yield each
        elif file.is_dir() and not file.is_symlink():
            yield from _strays_of_folder(file)
        elif _EVIDENCE.fullmatch(file.name) and file.name not in recorded:
            raise TargetError(
                f"{str(file)!r} is in no record of the chain; remove it, or restore the chain. If the run was "
                "stopped while it wrote this file, resume it",
                RESUME,
            )
        elif not expected:
            yield file


def _is_rest(file: Path) -> bool:
    """Whether a file is a report, or an incomplete file that a kill left."""
    return file.suffix.lower() in {*names("reports")} - {".json"} or (
        file.name.startswith(".") and file.name.endswith(PART)
    )


def _strays_of_folder(folder: Path) -> Iterator[Path]:
    """Yield files of an incomplete stage that are not shards; shards verify themselves."""
    if folder.name.startswith(CHECKPOINTS) or (folder / MANIFEST).is_file():
        return  # checkpoints are not evidence, and inner runs are verified separately
    for file in sorted(folder.iterdir()):
        if file.suffix == column_files.SUFFIX:
            column_files.read(file)
        elif not _is_rest(file):
            yield file


def _runs_within(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and (entry / MANIFEST).is_file())


def _all_within(path: Path, outer: Verified, depth: int) -> Iterator[Verified]:
    """Verify the inner runs of a run, and those within them."""
    for folder in _runs_within(path):
        if depth == 0:
            raise TargetError(
                f"{str(folder)!r} is a run inside {_DEEPEST} others, and no run is so deep; move it to another place"
            )
        verified = _verified_within(path, folder, outer)
        yield verified
        yield from _all_within(folder, verified, depth - 1)


def _verified_within(path: Path, folder: Path, outer: Verified) -> Verified:
    """Verify an inner run, and that it is the one in the outer chain."""
    if folder.is_symlink():
        raise TargetError(
            f"{str(folder)!r} is a link to another folder; put the folder of the run itself there"
        )
    verified, name = _verified(folder), f"{folder.name}.json"
    recorded = read_chain(path, repair=False).last(folder.name)
    if recorded is not None and read_document(path / name).get("chain") != verified.head:
        raise TargetError(
            f"{str(folder)!r} is not the run whose chain is recorded in {name!r}; restore it from a copy"
        )
    if recorded is None and outer.complete:
        raise TargetError(
            f"{str(folder)!r} is a run that is in no record of the chain of {str(path)!r}; move it to another place"
        )
    return verified
