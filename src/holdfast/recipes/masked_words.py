"""Training on randomly masked texts, which prepares a model of texts for certificates by random masks.

Zeng et al., "Certified Robustness to Text Adversarial Attacks by Randomized [MASK]", Computational Linguistics 49(2),
2023, arXiv:2105.03743, section 3: the cross-entropy of texts of which a random share of the words is kept. Differs from
the paper: a weight of the clean cross-entropy may be added, the weights are averaged, and the learning rate follows one
cycle.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from holdfast.certifiers.texts.masking import Masking, masked
from holdfast.core.batch import Batch, TrainingData
from holdfast.core.checkpoint import Checkpoint
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.texts import decoded, encoded
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Fraction, Inputs, NonNegative
from holdfast.recipes.training.fit import Training, Turn
from holdfast.recipes.training.learner import Learner, adversarial_cross_entropy, trained


@dataclass(frozen=True)
class MaskedWords:
    """Trains on texts with random masks, as the certificate `masking` with the same `keep` and `mask` needs."""

    keep: Fraction = 0.1
    """share of the words of a text that are kept; masking certifies best with the same value"""
    mask: str = "[MASK]"
    """word in the place of the others; with an empty one they are deleted"""
    clean: NonNegative = 0.0
    """weight of the cross-entropy of the texts without masks"""
    label_smoothing: Fraction = 0.0
    """fraction of each label that is spread evenly over all classes"""
    training: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        Masking(self.keep, self.mask)  # refuses other values

    def __call__(
        self,
        model: Classifier,
        data: TrainingData,
        threat: ThreatModel,
        *,
        rng: Draws,
        after: Checkpoint | None = None,
    ) -> Iterator[Checkpoint]:
        loss = partial(adversarial_cross_entropy, clean=self.clean, smoothing=self.label_smoothing)
        return trained(
            self.inner, loss, model, data, threat, self.training, rng=rng, after=after, weighted=True
        )

    def inner(self, learner: Learner, batch: Batch, turn: Turn) -> Inputs:
        """Return a masked copy of each text of a batch."""
        texts, rng = decoded(batch.x), turn.rng.at("masks")
        copies = masked(texts, keep=self.keep, mask=self.mask, rng=rng, ids=batch.ids)
        return encoded(copies, max(batch.x.shape[1], *map(len, copies))).to(batch.x)
