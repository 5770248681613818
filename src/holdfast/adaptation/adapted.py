"""The result of an adaptation."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from textwrap import wrap
from typing import Any, Literal

from holdfast.adaptation.journal import Adaptation, Outcome, Step
from holdfast.core.names import line
from holdfast.reports.tree import Check, Report, Section, Table
from holdfast.reports.write import rendered, write


@dataclass(frozen=True)
class Adapted:
    """How an adaptation ended, and its steps with their facts."""

    run: str
    server: str
    outcome: Outcome
    reason: str
    steps: tuple[Step, ...]
    folder: Path

    @classmethod
    def of(cls, stored: Adaptation) -> "Adapted":
        """Return the result of a run that has ended."""
        assert stored.outcome is not None
        return cls(stored.run, stored.server, stored.outcome, stored.reason, stored.steps, stored.folder)

    @property
    def promoted(self) -> bool:
        """Whether the candidate serves now."""
        return self.outcome == "promoted"

    @property
    def exit_code(self) -> int:
        """0 if the candidate was promoted, and 1 if not."""
        return 0 if self.promoted else 1

    def summary(self) -> dict[str, Any]:
        """Return the result as strict JSON."""
        return {
            "schema_version": 1,
            "verb": "adapt",
            "run": self.run,
            "server": self.server,
            "outcome": self.outcome,
            "reason": self.reason,
            "steps": [asdict(step) for step in self.steps],
        }

    @property
    def report(self) -> Report:
        """The report of the adaptation."""
        state: Literal["pass", "fail"] = "pass" if self.promoted else "fail"
        return Report(
            verb="adapt",
            about=f"adaptation of {self.server}",
            headline=str(self),
            content=self.summary(),
            tone=state,
            sections=(Section("Steps", (steps_table(self.steps),)),),
            checks=(Check("adaptation", "promotion", state, str(self)),),
        )

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return rendered(self.report, ".json")

    def write(self, path: str | Path) -> Path:
        """Write a report in the format of the file suffix, such as `.html`. Return the path."""
        return write(self.report, Path(path))

    def text(self, *, width: int | None = None) -> str:
        """Return the steps as text, each with its time (UTC) and its facts."""
        blocks = []
        for step in self.steps:
            begin = f"{clock(step.time)}  {step.step:<11}"
            blocks += wrap(
                begin + facts_text(step.step, step.facts), width or 100, subsequent_indent=" " * len(begin)
            )
        return "\n".join(blocks)

    def __str__(self) -> str:
        ends = {
            "promoted": "The candidate was promoted",
            "not promoted": "The candidate was not promoted",
            "rolled back": "The candidate was promoted and rolled back",
        }
        return line(f"{ends[self.outcome]}{f': {self.reason}' if self.reason else ''}.")


def steps_table(steps: Sequence[Step]) -> Table:
    """Return the steps of an adaptation, each with its time (UTC) and its facts, as a table."""
    rows = [(step.step, clock(step.time), facts_text(step.step, step.facts) or "-") for step in steps]
    return Table(("step", "time", "facts"), rows, texts=frozenset({1, 2}))


def facts_text(step: str, facts: Mapping[str, Any]) -> str:
    """Return the facts of a step as one line, without those that have parts or are empty. A fact that has the name of
    its step is written without the name.

    >>> facts_text("quarantine", {"flagged": 3, "share": 0.25, "classes": ["a", "b"]})
    'flagged 3; share 0.25; classes: a, b'
    >>> facts_text("gates", {"gates": ["robust_accuracy >= 0.5: pass"]})
    'robust_accuracy >= 0.5: pass'
    """
    parts = []
    for key, value in facts.items():
        if isinstance(value, Mapping) or value == "":
            continue
        if isinstance(value, Sequence) and not isinstance(value, str):
            between, shown = ": ", ", ".join(map(str, value))
        elif isinstance(value, bool):
            between, shown = ": ", "yes" if value else "no"
        else:
            between, shown = " ", f"{value:.4g}" if isinstance(value, float) else str(value)
        parts.append(shown if key == step else f"{key.replace('_', ' ')}{between}{shown}")
    return line("; ".join(parts))


def clock(time: float) -> str:
    """Return the time of day in UTC as text, of the same length if it is unknown."""
    return f"{datetime.fromtimestamp(time, UTC):%H:%M:%S}" if time else "--:--:--"
