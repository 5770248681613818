"""Hypernetwork that generates parameter sets of a network, trained so that adversarial examples of one set break few
inputs on the others.

Ha et al., "HyperNetworks", ICLR 2017, arXiv:1609.09106. The initial weights follow Chang et al., "Principled weight
initialization for hypernetworks", ICLR 2020: the generated parameters have the variance of the usual initial weights.
The loss of a set is that of FGSM-RS (Wong et al., "Fast is better than free", ICLR 2020, arXiv:2001.03994), with the
adversarial examples of another set of the same update for a part of the examples.
Differs from the papers: each parameter is an affine function of the features of a code, without codes for chunks of
parameters, so that the hypernetwork has `features + 1` weights for each parameter.
"""

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from time import process_time
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn
from torch.func import functional_call

from holdfast.attacks.parts.losses import cross_entropy, expect_eps
from holdfast.core.batch import Batch
from holdfast.core.constraints import Constraint
from holdfast.core.draws import Draws
from holdfast.core.model import Bounds, Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Fraction, Ids, Inputs, Logits, NonNegative, Positive, Steps
from holdfast.recipes.training.fit import drawing
from holdfast.recipes.training.learner import climbed
from holdfast.recipes.training.losses import Immunity
from holdfast.rotation import Crafting, Members
from holdfast.rotation.collecting import rotated, with_fresh_weights
from holdfast.rotation.generating import UNKNOWN, stepped
from holdfast.rotation.immunising import Making

Diversity = Literal["none", "outputs", "transfer"]

_WARM_UP = 0.1  # fraction of the updates in which the learning rate rises
_GROWTH = 0.2  # fraction of the updates in which the radius grows, so that the sets are accurate first
_SMALLEST = 1e-3  # first factor of the radius, which must be positive
# limit for the norm of the gradient of all weights, since single sets can have much larger losses than others
_LARGEST_NORM = 1.0
_CLOCK_S = 1e-6  # resolution of the clock of CPU time
_TRIALS = (1, 10, 60)  # updates of the timed trainings; the first one is slower, since it loads the kernels


class Hypernetwork(nn.Module):
    """Network that computes the parameters of a model from random codes. It must be secret, as its sets are."""

    head: nn.Parameter
    mean: nn.Parameter

    def __init__(self, model: Classifier, codes: int, features: int, spread: float, rng: Draws) -> None:
        super().__init__()
        self.codes = codes
        initial = with_fresh_weights(model, rng.at("mean"), "he")
        parameters = dict(initial.net.named_parameters())  # type: ignore[union-attr]
        self.shapes = {name: parameters[name].shape for name in rotated(model)}
        values = [parameters[name].detach() for name in self.shapes]
        # biases and other vectors begin alike in all sets, matrices and kernels differ
        deviations = [
            torch.full((value.numel(),), float(value.std()) if value.dim() > 1 else 0.0) for value in values
        ]
        with drawing(rng.at("weights")):
            self.trunk = nn.Sequential(
                nn.Linear(codes, features), nn.LayerNorm(features), nn.GELU(),
                nn.Linear(features, features), nn.LayerNorm(features),
            )  # fmt: skip
            directions = torch.randn(codes + features, sum(map(len, deviations)))
        scale = math.sqrt(spread / len(directions))
        self.head = nn.Parameter(directions * torch.cat(deviations) * scale)
        means = [value.flatten() * (math.sqrt(1 - spread) if value.dim() > 1 else 1.0) for value in values]
        self.mean = nn.Parameter(torch.cat(means))

    def forward(self, codes: Tensor) -> dict[str, Tensor]:
        """Return the parameter sets for codes (n, codes), as tensors of shape (n, *shape) by name."""
        features = torch.cat([codes, self.trunk(codes)], 1)
        sets = torch.addmm(self.mean, features, self.head)
        pieces = torch.split(sets, [shape.numel() for shape in self.shapes.values()], 1)
        return {
            name: piece.view(len(codes), *shape)
            for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)
        }

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """Return the groups of weights for an optimiser, with the largest learning rate of each as `largest`.

        A step of Adam changes each weight by the same amount, and each parameter is a sum over all features. So that
        the parameters move as fast as in a usual training, the rate of the head is divided by the root of their number.
        """
        largest = {"mean": lr, "head": lr / math.sqrt(len(self.head)), "trunk": lr / 2}
        return [
            {"params": [weights], "largest": largest[name.split(".")[0]]}
            for name, weights in self.named_parameters()
        ]

    @torch.no_grad()
    def drawn(self, n: int, rng: Draws) -> Members:
        """Generate `n` parameter sets for random codes. The same `rng` generates the same sets."""
        codes = rng.normal(torch.arange(n), self.codes)
        return Members(self(codes), torch.full((n,), UNKNOWN))


