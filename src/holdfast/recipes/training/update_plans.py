"""Plans of a training, which determine its number of updates and the progress of its schedules.

Without a time budget there is one plan, by the number of epochs. With one, a plan is made before and after each epoch,
and during it as often as the last plan requests. An update depends on the plans alone, so that a stopped training
resumes exactly from the plans of its checkpoint.
"""

import math
from collections.abc import Callable
from dataclasses import replace

from holdfast.core.training import Checkpoint, TrainingPlan
from holdfast.recipes.training.distributed import broadcast

Pacing = Callable[[int, int, int, TrainingPlan | None], TrainingPlan]
"""function that plans the number of updates of a training, from the number of completed updates, that of the current
epoch, the updates of an epoch, and the previous plan"""
_TRAINED = 9.0  # smallest time of training before an evaluation, in multiples of the time of the evaluation


def evaluation_interval(update_s: float, look_s: float, per_epoch: int) -> int:
    """Return the number of updates between two evaluations within a time budget: whole epochs, so that evaluations and
    checkpoints take at most about a tenth of the time.
    """
    epoch_s = max(per_epoch * update_s, 1e-9)
    return per_epoch * max(math.ceil(_TRAINED * look_s / epoch_s), 1)


def most_evaluations(updates_s: float, look_s: float) -> int:
    """Return the largest number of evaluations in the rest of a training whose updates take `updates_s` seconds."""
    return int(updates_s / max(_TRAINED * look_s, 1e-9)) + 1


class Plans:
    """All plans of a training so far, in order. Within a time budget, the number of updates is planned again as the
    training proceeds.
    """

    def __init__(self, epochs: int, per_epoch: int, pacing: Pacing | None) -> None:
        self.per_epoch, self._pacing = per_epoch, pacing
        n_updates = epochs * per_epoch
        self._plans = [TrainingPlan(0, 0.0, n_updates, n_updates)] if pacing is None else []
        self.updates = 0
        """number of completed updates"""

    @property
    def paced(self) -> bool:
        """Whether the training has a time budget, so that its number of updates is planned by the clock."""
        return self._pacing is not None

    @property
    def end(self) -> int:
        """Total number of updates of the training according to the last plan."""
        return self._plans[-1].end

    @property
    def first_end(self) -> int:
        """Total number of updates of the training according to the first plan."""
        return self._plans[0].end

    def resume(self, after: Checkpoint) -> None:
        """Continue the plans of a training from a checkpoint, also if the number of updates in an epoch has changed
        since then.
        """
        self.updates = after.epoch * self.per_epoch + after.step
        if not self.paced or not after.plans:
            return
        self._plans, last = list(after.plans), after.plans[-1]
        if after.updates >= last.end:
            self.updates = after.updates
        elif after.updates != self.updates:  # batches became smaller when memory ran out
            times = self.updates / after.updates
            share, update_s = last.done(after.updates), last.update_s / times
            end = max(round(last.end * times), self.updates + 1)
            at = self.updates
            self._plans.append(
                replace(last, at=at, share=share, end=end, review=end, update_s=update_s, looked=at)
            )

    def ended(self) -> bool:
        """Return whether all planned updates of the training are completed."""
        return bool(self._plans) and self.updates >= self.end

    def evaluated(self) -> bool:
        """Return whether the model is evaluated at the end of the current epoch. Without a time budget it always is,
        and otherwise after the first epoch, if enough updates were made since the last evaluation, and at the end.
        """
        if not self.paced or self.ended():
            return True
        last = self._plans[-1]
        interval = evaluation_interval(last.update_s, last.look_s, self.per_epoch)
        return not last.looked or self.updates - last.looked >= interval

    def due(self) -> bool:
        """Return whether a new plan of the training must be made now, as the last plan requested."""
        return self.paced and self.updates >= self._plans[-1].review

    def review(self, position: int) -> None:
        """Make a new plan of the training after `position` updates of an epoch, if there is a time budget. Several
        processes use the clock of the first one.
        """
        if self._pacing is not None and not self.ended():
            last = self._plans[-1] if self._plans else None
            # two clocks never agree, and all processes must end after the same update
            self._plans.append(broadcast(self._pacing(self.updates, position, self.per_epoch, last)))

    def rewind(self, updates: int, position: int) -> None:
        """Set the number of completed updates of the training back to `updates`, `position` of them in the current
        epoch, because later updates were undone. The used time does not change.

        The number of remaining updates is the same as without going back.
        """
        if self.paced:
            share = self.at(updates).done(updates)
            self.review(position + self.updates - updates)
            n_left = max(self.end - self.updates, 0)
            end = updates + n_left
            plan = replace(
                self._plans[-1], at=updates, share=share, end=end, review=updates + 1, rewound=True
            )
            self._plans.append(plan)
        self.updates = updates

    def at(self, updates: int) -> TrainingPlan:
        """Return the plan of the training that applies after `updates` updates."""
        return next(plan for plan in reversed(self._plans) if plan.at <= updates)

    @property
    def share(self) -> float:
        """Completed fraction of the training, on which the schedules of learning rate and eps depend."""
        return self.at(self.updates).done(self.updates)

    @property
    def kept(self) -> tuple[TrainingPlan, ...]:
        """Plans that a checkpoint of the training contains: all of them if there is a time budget, else none."""
        return tuple(self._plans) if self.paced else ()
