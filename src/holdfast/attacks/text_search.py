"""Text search: a score-based attack that changes words of a text, by a beam search over edits, synonyms or insertions.

Words are ordered by the margin without them, as in Jin et al., "Is BERT Really Robust?", AAAI 2020, arXiv:1907.11932,
and Gao et al., "Black-box Generation of Adversarial Text Sequences", SPW 2018, arXiv:1801.04354. Differs from the
papers: every allowed change of one word is queried alone, and the changes are combined in the order of their gains, by
a beam search. If the logits are sums over words, as in a linear model of unigrams, the result is the exact worst case.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch

from holdfast.attacks.parts.images import Operation, edited
from holdfast.attacks.parts.losses import Best, margin
from holdfast.core.batch import Batch, decoded, encoded
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Steps
from holdfast.threats.text_edits import TextEdits

_FIRST, _ROWS = 16, 512  # texts of the first call of the model, which is doubled up to the largest number
_VALUES = 1 << 22  # characters of one call, for long texts
_WIDER = 4  # changes that extend each text of the beam, as multiples of the beam

_Item = TypeVar("_Item")
Change = tuple[int, str]
"""Place of a word and its new text; the place -1 is for a word that is appended."""


@dataclass(frozen=True)
class TextSearch:
    """Changes the words of a text by a beam search over all changes of single words that the threat model allows."""

    queries: Steps = 5000
    """largest number of queries for each text; a smaller query budget of the threat model takes precedence"""
    beam: Steps = 4
    """number of texts that each step of the beam search continues"""

    needs: ClassVar[Access] = "scores"
    batched: ClassVar[bool] = False

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        edits, best = threat.constraint, Best(batch)
        if not isinstance(edits, TextEdits):
            raise UsageError(
                f"TextSearch changes texts, and the threat is {edits.name}; give a threat such as text:edits=2,words=3"
            )
        queries = min(self.queries, threat.queries or self.queries)
        with torch.no_grad():
            for row in range(len(batch)):
                example = batch.take(torch.tensor([row], device=batch.ids.device))
                search = _Search(model, example, edits, queries, self.beam)
                search.run()
                lowest = best.margin.new_tensor([search.lowest])
                best.offer(example, encoded([search.text], batch.x.shape[1]).to(batch.x), lowest)
        return best.x


class _Search:
    """Search for one text: the best text so far, and the queries that are left."""

    def __init__(self, model: Model, example: Batch, edits: TextEdits, queries: int, beam: int) -> None:
        self._model, self._example, self._edits, self._beam = model, example, edits, beam
        self._left = self._queries = queries
        self.text, self.lowest = decoded(example.x)[0], math.inf
        self._parts = re.split(r"(\s+)", self.text)
        self._operations: dict[Change, tuple[Operation, ...]] = {}

    def run(self) -> None:
        """Query the clean text, each change of a single word, and combinations of the changes with the largest
        gains.
        """
        most = self._queries // 2
        self._margins([self.text], str)
        margins = self._singles(self._changes(most), most)
        for _ in range(1, self._edits.edits):
            margins |= self._singles(self._longer(margins), self._left // 2)
        states: list[tuple[Change, ...]] = [(change,) for change in sorted(margins, key=margins.__getitem__)]
        states = states[: self._beam]
        for _ in range(1, self._edits.changes):
            wider = list(dict.fromkeys(more for state in states for more in self._extended(state, margins)))
            found = self._margins(wider, self._written)
            ranked = sorted(zip(found, range(len(found)), strict=True))
            states = [wider[place] for _, place in ranked[: self._beam]]

    def _margins(
        self, items: Sequence[_Item], written: Callable[[_Item], str], *, allowed: bool = True
    ) -> list[float]:
        """Return the margins of texts up to the end of the call that breaks the example, or of the query budget.

        `written` returns the text of an item. `allowed` states whether the texts are inside the constraint, and can be
        the result.
        """
        margins: list[float] = []
        width, rows_of_call = self._example.x.shape[1], _FIRST
        while len(margins) < len(items) and self._left and self.lowest > 0:
            n = min(rows_of_call, max(1, _VALUES // width), self._left)
            rows_of_call = min(2 * rows_of_call, _ROWS)  # few queries if an early text breaks the example
            texts = [written(item) for item in items[len(margins) : len(margins) + n]]
            first = torch.zeros(len(texts), dtype=torch.int64, device=self._example.ids.device)
            rows, x = self._example.take(first), encoded(texts, width).to(self._example.x)
            # NaN counts as broken
            found = margin(self._model(x, rows.ids), rows).nan_to_num(-math.inf, math.inf, -math.inf).tolist()
            self._left -= len(texts)
            place = min(range(len(texts)), key=found.__getitem__)
            if allowed and found[place] < self.lowest:
                self.text, self.lowest = texts[place], found[place]
            margins += found
        return margins

    def _written(self, state: Sequence[Change]) -> str:
        """Return the text after the changes."""
        changed = {place: word for place, word in state if place >= 0}
        parts = [changed.get(place, part) for place, part in enumerate(self._parts)]
        return "".join((*parts, *(f" {word}" for place, word in state if place < 0)))

    def _singles(self, changes: Sequence[Change], most: int) -> dict[Change, float]:
        """Return the margin of each change alone, for at most `most` of them."""
        queried = changes[:most]
        margins = self._margins(queried, lambda change: self._written((change,)))
        return dict(zip(queried, margins, strict=False))

    def _changes(self, most: int) -> list[Change]:
        """Return at least `most` changes of single words, or all, those of the words without which the margin is lowest
        first.
        """
        if self._edits.inserts:
            return [(-1, word) for word in dict.fromkeys(self._edits.lists["insert"])]
        places = [
            place
            for place, word in list(enumerate(self._parts))[::2]
            if word and not any(pattern.search(word) for pattern in self._edits.protected)
            if self._edits.edits or self._edits.substitutes(word)
        ]
        parts, first = self._parts, places[: self._queries // 4]
        margins = self._margins(first, lambda at: "".join((*parts[:at], *parts[at + 1 :])), allowed=False)
        changes: list[Change] = []
        for _, place in sorted(zip(margins, first, strict=False)):
            if len(changes) >= most:  # a long text has too many changes to list all
                break
            word = parts[place]
            found = edited(word) if self._edits.edits else dict.fromkeys(self._edits.substitutes(word), ())
            self._operations |= {(place, new): done for new, done in found.items()}
            changes += [(place, new) for new in found]
        return changes

    def _longer(self, margins: dict[Change, float]) -> list[Change]:
        """Return changes with one more edit, from the best changes of the words with the largest gains."""
        of_place: dict[int, list[Change]] = {}
        for change in sorted(margins, key=margins.__getitem__):
            of_place.setdefault(change[0], []).append(change)
        longer: dict[Change, tuple[Operation, ...]] = {}
        for place in list(of_place)[: 2 * self._edits.words]:
            for change in of_place[place][: self._beam]:
                found = edited(self._parts[place], self._operations[change])
                longer |= {(place, new): done for new, done in found.items()}
        self._operations = longer | self._operations
        return [change for change in longer if change not in margins]

    def _extended(
        self, state: tuple[Change, ...], margins: dict[Change, float]
    ) -> Iterator[tuple[Change, ...]]:
        """Yield the state with one more change: the best ones alone, one for each other place."""
        taken = {place for place, _ in state if place >= 0}
        count = 0
        for change in sorted(margins, key=margins.__getitem__):
            if change[0] not in taken and count < _WIDER * self._beam:
                count += 1
                taken |= {change[0]} - {-1}
                wider = (*state, change)
                yield wider if self._edits.inserts else tuple(sorted(wider))
