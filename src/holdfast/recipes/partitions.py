"""Partitions: an ensemble whose members are trained on disjoint parts of the training set, so that each training
example influences one vote.

Levine & Feizi, "Deep Partition Aggregation: Provable Defense against General Poisoning Attacks", ICLR 2021,
arXiv:2006.14768. Differs from the paper: the part of an example depends on its input and not on its label, so that a
changed label counts once; the examples of a part are sorted by their inputs and labels, so that the order of the rows
has no effect; all members start from weights that their seeds determine.

A member is a function of its part, the seed and its number. Therefore the members are trained one after another: in one
batch, the rounding errors of a member could depend on the size of another part.
"""

import hashlib
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor, nn

from holdfast.core.batch import UNLABELLED, Batch, TrainingData
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.estimate import Goal
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.training import AVERAGE, STATE, WEIGHTS, Checkpoint, without_prefix
from holdfast.core.types import Rows
from holdfast.io.data.streamed import Streamed
from holdfast.io.models.composed import Ensemble
from holdfast.recipes.standard import Standard
from holdfast.recipes.training.fit import Training, drawing
from holdfast.recipes.training.learner import trained
from holdfast.recipes.training.recipe import RecipeFacts

_MEASURED = STATE + "measured"
"""loss, number of correct examples and forward passes of each trained member"""


@dataclass(frozen=True)
class Partitions(RecipeFacts):
    """Divides the training set into parts by the content of each example, and trains one member on each part. The new
    model predicts the class with the most votes, which few added or removed examples provably do not change.
    """

    partitions: Annotated[int, Ge(2)] = 100
    """number of parts, which is that of the members; more parts are certified against more changes, and each member is
    less accurate"""
    training: Training = field(
        default_factory=lambda: Training(epochs=12, batch=32, weight_decay=0.01, averaging="none")
    )

    goal: ClassVar[Goal] = Goal("certified_accuracy")
    new_network: ClassVar[bool] = True

    @property
    def threat_of_training_set(self) -> str:
        """Threat of the assessments if no other is given: changes of a fifth as many examples as there are parts."""
        return f"training-set:{max(self.partitions // 5, 1)}"

    def network(self, model: Classifier) -> Classifier:
        """Return the untrained ensemble of networks like that of a model."""
        new = deepcopy(model)
        assert isinstance(new.net, nn.Module)  # other models are not trained
        members = [deepcopy(new.net) for _ in range(self.partitions)]
        new.net = Ensemble(members, output=model.output, partitioned=True).eval()
        new.net.declare(new)
        return new

    def __call__(
        self,
        model: Classifier,
        data: TrainingData,
        threat: ThreatModel,
        *,
        rng: Draws,
        after: Checkpoint | None = None,
    ) -> Iterator[Checkpoint]:
        if self.training.pacing is not None:
            raise UsageError(
                "the members of partitions are functions of the training set, and a budget of time is given, which "
                "would change them; leave the budget out, and set recipe.training.epochs"
            )
        if isinstance(data, Streamed) and data.changing is not None:
            raise UsageError(
                f"training example {data.changing} differs between two readings, and partitions assigns each example "
                "to a part by its content; give examples that do not change, and recipe.training.augment"
            )
        if model.rejects or model.input_name is not None:
            raise UsageError(
                "the members of an ensemble are called with inputs alone and return classes, and this model "
                + (
                    "has a detector that rejects inputs"
                    if model.rejects
                    else f"names them {model.input_name}"
                )
                + "; give a network from inputs to logits"
            )
        if (data.y == UNLABELLED).any():
            raise UsageError("training examples without labels are given, and partitions uses labels only")
        parts, training_set = parts_of(data, self.partitions)
        self._member(model, data, parts, max(range(len(parts)), key=lambda k: len(parts[k])), threat, rng)
        return self._trained(model, data, parts, training_set, threat, rng, after)

    def _trained(
        self,
        model: Classifier,
        data: TrainingData,
        parts: list[Rows],
        training_set: Tensor,
        threat: ThreatModel,
        rng: Draws,
        after: Checkpoint | None,
    ) -> Iterator[Checkpoint]:
        """Train the members that the checkpoint `after` does not contain, and yield one checkpoint at the end. No other
        is evaluated, because a choice among several would depend on examples of all parts.
        """
        tensors = dict(after.tensors) if after is not None else {}
        tensors[WEIGHTS + "net.training_set"] = training_set.to(data.ids.device)
        measured = tensors.setdefault(_MEASURED, torch.zeros(0, 3, dtype=torch.float64))
        epochs, saving = self.training.epochs, self.training.saving
        done = 0 if after is None else after.step
        for number in range(len(measured), len(parts)):
            epochs_of_member = [*self._member(model, data, parts, number, threat, rng)]
            last = epochs_of_member[-1] if epochs_of_member else None
            weights = _of_member(model, last, rng.at("member", number))
            tensors |= {f"{WEIGHTS}net.members.{number}.{name}": value for name, value in weights.items()}
            row = _totals(epochs_of_member, len(parts[number]))
            measured = tensors[_MEASURED] = torch.cat((measured, row[None]))
            before, done = done, done + (0 if last is None else last.updates)
            if saving is not None and done // saving.every > before // saving.every:
                share = (number + 1) / len(parts)
                saving.save(Checkpoint(0, epochs, dict(tensors), {}, share, done, step=done))
        loss, right, forwards = (float(total) for total in measured.sum(0))
        shares = {"loss": loss / len(parts), "accuracy": right / len(data), "forwards": forwards / len(data)}
        yield Checkpoint(epochs, epochs, tensors, {**shares, "lr": 0.0, "dearer": 1.0}, updates=done)

    def _member(
        self,
        model: Classifier,
        data: TrainingData,
        parts: list[Rows],
        number: int,
        threat: ThreatModel,
        rng: Draws,
    ) -> Iterator[Checkpoint]:
        """Return the checkpoints of the training of a member, which are none for an empty part. Its random numbers and
        the ids of its examples depend on its number and its part only.
        """
        rows, own = parts[number], rng.at("member", number)
        if not len(rows):
            return iter(())
        taken = data.take(rows)
        part = Batch(taken.x, taken.y, torch.arange(len(taken), device=taken.ids.device))
        settings = replace(self.training, saving=None)
        start = restarted(model, own)
        loop = Standard(training=settings).loop(start, part, threat, rng=own)
        return trained(replace(loop, in_one_process=True, weights_classes=False))


