"""Two runs of the same examples: what changed, paired by the digest of each example."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from holdfast.core.errors import TargetError, UsageError
from holdfast.core.estimate import Estimate
from holdfast.metrics.paired import clean_accuracy_drop, compared, regression
from holdfast.ops.statistics import McNemar
from holdfast.reports import comparison as words
from holdfast.reports.summary import Json
from holdfast.reports.write import replacing
from holdfast.runs.result import Result

_WRITERS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    ".html": words.page,
    ".json": words.to_json,
    ".md": words.markdown,
}


@dataclass(frozen=True)
class Comparison:
    """The second run against the first."""

    first: Result
    second: Result

    @cached_property
    def regression(self) -> Estimate:
        """Robust accuracy that the second has less than the first; negative is better."""
        return regression(self.second.evidence, self.first.evidence)

    @cached_property
    def clean_accuracy_drop(self) -> Estimate:
        """Clean accuracy that the second has less than the first."""
        return clean_accuracy_drop(self.second.evidence, self.first.evidence)

    @cached_property
    def test(self) -> McNemar:
        """Exact test of who still stands: `only_first` stand in the first run alone, `only_second` in the second."""
        return compared(self.second.evidence, self.first.evidence)

    @cached_property
    def content(self) -> Json:
        """What every form of the comparison is made from, in the types of strict JSON."""
        summaries = self.first.summary(), self.second.summary()
        return words.comparison(self.first.evidence, self.second.evidence, summaries)

    def __str__(self) -> str:
        return str(self.content["headline"])

    def text(self, *, colour: bool = False, width: int | None = None) -> str:
        """The comparison for a terminal."""
        return words.text(self.content, colour=colour, width=width)

    def to_json(self) -> str:
        """The comparison as JSON text."""
        return words.to_json(self.content)

    def write(self, path: str | Path) -> Path:
        """Write the form that the suffix asks for: `.html .json .md`."""
        place = Path(path)
        if place.suffix not in _WRITERS:
            raise UsageError(
                f"{place} ends in {place.suffix!r}; a comparison is written as {', '.join(_WRITERS)}"
            )
        try:
            with replacing(place) as file:
                file.write(_WRITERS[place.suffix](self.content))
        except OSError as error:
            raise TargetError(
                f"{place} cannot be written: {error.strerror or error}; choose another place"
            ) from error
        return place


def compare(first: Result, second: Result) -> Comparison:
    """What the second run has more or less than the first. `UsageError` if they share no example."""
    comparison = Comparison(first, second)
    comparison.content  # noqa: B018 (runs that share nothing are refused here, not at the first look)
    return comparison
