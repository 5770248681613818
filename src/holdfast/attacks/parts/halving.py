"""Successive halving over attacks: each is tried on a few examples, the worse half is dropped, and the others are run
on all examples, followed by a search with labels only.

Successive halving: Jamieson & Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization",
AISTATS 2016, arXiv:1502.07943. Here the arms are attacks, and the reward is the number of examples that they break.
"""

from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from holdfast.attacks.parts.best import Best
from holdfast.attacks.parts.closest import leeway
from holdfast.attacks.parts.methods import (
    DRAWS,
    LABELS,
    METHODS,
    Method,
    judging,
    label_search,
    starts,
)
from holdfast.attacks.parts.ration import Averaged, Ration
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import BudgetSpent
from holdfast.core.evidence import METHOD_STATES, MethodState
from holdfast.core.logit_scale import SAME, change
from holdfast.core.meter import margin
from holdfast.core.model import AT_TIMES, VOTES, Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Inputs, Labels, Logits, PerExample, Rows

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
        self.ration = Ration(self.model, self.batch, self.threat.constraint, exact=True)
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
        return label_search(model, batch, self.threat, queries, rng, points)

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
