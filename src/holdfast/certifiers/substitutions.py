"""Certificates for texts whose words are replaced by substitutes, for networks over embeddings and linear models."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from holdfast.certifiers.bounds.crown import finite, relaxed, substitute
from holdfast.certifiers.bounds.graph import Graph, Region
from holdfast.certifiers.bounds.tracing import traced
from holdfast.certifiers.objectives import margin_rows
from holdfast.certifiers.protocol import Proofs, ReadyProver
from holdfast.core.batch import Batch, decoded, encoded
from holdfast.core.errors import NoBounds
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.training import exactly
from holdfast.io.models.adapting import TextFunction
from holdfast.io.models.estimators import Estimator
from holdfast.threats.text_edits import TextEdits

_NETWORK_ROUNDING = (
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
        logits = self.model.head(self.embedded(words, text)[None])
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
        x = self.embedded(words, " ".join(words))
        of_word = [self.embedded(each, " ".join(each)) if each else x[:0] for each in substitutes]
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
            few = (
                bound + float(reached.sum()) - sum(loss for loss, _, _ in largest) - _NETWORK_ROUNDING * size
            )
            leads.append((max(bound, few), {k: word for _, k, word in largest}))
        return leads

    def embedded(self, words: Sequence[str], text: str) -> Tensor:
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


_ROUNDING = 1e-9  # relative bound of the rounding errors of a sum of at most a million numbers in float64
_VECTORISERS = ("CountVectorizer", "TfidfVectorizer")
_LINEAR = ("LogisticRegression", "LinearSVC", "SGDClassifier", "RidgeClassifier")
_ACCEPTED = (
    "bounds are computed for an EmbeddingModel (words, embedding and head), and for pipelines of scikit-learn with "
    f"CountVectorizer, or TfidfVectorizer with norm=None, of single words, and one of {', '.join(_LINEAR)}"
)


class WordReader(Protocol):
    """Protocol of a model of texts that is read word by word."""

    def scores(self, words: Sequence[str]) -> NDArray[np.float64]:
        """Return the score of each class for a text with these words."""

    def losses(
        self, words: Sequence[str], substitutes: Sequence[Sequence[str]], label: int, changes: int
    ) -> Sequence[tuple[float, Mapping[int, str]]]:
        """Return for each other class a lower bound of the lead of the label over it, if at most `changes` words are
        replaced by one of their substitutes, and the replacements with the largest losses.
        """


@dataclass(frozen=True)
class Substitutions:
    """Bounds over all replacements of words by their synonyms, which are exact for linear models of counts of words."""

    name: ClassVar[str] = "substitutions"

    def ready(self, model: Classifier, sample: Batch, threat: ThreatModel) -> ReadyProver:
        """Read the model. Raises `UsageError` for another threat than synonyms, and `NoBounds` for a model that cannot
        be read.
        """
        edits = threat.constraint
        if not isinstance(edits, TextEdits) or not edits.synonyms:
            raise NoBounds(
                f"the threat is {edits}, and the words that may replace a word are known for synonyms only; give a "
                "threat such as text:synonyms=2,file=synonyms.json"
            )
        function = model.net.model if isinstance(model.net, TextFunction) else None
        reader = EmbeddingReader(function) if isinstance(function, EmbeddingModel) else _linear(model)
        return SubstitutionProver(model, edits, reader)


@dataclass(frozen=True, eq=False)
class SubstitutionProver:
    """The method `substitutions`, prepared for a model."""

    model: Classifier
    edits: TextEdits
    reader: WordReader

    def __call__(self, batch: Batch) -> Proofs:
        """Return what is proved about the texts of a batch, with counterexamples.

        Raises `NoBounds` if the model that was read predicts another class than the model for one of the texts.
        """
        rows = torch.arange(len(batch), device=batch.ids.device)
        with torch.no_grad():
            parts = [self._text(batch.take(rows[k : k + 1])) for k in range(len(batch))]
        return Proofs.joined([Proofs.none(batch.take(rows[:0])), *parts])

    def _text(self, one: Batch) -> Proofs:
        parts = re.findall(r"\s+|\S+", decoded(one.x)[0])
        places = [place for place, part in enumerate(parts) if not part.isspace()]
        words, label, none = [parts[place] for place in places], int(one.y), Proofs.none(one)
        predicted = int(self.model(one.x).argmax(1))
        if int(self.reader.scores(words).argmax()) != predicted:
            raise NoBounds(
                f"the model that was read predicts another class than the model, {predicted}, for the text "
                f"{int(one.ids)}; nothing is proved about it. {_ACCEPTED}"
            )
        substitutes = [self.edits.substitutes(word) for word in words]
        losses = self.reader.losses(words, substitutes, label, self.edits.synonyms)
        bound = min(lead for lead, _ in losses)
        proved = replace(none, bound=torch.full_like(none.bound, bound), work=torch.ones_like(none.work))
        if bound > 0:
            return replace(proved, certified=torch.ones_like(none.certified))
        for _, changed in sorted(losses, key=lambda loss: loss[0]):
            copy = parts.copy()
            for k, word in changed.items():
                copy[places[k]] = word
            x_adv = encoded(["".join(copy)], one.x.shape[1]).to(one.x)
            if int(self.model(x_adv).argmax(1)) != label and float(self.edits.distance(x_adv, one.x)) <= 1:
                return replace(proved, x_adv=x_adv, broken=torch.ones_like(none.broken))
        return proved


@dataclass(frozen=True, eq=False)
class LinearReader:
    """A linear model over counts of words, or over their presence."""

    analyse: Any
    """function from a text to its terms"""
    places: Mapping[str, int]
    """column of each term"""
    weights: NDArray[np.float64]
    """(classes, terms)"""
    offsets: NDArray[np.float64]
    """(classes,)"""
    binary: bool
    """whether a term counts once"""

    def scores(self, words: Sequence[str]) -> NDArray[np.float64]:
        """Return the score of each class for a text with these words."""
        terms = [term for word in words for term in self._terms(word)]
        columns = [self.places[term] for term in (set(terms) if self.binary else terms)]
        scores: NDArray[np.float64] = self.offsets + self.weights[:, columns].sum(1)
        return scores

    def losses(
        self, words: Sequence[str], substitutes: Sequence[Sequence[str]], label: int, changes: int
    ) -> Sequence[tuple[float, Mapping[int, str]]]:
        """Return for each other class the lowest lead of the label over it, with the replacements.

        It is exact, except for terms that count once and may occur in several words: those are assumed to occur or to
        be missing elsewhere, whatever is worse.
        """
        scores, old = self.scores(words), [self._terms(word) for word in words]
        new = [{word: self._terms(word) for word in of_word} for of_word in substitutes]
        where = Counter(
            term
            for k in range(len(words))
            for term in {*old[k], *(t for each in new[k].values() for t in each)}
        )
        results = []
        for other in range(len(scores)):
            if other == label:
                continue
            lead = self.weights[label] - self.weights[other]
            best: list[tuple[float, int, str]] = []
            for k, of_word in enumerate(new):
                found = [(self._loss(lead, old[k], terms, where), k, word) for word, terms in of_word.items()]
                best += [max(found)] if found else []
            largest = sorted(best, reverse=True)[:changes]
            largest = [loss for loss in largest if loss[0] > 0]
            size = 1.0 + abs(self.offsets).max() + abs(lead[[self.places[t] for t in where]]).sum()
            lowest = float(scores[label] - scores[other]) - sum(loss for loss, _, _ in largest)
            results.append((lowest - _ROUNDING * float(size), {k: word for _, k, word in largest}))
        return results

    def _terms(self, word: str) -> list[str]:
        return [term for term in self.analyse(word) if term in self.places]

    def _loss(
        self, lead: NDArray[np.float64], old: Sequence[str], new: Sequence[str], where: Mapping[str, int]
    ) -> float:
        """Return by how much a replacement of one word lowers a lead, or an upper bound of it."""
        if not self.binary:
            return sum(float(lead[self.places[term]]) for term in old) - sum(
                float(lead[self.places[term]]) for term in new
            )
        loss = 0.0
        for term in set(old) ^ set(new):
            of_term = float(lead[self.places[term]]) * (1 if term in old else -1)
            loss += of_term if where[term] == 1 else max(of_term, 0.0)
        return loss


def _linear(model: Classifier) -> LinearReader:
    """Return the linear model of a pipeline. Raises `NoBounds` for another model."""
    source = model.net.interface.source if isinstance(model.net, Estimator) else None
    pipeline: Any = source if type(source).__name__ == "Pipeline" else None
    steps = [] if pipeline is None else [step for _, step in pipeline.steps]
    kinds = tuple(type(step).__name__ for step in steps)
    if len(kinds) != 2 or kinds[0] not in _VECTORISERS or kinds[1] not in _LINEAR:
        name = " with ".join(kinds) or type(source if source is not None else model.net).__name__
        raise NoBounds(f"the model is {name}; {_ACCEPTED}")
    vectoriser, linear = steps
    settings = vectoriser.get_params()
    expected: dict[str, Any] = {
        "analyzer": "word",
        "ngram_range": (1, 1),
        "preprocessor": None,
        "tokenizer": None,
        "token_pattern": r"(?u)\b\w\w+\b",
        "norm": None,
        "sublinear_tf": False,
    }
    for name, value in expected.items():
        given = settings.get(name, value)
        if given != value:
            raise NoBounds(f"{kinds[0]} has {name}={given!r}, and {value!r} was expected; {_ACCEPTED}")
    weights, offsets = np.asarray(linear.coef_, np.float64), np.asarray(linear.intercept_, np.float64)
    if len(weights) == 1:  # of two classes, the score of the second one less that of the first
        weights, offsets = np.concatenate((0 * weights, weights)), np.concatenate((0 * offsets, offsets))
    if settings.get("use_idf"):
        weights = weights * vectoriser.idf_
    offsets = np.broadcast_to(offsets, len(weights))
    return LinearReader(
        vectoriser.build_analyzer(), vectoriser.vocabulary_, weights, offsets, bool(settings["binary"])
    )
