"""The doubt `not-exhausted` is raised if the same suite with other random draws breaks three or more of 32 surviving
examples, or a probe, the fixed PGD-40 pass, the curve or the transfer matrix breaks one.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from holdfast.attacks.costs import Passes, most_rows
from holdfast.attacks.protocol import Attack
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.evidence import Doubt
from holdfast.core.model import VOTES, Model
from holdfast.core.names import enumerated
from holdfast.core.threat import ThreatModel
from holdfast.doubts.protocol import AGAIN, FRESH_ROWS, Case, DoubtTest, Outcome, Probe, probe_title
from holdfast.doubts.short_attacks import unbroken_columns, update_lower, voted_columns

FRESH_BROKEN = 3
"""number of the `FRESH_ROWS` examples that a fresh pass must break to raise the doubt"""


REPEATED = 0.15
"""largest share of the passes of the suite that the fresh pass takes, unless its first attack alone takes more"""


def repeated(outcomes: Sequence[Outcome]) -> dict[int, Outcome]:
    """Return the attacks of a suite that the fresh pass repeats, by their places in it: those that broke an example,
    cheapest first, while they stay within `REPEATED`; at least one. An attack that broke nothing is not repeated,
    unless none broke anything.
    """
    ran = [(place, outcome) for place, outcome in enumerate(outcomes) if outcome.n]
    worth = [(place, outcome) for place, outcome in ran if outcome.broken.any()] or ran
    budget = REPEATED * sum(outcome.passes for outcome in outcomes)
    chosen: dict[int, Outcome] = {}
    for place, outcome in sorted(worth, key=lambda each: each[1].passes / each[1].n):
        budget -= FRESH_ROWS * outcome.passes / outcome.n
        if chosen and budget < 0:
            break
        chosen[place] = outcome
    return dict(sorted(chosen.items()))


def again(attacks: Mapping[int, Attack]) -> Probe:
    """Return the probe that runs attacks of the suite, by their places in it, a second time, on the surviving examples
    with the lowest margin.
    """

    def run(model: Model, batch: Batch, threat: ThreatModel, rng: Draws, votes: int = 1) -> dict[str, Tensor]:
        columns = unbroken_columns(batch)
        for place, attack in attacks.items():
            surviving = (~columns["broken"]).nonzero()[:, 0]
            if not len(surviving):
                break
            part, stream = batch.take(surviving), rng.at("again", place)
            update_lower(columns, voted_columns(attack, model, part, threat, stream, votes), surviving)
        return columns

    def rows(threat: ThreatModel, n: int, passes: Passes, votes: int) -> int | None:
        fresh = [most_rows(attack, threat, n, passes) for attack in attacks.values()]
        known = [rows for rows in fresh if rows is not None]
        return sum(known) + len(fresh) * votes * passes.once(n) if len(known) == len(fresh) else None

    return Probe(
        AGAIN, "none", run, on="closest", most=FRESH_ROWS, voted=partial(run, votes=VOTES), rows=rows
    )


def conclude(case: Case) -> Doubt:
    """Return the doubt from the fresh pass, and from all examples that were broken outside the suite."""
    fresh_pass = case.results.get(AGAIN)
    elsewhere_ids = {title: ids for title, ids in case.missed.items() if title != probe_title(AGAIN)}
    if fresh_pass is None and not elsewhere_ids and not case.attacked:
        return case.absent()
    n_elsewhere = torch.unique(
        torch.cat([torch.empty(0, dtype=torch.int64), *elsewhere_ids.values()])
    ).numel()
    fresh, n_fresh, texts = 0, 0, []
    if fresh_pass is not None:
        fresh, n_fresh = int(fresh_pass.columns["broken"].sum()), len(fresh_pass.columns["broken"])
        texts.append(
            f"a fresh pass of {enumerated(case.context.repeated) or 'the suite'} breaks {fresh} of the {n_fresh} "
            "surviving examples closest to the boundary"
        )
    if n_elsewhere:
        texts.append(
            f"{n_elsewhere} {('example' if n_elsewhere == 1 else 'examples')} that survived the suite "
            f"{('was' if n_elsewhere == 1 else 'were')} broken by {', '.join(sorted(elsewhere_ids))}"
        )
        # one example is a proof, since these attacks obey the threat model too
        return case.judged(float(n_elsewhere), 0.0, n_fresh, "; ".join(texts))
    if not texts:
        texts.append("no example was left for a fresh pass, and no probe broke one that survived the suite")
    # `judged` raises a doubt above its threshold, and `FRESH_BROKEN` examples are enough
    return case.judged(float(fresh), float(FRESH_BROKEN - 1), n_fresh, "; ".join(texts))


TEST = DoubtTest(
    title="A fresh pass of the suite breaks more",
    meaning="A fresh pass of the suite, or a probe, breaks some of the surviving examples, so another run would "
    "measure a lower robust accuracy.",
    advice="Use a stronger suite or more restarts before you report the robust accuracy.",
    conclude=conclude,
    of_suite=again,
    thresholds=(0.0, float(FRESH_BROKEN - 1)),
    of_strength=True,
    answered_by=("bypass", "search"),
    unanswered_if="survivor broken",
    served_probe=AGAIN,
)
