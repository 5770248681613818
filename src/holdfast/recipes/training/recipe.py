"""Protocol of recipes. A recipe is an object with settings, which trains a copy of a model and yields checkpoints when
it is called.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from holdfast.core.batch import Batch, TrainingData
from holdfast.core.checkpoint import Checkpoint
from holdfast.core.draws import Draws
from holdfast.core.goal import Goal
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.recipes.training.fit import Training
from holdfast.statistics.group_privacy import RowBudget


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


@runtime_checkable
class WithGoal(Protocol):
    """Protocol of a recipe that has another goal than a higher robust accuracy."""

    @property
    def goal(self) -> Goal:
        """Metric by which the new model is compared with the given one."""


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


@runtime_checkable
class WithFurtherExamples(Protocol):
    """Protocol of a recipe that reads further examples from a file of the user, which must not contain test
    examples.
    """

    def further_examples(self, model: Classifier) -> Batch | None:
        """Return these examples, read for a model; None if no file is given."""


@runtime_checkable
class WithControl(Protocol):
    """Protocol of a recipe whose follow-up may compare the new model with another network."""

    @property
    def control(self) -> str:
        """Network for comparison, as in `clean.pt,arch=net.py:make`; empty for none."""


@runtime_checkable
class WithFollowUp(Protocol):
    """Protocol of a recipe that measures more after its training, which the card of the new model states."""

    def follow_up(self, finished: Finished) -> tuple[dict[str, Any], str]:
        """Return the entry `follow_up` of the card, and a sentence on it. No network is changed."""


@runtime_checkable
class WithTeacher(Protocol):
    """Protocol of a recipe that trains on the predictions of another network."""

    @property
    def teacher(self) -> str:
        """The other network, as in `robust.safetensors,arch=net.py:make`; empty for none."""

    def taught_by(self, teacher: Classifier) -> Recipe:
        """Return the same recipe with the opened network."""


def goal_of(recipe: Recipe) -> Goal:
    """Return the goal of a recipe, which is a higher robust accuracy if the recipe declares no other."""
    return recipe.goal if isinstance(recipe, WithGoal) else Goal()


@runtime_checkable
class WithOwnState(Protocol):
    """Protocol of a recipe whose weights are only of use with other tensors of its checkpoints or with further
    examples. `rotate` refuses it, because the sets of a pool contain weights only.
    """

    keeps_state: ClassVar[bool]


@runtime_checkable
class WithNetwork(Protocol):
    """Protocol of a recipe whose new model has another network than the given one."""

    def network(self, model: Classifier) -> Classifier:
        """Return the untrained new model, whose weights the checkpoints of the recipe contain."""


def untrained(recipe: Recipe, model: Classifier) -> Classifier:
    """Return the model into which the checkpoints of a recipe are loaded: a copy of the given one, if the recipe
    declares no other.
    """
    return recipe.network(model) if isinstance(recipe, WithNetwork) else deepcopy(model)


@runtime_checkable
class WithRowBudget(Protocol):
    """Protocol of a recipe with a privacy budget."""

    def budget_on(self, fingerprints: Sequence[bytes]) -> RowBudget:
        """Return the budget of a training on rows with these hashes of their inputs. It goes into the card, and is
        stated before the training.
        """


@runtime_checkable
class OnParts(Protocol):
    """Protocol of a recipe whose certificate needs that a training example influences only its part of the training
    set. The held-out examples are then chosen by their content, and choose no checkpoint.
    """

    @property
    def threat(self) -> str:
        """Threat of the assessments if no other is given."""


def trained_as(recipe: Recipe, how: Training) -> Recipe:
    """Return the same recipe with other settings of the training loop."""
    settings: Any = recipe  # every recipe is a dataclass
    changed: Recipe = replace(settings, training=how)
    return changed
