"""Wraps models of texts as torch modules whose inputs are texts as rows of code points."""

import sys
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix
from torch import Tensor, nn

from holdfast.core.errors import TargetError
from holdfast.core.texts import decoded
from holdfast.io.models import estimators
from holdfast.io.models.adapting import refuse_no_model
from holdfast.io.models.object_digest import digest_of_object

Texts = Callable[[list[str]], Any]


class TextEstimator(estimators.Estimator):
    """An estimator that is called with texts, such as a pipeline of scikit-learn that begins with a vectoriser."""

    def rows(self, x: Tensor) -> estimators.Array:
        """Return the texts in the rows of `x`, as an array of strings."""
        return np.array(decoded(x), dtype=object)

    def _forms(self) -> tuple[estimators.Form, ...]:
        return ("array",)

    def _compared(self, x: Tensor) -> Tensor:
        return x  # there is no midpoint of two texts


class TextFunction(nn.Module):
    """A function from a list of strings to scores (n, classes), which are a tensor, an array, or a list of rows."""

    def __init__(self, model: Texts, digest: str | None = None) -> None:
        super().__init__()
        self.model = model
        self.digest = digest or digest_of_object(model)
        """digest of the function, for a function that is an object"""

    def __deepcopy__(self, memo: dict[int, object]) -> "TextFunction":
        """Return the module itself, because a call of the function does not change it, and a copy may be large. A
        network is copied, since copies of it are converted to double precision.
        """
        if not isinstance(self.model, nn.Module):
            return self
        return TextFunction(deepcopy(self.model, memo), self.digest)

    def forward(self, x: Tensor) -> object:
        """Return the scores of the texts in the rows of `x`."""
        outputs = self.model(decoded(x))
        if not isinstance(outputs, np.ndarray | list | tuple):
            return outputs.to(x.device) if isinstance(outputs, Tensor) else outputs
        _refuse_labels(outputs)
        try:
            return torch.as_tensor(np.asarray(outputs, dtype=np.float64)).to(x.device, x.dtype)
        except (TypeError, ValueError) as error:
            raise TargetError(
                f"the model returned {outputs[0]!r:.80} for the first text; scores (n, classes) were expected, as a "
                "tensor, an array or a list of rows of numbers"
            ) from error


def _refuse_labels(outputs: Sequence[Any] | estimators.Array) -> None:
    """Raise `TargetError` if the outputs of a function are labels: strings, or whole numbers of which one is no
    probability.
    """
    first = outputs[0] if len(outputs) else None
    is_label = isinstance(first, str)
    if isinstance(first, int | np.integer):
        is_label = any(not 0 <= number <= 1 for number in outputs)
    if is_label:
        raise TargetError(
            f"the model returned labels, such as {first!s:.80} for the first text, and scores (n, classes) were "
            "expected; return a row for each text, with 1 for its class and 0 for the others, and set model_output: "
            "probability"
        )


