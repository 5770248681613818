"""Trains a GAN so that it is more robust, and audits it before and after."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import TypedDict

from holdfast.audits.finding import (
    Finding,
    Images,
    Picture,
    Size,
    StoredSteps,
    Table,
    in_unit_range,
    penultimate,
)
from holdfast.audits.generator.audit import GeneratorAudit, finding_of_steps, standardised
from holdfast.audits.generator.audit import measure as measure_generator
from holdfast.audits.generator.copies import frechet_distance
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import Remedy, TargetError, UsageError
from holdfast.core.evidence import Columns
from holdfast.core.model import Bounds
from holdfast.generators.adapters import GAN
from holdfast.io.models.generators import OpenedGenerator
from holdfast.recipes.training.gans import BATCH, RobustGAN, RobustLosses
from holdfast.runs.engine.run import Run
from holdfast.runs.store.columns import Form

BEFORE, AFTER, PLAN = "before-", "after-", "updates"
"""Prefixes of the stages of the two audits, and the name of the document with the number of updates."""
EPOCHS = 8
"""number of times that the Fréchet distance is measured during the training"""
USUAL = 2_000
"""number of updates without a budget"""
_TIMED = 5  # updates that are timed for a budget
_LEAST = 100  # updates below which a training is refused
_SHOWN, _SAMPLES = 6, "generated"
_METRICS = {
    "frechet": "Fréchet distance",
    "copy_rate": "share of copies",
    "near_copy_rate": "share of near copies",
    "latent_sensitivity": "worst change of the output for a latent change",
    "membership_tpr_at_1_percent": "share of training examples that are found",
}


class _Conditional(nn.Module):
    """A generator without classes, called as one with classes."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        samples: Tensor = self.net(z)
        return samples


class _Scored(nn.Module):
    """A discriminator of the user, called as one with a score for each class."""

    def __init__(self, net: nn.Module, classes: int) -> None:
        super().__init__()
        self.net, self.classes = net, classes

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.scores(x).gather(1, y[:, None])[:, 0]

    def scores(self, x: Tensor) -> Tensor:
        """Return the scores (n, classes): the score of an image, plus the logits of the class head if there is one."""
        found = self.net(x)
        score, head = found if isinstance(found, tuple) else (found, 0.0)
        scores: Tensor = score.reshape(len(x), 1).expand(-1, self.classes) + head
        return scores


@dataclass(frozen=True)
class GeneratorHardening:
    """What a hardening of a GAN trains, and how both generators are audited."""

    audit: GeneratorAudit
    """the audit of the given generator"""
    gan: GAN
    losses: RobustLosses
    fresh: bool
    """whether the training of the generator begins with random weights, as that of a student"""
    budget_s: float | None
    """time of the training in seconds; None for `USUAL` updates"""
    seed: int
    rng: Draws

    @property
    def steps(self) -> tuple[str, ...]:
        """Names of the stages and documents in their order."""
        epochs = (f"epoch-{epoch + 1}" for epoch in range(EPOCHS))
        of_audit = self.audit.steps
        return (PLAN, *(BEFORE + step for step in of_audit), *epochs, *(AFTER + step for step in of_audit))

    @cached_property
    def features(self) -> Callable[[Tensor], Tensor]:
        """Function that returns the standardised features of examples (n, *features)."""
        assert self.audit.extractor is not None  # the examples are images
        extractor, device = self.audit.extractor(), self.audit.device
        training, _ = penultimate(extractor, self.audit.training.x.to(device))

        def of(x: Tensor) -> Tensor:
            found, _ = penultimate(extractor, x.to(device))
            return standardised(found, training, found)[0]

        return of

    @cached_property
    def held_out_features(self) -> Tensor:
        """The standardised features of the held-out examples, with which the samples of each epoch are compared."""
        return self.features(self.audit.held_out.x)

    def trainer(self) -> RobustGAN:
        """Return the training at its beginning."""
        training, classes = self.audit.training, self.gan.classes or 1
        bounds = Bounds(float(training.x.min()), float(training.x.max()))
        generator, discriminator = deepcopy((self.gan.generator, self.gan.discriminator))
        assert discriminator is not None  # `trainable` was called
        if self.fresh:
            reset_weights(generator, self.rng.at("weights"))
        teacher: nn.Module = self.gan.generator
        if self.gan.classes is None:
            generator, teacher = _Conditional(generator), _Conditional(teacher)
        if not hasattr(discriminator, "scores"):
            discriminator = _Scored(discriminator, classes)
        for module in (generator, discriminator):
            module.requires_grad_(True)
        example = training.x[:1].to(self.audit.device)
        teacher = teacher.to(example)
        return RobustGAN(
            example, classes, bounds, self.rng.at("networks"), (generator, discriminator), self.gan.latent_shape,
            self.losses, teacher if self.losses.teacher else None,
        )  # fmt: skip

    def batch(self, update: int) -> Batch:
        """Return the training examples of an update. A generator without classes sees all of them as class 0."""
        training = self.audit.training
        random = torch.Generator().manual_seed(self.rng.at("rows", update).key >> 1)
        rows = torch.randint(len(training), (BATCH,), generator=random)
        y = training.y[rows] if self.gan.classes else torch.zeros(BATCH, dtype=torch.int64)
        return Batch(training.x[rows], y, torch.arange(BATCH)).to(self.audit.device)

    def trained(self, trainer: RobustGAN) -> GAN:
        """Return the given generator with the networks of a training: its averaged generator and its discriminator."""
        new, average, discriminator = deepcopy(self.gan), trainer.average, trainer.discriminator
        new.generator = average.net if isinstance(average, _Conditional) else average
        new.discriminator = discriminator.net if isinstance(discriminator, _Scored) else discriminator
        return deepcopy(new).cpu().eval().requires_grad_(False)


