"""How many rows an attack asks of a model at most: by arithmetic, before anything is asked."""

from collections.abc import Iterator
from dataclasses import dataclass

from holdfast.attacks.bandits import Bandits
from holdfast.attacks.boundary import Boundary
from holdfast.attacks.geoda import GeoDA
from holdfast.attacks.grid_search import GridSearch
from holdfast.attacks.hop_skip_jump import HopSkipJump
from holdfast.attacks.nes import NES
from holdfast.attacks.protocol import Attack
from holdfast.attacks.rays import RayS
from holdfast.attacks.sign_opt import SignOPT
from holdfast.attacks.simba import SimBA
from holdfast.attacks.sparse_rs import SparseRS
from holdfast.attacks.spsa import SPSA
from holdfast.attacks.square import Square
from holdfast.attacks.surfree import SurFree
from holdfast.attacks.zoo import ZOO
from holdfast.core.model import Batches
from holdfast.core.threat import ThreatModel
from holdfast.core.transformations import Transformations

_TOGETHER = (Bandits, NES, RayS, SimBA, SparseRS, SPSA, Square, ZOO)
"""Attacks that ask about all examples that are left in each call, `queries` times at most."""
_APART = (Boundary, GeoDA, HopSkipJump, SignOPT, SurFree)
"""Attacks that ask about some of the examples in each call, each of them `queries` times at most."""


@dataclass(frozen=True)
class Passes:
    """How many rows a model is sent for some examples: in pieces of `size`, each filled up to its `batches`."""

    size: int
    """examples that go through the model at once"""
    batches: Batches | None = None
    """those that the model takes; None is any number of rows"""
    shards: tuple[int, ...] = ()
    """numbers of examples that are measured apart; empty where all are measured together"""

    def filled(self, rows: int) -> int:
        """The rows of one call with so many, filled up to what the model takes."""
        size = 1 if self.batches is None else self.batches.size
        return -(-rows // size) * size

    def once(self, n: int) -> int:
        """The most rows of one call for each of `n` examples, however they lie in the shards."""
        if len(self.shards) < 2 or n >= sum(self.shards):
            each = (n,) if len(self.shards) < 2 else self.shards
            return sum(self.filled(piece) for shard in each for piece in self.pieces(shard))
        size = self.filled(1)
        pieces = min(n, n // self.size + len(self.shards))
        most = (n + pieces * (size - 1)) // size * size
        return min(most, self.once(sum(self.shards)))

    def pieces(self, n: int) -> Iterator[int]:
        """The sizes of the pieces of `n` examples."""
        yield from (min(self.size, n - start) for start in range(0, n, self.size))


def most_queries(attack: Attack, threat: ThreatModel) -> int | None:
    """The most rows that the attack asks of a model for one example; None where no setting and no budget says it.

    Of attacks that need gradients only a budget says it: their settings are steps.
    """
    own: int | None = None
    if attack.needs == "none":
        return 0
    if isinstance(attack, (*_TOGETHER, *_APART)):
        own = attack.queries
    elif isinstance(attack, GridSearch) and isinstance(threat.constraint, Transformations):
        own = len(attack.points(threat.constraint))
    return min((n for n in (own, threat.queries) if n is not None), default=None)


def most_rows(attack: Attack, threat: ThreatModel, n: int, passes: Passes) -> int | None:
    """The most rows that a model is sent by the attack on `n` examples; None where that is not known.

    An attack that asks about some of its examples in each call may fill up every row of its own.
    """
    queries = most_queries(attack, threat)
    if queries is None:
        return None
    if isinstance(attack, (*_TOGETHER, GridSearch)):
        return queries * passes.once(n)
    return queries * n * passes.filled(1)
