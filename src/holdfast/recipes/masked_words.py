"""Training on randomly masked texts, which prepares a model of texts for certificates by random masks.

Zeng et al., "Certified Robustness to Text Adversarial Attacks by Randomized [MASK]", Computational Linguistics 49(2),
2023, arXiv:2105.03743, section 3: the cross-entropy of texts of which a random share of the words is kept. Differs from
the paper: a weight of the clean cross-entropy may be added, the weights are averaged, and the learning rate follows one
cycle.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from holdfast.certifiers.masking import Masking, masked
from holdfast.core.batch import Batch, decoded, encoded
from holdfast.core.types import Fraction, Inputs, NonNegative
from holdfast.recipes.training.fit import Training, Update
from holdfast.recipes.training.learner import Learner, adversarial_cross_entropy
from holdfast.recipes.training.recipe import LossRecipe


@dataclass(frozen=True)
class MaskedWords(LossRecipe):
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

    weights_classes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        Masking(self.keep, self.mask)  # refuses other values

    def inner(self, learner: Learner, batch: Batch, update: Update) -> Inputs:
        """Return a masked copy of each text of a batch."""
        texts, rng = decoded(batch.x), update.rng.at("masks")
        copies = masked(texts, keep=self.keep, mask=self.mask, rng=rng, ids=batch.ids)
        return encoded(copies, max(batch.x.shape[1], *map(len, copies))).to(batch.x)

    def loss(self, learner: Learner, batch: Batch, x_adv: Inputs) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a batch and the number of correct masked texts. The loss is the cross-entropy of the
        masked texts plus the weighted one of the texts without masks.
        """
        return adversarial_cross_entropy(
            learner, batch, x_adv, clean=self.clean, smoothing=self.label_smoothing
        )
