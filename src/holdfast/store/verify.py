"""Whether a run folder, or a pool of parameter sets, still is what its chain says."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.core.chain import digest
from holdfast.core.errors import TargetError
from holdfast.store import columns as column_files
from holdfast.store.files import CHECKPOINTS, MANIFEST, usable
from holdfast.store.folder import SPLITS, read_manifest, read_splits
from holdfast.store.records import Chain, read_chain, read_document


@dataclass(frozen=True)
class Verified:
    """A run folder that holds."""

    head: str
    """digest of the last record; who wrote it down elsewhere can tell this run from any other"""
    records: int
    files: int
    complete: bool
    """whether the verdict is in, so that nothing is left to measure"""


def verify(path: Path) -> Verified:
    """Hash every file again and follow the chain; `TargetError` names the first thing that does not hold.

    What lies outside the chain (times, hosts, attempts, reports) is not looked at.
    """
    read_manifest(path)
    chain = read_chain(path, mend=False)
    if not chain.links or chain.links[0].content.get("file") != MANIFEST:
        raise TargetError(
            f"the chain of {str(path)!r} does not begin with {MANIFEST}; restore it from a copy"
        )
    newest = {str(link.content["file"]): link.content for link in chain.links}
    for name, recorded in newest.items():
        _check_file(path / name, recorded)
    _check_splits(path, chain)
    _check_strays(path, newest)
    return Verified(chain.head, len(chain.links), len(newest), chain.last("verdict") is not None)


def _check_file(file: Path, recorded: Any) -> None:
    if not file.is_file():
        raise TargetError(f"{str(file)!r} is gone, though the chain records it; restore it from a copy")
    with usable(file):
        data = file.read_bytes()
    if digest(data) != recorded["digest"]:
        raise TargetError(
            f"{str(file)!r} was changed: its SHA-256 is {digest(data)[:16]}…, the chain recorded "
            f"{str(recorded['digest'])[:16]}…; restore it from a copy"
        )
    if recorded["kind"] == "stage":
        column_files.decode(data, str(file))


def _check_splits(path: Path, chain: Chain) -> None:
    """The splits of complete stages stand in the chain, and must be those in the file."""
    found = read_splits(path)
    for link in chain.links:
        if link.content["kind"] != "stage":
            continue
        stage = link.content["name"]
        if [split for split in found if split["stage"] == stage] != link.content.get("splits", []):
            raise TargetError(
                f"{str(path / SPLITS)!r} was changed: the chain has other splits for {stage}; restore it"
            )


def _check_strays(path: Path, recorded: dict[str, Any]) -> None:
    """Column files that no record names are of an unfinished stage, or were put there."""
    for file in sorted(path.glob(f"*{column_files.SUFFIX}")):
        if file.name not in recorded and not (path / file.stem).is_dir():
            raise TargetError(f"{str(file)!r} is in no record of the chain; remove it, or restore the chain")
    for name in recorded:
        within = path / Path(name).stem
        if name.endswith(".json") and "chain" in read_document(path / name) and not within.is_dir():
            raise TargetError(
                f"{str(within)!r} is gone, though {name!r} names its chain; restore it from a copy"
            )
    for folder in sorted(each for each in path.iterdir() if each.is_dir()):
        if (folder / MANIFEST).is_file():
            _check_within(path, folder, recorded)
        elif not folder.name.startswith(CHECKPOINTS):  # what a training goes on from is no evidence
            for file in sorted(folder.glob(f"*{column_files.SUFFIX}")):
                column_files.read(file)


def _check_within(path: Path, folder: Path, recorded: dict[str, Any]) -> None:
    """A run within a run holds by itself, and is the one that the outer chain knows."""
    head, name = verify(folder).head, f"{folder.name}.json"
    if name in recorded and read_document(path / name).get("chain") != head:
        raise TargetError(f"{str(folder)!r} is not the run that {name!r} names; restore it from a copy")
