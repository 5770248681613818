"""Objects that a recipe's loss needs in training: the network, its frozen copy for attacks, and the threat model."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.attacks.parts.ascent import ascend
from holdfast.attacks.parts.losses import Loss, cross_entropy
from holdfast.core.batch import UNLABELLED, Batch, TrainingData
from holdfast.core.constraints import Constraint
from holdfast.core.draws import Draws
from holdfast.core.errors import Remedy, UsageError
from holdfast.core.model import Classifier, Model
from holdfast.core.threat import ThreatModel
from holdfast.core.training import Checkpoint, have_compiled, lay_out
from holdfast.core.types import Inputs, Labels, Logits, PerExample
from holdfast.recipes.training.augment import refuse_augmentation
from holdfast.recipes.training.fit import EpochGuard, Forwards, Training, Update, fit, refuse_unusable
from holdfast.recipes.training.optimisation import processes, refuse_few
from holdfast.recipes.training.weights import twin

GROWN = "grown"
"""name of the state tensor with the current factor of eps"""


@dataclass(frozen=True)
class Learner:
    """The network that a recipe trains, in train mode, with a frozen copy for attacks and the threat model."""

    net: Classifier
    frozen: Classifier
    """copy with the same weights, in eval mode, which attacks use"""
    threat: ThreatModel
    state: dict[str, Tensor] = field(default_factory=dict)
    """tensors that the loss stores from one update to the next"""
    class_weights: Tensor | None = None
    """(classes,) weights of the losses of examples, whose mean over the training examples is 1; None for equal ones"""

    def mean(self, losses: PerExample, y: Labels) -> Tensor:
        """Return the mean of the losses of examples with the labels `y`, weighted by the classes."""
        return losses.mean() if self.class_weights is None else (self.class_weights[y] * losses).mean()

    def mean_cross_entropy(
        self, logits: Logits, y: Labels, *, smoothing: float = 0.0, towards: Tensor | None = None
    ) -> Tensor:
        """Return the mean cross-entropy of examples with the labels `y`, weighted by the classes.

        `smoothing` is the fraction of each label that is spread evenly over all classes. `towards` are other classes,
        or probabilities (n, classes), that the network learns in place of the labels.
        """
        target = y if towards is None else towards
        if self.class_weights is None:
            return F.cross_entropy(logits, target, label_smoothing=smoothing)
        return self.mean(F.cross_entropy(logits, target, label_smoothing=smoothing, reduction="none"), y)

    @property
    def with_current_eps(self) -> "Learner":
        """The same object with the eps of the threat model multiplied by its current factor, which grows during the
        warm-up of a training.
        """
        constraint, factor = self.threat.constraint, float(self.state.get(GROWN, 1.0))
        if factor == 1:
            return self
        return replace(
            self, threat=replace(self.threat, constraint=constraint.resized(factor * constraint.eps))
        )

    def worst(
        self,
        batch: Batch,
        rng: Draws,
        *,
        steps: int,
        reach: float,
        loss: Loss = cross_entropy,
        on: Model | None = None,
    ) -> Inputs:
        """Attack a batch in training: maximise `loss` by `steps` gradient steps from a random start, and return the
        last points. The path is `reach` times eps long.

        `on` is the model that is attacked, if it is not the frozen copy. Cost: `steps` forwards and backwards of it.
        """
        constraint, model = self.threat.constraint, self.frozen if on is None else on
        return climbed(model, batch, constraint, rng.at("start"), loss, steps=steps, reach=reach)

    def most_divergent(
        self,
        batch: Batch,
        rng: Draws,
        distance: Callable[[Logits, Logits], PerExample],
        *,
        steps: int,
        reach: float,
    ) -> Inputs:
        """Attack a batch in training: maximise a `distance` between attacked and clean prediction by gradient steps
        from a random start, and return the last points.
        """
        with torch.no_grad():
            clean = self.frozen(batch.x)
        return self.worst(batch, rng, steps=steps, reach=reach, loss=lambda z, _: distance(z, clean))

    def repeated_forward(self) -> Callable[[Inputs], Logits]:
        """Return a function that repeats the next forward pass of the network on other inputs, with the same random
        numbers and the same buffers.

        It uses the same random numbers, as for dropout, and starts with the same buffers; its updates of buffers, as by
        batch norm, are discarded. Call this before the pass, once for each pair of passes. Cost: a copy of the buffers.
        """
        device = next(self.net.parameters()).device
        buffers = {name: value.clone() for name, value in self.net.named_buffers()}
        rng_state = torch.get_rng_state()
        cuda_rng_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

        def repeated(x: Inputs) -> Logits:
            torch.set_rng_state(rng_state)
            if cuda_rng_state is not None:
                torch.cuda.set_rng_state(cuda_rng_state, device)
            logits: Logits = torch.func.functional_call(self.net, buffers, (x,))
            return logits

        return repeated


InnerOf = Callable[[Learner, Batch, Update], Inputs]
"""function that returns the inputs on which a batch is trained"""
LossOf = Callable[[Learner, Batch, Inputs], tuple[Tensor, Tensor]]
"""function that returns the mean loss of a batch and its attacked inputs, and how many of these are classified
correctly"""


@dataclass(frozen=True)
class Loop:
    """One training in the common loop: its network, its examples and its settings, and what a recipe adds to them."""

    model: Classifier
    """network at the start, of which a copy is trained"""
    data: TrainingData
    threat: ThreatModel
    how: Training
    rng: Draws
    after: Checkpoint | None
    """checkpoint from which the training continues; None at the start"""
    inner: InnerOf
    loss: LossOf
    state: dict[str, Tensor] = field(default_factory=dict)
    """tensors that the recipe keeps from one update to the next, and which are part of each checkpoint"""
    guard: Callable[[Learner], EpochGuard] | None = None
    """function that returns the `guard` of `fit` for a learner"""
    settle: Callable[[Learner], Callable[[], None]] | None = None
    """function that returns for a learner the function that is called after each update"""
    replays: int = 1
    """number of consecutive updates on each batch"""
    published: Callable[[Checkpoint], Checkpoint] | None = None
    """function that returns the checkpoint with the weights of the new model, if the loop trains other ones"""
    linear_in_labels: bool = False
    differentiated_twice: bool = False
    weights_classes: bool = False
    uses_unlabelled: bool = False
    in_one_process: bool = False
    sets_gradients: bool = False
    """these six as in `LossRecipe`"""


def trained(loop: Loop) -> Iterator[Checkpoint]:
    """Train a copy of a model as the loop states, and yield a checkpoint after each epoch.

    `inner` and `loss` get the threat model with its current eps. Settings that contradict the properties of the loss
    raise `UsageError` before the first update. So does an optimiser, a scheduler or weights that do not fit the model.
    """
    data, how = loop.data, loop.how
    _refuse_foreign(loop)
    net = deepcopy(loop.model).train()
    refuse_unusable(net, how, data, loop.replays)
    # before `twin`, because the copy shares the memory of the weights
    lay_out(net, how.layout)
    state = {GROWN: torch.zeros((), device=data.ids.device), **loop.state}
    learner = _with_class_weights(Learner(net, twin(net, how.attack_statistics), loop.threat, state), loop)
    for copied in (learner.net, learner.frozen) if how.compiled else ():
        have_compiled(copied)
    forwards = Forwards()

    def count(_: nn.Module, inputs: tuple[Inputs, ...]) -> None:
        forwards.n += len(inputs[0])

    for copied in (learner.net, learner.frozen):
        copied.register_forward_pre_hook(count)

    def inner(batch: Batch, update: Update) -> Inputs:
        learner.state[GROWN].fill_(update.grown)
        return loop.inner(learner.with_current_eps, batch, update)

    checkpoints = fit(
        net,
        data,
        inner,
        lambda batch, x_adv: loop.loss(learner.with_current_eps, batch, x_adv),
        how,
        rng=loop.rng,
        after=loop.after,
        state=learner.state,
        guard=None if loop.guard is None else loop.guard(learner),
        replays=loop.replays,
        settle=None if loop.settle is None else loop.settle(learner),
        forwards=forwards,
        private=loop.sets_gradients,
    )
    return checkpoints if loop.published is None else map(loop.published, checkpoints)


def _refuse_foreign(loop: Loop) -> None:
    """Raise `UsageError` for data or settings that the recipe's loss does not support."""
    data, how = loop.data, loop.how
    if loop.in_one_process and processes() > 1:
        raise UsageError(
            f"this recipe needs all examples in one process, and {processes()} processes share them; start one "
            "process",
            Remedy("recipe", "pgd"),
        )
    if how.compiled and loop.differentiated_twice:
        raise UsageError(
            "compiled is true, and the loss of this recipe contains a gradient, which needs two backward passes "
            "through the network; a compiled network supports only one; leave recipe.training.compiled out"
        )
    if how.cutmix and not loop.linear_in_labels:
        raise UsageError(
            f"cutmix is {how.cutmix:g}, and the loss of this recipe is not linear in the label, so labels cannot be "
            "mixed in it; leave recipe.training.cutmix out",
            Remedy("recipe", "pgd"),
        )
    refuse_augmentation(data.first(1).x, how.augment, how.cutmix)
    refuse_few(min(how.batch, len(data)))
    n = int((data.y == UNLABELLED).sum())
    if n and not loop.uses_unlabelled:
        raise UsageError(
            f"{n:,} of {len(data):,} training examples have no label, and this recipe uses only labelled ones; leave "
            "them out",
            Remedy("recipe", "vat"),
        )


