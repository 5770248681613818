"""Compares the columns of the stages of a stored run with each other, and the examples on which each stage was run with
those that its plan selects. No model is queried.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holdfast.core.constraints import Constraint
from holdfast.core.errors import TargetError
from holdfast.core.evidence import Columns
from holdfast.core.threat import ThreatModel
from holdfast.runs.assess.collecting_evidence import ADAPTIVE, DOUBTS
from holdfast.runs.assess.measuring import CutShort, out_of_time
from holdfast.runs.engine.identity import code_digest
from holdfast.runs.harness import Outline, Stage, StageKind, StageOutline, due_examples
from holdfast.runs.store.columns import SUFFIX
from holdfast.runs.store.files import MANIFEST
from holdfast.runs.store.records import Chain
from holdfast.runs.stored.documents import outline_from_json

Json = Mapping[str, Any]

_TOLERANCE = 1e-6
"""Relative difference of two results of one computation on two machines."""
_RADIUS_TOLERANCE = 1e-4
"""Relative difference of a certified radius and that computed from its bound, which is less exact near 1."""


def refuse_other(file: Path, field: str, stored: object, computed: object) -> None:
    """Raise `TargetError` if a field of a document is not the value that is computed from the run."""
    if not _same(stored, computed):
        raise TargetError(
            f"{str(file)!r} states {field} {shortened(stored)}, but the columns of the run give {shortened(computed)}; "
            "restore the run from a copy, or measure it again"
        )


def _same(stored: object, computed: object) -> bool:
    """Return whether two values are equal, with a tolerance for numbers, also in lists and mappings."""
    if isinstance(stored, Mapping) and isinstance(computed, Mapping):
        return stored.keys() == computed.keys() and all(_same(stored[key], computed[key]) for key in stored)
    if isinstance(stored, list) and isinstance(computed, list):
        return len(stored) == len(computed) and all(map(_same, stored, computed))
    if isinstance(stored, bool) or isinstance(computed, bool):
        return stored is computed
    numbers = [float(value) for value in (stored, computed) if isinstance(value, int | float)]
    if len(numbers) == 2:
        return all(map(math.isnan, numbers)) or math.isclose(*numbers, rel_tol=_TOLERANCE, abs_tol=1e-9)
    return stored == computed


def shortened(value: object) -> str:
    """Return a value as text of limited length for a message."""
    text = repr(value) if not isinstance(value, float) else f"{value:.6g}"
    return text if len(text) <= 100 else f"{text[:100]}…"


@dataclass(frozen=True)
class _Comparison:
    """Compares columns of a run folder, whose examples have these ids, and refuses different values."""

    path: Path
    ids: Tensor

    def __call__(self, stage: str, column: str, stored: Tensor, computed: Tensor, source: str) -> None:
        differing = self.ids[stored != computed].tolist()
        if differing:
            raise TargetError(
                f"{str(self.path / f'{stage}{SUFFIX}')!r} states in the column {column} another value than {source} "
                f"for the example {differing[0]} ({len(differing):,} examples in all); restore the run from a copy, "
                "or measure it again"
            )


def refuse_columns(path: Path, manifest: Json, by_stage: Mapping[str, Columns]) -> None:
    """Raise `TargetError` if the columns that state which examples are correct, eligible, broken or certified
    contradict the columns that decide this, such as predictions, margins, distances and bounds.
    """
    clean, outline = by_stage["clean"], outline_from_json(manifest["config"])
    correct, refuse = clean["correct"], _Comparison(path, clean["id"])
    refuse("clean", "correct", correct, clean["right"] > 0.5, "the column right")
    # the votes of a randomised model, and new draws of a smoothed one, may differ from the output with the margin
    exact = not manifest["model"]["randomised"] and "smoothed" not in manifest["model"]
    if exact:
        refuse("clean", "correct", correct, clean["margin"] > 0, "the column margin")
        predicted = clean["prediction"] == clean["y"]  # also for some ties, which count as wrong
        refuse("clean", "correct", correct, correct & predicted, "the column prediction")
    goal, eligible = outline.threat.goal, torch.ones_like(correct)
    if goal is not None:
        eligible = (clean["y"] != goal) & (clean["prediction"] != goal)
    source = "an untargeted threat model" if goal is None else f"the target class {goal}"
    refuse("clean", "eligible", clean["eligible"], eligible, source)
    for step in outline.steps:
        columns = by_stage.get(step.name)
        if columns is None:
            continue
        if step.kind.sharded:
            refuse(step.name, "id", columns["id"], clean["id"], "the clean stage")
        if step.kind.proves:
            _refuse_proofs(refuse, step, columns, outline.threat.constraint.eps)
        elif step.kind.in_suite or step.kind.title:
            _refuse_attack(refuse, step, columns, outline, correct & eligible, exact=exact)


def _refuse_attack(
    refuse: _Comparison,
    step: StageOutline,
    columns: Columns,
    outline: Outline,
    eligible: Tensor,
    *,
    exact: bool,
) -> None:
    constraint = outline.threat.constraint
    judged, wrong = eligible & columns["ran"], ~(columns["right"] > 0.5)
    if exact:
        beaten = ~(columns["height"] > 0)
        refuse(step.name, "right", wrong & judged, beaten & judged, "the column height")
    stored = columns["success"] if step.kind.in_suite else columns["success"] & eligible
    expected = judged & wrong
    if step.kind.smallest or outline.smallest:  # the inputs of all other attacks are inside the threat model
        expected = expected & (stored | _inside(constraint, columns["distance"]))
    refuse(step.name, "success", stored, expected, "the column right")


def _inside(constraint: Constraint, distances: Tensor) -> Tensor:
    """The mask of the distances that are certainly inside a ball: half of the least tolerance of `allowed` is left for
    their rounding. No distance is inside another constraint.
    """
    return (distances.double() <= constraint.eps * (1 + 0.5e-6) + 0.5e-7) & constraint.is_ball


def _refuse_proofs(refuse: _Comparison, step: StageOutline, columns: Columns, eps: float) -> None:
    """Compare the certificates of a method with its bounds and, for a statistical one, its radii."""
    certified, bound = columns["certified"], columns["bound"]
    possible = columns["ran"] & ~columns["claimed"] & (bound > 0)
    sources = "the columns ran, claimed and bound"
    if "radius" in columns and "abstained" not in columns:
        possible, sources = columns["ran"] & (columns["radius"] >= eps), "the columns ran and radius"
        refuse(step.name, "radius", columns["radius"] >= eps, certified, "the column certified")
    elif "radius" in columns:
        radius = columns["radius"]
        possible = columns["ran"] & ~columns["abstained"] & (radius >= eps)
        sources = "the columns ran, abstained and radius"
        if "sigma" not in step.settings:  # masking, whose radius is a share of the number of words
            refuse(step.name, "radius", radius >= eps, bound >= 0, "the column bound")
        elif math.isfinite(eps):  # otherwise the bound is -1, whatever the radius is
            sigma = float(step.settings["sigma"])
            proved = (eps + sigma * torch.special.ndtri((1 + bound) / 2)).clamp_min(0.0)
            proved = torch.where(certified, proved.clamp_min(eps), proved) * (1 + _RADIUS_TOLERANCE)
            refuse(
                step.name, "radius", columns["ran"] & (radius <= proved), columns["ran"], "the column bound"
            )
        refuse(step.name, "radius", radius > 0, columns["ran"] & (radius > 0), "the column ran")
    refuse(step.name, "certified", certified, certified & possible, sources)


@dataclass(frozen=True)
class _StoredSchedule:
    """The part of a stored plan that decides on which examples its stages are run."""

    threat: ThreatModel
    seed: int
    smallest: bool
    full: bool
    steps: tuple[Stage, ...]

    def stages(self) -> Sequence[Stage]:
        """Return the stages without their attacks."""
        return self.steps


def _schedule(outline: Outline, *, full: bool) -> _StoredSchedule:
    stages: list[Stage] = []
    for step in outline.steps:
        waves = [each for each in outline.steps if step.wave_of in (each.name, each.wave_of) and step.wave_of]
        earlier = tuple(each.name for each in waves[: waves.index(step)]) if waves else ()
        stages.append(Stage(step.name, step.kind, earlier=earlier, adaptive=step.adaptive))
    return _StoredSchedule(outline.threat, outline.seed, outline.smallest, full, tuple(stages))


def refuse_other_rows(
    path: Path,
    manifest: Json,
    chain: Chain,
    by_stage: Mapping[str, Columns],
    doubts_json: Json,
    adapted: Json | None,
) -> None:
    """Raise `TargetError` if a stage was run on other examples than its plan selects from the results of the stages
    before it, or if time ran out during a stage of a run without a time limit or without a note on it.

    If another version wrote the run, an attack of the suite may have been run on more examples, and attacks in waves
    and adaptive attacks on others, since their selection differs between versions.
    """
    clean, outline = by_stage["clean"], outline_from_json(manifest["config"])
    schedule = _schedule(outline, full=manifest["config"].get("full") is True)
    refuse, own = _Comparison(path, clean["id"]), manifest["digests"]["code"] == code_digest()
    n, before, cut = len(clean["id"]), dict[str, Columns](), list[tuple[StageOutline, int]]()
    for stage, step in zip(schedule.stages(), outline.steps, strict=True):
        record, columns = chain.last("stage", step.name), by_stage.get(step.name)
        if record is None:
            continue
        finished = n
        if record.get("reached") is not None:
            finished = _finished_rows(path, manifest, step, record["reached"])
            cut.append((step, finished))
        if columns is None:
            continue
        if _selects(step.kind) and "ran" in columns:
            due = due_examples(stage, schedule, before)
            assert due is not None
            due = due & (torch.arange(n) < finished)
            ran, free = columns["ran"], bool(stage.adaptive or stage.earlier or _has_waves(schedule, step))
            if own or not (free or step.kind.proves):
                expected = due if own else ran | due
                refuse(step.name, "ran", ran, expected, "the column success of the stages before")
        before[step.name] = columns
    if own:
        _refuse_silent(path, outline, cut, n, doubts_json, adapted)


def _selects(kind: StageKind) -> bool:
    """Whether stages of a kind are run on examples that the plan and earlier columns select."""
    return kind.sharded and (kind.in_suite or kind.proves or bool(kind.title))


def _has_waves(schedule: _StoredSchedule, step: StageOutline) -> bool:
    return any(later.earlier[:1] == (step.name,) for later in schedule.stages())


def _finished_rows(path: Path, manifest: Json, step: StageOutline, reached: object) -> int:
    """The number of examples for which there was time in a stage that measured the shards before `reached`."""
    shards, limit = (
        manifest["plan"]["shards"] if step.kind.sharded else [[0]],
        manifest["config"]["time_budget_s"],
    )
    valid = type(reached) is int and 0 <= reached < len(shards)
    if not valid or not isinstance(limit, int | float):
        raise TargetError(
            f"the chain of {str(path)!r} states that time ran out during the stage {shortened(step.name)} after the "
            f"shard {shortened(reached)}, but {MANIFEST} states {len(shards)} shards and the time limit "
            f"{shortened(limit)}; restore the run from a copy, or measure it again"
        )
    assert isinstance(reached, int)
    return int(shards[reached][0])


def _refuse_silent(
    path: Path,
    outline: Outline,
    cut: Sequence[tuple[StageOutline, int]],
    n: int,
    doubts_json: Json,
    adapted: Json | None,
) -> None:
    """Compare the notes on the stages for which time ran out with those that the documents contain."""
    stated = {DOUBTS: doubts_json["notes"], ADAPTIVE: [] if adapted is None else adapted["unfinished"]}
    for name, notes in stated.items():
        stages = [
            CutShort(step.attack or step.name, step.kind, rows)
            for step, rows in cut
            if step.adaptive == (name == ADAPTIVE)
        ]
        missing = [note for note in out_of_time(stages, n, outline) if note not in notes]
        if missing:
            refuse_other(path / f"{name}.json", "notes", notes, missing)
