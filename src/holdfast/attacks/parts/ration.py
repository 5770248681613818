"""Wrapper of a model for several attacks that share a budget: it counts forward and backward passes of each example,
ends an attack at its limit, and records the best points that the attacks have queried.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.attacks.parts.losses import Best
from holdfast.core.batch import Batch, Lookup
from holdfast.core.constraints import Constraint, allowed
from holdfast.core.errors import BudgetSpent, TargetError, TargetLost, TargetRefused
from holdfast.core.meter import margin
from holdfast.core.model import Bounds, Model, out_of_memory
from holdfast.core.types import Ids, Inputs, Logits, PerExample, Rows

_FIRM = 10.0
"""Margin of a point at which the model raised an error, so that no attack continues there."""


class SharedBudget:
    """Model with a limit of forward and backward passes for each example.

    A call counts one forward pass for each row and, if the inputs need a gradient, one backward pass. It raises
    `BudgetSpent` before the model is evaluated if the limit of any example would be exceeded. With `exact`, every
    queried point inside the constraint is offered to `best`. An input for which the model raises an error is counted
    in `raised`, and its output is that of a correct prediction, so that the attack continues without it.
    """

    def __init__(self, model: Model, batch: Batch, constraint: Constraint, *, exact: bool) -> None:
        zeros = torch.zeros_like(batch.ids)
        self._model, self._batch, self._constraint = model, batch, constraint
        self.exact = exact
        """whether every queried point is offered to the best ones; False for a randomised model"""
        self._lookup, self._classes = Lookup(batch.ids), 0
        self.forwards, self.backwards, self.raised = zeros, zeros.clone(), zeros.clone()
        self.limits = zeros.clone()
        """largest number of passes of each example so far and in the current attack"""
        self.best = Best(batch)
        """best point of each example over all attacks"""
        self.own = Best(batch)
        """best point of each example in the current attack"""
        self.nearest: PerExample = torch.full_like(self.best.margin, torch.inf)
        """distance of the closest broken point of the current attack, also outside the constraint"""

    @property
    def bounds(self) -> Bounds:
        """Valid range of the inputs of the model."""
        return self._model.bounds

    @property
    def spent(self) -> Tensor:
        """Number of forward and backward passes of each example so far, int64 (n)."""
        return self.forwards + self.backwards

    def begin(self, rows: Rows, passes: int) -> None:
        """Begin an attack that may use `passes` more passes of each of the examples `rows`, and of no other one."""
        self.limits = self.spent
        self.allow(rows, passes)
        self.own, self.nearest = Best(self._batch), torch.full_like(self.nearest, torch.inf)

    def allow(self, rows: Rows, passes: int) -> None:
        """Set the limits of the examples `rows` to `passes` more than they have used."""
        self.limits[rows] = self.spent[rows] + passes

    def __call__(self, x: Inputs, ids: Ids | None = None) -> Logits:
        """Return the logits of `x`, counted as passes of `ids` (if None, all examples of the batch in order)."""
        ids = self._batch.ids if ids is None else ids
        rows = self._lookup.rows(ids)
        self._book(rows, backward=x.requires_grad and torch.is_grad_enabled())
        logits = self._answers(x, ids, rows)
        self._classes = logits.shape[1]
        if self.exact:
            self._record(x.detach(), logits.detach(), rows)
        return logits

    def _book(self, rows: Rows, *, backward: bool = False) -> None:
        """Count a forward and perhaps a backward pass of each row, if all of them have enough left."""
        forwards, backwards = self.forwards.index_add(0, rows, torch.ones_like(rows)), self.backwards
        if backward:
            backwards = backwards.index_add(0, rows, torch.ones_like(rows))
        if (forwards + backwards > self.limits).any():
            raise BudgetSpent("the passes of this attack are used")
        self.forwards, self.backwards = forwards, backwards

    def _answers(self, x: Inputs, ids: Ids, rows: Rows) -> Logits:
        """Logits of `x`; if the model raises an error, it is called with halves of the rows to find those that cause
        it. These calls are counted.

        An error at the first inputs, or at clean inputs that need a gradient, does not come from inputs far from the
        data; the latter may come from how an attack inspects the model.
        """
        try:
            return self._model(x, ids)
        except (TargetLost, TargetRefused):
            raise
        except (TargetError, RuntimeError, ValueError, ArithmeticError, LookupError) as error:
            inspected = x.requires_grad and torch.equal(x, self._batch.x[rows])
            if inspected or out_of_memory(error) or not self._classes:
                raise
        if len(x) > 1:
            half = len(x) // 2
            parts = (slice(0, half), slice(half, None))
            for part in parts:
                self._book(rows[part])
            return torch.cat([self._answers(x[part], ids[part], rows[part]) for part in parts])
        self.raised[rows] += 1
        judge, sign = (self._batch.y, 1) if self._batch.target is None else (self._batch.target, -1)
        firm = torch.zeros(1, self._classes, dtype=x.dtype, device=x.device)
        firm[0, judge[rows]] = sign * _FIRM
        return firm + 0 * x.flatten(1).sum(1, keepdim=True)

    def _record(self, x: Inputs, logits: Logits, rows: Rows) -> None:
        batch = self._batch
        judge = None if batch.target is None else batch.target[rows]
        margins = margin(logits, Batch(x, batch.y[rows], batch.ids[rows], judge))
        at = (~(margins >= self.own.margin[rows])).nonzero()[:, 0]
        if not len(at):
            return
        at = at[margins[at].nan_to_num(-torch.inf).argsort(stable=True)]
        broken = at[~(margins[at] > 0)]
        if len(broken):
            distance = self._constraint.distance(x[broken], batch.x[rows[broken]])
            self.nearest.scatter_reduce_(0, rows[broken], distance.to(self.nearest), "amin")
        at = at[allowed(self._constraint, x[at], batch.x[rows[at]], self.bounds)]
        order = rows[at].argsort(stable=True)
        at = at[order]
        first = torch.ones_like(at, dtype=torch.bool)  # the lowest margin of each example
        first[1:] = rows[at[1:]] != rows[at[:-1]]
        at = at[first]
        if len(at):
            for record in (self.own, self.best):
                record.offer(batch.take(rows[at]), x[at], margins[at])


@dataclass(frozen=True)
class Averaged:
    """A randomised model as the mean of its class probabilities over several forward passes, as logarithms. A model
    that returns labels only has the frequencies of its labels in their place.
    """

    model: Model
    draws: int

    @property
    def bounds(self) -> Bounds:
        """Valid range of the inputs of the model."""
        return self.model.bounds

    def __call__(self, x: Inputs, ids: Ids | None = None) -> Logits:
        """Return the logarithms of the mean probabilities of the inputs. Cost: `draws` passes."""
        mean = torch.stack([self.model(x, ids).softmax(1) for _ in range(self.draws)]).mean(0)
        return mean.clamp_min(torch.finfo(mean.dtype).tiny).log()