def _clipped(weights: list[nn.Parameter], *_: object) -> None:
    """Limit the norm of the gradient before a step of the optimiser."""
    nn.utils.clip_grad_norm_(weights, _LARGEST_NORM)


class Generated(nn.Module):
    """The model with one of the generated parameter sets, through which gradients reach the hypernetwork."""

    def __init__(self, model: Classifier, weights: dict[str, Tensor]) -> None:
        """Create the model. `weights` are the parameters by name in the network."""
        super().__init__()
        self.model, self.weights = model, weights

    @property
    def bounds(self) -> Bounds:
        """Lowest and highest valid values of the inputs."""
        return self.model.bounds

    def forward(self, x: Inputs, ids: Ids | None = None) -> Logits:
        """Return the logits (n, classes) of the inputs `x` (n, *features)."""
        weights = {f"net.{name}": value for name, value in self.weights.items()}
        logits: Logits = functional_call(self.model, weights, (x,))
        return logits

    def frozen(self) -> "Generated":
        """Return the same model without gradients to its parameters."""
        return Generated(self.model, {name: value.detach() for name, value in self.weights.items()})


@dataclass(frozen=True)
class Diversified:
    """Settings of the training of a hypernetwork, whose sets are to be accurate on the adversarial examples of each
    other.
    """

    codes: Steps = 16
    """number of random values from which a parameter set is generated"""
    features: Steps = 32
    """number of learned features of these values"""
    spread: Fraction = 0.9
    """share of the variance of the initial weights that differs between sets"""
    sets: Annotated[int, Ge(2)] = 4
    """number of parameter sets in each update"""
    batch: Steps = 64
    """number of training examples of each of these sets"""
    updates: Steps = 10_000
    """number of updates of the optimiser; `seconds` replaces it"""
    seconds: Positive | None = None
    """seconds of CPU time that the training takes; the number of updates follows from the time of the first ones"""
    lr: Positive = 3e-3
    """largest learning rate; it rises for a tenth of the updates and then decreases along a cosine"""
    diversity: Diversity = "transfer"
    """what makes the sets differ: `none`: only their initial weights; `outputs`: a term of the loss for the distance of
    their probabilities on noise; `transfer`: adversarial examples of another set in place of `share` of their own"""
    share: Fraction = 0.75
    """share of the examples of a set that are computed on another set, with `transfer`"""
    weight: NonNegative = 0.1
    """weight of the distance of probabilities, with `outputs`"""
    overshoot: Positive = 1.25
    """radius of the ball of adversarial examples, in multiples of eps; it is reached after a fifth of the updates"""
    reach: Positive = 1.25
    """size of the gradient step from a random start in the ball, in multiples of that radius"""
    crafting: Making = field(default_factory=Crafting)
    """how examples are computed on given sets that the generated sets are immunised against"""
    immunity: Positive = 0.5
    """weight of the loss of these examples"""

    def planned(
        self,
        model: Classifier,
        data: Batch,
        threat: ThreatModel,
        *,
        given: Sequence[Classifier] = (),
        rng: Draws,
    ) -> "Diversified":
        """Return the settings with the number of updates that the training takes within `seconds`, including this
        planning. Settings without `seconds` are returned unchanged.

        Short trainings are timed and discarded, so that the schedules of the training that follows span all its
        updates.
        """
        if self.seconds is None:
            return self
        spent = []
        for updates in _TRIALS:
            begin = process_time()
            replace(self, seconds=None, updates=updates)(model, data, threat, given=given, rng=rng)
            spent.append(process_time() - begin)
        update_s = max((spent[2] - spent[1]) / (_TRIALS[2] - _TRIALS[1]), _CLOCK_S)
        start_s = max(spent[1] - _TRIALS[1] * update_s, 0.0)  # initial weights, and examples of given sets
        updates = int((self.seconds - sum(spent) - start_s) / update_s)
        return replace(self, seconds=None, updates=max(updates, 1))

    def __call__(
        self,
        model: Classifier,
        data: Batch,
        threat: ThreatModel,
        *,
        given: Sequence[Classifier] = (),
        rng: Draws,
    ) -> Hypernetwork:
        """Return a hypernetwork for the parameters of `model`, which is not changed, trained for the threat model.

        `given` are models with sets against which the generated sets are immunised. Cost of an update: two forward and
        backward passes of `sets * batch` examples, and one of as many examples of the given sets, if there are some.
        Raises `UsageError` if the threat model has no eps, and `LostLoss` if the training diverges.
        """
        constraint = expect_eps(threat.constraint, self)
        if self.seconds is not None:
            return self.planned(model, data, threat, given=given, rng=rng)(
                model, data, threat, given=given, rng=rng
            )
        hypernetwork = Hypernetwork(model, self.codes, self.features, self.spread, rng.at("begin"))
        optimizer = torch.optim.AdamW(hypernetwork.groups(self.lr), self.lr, weight_decay=0.0, fused=True)
        weights = list(hypernetwork.parameters())
        optimizer.register_step_pre_hook(partial(_clipped, weights))
        learner = deepcopy(model).requires_grad_(False).train()
        stolen = self.crafting(given, data, threat, rng=rng.at("crafting")) if given else None
        immunity = None if stolen is None else Immunity(stolen, self.immunity, self.batch)
        for update in range(self.updates):
            place, done = rng.at("update", update), update / self.updates
            for group in optimizer.param_groups:
                group["lr"] = group["largest"] * min(done / _WARM_UP, 0.5 * (1 + math.cos(math.pi * done)))
            growth = max(min(done / _GROWTH, 1.0), _SMALLEST)
            grown = constraint.resized(growth * self.overshoot * constraint.eps)
            sets = self._sets(hypernetwork, learner, place.at("codes"))
            loss = self._loss(sets, self._examples(sets, data, grown, place), place)
            if immunity is not None:
                loss = loss + torch.stack([immunity(one, place.at(k)) for k, one in enumerate(sets)]).mean()
            stepped(optimizer, loss, f"the hypernetwork, in update {update + 1}", self.lr)
        return hypernetwork.eval().requires_grad_(False)

    def _sets(self, hypernetwork: Hypernetwork, learner: Classifier, rng: Draws) -> list[Generated]:
        """The model with each set of an update."""
        weights = hypernetwork(rng.normal(torch.arange(self.sets), self.codes))
        return [
            Generated(learner, {name: value[place] for name, value in weights.items()})
            for place in range(self.sets)
        ]

    def _examples(
        self, sets: Sequence[Generated], data: Batch, constraint: Constraint, rng: Draws
    ) -> list[Batch]:
        """The adversarial examples on which each set is trained: its own ones, and `share` of another set's."""
        rows = rng.at("rows").integers(torch.arange(self.sets * self.batch), len(data))
        own = []
        for place, batch in enumerate(data.take(rows).split(self.batch)):
            start = rng.at("start", place)
            x_adv = climbed(
                sets[place].frozen(), batch, constraint, start, cross_entropy, steps=1, reach=self.reach
            )
            own.append(batch.at(x_adv))
        if self.diversity != "transfer":
            return own
        further = 1 + int(rng.at("other").integers(torch.zeros(1, dtype=torch.int64), self.sets - 1))
        n_others = round(self.share * self.batch)
        others = [own[(place + further) % self.sets] for place in range(self.sets)]
        n_own = self.batch - n_others
        return [
            Batch(
                *(
                    torch.cat([getattr(one, name)[:n_own], getattr(other, name)[n_own:]])
                    for name in ("x", "y", "ids")
                )
            )
            for one, other in zip(own, others, strict=True)
        ]

    def _loss(self, sets: Sequence[Generated], examples: Sequence[Batch], rng: Draws) -> Tensor:
        """Mean loss of the sets, and the term for the distance of their probabilities if it is used."""
        losses = [F.cross_entropy(one(batch.x), batch.y) for one, batch in zip(sets, examples, strict=True)]
        loss = torch.stack(losses).mean()
        if self.diversity != "outputs":
            return loss
        low, high = sets[0].bounds.low, sets[0].bounds.high
        noise = low + (high - low) * rng.at("noise").uniform(examples[0].ids, *examples[0].x.shape[1:])
        probabilities = torch.stack([one(noise).softmax(1) for one in sets])
        return loss - self.weight * F.pdist(probabilities.flatten(1)).mean()
