"""The training loop of every recipe: batches, updates of the weights, averages of the weights, and a checkpoint after
each epoch.

Within a time budget the number of updates is planned again as the training proceeds (`Training.pacing`). An update is a
function of the plans so far, which are part of the checkpoint, and the last epoch may be incomplete.

A recipe adds `inner`, which attacks the inputs of a batch, and `loss`, the mean loss of a batch and its attacked
inputs, whose graph includes the weights. All random numbers (order of the examples, augmentation, starts of attacks,
dropout) are functions of the seed, the epoch and the step, so that a training that is stopped after an epoch, or after
an update with a checkpoint, and resumed ends with the same weights.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, count
from types import MappingProxyType
from typing import Annotated, Literal, Protocol

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn

from holdfast.core.batch import UNLABELLED, Batch, TrainingData
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Classifier
from holdfast.core.training import (
    AVERAGE,
    EPOCH,
    STATE,
    WEIGHTS,
    Checkpoint,
    Layout,
    Precision,
    computing,
    laid_out,
    refuse_changed,
    refuse_cut,
    refuse_lost,
    unsaved,
    without_prefix,
)
from holdfast.core.types import Count, Fraction, Inputs, NonNegative, Positive, Steps
from holdfast.recipes.training.augment import Augmentation, augmented, augmented_by, cut_and_mixed
from holdfast.recipes.training.losses import Immunity
from holdfast.recipes.training.optimisation import (
    Optimisation,
    OwnOptimizer,
    OwnSchedule,
    Pacing,
    Plans,
    Rate,
    average,
    copy_of_tensor,
    mean_factor,
    optimizer_of,
    processes,
    rank,
    scheduler_of,
    share,
    slowed,
)
from holdfast.recipes.training.weights import Statistics, ema, perturbed, swa


@dataclass(frozen=True)
class Update:
    """State of a training that a recipe receives with each batch: random numbers for the attack on the batch, and the
    fraction of the training that is complete.
    """

    rng: Draws
    """random numbers of the update, which also determine the augmentation of its images"""
    epoch: int
    """number of completed epochs"""
    done: float
    """completed fraction of all planned updates, on which the schedules of learning rate and eps depend"""
    grown: float
    """factor of eps, which grows during the warm-up and may exceed 1"""


Inner = Callable[[Batch, Update], Inputs]
"""function that returns the inputs on which a batch is trained"""
TrainingLoss = Callable[[Batch, Inputs], tuple[Tensor, Tensor]]
"""function that returns the mean loss of a batch and its attacked inputs, and how many of these are classified
correctly"""

UNWRITTEN = MappingProxyType({"written": False})
"""metadata of a field that can be set in Python only, and not in a file"""


@dataclass(frozen=True)
class Saving:
    """Checkpoints within an epoch, from which a training resumes exactly."""

    every: int
    """number of updates between two checkpoints"""
    save: Callable[[Checkpoint], None]
    """function that stores a checkpoint"""


@dataclass
class Forwards:
    """Number of forward passes of single examples since the last checkpoint at the end of an epoch. Hooks of the
    networks increase it.
    """

    n: int = 0


@dataclass(frozen=True)
class Training:
    """Settings of the training loop, such as epochs, batch size and optimiser. They do not depend on the loss of the
    recipe.
    """

    epochs: Steps = 30
    """number of passes over the training data; a time budget replaces it"""
    patience: Count = 0
    """number of epochs without a better robust accuracy on held-out examples after which `harden` stops; 0 for never"""
    batch: Steps = 128
    """number of examples in one update"""
    optimizer: Literal["adamw", "sgd"] | OwnOptimizer = "adamw"
    """optimiser; adamw also works for networks without batch norm, and sgd with a learning rate of 0.1 is common for
    networks with batch norm. A function, in a file `FILE.py:NAME`, receives the list of parameters and returns an
    optimiser, which determines `lr`, `momentum` and `weight_decay`"""
    lr: Positive = 3e-3
    """largest learning rate"""
    schedule: Rate | OwnSchedule = "cycle"
    """schedule of the learning rate: up and down (`cycle`), down along a cosine, times 0.1 at half and at three
    quarters (`steps`), or `flat`. A function, in a file `FILE.py:NAME`, receives the optimiser and the total number of
    updates and returns a scheduler of torch"""
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    """momentum of sgd"""
    weight_decay: NonNegative | None = None
    """fraction of each weight that a step with a learning rate of 1 removes; None for 0.1 with adamw and 0.0005 with
    sgd"""
    clip: Positive | None = None
    """largest norm of the gradient of all parameters together, to which a larger gradient is scaled; None for no
    clipping"""
    averaging: Literal["ema", "swa", "none"] = "ema"
    """which weights the new model has: a running average (`ema`), the mean of those after the last epochs (`swa`; use a
    learning rate that does not fall to zero, such as `flat`), or the last ones (`none`)"""
    average: Annotated[float, Ge(0), Lt(1)] = 0.999
    """with ema: decay, that is the weight of the earlier average in each update"""
    tail: Fraction = 0.25
    """with swa: fraction of the epochs, the last ones, after each of which the weights are included in the average"""
    warmup: Fraction = 0.25
    """fraction of the training over which eps grows linearly: a network that is attacked with the full eps from the
    start may lose its accuracy"""
    overshoot: Positive = 1.0
    """factor of the threat's eps in training: a value slightly above 1 may give more robust accuracy at the threat's
    eps, at the cost of clean accuracy"""
    awp: NonNegative = 0.0
    """size of the adversarial weight perturbation, as a fraction of the norm of each weight tensor; 0 for none"""
    attack_statistics: Statistics = "running"
    """statistics that batch norm uses while the network is attacked: the running ones, as in eval mode, or those of the
    attacked batch, as in train mode; the attack does not update them"""
    augment: Augmentation = "none"
    """augmentation of training images: `none`, a `shift` by up to two pixels, or `crop-flip`, a shift by up to four and
    a flip; of clips `sounds`: noise, shifts in time, rooms and gains. A function, in a file `FILE.py:NAME`, receives
    the inputs and labels of a batch and a generator, and returns the augmented inputs"""
    cutmix: Fraction = 0.0
    """fraction of the batches with CutMix: a box of another image replaces a part of each image, and its label has the
    weight of that part"""
    class_weights: tuple[Positive, ...] | None = None
    """weight of the loss of an example for each class; they are divided by their mean over the training examples. None
    for equal weights"""
    precision: Precision = "auto"
    """number format of products in training: float32, bfloat16, or auto, which is bfloat16 on a GPU that supports it,
    else float32"""
    layout: Layout = "auto"
    """memory layout of images: channels-first, channels-last, or auto, which is channels-last on a GPU, else
    channels-first"""
    compiled: bool = False
    """whether torch compiles the network, which takes minutes at first and makes updates faster; not with a gradient
    penalty"""
    immunity: Immunity | None = field(default=None, metadata=UNWRITTEN)
    """adversarial examples of other networks, whose loss is added to that of the recipe; it cannot be set in a file"""
    pacing: Pacing | None = field(default=None, metadata=UNWRITTEN)
    """function that plans the number of updates within a time budget, in place of `epochs`; it is set by `harden`"""
    saving: Saving | None = field(default=None, metadata=UNWRITTEN)
    """checkpoints within an epoch; it is set by `harden`"""
    trial: bool = field(default=False, metadata=UNWRITTEN)
    """whether updates are only timed, so that no result of them is judged; it is set by `harden`"""

    @property
    def functions(self) -> dict[str, Callable[..., object]]:
        """Functions of the user in the settings, by the name of the setting."""
        settings = {"optimizer": self.optimizer, "schedule": self.schedule, "augment": self.augment}
        return {name: value for name, value in settings.items() if not isinstance(value, str)}

    @property
    def timed(self) -> "Training":
        """The settings with which updates are timed: functions of the user do not change the weights much, and no
        scheduler is created for the few updates.
        """
        optimizer, schedule = self.optimizer, self.schedule
        return replace(
            self,
            optimizer=optimizer if isinstance(optimizer, str) else slowed(optimizer),
            schedule=schedule if isinstance(schedule, str) else "flat",
        )

    @property
    def decay(self) -> float | None:
        """Weight decay of a named optimiser, of which each has its default. None if a function determines it."""
        if not isinstance(self.optimizer, str):
            return None
        return _DECAYS[self.optimizer] if self.weight_decay is None else self.weight_decay


_DECAYS = {"adamw": 0.1, "sgd": 5e-4}  # a similar share of a weight at the usual rates and momentum
_CHECKS, _BETWEEN_CHECKS = (
    10,
    20,
)  # checks of a guard within a budget, and least number of updates between two
_ENDS = "ends"  # state of swa: the number of epochs in the average
_LOSSES, _RIGHT, _FORWARDS = f"{EPOCH}losses", f"{EPOCH}right", f"{EPOCH}forwards"


def updates(n: int, batch: int) -> int:
    """Return the number of updates in one epoch for `n` examples. An incomplete last batch is omitted, unless it is the
    only one.
    """
    return max(n // batch, 1)


class EpochGuard(Protocol):
    """Protocol of a check that is made every few updates of a training. If it fails, the updates since the last check
    are repeated.
    """

    @property
    def every(self) -> int:
        """Number of updates between two checks."""

    @property
    def dearer(self) -> float:
        """Current cost of an update of the training, in multiples of the cost of the first update."""

    def passes(self) -> bool:
        """Return whether the check of the network passes. If it does not, this call has changed the training so that a
        later check can pass.
        """


def fit(
    model: nn.Module,
    data: TrainingData,
    inner: Inner,
    loss: TrainingLoss,
    how: Training,
    *,
    rng: Draws,
    after: Checkpoint | None = None,
    state: Mapping[str, Tensor] = MappingProxyType({}),
    guard: EpochGuard | None = None,
    replays: int = 1,
    settle: Callable[[], None] | None = None,
    forwards: Forwards | None = None,
    private: bool = False,
) -> Iterator[Checkpoint]:
    """Train the weights of `model` in place, and yield a checkpoint after each epoch. The last epoch may be incomplete.
    Within a time budget, short epochs have a checkpoint only if enough time passed since the last one
    (`Plans.evaluated`).

    `settle` is called after each update, before the average is updated, and may change the weights too. With `after`
    the training resumes from that checkpoint. `state` contains tensors that the loss or `settle` change in place. They
    are saved and restored, except that changes by a `guard` remain when the guard undoes the last updates. Each batch
    is used for `replays` consecutive updates. `forwards` counts forward passes, whose number for an example is part of
    the measurements. With `private`, `loss` sets the gradients itself, and each example is in a batch with the same
    probability, independently of the others. Raises `LostLoss` if the loss is not finite, and `TargetError` if a
    buffer changes that is not in the state dict.
    """
    if how.averaging == "swa":
        state = {**state, _ENDS: torch.zeros((), dtype=torch.int64, device=data.ids.device)}
    plans = Plans(how.epochs, updates(len(data), how.batch) * replays, how.pacing)
    forwards = forwards or Forwards()
    loop = _Loop(model, data, inner, loss, how, rng, state, replays, settle, plans, forwards, private=private)
    first_epoch, is_evaluated = 0, True
    if after is not None:
        first_epoch = after.epoch
        loop.restore({name: value.to(data.ids.device) for name, value in after.tensors.items()}, state)
        plans.resume(after)
    before = unsaved(model)
    for epoch in count(first_epoch):
        begun = after if after is not None and after.step and epoch == first_epoch else None
        if begun is None and is_evaluated:
            forwards.n = 0
            plans.review(0)
        if plans.ended():
            return
        measured = loop.epoch(epoch, guard, begun)
        refuse_changed(model, before)
        is_evaluated = plans.evaluated()
        if not is_evaluated:
            continue
        part = plans.updates / plans.per_epoch - epoch
        yield Checkpoint(epoch + 1, loop.of(epoch), loop.copies(), measured, part, plans.updates, plans.kept)


class _Loop:
    """The network, its average and its optimiser during a training."""

    def __init__(
        self,
        model: nn.Module,
        data: TrainingData,
        inner: Inner,
        loss: TrainingLoss,
        how: Training,
        rng: Draws,
        state: Mapping[str, Tensor],
        replays: int,
        settle: Callable[[], None] | None,
        plans: Plans,
        forwards: Forwards,
        *,
        private: bool,
    ) -> None:
        self._private = private
        self._model, self._data, self._inner, self._loss = model, data, inner, loss
        self._how, self._rng, self._state = how, rng, state
        self._replays, self._settle = replays, settle
        self._parameters = [weight for weight in model.parameters() if weight.requires_grad]
        self._optimisation = Optimisation(
            optimizer_for(self._parameters, how), how.schedule, is_own=not isinstance(how.optimizer, str)
        )
        initial = {} if how.averaging == "none" else model.state_dict()
        self._average = {name: value.detach().clone() for name, value in initial.items()}
        self._plans, self._forwards = plans, forwards
        self._bounds = model.bounds if isinstance(model, Classifier) else None

    def epoch(self, epoch: int, guard: EpochGuard | None, begun: Checkpoint | None) -> dict[str, float]:
        """Perform the updates of one epoch, or of the planned part of it, and return the measurements of the epoch.

        `begun` is the checkpoint within the epoch from which the training resumes, or None.
        """
        plans, per_epoch = self._plans, self._plans.per_epoch
        batches = self._batches(epoch)
        sums, step = _Sums.begun(begun, self._data.ids.device), 0 if begun is None else begun.step
        if begun is not None:
            self._forwards.n = int(begun.tensors[_FORWARDS])
        with ExitStack() as readings:
            examples: Iterator[Batch] | None = None
            while step < per_epoch and (step == 0 or not plans.ended()):
                if examples is None:
                    reading = self._data.reading(batches[step:], self._rng.at("reading", epoch))
                    examples = readings.enter_context(reading)
                snapshot = {} if guard is None else self._snapshot()
                end = min(step + self._until_check(epoch * per_epoch + step, guard), len(batches))
                results = self._run_updates(epoch, examples, step, end)
                if guard is not None and not self._guard_passes(guard, epoch, step):
                    self.restore(snapshot)
                    plans.rewind(epoch * per_epoch + step, step)
                    readings.close()
                    examples = None  # the same ones are read again
                    continue
                sums.own += results
                step += len(results)
                if step < per_epoch:  # before the checkpoint, which includes the plan
                    self._review(step, results)
                self._save(epoch, step, len(results), sums)
        self._gather(sums, epoch)
        if self._how.averaging == "swa":
            ends = self._state[_ENDS]
            swa(self._average, self._model, int(ends))
            ends.add_(self._in_tail(epoch))
        plans.review(step)
        n_labelled = int((self._data.y[torch.cat(batches[:step])] != UNLABELLED).sum())
        return {
            "loss": sums.losses.mean().item(),
            "accuracy": sums.right.item() / max(n_labelled, 1),
            "lr": self._optimisation.lr,
            "dearer": 1.0 if guard is None else guard.dearer,
            # each process counts its own share of the examples
            "forwards": processes() * self._forwards.n / len(self._data),
        }

    def _batches(self, epoch: int) -> list[Tensor]:
        """Positions of the examples in the batch of each update of an epoch."""
        ids, rng, size = self._data.ids, self._rng.at("order", epoch), self._how.batch
        n = self._plans.per_epoch // self._replays
        if self._private:
            share = size / len(ids)
            drawn = [rng.at(step).uniform(ids, dtype=torch.float64) < share for step in range(n)]
            return [rows.nonzero()[:, 0] for rows in drawn]
        rows = rng.bits(ids).argsort()[: n * size]
        return [batch_rows for batch_rows in torch.split(rows, size) for _ in range(self._replays)]

    def _gather(self, sums: "_Sums", epoch: int) -> None:
        """Include the updates of all processes in the sums over an epoch. Raises `LostLoss` in all processes if the
        loss of one of them is not finite.
        """
        sums.gather()
        refuse_lost(sums.losses, epoch, self._how.lr if isinstance(self._how.optimizer, str) else None)

    def _until_check(self, n_done: int, guard: EpochGuard | None) -> int:
        """Number of updates after `n_done` updates until a guard or a checkpoint interrupts them."""
        if guard is not None:
            return self._updates_to_check(guard)
        every = self._plans.per_epoch if self._how.saving is None else self._how.saving.every
        return every - (0 if self._how.saving is None else n_done % every)

    def _save(self, epoch: int, step: int, n_new: int, sums: "_Sums") -> None:
        """Save a checkpoint after `step` updates of an epoch, the last `n_new` of them since the last check, if one is
        due.
        """
        saving, plans = self._how.saving, self._plans
        if saving is None or step >= plans.per_epoch or plans.ended():
            return
        if plans.updates // saving.every == (plans.updates - n_new) // saving.every:
            return
        self._gather(sums, epoch)  # a checkpoint has finite losses only
        values = {_LOSSES: sums.losses, _RIGHT: sums.right, _FORWARDS: torch.tensor(self._forwards.n)}
        tensors = self.copies() | {name: copy_of_tensor(value.cpu()) for name, value in values.items()}
        part = plans.updates / plans.per_epoch - epoch
        saving.save(Checkpoint(epoch, self.of(epoch), tensors, {}, part, plans.updates, plans.kept, step))

    def of(self, epoch: int) -> int:
        """Planned number of epochs, in the epoch with the index `epoch`."""
        return max(-(-self._plans.end // self._plans.per_epoch), epoch + 1)

    def _run_updates(
        self, epoch: int, examples: Iterator[Batch], begin: int, end: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Run the updates of an epoch from `begin` to `end` or to the end of the plan, and at least one."""
        plans = self._plans
        results: list[tuple[Tensor, Tensor]] = []
        for step in range(begin, end):
            if results:
                self._review(step, results)
            if results and plans.ended():
                break
            results.append(self._update(epoch, step, next(examples)))
            plans.updates = epoch * plans.per_epoch + step + 1
        return results

    def _review(self, step: int, results: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Make a new plan after `step` updates of an epoch, the last of them those of `results`, if one is due."""
        if self._plans.due():
            results[-1][0].item()  # waits for the device, so that the time includes all updates
            self._plans.review(step)

    def _in_tail(self, epoch: int) -> bool:
        """Whether the weights at the end of an epoch are part of the SWA mean."""
        how = self._how
        if self._plans.paced:
            return self._plans.share > 1 - how.tail
        return epoch >= how.epochs - max(round(how.tail * how.epochs), 1)

    def _updates_to_check(self, guard: EpochGuard) -> int:
        """Number of updates until the next check of the guard. It is smaller within a short budget, because a failed
        check costs these updates.
        """
        if not self._plans.paced:
            return guard.every
        return min(guard.every, max(self._plans.end // _CHECKS, _BETWEEN_CHECKS))

    def _guard_passes(self, guard: EpochGuard, epoch: int, begin: int) -> bool:
        """Whether the guard's check passes, with torch's random numbers fixed by epoch and step."""
        with drawing(self._rng.at("guard", epoch, begin), self._data.ids.device):
            return guard.passes()

    def _update(self, epoch: int, step: int, examples: Batch) -> tuple[Tensor, Tensor]:
        """Run one update; return its loss and the number of correctly classified examples."""
        how, update_rng, n_done = self._how, self._rng.at(epoch, step), epoch * self._plans.per_epoch + step
        plan = self._plans.at(n_done)
        self._optimisation.prepare(n_done, plan, self._plans.first_end)
        batch_rng = self._rng.at(
            epoch, step - step % self._replays
        )  # a replayed batch has the same augmentation
        batch, rows = self._augmented(examples, batch_rng, n_done), examples.ids
        batch, mixed_in, own_share = cut_and_mixed(batch, how.cutmix, batch_rng)
        factor, masks = 1.0, update_rng
        if processes() > 1:
            masks = update_rng.at("share", rank())  # each process has other examples and other dropout masks
            own_rows = share(torch.arange(len(rows), device=rows.device))
            batch, mixed_in, factor = (
                batch.take(own_rows),
                mixed_in.take(own_rows),
                mean_factor(len(own_rows), len(rows)),
            )
        batch = batch.at(laid_out(batch.x, how.layout))

        def measured() -> tuple[Tensor, Tensor]:
            with computing(how.precision, rows.device):
                value, hits = self._loss(batch, x_adv)
                # two batches with hard labels instead of mixed ones, so that no loss needs soft labels
                value = (
                    value if own_share == 1 else torch.lerp(self._loss(mixed_in, x_adv)[0], value, own_share)
                )
                if how.immunity is not None:
                    value = value + how.immunity(self._model, update_rng)
            return factor * value, hits

        with torch.enable_grad(), drawing(masks, rows.device):
            done = plan.done(n_done)
            grown = how.overshoot * (1.0 if done >= how.warmup else done / how.warmup)
            update = Update(update_rng, epoch, done, grown)
            with computing(how.precision, rows.device):
                x_adv = self._inner(batch, update)
            self._optimisation.zero_grad()
            if self._private:
                value, hits = self._loss(batch, x_adv)
            else:
                with perturbed(self._model, lambda: measured()[0], how.awp):
                    value, hits = measured()
                    refuse_cut(value)
                    value.backward()  # type: ignore[no-untyped-call]
        # with awp, the gradient at the perturbed weights is applied to the restored ones
        average(weight.grad for weight in self._parameters)
        if how.clip is not None:
            nn.utils.clip_grad_norm_(self._parameters, how.clip)
        self._optimisation.step()
        # batch norm has used other examples in each process
        average(chain(self._model.buffers(), self._state.values()))
        # before the average, which then consists of weights within the constraint
        if self._settle is not None:
            self._settle()
        if how.averaging == "ema":
            ema(self._average, self._model, how.average, n_done)
        return value.detach(), hits

    def _augmented(self, batch: Batch, rng: Draws, n_done: int) -> Batch:
        """The batch with its augmentation, of which a function of the user may use torch's random numbers too."""
        augment = self._how.augment
        if isinstance(augment, str):
            return augmented(batch, augment, rng)
        with drawing(rng.at("augment"), batch.x.device):
            return augmented_by(
                augment, batch, self._bounds, rng, f"update {n_done + 1:,} of {self._plans.end:,}"
            )

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors that are needed to resume the training, by name. They are not copied, so later updates
        change them.
        """
        tensors = {WEIGHTS + name: value for name, value in self._model.state_dict().items()}
        tensors |= {AVERAGE + name: value for name, value in self._average.items()}
        tensors |= {STATE + name: value for name, value in self._state.items()}
        return tensors | self._optimisation.tensors()

    def copies(self) -> dict[str, Tensor]:
        """Return copies of these tensors on the CPU, which later updates do not change."""
        # on a CPU `cpu` returns the tensor itself
        return {name: copy_of_tensor(value.cpu()) for name, value in self.tensors().items()}

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: copy_of_tensor(value) for name, value in self.tensors().items()}

    def restore(
        self, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor] = MappingProxyType({})
    ) -> None:
        """Restore the model, the average of its weights and the optimiser from the tensors of a checkpoint. Of the
        state of the loss, only the entries in `state` are restored.
        """
        self._model.load_state_dict(without_prefix(tensors, WEIGHTS))
        for name, value in without_prefix(tensors, AVERAGE).items():
            self._average[name].copy_(value)
        for name, value in without_prefix(tensors, STATE).items():
            if (
                name in state and state[name].shape == value.shape
            ):  # the shape differs if the batch size was reduced because memory ran out
                state[name].copy_(value)
        self._optimisation.restore(tensors)


@dataclass
class _Sums:
    """Losses and number of correct examples in the completed part of an epoch."""

    losses: Tensor
    """loss of each update, averaged over the processes"""
    right: Tensor
    """number of correctly classified examples in all processes"""
    own: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """loss and number of correct examples of each later update, in this process"""

    @classmethod
    def begun(cls, checkpoint: Checkpoint | None, device: torch.device) -> "_Sums":
        """Return the sums of a checkpoint within an epoch, or those before the first update."""
        if checkpoint is None:
            return cls(torch.zeros(0, device=device).double(), torch.zeros((), device=device).double())
        tensors = checkpoint.tensors
        return cls(tensors[_LOSSES].to(device), tensors[_RIGHT].to(device))

    def gather(self) -> None:
        """Include the updates of all processes since the last call."""
        if not self.own:
            return
        losses, right = (torch.stack([*values]).double() for values in zip(*self.own, strict=True))
        right = right.sum()
        average((losses, right))
        # a mean of counts is rounded
        self.losses = torch.cat([self.losses, losses])
        self.right = self.right + (processes() * right).round()
        self.own = []


@contextmanager
def drawing(rng: Draws, device: torch.device | None = None) -> Iterator[None]:
    """Context manager inside which PyTorch's global random generators, which dropout uses, are seeded from `rng`. Their
    former state is restored on exit.

    With `device`, only the CPU generator and that of this GPU are seeded; without it, those of all GPUs.
    """
    key = rng.at("torch").key >> 1
    with torch.random.fork_rng(None if device is None else [device] if device.type == "cuda" else []):
        if device is None:
            torch.manual_seed(key)
        else:
            torch.default_generator.manual_seed(key)
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(key)
        yield


def optimizer_for(parameters: list[nn.Parameter], how: Training) -> torch.optim.Optimizer:
    """Return the optimiser of a training for its parameters. Raises the errors of `optimizer_of`."""
    if not isinstance(how.optimizer, str):
        return optimizer_of(how.optimizer, parameters)
    decay = how.decay or 0.0
    if how.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, how.lr, how.momentum, weight_decay=decay, nesterov=how.momentum > 0
        )
    return torch.optim.AdamW(parameters, how.lr, weight_decay=decay)


def refuse_unusable(model: Classifier, how: Training, data: TrainingData, replays: int) -> None:
    """Raise an error for functions of the user from which no optimiser or no scheduler of a network can be made, or
    which do not augment the first examples of the data as expected.
    """
    if not isinstance(how.augment, str):
        rows = torch.arange(min(how.batch, len(data)), device=data.y.device)
        first, results = data.take(rows), []
        for _ in range(2):
            with drawing(Draws(0).at("augment"), first.x.device):
                results.append(augmented_by(how.augment, first, model.bounds, Draws(0)).x)
        if not torch.equal(*results):
            raise UsageError(
                "augment returned different inputs for the same batch and the same generator, so that a training could "
                "not be resumed exactly; draw all random numbers from the generator, or from torch"
            )
    if not isinstance(how.optimizer, str):
        optimizer_for([weight for weight in model.parameters() if weight.requires_grad], how)
    if how.pacing is None:
        refuse_unusable_schedule(model, how, how.epochs * updates(len(data), how.batch) * replays)


def refuse_unusable_schedule(model: nn.Module, how: Training, total: int) -> None:
    """Raise an error for a function of the user from which no scheduler can be made for `total` updates."""
    if not isinstance(how.schedule, str):
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        scheduler_of(how.schedule, optimizer_for(weights, how), total)
