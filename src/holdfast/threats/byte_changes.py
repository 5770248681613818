"""Changes of the bytes of files as a constraint, such as `bytes:change=16,append=64` in threat models.

Inputs are files as rows of bytes (`encoded_files` in `core/batch.py`). Rules state which bytes of a file may change:
those at offsets, those that match a regular expression, or those that a format leaves free. The kinds of change are
those of Demetrio et al., "Functionality-Preserving Black-Box Optimization of Adversarial Windows Malware", IEEE TIFS
2021, arXiv:2003.13526, and Demetrio et al., "Adversarial EXEmples", ACM TOPS 2021, arXiv:2008.07125.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from holdfast.core.batch import decoded_files
from holdfast.core.errors import UsageError
from holdfast.core.types import Inputs, PerExample
from holdfast.threats.domains import BYTES, Domain
from holdfast.threats.file_formats import FORMATS
from holdfast.threats.transformations import Whole

ALL_VALUES = np.arange(256, dtype=np.uint8)
"""Values of a byte."""


def _nowhere() -> NDArray[np.int64]:
    return np.zeros(0, np.int64)


@dataclass(frozen=True, eq=False)
class Places:
    """Where one file may change, and to what."""

    change: NDArray[np.int64] = field(default_factory=_nowhere)
    """offsets of the bytes that may change, in ascending order"""
    insert: NDArray[np.int64] = field(default_factory=_nowhere)
    """offsets before which bytes may be inserted, in ascending order"""
    append: bool = False
    """whether bytes may be appended"""
    values: NDArray[np.uint8] = field(default_factory=ALL_VALUES.copy)
    """values that new bytes may have"""
    format: str = ""
    """format whose reader must open the file after a change; empty for none"""

    @property
    def is_empty(self) -> bool:
        """Whether the file may not change at all."""
        return not (len(self.change) or len(self.insert) or self.append)


@dataclass(frozen=True)
class ByteChanges(Whole):
    """Constraint that allows changes of a file: other values of some bytes, bytes that are inserted at one place, and
    bytes that are appended. The kinds of change can be combined.

    Without rules, every byte may change, and bytes may be inserted anywhere and appended. With rules, the first rule
    whose pattern matches the beginning of the unchanged file states the places; a file that no rule matches does not
    change.
    """

    name: ClassVar[str] = "bytes"
    domain: ClassVar[Domain | None] = BYTES

    change: int = 0
    """largest number of bytes that get another value"""
    append: int = 0
    """largest number of bytes that are appended"""
    insert: int = 0
    """largest number of bytes that are inserted, all at one place"""
    file: str = ""
    """path of the JSON file with the rules; empty for none"""
    content: str = field(default="", repr=False)
    """content of the file: a JSON object with the list `rules`, see `Rule`"""

    def __post_init__(self) -> None:
        if not (self.change or self.append or self.insert):
            raise UsageError(
                f"{self} allows no change; give any of change=N, append=N and insert=N, as in "
                "bytes:change=16,append=64"
            )
        if bool(self.file) != bool(self.content):
            raise UsageError("rules have a name and a content, and one is missing; give file=FILE.json")
        _ = self.rules  # of a stored run, which may be damaged

    @property
    def limits(self) -> Mapping[str, float | str]:
        """Limits of the changes by their names in the threat string, without those that are 0, and the file with its
        content.
        """
        names = ("change", "append", "insert", "file", "content")
        return {name: limit for name in names if (limit := getattr(self, name))}

    @cached_property
    def rules(self) -> "tuple[Rule, ...] | None":
        """The rules of the file; None without a file."""
        return tuple(Rule(**rule) for rule in json.loads(self.content)["rules"]) if self.content else None

    @property
    def growth(self) -> int:
        """Largest number of bytes that a file gains."""
        return self.append + self.insert

    def places(self, content: bytes) -> Places:
        """Return where an unchanged file may change."""
        if self.rules is None:
            everywhere = np.arange(len(content) + 1)
            places = Places(everywhere[:-1], everywhere, append=True)
        else:
            rule = next((rule for rule in self.rules if rule.matches(content)), None)
            places = Places() if rule is None else rule.places(content)
            places = places if len(places.values) else Places()
        return Places(
            places.change if self.change else _nowhere(),
            places.insert if self.insert else _nowhere(),
            places.append and self.append > 0,
            places.values,
            places.format,
        )

    def distance(self, x_adv: Inputs, x: Inputs) -> PerExample:
        """Return for each file the largest of the numbers of changed, appended and inserted bytes, each divided by its
        limit. It is at most 1, and infinite for a file that the constraint does not allow.
        """
        pairs = zip(decoded_files(x_adv), decoded_files(x), strict=True)
        # torch.tensor of an empty list has the default type
        return torch.tensor([self.size(new, old) for new, old in pairs]).to(x)

    def size(self, new: bytes, old: bytes) -> float:
        """Return the distance of one file from the unchanged file, see `distance`."""
        if new == old:
            return 0.0
        places, extra = self.places(old), len(new) - len(old)
        if extra < 0 or extra > self.growth:
            return torch.inf
        smallest = min(
            (self._size(new, old, places, inserted) for inserted in range(min(extra, self.insert) + 1)),
            default=torch.inf,
        )
        return smallest if smallest <= 1 and not self.unopened(new, old, places) else torch.inf

    def unopened(self, content: bytes, unchanged: bytes, places: Places) -> str:
        """Return why the reader of the format of a file does not open it after a change, or reads another content;
        empty if neither is the case.
        """
        return FORMATS[places.format].fault(content, unchanged) if places.format else ""

    def _size(self, new: bytes, old: bytes, places: Places, inserted: int) -> float:
        """Return the distance if `inserted` bytes were inserted and all other further ones appended."""
        n, appended = len(old), len(new) - len(old) - inserted
        before, after = np.frombuffer(old, np.uint8), np.frombuffer(new, np.uint8)
        allowed = np.isin(ALL_VALUES, places.values)
        if appended > (self.append if places.append else 0) or not allowed[after[n + inserted :]].all():
            return torch.inf
        may_change = np.zeros(n, bool)
        may_change[places.change] = True
        starts = places.insert if inserted else np.zeros(1, np.int64)
        # numbers of changed and of forbidden bytes before each offset, without and with the inserted bytes before it
        counts = []
        for shift in (0, inserted):
            moved = after[shift : shift + n]
            differ = before != moved
            forbidden = differ & ~(may_change & allowed[moved])
            counts.append([np.concatenate(([0], np.cumsum(each))) for each in (differ, forbidden)])
        (changed, bad), (changed_moved, bad_moved) = counts
        n_changed = changed[starts] + changed_moved[n] - changed_moved[starts]
        n_bad = bad[starts] + bad_moved[n] - bad_moved[starts]
        foreign = np.concatenate(([0], np.cumsum(~allowed[after])))
        n_bad = n_bad + foreign[starts + inserted] - foreign[starts]
        fits = n_changed[(n_bad == 0) & (n_changed <= self.change)]
        if not len(fits):
            return torch.inf
        counted = ((int(fits.min()), self.change), (appended, self.append), (inserted, self.insert))
        return max(count / limit for count, limit in counted if limit)

    def refusal(self) -> UsageError:
        """Return the error for an attack that cannot be used under this constraint."""
        return UsageError(
            f"under {self} an attack changes bytes of files, but this attack changes numbers; choose ByteSearch, or a "
            "threat such as linf:8/255 for inputs that are numbers"
        )

    def resized(self, eps: float) -> "ByteChanges":
        """Return the constraint with `eps` times as many changed, appended and inserted bytes, rounded down, but at
        least one of each kind that is allowed.
        """
        fewer = {
            name: max(1, int(getattr(self, name) * eps))
            for name in ("change", "append", "insert")
            if getattr(self, name)
        }
        return replace(self, **fewer)  # type: ignore[arg-type]  # the names are those of whole numbers


Where = str | list[Any]
"""Places in a file: a regular expression, or offsets."""


@dataclass(frozen=True)
class Rule:
    """Rule on the files whose beginning matches a pattern. Patterns are regular expressions on bytes, whose characters
    are those of Latin-1, and in which `.` matches every byte.
    """

    starts: str = ""
    """pattern of the beginning of the files; the empty one matches all"""
    format: str = ""
    """a format that states the places: one of `FORMATS`"""
    change: Where = field(default_factory=list)
    """pattern of the bytes that may change (the first group, if it has one), or pairs of a first offset and the offset
    after the last, which is None for the end of the file; negative offsets count from the end"""
    insert: Where = field(default_factory=list)
    """pattern at whose ends bytes may be inserted, or offsets"""
    append: bool = False
    """whether bytes may be appended"""
    values: str = ""
    """pattern of the values of new bytes, such as `[ -~]`; the empty one matches all"""

    def __post_init__(self) -> None:
        if self.format and self.format not in FORMATS:
            raise ValueError(
                f"the format of a rule is {self.format!r}; one of {', '.join(FORMATS)} was expected"
            )
        for pattern in (self.starts, self.change, self.insert, self.values):
            if isinstance(pattern, str):
                _compiled(pattern)

    def matches(self, content: bytes) -> bool:
        """Return whether the rule is for a file."""
        return _compiled(self.starts).match(content) is not None

    def places(self, content: bytes) -> Places:
        """Return where a file may change."""
        n, values = len(content), ALL_VALUES
        if self.values:
            pattern = _compiled(self.values)
            values = ALL_VALUES[[pattern.fullmatch(bytes((value,))) is not None for value in range(256)]]
        if self.format:
            free = FORMATS[self.format].free(content)
            change, insert = _offsets(free.change, n), np.array(sorted(free.insert), np.int64)
            values = values[~np.isin(values, list(free.forbidden))]
            return Places(change, insert, free.append, values, self.format)
        if isinstance(self.change, str):
            group = min(1, _compiled(self.change).groups)
            spans: Iterable[tuple[int, int]] = (
                match.span(group) for match in _compiled(self.change).finditer(content)
            )
        else:
            spans = (slice(*pair).indices(n)[:2] for pair in self.change)
        if isinstance(self.insert, str):
            ends = {match.end() for match in _compiled(self.insert).finditer(content)}
        else:
            ends = {offset + n if offset < 0 else offset for offset in self.insert if -n <= offset <= n}
        return Places(_offsets(spans, n), np.array(sorted(ends), np.int64), self.append, values)


def _offsets(spans: Iterable[tuple[int, int]], n: int) -> NDArray[np.int64]:
    """Return the offsets in spans of a file with `n` bytes, each once, in ascending order."""
    chosen = np.zeros(n, bool)
    for start, stop in spans:
        chosen[start:stop] = True
    return np.flatnonzero(chosen)


def _compiled(pattern: str) -> re.Pattern[bytes]:
    try:
        return re.compile(pattern.encode("latin-1"), re.DOTALL)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression on bytes: {error}") from error
