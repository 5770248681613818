"""The stage that attacks a model with the stored adversarial inputs of an earlier run, before the attacks of the
suite.

Only inputs that the suite of the earlier run found are used, so that the accuracies under both suites remain
comparable.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from holdfast.attacks.parts.ascent import descend
from holdfast.attacks.parts.losses import Best, margin
from holdfast.attacks.protocol import AtCoordinates
from holdfast.attacks.relay import Relay
from holdfast.core.batch import Batch, Data, Lookup, spread
from holdfast.core.draws import Draws
from holdfast.core.evidence import Columns, Evidence
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Count, Ids, Inputs, Mask, Positive, Rows, Steps
from holdfast.runs.harness.kinds.attack import AttackKind
from holdfast.runs.harness.stage import Member, Stage, Work
from holdfast.runs.harness.target import digests, unattacked

if TYPE_CHECKING:
    from holdfast.runs.harness.plan import Plan

_PIECE = 64
"""number of examples that are read at once to find one with a stored input"""


@dataclass(frozen=True)
class Baseline:
    """Attacks each example with the adversarial input that an earlier run stored for it, projected onto the constraint.

    If the model classifies the input correctly, and the threat model gives gradients, gradient steps on the margin
    follow and, under Linf, L2 and L1, rounds of Relay. Cost: one forward for each example; for those that it does not
    break, also `steps` gradients, and in each round `queries` forwards and 20 gradients.
    """

    contents: str
    """SHA-256 of the stored examples, in hex; see `baseline_of`"""
    digests: Tensor = field(repr=False, compare=False)
    """digests of the clean inputs and labels, (n, 32) uint8"""
    x: Inputs = field(repr=False, compare=False)
    """adversarial inputs, (n, *features)"""
    earlier_queries: Tensor = field(repr=False, compare=False)
    """number of queries that the attacks of the earlier run made for each of these examples, (n) int64"""
    steps: Count = 20
    """number of gradient steps from an input that is classified correctly"""
    reach: Positive = 2.0
    """path length of these steps, in multiples of eps"""
    rounds: Count = 2
    """number of rounds of Relay, each a random search from the best point so far and gradient steps from its result"""
    search_queries: Steps = 100
    """number of windows that are tried in each random search"""

    needs: ClassVar[Access] = "none"

    @cached_property
    def _rows(self) -> Mapping[bytes, int]:
        return {bytes(key): row for row, key in enumerate(self.digests.tolist())}

    def rows(self, keys: Tensor) -> Rows:
        """Return for each digest (m, 32) the row of its stored input, or -1 if there is none."""
        return torch.tensor([self._rows.get(bytes(key), -1) for key in keys.tolist()], dtype=torch.int64)

    def occurs_in(self, data: Data) -> bool:
        """Return whether there is a stored input for at least one example of the data. The data are read up to it."""
        pieces = (data.read(at, min(at + _PIECE, len(data))) for at in range(0, len(data), _PIECE))
        return any(bool((self.rows(digests(piece)) >= 0).any()) for piece in pieces)

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        coordinates = model.coordinates if isinstance(model, AtCoordinates) else None
        clean, constraint, best = (
            batch if coordinates is None else coordinates.clean,
            threat.constraint,
            Best(batch),
        )
        rows = self.rows(digests(clean))
        stored = self.x[rows].reshape(batch.x.shape).to(batch.x)
        # values that are missing in an input are filled in here, so that its digest may be another one
        found = spread((rows >= 0).to(batch.x.device), batch.x)
        start = torch.where(found, stored, clean.x)
        inside = (
            coordinates.points(start) if coordinates else constraint.project(start, batch.x, model.bounds)
        )
        if not threat.gives("gradients"):
            return inside
        with torch.no_grad():
            best.offer(batch, inside, margin(model(inside, batch.ids), batch))
        surviving = best.surviving
        if len(surviving):
            remaining = batch.take(surviving)
            path = descend(
                model, remaining, inside[surviving], constraint, steps=self.steps, reach=self.reach
            )
            best.offer(remaining, *path)
            if constraint.in_input_units:
                relay = Relay(
                    restarts=0, targets=0, searches=0, rounds=self.rounds, queries=self.search_queries
                )
                relay.improve(model, batch, constraint, best, rng)
        return best.x


def baseline_of(evidence: Evidence, inputs: Columns) -> Baseline | None:
    """Return the attack with the adversarial inputs that an earlier run stored, or None if its suite found none.

    `inputs` has the columns `id` and `x` with these inputs. The attack is identified by what it uses of the run: the
    SHA-256 of the digests of the clean examples, the inputs and their numbers of queries. A run that begins with it can
    therefore be resumed after the gates of the earlier run were judged again.
    """
    if not inputs:
        return None
    rows = Lookup(evidence["id"]).rows(inputs["id"])
    of_suite = (evidence["suite_success"] & evidence["success"])[rows]
    if not of_suite.any():
        return None
    rows, x = rows[of_suite], inputs["x"][of_suite]
    keys, queries = evidence["digest"][rows], evidence["queries"][rows]
    contents = b"".join(part.contiguous().numpy().tobytes() for part in (keys, x, queries))
    return Baseline(hashlib.sha256(contents).hexdigest(), keys, x, queries)


EARLIER_QUERIES = "earlier_queries"
"""Name of the column with the number of queries of the earlier run for an example."""


class FromBaseline(AttackKind):
    """Kind of stage that attacks the examples for which an earlier run stored an adversarial input, before the attacks
    of the suite.
    """

    name = "baseline"
    named = r"0-baseline"
    in_suite = True
    reuses = True

    def stages(self, plan: "Plan") -> list[Stage]:
        """Return the stage, if the plan has stored inputs of an earlier run. The names of the other attacks, which
        determine their random numbers, do not depend on it.
        """
        return [] if plan.baseline is None else [Stage("0-baseline", self, Member("Baseline", plan.baseline))]

    def due(self, stage: Stage, plan: "Plan", by_stage: Mapping[str, Columns]) -> Mask:
        """Return the mask of the correct examples with a stored input, also of certified ones, whose certificates it
        tests.
        """
        assert plan.baseline is not None
        clean = by_stage["clean"]
        due: Mask = clean["correct"] & clean["eligible"] & (plan.baseline.rows(clean["digest"]) >= 0)
        return due

    def piece(self, stage: Stage, work: Work, batch: Batch, rng: Draws, missed: Ids) -> dict[str, Tensor]:
        """Run the attack on one batch, and return the columns of an attack and the number of queries of the earlier run
        for each example.
        """
        assert isinstance(stage.attack, Baseline)
        earlier = stage.attack.earlier_queries[stage.attack.rows(digests(batch))]
        return super().piece(stage, work, batch, rng, missed) | {EARLIER_QUERIES: earlier}

    def columns(self, clean: Columns) -> dict[str, Tensor]:
        """Return the columns of the stage for examples without a stored input."""
        columns = unattacked(clean)
        return columns | {EARLIER_QUERIES: torch.zeros_like(columns["queries"])}
