"""Cross-play of a league: the robust accuracy of each network against each attack policy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from holdfast.attacks.parts.ascent import descend
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.meter import margin
from holdfast.core.model import Classifier
from holdfast.core.pieces import results_in_pieces
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Mask
from holdfast.recipes.training.attack_policies import (
    REACH,
    Policy,
    distance,
    distribution,
    features_of,
    in_words,
    table_of,
)

_STEPS = 20  # of PGD, as in the evaluation on held-out examples
_REPORTED = 300  # test examples in the matrix on the card
CONVERGED = 0.1
"""distance of two policies up to which they count as one strategy"""


@dataclass(frozen=True)
class CrossPlay:
    """Examples on which networks and policies of a league play."""

    batch: Batch
    threat: ThreatModel
    rng: Draws

    def pgd(self, model: Classifier) -> Mask:
        """Return which examples are correct under PGD."""

        def margins(part: Batch) -> Mask:
            constraint = self.threat.constraint
            start = constraint.sample(part, model.bounds, self.rng.at("pgd"))
            return descend(model, part, start, constraint, steps=_STEPS, reach=REACH)[1] > 0

        return torch.cat(results_in_pieces(self.batch, margins))

    def survivors(self, model: Classifier, policy: Policy) -> Mask:
        """Return which examples are correct, clean and under the strategies that are drawn from a policy."""

        def surviving(part: Batch) -> Mask:
            x_adv, _ = policy.play(model, part, self.threat.constraint, self.rng, done=1.0, count=False)
            with torch.no_grad():
                return (margin(model(part.x), part) > 0) & (margin(model(x_adv), part) > 0)

        return torch.cat(results_in_pieces(self.batch, surviving))

    def report(
        self,
        networks: Mapping[str, Classifier],
        attackers: Sequence[Policy],
        earlier: Sequence[Sequence[Policy]],
    ) -> tuple[dict[str, Any], str]:
        """Return the entry of the card with the cross-play of networks, the first of which is returned, and policies,
        and a sentence on it. `earlier` are the past versions of the policies.
        """
        play = CrossPlay(self.batch.first(_REPORTED), self.threat, self.rng)
        columns = [*(f"policy {k + 1}" for k in range(len(attackers))), "past policies", f"PGD-{_STEPS}"]
        rows = {name: play._row(model, attackers, earlier) for name, model in networks.items()}
        returned = next(iter(networks.values()))
        with torch.no_grad():
            clean = returned(play.batch.x)
        apart = max(
            distance(one, other, features_of(clean, play.batch.y, 1.0))
            for k, one in enumerate(attackers)
            for other in attackers[k + 1 :]
        )
        entry = {
            "n": len(play.batch),
            "columns": columns,
            "cross_play": rows,
            "distance": apart,
            "converged": apart <= CONVERGED,
            "policies": [distribution(attacker) for attacker in attackers],
            "tables": [
                {
                    "title": f"cross-play on {len(play.batch):,} test examples, robust accuracy",
                    "columns": ["network", *columns],
                    "rows": [[name, *map(_percent, shares)] for name, shares in rows.items()],
                },
                *(
                    table_of(each, f"strategies of policy {k + 1}, by quarter")
                    for k, each in enumerate(attackers)
                ),
            ],
        }
        return entry, _sentence(entry, attackers)

    def _row(
        self, model: Classifier, attackers: Sequence[Policy], earlier: Sequence[Sequence[Policy]]
    ) -> list[float | None]:
        """Robust accuracy of a network against each policy, all past ones together and PGD; None without past ones."""
        masks = [self.survivors(model, attacker) for attacker in attackers]
        past = [self.survivors(model, policy) for version in earlier for policy in version]
        worst = torch.stack(past).all(0) if past else None
        return [
            None if each is None else float(each.double().mean()) for each in (*masks, worst, self.pgd(model))
        ]


def most_robust(play: CrossPlay, networks: Sequence[Classifier], attackers: Sequence[Policy]) -> int:
    """Return the position of the network that is correct on most examples under PGD and all policies together."""
    robust = [
        torch.stack([play.pgd(model), *(play.survivors(model, attacker) for attacker in attackers)]).all(0)
        for model in networks
    ]
    return int(torch.stack(robust).sum(1).argmax())


def _sentence(entry: Mapping[str, Any], attackers: Sequence[Policy]) -> str:
    rows = "; ".join(
        f"{name} " + ", ".join(map(_percent, shares)) for name, shares in entry["cross_play"].items()
    )
    words = "; ".join(f"policy {k + 1}: {in_words(attacker)}" for k, attacker in enumerate(attackers))
    apart = (
        f"the policies have converged to one strategy (distance {entry['distance']:.2f}), so that the second one adds "
        "nothing"
        if entry["converged"]
        else f"the distance of the policies is {entry['distance']:.2f}"
    )
    return (
        f"cross-play on {entry['n']:,} test examples, robust accuracy against {', '.join(entry['columns'])}: {rows}; "
        f"{apart}; choices at last, {words}"
    )


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"
