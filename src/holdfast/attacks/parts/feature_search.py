"""Attacks on the features of a model before the operations that mask its gradient."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from holdfast.attacks.parts.ascent import cosine, near
from holdfast.attacks.parts.boundaries import DOUBLE_CHECKS, CountedQueries
from holdfast.attacks.parts.losses import margin_loss, scaled_cross_entropy
from holdfast.attacks.parts.substitutes import SmallNetwork
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import HoldfastError
from holdfast.core.gradients import Replacement, StraightThrough, Through, detoured, input_gradient
from holdfast.core.model import Model, out_of_memory
from holdfast.core.surrogate_gradients import Relaxation, relaxed
from holdfast.core.types import Inputs, Logits, PerExample, Rows

_LOOKED_AT = 8
"""number of examples on which a model is inspected"""
_LARGEST = 20_000
"""largest number of features of one example that are attacked; more are slow to compare"""


@dataclass(frozen=True)
class Features:
    """Places in a model whose values an attack can change on purpose, and how gradients reach them."""

    cross: bool
    """whether gradients pass through `detach` and `no_grad`"""
    relaxed: bool
    """whether a gradient reaches the logits through relaxed operations"""
    places: tuple[tuple[int, ...], ...]
    """positions of the tensors of each place in the record of a forward pass, counted from its end: a model that treats
    the examples one by one before it decides records more of them for a larger batch"""
    widths: tuple[int, ...]
    """number of features of each place"""
    chooses: bool
    """whether the model chooses among outcomes without a gradient, such as the entries of a codebook"""

    def forward(self, model: Model, batch: Batch, x: Inputs) -> tuple[Logits, list[Tensor]]:
        """Return the logits of `x` and the features (n, k) of each place, with gradients with respect to `x`.

        The features of a place that this forward pass does not have are zeros.
        """
        with torch.enable_grad(), relaxed(cross=self.cross) as record:
            logits = model(x, batch.ids)
        pairs = zip(self.places, self.widths, strict=True)
        return logits, [_joined(record, place, width, x) for place, width in pairs]


def features_of(model: Model, batch: Batch) -> Features | None:
    """Return the places of a model before the operations that have no useful gradient, or None if it has none.

    The places are the tensors that enter the last such operation (all that have the same shape, as of several votes),
    and the last output of a module before it. Cost: one to three forwards and backwards of at most 8 examples.
    """
    looked = batch.first(_LOOKED_AT)
    if not len(looked):
        return None
    for cross in (True, False):
        try:
            found = _inspected(model, looked, cross=cross)
        except (HoldfastError, RuntimeError) as error:
            if not _by_relaxation(error):
                raise
        else:
            return found
    return None


def _by_relaxation(error: Exception) -> bool:
    """Whether an error of a model may come from gradients that it does not expect, as in a second backward pass."""
    cause = error.__cause__ if isinstance(error, HoldfastError) else error
    return isinstance(cause, (RuntimeError, TypeError)) and not out_of_memory(cause)


def _inspected(model: Model, batch: Batch, *, cross: bool) -> Features | None:
    leaf = batch.x.detach().requires_grad_()
    with torch.enable_grad(), relaxed(cross=cross) as record:
        logits = model(leaf, batch.ids)
    reaches = logits.requires_grad
    if reaches:
        highest = logits.amax(1)
        gradient = input_gradient(highest, leaf)  # an error of the backward pass is raised here
        if not record.passed and gradient.flatten(1).any(1).double().mean() > 0.5:
            return None  # what is cut beside the way of a gradient is usually no defence
    if not record.passed and not record.cuts:
        return None
    places = tuple(place for place in _places(record, len(batch)) if place)
    relaxes = record.passed > 0 and reaches
    if not places and not relaxes:
        return None
    widths = tuple(sum(record.recorded[k][0].numel() for k in place) for place in places)
    end = len(record.recorded)
    relative = tuple(tuple(k - end for k in place) for place in places)
    return Features(cross, relaxes, relative, widths, record.choices > 0)


def _places(record: Relaxation, n: int) -> tuple[tuple[int, ...], ...]:
    usable = [
        k for k, values in enumerate(record.recorded)
        if values.dim() > 1 and len(values) == n and values[0].numel() <= _LARGEST
    ]  # fmt: skip
    cuts = [k for k in record.cuts if k in set(usable)]
    if not cuts:
        return ()
    last = record.recorded[cuts[-1]]
    alike = [k for k in cuts if record.recorded[k].shape == last.shape]
    group = tuple(alike[-(_LARGEST // last[0].numel()) :])
    before = [
        k for k in usable if k < group[0] and record.recorded[k].shape != last.shape and k not in set(cuts)
    ]
    return group, tuple(before[-1:])


def _joined(record: Relaxation, place: tuple[int, ...], width: int, x: Inputs) -> Tensor:
    parts = [record.recorded[k] for k in place if k >= -len(record.recorded)]
    if all(part.dim() and len(part) == len(x) and part.is_floating_point() for part in parts):
        joined = [part.flatten(1).to(x.dtype) for part in parts if part.dim() > 1]
        if sum(part.shape[1] for part in joined) == width:
            return torch.cat(joined, dim=1)
    return x.new_zeros(len(x), width)


_MOVES = 0.01
"""Step along the gradient, as a share of the root mean square of the inputs."""
_LEAST = 1e-3
"""Root mean square that is assumed if all inputs are zero."""
_HONEST = (0.5, 2.0)
"""Range of the median ratio of measured to predicted change for an unmasked gradient, as for the doubt `shattered`."""


@dataclass(frozen=True)
class Masking:
    """The parts of a network that mask gradients, with the replacements that an adaptive attack uses to avoid them."""

    replacements: tuple[Replacement, ...] = ()
    steps: bool = False
    """whether the network contains roundings, inside modules or between them, whose gradient is replaced"""

    def __bool__(self) -> bool:
        return bool(self.replacements) or self.steps

    @property
    def descriptions(self) -> tuple[str, ...]:
        """Descriptions of the parts of a network whose gradient an adaptive attack replaces, for the report."""
        declared = "the stand-in that it declares"
        descriptions = [
            f"{replacement.name or 'the network'} ({_kind(replacement.module)}) by "
            f"{'the identity' if replacement.stand_in is None else declared}"
            for replacement in self.replacements
        ]
        return (*descriptions, *(["every rounding by the identity"] if self.steps else []))


def masking(net: nn.Module, x: Tensor) -> Masking:
    """Find the parts of a network whose gradient an adaptive attack replaces. These declare a replacement, or they have
    a zero or wrong gradient and do not change the shape of their input.

    Roundings are replaced first, because a stage without its roundings is closer to the original than the identity is.
    The tests use inputs like `x`. Cost: three forwards of the network, and for each module that preserves the shape
    three forwards and a backward.
    """
    modules = dict(net.named_modules())
    declared = [Replacement(name, m, m.backward) for name, m in modules.items() if isinstance(m, Through)]
    inside = {m for replacement in declared for m in replacement.module.modules()}
    with detoured(declared, steps=True) as counter:
        _slope(net, x)
    steps, replacements = counter.passed > 0, list[Replacement]()
    # inner modules first, so that an outer one is not replaced for a fault of an inner one
    for name, (module_input, module_output) in sorted(
        _shape_candidates(net, x).items(), key=lambda named: -named[0].count(".")
    ):
        module = modules[name]
        if module in inside or module_input.shape != module_output.shape:
            continue
        passed = any(
            replacement.module in set(module.modules()) for replacement in (*declared, *replacements)
        )
        with detoured((*declared, *replacements), steps=steps) as counter:
            if _masks(module, module_input, counter, slopes=not passed):
                replacements.append(Replacement(name, module))
    order = {name: position for position, name in enumerate(modules)}
    return Masking(
        tuple(sorted((*declared, *replacements), key=lambda replacement: order[replacement.name])), steps
    )


def _shape_candidates(net: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """First input and output of each module that takes and returns one floating-point tensor."""
    recorded: dict[str, tuple[Tensor, Tensor]] = {}
    names = {module: name for name, module in net.named_modules()}

    def note(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        floats = [v for v in (*inputs, output) if isinstance(v, Tensor) and v.is_floating_point()]
        if len(inputs) == 1 and len(floats) == 2:
            recorded.setdefault(names[module], (floats[0].detach().clone(), floats[1].detach()))

    handles = [module.register_forward_hook(note) for module in names]
    try:
        with torch.no_grad():
            net(x)
    finally:
        for handle in handles:
            handle.remove()
    return recorded


def _masks(module: nn.Module, x: Tensor, counter: StraightThrough, *, slopes: bool) -> bool:
    """Whether a module's gradient is zero for most examples, or (with `slopes`) does not predict a small step."""
    slope, weights = _slope(module, x)
    flat = slope.flatten(1)
    useless = (flat == 0).all(1) | ~flat.isfinite().all(1)
    if 2 * int(useless.sum()) > len(x):
        return True
    if counter.passed or not slopes:  # the gradient of a replacement does not predict small steps
        return False
    step = _MOVES * x.square().mean().sqrt().clamp_min(_LEAST) * slope.sign()
    predicted = (step * slope).flatten(1).sum(1)
    change = (weights * (_seeded(module, x + step) - _seeded(module, x))).flatten(1).sum(1)
    ratio = (change / predicted)[~useless]
    return not _HONEST[0] <= float(ratio.median()) <= _HONEST[1]


def _slope(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of a fixed combination of a module's outputs, and its weights; zero if the module cuts the graph."""
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        output = _seeded(module, leaf, grad=True)
        weights = torch.cos(torch.arange(output[0].numel(), device=x.device, dtype=x.dtype)).view_as(
            output[:1]
        )
        if not output.requires_grad:
            return torch.zeros_like(x), weights
        (slope,) = torch.autograd.grad((weights * output).sum(), leaf, materialize_grads=True)
    return slope, weights


def _seeded(module: nn.Module, x: Tensor, *, grad: bool = False) -> Tensor:
    """Output of a module with the same random numbers at every call."""
    with torch.random.fork_rng(), torch.set_grad_enabled(grad):
        torch.manual_seed(0)
        output: Tensor = module(x.clone())  # a module may change its input in place
        return output


def _kind(module: nn.Module) -> str:
    """Class or function name of a stage."""
    stage = module.stage if isinstance(module, Through) else module
    return str(getattr(stage, "__name__", type(stage).__name__))


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
