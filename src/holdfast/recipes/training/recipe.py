"""Protocol of recipes, the base class of recipes that consist of a loss and of the inputs of an attack, and training
examples that a recipe reserves.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from holdfast.core.batch import UNLABELLED, Batch, TrainingData
from holdfast.core.constraints import Constraint
from holdfast.core.draws import Draws
from holdfast.core.estimate import Goal
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.training import Checkpoint
from holdfast.core.types import Inputs
from holdfast.recipes.training.fit import Training, Update
from holdfast.recipes.training.learner import Learner, Loop, adversarial_cross_entropy, clean_inputs, trained
from holdfast.statistics.privacy_budget import RowBudget

MOST, EVERY = 256, 10
"""Largest number of reserved examples; at most one training example in `EVERY` is reserved."""
_STEPS, _REACH = 5, 2.5  # of the attack that measures robust accuracy


def reserved(data: TrainingData, rng: Draws) -> tuple[TrainingData, Batch]:
    """Return the training examples without the reserved ones, and the reserved ones, which are drawn at random.

    Fewer than `EVERY` examples, on which updates are only timed, are returned as both.
    """
    rows = rng.at("reserved").bits(data.ids).argsort()
    if len(data) < EVERY:
        return data, data.take(rows)
    chosen = rows[data.y[rows] != UNLABELLED][: min(MOST, len(data) // EVERY)]
    is_reserved = torch.zeros(len(data), dtype=torch.bool, device=data.ids.device)
    is_reserved[chosen] = True
    return data.subset(~is_reserved), data.take(is_reserved)


def robust_share(learner: Learner, examples: Batch) -> float:
    """Return the share of examples that the network classifies correctly after a short attack inside the learner's
    ball, which is the same in each call.
    """
    x_adv = learner.worst(examples, Draws(0).at("reserved"), steps=_STEPS, reach=_REACH)
    with torch.no_grad():
        return float((learner.frozen(x_adv).argmax(1) == examples.y).double().mean())


@runtime_checkable
class Recipe(Protocol):
    """Protocol of a recipe: a frozen dataclass whose fields are its settings. When it is called, it trains a copy of
    the model and does not change the model itself.
    """

    @property
    def training(self) -> Training:
        """Settings of the training loop, such as epochs, batch size and optimiser."""

    def __call__(
        self,
        model: Classifier,
        data: TrainingData,
        threat: ThreatModel,
        *,
        rng: Draws,
        after: Checkpoint | None = None,
    ) -> Iterator[Checkpoint]:
        """Yield a checkpoint after each epoch, the last one with the new model; with `after`, resume from that
        checkpoint.
        """


@dataclass(frozen=True)
class Finished:
    """A finished training, about which a recipe may measure more than the metrics before and after it."""

    given: Classifier
    new: Classifier
    control: Classifier | None
    """network that a recipe with a setting `control` names, for comparison; None without one"""
    training: TrainingData
    test: Batch
    threat: ThreatModel
    rng: Draws
    state: Mapping[str, Tensor] = field(default_factory=dict)
    """state of the recipe in the checkpoint of the new model"""


class RecipeFacts:
    """What a hardening asks of a recipe beside its training, with the answers of most recipes. `LossRecipe` inherits
    them, and a recipe overrides those that differ.
    """

    goal: ClassVar[Goal] = Goal()
    """metric by which the new model is compared with the given one"""
    keeps_state: ClassVar[bool] = False
    """whether its weights are only of use with other tensors of its checkpoints or with further examples; `rotate`
    refuses it, because the sets of a pool contain weights only"""
    new_network: ClassVar[bool] = False
    """whether the new model has another network than the given one; `network` returns it"""
    needs_teacher: ClassVar[bool] = False
    """whether it trains on the predictions of another network, which `taught_by` receives"""
    private: ClassVar[bool] = False
    """whether it has a privacy budget (`budget_on`), which is valid only if the seed is secret"""
    proves: ClassVar[bool] = False
    """whether it is a certified training, whose checkpoint is chosen by certified accuracy"""
    # settings of some recipes
    control: str = ""
    """network with which `follow_up` compares, as in `clean.pt,arch=net.py:make`; empty for none"""
    teacher: str = ""
    """network whose predictions are learned, as in `robust.safetensors,arch=net.py:make`; empty for none"""
    opened: Classifier | None = None
    """the opened teacher; None before it is opened"""

    @property
    def threat_of_training_set(self) -> str | None:
        """Threat of the assessments if no other is given, of a recipe whose certificate needs that a training example
        influences only its part of the training set; None for other recipes. The held-out examples of such a recipe
        are chosen by their content, and choose no checkpoint.
        """
        return None

    @property
    def further_norms(self) -> tuple[Constraint, ...]:
        """Norms for which it trains, beside that of the threat model."""
        return ()

    @property
    def starts_anew(self) -> bool:
        """Whether the training starts with other weights than the given ones."""
        return False

    @property
    def most_passes(self) -> float:
        """Number of forward passes of each training example after which the training ends; 0 for no limit."""
        return 0.0

    def taught_by(self, teacher: Classifier) -> Self:
        """Return the same recipe with the opened teacher."""
        return self

    def network(self, model: Classifier) -> Classifier:
        """Return the model into which the checkpoints are loaded, which is a copy of the given one here."""
        return deepcopy(model)

    def denoiser(self, model: Classifier, shape: tuple[int, ...]) -> dict[str, int] | None:
        """Return the sizes of the denoiser that is put in front of a model for inputs of this shape before it is
        trained; None for none.
        """
        return None

    def further_examples(self, model: Classifier) -> Batch | None:
        """Return the examples of a file of the user, which must not contain test examples; None without a file."""
        return None

    def budget_on(self, fingerprints: Sequence[bytes]) -> RowBudget | None:
        """Return the privacy budget of a training on rows with these hashes of their inputs, which is stated before the
        training and goes into the card; None for a recipe that is not `private`.
        """
        return None

    def follow_up(self, finished: Finished) -> tuple[dict[str, Any], str] | None:
        """Return the entry `follow_up` of the card with what is measured after the training, and a sentence on it. No
        network is changed. None for no entry.
        """
        return None


def facts_of(recipe: Recipe) -> RecipeFacts:
    """Return what a recipe declares; a recipe that declares nothing is like most recipes."""
    return recipe if isinstance(recipe, RecipeFacts) else RecipeFacts()


def trained_as(recipe: Recipe, how: Training) -> Recipe:
    """Return the same recipe with other settings of the training loop."""
    settings: Any = recipe  # every recipe is a dataclass
    changed: Recipe = replace(settings, training=how)
    return changed


class LossRecipe(RecipeFacts):
    """Recipe that trains with the common loop. A subclass is a frozen dataclass with a field `training`. It overrides
    `inner`, `loss`, or both, and `prepared` if it keeps tensors or needs more than a batch.

    The class variables declare properties of the loss. The settings of `training` that need a property which is not
    declared are refused.
    """

    training: Training
    linear_in_labels: ClassVar[bool] = False
    """whether the loss is linear in the labels (up to terms without a gradient), so that labels can be mixed"""
    differentiated_twice: ClassVar[bool] = False
    """whether the loss contains a gradient, so that a pass is differentiated twice"""
    weights_classes: ClassVar[bool] = False
    """whether `Learner.mean` or `Learner.mean_cross_entropy` averages the losses, with the weights of the classes"""

    uses_unlabelled: ClassVar[bool] = False
    """whether it learns from examples without labels"""
    in_one_process: ClassVar[bool] = False
    """whether it must train in one process, for example because it stores data of all examples"""
    sets_gradients: ClassVar[bool] = False
    """whether `loss` sets the gradients itself; each example is then in a batch with the same probability"""

    def __call__(
        self,
        model: Classifier,
        data: TrainingData,
        threat: ThreatModel,
        *,
        rng: Draws,
        after: Checkpoint | None = None,
    ) -> Iterator[Checkpoint]:
        return trained(self.loop(model, data, threat, rng=rng, after=after))

    def loop(
        self,
        model: Classifier,
        data: TrainingData,
        threat: ThreatModel,
        *,
        rng: Draws,
        after: Checkpoint | None = None,
    ) -> Loop:
        """Return a training with this recipe. Raises `UsageError` if the recipe does not support it."""
        self.check(threat)
        loop = Loop(
            model,
            data,
            threat,
            self.training,
            rng,
            after,
            self.inner,
            self.loss,
            linear_in_labels=self.linear_in_labels,
            differentiated_twice=self.differentiated_twice,
            weights_classes=self.weights_classes,
            uses_unlabelled=self.uses_unlabelled,
            in_one_process=self.in_one_process,
            sets_gradients=self.sets_gradients,
        )
        return self.prepared(loop)

    def prepared(self, loop: Loop) -> Loop:
        """Return a training with what this recipe adds to it, such as tensors that it keeps from one update to the
        next. Raises `UsageError` if the recipe does not support its settings or its examples.
        """
        return loop

    def check(self, threat: ThreatModel) -> None:
        """Raise `UsageError` if the recipe cannot train under a threat model with its settings."""

    def inner(self, learner: Learner, batch: Batch, update: Update) -> Inputs:
        """Return the inputs on which a batch is trained, which are the clean ones here."""
        return clean_inputs(learner, batch, update)

    def loss(self, learner: Learner, batch: Batch, x_adv: Inputs) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a batch with the training inputs `x_adv`, and the number of correct examples."""
        return adversarial_cross_entropy(learner, batch, x_adv)
