"""Separates held-out examples, on which the best checkpoint is chosen, and removes test examples from the training
examples.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.attacks.parts.losses import margin
from holdfast.attacks.protocol import attacked_inputs
from holdfast.attacks.suites import attack_on_held_out
from holdfast.core.batch import UNLABELLED, Batch, Data, TrainingData
from holdfast.core.draws import Draws
from holdfast.core.errors import OTHER_EXAMPLES, Remedy, TargetError, UsageError
from holdfast.core.meter import PIECE, results_in_pieces
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.recipes.training.fit import drawing
from holdfast.recipes.training.recipe import Recipe, facts_of

D = TypeVar("D", bound=TrainingData)
_HELD_OUT, _LEAST_HELD_OUT = 1_000, 50  # usual and smallest number of held-out examples
_EVERY = 10  # at most one training example of this many is held out
_ONE_OF = 64  # by content, one training example of this many is held out on average
_PIECE_VALUES = 1 << 22  # largest number of values of the inputs that are attacked at once in an evaluation
_TRACED = 8  # examples on which the graph of operations is compared with the model
_HARMLESS = 0.001  # size of the threat model in multiples of eps
_NAMED = 3  # duplicates that a message names


@dataclass(frozen=True)
class TrainingExamples:
    """The training examples of a hardening, and the held-out examples on which the best checkpoint is chosen."""

    rest: TrainingData
    held_out: Batch
    digest: str
    """SHA-256 over all training and held-out examples, in hex"""
    notes: tuple[str, ...]
    """notes on which examples were left out of the training, and why"""


def examples_of(
    data: TrainingData, excluded: Data, seed: int, classes: int, *, by_content: bool = False
) -> TrainingExamples:
    """Split `data` into training examples and held-out examples, after removing all inputs that also occur in
    `excluded`.

    `excluded` contains the test examples. With `by_content`, each example is held out or not by its input alone. Raises
    an error if a class has no training example left.
    """
    refuse_missing_classes(data, classes)
    fresh, judged = without_judged(data, excluded)
    rest, held = split_by_content(fresh) if by_content else split_of(fresh, seed)
    rest, chosen_by = without_held(rest, held)
    notes = tuple(note for note in (judged, chosen_by) if note)
    if notes:
        refuse_missing_classes(rest, classes, after="; ".join(notes))
    return TrainingExamples(rest, held, digest_of(fresh), notes)


def split_of(data: D, seed: int, *, most: int = _HELD_OUT, every: int = _EVERY) -> tuple[D, Batch]:
    """Split labelled examples into training examples and held-out examples at random. The split is determined by the
    seed.

    At least one example of each class stays in the training examples. At most `most` examples are held out, and at most
    one in `every`. Raises `UsageError` if fewer than 50 would be held out.
    """
    labelled = data.y != UNLABELLED
    order = Draws(seed).at("held out").bits(data.ids).argsort()
    order = order[labelled[order]]
    last_of_class = {label: place for place, label in enumerate(data.y[order].tolist())}
    can_be_held_out = torch.ones_like(order, dtype=torch.bool)
    can_be_held_out[list(last_of_class.values())] = False
    n = min(most, len(order) // every, int(can_be_held_out.sum()))
    if n < _LEAST_HELD_OUT:
        raise UsageError(
            f"{len(order)} training examples leave {n} held-out examples; at least "
            f"{_LEAST_HELD_OUT * every} training examples are needed",
            replace(OTHER_EXAMPLES, reason="for more examples"),
        )
    held_out = torch.zeros_like(labelled)
    held_out[order[can_be_held_out][:n]] = True
    return data.subset(~held_out), data.take(held_out)


def split_by_content(data: D) -> tuple[D, Batch]:
    """Split examples into training examples and held-out examples by hashes of their inputs, so that an added or
    removed example changes neither the other training examples nor the other held-out ones.

    Raises `UsageError` if none would be held out.
    """
    names = data.fingerprints()
    held_out = torch.tensor([int.from_bytes(name[-8:], "big") % _ONE_OF == 0 for name in names])
    if not held_out.any():
        raise UsageError(
            f"of {len(data)} training examples none is held out, which one in {_ONE_OF} is on average",
            replace(OTHER_EXAMPLES, reason="for more examples"),
        )
    held_out = held_out.to(data.ids.device)
    return data.subset(~held_out), data.take(held_out)


def held_out_accuracies(model: Classifier, held_out: Batch, threat: ThreatModel) -> tuple[float, float]:
    """Return the clean accuracy of a model on the held-out examples, and its accuracy under the short attack that
    compares checkpoints.
    """
    shares = held_out_shares(model, held_out, threat)
    return shares.clean, shares.robust


@dataclass(frozen=True)
class HeldOutShares:
    """Shares of the held-out examples."""

    clean: float
    """clean accuracy"""
    robust: float
    """accuracy under the short attack that compares checkpoints"""
    most_predicted: float
    """share for which the model predicts the class that it predicts most often"""
    class_share: float
    """share whose label is that class"""


def held_out_shares(model: Classifier, held_out: Batch, threat: ThreatModel) -> HeldOutShares:
    """Return the accuracies of `held_out_accuracies`, and the shares of the class that the model predicts most
    often.
    """
    mode, attack = model.training, attack_on_held_out(threat.constraint)
    model.eval()

    def counts(part: Batch) -> tuple[int, int, Tensor]:
        with torch.no_grad():
            logits = model(part.x)
        correct = margin(logits, part) > 0
        correct_examples, n_robust = part.take(correct), 0
        if not threat.constraint.changes_inputs:
            n_robust = len(correct_examples)
        elif len(correct_examples):
            x_adv = attacked_inputs(attack, model, correct_examples, threat, rng=Draws(0).at("look"))
            with torch.no_grad():
                n_robust = int((margin(model(x_adv), correct_examples) > 0).sum())
        return int(correct.sum()), n_robust, logits.argmax(1).bincount(minlength=logits.shape[1])

    with drawing(Draws(0).at("look"), held_out.x.device):
        size = max(min(PIECE, _PIECE_VALUES // math.prod(held_out.example_shape)), 1)
        right, n_robust, predicted = zip(*results_in_pieces(held_out, counts, size), strict=True)
    model.train(mode)
    most, label = torch.stack(predicted).sum(0).max(0)
    counted = sum(right), sum(n_robust), int(most), int((held_out.y == label).sum())
    return HeldOutShares(*(count / len(held_out) for count in counted))


def proved_accuracy(
    model: Classifier, held_out: Batch, threat: ThreatModel, recipes: Sequence[Recipe]
) -> float | None:
    """Return the share of the held-out examples for which CROWN-IBP proves that no input of the threat model is
    misclassified; None if none of the recipes is a certified training.
    """
    if not any(facts_of(recipe).proves for recipe in recipes):
        return None
    from holdfast.certifiers.provers import CrownIBP  # late, as few trainings are certified

    mode = model.training
    prover = CrownIBP().ready(model.eval(), held_out.take(torch.arange(min(_TRACED, len(held_out)))), threat)
    certified = results_in_pieces(held_out, lambda part: int(prover(part).certified.sum()))
    model.train(mode)
    return sum(certified) / len(held_out)


def harmless(threat: ThreatModel) -> ThreatModel:
    """Return the threat model with an eps so small that attacks break no example. It is used to measure how long
    attacks take.

    Attacks then take as many passes as on a robust model. Eps is not zero, because a projection would then do less
    work.
    """
    constraint = threat.constraint
    return replace(threat, constraint=constraint.resized(_HARMLESS * constraint.eps))


def without_judged(data: D, test: Data) -> tuple[D, str]:
    """Remove the test examples from the training examples. Return the remaining ones, and a note on the number of
    duplicates.

    Inputs are duplicates if all values are equal. Raises `UsageError` if no example is left.
    """
    if isinstance(data, Batch):
        data = replace(data, x=_of_width(data, test.read(0, 1)))
    fresh, duplicates = _without_test(data, test)
    if not duplicates:
        return data, ""
    pairs = ", ".join(f"{row} is test example {test_id}" for row, test_id in duplicates[:_NAMED])
    more = f" and {len(duplicates) - _NAMED:,} more" if len(duplicates) > _NAMED else ""
    note = (
        f"{len(duplicates):,} of {len(data):,} training examples are also test examples: training example "
        f"{pairs}{more}"
    )
    if not len(fresh):
        raise UsageError(f"{note}; give other test examples, or other training examples", OTHER_EXAMPLES)
    return fresh, f"{note}; they are not used for the training"


def _without_test(data: D, test: Data) -> tuple[D, list[tuple[int, int]]]:
    """The examples that are no test examples, and the ids of the others with the ids of their duplicates."""
    judged: dict[bytes, int] = {}
    for begin in range(0, len(test), 1_000):
        part = test.read(begin, min(begin + 1_000, len(test)))
        if isinstance(data, Batch):
            part = replace(part, x=_of_width(part, data))
        judged |= dict(zip(part.fingerprints(), part.ids.tolist(), strict=True))
    return _without_duplicates(data, judged)


def refuse_judged(examples: Batch, test: Data, held: Batch) -> None:
    """Raise `UsageError` if generated examples of the user contain test examples, or held-out examples, which choose
    the checkpoint: the new model would be trained on what it is judged on.
    """
    found = {"test": _without_test(examples, test)[1]}
    chosen_by = dict(zip(held.fingerprints(), held.ids.tolist(), strict=True))
    found["held-out"] = _without_duplicates(examples, chosen_by)[1]
    for kind, duplicates in found.items():
        if duplicates:
            raise UsageError(
                f"{len(duplicates):,} of {len(examples):,} generated examples are also {kind} examples: generated "
                f"example {duplicates[0][0]} is {kind} example {duplicates[0][1]}; remove them from the file, or train "
                "without it",
                Remedy("recipe.samples"),
            )


def _of_width(batch: Batch, other: Batch) -> Tensor:
    """Return the inputs of a batch. Rows are padded with zeros to the width of others, because texts of two data sets
    may have other numbers of values, and equal texts must have equal rows.
    """
    missing = other.x.shape[-1] - batch.x.shape[-1]
    return F.pad(batch.x, (0, missing)) if batch.x.dim() == 2 and missing > 0 else batch.x


def without_held(rest: D, held: Batch) -> tuple[D, str]:
    """Remove the training examples that are equal to a held-out example. Return the remaining ones, and a note on the
    number of duplicates.

    Raises `UsageError` if no example is left.
    """
    fresh, duplicates = _without_duplicates(
        rest, dict(zip(held.fingerprints(), held.ids.tolist(), strict=True))
    )
    if not duplicates:
        return rest, ""
    note = f"{len(duplicates):,} training examples equal one of the {len(held):,} that choose the checkpoint"
    if not len(fresh):
        raise UsageError(f"all {note}, so no training example is left", OTHER_EXAMPLES)
    return fresh, f"{note}; they are not used for the training"


def _without_duplicates(data: D, others: Mapping[bytes, int]) -> tuple[D, list[tuple[int, int]]]:
    """The examples whose inputs are not in `others`, and the ids of the others with the ids of their duplicates."""
    names = data.fingerprints()
    fresh = torch.tensor([name not in others for name in names], device=data.ids.device)
    rows = zip(data.ids.tolist(), names, strict=True)
    return data.subset(fresh), [(row, others[name]) for row, name in rows if name in others]


def digest_of(data: TrainingData) -> str:
    """Return the SHA-256 of the hashes of the inputs and of the labels of training examples, in hex."""
    sha = hashlib.sha256(b"".join(data.fingerprints()))
    sha.update(data.y.cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def refuse_missing_classes(data: TrainingData, classes: int, *, after: str = "") -> None:
    """Raise `TargetError` if the training data have fewer than two classes, or no example of a class of the model.

    `after` is a note for the message on examples that were left out before.
    """
    present = torch.unique(data.y[data.y != UNLABELLED]).tolist()
    prefix = f"{after}; " if after else ""
    if len(present) < 2:
        finding = f"all training labels are {present[0]}" if present else "no training example has a label"
        raise TargetError(
            f"{prefix}{finding}; at least two classes are needed: check the label column",
            OTHER_EXAMPLES,
        )
    missing = sorted(set(range(classes)) - set(present))
    if missing:
        raise TargetError(
            f"{prefix}no training example is of class {', '.join(map(str, missing))}, of the {classes} that the model "
            f"has; add examples, or give a model of {classes - len(missing)} classes"
        )
