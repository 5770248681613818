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

    @classmethod
    def started(cls, detectors: Mapping[str, Detector], reference: Signals) -> "SeriesDetectors":
        """Return detectors that have read at most 1,000 samples of the reference before the stream."""
        for values, detector in zip(reference.values[:HORIZON].T.tolist(), detectors.values(), strict=False):
            for value in values:
                detector.update(value)
        return cls(detectors)

    def update(self, batch: Signals, evidence: str) -> Alarm | None:
        """Add the signals of further samples, and return the first alarm among them, if there is one."""
        for row in batch.values[:, : len(self.detectors)].tolist():
            self.n += 1
            for value, (name, detector) in zip(row, self.detectors.items(), strict=True):
                if detector.update(value):
                    return Alarm(self.n, name, name, evidence)
        return None
