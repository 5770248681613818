"""The doubt `randomness` is raised if the same input gives different outputs."""

import torch
from torch import Tensor

from holdfast.attacks.costs import Passes
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.evidence import Doubt
from holdfast.core.model import Model
from holdfast.core.names import suite_name
from holdfast.core.outputs import change
from holdfast.core.threat import ThreatModel
from holdfast.doubts.protocol import CHANGE, Case, DoubtTest, Probe, largest


def steadiness(model: Model, batch: Batch, threat: ThreatModel, rng: Draws) -> dict[str, Tensor]:
    """Return how much the logits of each example change, relative to their size, if the model is called again, in
    another order or with a smaller batch.

    `repeat` is the change in a second call, `order` with the batch in reverse order, `batch` with a divided batch, and
    `history` after the other calls, with the same seed of torch. Cost: 6 forward passes. The random state of torch is
    restored.
    """
    backwards = torch.arange(len(batch) - 1, -1, -1, device=batch.ids.device)
    halves = batch.split(max(1, len(batch) // 2))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        reference = model(batch.x, batch.ids)
        repeated = model(batch.x, batch.ids)
        reversed_order = model(batch.x[backwards], batch.ids[backwards])[backwards]
        parts = torch.cat([model(part.x, part.ids) for part in halves])
        torch.manual_seed(0)
        # the same seed as for `reference`, so that only the calls in between can make a difference
        reseeded = model(batch.x, batch.ids)
    return {
        "repeat": change(reference, repeated),
        "order": change(reference, reversed_order),
        "batch": change(reference, parts),
        "history": change(reference, reseeded),
    }


def _rows(threat: ThreatModel, n: int, passes: Passes, votes: int) -> int:
    return 4 * passes.once(n) + sum(_halves(piece, passes) for piece in passes.pieces(n))


def _halves(n: int, passes: Passes) -> int:
    """The rows of a piece that is evaluated in two halves, and a remainder."""
    half = max(1, n // 2)
    return sum(passes.filled(min(half, n - start)) for start in range(0, n, half))


STEADINESS = Probe(
    "steadiness", "none", steadiness, breaks=False, applies=lambda threat: True, rows=_rows, order=0
)


def conclude(case: Case) -> Doubt:
    """Return the doubt from two calls with the same input."""
    if STEADINESS.name not in case.results:
        return case.absent(STEADINESS)
    moved = case.results[STEADINESS.name].columns["repeat"]
    most = largest(moved)
    text = "two calls with the same input return the same logits"
    if most > 0:
        text = f"two calls with the same input differ by at most {most:.1g} of the largest logit"
    averaged = suite_name(case.context.suite) == "rand"
    if most > CHANGE:
        text += (
            "; the suite averages over draws" if averaged else "; use --suite rand, which averages over draws"
        )
    return case.judged(most, CHANGE, len(moved), text, more=not averaged)


TEST = DoubtTest(
    title="The output changes between calls",
    meaning="The same input has different outputs, so an example can survive by chance.",
    advice="Use --adaptive or --suite rand, which average over draws, or disable the randomness.",
    conclude=conclude,
    probes=(STEADINESS,),
    thresholds=(CHANGE,),
    of_strength=True,
    answered_by=("average",),
    served_probe=STEADINESS.name,
)
