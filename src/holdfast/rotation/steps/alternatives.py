"""Transfer attacks of a surrogate on parameter sets, and measurements of alternatives to a rotation."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch

from holdfast.attacks.parts.ascent import ascend, cosine
from holdfast.attacks.parts.fast_networks import Ensemble
from holdfast.attacks.parts.losses import Loss, expect_eps, margin_loss
from holdfast.attacks.protocol import Attack
from holdfast.attacks.transfer import Transfer
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.estimate import Estimate
from holdfast.core.model import Classifier, Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Positive, Steps
from holdfast.recipes import PGDTraining, SingleStep, Standard
from holdfast.recipes.training.fit import Training
from holdfast.recipes.training.recipe import Recipe, trained_as
from holdfast.rotation import Distilled, Immunise, Members
from holdfast.rotation.collecting import further, last_of, rows_of
from holdfast.rotation.pool import Pool
from holdfast.rotation.steps.rotation_request import RotateRequest, collected_members, surrogates
from holdfast.statistics.intervals import proportion

M = TypeVar("M", bound=torch.nn.Module)
_AT_ONCE = 250  # examples in one batch


@torch.no_grad()
def noisy(source: M, spread: float, rng: Draws) -> M:
    """Return a copy of a network with Gaussian noise added to its weights.

    The standard deviation is `spread` times the root mean square of each tensor.
    """
    copied = deepcopy(source)
    for name, value in copied.named_parameters():
        if value.is_floating_point():
            noise = rng.at(name).normal(torch.arange(value.numel())).view(value.shape).to(value)
            value.add_(noise, alpha=spread * float(value.square().mean().sqrt()))
    return copied


@dataclass(frozen=True)
class ToTheEnd:
    """PGD on the surrogates that performs all its steps, even if an example is adversarial earlier, because such
    examples transfer better.
    """

    steps: Steps = 50
    """number of steps, each of which uses the gradients of all surrogates"""
    reach: Positive = 20.0
    """path length, in multiples of eps"""
    loss: Loss = margin_loss
    """loss that is maximised"""

    needs: ClassVar[Access] = "none"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        constraint = expect_eps(threat.constraint, self)
        source = Ensemble(threat.surrogates, model.bounds)
        x_adv, _ = ascend(
            source,
            batch,
            constraint.sample(batch, model.bounds, rng.at("start")),
            self.loss,
            constraint,
            steps=self.steps,
            step_size=self.reach * constraint.eps / self.steps,
            schedule=cosine,
            keep="last",
        )
        return x_adv


@dataclass(frozen=True)
class Sampled:
    """A transfer attack on copies of the surrogates with random noise in their weights.

    Differs from SWAG: an attacker with one parameter set has no training trajectory from which to estimate the noise,
    so its size is relative to each tensor.
    """

    attack: Transfer = field(default_factory=lambda: Transfer(neighbours=0))
    """attack that is run on the mean of the copies"""
    copies: Steps = 4
    """number of copies, made of each surrogate in turn; there is at least one copy of each surrogate"""
    spread: Positive = 0.1
    """size of the noise, as a fraction of the root mean square of each tensor"""

    needs: ClassVar[Access] = "none"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        sources, n = threat.surrogates, max(self.copies, len(threat.surrogates))
        copies = tuple(self._moved(sources[k % len(sources)], rng.at("copy", k)) for k in range(n))
        return self.attack(model, batch, replace(threat, surrogates=copies), rng=rng)

    def _moved(self, source: Model, rng: Draws) -> Model:
        """A noisy copy; a model without weights, such as a remote one, is returned unchanged."""
        return noisy(source, self.spread, rng) if isinstance(source, torch.nn.Module) else source


ATTACKS: Mapping[str, Attack] = {
    "MI": Transfer(neighbours=0),
    "PGD-50": ToTheEnd(),
    "MI-DI-VMI": Transfer(diversity=0.5),
    "SWAG": Sampled(),
}
"""default attacks, by their names in the literature"""


@dataclass(frozen=True)
class TransferAttacker:
    """An attacker that computes adversarial examples for a target by several transfer attacks on one or more models of
    its own.
    """

    attacks: Mapping[str, Attack] = field(default_factory=lambda: ATTACKS)
    """attacks by name; each computes its examples on the surrogates of the threat model only"""

    def crafted(
        self, sources: Sequence[Classifier], batch: Batch, threat: ThreatModel, *, rng: Draws
    ) -> dict[str, Inputs]:
        """Return the adversarial examples of each transfer attack on the models `sources`, by name. With several
        models, each attack uses their mean.

        Each example is computed independently of the others. Cost for each example and source: about 160 gradients; the
        gradients of noisy copies are divided among the sources. Raises `UsageError` if there are no sources.
        """
        if not sources:
            raise UsageError("an attacker without models cannot compute examples; give at least one model")
        threat_of_attacker = replace(threat, surrogates=tuple(sources), queries=None)
        return {
            name: torch.cat(
                [
                    attack(sources[0], part, threat_of_attacker, rng=rng.at(name)).detach()
                    for part in batch.split(_AT_ONCE)
                ]
            )
            for name, attack in self.attacks.items()
        }


NOISE = 0.3
"""Size of the noise on the weights, as a fraction of the root mean square of each tensor."""
# Epochs of the single-step training, the learning rate, and attack steps of the PGD training:
_SHARE, _LR, _INNER = 0.5, 1e-3, 5
_ONE_STEP = SingleStep(noise=1.0, step=1.25, clip=True)
Json = dict[str, Any]


@dataclass
class Alternatives:
    """Measures all alternatives to a rotation on the same inputs with the same few attacks."""

    pool: Pool
    request: RotateRequest
    live: Classifier
    batch: Batch
    threat: ThreatModel
    rng: Draws
    transfer_attacker: TransferAttacker

    def rows(self) -> Iterator[tuple[str, Callable[[], Json | None]]]:
        """Yield the name of each alternative to a rotation, and a function that measures it. The function returns None
        if the pool does not permit the alternative.
        """
        yield "static", lambda: self._row(self.live, self.live, "the serving set is never swapped")
        yield (
            "weight noise",
            lambda: self._row(
                self._noisy(), self.live, f"noise of {NOISE:g} times the root mean square of each tensor"
            ),
        )
        yield "checkpoints of a run", self._checkpoints
        yield "soup", self._soup
        yield "SWAG", self._swag
        yield "independent seeds", self._seeds
        yield (
            "adversarial fine-tuning",
            lambda: self._row(self.tuned, self.live, "half an epoch, one step (FGSM-RS)"),
        )
        yield "PGD training", self._pgd
        yield "DVERGE-like diversity", self._diverse

    @cached_property
    def tuned(self) -> Classifier:
        """The model of the serving set after half an epoch of adversarial fine-tuning."""
        return self._trained(_ONE_STEP, _SHARE)

    def _pgd(self) -> Json:
        share = _SHARE * 2 / (_INNER + 1)  # a single-step update takes two passes
        description = f"as many passes: {share:.2g} of an epoch, {_INNER} steps"
        return self._row(self._trained(PGDTraining(steps=_INNER), share), self.live, description)

    def _diverse(self) -> Json:
        """Half of the passes compute examples, half train on them, together with FGSM-RS if the sets were hardened."""
        batch, n, steps = self.request.training.batch, len(self.request.train), Distilled().steps
        recipe, passes = (_ONE_STEP, 2) if hardened(self.request) else (Standard(), 1)
        share = _SHARE / (passes + 0.5)  # each update has half as many computed examples as others
        crafting = Distilled(examples=max(round(_SHARE * n / steps), 1), steps=steps)
        how = Immunise(share=share, batch=max(batch // 2, 1), lr=_LR, crafting=crafting)
        as_known = trained_as(recipe, Training(batch=batch))
        place = self.rng.at("trained", "diverse")
        trained = how(self.live, [self.live], as_known, self.request.train, self.threat, rng=place)
        description = (
            f"as many passes: {share:.2g} of an epoch, and {crafting.examples:,} inputs distilled from others"
        )
        return self._row(trained, self.live, description)

    def _trained(self, recipe: Recipe, share: float) -> Classifier:
        """The serving set, trained further for part of an epoch."""
        training = self.request.training
        how = further(Training(batch=training.batch), 1, _LR, "cycle")
        data, place = self.request.train, self.rng.at("trained", type(recipe).__name__)
        some = rows_of(data, max(round(share * len(data)), 1), place.at("data"))
        return last_of(
            trained_as(recipe, how), deepcopy(self.live).requires_grad_(), some, self.threat, place
        )

    def _noisy(self) -> Classifier:
        assert isinstance(self.live.net, torch.nn.Module)
        moved = noisy(self.live.net, NOISE, self.rng.at("noise"))
        return self.request.of_weights(dict(moved.named_parameters()))

    def _checkpoints(self) -> Json | None:
        if self._run is None:
            return None
        stolen, serving = (self.request.of_weights(self._run.one(k)) for k in (0, -1))
        return self._row(
            serving, stolen, f"{len(self._run)} sets of a run; the first was stolen, the last serves"
        )

    def _soup(self) -> Json | None:
        if self._run is None:
            return None
        stolen = self.request.of_weights(self._run.one(0))
        return self._row(self.request.of_weights(self._run.bases().one(0)), stolen, "the mean of those sets")

    def _swag(self) -> Json | None:
        """A sample around the mean of the run, and an attacker with another sample."""
        if self._run is None:
            return None
        samples = []
        for k in range(2):
            weights = {}
            for name, value in self._run.tensors.items():
                noise = self.rng.at("swag", k, name).normal(torch.arange(value[0].numel()))
                weights[name] = value.mean(0) + value.std(0) * noise.view(value[0].shape).to(value)
            samples.append(self.request.of_weights(weights))
        return self._row(samples[0], samples[1], "samples around their mean with their standard deviation")

    def _seeds(self) -> Json:
        models = surrogates(self.pool, self.request)
        return self._row(models[0], models[1], "a set of another training run than the stolen one serves")

    @cached_property
    def _run(self) -> Members | None:
        """The sets of the first run; None if it has only one."""
        members = collected_members(self.pool)
        rows = (members.basins == members.basins[0]).nonzero()[:, 0]
        return members.take(rows) if len(rows) > 1 else None

    def _row(self, serves: Classifier, stolen: Classifier, message: str) -> Json:
        """Clean accuracy of `serves`, and the success rates on it of examples computed on `stolen` and on itself."""
        right = _right(serves, self.batch)
        clean, correct = proportion(right), self.batch.take(right)
        if not len(correct):
            return {
                "clean_accuracy": share_json(clean),
                "stolen_set": None,
                "white_box": None,
                "message": message,
            }
        from_stolen = self._worst(serves, stolen, correct)
        white = from_stolen if stolen is serves else self._worst(serves, serves, correct)
        return {
            "clean_accuracy": share_json(clean),
            "stolen_set": share_json(from_stolen),
            "white_box": share_json(white),
            "message": message,
        }

    def _worst(self, serves: Classifier, source: Classifier, examples_to_attack: Batch) -> Estimate:
        examples = self.transfer_attacker.crafted(
            [source], examples_to_attack, self.threat, rng=self.rng.at("instead")
        )
        broken = [~_right(serves, examples_to_attack.at(x)) for x in examples.values()]
        return max((proportion(mask) for mask in broken), key=lambda share: share.value)


def share_json(share: Estimate) -> Json:
    """Return a fraction with its confidence interval as JSON."""
    return {"value": share.value, "low": share.low, "high": share.high, "n": share.n}


def hardened(request: RotateRequest) -> bool:
    """Return whether the parameter sets of a pool were trained against attacks."""
    return not isinstance(request.candidate.recipe, Standard)


def doubt(alternatives: Mapping[str, Json | None], request: RotateRequest, stolen_share: Json | None) -> Json:
    """Return the doubt that half an epoch of adversarial fine-tuning protects a model better than rotation, as JSON.

    `alternatives` are the measured alternatives, and `stolen_share` is the success rate of an attacker with one stolen
    set. The doubt is raised if the sets were not trained against attacks.
    """
    tuned, static = alternatives["adversarial fine-tuning"], alternatives["static"]
    assert tuned is not None and static is not None
    if tuned["stolen_set"] is None or static["white_box"] is None:
        message = "the serving set, or the fine-tuned one, classifies no input correctly"
        return {"state": "not measured", "statistic": None, "threshold": None, "n": 0, "message": message}
    rotated_text = "an unmeasured share" if stolen_share is None else f"{100 * stolen_share['value']:.1f} %"
    white_box_percent = 100 * static["white_box"]["value"]
    message = (
        "after half an epoch of adversarial fine-tuning of the serving set, an attacker with the old set breaks "
        f"{100 * tuned['stolen_set']['value']:.1f} % and a white-box attack {100 * tuned['white_box']['value']:.1f} %; "
        f"with rotation, an attacker with one stolen set breaks {rotated_text} and the same white-box attack "
        f"{white_box_percent:.1f} %"
    )
    state = "clear" if hardened(request) else "raised"
    if state == "raised":
        message = f"the sets were trained by {request.candidate.name}, which does not train against attacks: {message}"
    return {
        "state": state,
        "statistic": static["white_box"]["value"],
        "threshold": tuned["white_box"]["value"],
        "n": static["white_box"]["n"],
        "message": message,
    }


@torch.no_grad()
def _right(model: Classifier, batch: Batch) -> torch.Tensor:
    return torch.cat([model(some.x).argmax(1) == some.y for some in batch.split(1_000)])
