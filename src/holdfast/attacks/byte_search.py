"""Byte search: an attack that changes, inserts and appends bytes of a file by scores, and by the gradients of an
embedding of bytes if the model has one.

It begins with the signatures of formats, as fuzzers do (Zalewski, "American Fuzzy Lop", 2014), then exchanges the bytes
with the largest first-order gains (Ebrahimi et al., "HotFlip", ACL 2018, arXiv:1712.06751; several at once as in Zou et
al., arXiv:2307.15043), then searches at random with changes that become smaller, as in Croce et al., "Sparse-RS", AAAI
2022, arXiv:2006.12834. Under labels alone every change that breaks nothing counts as equal, so that it searches at
random.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from holdfast.attacks.parts.byte_states import SIGNATURES, ChangedFile, Gains, State
from holdfast.attacks.parts.embeddings import EmbeddingGradients
from holdfast.attacks.parts.losses import Best, margin
from holdfast.core.batch import Batch, decoded_files, encoded_files
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, PerExample, Steps
from holdfast.threats.byte_changes import ByteChanges

_FIRST, _ROWS = 8, 32  # files of the first call of the model, which is doubled up to the largest number
_VALUES = 1 << 22  # bytes of one call, for long files
_SIGNATURES, _STEPS = 0.25, 0.5  # largest shares of the queries for signatures, and for steps by gradients
_IDLE = 3  # steps by gradients without a lower margin after which the search goes on at random
# shares of the used queries from which so large a share of the bytes moves
_SHARES = ((0.0, 0.8), (0.1, 0.4), (0.3, 0.2), (0.6, 0.1), (0.8, 0.05))


@dataclass(frozen=True)
class ByteSearch:
    """Changes the bytes of a file by signatures of formats, by gradients of an embedding, and at random."""

    queries: Steps = 2000
    """largest number of queries for each file; a smaller query budget of the threat model takes precedence"""

    needs: ClassVar[Access] = "labels"
    batched: ClassVar[bool] = False

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        changes, best = threat.constraint, Best(batch)
        if not isinstance(changes, ByteChanges):
            raise UsageError(
                f"ByteSearch changes files, and the threat is {changes.name}; give a threat such as "
                "bytes:change=16,append=64"
            )
        queries = min(self.queries, threat.queries or self.queries)
        contents = decoded_files(batch.x)
        for row, (content, id_) in enumerate(zip(contents, batch.ids.tolist(), strict=True)):
            example = batch.take(torch.tensor([row], device=batch.ids.device))
            draws = np.random.default_rng(rng.at("bytes", id_).seed)
            search = _Search(model, example, ChangedFile(content, changes, draws), queries)
            search.run(by_gradients=threat.access == "gradients")
            x = encoded_files([search.content], batch.x.shape[1]).to(batch.x)
            best.offer(example, x, best.margin.new_tensor([search.lowest]))
        return best.x


class _Search:
    """Search for one file: the best state so far, and the queries that are left."""

    def __init__(self, model: Model, example: Batch, file: ChangedFile, queries: int) -> None:
        self._model, self._example, self._file = model, example, file
        self._left = self._queries = queries
        self._state, self.content, self.lowest = State(), file.unchanged, math.inf

    def run(self, *, by_gradients: bool) -> None:
        """Query the unchanged file, signatures, steps by gradients, and random changes."""
        self._offer([self._state])
        if self._file.places.is_empty:
            return
        self._signatures()
        if by_gradients:
            self._steps()
        while self._left and self.lowest > 0:
            used = 1 - self._left / self._queries
            share = next(share for start, share in reversed(_SHARES) if used >= start)
            self._offer([self._file.moved(self._state, share) for _ in range(_FIRST)])

    def _offer(self, states: Sequence[State]) -> list[float]:
        """Return the margins of changed files up to the end of the call that breaks the example, or of the query
        budget, and keep the state with the lowest one whose file the reader of its format opens.
        """
        margins: list[float] = []
        width, rows_of_call = self._example.x.shape[1], _FIRST
        while len(margins) < len(states) and self._left and self.lowest > 0:
            n = min(rows_of_call, max(1, _VALUES // width), self._left)
            rows_of_call = min(2 * rows_of_call, _ROWS)
            some = states[len(margins) : len(margins) + n]
            contents = [self._file.written(state) for state in some]
            with torch.no_grad():
                found = self._margins(contents).tolist()
            self._left -= len(some)
            for place in sorted(range(len(some)), key=found.__getitem__):
                if found[place] > self.lowest:
                    break
                if contents[place] == self.content or not self._file.fault(contents[place]):
                    self._state, self.content, self.lowest = some[place], contents[place], found[place]
                    break
            margins += found
        return margins

    def _margins(self, contents: Sequence[bytes]) -> PerExample:
        first = torch.zeros(len(contents), dtype=torch.int64, device=self._example.ids.device)
        x = encoded_files(contents, self._example.x.shape[1]).to(self._example.x)
        rows = self._example.take(first)
        # NaN counts as broken
        return margin(self._model(x, rows.ids), rows).nan_to_num(-math.inf, math.inf, -math.inf)

    def _signatures(self) -> None:
        """Query signatures in place of bytes at the first and the last places, inserted and appended, and then the best
        of each kind together.
        """
        states = [state for signature in SIGNATURES for state in self._file.signed(signature)]
        states = states[: int(self._queries * _SIGNATURES)]
        together, kinds = State(), set()
        for _, state in sorted(zip(self._offer(states), states, strict=False), key=lambda each: each[0]):
            if state.kind not in kinds:
                kinds.add(state.kind)
                together = replace(together, **state.parts)
        if len(kinds) > 1:
            self._offer([together])

    def _steps(self) -> None:
        """Exchange the bytes with the largest first-order gains until no step finds a lower margin."""
        idle, until = 0, self._left - int(self._queries * _STEPS)
        while self.lowest > 0 and self._left > max(until, 1) and idle < _IDLE:
            state = self._file.filled(self._state)
            gains = self._gains(state)
            if gains is None:
                return
            before = self.lowest
            self._offer(list(self._file.stepped(state, gains, idle)))
            idle = 0 if self.lowest < before else idle + 1

    def _gains(self, state: State) -> Gains | None:
        """Return the first-order gains of the bytes of a changed file; None if the model gives no gradients of them."""
        content = self._file.written(state)
        self._left -= 1
        with torch.enable_grad(), EmbeddingGradients() as lookups:
            value = self._margins([content])
        return self._file.gains(state, *lookups.gains(value, content, self._file.movable(state)))
