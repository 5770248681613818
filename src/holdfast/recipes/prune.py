"""Pruning: the smallest weights of a network are set to zero, step by step, while it is trained on attacked inputs.

Han, Pool, Tran & Dally, "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015,
arXiv:1506.02626: weights are removed by their magnitude, and the others are trained further. Zhu & Gupta, "To Prune, or
Not to Prune: Exploring the Efficacy of Pruning for Model Compression", 2017, arXiv:1710.01878: the sparsity grows along
a cubic curve. Differs from the papers: the training is adversarial, and one threshold holds for all layers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Gt, Lt
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from holdfast.core.batch import Batch
from holdfast.core.errors import UsageError
from holdfast.core.model import Classifier
from holdfast.core.training import STATE, Checkpoint
from holdfast.core.types import Fraction, Inputs, NonNegative, Positive, Steps
from holdfast.recipes.training.compression import after_compression, bytes_of, compressed, uncompressed
from holdfast.recipes.training.fit import Training, Update
from holdfast.recipes.training.learner import Learner, Loop, adversarial_cross_entropy
from holdfast.recipes.training.recipe import Finished, LossRecipe

_DONE, _MASK = "done", "kept."
"""names of the state tensors: the completed fraction of the training, and which weights are not pruned"""
_ROUNDS = 100
"""Largest number of times that weights are pruned, because sorting the weights of a large network takes long."""


@dataclass(frozen=True)
class Prune(LossRecipe):
    """Sets the smallest weights to zero, and trains the others on attacked inputs."""

    sparsity: Annotated[float, Gt(0), Lt(1)] = 0.9
    """fraction of the weights of linear and convolutional layers, all together, that are zero in the new model"""
    gradual: Fraction = 0.5
    """fraction of the training over which the sparsity grows; 0 to prune once, before the first update is applied"""
    steps: Steps = 7
    """number of gradient steps of the inner attack"""
    reach: Positive = 2.5
    """path length of the inner attack, in multiples of eps"""
    clean: NonNegative = 0.0
    """weight of the loss on clean inputs, relative to that on attacked ones"""
    training: Training = field(default_factory=lambda: Training(epochs=10, weight_decay=0.0, warmup=0.0))

    keeps_state: ClassVar[bool] = True

    linear_in_labels: ClassVar[bool] = True
    weights_classes: ClassVar[bool] = True

    def prepared(self, loop: Loop) -> Loop:
        """Return the training with a mask for each tensor of weights."""
        weights, model = prunable(loop.model), loop.model
        # a state dict has a tensor for each name of a shared weight, and the last one is loaded
        names = {id(weight): name for name, weight in weights.items()}
        aliases = {
            alias: names[id(weight)]
            for alias, weight in model.named_parameters(remove_duplicate=False)
            if id(weight) in names
        }
        state = {_MASK + name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
        state[_DONE] = torch.zeros((), dtype=torch.float64, device=loop.data.ids.device)

        def pruned(tensors: dict[str, Tensor], checkpoint: Checkpoint) -> dict[str, Tensor]:
            """The weights of a checkpoint, pruned as far as in the new model."""
            kept = {name: checkpoint.tensors[STATE + _MASK + name].clone() for name in weights}
            prune(kept, tensors, self.sparsity)
            return tensors | {alias: tensors[alias] * kept[name] for alias, name in aliases.items()}

        published = partial(compressed, compress=pruned)
        return replace(
            loop, after=uncompressed(loop.after), state=state, settle=self.settle, published=published
        )

    def settle(self, learner: Learner) -> Callable[[], None]:
        """Return the function that sets the pruned weights to zero after each update, and prunes further ones."""
        weights = prunable(learner.net)
        kept = {name: learner.state[_MASK + name] for name in weights}

        @torch.no_grad()
        def set_zero() -> None:
            done = float(learner.state[_DONE])
            reached = min(done / self.gradual, 1.0) if self.gradual else 1.0
            share = round(_ROUNDS * (1 - (1 - reached) ** 3)) / _ROUNDS
            prune(kept, weights, share * self.sparsity)
            for name, weight in weights.items():
                weight.mul_(kept[name])

        return set_zero

    def inner(self, learner: Learner, batch: Batch, update: Update) -> Inputs:
        """Return the attacked inputs of a batch, found by gradient ascent on the cross-entropy."""
        learner.state[_DONE].fill_(update.done)
        return learner.worst(batch, update.rng, steps=self.steps, reach=self.reach)

    def loss(self, learner: Learner, batch: Batch, x_adv: Inputs) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a batch and the number of correct examples."""
        return adversarial_cross_entropy(learner, batch, x_adv, clean=self.clean)

    def follow_up(self, finished: Finished) -> tuple[dict[str, Any], str]:
        """Return the entry of the card, and a sentence on it for the notes.

        The entry has the sizes of the given and the pruned network in bytes, their robust accuracies on the test
        examples (`after_compression`), and in `sparsity` the fraction of the prunable weights that are zero. The file
        of the pruned network contains its zeros. The stated size is that in a format without them, which has one more
        bit for each prunable weight.
        """
        weights = prunable(finished.new).values()
        zeros, n = sum(int((weight == 0).sum()) for weight in weights), sum(w.numel() for w in weights)
        width = max(weight.element_size() for weight in weights)
        size = bytes_of(finished.new) - width * zeros + -(-n // 8)
        entry, sentence = after_compression(
            finished, size, f"{100 * zeros / n:.1f} % of its {n:,} weights are zero and need one bit"
        )
        return {**entry, "sparsity": zeros / n}, sentence


def prunable(model: Classifier) -> dict[str, nn.Parameter]:
    """Return the weights of linear and convolutional layers that can be pruned, by name. Frozen ones are left out.

    Raises `UsageError` if there are none.
    """
    weights = {
        f"{name}.weight": weight
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | _ConvNd)
        for weight in (layer._parameters.get("weight"),)
        if weight is not None and weight.requires_grad
    }
    if not weights:
        raise UsageError(
            "prune sets weights of linear and convolutional layers of torch.nn to zero, and the network has none that "
            "are trained; give a network that is built of them, as in net.py:make"
        )
    return weights


def prune(kept: Mapping[str, Tensor], weights: Mapping[str, Tensor], sparsity: float) -> None:
    """Prune the smallest of the kept weights until the fraction `sparsity` of all weights is pruned. `kept` has a mask
    for each tensor of weights, and is changed in place. Pruned weights remain pruned.
    """
    masks = torch.cat([mask.flatten() for mask in kept.values()])
    n = round(sparsity * len(masks))
    if int((~masks).sum()) >= n:
        return
    sizes = torch.cat([weights[name].detach().abs().flatten().to(masks.device) for name in kept])
    smallest = sizes.masked_fill(~masks, -1).argsort(stable=True)[:n]
    masks[smallest] = False
    parts = torch.split(masks, [mask.numel() for mask in kept.values()])
    for mask, part in zip(kept.values(), parts, strict=True):
        mask.copy_(part.view_as(mask))