def _with_class_weights(learner: Learner, loop: Loop) -> Learner:
    """The learner with the given weights of the classes, divided by their mean over the training examples.

    Raises `UsageError` if the recipe does not weight examples, if a weight is not positive, or if their number is not
    that of the classes.
    """
    data, given = loop.data, loop.how.class_weights
    if given is None:
        return learner
    if not loop.weights_classes:
        raise UsageError(
            f"class_weights are {list(given)}, and the loss of this recipe does not weight examples by their classes; "
            "leave recipe.training.class_weights out",
            Remedy("recipe", "pgd"),
        )
    wrong = [weight for weight in given if not 0 < weight < float("inf")]
    if wrong:
        raise UsageError(
            f"class_weights has the weight {wrong[0]:g}; every weight must be positive and finite"
        )
    few = data.take(torch.arange(min(2, len(data)), device=data.y.device))
    with torch.no_grad():
        classes = learner.frozen(few.x).shape[1]
    if len(given) != classes:
        raise UsageError(
            f"class_weights has {len(given)} weights, and the model has {classes} classes; give one weight for each "
            "class"
        )
    weights = torch.tensor(given, dtype=few.x.dtype, device=few.x.device)
    return replace(learner, class_weights=weights / weights[data.y].mean())


def clean_inputs(learner: Learner, batch: Batch, update: Update) -> Inputs:
    """Return the clean inputs of a batch, as the training inputs of recipes without an attack."""
    return batch.x


