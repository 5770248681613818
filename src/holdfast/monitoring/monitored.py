"""The result of monitoring a recorded stream."""

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from holdfast.core.estimate import Estimate
from holdfast.monitoring.accuracy import Accuracy
from holdfast.monitoring.watching import ALPHA, DriftResult
from holdfast.reports import monitoring as reported
from holdfast.reports.numbers import strict
from holdfast.reports.terminal import body
from holdfast.reports.tree import Report
from holdfast.reports.write import rendered, write

Json = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A stream or a reference."""

    name: str
    n: int
    labelled: bool
    """whether the classes of its samples are known and used"""


@dataclass(frozen=True)
class Monitored:
    """What the tests found on a stream, and the accuracy of the model on it."""

    stream: Source
    reference: Source
    model: str | None
    """name of the model; None if only the inputs were compared"""
    layer: str | None
    """layer whose outputs are the embeddings; None if there are none"""
    decisive: tuple[str, ...]
    """names of the tests whose alarm sets the exit code 1"""
    results: tuple[DriftResult, ...]
    measured: Accuracy | None = None
    """on the stream; None without its labels or without a model"""
    of_reference: Accuracy | None = None
    """on the reference; None without its labels or without a model"""
    expected: Estimate | None = None
    """accuracy that is expected on the stream from the confidence; None without a model or labels of the reference"""
    notes: tuple[str, ...] = ()
    """notes on the stream and the reference"""

    @property
    def alarmed(self) -> tuple[DriftResult, ...]:
        """The tests that decide the exit code and raised an alarm."""
        return tuple(each for each in self.results if each.name in self.decisive and each.alarm is not None)

    def summary(self) -> Json:
        """Return the content of all reports as strict JSON."""
        return self._summary

    @cached_property
    def _summary(self) -> Json:
        content = {
            "schema_version": reported.MONITORING_VERSION,
            "verb": "monitor",
            "verdict": "alarm" if self.alarmed else "no alarm",
            "alpha": ALPHA,
            "stream": asdict(self.stream),
            "reference": asdict(self.reference),
            "measured": _plain(self.measured),
            "of_reference": _plain(self.of_reference),
            "expected": _plain(self.expected),
            "model": self.model,
            "layer": self.layer,
            "decisive": list(self.decisive),
            "notes": list(self.notes),
            "tests": [_test(result) for result in self.results],
        }
        written: Json = strict(content)
        return written

    @property
    def report(self) -> Report:
        """The report of the stream."""
        return reported.monitoring_report(self._summary)

    def text(self, *, colour: bool = False, width: int | None = None) -> str:
        """Return the tables of the report as text for a terminal."""
        return body(self.report, colour=colour, width=width)

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return rendered(self.report, ".json")

    def write(self, path: str | Path) -> Path:
        """Write a report in the format of the file suffix, such as `.html`. Return the path."""
        return write(self.report, Path(path))

    def __str__(self) -> str:
        return reported.headline(self._summary)


def _plain(part: Accuracy | Estimate | None) -> Json | None:
    return None if part is None else asdict(part)


def _test(result: DriftResult) -> Json:
    kind = result.kind
    return {
        "name": result.name,
        "compares": kind.reads,
        "state": result.state,
        "alarm": None if result.alarm is None else asdict(result.alarm),
        "guarantee": kind.guarantee,
        "power": None if result.power is None else asdict(result.power),
        "fewest": kind.fewest,
        "restarted": list(result.restarted),
    }
