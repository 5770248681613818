"""Upper bounds of the number of rows that an attack sends to a model, computed before the run."""

from collections.abc import Iterator
from dataclasses import dataclass

from holdfast.attacks.protocol import Attack, Enumeration, QueryAttack
from holdfast.core.model import Batches
from holdfast.core.threat import ThreatModel
from holdfast.core.transformations import Transformations


@dataclass(frozen=True)
class Passes:
    """Number of rows sent to a model: batches of at most `size` examples, each filled up to an accepted batch size."""

    size: int
    """number of examples in one forward pass"""
    batches: Batches | None = None
    """batch sizes that the model accepts; None for any"""
    shards: tuple[int, ...] = ()
    """numbers of examples of separate shards; empty if all are measured together"""

    def filled(self, rows: int) -> int:
        """Number of rows of one call with `rows` rows, after filling up."""
        size = 1 if self.batches is None else self.batches.size
        return -(-rows // size) * size

    def once(self, n: int) -> int:
        """Largest number of rows of one call for each of `n` examples, for any distribution over the shards."""
        if len(self.shards) < 2 or n >= sum(self.shards):
            each = (n,) if len(self.shards) < 2 else self.shards
            return sum(self.filled(piece) for shard in each for piece in self.pieces(shard))
        size = self.filled(1)
        pieces = min(n, n // self.size + len(self.shards))
        most = (n + pieces * (size - 1)) // size * size
        return min(most, self.once(sum(self.shards)))

    def pieces(self, n: int) -> Iterator[int]:
        """The batch sizes of `n` examples."""
        yield from (min(self.size, n - start) for start in range(0, n, self.size))


def most_queries(attack: Attack, threat: ThreatModel) -> int | None:
    """Largest number of queries of the attack for one example; None if no setting or budget limits it.

    For attacks that need gradients only a budget limits it, since their settings are numbers of steps.
    """
    own: int | None = None
    if attack.needs == "none":
        return 0
    if isinstance(attack, QueryAttack):
        own = attack.queries
    elif isinstance(attack, Enumeration) and isinstance(threat.constraint, Transformations):
        own = len(attack.grid_points(threat.constraint))
    return min((n for n in (own, threat.queries) if n is not None), default=None)


def most_rows(attack: Attack, threat: ThreatModel, n: int, passes: Passes) -> int | None:
    """Largest number of rows that the attack on `n` examples sends to a model; None if it is unknown.

    If an attack queries some of its examples in each call, every row may be filled up separately.
    """
    queries = most_queries(attack, threat)
    if queries is None:
        return None
    if isinstance(attack, Enumeration) or (isinstance(attack, QueryAttack) and attack.batched):
        return queries * passes.once(n)
    return queries * n * passes.filled(1)
