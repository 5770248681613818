"""Limits the time of the assessments of a hardening by the number of test examples."""

import bisect
from dataclasses import dataclass

import torch

from holdfast.core.batch import Data
from holdfast.io.data.data import selected
from holdfast.recipes.training import distributed
from holdfast.runs.assess.expected_time import StageTimes, duration, stage_times
from holdfast.runs.assess.preparation import readied
from holdfast.runs.assess.request import HardenRequest, Subject
from holdfast.runs.engine.progress import Notify, ignore

_LEAST = 50  # smallest number of test examples to which a limit reduces them


@dataclass(frozen=True)
class AssessmentTimes:
    """Expected time of the assessments of a hardening: of the given model and of the new one, and on held-out examples
    between two trainings.
    """

    stages: StageTimes
    """measured times of an assessment of the given model"""
    checked: int
    """number of held-out examples on which a model is checked before a stronger recipe is trained; 0 if only one recipe
    may be trained"""

    def of(self, n: int) -> float:
        """Return the expected seconds of all assessments on `n` test examples.

        The new model is slower to assess if more examples survive. Their share is taken to be in the middle between
        that of the given model and all.
        """
        hardened = (self.stages.share + 1) / 2
        seconds = self.stages.of(n) + self.stages.of(n, hardened)
        return seconds + (self.stages.of(min(self.checked, n), hardened) if self.checked else 0.0)

    def fitting(self, n: int, limit_s: float | None) -> int:
        """Return the largest number of test examples, at most `n`, whose assessments are expected to take at most
        `limit_s` seconds. It is at least 50, if there are so many.
        """
        if limit_s is None or n <= _LEAST:
            return n
        sizes = range(_LEAST + 1, n + 1)
        return _LEAST + bisect.bisect_left(sizes, True, key=lambda size: self.of(size) > limit_s)


def affordable(subject: Subject, test: Data, request: HardenRequest, held_out: int, notify: Notify) -> int:
    """Return the number of test examples on which both models are assessed, and announce the expected time. It is
    measured with a few passes of the given model. `held_out` is the number of held-out examples.
    """
    limit, assessment = limit_s(request), request.assessment
    if notify is ignore and limit is None:
        return len(test)
    with readied(subject, test, distributed.own(torch.device(request.device))) as (target, sample):
        stages = stage_times(assessment.plan, target, test, sample.x.device, assessment.batch_size)
    times = AssessmentTimes(stages, held_out if len(request.candidates) > 1 else 0)
    n = times.fitting(len(test), limit)
    notify(_expected_time(request, times, n, len(test)))
    return n


def _expected_time(request: HardenRequest, times: AssessmentTimes, n: int, n_all: int) -> str:
    """Message with the expected time of the training and of the assessments on `n` of `n_all` test examples."""
    budget_s = request.budget_s
    training = "the training" if budget_s is None else f"{duration(budget_s)} of training"
    examples = f"{n:,} test examples" if n == n_all else f"{n:,} of {n_all:,} test examples"
    more = ""
    if budget_s is not None and len(request.candidates) > 1:
        more = f"; {duration(budget_s)} more of training if doubts are raised"
    return f"expected total time: {training}, about {duration(max(times.of(n), 1))} of assessment on {examples}{more}"


def limit_s(request: HardenRequest) -> float | None:
    """Return the seconds that the assessments of a hardening may take: by default as long as its training, and without
    a budget as long as they need.
    """
    return request.budget_s if request.assess_budget_s is None else request.assess_budget_s


def assessed(test: Data, n: int, seed: int) -> Data:
    """Return the test examples of both assessments: all, or a random sample of `n` of them, determined by the seed."""
    return test if n >= len(test) else selected(test, n=None, sample=n, seed=seed)


def sample_note(test: Data, n: int, limit: float | None) -> str:
    """Return a note if both assessments use a sample of `n` of the test examples, else an empty text."""
    if n >= len(test) or limit is None:
        return ""
    reason = f"the most that are expected to fit into {duration(limit)}"
    if n == _LEAST:
        reason = f"which is the smallest sample, and may take longer than the limit of {duration(limit)}"
    return f"both assessments use a random sample of {n:,} of the {len(test):,} test examples, {reason} (assess_budget)"
