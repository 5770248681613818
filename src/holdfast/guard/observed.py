"""How often the calibrated rules of a guard fire in production."""

from dataclasses import dataclass, field
from threading import Lock

from holdfast.core.estimate import Estimate
from holdfast.statistics.anytime import confidence_sequence


@dataclass
class ObservedRate:
    """Counter of the inputs for which a calibrated rule fired. The rate is that of false positives if there are no
    attacks, and otherwise an upper bound of it.
    """

    expected: float = 0.001
    """false-positive rate to which the guard was calibrated"""
    n: int = 0
    """number of inputs"""
    alarms: int = 0
    """number of inputs for which a calibrated rule fired"""
    _lock: Lock = field(default_factory=Lock, repr=False)

    def add(self, n: int, alarms: int) -> None:
        """Add `n` inputs, of which `alarms` fired a rule. May be called by several threads."""
        with self._lock:
            self.n, self.alarms = self.n + n, self.alarms + alarms

    def estimate(self, confidence: float = 0.95) -> Estimate | None:
        """Return the rate with an interval that is valid at all times, or None before the first input."""
        with self._lock:
            n, alarms = self.n, self.alarms
        if not n:
            return None
        return Estimate(alarms / n, *confidence_sequence(alarms, n, confidence, expected=self.expected), n)

    @property
    def too_high(self) -> bool:
        """Whether the rate is above the calibrated one, with 95 % confidence: the inputs have changed, or there is an
        attack.
        """
        estimate = self.estimate()
        return estimate is not None and estimate.low > self.expected
