"""Runs of gradient ascent on the features of a model before the operations without a useful gradient."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from holdfast.attacks.parts.ascent import cosine
from holdfast.attacks.parts.counted_queries import DOUBLE_CHECKS, CountedQueries
from holdfast.attacks.parts.features import Features
from holdfast.attacks.parts.losses import margin_loss, scaled_cross_entropy
from holdfast.attacks.parts.small_networks import SmallNetwork
from holdfast.attacks.parts.starts import near
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.gradients import input_gradient
from holdfast.core.types import Inputs, Logits, PerExample, Rows

_REACH = 15.0
"""length of a run in multiples of eps"""
_MOMENTUM = 0.75
"""weight of the earlier directions, because the gradients of relaxed operations change with each jump of their value"""
_DRAWS = 4
"""number of forward passes over which the gradient of a randomised model is averaged"""
_PATIENCE = 2
"""number of rounds of all kinds of runs without a broken example after which the attack ends"""
_HEAD_STEPS = 100
"""steps of training of a head before each of its runs, and three times as many before the first"""
_BOTH = 2
"""passes of an evaluation from which a gradient can be taken; the backward counts even if it does not follow"""

Goal = Callable[[Logits, list[Tensor], Batch], PerExample]
"""function of the logits, the features, and the examples that a run maximises"""


@dataclass(frozen=True)
class _Run:
    """One kind of run."""

    goal: Literal["relaxed", "class", "features", "head"]
    """what is maximised: the loss by relaxed gradients, untargeted or for the class of the target example; the nearness
    to the features of the target example; or the loss of a head"""
    place: int = 0
    """number of the place of the features"""


class FeatureSearch:
    """The runs of the attack on one batch, and what they share."""

    def __init__(
        self, queries: CountedQueries, features: Features, batch: Batch, steps: int, rng: Draws
    ) -> None:
        self._queries, self._features, self._batch, self._steps = queries, features, batch, steps
        self._rng, self._draws = rng, _DRAWS if queries.randomised else 1
        logits, clean = features.forward(queries.model, batch, batch.x.detach().requires_grad_())
        queries.passes_left -= _BOTH
        self._clean = [values.detach() for values in clean]
        self._predictions = logits.detach().argmax(1)
        self._heads = [
            SmallNetwork(values, logits.shape[1], queries.model.bounds, rng.at("head", k))
            for k, values in enumerate(self._clean)
        ]
        self._trained = set[int]()

    def rounds(self) -> None:
        """Make runs of each kind in turn until all examples are broken, the passes are used, or none breaks more."""
        runs, idle, number = self._kinds(), Counter[_Run](), 0
        while runs:
            for run in runs:
                active = self._queries.surviving()
                if not len(active) or self._queries.passes_left < self._step_cost:
                    return
                self._climb(run, active, number)
                idle[run] = 0 if len(self._queries.surviving()) < len(active) else idle[run] + 1
            runs, number = [run for run in runs if idle[run] < _PATIENCE], number + 1

    def _kinds(self) -> list[_Run]:
        relaxing = [_Run("relaxed")] if self._features.relaxed else []
        transfers = [_Run("features", k) for k in range(len(self._clean))] if self._has_targets() else []
        heads = [_Run("head", k) for k in range(len(self._clean))]
        classes = [_Run("class")] if relaxing and transfers and self._batch.target is None else []
        return [*relaxing, *transfers[:1], *heads[:1], *classes, *transfers[1:], *heads[1:]]

    @property
    def _step_cost(self) -> int:
        """Most passes of one step: a forward and a backward for each draw, and the checks of broken points."""
        return 2 * self._draws + (DOUBLE_CHECKS * self._draws if self._queries.randomised else 0)

    def _has_targets(self) -> bool:
        return bool((self._predictions != self._predictions[0]).any())

    def _targets(self, active: Batch, place: int, rank: int) -> Rows:
        """Position of the example, among those that the model assigns to another class, whose features are the nearest
        but `rank`.
        """
        clean, rows = self._clean[place], self._queries.best.rows(active)
        distances = torch.cdist(clean[rows], clean)
        goal = active.y if active.target is None else active.target
        same = self._predictions[None] == goal[:, None]
        others = same if active.target is None else ~same
        distances = distances.masked_fill(others, torch.inf)
        ordered = distances.argsort(dim=1, stable=True)
        count = (~others).sum(1).clamp_min(1)
        return ordered.gather(1, (rank % count)[:, None])[:, 0]

    def _climb(self, run: _Run, active: Batch, number: int) -> None:
        """Gradient ascent on the goal of a run inside the ball. Examples are left out once they are broken."""
        queries, model = self._queries, self._queries.model
        norm, bounds = queries.constraint, model.bounds
        rng = self._rng.at("run", run.goal, run.place, number)
        goal = self._goal(run, active, number)
        x = norm.sample(active, bounds, rng) if number % 2 == 0 else queries.best.x[queries.best.rows(active)]
        direction = torch.zeros_like(x)
        for step in range(self._steps):
            if queries.passes_left < self._step_cost:
                return
            grad = self._gradient(goal, active, x)
            unbroken = queries.best.margin[queries.best.rows(active)] > 0
            if not unbroken.any():
                return
            if not unbroken.all():
                active, x, grad, direction = (
                    active.take(unbroken),
                    x[unbroken],
                    grad[unbroken],
                    direction[unbroken],
                )
            direction = _MOMENTUM * direction + norm.steepest(grad, x, bounds)
            size = _REACH * norm.eps / self._steps * cosine(step, self._steps)
            stepped = torch.add(x, norm.steepest(direction, x, bounds), alpha=size)
            x = norm.project(stepped, active.x, bounds)
        if queries.passes_left >= self._step_cost:
            queries.logits(active, x)

    def _gradient(self, goal: Goal, active: Batch, x: Inputs) -> Inputs:
        """Mean gradient of a goal over the draws. Cost: a forward and a backward for each."""
        grad = torch.zeros_like(x)
        for _ in range(self._draws):
            leaf = x.detach().requires_grad_()
            logits, features = self._answers(active, leaf)
            grad += input_gradient(goal(logits, features, active), leaf)
        return grad

    def _goal(self, run: _Run, active: Batch, number: int) -> Goal:
        if run.goal == "relaxed":
            return lambda logits, _, batch: scaled_cross_entropy(logits, batch)
        if run.goal == "head":
            head = self._head(run.place, active, number)
            return lambda _, features, batch: margin_loss(head(features[run.place]), batch)
        all_targets = torch.zeros_like(self._batch.ids)
        rows = self._queries.best.rows(active)
        all_targets[rows] = self._targets(active, run.place, number)
        if run.goal == "class":
            return lambda logits, _, batch: scaled_cross_entropy(
                logits, batch.towards(self._predictions[all_targets[self._queries.best.rows(batch)]])
            )
        clean = self._clean[run.place]

        def nearness(_: Logits, features: list[Tensor], batch: Batch) -> PerExample:
            goals = clean[all_targets[self._queries.best.rows(batch)]]
            return -(features[run.place] - goals).square().mean(1)

        return nearness

    def _head(self, place: int, active: Batch, number: int) -> SmallNetwork:
        """The head of a place, trained on all answers so far; before its first run also on random points."""
        head, steps, queries = self._heads[place], _HEAD_STEPS, self._queries
        if place not in self._trained:
            self._trained.add(place)
            steps *= 3
            for k in range(self._steps):
                if queries.passes_left < self._step_cost:
                    break
                x = near(
                    active, self._batch, queries.constraint, queries.model.bounds, k, self._rng.at("near", k)
                )
                self._answers(active, x.detach().requires_grad_())
        head.train(steps)
        return head

    def _answers(self, active: Batch, x: Inputs) -> tuple[Logits, list[Tensor]]:
        """Logits and features of a forward pass, which counts as a query and teaches the heads."""
        logits, features = self._features.forward(self._queries.model, active, x)
        self._queries.passes_left -= _BOTH
        self._queries.offer(active, x, logits)
        for head, values in zip(self._heads, features, strict=True):
            head.add(values, logits)
        return logits, features
