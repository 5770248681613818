"""What a folder of runs contains, what each attack did to each example of a run, and trends over the
runs of a model.
"""

import hashlib
import os
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from holdfast.adaptation.journal import is_adaptation, read_adaptation
from holdfast.audits.audit import open_audit
from holdfast.core.errors import HoldfastError, UsageError
from holdfast.core.estimate import Estimate
from holdfast.core.evidence import AttackRecord, Evidence, PassRecord
from holdfast.core.names import slug
from holdfast.gates.judging import overall
from holdfast.metrics.catalogue import estimate
from holdfast.metrics.comparisons import paired_examples
from holdfast.metrics.shares import Absent, within
from holdfast.reports.curves import class_name, robust_examples
from holdfast.reports.words import label, shown
from holdfast.runs.assess.result import Result
from holdfast.runs.documents.stored_runs import RunEntry, attacked_stages, open_run, run_entry
from holdfast.runs.store.files import AUDIT_MARK, MANIFEST, POOL_MANIFEST

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
    verdict = (
        "no gate"
        if verdict == "pass" and not entry.gates and (entry.is_audit or entry.verb != "harden")
        else verdict
    )
    return replace(item, kind="audit" if entry.is_audit else "run", entry=entry, verdict=verdict)


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


BROKEN, WITHSTOOD, NOT_RUN = "broken", "withstood", "not run"
ANY = "any"
"""name, in place of that of an attack, of all examples that something broke"""
KINDS = ("robust", "broken", "misclassified")
"""outcomes of an example in a run: correct under all attacks, broken by one, wrong when clean"""


@dataclass(frozen=True)
class Attempt:
    """What the attack of a `stage` with a `name` did to the examples of a run, as masks: it `broke` them, and `ran` on
    them.
    """

    stage: str
    name: str
    broke: Tensor
    ran: Tensor

    def outcome(self, row: int) -> str:
        """Return what the attack did to the example in a row."""
        return BROKEN if self.broke[row] else WITHSTOOD if self.ran[row] else NOT_RUN


def attempts(result: Result) -> list[Attempt]:
    """Return what each attack of the suite did to each example, in the order of the evidence."""
    if result.folder is None:
        return []
    ids, found, names = result.evidence["id"], [], attack_names(result.evidence)
    rows = {int(example): row for row, example in enumerate(ids)}
    for stage, columns in attacked_stages(result.folder).items():
        if "success" not in columns:
            continue
        broke, ran = torch.zeros(len(ids), dtype=torch.bool), torch.zeros(len(ids), dtype=torch.bool)
        success, was_run = (
            columns["success"].bool(),
            columns.get("ran", torch.ones_like(columns["success"])).bool(),
        )
        if "distance" in columns and result.evidence.threat.constraint.in_input_units:
            success = success & within(columns["distance"], result.evidence.threat.constraint.eps)
        places = torch.tensor([rows[int(example)] for example in columns["id"]], dtype=torch.long)
        broke[places], ran[places] = success & was_run, was_run
        found.append(Attempt(stage, names[stage], broke, ran))
    return found


def broken_not(tried: Sequence[Attempt], by: str, but: str = "") -> Tensor:
    """Return the mask of the examples that one attack broke and that withstood another.

    `by` and `but` are names of stages; `by` may be `any`, and without `but` only the first counts. Raises `KeyError`
    for an unknown name.
    """
    named = {attempt.stage: attempt for attempt in tried}
    broke = torch.stack([each.broke for each in tried]).any(0) if by == ANY else named[by].broke
    return broke & named[but].ran & ~named[but].broke if but else broke


def kinds(evidence: Evidence) -> list[str]:
    """Return the outcome of each example: `robust`, `broken` or `misclassified`."""
    robust, correct = robust_examples(evidence).tolist(), evidence["correct"].bool().tolist()
    return [KINDS[0] if r else KINDS[1] if c else KINDS[2] for r, c in zip(robust, correct, strict=True)]


def attack_names(evidence: Evidence) -> dict[str, str]:
    """Return the names of the attacks and passes of a run by their stages, in the order of `broken_by`. A name of
    several attacks is followed by the stage.
    """
    records: list[AttackRecord | PassRecord] = [*evidence.attacks, *evidence.passes]
    n_records = Counter(record.name for record in records)
    return {
        record.stage: record.name if n_records[record.name] == 1 else f"{record.name} ({record.stage})"
        for record in records
    }


def broken_by(evidence: Evidence) -> list[str]:
    """Return the name of the attack or pass that broke each example; empty if none did."""
    names = [*attack_names(evidence).values()]
    places = evidence["broken_by"].tolist() if "broken_by" in evidence else [-1] * len(evidence)
    return [names[place] if 0 <= place < len(names) else "" for place in places]


def texts(evidence: Evidence, row: int) -> tuple[str, str, str]:
    """Return the label of an example, its prediction when clean and its prediction when attacked, in words. A model
    with another task than classes has what it returned in place of predictions; a label that is no text is empty.
    """
    if "task" in evidence.model:
        from holdfast.reports.tasks import example_texts  # late: most models are of classes

        truth, clean, attacked = example_texts(evidence, row)
        return truth or "", clean, attacked
    names = tuple(str(name) for name in evidence.data.get("classes") or ())
    label, clean, attacked = (
        "rejected" if value < 0 else class_name(value, names)
        for value in (int(evidence[name][row]) for name in ("y", "prediction", "adversarial_prediction"))
    )
    return label, clean, attacked


