"""Models of texts that are a network over embeddings of words, and bounds of it if words are replaced."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from holdfast.certifiers.bounds.crown import finite, relaxed, substitute
from holdfast.certifiers.bounds.graph import Graph
from holdfast.certifiers.bounds.region import Region
from holdfast.certifiers.bounds.tracing import traced
from holdfast.certifiers.provers import margin_rows
from holdfast.core.errors import NoBounds
from holdfast.core.number_format import exactly

_ROUNDING = (
    1e-6  # relative bound of the rounding errors of sums of products of numbers in float32, in float64
)
_SAME = 1e-4  # relative difference of logits that is due to rounding


@runtime_checkable
class EmbeddingModel(Protocol):
    """Protocol of a model of texts that `certify` bounds: logits are `head(embedding(words(text))[None])`.

    A call with a list of texts returns the logits (n, classes).
    """

    embedding: nn.Embedding
    """embedding of the ids of words"""
    head: nn.Module
    """network from embeddings (n, T, d) to logits (n, classes)"""

    def words(self, text: str) -> Tensor:
        """Return an id for each of the T words of a text, which are separated by whitespace. An id is a function of its
        word alone.
        """

    def __call__(self, texts: list[str], /) -> Tensor:
        """Return the logits of texts."""


@dataclass(frozen=True, eq=False)
class EmbeddingReader:
    """A network over embeddings of words, with the graphs of its head by the number of words."""

    model: EmbeddingModel
    graphs: dict[int, Graph] = field(default_factory=dict)

    def scores(self, words: Sequence[str]) -> NDArray[np.float64]:
        """Return the logits of a text with these words. Raises `NoBounds` if those of the model are others."""
        text = " ".join(words)
        logits = self.model.head(self._embedded(words, text)[None])
        given = torch.as_tensor(self.model([text])).to(logits)
        if given.shape != logits.shape or not torch.allclose(given, logits, rtol=_SAME, atol=_SAME):
            raise NoBounds(
                f"the model returns {given.tolist()} for the text {text[:60]!r}, and its head {logits.tolist()}; "
                "logits must be head(embedding(words(text))[None])"
            )
        scores: NDArray[np.float64] = logits[0].double().cpu().numpy()
        return scores

    def losses(
        self, words: Sequence[str], substitutes: Sequence[Sequence[str]], label: int, changes: int
    ) -> Sequence[tuple[float, Mapping[int, str]]]:
        """Return for each other class a lower bound of the lead of the label over it, with the replacements that have
        the largest losses in the linear bound.
        """
        x = self._embedded(words, " ".join(words))
        of_word = [self._embedded(each, " ".join(each)) if each else x[:0] for each in substitutes]
        hulls = [torch.cat((x[k : k + 1], each)) for k, each in enumerate(of_word)]
        low, high = (
            torch.stack([hull.amin(0) for hull in hulls])[None],
            torch.stack([hull.amax(0) for hull in hulls])[None],
        )
        graph = self._graph(x)
        y = torch.tensor([label], device=x.device)
        with exactly(x):
            rows = margin_rows(y, graph.shape_of(graph.output)[0], x.dtype)
            result = substitute(relaxed(graph, Region(low, high, x[None])), graph.output, rows)
        lower, leads = finite(result.lower)[0].double().tolist(), []
        for bound, a in zip(lower, result.coefficients[0].double(), strict=True):
            # the linear bound holds in the whole box, so that its minimum over replacements of few words is a bound
            in_box = torch.where(a > 0, low[0].double(), high[0].double())
            reached = (a * (x.double() - in_box)).sum(1)
            size = float((a.abs() * torch.maximum(low[0].abs(), high[0].abs()).double()).sum())
            best = []
            for k, each in enumerate(of_word):
                if len(each):
                    loss, place = ((x[k] - each).double() @ a[k]).max(0)
                    best.append((float(loss), k, substitutes[k][int(place)]))
            largest = [loss for loss in sorted(best, reverse=True)[:changes] if loss[0] > 0]
            few = bound + float(reached.sum()) - sum(loss for loss, _, _ in largest) - _ROUNDING * size
            leads.append((max(bound, few), {k: word for _, k, word in largest}))
        return leads

    def _embedded(self, words: Sequence[str], text: str) -> Tensor:
        """Return the embeddings (T, d) of words."""
        ids = self.model.words(text)
        if ids.shape != (len(words),) or ids.tolist() != [int(self.model.words(word)) for word in words]:
            raise NoBounds(
                f"words({text[:60]!r}) has the shape {tuple(ids.shape)}; one id was expected for each of the "
                f"{len(words)} words that whitespace separates, which is the same in every text"
            )
        embedded: Tensor = self.model.embedding(ids).detach()
        if embedded.dtype not in (torch.float32, torch.float64):
            raise NoBounds(
                f"embeddings are {embedded.dtype}, in which rounding errors are larger than the bounds; use float32"
            )
        return embedded

    def _graph(self, x: Tensor) -> Graph:
        if len(x) not in self.graphs:
            self.graphs[len(x)] = traced(self.model.head, x[None]).to(x.dtype, x.device)
        return self.graphs[len(x)]
