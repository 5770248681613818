"""FT-SAM: fine-tuning of a network with a backdoor on clean inputs, at weights that are perturbed in the direction in
which the loss rises most.

Zhu et al., "Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization", ICCV 2023,
arXiv:2304.11823. The perturbation is that of Kwon et al., "ASAM: Adaptive Sharpness-Aware Minimization for
Scale-Invariant Learning of Deep Neural Networks", ICML 2021, arXiv:2102.11600: `rho · T² g / |T g|` with `T = |w|`.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.estimate import Goal
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Fraction, Inputs, Positive
from holdfast.recipes.training.fit import Training
from holdfast.recipes.training.follow_up import after_repair, trigger_of
from holdfast.recipes.training.learner import Learner, hits
from holdfast.recipes.training.recipe import Finished, LossRecipe

_TINY = 1e-12  # keeps the perturbation finite where the gradient is zero


@dataclass(frozen=True)
class FTSAM(LossRecipe):
    """Trains on clean inputs at perturbed weights. The trigger of the threat model is not used in the training."""

    rho: Positive = 2.0
    """size of the perturbation, in which each weight moves in proportion to its own size"""
    label_smoothing: Fraction = 0.1
    """fraction of each label that is spread evenly over all classes"""
    control: str = ""
    """network that was never poisoned, as in `clean.pt,arch=net.py:make`, which only a drill has: after the training
    it gets the same updates with poisoned examples as the new model"""
    training: Training = field(
        default_factory=lambda: Training(
            epochs=10, optimizer="sgd", lr=0.05, schedule="cosine", averaging="none"
        )
    )

    goal: ClassVar[Goal] = Goal("trigger_success_rate", better="lower")
    differentiated_twice: ClassVar[bool] = True
    weights_classes: ClassVar[bool] = True

    def check(self, threat: ThreatModel) -> None:
        """Raise `UsageError` if the threat model is not a trigger."""
        trigger_of(threat)

    def loss(self, learner: Learner, batch: Batch, x_adv: Inputs) -> tuple[Tensor, Tensor]:
        """Return the mean cross-entropy of a batch at perturbed weights, and the number of examples that are correct at
        the weights themselves.
        """
        weights = {name: weight for name, weight in learner.net.named_parameters() if weight.requires_grad}
        buffers = {
            name: value.clone() for name, value in learner.net.named_buffers()
        }  # batch norm updates once
        logits = learner.net(x_adv)
        here = learner.mean_cross_entropy(logits, batch.y, smoothing=self.label_smoothing)
        gradients = torch.autograd.grad(here, list(weights.values()), materialize_grads=True)
        sizes = {name: weight.detach().abs() for name, weight in weights.items()}
        scaled = {
            name: size * gradient for (name, size), gradient in zip(sizes.items(), gradients, strict=True)
        }
        length = torch.stack([value.norm() for value in scaled.values()]).norm()
        moved = {
            name: weights[name] + self.rho / (length + _TINY) * sizes[name] * value
            for name, value in scaled.items()
        }
        at_moved = torch.func.functional_call(learner.net, {**buffers, **moved}, (x_adv,))
        value = learner.mean_cross_entropy(at_moved, batch.y, smoothing=self.label_smoothing)
        return value, hits(logits, batch.y)

    def follow_up(self, finished: Finished) -> tuple[dict[str, Any], str]:
        """Return the success of the trigger before and after the repair, and after further poisoned updates."""
        return after_repair(finished)
