"""What a folder of runs contains: runs, audits, pools, chains of servers and adaptations, by names that are safe in
addresses.
"""

import hashlib
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from holdfast.adaptation.journal import is_adaptation, read_adaptation
from holdfast.audits.audit import open_audit
from holdfast.core.errors import HoldfastError, UsageError
from holdfast.core.estimate import Estimate
from holdfast.core.names import slug
from holdfast.gates.judging import overall
from holdfast.metrics.catalogue import estimate
from holdfast.metrics.shares import Absent
from holdfast.runs.store.files import AUDIT_MARK, MANIFEST, POOL_MANIFEST
from holdfast.runs.stored.stored_runs import RunEntry, open_run, run_entry

Kind = Literal["run", "audit", "pool", "chains", "adaptation", "unreadable"]

METRICS = (
    "robust_accuracy",
    "clean_accuracy",
    "certified_accuracy",
    "suite_robust_accuracy",
    "attack_success_rate",
    "worst_class",
    "targeted_success_rate",
    "trigger_success_rate",
)
"""Metrics whose trend is shown: shares, which are computed fast. Those of audits are added."""
_MOST_ENTRIES = 20_000
_VERDICTS = {0: "pass", 1: "fail", 4: "unclear"}


@dataclass(frozen=True)
class Item:
    """An entry of a folder of runs."""

    id: str
    """name in addresses: letters, digits and hyphens of the name of the folder, and digits of its digest"""
    path: Path
    """the folder"""
    kind: Kind
    """what the folder is"""
    entry: RunEntry | None = None
    """what the manifest and the stored verdict state; None for what is no run and no audit"""
    verdict: str = ""
    """verdict as in reports; empty for an unfinished run"""
    metrics: tuple[tuple[str, Estimate], ...] = ()
    """name and estimate of each metric with a trend"""
    checked: bool = False
    """whether the verdict was computed again from the columns of the run"""
    fault: str = ""
    """why the entry cannot be read; empty if it can"""

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.name

    @property
    def state(self) -> str:
        """Verdict, or what the entry is instead, in a few words."""
        if self.fault:
            return "refused"
        if self.entry is None:
            return ""
        if not self.entry.finished:
            return f"not finished: {self.entry.stages_done} of {self.entry.stages} stages"
        return self.verdict

    def value(self, metric: str) -> Estimate | None:
        """Return the estimate of a metric; None if the run does not have it, or is not checked yet."""
        return dict(self.metrics).get(metric)


class Shelf:
    """The entries of a folder of runs. What was read is read again only after a change of its files."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise UsageError(
                f"the folder {str(root)!r} is missing, or is a file; give the folder that contains the folders of runs"
            )
        self.root = root
        self._items: dict[str, tuple[tuple[object, ...], Item]] = {}
        self._lock = threading.Lock()

    def items(self) -> list[Item]:
        """Return the entries, newest first. Their verdicts are those that `check` computed, or else the stored ones."""
        with self._lock:
            found: dict[str, tuple[tuple[object, ...], Item]] = {}
            for path in self._folders():
                kind, state = _kind(path), fingerprint(path)
                if kind is None:
                    continue
                known = self._items.get(path.name)
                found[path.name] = known if known and known[0] == state else (state, _item(path, kind))
            self._items = found
            items = [item for _, item in found.values()]
        return sorted(
            items, key=lambda item: (item.entry.created if item.entry else "", item.name), reverse=True
        )

    def item(self, item_id: str) -> Item | None:
        """Return the entry with a name in addresses; None if there is none."""
        return next((item for item in self.items() if item.id == item_id), None)

    def unchecked(self) -> list[Item]:
        """Return the finished runs whose verdict was not computed again yet."""
        return [item for item in self.items() if _is_finished(item) and not item.checked]

    def check(self, stop: threading.Event | None = None) -> None:
        """Compute the verdicts and the metrics of all finished runs from their columns, until `stop` is set."""
        for item in self.unchecked():
            if stop is not None and stop.is_set():
                return
            state, result = fingerprint(item.path), checked(item)
            with self._lock:
                self._items[item.path.name] = (state, result)

    def _folders(self) -> Sequence[Path]:
        # links are not followed, because the folder of someone else could point anywhere
        folders = [path for path in self.root.iterdir() if path.is_dir() and not path.is_symlink()]
        return sorted([self.root, *folders] if _kind(self.root) else folders)[:_MOST_ENTRIES]


def _kind(path: Path) -> Kind | None:
    marks: dict[str, Kind] = {
        MANIFEST: "run",
        POOL_MANIFEST: "pool",
        AUDIT_MARK: "chains",
    }
    return next((kind for mark, kind in marks.items() if (path / mark).is_file()), None)


def fingerprint(path: Path) -> tuple[object, ...]:
    """Return the names, sizes and times of the files of a folder, which change when it is written."""
    try:
        with os.scandir(path) as files:
            states = [(file.name, file.stat(follow_symlinks=False)) for file in files]
    except OSError:
        return ()
    return tuple(sorted((name, state.st_ino, state.st_size, state.st_mtime_ns) for name, state in states))


def _item(path: Path, kind: Kind) -> Item:
    digest = hashlib.sha256(path.name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    item = Item(f"{slug(path.name)[:60] or kind}-{digest}", path, kind)
    if kind not in ("run", "adaptation"):
        return item
    try:
        if kind == "adaptation" or is_adaptation(path):
            item = replace(item, kind="adaptation")
            return replace(item, verdict=read_adaptation(path).outcome or "not finished")
        entry = run_entry(path, checked=False)
    except (HoldfastError, OSError) as error:
        return replace(
            item, kind="adaptation" if item.kind == "adaptation" else "unreadable", fault=str(error)
        )
    verdict = "" if entry.exit_code is None else _VERDICTS.get(entry.exit_code, "")
    verdict = "no gate" if verdict == "pass" and not entry.gates and entry.verb != "harden" else verdict
    return replace(
        item, kind="audit" if entry.verb.startswith("audit ") else "run", entry=entry, verdict=verdict
    )


def _is_finished(item: Item) -> bool:
    return item.entry is not None and item.entry.finished and not item.fault


def checked(item: Item) -> Item:
    """Return the entry of a finished run with the verdict and the metrics that follow from its columns."""
    try:
        if item.kind == "audit":
            audit = open_audit(item.path)
            return replace(item, verdict=audit.verdict, metrics=tuple(audit.metrics.items()), checked=True)
        result = open_run(item.path)
        unattacked = not result.evidence.threat.constraint.measures_robustness
        values = []
        for name in METRICS if not unattacked else METRICS[1:2] + METRICS[-1:]:
            try:
                values.append((name, estimate(name, result.evidence)))
            except Absent:
                continue
        verdict = overall([gate.verdict for gate in result.gates]) if result.gates else "no gate"
        return replace(item, verdict=verdict, metrics=tuple(values), checked=True)
    except (HoldfastError, OSError) as error:
        return replace(item, fault=str(error), checked=True)
