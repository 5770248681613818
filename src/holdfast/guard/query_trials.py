"""Black-box attacks on the first examples of an assessment with and without the detectors of a guard."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

from holdfast.attacks.protocol import Attack
from holdfast.attacks.rays import RayS
from holdfast.attacks.square import Square
from holdfast.attacks.suites import is_possible
from holdfast.core.batch import Batch
from holdfast.core.constraints import L2, Norm
from holdfast.core.draws import Draws
from holdfast.core.evidence import Table
from holdfast.core.meter import margin
from holdfast.core.refused import Answering
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access
from holdfast.guard.detectors.informed import InformedSquare
from holdfast.guard.detectors.oars import OARS, Base
from holdfast.guard.detectors.patterns import CoarsePatterns
from holdfast.guard.detectors.queries import QueryDetector, QuerySettings
from holdfast.guard.detectors.screened import Screened
from holdfast.guard.released_scores import Releasing, release_of
from holdfast.guard.states.memory import MemoryState
from holdfast.runs.harness.target import Target

PLAIN, ADAPTIVE, INFORMED = "plain", "adaptive", "informed"
"""the attack that does not know the detectors, the one that adapts to rejections, and the one that knows the settings
of the query detector"""
PATTERNS, POPULATION, LABELS = "patterns", "population", "labels"
"""the attacks with coarse patterns, which adapt to rejections too, and the one that needs labels only"""
ROUNDED, LABELLED = "rounded", "labelled"
RELEASES = {ROUNDED: release_of("2"), LABELLED: release_of("labels")}
"""what clients receive of the scores in further arms, without the detectors"""


@dataclass(frozen=True)
class QueryTrials:
    """Attacks examples with Square, which does not know the detectors, with OARS, which adapts to rejections, and under
    Linf with coarse patterns, with RayS, and with `InformedSquare`, which knows the query detector. Each is run with
    and without the detectors, and without them also on rounded scores, and on labels if it can use them. Every attack
    begins with an empty state, and every query comes from a new client.
    """

    settings: QuerySettings | None = field(default_factory=QuerySettings)
    """settings of the query detector; None for a guard that has only stateless detectors, which are a part of the model
    """
    n: int = 10
    """number of examples"""
    queries: int = 1000
    """largest number of queries for each example"""

    @property
    def identity(self) -> Mapping[str, object]:
        """The settings as plain values."""
        return asdict(self)

    def __call__(self, target: Target, batch: Batch, threat: ThreatModel, seed: int) -> Table:
        """Return for each example that is correct when clean the numbers of queries until it was broken and until a
        query was rejected, 0 for never, as in `adaptive_with_broken`.
        """
        correct = margin(target.judged_logits(target.logits(batch.x), batch.y), batch) > 0
        batch, rng = batch.take(correct), Draws(seed).at("stateful")
        limited = replace(threat, queries=min(self.queries, threat.queries or self.queries))
        columns = {"id": batch.ids.cpu()}
        for name, attack in self._attacks(threat).items():
            for arm in ("without", "with"):
                screened = self._screened(target, batch, threat, seed, guarded=arm == "with")
                model = Answering(screened, batch) if name in (PLAIN, LABELS) else screened
                if len(batch):
                    attack(model, batch, limited, rng=rng.at(name))
                columns[f"{name}_{arm}_broken"] = screened.broken_at.cpu()
                columns[f"{name}_{arm}_rejected"] = screened.rejected_at.cpu()
            for arm, release in RELEASES.items():
                if arm == LABELLED and name not in (PATTERNS, LABELS):
                    continue  # without scores, the others do not know where to go
                screened = self._screened(target, batch, threat, seed, guarded=False)
                if attack.needs == "labels":
                    screened.broken_at = columns[f"{name}_without_broken"]
                elif len(batch):
                    attack(Releasing(screened, release), batch, limited, rng=rng.at(name))
                columns[f"{name}_{arm}_broken"] = screened.broken_at.cpu()
        return Table("example", columns)

    def _attacks(self, threat: ThreatModel) -> dict[str, Attack]:
        is_l2 = isinstance(threat.constraint, L2)
        base: Base = "hop_skip_jump" if is_l2 else "square"
        attacks: dict[str, Attack] = {
            PLAIN: Square(queries=self.queries),
            ADAPTIVE: OARS(base=base, queries=self.queries),
        }
        if not is_l2:
            attacks[PATTERNS] = CoarsePatterns("fit", adaptive=True, queries=self.queries)
            attacks[POPULATION] = CoarsePatterns("population", adaptive=True, queries=self.queries)
            attacks[LABELS] = RayS(queries=self.queries)
        if self.settings is not None and not is_l2:
            attacks[INFORMED] = InformedSquare(self.settings, queries=self.queries)
        return attacks

    def _screened(
        self, target: Target, batch: Batch, threat: ThreatModel, seed: int, *, guarded: bool
    ) -> Screened:
        assert isinstance(threat.constraint, Norm)
        detector = None
        if guarded and self.settings is not None:
            # reproducible; the attacks do not use the key
            key = hashlib.sha256(f"holdfast stateful {seed}".encode()).digest()
            detector = QueryDetector(key, MemoryState(), tuple(batch.x.shape[1:]), self.settings)
        return Screened(target.bare, batch, threat.constraint, detector, alone=not guarded)


def measurable(threat: ThreatModel, access: Access) -> bool:
    """Return whether the trials support a threat model and a model with `access`: a ball of Linf or L2, access to
    scores, and no target.
    """
    constraint = threat.constraint
    is_ball = (
        is_possible("black-box", constraint, "labels")
        and constraint.is_ball
        and constraint.eps < float("inf")
    )
    return is_ball and threat.gives("scores") and access in ("scores", "gradients") and threat.goal is None
