"""The plans of one training: how many updates it has, and where its schedules stand at each of them.

Without a budget of time there is one plan, by the number of epochs. Within one, a plan is made before each epoch, after
it, and in between as often as the last plan asks for. What an update does follows from the plans alone, so that a
training that is stopped goes on exactly from the plans of its checkpoint.
"""

from collections.abc import Callable
from dataclasses import replace

from holdfast.core.checkpoint import Checkpoint, TrainingPlan
from holdfast.ops.distributed import broadcast

Pacing = Callable[[int, int, int, TrainingPlan | None], TrainingPlan]
"""Plans how many updates a training has: from the updates that are done, those of the present epoch that are done, the
updates of an epoch, and the plan before."""


class Plans:
    """The plans that were made so far, in their order."""

    def __init__(self, epochs: int, per_epoch: int, pacing: Pacing | None) -> None:
        self.per_epoch, self._pacing = per_epoch, pacing
        whole = epochs * per_epoch
        self._made = [TrainingPlan(0, 0.0, whole, whole)] if pacing is None else []
        self.updates = 0
        """that are done"""

    @property
    def paced(self) -> bool:
        """Whether there is a budget of time."""
        return self._pacing is not None

    @property
    def end(self) -> int:
        """Updates in all, by the last plan."""
        return self._made[-1].end

    def resume(self, after: Checkpoint) -> None:
        """Go on from a checkpoint, with epochs of as many updates as this training has, which may be others."""
        self.updates = after.epoch * self.per_epoch
        if not self.paced or not after.plans:
            return
        self._made, last = list(after.plans), after.plans[-1]
        if after.updates >= last.end:
            self.updates = after.updates
        elif after.updates != self.updates:  # batches became smaller when memory ran out
            times = self.updates / after.updates
            share, update_s = last.done(after.updates), last.update_s / times
            end = max(round(last.end * times), self.updates + 1)
            self._made.append(
                replace(last, at=self.updates, share=share, end=end, review=end, update_s=update_s)
            )

    def ended(self) -> bool:
        """Whether all planned updates are done."""
        return bool(self._made) and self.updates >= self.end

    def due(self) -> bool:
        """Whether the last plan asks for another one here."""
        return self.paced and self.updates >= self._made[-1].review

    def review(self, position: int) -> None:
        """Plan again after so many updates of an epoch; several processes go by the clock of the first."""
        if self._pacing is not None and not self.ended():
            last = self._made[-1] if self._made else None
            self._made.append(broadcast(self._pacing(self.updates, position, self.per_epoch, last)))

    def rewind(self, updates: int, position: int) -> None:
        """Go back to so many updates, of which `position` are of the epoch; the time that was spent stays spent.

        As many updates are left as would be left without going back.
        """
        if self.paced:
            share = self.at(updates).done(updates)
            self.review(position + self.updates - updates)
            left = max(self.end - self.updates, 0)
            end = updates + left
            again = replace(
                self._made[-1], at=updates, share=share, end=end, review=updates + 1, rewound=True
            )
            self._made.append(again)
        self.updates = updates

    def at(self, updates: int) -> TrainingPlan:
        """The plan that decides the update after so many."""
        return next(plan for plan in reversed(self._made) if plan.at <= updates)

    @property
    def share(self) -> float:
        """Share of the schedules that is done."""
        return self.at(self.updates).done(self.updates)

    @property
    def kept(self) -> tuple[TrainingPlan, ...]:
        """What a checkpoint keeps of them: all, where there is a budget of time."""
        return tuple(self._made) if self.paced else ()
