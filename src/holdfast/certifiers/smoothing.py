"""Randomised smoothing: certificates under L2 from votes on noisy copies, and the smoothed classifier as a model."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from holdfast.certifiers.protocol import Proofs, StatisticalProver
from holdfast.core.batch import Batch
from holdfast.core.constraints import L1, L2, Constraint, Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import Remedy, TargetError, TargetLost, UsageError
from holdfast.core.meter import Room, in_room, judging
from holdfast.core.model import EVERY, Bounds, Classifier, Model
from holdfast.core.outputs import refused
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Ids, Inputs, Labels, Logits, Mask, Positive, Steps
from holdfast.statistics.intervals import SequentialTest, fewest_draws, fixed_test, sequential_test

MOST_DRAWS = 1 << 31
"""number of draws of one example up to which no two draws of a run share their random bits"""

_LOW_BITS = 0xFFFFFFFF
_SCALE = 2.0**-32
_ROUNDED = 1 - 1e-9  # factor of a radius, by which it is rounded down


def numbered_noise(rng: Draws, ids: Ids, numbers: Ids, like: Tensor) -> Inputs:
    """Return standard normal noise of shape (n, *features), whose row i is draw `numbers[i]` of the example `ids[i]`.

    `ids` and `numbers` have the shape (n,), and `like` has the shape (any, *features). A row depends on the seed, its
    id and its number only, and not on the other rows.
    """
    features = like.shape[1:]
    dtype = torch.promote_types(like.dtype, torch.float32)
    size = math.prod(features)
    bits = rng.bits(ids * MOST_DRAWS + numbers, (size + 1) // 2)
    # the bits are shifted and masked, because `>>` of a negative int64 keeps the sign
    radius = ((bits >> 32) & _LOW_BITS).to(dtype).add_(0.5).mul_(_SCALE).log_().mul_(-2.0).sqrt_()
    angle = (bits & _LOW_BITS).to(dtype).mul_(2 * math.pi * _SCALE)
    normal = torch.cat((radius * angle.cos(), radius * angle.sin()), 1)[:, :size]
    return normal.reshape(-1, *features).to(like.dtype)


def radius_of(misses: float, sigma: float) -> float:
    """Return the certified radius sigma Φ⁻¹(1 - misses), rounded down, if other classes than the label have at most the
    probability `misses` together. It is 0 if they have a half or more.
    """
    from scipy.special import ndtri

    return 0.0 if misses >= 0.5 else -_ROUNDED * sigma * float(ndtri(misses))


_VALUES_IN_MEMORY = 1 << 20  # values of noisy inputs in memory at once, and
_ROWS = 1024  # at most so many inputs: more are not faster on a CPU

FOR_WRONG = 0.01
"""share of the failure probability for the verdict that the prediction is wrong, which seven more draws make up for"""
_SELECTION = 100  # draws that choose the class at an attacked input, as in the paper
_HALF = 0.5

NO_CLASS = -1
"""vote for an output that is not a number, and for an input that the model or its server refuses"""


def votes_of(logits: Logits) -> Labels:
    """Return the predicted class of each input, or `NO_CLASS` if an output is NaN or the server refused the input.

    A model that rejects inputs votes for its additional last class.
    """
    none = refused(logits) | logits.isnan().any(1)
    return torch.where(none, NO_CLASS, logits.argmax(1))


def noisy_votes(
    model: Model, x: Inputs, ids: Ids, draws: range, sigma: Positive, *, rng: Draws, clip: bool = False
) -> Tensor:
    """Return how often each class is predicted for noisy copies of each input, (n, classes + 1) int64.

    `draws` are the numbers of the draws, the same for all inputs; the noise is a function of `rng`, the id and the
    number. The last column counts `NO_CLASS`. With `clip` the noisy inputs are clamped to the bounds of the model.
    Cost: `len(draws)` forwards of each input, in batches that are halved if memory runs out.
    """

    def noisy(rows: Tensor, numbers: Tensor) -> Inputs:
        changed = x[rows] + sigma * numbered_noise(rng, ids[rows], numbers, x)
        return model.bounds.clamp(changed) if clip else changed

    size = max(1, min(_ROWS, _VALUES_IN_MEMORY // max(1, math.prod(x.shape[1:]))))
    return counted_votes(model, ids, draws, noisy, size)


def counted_votes(
    model: Model, ids: Ids, draws: range, changed: Callable[[Tensor, Tensor], Inputs], size: int
) -> Tensor:
    """Return how often each class is predicted for the copies of each input, (n, classes + 1) int64.

    `changed` returns the copies of the inputs in given rows for given numbers of draws, and `size` is the largest
    number of copies of one call of the model.
    """
    n_pairs, n_draws = len(ids) * len(draws), len(draws)
    room, start, votes = Room(size), 0, torch.zeros(0)

    def predicted(size: int) -> tuple[Tensor, Labels, int]:
        pairs = torch.arange(start, min(start + size, n_pairs), device=ids.device)
        rows, numbers = pairs // n_draws, draws.start + pairs % n_draws
        logits = model(changed(rows, numbers), ids[rows])
        return rows, votes_of(logits), logits.shape[1]

    while start < n_pairs:
        with torch.no_grad():
            rows, predictions, classes = in_room(predicted, room, start, n_pairs - start)
        width = classes + 1
        if not start:
            votes = torch.zeros(len(ids) * width, dtype=torch.int64, device=ids.device)
        # -1 modulo the width is the last column
        votes += torch.bincount(rows * width + predictions % width, minlength=len(votes))
        start += len(rows)
    return votes.view(len(ids), -1)


def refuse_impossible(how: StatisticalProver) -> None:
    """Raise `UsageError` for a failure probability or a number of draws with which nothing can be shown."""
    if not 0 < how.failure_probability < 1:
        raise UsageError(
            f"failure_probability is {how.failure_probability}; it must be between 0 and 1, such as 0.001: no "
            "number of draws makes a statistical certificate certain"
        )
    if not 1 <= how.draws < MOST_DRAWS:
        raise UsageError(f"draws is {how.draws}; it must be from 1 to {MOST_DRAWS - 1:,}, such as 10000")


@dataclass(frozen=True)
class Counting:
    """Tests of the predictions of the smoothed classifier of a model by votes on changed copies of inputs."""

    how: StatisticalProver
    model: Classifier

    @property
    def rng(self) -> Draws:
        """Source of the changes for certificates."""
        return Draws(self.how.seed).at(self.how.place, "certify")

    def proofs(
        self,
        test: SequentialTest,
        batch: Batch,
        eps: float,
        radius: Callable[[float], float],
        bound: Callable[[Tensor], Tensor],
    ) -> Proofs:
        """Return what a test of the label shows about the smoothed classifier at the examples of a batch.

        `radius` returns the certified radius for an upper limit of the probability of another class than the label, and
        `bound` the lower bounds of the margin within `eps`.
        """
        if not len(batch):
            none = Proofs.none(batch)
            return replace(none, radius=none.bound, abstained=none.certified)
        votes, look = self._run(test, batch, 0, self.rng)
        work = votes.sum(1)
        misses = work - votes.gather(1, batch.y[:, None])[:, 0]
        certified = misses <= torch.tensor(test.proves, device=look.device)[look]
        ends = zip(look.tolist(), misses.tolist(), strict=True)
        limits = [test.upper_limit(at, count) for at, count in ends]
        upper = torch.tensor(limits, dtype=torch.float64, device=look.device)
        broken, more = self._wrong(test, batch, votes, look, certified)
        radii = batch.x.new_tensor(list(map(radius, limits)), dtype=torch.float64)
        radii = torch.where(certified, radii.clamp_min(eps), radii).masked_fill(broken, 0.0)
        return Proofs(
            certified,
            bound(upper),
            work + more,
            torch.zeros_like(certified),
            batch.x,
            broken,
            radius=radii,
            abstained=~broken & (upper >= _HALF),
        )

    def refuted(self, batch: Batch) -> Mask:
        """Return for attacked inputs `batch.x` whether the smoothed classifier predicts another class than the label
        there.

        A result of true is wrong with a probability of at most the failure probability of the settings. The noise is
        independent of that of a certificate and of `Smoothed` as a network, which attacks use. The other class is the
        most frequent one in 100 draws.
        """
        how, rng = self.how, self.rng.at("refute")
        refuted = torch.zeros_like(batch.ids, dtype=torch.bool)
        if not len(batch):
            return refuted
        with judging():
            votes = how.votes(self.model, batch.x, batch.ids, range(_SELECTION), rng=rng)
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
        look, before = torch.zeros_like(batch.ids), 0
        open_rows, votes = torch.arange(len(batch), device=batch.ids.device), torch.zeros(0)
        for at, n in enumerate(test.looks):
            part, numbers = batch.take(open_rows), range(begin + before, begin + n)
            with judging():
                new = self.how.votes(self.model, part.x, part.ids, numbers, rng=rng)
            votes = votes if at else torch.zeros_like(new)
            votes[open_rows] += new
            look[open_rows] = at
            misses = n - votes[open_rows].gather(1, part.y[:, None])[:, 0]
            open_rows = open_rows[(misses > test.proves[at]) & (misses < test.gives_up[at])]
            before = n
            if not len(open_rows):
                break
        return votes, look

    def _wrong(
        self, of_label: SequentialTest, batch: Batch, votes: Tensor, look: Labels, certified: Mask
    ) -> tuple[Mask, Tensor]:
        """Where the smoothed classifier is wrong at the clean input, and the number of draws that show it.

        The other class is the most frequent one so far. It is tested on the draws that follow, which are independent of
        this choice.
        """
        how, wrong, work = self.how, torch.zeros_like(certified), torch.zeros_like(batch.ids)
        alpha = FOR_WRONG * how.failure_probability
        rival = votes[:, :-1].argmax(1)
        tried = ~certified & (rival != batch.y)
        for at in sorted(set(look[tried].tolist())):
            rows = (tried & (look == at)).nonzero()[:, 0]
            begin = of_label.looks[at]
            if how.draws - begin < fewest_draws(_HALF, alpha):
                continue
            other = batch.take(rows).labelled(rival[rows])
            test = sequential_test(_HALF, how.draws - begin, alpha)
            wrong[rows], work[rows] = self._shown(test, other, begin, self.rng)
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


_VALUES_AT_ONCE = 1 << 18  # values of noisy inputs in one forward pass; more are not faster on a CPU
ABSTAINED = NO_CLASS
"""label of an input whose class the draws do not determine"""


class Smoothed(nn.Module):
    """Classifier that predicts the class that a base classifier predicts most often under Gaussian noise.

        smoothed = Smoothed(base, sigma=0.5)
        labels = smoothed.predict(x)               # -1 where it abstains
        labels, radii = smoothed.certify(x)        # L2 radii
        holdfast.assess(smoothed, data, "l2:0.5")  # attacks on the mean probabilities

    As a network it returns the logarithm of the mean of the base classifier's softmax over `draws` fixed draws of the
    noise, which are the same for all inputs, so that it is a differentiable function of its input. Attacks on it are
    attacks on the expectation. Only `predict` and `certify` have a failure probability.
    """

    def __init__(
        self, base: nn.Module, sigma: float, *, draws: Steps = 32, seed: int = 0, clip: bool = False
    ) -> None:
        """Smooth the classifier `base` with noise of standard deviation `sigma`, in units of its inputs.

        With `clip` noisy inputs are clamped to the bounds of `base`, as a first step of the base classifier. Raises
        `UsageError` for a `sigma` that is not positive, and for less than one draw.
        """
        super().__init__()
        if not 0 < sigma < math.inf:
            raise UsageError(f"sigma is {sigma}; it must be a positive number, such as 0.5")
        if draws < 1:
            raise UsageError(f"draws is {draws}; it must be at least 1, such as 32")
        self.base = base if isinstance(base, Classifier) else Classifier(base)
        self.sigma, self.draws, self.clip = sigma, draws, clip
        self.rng = Draws(seed).at("smoothed")
        self._kept: tuple[object, Tensor] | None = None

    @property
    def bounds(self) -> Bounds:
        """Lowest and highest valid values of the inputs before the noise."""
        return self.base.bounds

    def forward(self, x: Inputs) -> Logits:
        """Return the logarithm of the mean probabilities, (n, classes); cost: `draws` forwards of the base
        classifier.
        """
        noise = self._noise(x)
        at_once = max(1, _VALUES_AT_ONCE // max(1, x.numel()))
        sums = []
        for few in torch.split(noise, at_once):
            noisy = (x + few[:, None]).flatten(0, 1)
            logits = self.base(self.bounds.clamp(noisy) if self.clip else noisy)
            sums.append(logits.log_softmax(1).view(len(few), len(x), -1).logsumexp(0))
        return torch.stack(sums).logsumexp(0) - math.log(self.draws)

    def _noise(self, x: Inputs) -> Tensor:
        """The draws of the noise of the network, (draws, *features). Those of the last call are kept."""
        key = (x.shape[1:], x.dtype, x.device)
        if self._kept is None or self._kept[0] != key:
            numbers = torch.arange(self.draws, device=x.device)
            noise = numbered_noise(self.rng.at("network"), torch.zeros_like(numbers), numbers, x)
            self._kept = key, self.sigma * noise
        return self._kept[1]

    def predict(
        self, x: Inputs, ids: Ids | None = None, *, draws: Steps = 1_000, failure_probability: float = 0.001
    ) -> Labels:
        """Return the prediction of the smoothed classifier for each input, or -1 where it abstains.

        A prediction differs from that of the smoothed classifier with a probability of at most `failure_probability`.
        The noise is a function of `ids`, which are the positions in the batch if they are not given. Cost: `draws`
        forwards of each input.
        """
        from scipy.special import betainc

        _refuse_probability(failure_probability)
        top = self._votes(x, ids, "predict", draws)[:, :-1].topk(2, dim=1)
        first, second = top.values.double().T
        p = 2 * torch.from_numpy(betainc(first.cpu().numpy(), second.cpu().numpy() + 1, 0.5))
        shown = (p.to(x.device) <= failure_probability) & (first > 0)
        return torch.where(shown, top.indices[:, 0], ABSTAINED)

    def certify(
        self,
        x: Inputs,
        ids: Ids | None = None,
        *,
        draws: Steps = 10_000,
        selection: Steps = 100,
        failure_probability: float = 0.001,
    ) -> tuple[Labels, Tensor]:
        """Return the prediction of the smoothed classifier for each input, or -1 where it abstains, and the L2 radius
        within which it does not change, (n,) float64.

        A prediction or radius is wrong with a probability of at most `failure_probability`. The class is the most
        frequent one in `selection` draws, and the radius follows from `draws` others. Cost: as many forwards of each
        input.
        """
        _refuse_probability(failure_probability)
        chosen = self._votes(x, ids, "select", selection).argmax(1)
        votes = self._votes(x, ids, "certify", draws)
        misses = draws - votes.gather(1, chosen[:, None])[:, 0]
        test = fixed_test(draws, failure_probability)
        radii = [radius_of(test.upper_limit(0, int(count)), self.sigma) for count in misses]
        radius = torch.tensor(radii, dtype=torch.float64, device=x.device)
        radius = radius.masked_fill(chosen == votes.shape[1] - 1, 0.0)
        return torch.where(radius > 0, chosen, ABSTAINED), radius

    def _votes(self, x: Inputs, ids: Ids | None, place: str, draws: int) -> Tensor:
        ids = torch.arange(len(x), device=x.device) if ids is None else ids
        rng = self.rng.at(place)
        return noisy_votes(self.base, x, ids, range(draws), self.sigma, rng=rng, clip=self.clip)


def _refuse_probability(value: float) -> None:
    if not 0 < value < 1:
        raise UsageError(f"failure_probability is {value}; it must be between 0 and 1, such as 0.001")


JUDGING_DRAWS = 100
"""number of draws whose most frequent class is the prediction for an input, as in Cohen et al."""
ATTACKED_DRAWS = 16
"""number of draws of the network that attacks use, for each query"""


class SmoothedVotes(nn.Module):
    """Classifier that predicts the most frequent class of a base classifier in fixed draws of a random change, such as
    Gaussian noise.

    Its prediction is an estimate of that of the smoothed classifier. The draws are the same for all inputs, so that it
    is a function of its input, and independent of those of certificates.
    """

    def __init__(self, base: Classifier, smoothing: StatisticalProver, draws: int = JUDGING_DRAWS) -> None:
        super().__init__()
        self.base, self.smoothing, self.draws = base, smoothing, draws
        self.rng = Draws(smoothing.seed).at(smoothing.place, "judge")

    def forward(self, x: Inputs) -> Logits:
        """Return the logarithm of the share of votes of each class, (n, classes); half a vote is added to each.

        A row is NaN if the base classifier has no prediction in most draws. Cost: `draws` forwards of the base
        classifier.
        """
        same = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        votes = self.smoothing.votes(self.base, x, same, range(self.draws), rng=self.rng)
        of_classes = votes[:, :-1].to(x.dtype) + 0.5
        logits: Logits = (of_classes / of_classes.sum(1, keepdim=True)).log()
        return logits.masked_fill(votes.argmax(1, keepdim=True) == votes.shape[1] - 1, torch.nan)

    def network(self) -> Classifier:
        """Return the model that attacks query, with 16 fixed draws."""
        return self.smoothing.network(self.base, ATTACKED_DRAWS)

    def refuted(self, batch: Batch) -> Mask:
        """Return for attacked inputs `batch.x` whether the smoothed classifier predicts another class than the label
        there, with the failure probability of the settings. The random changes are new.
        """
        return Counting(self.smoothing, self.base).refuted(batch)


def smoothed_votes(model: Classifier) -> SmoothedVotes | None:
    """Return the smoothed classifier that is the network of a model, or None for another model."""
    return model.net if isinstance(model.net, SmoothedVotes) else None
