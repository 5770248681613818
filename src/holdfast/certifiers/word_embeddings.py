"""Proofs for networks over embeddings of words, if the embedding of any one word changes inside a ball."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.certifiers.bounds.graph import Graph
from holdfast.certifiers.protocol import Proofs, ReadyProver
from holdfast.certifiers.provers import GraphProver, prepared_graph
from holdfast.certifiers.substitutions import EmbeddingModel, EmbeddingReader
from holdfast.core.batch import Batch, decoded
from holdfast.core.constraints import L1, L2, Constraint, Linf
from holdfast.core.errors import NoBounds
from holdfast.core.model import Bounds, Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Inputs
from holdfast.io.models.adapting import TextFunction
from holdfast.threats.word_embeddings import WordEmbeddings


@dataclass(frozen=True)
class _OfOneWord:
    place: int = 0
    """position of the word in a text"""

    def changeable(self, x: Inputs) -> Tensor:
        """Return the mask (1, T, 1) of the word among embeddings `x` (n, T, d)."""
        return (torch.arange(x.shape[1], device=x.device) == self.place)[None, :, None]


@dataclass(frozen=True)
class _LinfOfWord(_OfOneWord, Linf):
    name: ClassVar[str] = "linf"


@dataclass(frozen=True)
class _L2OfWord(_OfOneWord, L2):
    name: ClassVar[str] = "l2"


@dataclass(frozen=True)
class _L1OfWord(_OfOneWord, L1):
    name: ClassVar[str] = "l1"


_BALLS: Mapping[str, Callable[[float, int], Constraint]] = {
    "linf": _LinfOfWord,
    "l2": _L2OfWord,
    "l1": _L1OfWord,
}


def on_embeddings(prover: GraphProver, model: Classifier, constraint: WordEmbeddings) -> ReadyProver:
    """Prepare a method for the changes of the embeddings of a model of texts. Raises `NoBounds` for a model whose
    embeddings are not known.
    """
    function = model.net.model if isinstance(model.net, TextFunction) else None
    if not isinstance(function, EmbeddingModel):
        name = type(model.net if function is None else function).__name__
        raise NoBounds(
            f"the model is {name}, whose embeddings are not known; give an object with words, embedding and head, "
            "where head(embedding(words(text))[None]) are the logits of a text"
        )
    return WordProver(prover, model, constraint, EmbeddingReader(function))


@dataclass(frozen=True, eq=False)
class WordProver:
    """A method of certification that is run for each position of a word: all of them must be proved."""

    prover: GraphProver
    model: Classifier
    constraint: WordEmbeddings
    reader: EmbeddingReader
    graphs: dict[int, Graph] = field(default_factory=dict)
    """graphs of the head of the model by the number of words"""

    def __call__(self, batch: Batch) -> Proofs:
        """Return what is proved about the texts of a batch."""
        rows = torch.arange(len(batch), device=batch.ids.device)
        with torch.no_grad():
            parts = [self._text(batch.take(rows[k : k + 1])) for k in range(len(batch))]
        return Proofs.joined([Proofs.none(batch.take(rows[:0])), *parts])

    def _text(self, one: Batch) -> Proofs:
        words = decoded(one.x)[0].split()
        if not words:
            return Proofs.none(one)
        self.reader.scores(words)  # compares the model with its parts
        x, table = (
            self.reader.embedded(words, " ".join(words))[None],
            self.reader.model.embedding.weight.detach(),
        )
        reach = 2 * self.constraint.eps + 1.0
        # beyond every changed embedding
        bounds = Bounds(float(table.min()) - reach, float(table.max()) + reach)
        head = Classifier(self.reader.model.head, bounds=bounds).eval()
        embedded = Batch(x, one.y.to(x.device), one.ids.to(x.device))
        if len(words) not in self.graphs:
            self.graphs[len(words)] = prepared_graph(head, embedded)
        of_words: list[Proofs] = []
        for place in range(len(words)):
            ball = _BALLS[self.constraint.norm](self.constraint.eps, place)
            ready = self.prover.on(self.graphs[len(words)], head, ThreatModel(ball))
            of_words.append(ready(embedded))
            if not of_words[-1].certified:
                break
        every = all(bool(proofs.certified) for proofs in of_words)
        none = Proofs.none(one)
        # a counterexample in embeddings is no text, so that the text stays undecided
        return replace(
            none,
            certified=torch.full_like(none.certified, every),
            bound=torch.full_like(none.bound, min(float(p.bound) for p in of_words) if every else -torch.inf),
            work=torch.full_like(none.work, sum(int(proofs.work) for proofs in of_words)),
            stopped=torch.full_like(none.stopped, any(bool(proofs.stopped) for proofs in of_words)),
            undefined={} if every else of_words[-1].undefined,
        )
