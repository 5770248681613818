"""Trains one attempt of a hardening, i.e. one recipe, within its time budget and in batches that fit into memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from holdfast.core.checkpoint import STATE, Checkpoint, without_prefix
from holdfast.core.errors import LostLoss
from holdfast.io.models.weights import digest_of_weights, written
from holdfast.recipes.training.fit import Training
from holdfast.recipes.training.overfitting import RAISED
from holdfast.recipes.training.recipe import facts_of
from holdfast.runs.assess.request import Subject
from holdfast.runs.engine.run import Run
from holdfast.runs.harden import checkpoints
from holdfast.runs.harden.candidates import Candidate, announced_s
from holdfast.runs.harden.checkpoints import BEST, LAST, Point, last_epoch
from holdfast.runs.harden.epochs import Trainer, ended_by
from holdfast.runs.harden.hardened import MODEL, Made, structure_metadata
from holdfast.runs.harden.pace import Clock, Pacer, smaller
from holdfast.runs.store.files import usable, write_atomically


@dataclass(frozen=True)
class AttemptBudget:
    """Time budget of an attempt."""

    seconds: float
    """seconds for the planning, all attempts before and this one"""
    spent_s: float
    """seconds of the planning and of all attempts before"""

    @property
    def left_s(self) -> float:
        """Seconds that are left for this attempt."""
        return self.seconds - self.spent_s


@dataclass(frozen=True)
class AttemptTraining:
    """Trains a copy of the model with the recipe of one attempt of a hardening."""

    subject: Subject
    trainer: Trainer
    plan: Mapping[str, Any]
    """plan of the hardening: `attempts`, `budget_s` (None if the epochs of the recipe are used) and `planning_s`"""
    metadata: Mapping[str, str]
    """metadata for the file with the weights of the model"""
    clock: Clock

    def budget(self, earlier: Sequence[Made]) -> AttemptBudget | None:
        """Return the time budget of the attempt after the attempts `earlier`; None if the epochs of the recipe are
        used.

        The first attempt has the budget of the hardening. All later ones together have the same time once more, and
        what the first one left of it.
        """
        budget_s = self.plan["budget_s"]
        if budget_s is None:
            return None
        spent_s = self.plan["planning_s"] + sum(point.wall_s for made in earlier for point in made.curve)
        return AttemptBudget(announced_s(budget_s, len(earlier) + 1), spent_s)

    def trained(
        self,
        place: Path,
        candidate: Candidate,
        attempt: Mapping[str, Any],
        budget: AttemptBudget | None,
        run: Run,
    ) -> Made:
        """Train until the training is finished, with checkpoints in the folder `place`, and return the model of the
        best checkpoint.
        """
        curve = self._curve(place, candidate, attempt, budget, run)
        best, last = checkpoints.saved(place, BEST), checkpoints.saved(place, LAST)
        assert best is not None and last is not None
        new = self._new_model(best.checkpoint, candidate)
        state = last.checkpoint.tensors.get(STATE + RAISED)
        guard_steps = 0 if state is None else int(state)
        # if the budget left no update, no checkpoint records the end
        start = self.trainer.start(candidate.recipe)
        end_reason = ended_by(last.checkpoint, curve, candidate.recipe.training, start) or "budget"
        plans = len(last.checkpoint.plans)
        kept = without_prefix(best.checkpoint.tensors, STATE)
        return Made(candidate, attempt, new, curve, best.curve[-1], guard_steps, end_reason, plans, kept)

    def resumed(
        self, place: Path, candidate: Candidate, attempt: Mapping[str, Any], budget: AttemptBudget | None
    ) -> str:
        """Return a message that states where the training with checkpoints in the folder `place` continues. It is empty
        if there is no checkpoint.
        """
        settings = _settings(candidate, attempt, budget)
        last = checkpoints.saved(place, LAST)
        curve = () if last is None else last.curve
        training = f"training by {candidate.name}"
        if last is not None and ended_by(
            last.checkpoint, curve, settings, self.trainer.start(candidate.recipe)
        ):
            return f"{training} is complete"
        batch = checkpoints.saved_batch(place) or settings.batch
        latest = checkpoints.saved_within(place, last_epoch(curve), batch) or last
        if latest is None:
            return ""
        n_epochs, n_updates = latest.checkpoint.epoch, latest.checkpoint.step
        done = [f"epoch {n_epochs}"] if n_epochs else []
        if n_updates:
            done.append(f"{n_updates:,} {'update' if n_updates == 1 else 'updates'} of epoch {n_epochs + 1}")
        left = ""
        if budget is not None:
            left = f"; {max(budget.seconds - _spent_s(place, budget), 0):.3g} s of the budget are left"
        return f"{training} continues after {' and '.join(done)}{left}"

    def _curve(
        self,
        place: Path,
        candidate: Candidate,
        attempt: Mapping[str, Any],
        budget: AttemptBudget | None,
        run: Run,
    ) -> tuple[Point, ...]:
        """Train, and return the curve over all epochs. The last and the best checkpoint are in their files."""
        settings = _settings(candidate, attempt, budget)
        if budget is not None:
            settings = replace(settings, pacing=self._pacer(place, attempt, budget))
        batch = checkpoints.saved_batch(place) or settings.batch
        while True:
            try:
                sized = replace(settings, batch=batch, lr=settings.lr * batch / settings.batch)
                return self.trainer.course(place, candidate, sized, run)
            except (RuntimeError, MemoryError) as error:
                batch = smaller(batch, error)
                with run.stopper.finishing():
                    checkpoints.save_batch(place, batch)
            except LostLoss as error:
                raise error.ended(self._save_best(place, candidate)) from error

    def _pacer(self, place: Path, attempt: Mapping[str, Any], budget: AttemptBudget) -> Pacer:
        """The pacer for the rest of the budget, after the planning, earlier attempts and the epochs that are done."""
        spent_s = _spent_s(place, budget)
        return Pacer(budget.seconds, attempt["epoch_s"], attempt["evaluation_s"], spent_s, self.clock)

    def _save_best(self, place: Path, candidate: Candidate) -> str:
        """Save the best model so far, if there is one, and return a sentence with its path."""
        best, last = checkpoints.saved(place, BEST), checkpoints.saved(place, LAST)
        if best is None or last is None:
            return "no epoch had been finished"
        net = self._new_model(best.checkpoint, candidate).model.net
        assert isinstance(net, nn.Module)
        path = place / MODEL
        with usable(path):
            write_atomically(path, written(net, {**self.metadata, **structure_metadata(net)}))
        return f"the best of the {last_epoch(last.curve)} epochs before is in {str(path)!r}"

    def _new_model(self, checkpoint: Checkpoint, candidate: Candidate) -> Subject:
        new = facts_of(candidate.recipe).network(self.subject.model)
        checkpoint.put_into(new)
        name = f"{self.subject.card.get('name', 'model')}, {candidate.name}"
        card = {**self.subject.card, "name": name}
        if facts_of(candidate.recipe).new_network:
            card["parameters"] = sum(weight.numel() for weight in new.parameters())
            card |= {"access": new.access, "output": new.output}
        assert isinstance(new.net, nn.Module)
        digest = digest_of_weights(new.net.state_dict())  # of the tensors in the file of the new model
        return replace(self.subject, model=new.eval(), digest=digest, card=card)


def _settings(candidate: Candidate, attempt: Mapping[str, Any], budget: AttemptBudget | None) -> Training:
    """The settings of the training of an attempt."""
    settings = candidate.recipe.training
    if budget is None:
        return settings
    # a recipe with its own loop uses the epochs of the first plan
    return replace(settings, epochs=max(int(attempt["epochs"]), 1), lr=attempt.get("lr") or settings.lr)


def _spent_s(place: Path, budget: AttemptBudget) -> float:
    """Seconds of the planning, of earlier attempts, and of the stored part of this one."""
    last = checkpoints.saved(place, LAST)
    curve = () if last is None else last.curve
    in_epoch_s = checkpoints.seconds_within(place, last_epoch(curve))
    return budget.spent_s + sum(point.wall_s for point in curve) + in_epoch_s