@dataclass(frozen=True)
class Pair:
    """An example that two runs share: its ids `first_id` and `second_id`, its `label`, its outcomes `first` and
    `second`, and the attacks `first_breaker` and `second_breaker` that broke it.
    """

    first_id: int
    second_id: int
    label: str
    first: str
    second: str
    first_breaker: str
    second_breaker: str


def pairs(first: Evidence, second: Evidence) -> list[Pair]:
    """Return the examples that two runs share, with their outcome in each. Raises `UsageError` if there are none."""
    shared, outcomes = paired_examples(first, second), (kinds(first), kinds(second))
    breakers = broken_by(first), broken_by(second)
    return [
        Pair(
            int(first["id"][a]),
            int(second["id"][b]),
            texts(first, a)[0],
            outcomes[0][a],
            outcomes[1][b],
            breakers[0][a],
            breakers[1][b],
        )
        for a, b in zip(shared.first.tolist(), shared.second.tolist(), strict=True)
    ]


WIDTH, HEIGHT = 720, 220
_EDGE = 10
_LEAST_SPAN = 1e-9  # of values that are all equal


@dataclass(frozen=True)
class Point:
    """A run in a chart: `item` and `estimate`, and its coordinates `x`, `y`, and `low` and `high` of the interval."""

    item: Item
    estimate: Estimate
    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Trend:
    """The values of a metric over the runs that are comparable: one model, one data set, one threat and suite."""

    title: str
    """the finding, as a sentence"""
    alternative: str
    """the chart in words"""
    about: str
    """data, threat and suite of the runs"""
    points: tuple[Point, ...]
    line: str
    """path of the line through the values"""
    top: str
    """largest value of the vertical axis, as text"""
    bottom: str
    """smallest value of the vertical axis, as text"""


def trends(items: Sequence[Item], metric: str) -> list[Trend]:
    """Return the trends of a metric over runs of one model, the longest first. Runs on other data, under other threats,
    of other verbs and with other defences in front of the model are not comparable, and have a trend of their own.
    """
    groups: dict[tuple[str, ...], list[tuple[Item, Estimate]]] = {}
    for item in sorted(items, key=lambda each: (each.entry.created if each.entry else "", each.name)):
        value, entry = item.value(metric), item.entry
        if value is not None and entry is not None and not item.fault:
            group = (entry.data, entry.threat, entry.suite, entry.verb, entry.defence)
            groups.setdefault(group, []).append((item, value))
    return sorted(
        (_trend(group, runs, metric) for group, runs in groups.items()), key=lambda t: -len(t.points)
    )


def _trend(group: tuple[str, ...], runs: Sequence[tuple[Item, Estimate]], metric: str) -> Trend:
    about = ", ".join(part for part in group if part)
    # an infinite end of an interval is drawn at the value
    ends = [(max(e.low, min(e.value, 0.0)), min(e.high, max(e.value, 1.0))) for _, e in runs]
    least, most = min(low for low, _ in ends), max(high for _, high in ends)
    span = max(most - least, _LEAST_SPAN)
    step = (WIDTH - 2 * _EDGE) / max(len(runs) - 1, 1)

    def level(value: float) -> float:
        return round(_EDGE + (HEIGHT - 2 * _EDGE) * (most - value) / span, 1)

    points = tuple(
        Point(item, value, round(_EDGE + step * place, 1), level(value.value), level(low), level(high))
        for place, ((item, value), (low, high)) in enumerate(zip(runs, ends, strict=True))
    )
    return Trend(
        _finding(runs, metric),
        f"{label(metric)} of {len(runs)} runs ({about}), oldest first: "
        + ", ".join(shown(metric, value.value) for _, value in runs[:20])
        + (f" and {len(runs) - 20} more" if len(runs) > 20 else ""),
        about,
        points,
        "M" + "L".join(f"{point.x},{point.y}" for point in points),
        shown(metric, most),
        shown(metric, least),
    )


def _finding(runs: Sequence[tuple[Item, Estimate]], metric: str) -> str:
    """The change from the first to the last run, if their intervals do not overlap."""
    first, last = runs[0][1], runs[-1][1]
    name, values = label(metric), (shown(metric, first.value), shown(metric, last.value))
    if len(runs) == 1:
        return f"One run: {name} {values[1]}"
    if first.high < last.low:
        return f"{name} rose from {values[0]} to {values[1]} over {len(runs)} runs"
    if last.high < first.low:
        return f"{name} fell from {values[0]} to {values[1]} over {len(runs)} runs"
    return (
        f"No difference of {name} is shown between the first ({values[0]}) and the last ({values[1]}) of {len(runs)} "
        "runs: their intervals overlap"
    )


def trend_csv(found: Sequence[Trend], metric: str) -> list[list[str | float | int]]:
    """Return the numbers of trends as rows of a table, with a heading."""
    rows: list[list[str | float | int]] = [["runs", "run", "created", "metric", "value", "low", "high", "n"]]
    for trend in found:
        for point in trend.points:
            created = point.item.entry.created if point.item.entry else ""
            e = point.estimate
            rows.append([trend.about, point.item.name, created, metric, e.value, e.low, e.high, e.n])
    return rows
