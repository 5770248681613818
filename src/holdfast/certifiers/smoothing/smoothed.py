"""A smoothed classifier as a model: predictions that abstain, certified radii, and a network that attacks can use.

Cohen, Rosenfeld & Kolter, "Certified Adversarial Robustness via Randomized Smoothing", ICML 2019, arXiv:1902.02918:
PREDICT and CERTIFY with fixed numbers of draws. Salman et al., "Provably Robust Deep Learning via Adversarially Trained
Smoothed Classifiers", NeurIPS 2019, arXiv:1906.04584, for the network: the logarithm of the mean probability under
noise. Differs from the papers: the noise is a function of the seed, the id of the input and the number of the draw.
"""

import math

import torch
from torch import Tensor, nn

from holdfast.certifiers.smoothing.noise import numbered_noise, radius_of
from holdfast.certifiers.smoothing.votes import NO_CLASS, noisy_votes
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Bounds, Classifier
from holdfast.core.types import Ids, Inputs, Labels, Logits, Steps
from holdfast.statistics.sequential import fixed_test

_VALUES = 1 << 18  # values of noisy inputs in one forward pass; more are not faster on a CPU
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
        at_once = max(1, _VALUES // max(1, x.numel()))
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
        self,
        x: Inputs,
        ids: Ids | None = None,
        *,
        draws: Steps = 1_000,
        failure_probability: float = 0.001,
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
