"""Genetic search: an attack on tables that needs scores, by crossover and mutation of valid rows.

After MOEVA of Simonetto et al., "A Unified Framework for Adversarial Attack and Defense in Constrained Feature Space",
IJCAI 2022, arXiv:2112.01156. Differs from the paper: rows are repaired instead of being ranked by their violations, and
those beyond the budget are moved back, so that the margin alone ranks them.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.attacks.parts.images import decisions, evaluated, expect_table
from holdfast.attacks.parts.losses import Best
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Fraction, Inputs, Steps
from holdfast.threats.tables import Table


@dataclass(frozen=True)
class GeneticSearch:
    """Searches valid rows by a genetic algorithm with one population for each example."""

    population: Steps = 30
    """number of rows of each example that are kept"""
    generations: Steps = 80
    """number of times that every row of a population gets a child"""
    mutation: Fraction = 0.08
    """fraction of the columns that a mutation changes, at least one"""

    needs: ClassVar[Access] = "scores"
    batched: ClassVar[bool] = True

    @property
    def queries(self) -> int:
        """Largest number of queries for each example."""
        return self.population * (self.generations + 1)

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        constraint, best = expect_table(threat.constraint, self), Best(batch)
        left = min(self.queries, threat.queries or self.queries)
        members = min(self.population, left)
        if not len(batch):
            return best.x
        with torch.no_grad():
            still = batch.x.expand(members, *batch.x.shape)
            start = _mutated(constraint, still, batch, 3 / batch.x.shape[1], rng.at("start"))
            rows, heights = evaluated(model, batch, constraint, start, best)
            for generation in range(self.generations):
                left -= members
                surviving = best.surviving
                if left < members or not len(surviving):
                    break
                subset, place = batch.take(surviving), rng.at("generation", generation)
                parents, of_parents = rows[:, surviving], heights[:, surviving]
                children = _crossed(parents, of_parents, subset, place)
                children = _mutated(constraint, children, subset, self.mutation, place.at("mutation"))
                children, of_children = evaluated(model, subset, constraint, children, best)
                together, all_heights = torch.cat((parents, children)), torch.cat((of_parents, of_children))
                kept = all_heights.argsort(dim=0, stable=True)[:members]
                heights[:, surviving] = all_heights.gather(0, kept)
                rows[:, surviving] = together.gather(0, kept[..., None].expand(-1, -1, batch.x.shape[1]))
        return best.x


def _crossed(parents: Tensor, heights: Tensor, batch: Batch, rng: Draws) -> Tensor:
    """Return as many children (members, n, columns) as parents: each column is that of one of two parents, which are
    the better ones of two random pairs.
    """
    members, n, columns = parents.shape
    pairs = rng.at("parents").integers(batch.ids, members, members, 2, 2).permute(1, 2, 3, 0)
    of_pairs = heights.expand(members, 2, members, n).gather(2, pairs)
    fitter = pairs.gather(2, of_pairs.argmin(2, keepdim=True))[:, :, 0]
    mothers, fathers = (
        parents.gather(0, fitter[:, side, :, None].expand(-1, -1, columns)) for side in range(2)
    )
    from_mother = rng.at("crossover").uniform(batch.ids, members, columns).transpose(0, 1) < 0.5
    return torch.where(from_mother, mothers, fathers)


def _mutated(constraint: Table, x: Tensor, batch: Batch, share: float, rng: Draws) -> Tensor:
    """Return rows (members, n, columns) in which each decision was changed with the probability `share`, and one at
    least: half of the numbers to any value within the budget of one column, the others back towards the clean row.
    """
    tensors, choices = constraint.tensors, decisions(constraint.tensors)
    members, _, columns = x.shape

    def uniform(name: str, size: int) -> Tensor:
        return rng.at(name).uniform(batch.ids, members, size, dtype=x.dtype).transpose(0, 1)

    low, high = (side.to(x.dtype) for side in tensors.limits(batch.x.double()))
    if constraint.rules.budget.norm != "l0":
        reach = tensors.unit.to(x) * constraint.eps
        low, high = torch.maximum(low, batch.x - reach), torch.minimum(high, batch.x + reach)
    back = x + (batch.x - x) * uniform("back", columns)
    proposed = torch.where(
        uniform("side", columns) < 0.5, back, low + (high - low) * uniform("value", columns)
    )
    codes = (uniform("category", columns) * (tensors.high.to(x) + 1)).floor()
    proposed = torch.where(tensors.category.to(x.device), codes, proposed)
    one = rng.at("one").integers(batch.ids, len(choices), members).T
    picked = (uniform("pick", len(choices)) < share) | torch.nn.functional.one_hot(one, len(choices)).bool()
    changed = x.clone()
    for k, decision in enumerate(choices):
        if len(decision) == 1:
            (place,) = decision
            changed[..., place] = torch.where(picked[..., k], proposed[..., place], x[..., place])
            continue
        places = torch.tensor(decision, device=x.device)
        one_hot = torch.nn.functional.one_hot(proposed[..., places].argmax(-1), len(decision)).to(x.dtype)
        changed[..., places] = torch.where(picked[..., k, None], one_hot, x[..., places])
    return changed
