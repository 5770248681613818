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
from holdfast.runs.harden.epochs import EndedBy, Trainer, ended_by
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


def budget_of(plan: Mapping[str, Any], earlier: Sequence[Made]) -> AttemptBudget | None:
    """Return the time budget of the attempt after the attempts `earlier`, by the plan of the hardening; None if the
    epochs of the recipe are used.

    The first attempt has the budget of the hardening. All later ones together have the same time once more, and what
    the first one left of it.
    """
    budget_s = plan["budget_s"]
    if budget_s is None:
        return None
    spent_s = plan["planning_s"] + sum(point.wall_s for made in earlier for point in made.curve)
    return AttemptBudget(announced_s(budget_s, len(earlier) + 1), spent_s)


@dataclass(frozen=True)
class AttemptTraining:
    """Trains a copy of the model with the recipe of one attempt of a hardening."""

    subject: Subject
    trainer: Trainer
    candidate: Candidate
    attempt: Mapping[str, Any]
    """entry of the plan of the hardening"""
    budget: AttemptBudget | None
    place: Path
    """folder with the checkpoints"""
    metadata: Mapping[str, str]
    """metadata for the file with the weights of the model"""
    clock: Clock

    def trained(self, run: Run) -> Made:
        """Train until the training is finished, and return the model of the best checkpoint."""
        curve = self._curve(run)
        best, last = checkpoints.saved(self.place, BEST), checkpoints.saved(self.place, LAST)
        assert best is not None and last is not None
        state = last.checkpoint.tensors.get(STATE + RAISED)
        # if the budget left no update, no checkpoint records the end
        return Made(
            self.candidate,
            self.attempt,
            self._new_model(best.checkpoint),
            curve,
            best.curve[-1],
            0 if state is None else int(state),
            self._ended_by(last.checkpoint, curve, self.candidate.recipe.training) or "budget",
            len(last.checkpoint.plans),
            without_prefix(best.checkpoint.tensors, STATE),
        )

    @property
    def resumed(self) -> str:
        """Message that states where the training continues; empty if there is no checkpoint."""
        settings, last = self._settings, checkpoints.saved(self.place, LAST)
        curve = () if last is None else last.curve
        training = f"training by {self.candidate.name}"
        if last is not None and self._ended_by(last.checkpoint, curve, settings):
            return f"{training} is complete"
        batch = checkpoints.saved_batch(self.place) or settings.batch
        latest = checkpoints.saved_within(self.place, last_epoch(curve), batch) or last
        if latest is None:
            return ""
        n_epochs, n_updates = latest.checkpoint.epoch, latest.checkpoint.step
        done = [f"epoch {n_epochs}"] if n_epochs else []
        if n_updates:
            done.append(f"{n_updates:,} {'update' if n_updates == 1 else 'updates'} of epoch {n_epochs + 1}")
        left = ""
        if self.budget is not None:
            left_s = max(self.budget.seconds - self._spent_s(self.budget), 0)
            left = f"; {left_s:.3g} s of the budget are left"
        return f"{training} continues after {' and '.join(done)}{left}"

    def _curve(self, run: Run) -> tuple[Point, ...]:
        """Train, and return the curve over all epochs. The last and the best checkpoint are in their files."""
        settings, budget = self._settings, self.budget
        if budget is not None:  # after the planning, earlier attempts and the epochs that are done
            pacer = Pacer(
                budget.seconds,
                self.attempt["epoch_s"],
                self.attempt["evaluation_s"],
                self._spent_s(budget),
                self.clock,
            )
            settings = replace(settings, pacing=pacer)
        batch = checkpoints.saved_batch(self.place) or settings.batch
        while True:
            try:
                sized = replace(settings, batch=batch, lr=settings.lr * batch / settings.batch)
                return self.trainer.course(self.place, self.candidate, sized, run)
            except (RuntimeError, MemoryError) as error:
                batch = smaller(batch, error)
                with run.stopper.finishing():
                    checkpoints.save_batch(self.place, batch)
            except LostLoss as error:
                raise error.ended(self._save_best()) from error

    def _ended_by(self, last: Checkpoint, curve: tuple[Point, ...], settings: Training) -> EndedBy | None:
        return ended_by(last, curve, settings, self.trainer.start(self.candidate.recipe))

    @property
    def _settings(self) -> Training:
        """The settings of the training."""
        settings = self.candidate.recipe.training
        if self.budget is None:
            return settings
        # a recipe with its own loop uses the epochs of the first plan
        epochs, lr = max(int(self.attempt["epochs"]), 1), self.attempt.get("lr")
        return replace(settings, epochs=epochs, lr=lr or settings.lr)

    def _spent_s(self, budget: AttemptBudget) -> float:
        """Seconds of the planning, of earlier attempts, and of the stored part of this one."""
        last = checkpoints.saved(self.place, LAST)
        curve = () if last is None else last.curve
        in_epoch_s = checkpoints.seconds_within(self.place, last_epoch(curve))
        return budget.spent_s + sum(point.wall_s for point in curve) + in_epoch_s

    def _save_best(self) -> str:
        """Save the best model so far, if there is one, and return a sentence with its path."""
        best, last = checkpoints.saved(self.place, BEST), checkpoints.saved(self.place, LAST)
        if best is None or last is None:
            return "no epoch had been finished"
        net = self._new_model(best.checkpoint).model.net
        assert isinstance(net, nn.Module)
        path = self.place / MODEL
        with usable(path):
            write_atomically(path, written(net, {**self.metadata, **structure_metadata(net)}))
        return f"the best of the {last_epoch(last.curve)} epochs before is in {str(path)!r}"

    def _new_model(self, checkpoint: Checkpoint) -> Subject:
        facts = facts_of(self.candidate.recipe)
        new = facts.network(self.subject.model)
        checkpoint.put_into(new)
        name = f"{self.subject.card.get('name', 'model')}, {self.candidate.name}"
        card = {**self.subject.card, "name": name}
        if facts.new_network:
            card["parameters"] = sum(weight.numel() for weight in new.parameters())
            card |= {"access": new.access, "output": new.output}
        assert isinstance(new.net, nn.Module)
        digest = digest_of_weights(new.net.state_dict())  # of the tensors in the file of the new model
        return replace(self.subject, model=new.eval(), digest=digest, card=card)
