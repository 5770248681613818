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
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.certifiers.protocol import Proofs
from holdfast.certifiers.smoothing.noise import MOST_DRAWS
from holdfast.certifiers.smoothing.votes import NO_CLASS, noisy_votes, votes_of
from holdfast.core.batch import Batch
from holdfast.core.constraints import L1, L2, Constraint, Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError, TargetLost, UsageError
from holdfast.core.model import Classifier
from holdfast.core.purpose import judging
from holdfast.core.remedies import Remedy
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Labels, Mask, Positive, Steps
from holdfast.statistics.sequential import SequentialTest, fewest_draws, fixed_test, sequential_test

_FOR_WRONG = 0.01
"""share of the failure probability for the verdict that the prediction is wrong, which seven more draws make up for"""
_SELECTION = 100  # draws that choose the class at an attacked input, as in the paper
_ROUNDED = 1 - 1e-9  # factor of a radius, by which it is rounded down
_HALF = 0.5
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

    def __post_init__(self) -> None:
        if not 0 < self.sigma < math.inf:
            raise UsageError(
                f"sigma is {self.sigma}; it must be a positive number, such as 0.5: without noise nothing is smoothed"
            )
        if not 0 < self.failure_probability < 1:
            raise UsageError(
                f"failure_probability is {self.failure_probability}; it must be between 0 and 1, such as 0.001: no "
                "number of draws makes a statistical certificate certain"
            )
        if not 1 <= self.draws < MOST_DRAWS:
            raise UsageError(f"draws is {self.draws}; it must be from 1 to {MOST_DRAWS - 1:,}, such as 10000")

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
        return (1 - _FOR_WRONG) * self.failure_probability

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
            votes = noisy_votes(model, sample.x, sample.ids, range(1), self.sigma, rng=self.rng)
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
    def rng(self) -> Draws:
        """Source of the noise."""
        return Draws(self.seed).at("smoothing", "certify")


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
        if not len(batch):
            none = Proofs.none(batch)
            return replace(none, radius=none.bound, abstained=none.certified)
        votes, look = self._run(self.test, batch, 0, self.settings.rng)
        work = votes.sum(1)
        misses = work - votes.gather(1, batch.y[:, None])[:, 0]
        certified = misses <= torch.tensor(self.test.proves, device=look.device)[look]
        ends = zip(look.tolist(), misses.tolist(), strict=True)
        limits = [self.test.upper_limit(at, count) for at, count in ends]
        broken, more = self._wrong(batch, votes, look, certified)
        radius = batch.x.new_tensor(
            [radius_of(limit, self.settings.sigma) for limit in limits], dtype=torch.float64
        )
        radius = torch.where(certified, radius.clamp_min(self.eps), radius).masked_fill(broken, 0.0)
        return Proofs(
            certified,
            self._bound(torch.tensor(limits, dtype=torch.float64, device=look.device)),
            work + more,
            torch.zeros_like(certified),
            batch.x,
            broken,
            radius=radius,
            abstained=~broken & (radius <= 0),
        )

    def refuted(self, batch: Batch) -> Mask:
        """Return for attacked inputs `batch.x` whether the smoothed classifier predicts another class than the label
        there.

        A result of true is wrong with a probability of at most the failure probability of the settings. The noise is
        independent of that of a certificate and of `Smoothed` as a network, which attacks use. The other class is the
        most frequent one in 100 draws.
        """
        how, rng = self.settings, self.settings.rng.at("refute")
        refuted = torch.zeros_like(batch.ids, dtype=torch.bool)
        if not len(batch):
            return refuted
        with judging():
            votes = noisy_votes(
                self.model, batch.x, batch.ids, range(_SELECTION), how.sigma, rng=rng, clip=how.clip
            )
        rival = votes[:, :-1].argmax(1)
        rows = (rival != batch.y).nonzero()[:, 0]
        draws = max(how.draws, fewest_draws(_HALF, how.failure_probability))
        test = sequential_test(_HALF, draws, how.failure_probability)
        refuted[rows] = self._shown(test, batch.take(rows).labelled(rival[rows]), _SELECTION, rng)[0]
        return refuted

    def _run(self, test: SequentialTest, batch: Batch, begin: int, rng: Draws) -> tuple[Tensor, Labels]:
        """The votes on the draws of each example from `begin` on until the test of its label ends, and the index of the
        look at which it ends.
        """
        how, look, before = self.settings, torch.zeros_like(batch.ids), 0
        open_rows, votes = torch.arange(len(batch), device=batch.ids.device), torch.zeros(0)
        for at, n in enumerate(test.looks):
            part, numbers = batch.take(open_rows), range(begin + before, begin + n)
            with judging():
                new = noisy_votes(self.model, part.x, part.ids, numbers, how.sigma, rng=rng, clip=how.clip)
            votes = votes if at else torch.zeros_like(new)
            votes[open_rows] += new
            look[open_rows] = at
            misses = n - votes[open_rows].gather(1, part.y[:, None])[:, 0]
            open_rows = open_rows[(misses > test.proves[at]) & (misses < test.gives_up[at])]
            before = n
            if not len(open_rows):
                break
        return votes, look

    def _bound(self, limits: Tensor) -> Tensor:
        """Lower bound of the probability of the label less that of the others, within eps."""
        if self.eps == math.inf:
            return torch.full_like(limits, -1.0)
        shifted = torch.special.ndtri(1 - limits) - self.eps / self.settings.sigma
        bound: Tensor = 2 * torch.special.ndtr(shifted) - 1
        return bound

    def _wrong(self, batch: Batch, votes: Tensor, look: Labels, certified: Mask) -> tuple[Mask, Tensor]:
        """Where the smoothed classifier is wrong at the clean input, and the number of draws that show it.

        The other class is the most frequent one so far. It is tested on the draws that follow, which are independent of
        this choice.
        """
        how, wrong, work = self.settings, torch.zeros_like(certified), torch.zeros_like(batch.ids)
        alpha = _FOR_WRONG * how.failure_probability
        rival = votes[:, :-1].argmax(1)
        tried = ~certified & (rival != batch.y)
        for at in sorted(set(look[tried].tolist())):
            rows = (tried & (look == at)).nonzero()[:, 0]
            begin = self.test.looks[at]
            if how.draws - begin < fewest_draws(_HALF, alpha):
                continue
            other = batch.take(rows).labelled(rival[rows])
            test = sequential_test(_HALF, how.draws - begin, alpha)
            wrong[rows], work[rows] = self._shown(test, other, begin, how.rng)
        return wrong, work

    def _shown(self, test: SequentialTest, batch: Batch, begin: int, rng: Draws) -> tuple[Mask, Tensor]:
        """Whether a test proves that the smoothed classifier predicts the label of each example, and the number of
        draws from `begin` on that it needs.
        """
        if not len(batch):
            return torch.zeros_like(batch.ids, dtype=torch.bool), torch.zeros_like(batch.ids)
        votes, look = self._run(test, batch, begin, rng)
        work = votes.sum(1)
        misses = work - votes.gather(1, batch.y[:, None])[:, 0]
        return misses <= torch.tensor(test.proves, device=look.device)[look], work


def miss_limit(eps: float, sigma: float) -> float:
    """Return the probability of other classes than the label below which a radius of `eps` is certified."""
    from scipy.special import ndtr

    return float(ndtr(-eps / sigma))


def radius_of(misses: float, sigma: float) -> float:
    """Return the certified radius sigma Φ⁻¹(1 - misses), rounded down, if other classes than the label have at most the
    probability `misses` together. It is 0 if they have a half or more.
    """
    from scipy.special import ndtri

    return 0.0 if misses >= _HALF else -_ROUNDED * sigma * float(ndtri(misses))


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
