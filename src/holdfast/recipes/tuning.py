"""PGD adversarial training whose settings are searched first, by successive halving on reserved examples.

Jamieson & Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", AISTATS 2016,
arXiv:1502.07943. Differs from the paper: each round trains its candidates from the given weights again, because the
schedules of learning rate and eps depend on the length of a training.
"""

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from holdfast.core.batch import Batch, TrainingData
from holdfast.core.draws import Draws
from holdfast.core.errors import Remedy, UsageError
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.training import STATE, Checkpoint
from holdfast.core.types import Fraction, Steps
from holdfast.recipes.pgd_training import PGDTraining
from holdfast.recipes.training.fit import Training, updates
from holdfast.recipes.training.learner import Learner, trained
from holdfast.recipes.training.recipe import Finished, RecipeFacts, reserved, robust_share
from holdfast.recipes.training.weights import twin

_CHOICES = tuple(product((1.25, 2.5, 5.0), (0.1, 0.25, 0.5), (0.1, 1.0, 3.0)))
"""reach of the attack, warm-up of eps, and weight decay in multiples of the setting"""
_USUAL = _CHOICES.index((2.5, 0.25, 1.0))
_CHOSEN, _SCORES, _TRIED = "chosen", "scores", "tried"


@dataclass(frozen=True)
class Tuning(RecipeFacts):
    """Searches the step size of the attack, the growth of eps and the weight decay in short trainings, and then trains
    with the best of them.
    """

    search: Annotated[float, Gt(0), Lt(1)] = 0.25
    """fraction of the updates that the search takes; a search that is interrupted begins again"""
    candidates: Annotated[int, Ge(2), Le(len(_CHOICES))] = 8
    """number of settings that are compared: the usual ones, and others that are drawn at random; each round keeps the
    better half"""
    steps: Steps = 4
    """number of gradient steps of the inner attack"""
    label_smoothing: Fraction = 0.0
    """fraction of each label that is spread evenly over all classes"""
    training: Training = field(default_factory=Training)

    keeps_state: ClassVar[bool] = True

    def __call__(
        self,
        model: Classifier,
        data: TrainingData,
        threat: ThreatModel,
        *,
        rng: Draws,
        after: Checkpoint | None = None,
    ) -> Iterator[Checkpoint]:
        if not isinstance(self.training.optimizer, str):
            raise UsageError(
                "tune searches the weight decay, which the function in recipe.training.optimizer determines; name an "
                "optimiser",
                Remedy("recipe", "pgd"),
            )
        if self.training.warmup != Training().warmup:
            raise UsageError(
                f"tune searches the warm-up of eps, and recipe.training.warmup sets it to {self.training.warmup:g}; "
                "leave it out",
                Remedy("recipe", "pgd"),
            )
        rest, held_out = reserved(data, rng)
        self._training(_USUAL, self.training, {}, model, rest, threat, rng)  # refuses what cannot be trained
        return self._trained(model, rest, held_out, threat, rng, after)

    def _trained(
        self,
        model: Classifier,
        rest: TrainingData,
        held_out: Batch,
        threat: ThreatModel,
        rng: Draws,
        after: Checkpoint | None,
    ) -> Iterator[Checkpoint]:
        """Search, unless the training continues or is only timed, and train with the best settings."""
        if after is not None:
            state = {name: after.tensors[STATE + name].to(rest.y) for name in (_CHOSEN, _TRIED)}
            state[_SCORES] = after.tensors[STATE + _SCORES].to(rest.y.device)
        elif self.training.trial:
            state = {_CHOSEN: rest.y.new_full((1,), _USUAL)}
        else:
            state = self._searched(model, rest, held_out, threat, rng.at("search"))
        chosen = int(state[_CHOSEN])
        yield from self._training(chosen, self.training, state, model, rest, threat, rng, after)

    def _searched(
        self, model: Classifier, rest: TrainingData, held_out: Batch, threat: ThreatModel, rng: Draws
    ) -> dict[str, Tensor]:
        """Return the number of the best settings, those of all compared ones, and their scores in each round, with -1
        after they were dropped.
        """
        ids = torch.arange(len(_CHOICES), device=rest.y.device)
        order = [k for k in rng.at("candidates").bits(ids).argsort().tolist() if k != _USUAL]
        tried = [_USUAL, *order][: self.candidates]
        scores: list[list[float]] = []
        left, n_rounds = list(tried), math.ceil(math.log2(len(tried)))
        per_round = self.search * self.training.epochs * updates(len(rest), self.training.batch) / n_rounds
        while len(left) > 1:
            n, at = max(int(per_round / len(left)), 1), rng.at("round", len(scores))
            robust = {k: self._score(k, n, model, rest, held_out, threat, at) for k in left}
            scores.append([robust.get(k, -1.0) for k in tried])
            left = sorted(left, key=lambda k: -robust[k])[: (len(left) + 1) // 2]
        found = torch.tensor([scores], dtype=torch.float64, device=rest.y.device)
        return {_CHOSEN: rest.y.new_tensor(left), _TRIED: rest.y.new_tensor([tried]), _SCORES: found}

    def _score(
        self,
        k: int,
        n_updates: int,
        model: Classifier,
        rest: TrainingData,
        held_out: Batch,
        threat: ThreatModel,
        rng: Draws,
    ) -> float:
        """Return the robust accuracy on reserved examples after a training of about `n_updates` updates."""
        per_epoch = updates(len(rest), self.training.batch)
        n_epochs = max(n_updates // per_epoch, 1)
        rows = rng.at("examples").bits(rest.ids).argsort()[: min(n_updates, per_epoch) * self.training.batch]
        how = replace(self.training, epochs=n_epochs, pacing=None, saving=None)
        part = rest.take(rows.sort().values)
        *_, last = self._training(k, how, {}, model, part, threat, rng)
        new = deepcopy(model)
        last.put_into(new)
        return robust_share(Learner(new, twin(new), threat), held_out)

    def _training(
        self,
        k: int,
        how: Training,
        state: dict[str, Tensor],
        model: Classifier,
        data: TrainingData,
        threat: ThreatModel,
        rng: Draws,
        after: Checkpoint | None = None,
    ) -> Iterator[Checkpoint]:
        """Return the checkpoints of a training with the settings of the number `k`."""
        reach, warmup, factor = _CHOICES[k]
        pgd = PGDTraining(self.steps, reach, label_smoothing=self.label_smoothing)
        how = replace(how, warmup=warmup, weight_decay=factor * (how.decay or 0.0))
        loop = pgd.loop(model, data, threat, rng=rng, after=after)
        return trained(replace(loop, how=how, state=state, in_one_process=True))

    def follow_up(self, finished: Finished) -> tuple[dict[str, Any], str]:
        """Return the compared settings with their robust accuracies on reserved examples, and the chosen ones."""
        state, decay = finished.state, self.training.decay or 0.0

        def settings(k: int) -> dict[str, float]:
            reach, warmup, factor = _CHOICES[k]
            return {"reach": reach, "warmup": warmup, "weight_decay": factor * decay}

        tried, scores = state[_TRIED][0].tolist(), state[_SCORES][0].T.tolist()
        chosen = settings(int(state[_CHOSEN]))
        compared = [
            {**settings(k), "robust": [share for share in shares if share >= 0]}
            for k, shares in zip(tried, scores, strict=True)
        ]
        text = ", ".join(f"{name} {value:g}" for name, value in chosen.items())
        return {"chosen": chosen, "compared": compared}, f"of {len(tried)} settings, the search chose {text}"
