"""The smoothed classifier as the model of a run: votes that judge inputs, a network that attacks use, and a test of
adversarial examples.
"""

import torch
from torch import nn

from holdfast.certifiers.protocol import StatisticalProver
from holdfast.certifiers.smoothing.votes import Counting
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.model import EVERY, Classifier
from holdfast.core.types import Inputs, Logits, Mask

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


def smoothed_model(base: Classifier, smoothing: StatisticalProver) -> Classifier:
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
