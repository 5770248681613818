"""What a row measured, as a dated record: a JSON file with everything and a table in Markdown to read."""

import json
import os
import platform
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers
from benchmarks.absent import Absent

FOLDER = Path(__file__).parent / "records"
Cells = dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """One number that the row must show, and what it shows."""

    text: str
    """such as `cost / floor <= 1.05`"""
    value: float
    bound: float
    least: bool = False
    """the value must reach the bound, rather than stay below it"""

    @property
    def met(self) -> bool:
        """Whether the number is what it must be."""
        return self.value >= self.bound if self.least else self.value <= self.bound


@dataclass(frozen=True)
class Outcome:
    """All that one row measured; `Absent` where that shows nothing, with the notes as the reasons."""

    table: list[Cells]
    claims: list[Claim]
    config: Cells
    """network, images, constraint, steps, rounds, seeds: everything needed to repeat it"""
    detail: Cells = field(default_factory=dict)
    """numbers of every seed and round"""
    notes: list[str] = field(default_factory=list)
    """what was absent and what else to know; each is written once"""

    def __post_init__(self) -> None:
        if not self.claims:
            raise Absent("; ".join(_once(self.notes)))


def hardware() -> Cells:
    """The processor and how much of it was used."""
    names = [
        line.partition(":")[2].strip()
        for line in _read("/proc/cpuinfo").splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def versions() -> Cells:
    """Of the interpreter, torch, and every peer that was named."""
    named = {name: peers.version(name) for name in (*peers.DISTRIBUTIONS, *peers.CHECKOUTS)}
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "holdfast": peers.commit(Path(__file__).resolve().parent),
        **named,
    }


def write(row: str, what: str, outcome: Outcome) -> Path:
    """Write `<date>-<row>.json` and its `.md`; returns the path of the table."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC)
    path = FOLDER / f"{now:%Y-%m-%d}-{row}"
    claims = [{"claim": c.text, "value": round(c.value, 4), "met": c.met} for c in outcome.claims]
    head = {
        "row": row,
        "what": what,
        "command": f"python -m benchmarks --only {row}"
        + (" --peers FOLDER" if "--peers" in sys.argv else ""),
        "made": f"{now:%Y-%m-%dT%H:%MZ}",
        "hardware": hardware(),
        "versions": versions(),
    }
    body = {"config": outcome.config, "claims": claims, "table": outcome.table, "detail": outcome.detail}
    path.with_suffix(".json").write_text(
        json.dumps({**head, **body, "notes": _once(outcome.notes)}, indent=1) + "\n"
    )
    path.with_suffix(".md").write_text(_markdown(head, outcome))
    return path.with_suffix(".md")


def newest(row: str) -> Cells:
    """The newest record of a row, as `write` wrote it."""
    kept = sorted(FOLDER.glob(f"????-??-??-{row}.json"))
    if not kept:
        raise Absent(f"there is no record of {row}; make it first, by --only {row}")
    found: Cells = json.loads(kept[-1].read_text())
    return found


def _once(notes: list[str]) -> list[str]:
    return list(dict.fromkeys(notes))


def _markdown(head: Cells, outcome: Outcome) -> str:
    lines = [f"# {head['what']}", "", f"`{head['command']}`, {head['made']}", ""]
    lines += [f"- {'met' if c.met else '**missed**'}: {c.text}: {c.value:.4g}" for c in outcome.claims]
    lines += ["", *as_table(outcome.table), ""]
    lines += [f"- {note}" for note in (*_once(outcome.notes), *_when(outcome.detail))]
    machine = head["hardware"]
    lines += ["", "Settings: " + ", ".join(f"{k} {v}" for k, v in outcome.config.items()) + "."]
    lines += [f"Machine: {machine['processor']}, {machine['threads']} thread of {machine['cores']} cores."]
    return "\n".join(
        [*lines, "Versions: " + ", ".join(f"{k} {v}" for k, v in head["versions"].items()) + ".", ""]
    )


def _when(detail: Cells) -> list[str]:
    """Which parts of a row that takes hours were measured at which commit, where they were at several."""
    parts: dict[str, list[str]] = {}
    for name, kept in detail.items():
        if isinstance(kept, dict) and {"made", "holdfast"} <= kept.keys():
            parts.setdefault(kept["holdfast"], []).append(name)
    if len(parts) == 1:
        return [f"every part was measured at {commit}" for commit in parts]
    return [f"measured at {commit}: {'; '.join(names)}" for commit, names in parts.items()]


def as_table(rows: list[Cells]) -> list[str]:
    """Lines of a Markdown table with the union of the rows' columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column, "")) for column in columns] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return ["| " + " | ".join(line) + " |" for line in lines] if columns else []


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).is_file() else ""
