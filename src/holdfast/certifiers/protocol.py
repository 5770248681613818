"""Protocol of a prover, which tries to prove for each example that no input of the threat model is misclassified."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import ClassVar, Final, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.model import EVERY, Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Ids, Inputs, Mask

RANDOM = (
    "the outputs of the model are random, and a certificate is about a fixed function; remove the source of "
    "randomness, such as dropout in eval mode"
)
"""Message about a randomised model."""
LOW: Final = "certified_low"
"""name of the lowest possible numbers or logits (n, k) of each example, float64; minus infinity if none was proved"""
HIGH: Final = "certified_high"
"""name of the highest possible numbers or logits (n, k) of each example, float64"""
PIXELS: Final = "certified_pixels"
"""name of the numbers (n, classes) of pixels of each class that are right for every input of the threat model, int64"""


@dataclass(frozen=True)
class Proofs:
    """What a prover proved about the examples of a batch, in the order of the batch."""

    certified: Mask
    """mask of the examples for which it is proved that every input of the threat model is classified correctly"""
    bound: Tensor
    """proved lower bound of the smallest margin over all inputs of the threat model, (n,) float64; minus infinity if
    nothing was proved"""
    work: Tensor
    """number of boxes (subproblems) whose bounds were computed for each example, (n,) int64"""
    stopped: Mask
    """mask of the examples for which the time limit ended the search, so that another run may prove more"""
    x_adv: Inputs
    """for each example an input of the threat model that is misclassified if `broken`, otherwise the clean input"""
    broken: Mask
    """mask of the examples for which a misclassified input was found. The caller judges it on the original model"""
    radius: Tensor | None = None
    """proved radius in the norm of the threat model, (n,) float64; None for eps where certified and 0 elsewhere"""
    abstained: Mask | None = None
    """mask of the examples whose prediction a statistical method could not determine; None for no example"""
    undefined: Mapping[int, str] = field(default_factory=dict)
    """first operation whose domain the bounds leave, such as a logarithm, with its place in the user's code, by the id
    of the example"""
    of_task: Mapping[str, Tensor] = field(default_factory=dict)
    """what is proved about the outputs of a model with another task than classes, by name: `LOW`, `HIGH`, `PIXELS`"""

    @staticmethod
    def none(batch: Batch) -> "Proofs":
        """Return the proofs of a batch about which nothing was proved."""
        no = torch.zeros_like(batch.ids, dtype=torch.bool)
        unproved = torch.full(no.shape, -torch.inf, dtype=torch.float64, device=no.device)
        return Proofs(no, unproved, torch.zeros_like(batch.ids), no, batch.x, no)

    @staticmethod
    def joined(parts: "Sequence[Proofs]") -> "Proofs":
        """Return the proofs of several batches as those of one."""
        values = {each.name: [getattr(part, each.name) for part in parts] for each in fields(Proofs)}
        of_task = [part for part in values.pop("of_task") if part]  # a batch without examples has none
        names = of_task[0] if of_task else {}
        undefined = {id_: text for part in values.pop("undefined") for id_, text in part.items()}
        # a method sets the last two columns for every batch or for none
        return Proofs(
            **{name: torch.cat(of_parts) for name, of_parts in values.items() if of_parts[0] is not None},
            undefined=undefined,
            of_task={name: torch.cat([part[name] for part in of_task]) for name in names},
        )


class ReadyProver(Protocol):
    """Protocol of a prover that was prepared for a model and a threat model."""

    def __call__(self, batch: Batch) -> Proofs:
        """Return what can be proved about the examples of a batch, which the model classifies correctly."""


class Prover(Protocol):
    """Protocol of a method of certification with its settings: a frozen dataclass that can be pickled."""

    name: ClassVar[str]
    """name of the method on the command line, such as `crown`"""

    def ready(self, model: Classifier, sample: Batch, threat: ThreatModel) -> ReadyProver:
        """Prepare the method for a frozen model in evaluation mode, by tracing its operations on `sample`.

        Raises `UsageError` with the operation and its place in the user's code if the model contains an operation
        without sound bounds, and for a threat model that the method does not support.
        """


@runtime_checkable
class RadiusProver(Prover, Protocol):
    """Protocol of a method that proves a radius for each example, which is in `Proofs.radius`."""

    radii: ClassVar[bool]
    """always true; it distinguishes such methods"""


@runtime_checkable
class StatisticalProver(Prover, Protocol):
    """Protocol of a method that certifies another model than the given one: the smoothed classifier, which predicts the
    most frequent class under random changes of the input. Its verdicts have a failure probability.
    """

    @property
    def draws(self) -> int:
        """Largest number of changed copies of an example that are classified."""

    @property
    def failure_probability(self) -> float:
        """Probability, for each example, of a verdict that is wrong."""

    @property
    def seed(self) -> int:
        """Seed of the changes."""

    @property
    def parameters(self) -> Mapping[str, float | str | bool]:
        """Settings that define the smoothed classifier, by their names."""

    @property
    def short(self) -> str:
        """The most important of these settings, for the name of the smoothed classifier."""

    @property
    def change(self) -> str:
        """The random change, as a noun for the report."""

    @property
    def place(self) -> str:
        """Name of the random draws of the method."""

    def votes(self, model: Classifier, x: Inputs, ids: Ids, draws: range, *, rng: Draws) -> Tensor:
        """Return how often each class is predicted for changed copies of each input, (n, classes + 1) int64; the last
        column counts copies without a prediction. The changes are a function of `rng`, the ids and the numbers of the
        draws.
        """

    def network(self, base: Classifier, draws: int) -> Classifier:
        """Return the model that attacks on the smoothed classifier query, with a number of fixed draws."""


def on_top_of(base: Classifier, net: nn.Module) -> Classifier:
    """Return a network that evaluates a base classifier, as a model with its bounds and its names."""
    model = Classifier(net, bounds=base.bounds, access=base.access, batches=EVERY)
    model.class_labels, model.class_names = base.class_labels, base.class_names
    model.feature_names, model.hides = base.feature_names, base.hides
    return model