def parts_of(data: TrainingData, partitions: int) -> tuple[list[Rows], Tensor]:
    """Return the rows of the examples of each part, in the order of their inputs and labels, and the SHA-256 of the
    training set in this order as 32 numbers.

    The part of an example is the hash of its input modulo the number of parts. Equal inputs have the same part.
    """
    keys = list(zip(data.fingerprints(), data.y.tolist(), strict=True))
    order = sorted(range(len(keys)), key=keys.__getitem__)
    members: list[list[int]] = [[] for _ in range(partitions)]
    sha = hashlib.sha256()
    for row in order:
        name, label = keys[row]
        members[int.from_bytes(name[:8], "big") % partitions].append(row)
        sha.update(name + label.to_bytes(8, "big"))
    device = data.ids.device
    rows = [torch.tensor(part, dtype=torch.int64, device=device) for part in members]
    return rows, torch.frombuffer(bytearray(sha.digest()), dtype=torch.uint8)


def restarted(model: Classifier, rng: Draws) -> Classifier:
    """Return a copy of a model with new random weights, so that it contains nothing that the given one has learned.

    Raises `TargetError` for a module with parameters that has no function `reset_parameters`.
    """
    new = deepcopy(model)
    with drawing(rng.at("start"), next(new.parameters()).device):
        for name, module in new.named_modules():
            reset = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
            if reset is not None:
                reset()
            elif any(True for _ in module.parameters(recurse=False)):
                raise TargetError(
                    f"{name.removeprefix('net.') or 'the network'} is {type(module).__name__} with parameters and "
                    "without a method reset_parameters, and partitions trains members from new random weights; define "
                    "the method"
                )
    return new


def _of_member(model: Classifier, last: Checkpoint | None, rng: Draws) -> dict[str, Tensor]:
    """The tensors of the network of a member. One with an empty part keeps its random weights."""
    if last is None:
        return without_prefix(restarted(model, rng).state_dict(), "net.")
    weights = without_prefix(last.tensors, AVERAGE if last.averaged else WEIGHTS)
    return without_prefix(weights, "net.")


def _totals(checkpoints: list[Checkpoint], n: int) -> Tensor:
    """The last loss of a member, and its numbers of correct examples and of forward passes, for a part of `n`
    examples.
    """
    if not checkpoints:
        return torch.zeros(3, dtype=torch.float64)
    last, forwards = checkpoints[-1].measured, sum(each.measured["forwards"] for each in checkpoints)
    return torch.tensor([last["loss"], n * last["accuracy"], n * forwards], dtype=torch.float64)
