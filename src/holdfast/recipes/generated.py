"""Adversarial training on real and generated images: a class-conditional GAN is trained on the training examples, and
its samples, filtered by a classifier, replace a part of each batch.

Gowal et al., "Improving Robustness using Generated Data", NeurIPS 2021, arXiv:2110.09468; Wang et al., "Better
Diffusion Models Further Improve Adversarial Training", ICML 2023, arXiv:2302.04638, for the ratio of 0.3 real to 0.7
generated images. Differs from the papers: the generator is small and is trained within the budget of the training,
while the network is trained on real images; every batch has new samples in place of a fixed set of millions; a sample
replaces a real image of its class, so that the classes keep their shares, and a rejected one leaves the image in place.
"""

from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from holdfast.core.batch import UNLABELLED, Batch, TrainingData
from holdfast.core.draws import Draws
from holdfast.core.errors import Remedy, TargetError, UsageError
from holdfast.core.model import Classifier
from holdfast.core.types import Fraction, Inputs, NonNegative, Positive, Steps
from holdfast.io.data.layouts import Ranges
from holdfast.recipes.trades import TRADES
from holdfast.recipes.training.fit import Training, Update
from holdfast.recipes.training.gans import GAN
from holdfast.recipes.training.learner import Learner, Loop, adversarial_cross_entropy
from holdfast.recipes.training.losses import kullback_leibler
from holdfast.recipes.training.recipe import Finished, LossRecipe
from holdfast.statistics.repeats import copy_threshold, nearest_example

COMPARED = 500
"""largest number of generated examples, and of test examples, whose nearest training example is searched"""
_PIECE = 1_000  # training examples that are compared at once


def copies(generated: Batch, test: Batch, data: TrainingData, rng: Draws) -> dict[str, Any]:
    """Return the distances (L2) from generated examples to the nearest training example, beside those from test
    examples: both medians, and the share of the generated examples that are nearer than 99 % of every second
    test example, which an audit of a generator counts as copies.
    """
    sides = [_drawn(batch, rng) for batch in (generated, test)]
    both = torch.cat([side.x.flatten(1).float() for side in sides])
    nearest = both.new_full((len(both),), torch.inf)
    rows = torch.split(torch.arange(len(data), device=data.ids.device), _PIECE)
    with data.reading(rows, rng.at("reading")) as parts:
        for part in parts:
            distances, _ = nearest_example(both, part.x.to(both))
            nearest = torch.minimum(nearest, distances)
    own, others = nearest[: len(sides[0])], nearest[len(sides[0]) :]
    return {
        "generated": len(own),
        "test": len(others),
        "median_generated": float(own.median()),
        "median_test": float(others.median()),
        "nearer": float((own < copy_threshold(others)).double().mean()),
    }


def _drawn(batch: Batch, rng: Draws) -> Batch:
    order: Tensor = rng.at("compared").bits(batch.ids).argsort()
    return batch.take(order[:COMPARED])


def sentence_on_copies(found: dict[str, Any]) -> str:
    """Return a sentence on the distances of `copies`, without a full stop."""
    return (
        f"the median distance to the nearest training example is {found['median_generated']:.3g} for "
        f"{found['generated']:,} generated images and {found['median_test']:.3g} for {found['test']:,} test examples; "
        f"{100 * found['nearer']:.1f} % of the generated images are nearer than 99 % of every second test example"
    )


_COMPARED = 1000  # training examples whose range of values is compared


