"""The smoothed classifier as the model of a run: votes that judge inputs, a network that attacks use, and a test of
adversarial examples.
"""

import torch
from torch import Tensor, nn

from holdfast.certifiers.smoothing.smoothed import Smoothed
from holdfast.certifiers.smoothing.smoothing import ReadySmoothing, Smoothing
from holdfast.certifiers.smoothing.votes import noisy_votes
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.model import EVERY, Classifier
from holdfast.core.types import Inputs, Logits, Mask

JUDGING_DRAWS = 100
"""number of draws whose most frequent class is the prediction for an input, as in Cohen et al."""
ATTACKED_DRAWS = 16
"""number of draws of the network that attacks use, for each query"""


class SmoothedVotes(nn.Module):
    """Classifier that predicts the most frequent class of a base classifier in 100 draws of Gaussian noise.

    Its prediction is an estimate of that of the smoothed classifier. The draws are the same for all inputs, so that it
    is a function of its input, and independent of those of certificates.
    """

    def __init__(self, base: Classifier, smoothing: Smoothing) -> None:
        super().__init__()
        self.base, self.smoothing = base, smoothing
        self.rng = Draws(smoothing.seed).at("smoothing", "judge")

    def forward(self, x: Inputs) -> Logits:
        """Return the logarithm of the share of votes of each class, (n, classes); half a vote is added to each.

        A row is NaN if the base classifier has no prediction in most draws. Cost: 100 forwards of the base classifier.
        """
        how, same = self.smoothing, torch.zeros(len(x), dtype=torch.int64, device=x.device)
        votes = noisy_votes(self.base, x, same, range(JUDGING_DRAWS), how.sigma, rng=self.rng, clip=how.clip)
        of_classes = votes[:, :-1].to(x.dtype) + 0.5
        logits: Tensor = (of_classes / of_classes.sum(1, keepdim=True)).log()
        return logits.masked_fill(votes.argmax(1, keepdim=True) == votes.shape[1] - 1, torch.nan)

    def network(self) -> Classifier:
        """Return the network that attacks use: the logarithm of the mean probabilities over 16 fixed draws."""
        how = self.smoothing
        net = Smoothed(self.base, how.sigma, draws=ATTACKED_DRAWS, seed=how.seed, clip=how.clip)
        return Classifier(net, bounds=self.base.bounds, access=self.base.access, batches=EVERY)

    def refuted(self, batch: Batch) -> Mask:
        """Return for attacked inputs `batch.x` whether the smoothed classifier predicts another class than the label
        there, with the failure probability of the settings. The noise is new.
        """
        how = self.smoothing
        # only certificates use the eps
        return ReadySmoothing(how, self.base, torch.inf).refuted(batch)


def smoothed_votes(model: Classifier) -> SmoothedVotes | None:
    """Return the smoothed classifier that is the network of a model, or None for another model."""
    return model.net if isinstance(model.net, SmoothedVotes) else None


def smoothed_model(base: Classifier, smoothing: Smoothing) -> Classifier:
    """Return the smoothed classifier of a base classifier, as the model of a run."""
    model = Classifier(
        SmoothedVotes(base, smoothing),
        bounds=base.bounds,
        access=base.access,
        batches=EVERY,
    )
    model.class_labels, model.class_names = base.class_labels, base.class_names
    model.feature_names, model.hides = base.feature_names, base.hides
    return model
