"""The linear classifier of a pipeline of scikit-learn as a torch module, so that it can be trained further."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix
from torch import Tensor, nn

from holdfast.core.errors import TargetError

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
