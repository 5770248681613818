"""Change detectors that read the series of a stream, one detector for each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from holdfast.monitoring.protocol import HORIZON, Alarm
from holdfast.monitoring.signals import Signals


class Detector(Protocol):
    """Protocol of a detector of changes in a sequence of numbers, which begins again after a detection."""

    def update(self, value: float) -> bool:
        """Add a value, and return whether a change is detected."""


@dataclass
class SeriesDetectors:
    """State of the detectors of all series, by the names of the series."""

    detectors: Mapping[str, Detector]
    n: int = 0
    """number of samples of the stream so far"""
    restarted: tuple[str, ...] = ()
    """names of the series whose detectors detected a change within the reference, and began again there"""

    @classmethod
    def started(cls, detectors: Mapping[str, Detector], reference: Signals) -> "SeriesDetectors":
        """Return detectors that have read at most 1,000 samples of the reference before the stream."""
        columns = reference.values[:HORIZON].T.tolist()
        restarted = [
            name
            for values, (name, detector) in zip(columns, detectors.items(), strict=False)
            if sum(map(detector.update, values))
        ]
        return cls(detectors, restarted=tuple(restarted))

    def update(self, batch: Signals, evidence: str) -> Alarm | None:
        """Add the signals of further samples, and return the first alarm among them, if there is one."""
        for row in batch.values[:, : len(self.detectors)].tolist():
            self.n += 1
            for value, (name, detector) in zip(row, self.detectors.items(), strict=True):
                if detector.update(value):
                    return Alarm(self.n, name, name, evidence)
        return None