class _Pipeline:
    """A function from texts to the probabilities that a pipeline `text-classification` of transformers returns."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.labels = tuple(pipeline.model.config.id2label[k] for k in sorted(pipeline.model.config.id2label))

    def __call__(self, texts: list[str]) -> list[list[float]]:
        results: Sequence[Sequence[Mapping[str, Any]]] = self.pipeline(texts, top_k=None, truncation=True)
        by_label = [{entry["label"]: float(entry["score"]) for entry in result} for result in results]
        return [[scores[label] for label in self.labels] for scores in by_label]


def adapted_text_model(model: object) -> estimators.Adapted | None:
    """Return a model of texts as a torch module whose inputs are rows of code points. Return None if it is such a
    module already.
    """
    if isinstance(model, TextEstimator | TextFunction):
        return None
    if isinstance(model, estimators.Estimator):
        return _estimator(estimators.as_model(model.interface, model.digest))
    refuse_no_model(model)
    name = getattr(model, "__qualname__", type(model).__qualname__)
    hidden = f"{name} is called with texts, which have no gradients"
    pipeline = getattr(sys.modules.get("transformers"), "Pipeline", None)
    if isinstance(pipeline, type) and isinstance(model, pipeline):
        function = _Pipeline(model)
        net = TextFunction(function)
        return estimators.Adapted(
            net, "scores", hidden, len(function.labels), function.labels, output="probability"
        )
    if isinstance(model, nn.Module) or callable(model):
        return estimators.Adapted(TextFunction(model), "scores", hidden)
    assert isinstance(model, estimators.Predictor)
    return _estimator(estimators.as_model(estimators.interface_of(model), estimators.contents(model)))


def _estimator(adapted_model: estimators.Adapted) -> estimators.Adapted:
    """Return an estimator that is called with texts instead of numbers."""
    assert isinstance(adapted_model.net, estimators.Estimator)
    net = TextEstimator(adapted_model.net.interface, adapted_model.net.digest)
    return replace(adapted_model, net=net, feature_names=None)


_COEFFICIENTS = ("coef_", "intercept_")
_ATTRIBUTES = {
    "LogisticRegression": _COEFFICIENTS,
    "LogisticRegressionCV": _COEFFICIENTS,
    "LinearSVC": _COEFFICIENTS,
    "SGDClassifier": _COEFFICIENTS,
    "RidgeClassifier": _COEFFICIENTS,
    "MultinomialNB": ("feature_log_prob_", "class_log_prior_"),
}
"""Attributes of linear classifiers with the weights (rows, features) and the offsets (rows,) of their scores."""


@dataclass(frozen=True, eq=False)
class _Features:
    """The steps of a pipeline before its classifier."""

    pipeline: Any

    def __deepcopy__(self, memo: dict[int, object]) -> "_Features":
        """Return the object itself, because a call does not change it, and a vocabulary may be large."""
        return self

    def __call__(self, texts: list[str]) -> csr_matrix:
        return csr_matrix(self.pipeline[:-1].transform(np.array(texts, dtype=object)))


class LinearTexts(nn.Module):
    """Logits of texts by a pipeline of scikit-learn that ends with a linear classifier. Only its weights are trained;
    the steps before it, such as the vocabulary, do not change.

    Raises `TargetError` for a model that is no pipeline, or that ends with another classifier.
    """

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        steps = list(pipeline.steps) if type(pipeline).__name__ == "Pipeline" else []
        kind = type(steps[-1][1] if steps else pipeline).__name__
        if len(steps) < 2 or kind not in _ATTRIBUTES:
            raise TargetError(
                f"the model is {'a pipeline that ends with ' if steps else ''}{kind}, which has no weights that "
                f"harden trains; give a pipeline that ends with one of {', '.join(_ATTRIBUTES)}, or a torch.nn.Module "
                "whose forward takes a list of strings"
            )
        self.features = _Features(pipeline)
        weights, offsets = (np.asarray(getattr(steps[-1][1], name)) for name in _ATTRIBUTES[kind])
        self.weight = nn.Parameter(torch.tensor(weights.T, dtype=torch.float32))
        """(features, rows), with one row for two classes whose score is one number"""
        self.bias = nn.Parameter(torch.tensor(offsets, dtype=torch.float32).expand(len(weights)).clone())

    def forward(self, texts: list[str]) -> Tensor:
        """Return the logits (n, classes) of texts."""
        counts, like = self.features(texts), self.weight
        scores = self.bias + F.embedding_bag(
            torch.from_numpy(counts.indices.astype(np.int64)).to(like.device),
            like,
            torch.from_numpy(counts.indptr[:-1].astype(np.int64)).to(like.device),
            per_sample_weights=torch.from_numpy(counts.data).to(like),
            mode="sum",
        )
        return torch.cat((torch.zeros_like(scores), scores), 1) if scores.shape[1] == 1 else scores

    def fitted_pipeline(self) -> Any:
        """Return a copy of the pipeline whose classifier has the current weights."""
        pipeline = deepcopy(self.features.pipeline)
        classifier = pipeline.steps[-1][1]
        for name, value in zip(
            _ATTRIBUTES[type(classifier).__name__], (self.weight.T, self.bias), strict=True
        ):
            setattr(classifier, name, value.detach().cpu().double().numpy().copy())
        return pipeline