@dataclass(frozen=True)
class FileSamples:
    """Generated images from a file, of which one of the class of each example is drawn at random."""

    images: Batch
    order: Tensor
    """rows of the images, sorted by class"""
    ends: Tensor
    """number of images of all classes up to each class"""

    @classmethod
    def of(cls, images: Batch, data: TrainingData) -> "FileSamples":
        """Return the images on the device of the training data. Raises `UsageError` for images of another shape or
        range of values, or if a class of the data has none.
        """
        if images.example_shape != data.example_shape:
            raise UsageError(
                f"the generated images have shape {images.example_shape}, and the training examples "
                f"{data.example_shape}; give images of the same shape"
            )
        ranges = Ranges.of(images.x, data.first(_COMPARED).x)
        ranges.refuse("the generated images have", "the training examples have")
        missing = sorted(set(data.y[data.y != UNLABELLED].tolist()) - set(images.y.tolist()))
        if missing:
            raise UsageError(
                f"no generated image is of class {', '.join(map(str, missing))}, which the training examples have; "
                "give images of all classes"
            )
        images = images.to(data.ids.device)
        return cls(
            images,
            images.y.argsort(stable=True),
            images.y.bincount(minlength=int(data.y.max()) + 1).cumsum(0),
        )

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that change in training, which are none."""
        return {}

    def accepted(self, batch: Batch, rng: Draws, least: float) -> tuple[Inputs, Tensor]:
        """Return an image of the class of each example, which are all accepted."""
        last = self.ends[batch.y]
        first = torch.where(batch.y > 0, self.ends[(batch.y - 1).clamp(min=0)], 0)
        place = first + (rng.uniform(batch.ids, dtype=torch.float64) * (last - first)).long()
        return self.images.x[self.order[place]], torch.ones_like(batch.y, dtype=torch.bool)


_BETA, _STEPS, _REACH = 6.0, 10, 2.5  # of the recipe trades
_LEAST_OF_TRADES = {"photographs": 30, "others": 60}  # epochs from which the recipe `auto` chooses trades
_JUDGED, _COUNTS = "judged", "counts"  # state: whether the generator was judged; samples accepted and tried
_LEAST_SIDE = 4  # pixels; two convolutions halve an image twice
_TRIED = 4  # samples for each example of a batch by which the generator is judged
_FEW = 0.2  # smallest share of accepted samples of a generator that has not collapsed
_ALIKE = 0.2  # smallest distance of two samples of a class, relative to that of two real images


@dataclass(frozen=True)
class GeneratedData(LossRecipe):
    """Trains on adversarial examples of real images and of samples of a class-conditional GAN, which learns from the
    training examples during the first part of the training.
    """

    share: Fraction = 0.7
    """fraction of the images of a batch that are generated"""
    generator: Fraction = 0.25
    """fraction of the training during which the generator is trained, and the network on real images alone"""
    confidence: Fraction = 0.5
    """smallest probability that a classifier, trained on the real images, gives to the class of an accepted sample"""
    samples: str = ""
    """file `.npz` with generated images `x` and their labels `y`, which are used in place of a generator"""
    method: Literal["auto", "pgd", "trades"] = "auto"
    """loss of the adversarial training: `pgd`, `trades`, or `auto`, which is trades from as many epochs on as
    the recipe auto requires for it (60, or 30 for images of three channels), and else pgd"""
    steps: Steps = 4
    """number of gradient steps of the inner attack of pgd"""
    reach: Positive = 2.0
    """path length of the inner attack, in multiples of eps"""
    clean: NonNegative = 0.25
    """weight of the loss of pgd on clean inputs, relative to that on attacked ones"""
    training: Training = field(default_factory=Training)

    keeps_state: ClassVar[bool] = True

    in_one_process: ClassVar[bool] = True
    weights_classes: ClassVar[bool] = True

    def prepared(self, loop: Loop) -> Loop:
        """Return the training with a source of generated images."""
        data = loop.data
        _refuse_other_inputs(data)
        samples = self.further_examples(loop.model)
        source = _gan(loop.model, data, loop.rng) if samples is None else FileSamples.of(samples, data)
        is_trades = self._is_trades(data)

        def inner(learner: Learner, batch: Batch, update: Update) -> Inputs:
            mixed = batch.at(self._mixed(learner, batch, update, source))
            if is_trades:
                x_adv = learner.most_divergent(
                    mixed, update.rng, kullback_leibler, steps=_STEPS, reach=_REACH
                )
            else:
                x_adv = learner.worst(mixed, update.rng, steps=self.steps, reach=self.reach)
            return torch.cat((x_adv, mixed.x))

        def loss(learner: Learner, batch: Batch, both: Inputs) -> tuple[Tensor, Tensor]:
            x_adv, x = both.chunk(2)
            if is_trades:
                return TRADES(_BETA).loss(learner, batch.at(x), x_adv)
            return adversarial_cross_entropy(learner, batch.at(x), x_adv, clean=self.clean)

        # with a first dimension of 1, so that none is taken for a tensor with a row for each example
        counts = {_JUDGED: data.y.new_zeros(1), _COUNTS: data.y.new_zeros(1, 2)}
        return replace(loop, inner=inner, loss=loss, state={**counts, **source.state()})

    def _is_trades(self, data: TrainingData) -> bool:
        least = _LEAST_OF_TRADES["photographs" if data.example_shape[0] == 3 else "others"]
        return self.method == "trades" or (self.method == "auto" and self.training.epochs >= least)

    def _mixed(self, learner: Learner, batch: Batch, update: Update, source: "GAN | FileSamples") -> Inputs:
        """Return the images of a batch, a part of which is replaced by generated images of the same classes."""
        if isinstance(source, GAN):
            if update.done < self.generator:
                source.update(batch, update.rng.at("gan"))
                return batch.x
            if not learner.state[_JUDGED]:
                if not self.training.trial:
                    _refuse_collapsed(source, batch, update.rng.at("judged"), self.confidence)
                learner.state[_JUDGED].fill_(1)
        rng = update.rng.at("generated")
        rows = (rng.at("share").uniform(batch.ids) < self.share).nonzero()[:, 0]
        x, is_accepted = source.accepted(batch.take(rows), rng, self.confidence)
        learner.state[_COUNTS].add_(torch.tensor([[int(is_accepted.sum()), len(rows)]]).to(rows))
        return batch.x.index_copy(0, rows[is_accepted], x[is_accepted].to(batch.x))

    def further_examples(self, model: Classifier) -> Batch | None:
        """Return the generated images of the file `samples`, read for a model; None without a file."""
        if not self.samples:
            return None
        from holdfast.io.data.data import open_data  # only for a recipe with a file
        from holdfast.io.data.layouts import DeclaredData

        found = open_data(self.samples, x="x", y="y", expected=DeclaredData(model.bounds, model.classes))
        return found.read(0, len(found))

    def follow_up(self, finished: Finished) -> tuple[dict[str, Any], str]:
        """Return how many samples were accepted, and the distances from generated images to the nearest training
        example beside those of test examples.
        """
        accepted, tried = finished.state[_COUNTS][0].tolist()
        entry: dict[str, Any] = {"accepted": accepted, "tried": tried}
        images = self.further_examples(finished.given)
        if images is None:
            gan = _gan(finished.given, finished.training, finished.rng)
            gan.restore(finished.state)
            entry["generator_updates"] = int(gan.updates)
            images = _accepted_samples(gan, finished.training, finished.rng, self.confidence)
        if not accepted or not len(images):
            return entry, "up to the chosen checkpoint, the network was trained on real images only"
        found = copies(images.to(finished.test.x.device), finished.test, finished.training, finished.rng)
        return {**entry, "copies": found}, (
            f"generated images replaced {accepted:,} of the {tried:,} images that were drawn for it; "
            f"{sentence_on_copies(found)}"
        )


def _refuse_other_inputs(data: TrainingData) -> None:
    """Raise `UsageError` for training examples that are no images (channels, height, width) of at least 4 × 4."""
    if len(data.example_shape) != 3 or min(data.example_shape[1:]) < _LEAST_SIDE:
        raise UsageError(
            f"inputs have shape {data.example_shape}, and the recipe generated is for images (channels, height, width) "
            f"of at least {_LEAST_SIDE} × {_LEAST_SIDE} pixels",
            Remedy("recipe", "pgd"),
        )


def _gan(model: Classifier, data: TrainingData, rng: Draws) -> GAN:
    example = data.first(1).x
    with torch.no_grad():
        classes = deepcopy(model).eval()(example).shape[1]
    return GAN(example, classes, model.bounds, rng)


def _refuse_collapsed(gan: GAN, batch: Batch, rng: Draws, confidence: float) -> None:
    """Raise `TargetError` if the classifier accepts few samples for the classes of a batch, or if two samples of a
    class are nearly the same image.
    """
    trials = [gan.accepted(batch, rng.at(k), confidence) for k in range(_TRIED)]
    x, is_accepted = (torch.cat(parts) for parts in zip(*trials, strict=True))
    share = float(is_accepted.double().mean())
    order = batch.y.argsort(stable=True)
    pairs = (batch.y[order][1:] == batch.y[order][:-1]).nonzero()[:, 0]

    def apart(images: Inputs) -> float:
        return float((images[order][pairs] - images[order][pairs + 1]).flatten(1).norm(dim=1).mean())

    alike = apart(trials[0][0]) / apart(batch.x) if len(pairs) else 1.0
    if share >= _FEW and alike >= _ALIKE:
        return
    finding = (
        f"the classifier accepts {int(is_accepted.sum()):,} of {len(x):,} samples with a confidence of {confidence:g}, "
        f"and at least {100 * _FEW:.0f} % are needed"
        if share < _FEW
        else f"two samples of a class are {100 * alike:.0f} % as far apart as two real images, and at least "
        f"{100 * _ALIKE:.0f} % are needed"
    )
    raise TargetError(
        f"after {int(gan.updates):,} updates the generator gives too few usable images: {finding}; train longer, set a "
        "larger recipe.generator or a smaller recipe.confidence, or give generated images (recipe.samples)",
        Remedy("recipe", "pgd", reason="to train on real images only"),
    )


def _accepted_samples(gan: GAN, data: TrainingData, rng: Draws, confidence: float) -> Batch:
    """Accepted samples for the classes of a few training examples."""
    rows = rng.at("classes").bits(data.ids).argsort()[:COMPARED]
    like = Batch(data.first(1).x, data.y[rows], data.ids[rows])
    x, is_accepted = gan.accepted(like, rng, confidence)
    return Batch(x, like.y, like.ids).take(is_accepted)
