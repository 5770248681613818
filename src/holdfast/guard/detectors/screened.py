"""A model behind a stateful query detector, as attacks query it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.constraints import Norm, allowed
from holdfast.core.lookup import Lookup
from holdfast.core.meter import margin
from holdfast.core.model import Bounds, Classifier
from holdfast.core.outputs import REFUSED
from holdfast.core.types import Ids, Inputs, Logits
from holdfast.guard.detectors.queries import QueryDetector


@dataclass
class Screened:
    """Model that rejects the queries of a batch of examples on which a query detector fires, and records when each
    example was first broken and first rejected. Without `detector`, it records only.

    A rejected query has the outputs `holdfast.core.outputs.REFUSED`. Inputs that `model` rejects by a detector of its
    own are rejected as well.
    """

    model: Classifier
    batch: Batch
    norm: Norm
    detector: QueryDetector | None = None
    principal: str = ""
    """name of the client; with an empty one, the detector counts queries over all clients only, as for an attacker with
    a new client for each query"""
    alone: bool = False
    """whether inputs that `model` rejects by a detector of its own are answered nevertheless"""
    queries: Tensor = field(init=False)
    """number of queries of each example (n,), int64"""
    broken_at: Tensor = field(init=False)
    """number of the first query of each example that was accepted and misclassified (n,); 0 if there is none"""
    rejected_at: Tensor = field(init=False)
    """number of the first query of each example that was rejected (n,); 0 if there is none"""

    def __post_init__(self) -> None:
        self.queries, self.broken_at, self.rejected_at = (torch.zeros_like(self.batch.ids) for _ in range(3))
        self._lookup = Lookup(self.batch.ids)

    @property
    def bounds(self) -> Bounds:
        """Lowest and highest valid values of the inputs."""
        return self.model.bounds

    def __call__(self, x: Inputs, ids: Ids | None = None) -> Logits:
        """Return the logits (n, classes) of the queries; those of rejected ones are `REFUSED`."""
        rows = self._lookup.rows(self.batch.ids if ids is None else ids)
        with torch.no_grad():
            logits = self.model(x)
        rejected = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        if self.model.rejects:
            rejected = (logits[:, -1] > logits[:, :-1].amax(1)) & (not self.alone)
            logits = logits[:, :-1]
        if self.detector is not None:
            low, high = self.bounds.like(x)
            scaled = ((x - low) / (high - low)).float()
            scores = self.detector.score(scaled, [self.principal] * len(x), 0.0, x)
            fired = torch.from_numpy(scores >= self.detector.settings.threshold)
            rejected = rejected | fired.to(x.device)
        queried = self.batch.take(rows)
        wrong = ~(margin(logits, queried) > 0) & ~rejected & allowed(self.norm, x, queried.x, self.bounds)
        for row, is_wrong, is_rejected in zip(rows.tolist(), wrong.tolist(), rejected.tolist(), strict=True):
            self.queries[row] += 1
            if is_wrong and not self.broken_at[row]:
                self.broken_at[row] = self.queries[row]
            if is_rejected and not self.rejected_at[row]:
                self.rejected_at[row] = self.queries[row]
        answers: Logits = logits.masked_fill(rejected[:, None], REFUSED)
        return answers