def reset_weights(generator: nn.Module, rng: Draws) -> None:
    """Give a generator random weights by `reset_parameters` of its modules. Raises `UsageError` if this leaves a weight
    as it was: a student with weights of its teacher could keep a backdoor.
    """
    with torch.no_grad():
        for weight in generator.parameters():
            weight.fill_(math.nan)  # what is NaN afterwards was not reset
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.key >> 1)
        for module in reversed([*generator.modules()]):  # a module after those that it contains
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
    kept = [name for name, weight in generator.named_parameters() if bool(weight.isnan().any())]
    if kept:
        raise UsageError(
            f"the parameter {kept[0]} of the generator is not reset by reset_parameters of its module, so that a "
            "student would keep weights of its teacher; add the method reset_parameters to that module, and use no "
            "parametrisation such as spectral_norm in the generator"
        )


def trainable(generator: OpenedGenerator, training: Batch) -> GAN:
    """Return the GAN of a generator. Raises `UsageError` if it is none that can be trained."""
    gan = generator.generator
    if not isinstance(gan, GAN) or gan.discriminator is None:
        raise UsageError(
            f"{generator.name} is {type(gan).__name__}, and a generator is hardened together with its discriminator; "
            "return holdfast.generators.GAN(generator, discriminator, latent_shape=…) or holdfast.generators.ImageGAN()"
        )
    shape = training.example_shape
    if len(shape) != 3:
        raise UsageError(
            f"the training examples have shape {shape}; images (channels, height, width) were expected"
        )
    if gan.classes and not bool(((training.y >= 0) & (training.y < gan.classes)).all()):
        raise UsageError(
            f"{generator.name} has {gan.classes} classes, and the labels of the training examples are from "
            f"{int(training.y.min())} to {int(training.y.max())}; labels from 0 to {gan.classes - 1} were expected"
        )
    return gan


