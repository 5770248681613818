"""Division of a stream into consecutive windows of equal length."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from holdfast.monitoring.protocol import WINDOW
from holdfast.monitoring.signals import Signals, joined


@dataclass
class Windows:
    """Signals of the incomplete window, and the number of samples in complete ones."""

    waiting: list[Signals] = field(default_factory=list)
    n_tested: int = 0

    def completed(self, batch: Signals) -> Iterator[Signals]:
        """Yield each window that is complete with the samples of a batch."""
        rows = joined([*self.waiting, batch])
        while len(rows) >= WINDOW:
            self.n_tested += WINDOW
            window, rows = rows.at(slice(WINDOW)), rows.at(slice(WINDOW, None))
            yield window
        self.waiting = [rows]
