"""What a worker reports of its requests to the monitor: signals of a random sample of the inputs, and the predictions
of the newest requests. Nothing of it is written to a disk.
"""

import random
import threading
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from holdfast.guard.decisions import Action
from holdfast.monitoring.reference import Reference
from holdfast.monitoring.signals import Observed
from holdfast.server.answering_requests import Outcome
from holdfast.server.messages import Observations, Prediction

_MOST_PER_S = 40.0
"""sampled inputs per second, so that the monitor takes little time from the requests"""
_MOST_REPORTED = 2000
"""requests of one report, whose predictions are compared with labels that arrive later"""
Sample = tuple[Tensor, Tensor]
"""an input and the scores for it"""
_Answered = tuple[list[str], list[int], list[Tensor], list[bool]]
"""the names, numbers of inputs, and scores of the requests of a batch, and whether the guard flagged each"""


class Reservoir:
    """The sample and the predictions of one worker. `add` is called by the thread that answers requests, and the others
    by the one that reports.
    """

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self._lock = threading.Lock()
        self._tokens, self._filled_s = 1.0, time.monotonic()
        self._new: list[tuple[Sample, Tensor | None]] = []
        """samples with the outputs of the layer of the embeddings"""
        self._answered: list[_Answered] = []
        self._n_answered = self._left_out = 0
        self._random = random.Random()  # noqa: S311 - a sample, no secret

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """Note the answers of a batch."""
        answered = [each for each in outcomes if each.answer is not None]
        if not answered:
            return
        now = time.monotonic()
        with self._lock:
            self._tokens = min(_MOST_PER_S, self._tokens + _MOST_PER_S * (now - self._filled_s))
            self._filled_s = now
            if self._n_answered < _MOST_REPORTED:
                self._n_answered += len(answered)
                self._answered.append(
                    (
                        [each.job.incoming.request for each in answered],
                        [len(each.job.incoming.x) for each in answered],
                        [each.answer.scores for each in answered if each.answer is not None],
                        [each.action is not Action.ALLOW for each in answered],
                    )
                )
            else:
                self._left_out += len(answered)
            if self._reference.layer is not None:
                answered = [each for each in answered if each.features is not None]
            n = min(int(self._tokens), len(answered))
            self._tokens -= n
            for each in answered if n == len(answered) else self._random.sample(answered, n):
                assert each.answer is not None
                row = self._random.randrange(len(each.job.incoming.x))
                sample = each.job.incoming.x[row], each.answer.scores[row]
                features, first = each.features or (None, 0)
                self._new.append((sample, None if features is None else features[first + row].cpu()))

    def taken(self) -> Observations | None:
        """Return the signals of inputs and the predictions since the last call; None without any."""
        with self._lock:
            new, self._new = self._new, []
            answered, self._answered = self._answered, []
            left_out, self._left_out, self._n_answered = self._left_out, 0, 0
        if not answered:
            return None
        return Observations(self._signals(new), _predictions(answered), left_out)

    def _signals(self, new: Sequence[tuple[Sample, Tensor | None]]) -> bytes:
        """The signals of samples, row by row."""
        rows = [_pooled(features) for _, features in new if features is not None]
        features = None
        if self._reference.layer is not None:
            if any(len(row) != self._reference.n_features for row in rows):  # another model was reloaded
                return b""
            features = torch.stack(rows) if rows else None
        samples = [sample for sample, _ in new]
        if not samples:
            return b""
        x = torch.stack([x for x, _ in samples])
        logits = None if self._reference.model is None else torch.stack([scores for _, scores in samples])
        values = self._reference.observer(Observed(x, logits, features)).values
        return values.astype("<f8").tobytes()


def _pooled(features: Tensor) -> Tensor:
    """Features (d,) of an input, averaged over the pixels of images of features."""
    return features.flatten(1).mean(1) if features.dim() > 1 else features


def _predictions(batches: Sequence[_Answered]) -> list[Prediction]:
    """The predictions of the requests of some batches."""
    # at once, because small calls of torch for each batch take longer than the rest
    scores = torch.cat([each for _, _, parts, _ in batches for each in parts])
    best = scores.double().softmax(1).max(1)
    classes, confidences = best.indices.tolist(), best.values.tolist()
    entries, start = list[Prediction](), 0
    for requests, rows, _, flagged in batches:
        for request, n, is_flagged in zip(requests, rows, flagged, strict=True):
            part = slice(start, start + n)
            entries.append((request, classes[part], [round(c, 6) for c in confidences[part]], is_flagged))
            start += n
    return entries