def measure(run: Run, how: GeneratorHardening) -> tuple[Images, GAN]:
    """Take the steps of the hardening, and return its images and the new generator."""
    trainer, states = how.trainer(), list[Columns]()
    # first, so that a generator or a budget is refused before anything is measured
    updates = int(run.document(PLAN, lambda: {"updates": _updates(how)})["updates"])
    measure_generator(run, how.audit, BEFORE)
    for epoch in range(EPOCHS):
        span = range(updates * epoch // EPOCHS, updates * (epoch + 1) // EPOCHS)
        states.append(run.stage(f"epoch-{epoch + 1}", partial(_epoch, how, trainer, span)).columns)
        trainer.restore(states[-1])
    distances = [float(state["frechet"]) for state in states]
    best = min(range(EPOCHS), key=distances.__getitem__)
    if math.isinf(distances[best]):
        raise TargetError(
            "the training diverged: in every epoch, the samples of the generator have NaN or infinity"
        )
    trainer.restore(states[best])
    new = how.trained(trainer)
    assert how.audit.generator is not None
    opened = replace(how.audit.generator, generator=new)
    audit = replace(
        how.audit,
        generator=opened,
        draw=partial(opened.samples, how.audit.n, how.seed),
        compares_ranges=False,  # those of the given generator were compared, and training is no change of units
    )
    images = measure_generator(run, audit, AFTER)
    return lambda: {**images(), _SAMPLES: _samples(how, new)}, new


class _Plan(TypedDict):
    updates: Size


def concluded(steps: StoredSteps) -> Finding:
    """Return the finding of a hardening from its stored steps."""
    updates = steps.document(PLAN, _Plan)["updates"]
    form = {"frechet": Form((1,), infinite=True)}
    distances = [float(steps.columns(f"epoch-{epoch + 1}", form)["frechet"]) for epoch in range(EPOCHS)]
    before, after = (finding_of_steps(steps.within(prefix)) for prefix in (BEFORE, AFTER))
    finding = _compared(before, after, updates, distances)
    return replace(finding, pictures=steps.pictures(finding.pictures))


def _updates(how: GeneratorHardening) -> int:
    """Number of updates that take the budget, from the time of a few on a copy."""
    if how.budget_s is None:
        return USUAL
    trainer = how.trainer()
    trainer.update(how.batch(0), how.rng.at("timed"))
    begun = time.perf_counter()
    for update in range(_TIMED):
        trainer.update(how.batch(update), how.rng.at("timed", update))
    each = (time.perf_counter() - begun) / _TIMED
    updates = int(how.budget_s / each)
    if updates < _LEAST:
        raise UsageError(
            f"the budget of {how.budget_s:g} s is enough for {updates} updates of {each:.2g} s; at least {_LEAST} were "
            "expected",
            Remedy("budget", f"{max(1, round(2 * _LEAST * each))}s"),
        )
    return updates


def _epoch(how: GeneratorHardening, trainer: RobustGAN, updates: range) -> Columns:
    """Train for some updates, and return all tensors with the Fréchet distance of samples to held-out examples."""
    for update in updates:
        trainer.update(how.batch(update), how.rng.at("update", update))
    held_out = how.audit.held_out.x
    samples = how.trained(trainer).sample(len(held_out), how.seed).view_as(held_out)
    distance = math.nan
    if bool(samples.isfinite().all()):
        distance = frechet_distance(how.features(samples), how.held_out_features)
    if math.isnan(distance):
        distance = math.inf  # so that the epoch is not chosen
    state = {name: value.detach().cpu().clone() for name, value in trainer.state().items()}
    return {"id": torch.zeros(1, dtype=torch.int64), "frechet": torch.tensor([distance]), **state}


def _compared(before: Finding, after: Finding, updates: int, distances: list[float]) -> Finding:
    epochs = Table(
        "Epochs",
        ("epoch", "updates", "Fréchet distance to held-out examples"),
        [
            (epoch + 1, updates * (epoch + 1) // EPOCHS, f"{value:.3g}")
            for epoch, value in enumerate(distances)
        ],
        "The epoch with the smallest distance is returned. The Fréchet distances before and after the training are "
        "those to the training examples, and differ from these.",
    )
    old, changed = dict(_numbers(before.facts)), dict(_numbers(after.facts))
    rows = [
        (name, f"{old[name]:.4g}", f"{value:.4g}", f"{value - old[name]:+.3g}")
        for name, value in changed.items()
        if name in old and value != old[name]
    ]
    table = Table(
        "Before and after the training",
        ("measure", "before", "after", "difference"),
        rows,
        "Numbers that did not change are left out.",
    )
    changes = [
        f"{title} {before.metrics[name].value:.3g} before and {after.metrics[name].value:.3g} after"
        for name, title in _METRICS.items()
        if name in before.metrics and name in after.metrics
    ]
    return replace(
        after,
        headline="; ".join(changes) + f"; {before.verdict} before and {after.verdict} after",
        reasons=[f"before: {before.headline}", f"after: {after.headline}", *after.reasons],
        facts={"before": before.facts, "after": after.facts, "updates": updates, "epochs": distances},
        tables=[table, epochs, *_named("Before", before.tables), *_named("After", after.tables)],
        pictures=[_GENERATED, *after.pictures],
    )


def _named(when: str, tables: Any) -> Iterator[Table]:
    for table in tables:
        yield replace(table, title=f"{when}: {table.title}")


def _numbers(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers among facts, with their names."""
    for name, value in facts.items():
        shown = f"{prefix}{name.replace('_', ' ')}"
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{shown}: ")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield shown, float(value)


_GENERATED = Picture(
    _SAMPLES,
    "Samples of the same latent vectors before and after the training",
    [f"{when}, sample {k + 1}" for k in range(_SHOWN) for when in ("before", "after")],
    together=2,
)


def _samples(how: GeneratorHardening, new: GAN) -> Tensor:
    """Images of the same latent vectors before and after the training."""
    both = torch.stack([each.sample(_SHOWN, how.seed) for each in (deepcopy(how.gan).cpu(), new)], 1)
    low, high = float(how.audit.training.x.min()), float(how.audit.training.x.max())
    return in_unit_range(both.flatten(0, 1), low, high)
