"""Randomised smoothing: a certificate under L2 for the classifier that predicts the most probable class under noise.

Cohen, Rosenfeld & Kolter, "Certified Adversarial Robustness via Randomized Smoothing", ICML 2019, arXiv:1902.02918. If
the base classifier predicts the label with a probability above p for x plus Gaussian noise of standard deviation sigma,
then the smoothed classifier predicts the label everywhere within sigma Φ⁻¹(p) of x. p is a lower confidence limit from
draws of the noise. Differs from the paper: the class is the label and needs no draws of its own, and the draws end
once the verdict at eps is known (`statistics/sequential.py`), at most `draws` in all. Without an eps, all draws are
used, and the radius is that of the paper.

A certificate is about the smoothed classifier. It needs predicted labels only, and holds for any base classifier,
because the noise is drawn independently of it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.certifiers.protocol import Proofs
from holdfast.certifiers.smoothing.noise import MOST_DRAWS, radius_of
from holdfast.certifiers.smoothing.votes import (
    FOR_WRONG,
    NO_CLASS,
    Counting,
    noisy_votes,
    refuse_impossible,
    votes_of,
)
from holdfast.core.batch import Batch
from holdfast.core.constraints import L1, L2, Constraint, Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError, TargetLost, UsageError
from holdfast.core.model import EVERY, Classifier
from holdfast.core.remedies import Remedy
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Ids, Inputs, Positive, Steps
from holdfast.statistics.sequential import SequentialTest, fewest_draws, fixed_test, sequential_test

_TRIED, _COPIES = 32, 16  # examples and noisy copies of each that show whether smoothing certifies anything


@dataclass(frozen=True)
class Smoothing:
    """Randomised smoothing with Gaussian noise, which certifies the smoothed classifier under L2."""

    sigma: Positive
    """standard deviation of the noise, in units of the inputs"""
    draws: Steps = 10_000
    """largest number of noisy copies of an example that are classified"""
    failure_probability: float = 0.001
    """probability, for each example, of a verdict that is wrong"""
    seed: int = 0
    """seed of the noise"""
    clip: bool = False
    """whether noisy inputs are clamped to the valid range, as a first step of the base classifier"""

    name: ClassVar[str] = "smoothing"
    place: ClassVar[str] = "smoothing"

    def __post_init__(self) -> None:
        if not 0 < self.sigma < math.inf:
            raise UsageError(
                f"sigma is {self.sigma}; it must be a positive number, such as 0.5: without noise nothing is smoothed"
            )
        refuse_impossible(self)

    def ready(self, model: Classifier, sample: Batch, threat: ThreatModel) -> "ReadySmoothing":
        """Return the method for a frozen model in evaluation mode, after one noisy copy of the inputs of `sample`.

        Raises `UsageError` for another norm than L2, eps 0 and a target class, and if the draws are too few for this
        eps and failure probability, or the model refuses inputs outside its bounds.
        """
        constraint = threat.constraint
        if not isinstance(constraint, L2):
            raise self._other_norm(constraint, sample, model)
        if constraint.eps == 0:
            raise UsageError(
                "eps is 0, and smoothing certifies a change of the input; give a radius, as in l2:0.5. The accuracy "
                "of the smoothed classifier on clean inputs is that of Smoothed(...).predict"
            )
        if threat.goal is not None:
            raise UsageError(
                f"the goal is class {threat.goal}, and a certificate excludes all wrong classes; leave goal= out"
            )
        self._refuse_few(constraint.eps)
        self._refuse_refusing(model, sample)
        return ReadySmoothing(self, model, constraint.eps)

    @property
    def alpha(self) -> float:
        """Failure probability of the certificate; the rest is that of the verdict that the prediction is wrong."""
        return (1 - FOR_WRONG) * self.failure_probability

    def _other_norm(self, constraint: Constraint, sample: Batch, model: Classifier) -> UsageError:
        """Return the error for a threat that is no ball of L2."""
        message = f"the threat is {constraint.name}, and smoothing with Gaussian noise certifies l2 only"
        if not isinstance(constraint, (Linf, L1)):
            return UsageError(f"{message}; give a radius, as in l2:0.5")
        features = sample.x[:1].numel()
        contains = (
            f", whose ball contains that of {constraint.name}:{constraint.eps:g} with {features} features"
        )
        remedy = Remedy("threat", containing_threat(constraint, sample, model), reason=contains)
        if model.remote or model.access != "gradients":
            return UsageError(message, remedy)
        own = [f.name for f in fields(self) if f.name != "seed" and getattr(self, f.name) != f.default]
        return UsageError(message, remedy, Remedy("method", "crown", also=tuple(map(Remedy, own))))

    def _refuse_few(self, eps: float) -> None:
        if eps == math.inf:
            return
        limit = miss_limit(eps, self.sigma)
        fewest = fewest_draws(limit, self.alpha) if limit > 0 else math.inf
        if fewest <= self.draws:
            return
        largest = radius_of(fixed_test(self.draws, self.alpha).upper_limit(0, 0), self.sigma)
        more = [Remedy("draws", int(fewest))] if fewest < MOST_DRAWS else []
        none = "" if more else "; no number of draws is enough"
        raise UsageError(
            f"draws is {self.draws}: with sigma {self.sigma:g} and failure probability {self.failure_probability:g} "
            f"the radius is at most {largest:.3g}, even if all draws agree, and eps is {eps:g}{none}",
            *more,
            Remedy("sigma", float(f"{2 * eps:.4g}")),
        )

    def _refuse_refusing(self, model: Classifier, sample: Batch) -> None:
        """Raise `UsageError` if the model accepts clean inputs and refuses noisy ones."""
        if self.clip or not len(sample):
            return
        reason = ""
        try:
            votes = self.votes(model, sample.x, sample.ids, range(1), rng=Counting(self, model).rng)
            if bool((votes[:, -1] == 1).all()):
                reason = "has no prediction for"
        except TargetLost:
            raise
        except TargetError as error:
            reason = f"does not accept ({error.message})"
        if not reason:
            return
        with torch.no_grad():  # raises its own error if clean inputs fail as well
            accepted = bool((votes_of(model(sample.x)) != NO_CLASS).any())
        if accepted:
            raise UsageError(
                f"the model {reason} inputs with Gaussian noise, whose values are outside its bounds",
                Remedy(
                    "clip",
                    True,
                    reason="to clamp them as a first step of the model, for which the certificate then holds",
                ),
            )

    @property
    def parameters(self) -> Mapping[str, float | str | bool]:
        """Settings that define the smoothed classifier, by their names."""
        return {"sigma": self.sigma, "clip": self.clip}

    @property
    def short(self) -> str:
        """The noise level, for the name of the smoothed classifier."""
        return f"σ = {self.sigma:g}"

    @property
    def change(self) -> str:
        """The noise, as a noun for the report."""
        return f"Gaussian noise of standard deviation {self.sigma:g}"

    def votes(self, model: Classifier, x: Inputs, ids: Ids, draws: range, *, rng: Draws) -> Tensor:
        """Return how often each class is predicted for noisy copies of each input, (n, classes + 1) int64."""
        return noisy_votes(model, x, ids, draws, self.sigma, rng=rng, clip=self.clip)

    def network(self, base: Classifier, draws: int) -> Classifier:
        """Return the network that attacks query: the logarithm of the mean probabilities over fixed draws."""
        from holdfast.certifiers.smoothing.smoothed import Smoothed  # late: only attacks need the network

        net = Smoothed(base, self.sigma, draws=draws, seed=self.seed, clip=self.clip)
        return Classifier(net, bounds=base.bounds, access=base.access, batches=EVERY)


@dataclass(frozen=True)
class ReadySmoothing:
    """Randomised smoothing of a model at a radius."""

    settings: Smoothing
    model: Classifier
    eps: float

    @cached_property
    def test(self) -> SequentialTest:
        """Test whether the probability of another class than the label is small enough for a radius of eps."""
        how = self.settings
        if self.eps == math.inf:
            return fixed_test(how.draws, how.alpha)
        return sequential_test(miss_limit(self.eps, how.sigma), how.draws, how.alpha)

    def __call__(self, batch: Batch) -> Proofs:
        """Return what the noise shows about the smoothed classifier at the examples of a batch.

        `certified`: it predicts the label within eps, with the failure probability of the settings. `broken`: it
        predicts another class at the clean input, with the same. `radius` is proved also where it is below eps, and
        `abstained` marks examples for which neither the label nor another class is shown. Without an eps no example
        is certified or broken. `bound` is the lower limit of
        the probability of the label less that of all other classes within eps, and `work` the number of draws.
        """
        return Counting(self.settings, self.model).proofs(
            self.test, batch, self.eps, lambda limit: radius_of(limit, self.settings.sigma), self._bound
        )

    def _bound(self, limits: Tensor) -> Tensor:
        """Lower bound of the probability of the label less that of the others, within eps."""
        if self.eps == math.inf:
            return torch.full_like(limits, -1.0)
        shifted = torch.special.ndtri(1 - limits) - self.eps / self.settings.sigma
        bound: Tensor = 2 * torch.special.ndtr(shifted) - 1
        return bound


def miss_limit(eps: float, sigma: float) -> float:
    """Return the probability of other classes than the label below which a radius of `eps` is certified."""
    from scipy.special import ndtr

    return float(ndtr(-eps / sigma))


def containing_radius(constraint: Constraint, features: int) -> float:
    """Return the eps of a ball of L2 that contains the ball of Linf, L2 or L1 of a constraint, for inputs with a number
    of features.
    """
    if isinstance(constraint, L2):
        return constraint.eps
    share = math.sqrt(features) if isinstance(constraint, Linf) else 1.0
    return math.ceil(1e4 * share * constraint.eps) / 1e4  # not smaller, so that it contains


def containing_threat(constraint: Constraint, sample: Batch, model: Classifier) -> str:
    """Return the threat model of L2, as text, whose ball contains that of Linf, L2 or L1 of a constraint. Its eps is in
    the same unit.
    """
    radius = containing_radius(constraint, sample.x[:1].numel())
    unit = f",unit={model.units.text}" if model.units is not None else ""
    return f"l2:{radius:.10g}{unit}"


def by_smoothing(constraint: Constraint, sample: Batch, model: Classifier) -> tuple[Remedy, ...]:
    """Return the arguments with which smoothing certifies the ball of Linf, L2 or L1 of a constraint; none if no
    example of a trial keeps its label under the noise often enough, as of most networks that were trained without
    noise.

    Cost: 512 forwards, or none for a model on a server, whose queries are counted.
    """
    radius = containing_radius(constraint, sample.x[:1].numel())
    sigma = float(f"{2 * radius:.4g}")
    if not model.remote and not _promising(
        model, sample.take(torch.arange(min(_TRIED, len(sample)))), radius, sigma
    ):
        return ()
    threat: tuple[Remedy, ...] = ()
    if not isinstance(constraint, L2):
        threat = (Remedy("threat", containing_threat(constraint, sample, model)),)
    contains = f" (the ball of l2 contains that of {constraint.name}:{constraint.eps:g})" if threat else ""
    smoothing = Remedy(
        "method",
        "smoothing",
        also=(*threat, Remedy("sigma", sigma)),
        reason=f"to certify the smoothed classifier, for which predictions suffice{contains}",
    )
    return (smoothing,)


def _promising(model: Classifier, sample: Batch, radius: float, sigma: float) -> bool:
    """Return whether an example keeps its label in so many noisy copies that its radius may be certified."""
    try:
        with torch.no_grad():
            votes = noisy_votes(model, sample.x, sample.ids, range(_COPIES), sigma, rng=Draws(0))
    except TargetError:  # of a model that does not accept noisy inputs, which certify reports with a remedy
        return True
    kept = votes.gather(1, sample.y[:, None]) / _COPIES
    return bool((kept >= 1 - miss_limit(radius, sigma)).any())
