"""Comparison of two runs on the same examples, paired by the content of each example."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from holdfast.core.estimate import Estimate
from holdfast.metrics.paired import clean_accuracy_drop, regression
from holdfast.reports import comparison as reported
from holdfast.reports.summary import Json
from holdfast.reports.write import write_comparison
from holdfast.verbs.result import Result


@dataclass(frozen=True)
class Comparison:
    """Comparison of a second run with a first. Raises `UsageError` if they have no examples in common."""

    first: Result
    second: Result

    @property
    def regression(self) -> Estimate:
        """Robust accuracy of the first run minus that of the second; positive is worse."""
        return regression(self.second.evidence, self.first.evidence)

    @property
    def clean_accuracy_drop(self) -> Estimate:
        """Clean accuracy of the first run minus that of the second; positive is worse."""
        return clean_accuracy_drop(self.second.evidence, self.first.evidence)

    def summary(self) -> Json:
        """The content of every report, in the types of strict JSON."""
        return self._summary

    @cached_property
    def _summary(self) -> Json:
        summaries = self.first.summary(), self.second.summary()
        return reported.comparison(self.first.evidence, self.second.evidence, summaries)

    def text(self, *, colour: bool = False, width: int | None = None) -> str:
        """The changes and the metrics of both runs as text for a terminal."""
        return reported.text(self._summary, colour=colour, width=width)

    def to_json(self) -> str:
        """The summary as JSON text."""
        return reported.comparison_to_json(self._summary)

    def write(self, path: str | Path) -> Path:
        """Write a report in the format of the suffix: `.html .json .md`."""
        write_comparison(self._summary, Path(path))
        return Path(path)

    def _repr_html_(self) -> str:
        """HTML representation of the comparison for notebooks."""
        return reported.comparison_fragment(self._summary)

    def __str__(self) -> str:
        return " ".join(said for key in ("caution", "headline") if (said := self._summary[key]))