def adversarial_cross_entropy(
    learner: Learner, batch: Batch, x_adv: Inputs, *, clean: float = 0.0, smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the training loss of a batch and the number of correct attacked inputs. The loss is the cross-entropy at
    `x_adv` plus `clean` times the cross-entropy at the clean inputs.

    `smoothing` is the fraction of each label that is spread evenly over all classes. Cost: a forward, and another if
    `clean` is not 0.
    """
    logits = learner.net(x_adv)
    value = learner.mean_cross_entropy(logits, batch.y, smoothing=smoothing)
    if clean:
        value = value + clean * learner.mean_cross_entropy(learner.net(batch.x), batch.y, smoothing=smoothing)
    return value, hits(logits, batch.y)


def climbed(
    model: Model,
    batch: Batch,
    constraint: Constraint,
    rng: Draws,
    loss: Loss,
    *,
    steps: int,
    reach: float,
    momentum: float = 0.0,
) -> Inputs:
    """Return the last points of a gradient ascent from a random start that `rng` draws. The path is `reach` times eps
    long.
    """
    start, size = constraint.sample(batch, model.bounds, rng), reach * constraint.eps / steps
    return ascend(
        model, batch, start, loss, constraint, steps=steps, step_size=size, momentum=momentum, keep="last"
    )[0]


def hits(logits: Logits, y: Labels) -> Tensor:
    """Return the number of correctly classified examples of a batch. An example without a label never counts."""
    return (logits.argmax(1) == y).sum()
