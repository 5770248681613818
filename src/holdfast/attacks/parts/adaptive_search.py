"""Successive halving over attacks and settings of the adaptive search, and the share of the budget of each."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from holdfast.attacks.apgd import APGD
from holdfast.attacks.feature_transfer import FeatureTransfer
from holdfast.attacks.hop_skip_jump import HopSkipJump
from holdfast.attacks.parts.ascent import stable_ascent
from holdfast.attacks.parts.losses import Best, leeway, margin_loss
from holdfast.attacks.square import Square
from holdfast.attacks.stand_in import LEAST_PASSES, StandIn
from holdfast.core.batch import Batch, Lookup, spread
from holdfast.core.constraints import L1, L2, Constraint, Linf, Norm, allowed
from holdfast.core.draws import Draws
from holdfast.core.errors import BudgetSpent, TargetError, TargetLost, TargetRefused
from holdfast.core.evidence import METHOD_STATES, MethodState
from holdfast.core.meter import margin
from holdfast.core.model import AT_TIMES, VOTES, Bounds, Model, out_of_memory
from holdfast.core.outputs import SAME, change
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Ids, Inputs, Labels, Logits, PerExample, Rows

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


DRAWS = 8
"""forward passes over which the outputs of a randomised model are averaged for methods without gradients"""
NOISE = 0.25
"""length of the noise for expected gradients of a deterministic model, in multiples of eps"""
_STEPS = 100  # most steps of one ascent
_NEAREST = 3  # images of other classes from which a search with labels starts, for each example
_BEYOND = (2.0, 4.0)  # multiples of the best change so far, from which it starts as well

Run = Callable[[Model, Batch, ThreatModel, int, Draws], tuple[Inputs, int]]
"""function of a model, a batch, a threat model, the number of passes and random numbers; it returns the points that the
method reached, and the number of draws of a gradient (0 if it does not average)"""


def judging(*, randomised: bool) -> int:
    """Return the number of passes with which the points that a method returned are judged."""
    return VOTES if randomised else 1


@dataclass(frozen=True)
class Method:
    """A method of an adaptive search, and when it is applicable."""

    name: str
    needs: Access
    run: Run
    least: int
    """smallest number of passes for each example with which it is worth running"""
    norms: tuple[type[Norm], ...] = (Linf, L2, L1)
    for_random: Literal["averaged", "itself", "no"] = "averaged"
    """how it treats a randomised model: it queries an average over `DRAWS` outputs, averages itself, or is not
    applicable"""

    def state(self, threat: ThreatModel, passes: int, *, randomised: bool) -> MethodState:
        """Return the state of the method before the search runs: `not reached`, the initial state of an applicable
        method, or the reason why it is not applicable, such as `needs gradients` or `too few passes`.

        `passes` is the number of forward and backward passes that the search may use for each example.
        """
        if not threat.gives(self.needs):
            return "needs gradients" if self.needs == "gradients" else "needs scores"
        if not isinstance(threat.constraint, self.norms):
            return "other norm"
        if randomised and self.for_random == "no":
            return "randomised"
        least = self.cost(self.least, randomised=randomised) + judging(randomised=randomised)
        return "too few passes" if passes < least else "not reached"

    def cost(self, passes: int, *, randomised: bool) -> int:
        """Return the number of passes of the model for a number of passes of the method."""
        return passes * DRAWS if randomised and self.for_random == "averaged" else passes

    def points(
        self, model: Model, batch: Batch, threat: ThreatModel, passes: int, rng: Draws, *, randomised: bool
    ) -> tuple[Inputs, int]:
        """Run the method with at most `passes` passes of the model for each example."""
        if randomised and self.for_random == "averaged":
            return self.run(Averaged(model, DRAWS), batch, threat, passes // DRAWS, rng)
        return self.run(model, batch, threat, passes, rng)


def _margin(model: Model, batch: Batch, threat: ThreatModel, passes: int, rng: Draws) -> tuple[Inputs, int]:
    """APGD on the margin. Each of the `steps` + 1 points of a restart costs a forward and a backward pass."""
    steps = min(_STEPS, passes // 2 - 1)
    attack = APGD(loss=margin_loss, steps=steps, restarts=passes // (2 * (steps + 1)))
    return attack(model, batch, threat, rng=rng), 0


def _expected(
    model: Model, batch: Batch, threat: ThreatModel, passes: int, rng: Draws, noise: float = NOISE
) -> tuple[Inputs, int]:
    return stable_ascent(model, batch, threat.constraint, passes, noise, rng)


def _square(model: Model, batch: Batch, threat: ThreatModel, passes: int, rng: Draws) -> tuple[Inputs, int]:
    return Square(queries=passes)(model, batch, threat, rng=rng), 0


def _features(model: Model, batch: Batch, threat: ThreatModel, passes: int, rng: Draws) -> tuple[Inputs, int]:
    return FeatureTransfer(passes=passes)(model, batch, threat, rng=rng), 0


def _stand_in(model: Model, batch: Batch, threat: ThreatModel, passes: int, rng: Draws) -> tuple[Inputs, int]:
    return StandIn(passes=passes)(model, batch, threat, rng=rng), 0


METHODS: tuple[Method, ...] = (
    Method("features", "gradients", _features, 40, for_random="itself"),
    Method("stand-in", "labels", _stand_in, LEAST_PASSES, for_random="itself"),
    Method("margin", "gradients", _margin, 12, for_random="no"),
    Method("expectation", "gradients", _expected, 24, for_random="itself"),
    Method("square", "scores", _square, 20),
)
"""the methods that are compared on a few examples first"""


def no_search(model: Model, batch: Batch, threat: ThreatModel, passes: int, rng: Draws) -> tuple[Inputs, int]:
    """Return the inputs unchanged."""
    return batch.x, 0


LABELS = Method("labels", "labels", no_search, 30, norms=(Linf, L2))
"""the search with labels only, which is run last and starts from what the others reached"""


def starts(
    batch: Batch, best: Inputs, images: Tensor, predicted: Tensor, threat: ThreatModel
) -> tuple[Inputs, ...]:
    """Return the points from which a search with labels only starts: twice and four times the best change of each
    example so far, and the nearest other images of the class that the attack needs.

    `images` (m, *features) are the images to choose from, and `predicted` (m) their classes as the model predicts them.
    """
    points = [batch.x + factor * (best - batch.x) for factor in _BEYOND]
    distances = torch.stack(
        [threat.constraint.distance(image.expand_as(batch.x), batch.x) for image in images], dim=1
    )
    wanted = predicted != batch.y[:, None] if batch.target is None else predicted == batch.target[:, None]
    distances = distances.masked_fill(~wanted, torch.inf)
    for distance, row in zip(*(v.unbind(1) for v in distances.sort(stable=True, dim=1)), strict=True):
        if len(points) >= len(_BEYOND) + _NEAREST or not distance.isfinite().any():
            break
        # an example without another image keeps its clean input, which costs one query
        points.append(torch.where(spread(distance.isfinite(), batch.x), images[row], batch.x))
    return tuple(points)


PILOT = 16
"""largest number of examples on which the methods are compared"""
COLUMNS: tuple[str, ...] = (
    *(
        f"{method.name}.{value}"
        for method in (*METHODS, LABELS)
        for value in ("state", "forwards", "backwards", "broke")
    ),
    "draws", "raised", "changed",
)  # fmt: skip
"""names of the columns of a search"""
_FIRST = 64  # the first trial of a method has this part of the budget
_KEPT = 2  # methods that are run on all examples
_OF_LABELS = 4  # the search with labels only has this part of the budget at least
_LOOKED = 4  # passes after which a method may find that there is nothing for it to attack


@dataclass(eq=False)
class Account:
    """What one method did on each example of a batch."""

    method: Method
    state: MethodState
    forwards: Tensor
    backwards: Tensor
    broke: Tensor
    rank: tuple[float, float] = (0.0, 0.0)
    """examples broken in the last trial, and progress per pass"""


@dataclass
class Halving:
    """One adaptive search on a batch, with at most `passes` forward and backward passes for each example."""

    model: Model
    batch: Batch
    threat: ThreatModel
    passes: int
    rng: Draws
    methods: tuple[str, ...]
    draws: int = 0
    accounts: list[Account] = field(default_factory=list)
    clean: Logits | None = None
    """outputs for the clean inputs"""

    def run(self) -> tuple[Inputs, dict[str, Tensor]]:
        """Run the search, and return the best points and the columns `COLUMNS`."""
        zeros = torch.zeros_like(self.batch.ids)
        self.randomised, self.clean = False, None
        self.ration = SharedBudget(self.model, self.batch, self.threat.constraint, exact=True)
        self.accounts = [Account(m, "too few passes", zeros, zeros, zeros) for m in (*METHODS, LABELS)]
        with suppress(BudgetSpent):  # of the attacked model, which may count otherwise
            self.look()
            self.search()
        return self.ration.best.x, self.columns()

    def look(self) -> None:
        """Query the clean inputs twice, and find which methods are applicable."""
        batch, every = self.batch, torch.arange(len(self.batch), device=self.batch.x.device)
        self.ration.begin(every, min(2, self.passes))
        generators = _generators(batch.x.device)
        with torch.no_grad():
            clean = self.clean = self.ration(batch.x)
            again = clean if self.passes < 2 else self.ration(batch.x)
        self.predicted: Labels = clean.argmax(1)
        self.start: PerExample = margin(clean, batch)
        # labels of a randomised model may be the same in two passes, but they change the state of the generator
        drawn = not torch.equal(generators, _generators(batch.x.device))
        self.randomised = drawn or bool((change(clean, again) > SAME).any())
        if self.randomised:
            self.ration.exact, self.ration.best = False, Best(batch)
            self.start = torch.ones_like(self.start)  # points are compared by the share of correct outputs
        left = self.left(every)
        for account in self.accounts:
            method = account.method
            chosen = method.name in self.methods
            applicable = method.state(self.threat, left, randomised=self.randomised)
            account.state = applicable if chosen else "left out"

    def search(self) -> None:
        """Compare the applicable methods, and run the best ones, followed by the search with labels only."""
        *compared, labels = self.accounts
        applicable = [account for account in compared if account.state == "not reached"]
        reserve = self.passes // _OF_LABELS if labels.state == "not reached" else 0
        kept = self.kept(applicable)
        for place, account in enumerate(kept):
            rows = self.surviving()
            left = self.left(rows) - reserve
            self.attempt(account, rows, left if place == len(kept) - 1 else 2 * left // 3, place)
        if labels.state == "not reached":
            rows = self.surviving()
            self.attempt(labels, rows, self.left(rows), 0)

    def surviving(self) -> Rows:
        """Rows of the examples that no point has broken so far."""
        return self.ration.best.surviving

    def left(self, rows: Rows) -> int:
        """Passes that every one of these examples has left, without those for checking the result at the end."""
        most = int(self.ration.spent[rows].max()) if len(rows) else self.passes
        return self.passes - most - 2

    def kept(self, accounts: list[Account]) -> list[Account]:
        """Compare the methods on a few examples, and return the best ones in their order."""
        ids, n = self.batch.ids, min(PILOT, len(self.batch))
        pilot = self.rng.at("pilot").uniform(ids, 1, dtype=torch.float64)[:, 0].argsort(stable=True)[:n]
        passes, number = max(1, self.passes // _FIRST), 0
        while len(accounts) > _KEPT:
            for account in accounts:
                least = account.method.cost(account.method.least, randomised=self.randomised)
                trial = max(passes, least + judging(randomised=self.randomised))
                # half of the budget at most, so that the examples of the trials are attacked like the others
                if self.left(pilot) - trial < self.passes // 2:
                    return accounts
                account.rank = self.attempt(account, pilot, trial, number)
                if account.rank[0] == len(pilot):  # the others are for the examples that it leaves
                    return self.best_of(accounts, _KEPT)
            accounts = self.best_of(accounts, (len(accounts) + 1) // 2)
            passes, number = 2 * passes, number + 1
        return accounts

    def best_of(self, accounts: list[Account], n: int) -> list[Account]:
        """Return the `n` methods of highest rank that made progress, and drop the others."""
        ordered = sorted(accounts, key=lambda account: account.rank, reverse=True)
        kept = [account for account in ordered[:n] if any(account.rank)]
        for account in ordered:
            if account not in kept and account.state == "run":
                account.state = "dropped"
        return kept

    def attempt(self, account: Account, rows: Rows, passes: int, number: int) -> tuple[float, float]:
        """Run a method on some of the examples, and return how many it broke and its progress per pass."""
        method, ration = account.method, self.ration
        least = method.cost(method.least, randomised=self.randomised)
        judged = judging(randomised=self.randomised)
        if not len(rows) or passes - judged < least:
            return 0.0, 0.0
        batch, rng = self.batch.take(rows), self.rng.at(method.name, number, len(rows))
        broken, forwards, backwards = ~(ration.best.margin > 0), ration.forwards, ration.backwards
        ration.begin(rows, passes - judged)
        ended = False
        try:
            if account.method is LABELS:
                points = self.by_labels(batch, rows, passes - judged, rng)
            else:
                points, draws = method.points(
                    ration, batch, self.threat, passes - judged, rng, randomised=self.randomised
                )
                self.draws = max(self.draws, draws)
        except BudgetSpent:  # the points that it queried are recorded
            points, ended = ration.own.x[rows], True
        if int((ration.forwards - forwards).max()) <= _LOOKED and torch.equal(points, batch.x):
            account.state = account.state if ended else "nothing to attack"
            return 0.0, 0.0
        account.state = "run"
        ration.allow(rows, judged)
        with suppress(BudgetSpent):  # where the model raised an error, it is called again
            self.judge(batch, points)
        account.forwards = account.forwards + ration.forwards - forwards
        account.backwards = account.backwards + ration.backwards - backwards
        account.broke = account.broke + (~(ration.best.margin > 0) & ~broken).long()
        return self.progress(rows, passes)

    def by_labels(self, batch: Batch, rows: Rows, passes: int, rng: Draws) -> Inputs:
        """Run the search with labels only on some rows, from what the other methods reached and from other examples."""
        best = self.ration.best.x[rows]
        points = starts(batch, best, self.batch.x, self.predicted, self.threat)
        model: Model = Averaged(self.ration, DRAWS) if self.randomised else self.ration
        queries = passes // (DRAWS if self.randomised else 1)
        return HopSkipJump(queries=queries).started(model, batch, self.threat, points, rng=rng)

    def judge(self, batch: Batch, points: Inputs) -> None:
        """Query the points that a method returned, and offer them to the best ones. For a randomised model, points are
        compared by the share of correct outputs.
        """
        points = self.threat.constraint.project(points.detach(), batch.x, self.model.bounds)
        with torch.no_grad():
            if not self.randomised:
                self.ration(points, batch.ids)
                return
            margins = torch.stack([margin(self.ration(points, batch.ids), batch) for _ in range(VOTES)])
        right = (margins > 0).to(margins.dtype).mean(0)
        value = torch.where(right > AT_TIMES, right + 1e-3 * margins.mean(0).sigmoid(), -1.0)
        for record in (self.ration.own, self.ration.best):
            record.offer(batch, points, value)

    def progress(self, rows: Rows, passes: int) -> tuple[float, float]:
        """Number of examples that the last method broke, and its mean progress per pass: the part of the margin, or of
        the distance to the boundary, that it has covered.
        """
        own, start = self.ration.own.margin[rows], self.start[rows]
        covered = ((start - own) / start.clamp_min(1e-12)).nan_to_num(0.0, 1.0, 0.0).clamp(0, 1)
        near = (self.threat.constraint.eps / self.ration.nearest[rows]).nan_to_num(0.0).clamp(0, 1)
        return float((~(own > 0)).sum()), float(torch.maximum(covered, near).mean()) / passes

    def columns(self) -> dict[str, Tensor]:
        """Return the columns `COLUMNS`."""
        zeros = torch.zeros_like(self.batch.ids)
        columns = dict[str, Tensor]()
        for account in self.accounts:
            state = METHOD_STATES.index(account.state)
            columns |= {
                f"{account.method.name}.{name}": value
                for name, value in (
                    ("state", zeros + state),
                    ("forwards", account.forwards),
                    ("backwards", account.backwards),
                    ("broke", account.broke),
                )
            }
        return columns | {
            "draws": zeros + self.draws,
            "raised": self.ration.raised,
            "changed": self.changed(),
        }

    def changed(self) -> Tensor:
        """Whether the clean input or the broken point of each example now has another output than before."""
        if self.clean is None or self.randomised or self.passes < 4:
            return torch.zeros_like(self.batch.ids)
        ration, batch = self.ration, self.batch
        best, broken = ration.best.x.clone(), ~(ration.best.margin > 0)
        ration.allow(torch.arange(len(batch), device=batch.x.device), 2)
        try:
            with torch.no_grad():
                clean, found = ration(batch.x), ration(best)
        except BudgetSpent:
            return torch.zeros_like(batch.ids)
        healed = broken & (margin(found, batch) > leeway(found))
        return ((change(self.clean, clean) > SAME) | healed).long()


def _generators(device: torch.device) -> Tensor:
    """States of torch's random generators, which a forward pass with random numbers changes."""
    states = [torch.get_rng_state()]
    return torch.cat([*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states)
