"""Certificates for texts whose words are replaced by substitutes, for networks over embeddings and linear models.

Jia, Raghunathan, Göksel & Liang, "Certified Robustness to Adversarial Word Substitutions", EMNLP 2019,
arXiv:1909.00986. Each word is in the smallest box around the embeddings of the word and its substitutes, and the margin
is bounded over these boxes. Differs from the paper: the bounds are those of CROWN instead of intervals, and as they are
linear in the embeddings, only the largest losses of as many words as may change are subtracted. A linear model over
counts of words is a sum over words, for which this is the exact worst case.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from holdfast.certifiers.protocol import Proofs, ReadyProver
from holdfast.certifiers.texts.embedded import EmbeddingModel, EmbeddingReader
from holdfast.core.batch import Batch
from holdfast.core.errors import NoBounds
from holdfast.core.model import Classifier
from holdfast.core.texts import decoded, encoded
from holdfast.core.threat import ThreatModel
from holdfast.io.models.estimators import Estimator
from holdfast.io.models.text_models import TextFunction
from holdfast.threats.text_edits import TextEdits

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
