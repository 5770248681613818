"""Text search: a score-based attack that changes words of a text, by a beam search over edits, synonyms or insertions.

Words are ordered by the margin without them, as in Jin et al., "Is BERT Really Robust?", AAAI 2020, arXiv:1907.11932,
and Gao et al., "Black-box Generation of Adversarial Text Sequences", SPW 2018, arXiv:1801.04354. Differs from the
papers: every allowed change of one word is queried alone, and the changes are combined in the order of their gains, by
a beam search. If the logits are sums over words, as in a linear model of unigrams, the result is the exact worst case.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.attacks.parts.best import Best
from holdfast.attacks.parts.losses import margin
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Model
from holdfast.core.text_edits import HOMOGLYPHS, INVISIBLE, NEIGHBOURS, PUNCTUATION, TextEdits
from holdfast.core.texts import decoded, encoded
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Steps

_ROWS = 512  # texts of one call of the model
_WIDER = 4  # changes that extend each text of the beam, as multiples of the beam
_AROUND = re.compile(rf"([{re.escape(PUNCTUATION)}]*)(.*?)([{re.escape(PUNCTUATION)}]*)", re.DOTALL)
_HOST = re.compile(rf"(?:.*?://|[{re.escape(PUNCTUATION)}]*(?=www\.))([^/?#]*)", re.DOTALL | re.IGNORECASE)

Operation = tuple[int, int, str]
"""Replacement of the characters from a position up to another one by a text."""
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
        self._margins([self.text])
        margins = self._singles(self._changes(), self._queries // 2)
        for _ in range(1, self._edits.edits):
            longer = self._singles(self._longer(margins), self._left // 2)
            margins |= longer
        states: list[tuple[Change, ...]] = [(change,) for change in sorted(margins, key=margins.__getitem__)]
        states = states[: self._beam]
        for _ in range(1, self._edits.changes):
            wider = list(dict.fromkeys(more for state in states for more in self._extended(state, margins)))
            found = self._margins([self._written(state) for state in wider])
            ranked = sorted(zip(found, range(len(found)), strict=True))
            states = [wider[place] for _, place in ranked[: self._beam]]

    def _margins(self, texts: Sequence[str], *, allowed: bool = True) -> list[float]:
        """Return the margins of texts up to the end of the call that breaks the example, or of the query budget.
        `allowed` states whether the texts are inside the constraint, and can be the result.
        """
        margins: list[float] = []
        while len(margins) < len(texts) and self._left and self.lowest > 0:
            now = texts[len(margins) : len(margins) + min(_ROWS, self._left)]
            rows = self._example.take(
                torch.zeros(len(now), dtype=torch.int64, device=self._example.ids.device)
            )
            x = encoded(now, self._example.x.shape[1]).to(self._example.x)
            # NaN counts as broken
            found = margin(self._model(x, rows.ids), rows).nan_to_num(-math.inf, math.inf, -math.inf).tolist()
            self._left -= len(now)
            place = min(range(len(now)), key=found.__getitem__)
            if allowed and found[place] < self.lowest:
                self.text, self.lowest = now[place], found[place]
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
        return dict(
            zip(queried, self._margins([self._written((change,)) for change in queried]), strict=False)
        )

    def _changes(self) -> list[Change]:
        """Return the changes of single words, those of the words without which the margin is lowest first."""
        if self._edits.inserts:
            return [(-1, word) for word in dict.fromkeys(self._edits.lists["insert"])]
        by_place = {place: list(dict.fromkeys(self._of_word(place))) for place in self._places()}
        places = [place for place, changes in by_place.items() if changes]
        without = ["".join(part for at, part in enumerate(self._parts) if at != place) for place in places]
        margins = self._margins(without[: self._queries // 4], allowed=False)
        order = sorted(range(len(margins)), key=margins.__getitem__)
        return [change for rank in order for change in by_place[places[rank]]]

    def _places(self) -> Iterator[int]:
        """Yield the places of the words that are not protected."""
        for place in range(0, len(self._parts), 2):
            word = self._parts[place]
            if word and not any(re.search(pattern, word) for pattern in self._edits.lists.get("protect", ())):
                yield place

    def _of_word(self, place: int) -> Iterator[Change]:
        """Yield the changes of the word at a place: one operation, or a synonym."""
        word = self._parts[place]
        if not self._edits.edits:
            yield from (
                (place, new) for new in self._synonyms(word) if new != word and _host(new) == _host(word)
            )
            return
        for operation in _operations(word):
            yield from self._operated(place, (operation,))

    def _operated(self, place: int, operations: tuple[Operation, ...]) -> Iterator[Change]:
        """Yield the change of a word by operations on separate characters, unless it changes the host of a URL."""
        word = new = self._parts[place]
        for start, stop, text in sorted(operations, reverse=True):
            new = new[:start] + text + new[stop:]
        if new and new != word and _host(new) == _host(word):
            self._operations.setdefault((place, new), operations)
            yield place, new

    def _longer(self, margins: dict[Change, float]) -> list[Change]:
        """Return changes with one more operation, from the best changes of the words with the largest gains."""
        ranked = sorted(margins, key=margins.__getitem__)
        of_place: dict[int, list[Change]] = {}
        for change in ranked:
            of_place.setdefault(change[0], []).append(change)
        longer: dict[Change, None] = {}
        for place in list(of_place)[: 2 * self._edits.words]:
            for change in of_place[place][: self._beam]:
                done = self._operations[change]
                for operation in _operations(self._parts[place]):
                    if all(_apart(operation, other) for other in done):
                        longer.update(dict.fromkeys(self._operated(place, (*done, operation))))
        return [change for change in longer if change not in margins]

    def _synonyms(self, word: str) -> Iterator[str]:
        """Yield the word with each synonym of the file, between its punctuation."""
        around = _AROUND.fullmatch(word)
        assert around is not None
        before, core, after = around.groups()
        listed = self._edits.lists["synonyms"]
        exact = core in listed
        for new in listed.get(core, ()) if exact else listed.get(core.lower(), ()):
            raised = core[:1].isupper() and not exact
            yield before + (new[:1].upper() + new[1:] if raised else new) + after

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


def _operations(word: str) -> Iterator[Operation]:
    """Yield the single edits of a word that the constraint allows."""
    for place, character in enumerate(word):
        yield place, place, INVISIBLE
        if HOMOGLYPHS.get(character):
            yield place, place + 1, HOMOGLYPHS[character]
        if word[place + 1 : place + 2] not in ("", character):
            yield place, place + 2, word[place + 1] + character
        yield place, place + 1, ""
        yield place, place, character
        for key in NEIGHBOURS.get(character, ""):
            yield place, place + 1, key
    yield len(word), len(word), INVISIBLE


def _apart(one: Operation, other: Operation) -> bool:
    """Return whether two operations change no common character, and do not insert at the same position."""
    if one[0] == one[1] and other[0] == other[1]:
        return one[0] != other[0]
    return one[1] <= other[0] or other[1] <= one[0]


def _host(word: str) -> str | None:
    """Return the host of a URL as it is written, or None for another word."""
    matched = _HOST.match(word)
    return None if matched is None else matched[1]
