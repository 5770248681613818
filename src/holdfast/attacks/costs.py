"""Upper bounds for the number of inputs that an attack sends to a model, computed before a run."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from holdfast.attacks.protocol import Attack, Enumeration, Itemised, Learned, QueryAttack
from holdfast.attacks.relay import Relay
from holdfast.core.model import Batches
from holdfast.core.threat import ThreatModel


@dataclass(frozen=True)
class Passes:
    """Settings of batching, from which the number of inputs that are sent to a model is computed. A batch has at most
    `size` examples and is padded to a batch size that the model accepts.
    """

    size: int
    """number of examples in one forward pass"""
    batches: Batches | None = None
    """batch sizes that the model accepts; None for any"""
    shards: tuple[int, ...] = ()
    """numbers of examples of the shards that are measured separately; empty if all examples are measured together"""

    def filled(self, rows: int) -> int:
        """Return the number of inputs in a batch of `rows` inputs after padding to a batch size that the model
        accepts.
        """
        size = 1 if self.batches is None else self.batches.size
        return -(-rows // size) * size

    def once(self, n: int) -> int:
        """Return an upper bound for the number of inputs, padding included, that are sent to the model when each of `n`
        examples is sent once.

        The bound holds for any distribution of the examples over the shards.
        """
        if len(self.shards) < 2 or n >= sum(self.shards):
            shards = (n,) if len(self.shards) < 2 else self.shards
            return sum(self.filled(piece) for shard in shards for piece in self.pieces(shard))
        size = self.filled(1)
        pieces = min(n, n // self.size + len(self.shards))
        bound = (n + pieces * (size - 1)) // size * size
        return min(bound, self.once(sum(self.shards)))

    def pieces(self, n: int) -> Iterator[int]:
        """Yield the sizes of the batches into which `n` examples are split, before padding."""
        yield from (min(self.size, n - start) for start in range(0, n, self.size))


def most_queries(attack: Attack, threat: ThreatModel) -> int | None:
    """Return the largest number of queries that an attack makes for one example, or None if neither a setting of the
    attack nor a query budget limits it.

    The settings of a gradient attack are numbers of steps, so that only the query budget of the threat model limits its
    queries.
    """
    setting: int | None = None
    if attack.needs == "none":
        return 0
    if isinstance(attack, QueryAttack):
        setting = attack.queries
    elif isinstance(attack, Itemised):
        setting = attack.passes
    elif isinstance(attack, Enumeration):
        from holdfast.threats.transformations import Transformation  # late: few attacks try a grid

        if isinstance(threat.constraint, Transformation):
            setting = len(attack.grid_points(threat.constraint))
    return min((n for n in (setting, threat.queries) if n is not None), default=None)


def search_queries(attack: Attack) -> int:
    """Return the number of queries of the random searches of an attack for each example; 0 if it makes none."""
    if isinstance(attack, Relay):
        return attack.queries * (attack.searches + attack.rounds)
    return attack.queries if isinstance(attack, QueryAttack) else 0


def most_rows(attack: Attack, threat: ThreatModel, n: int, passes: Passes) -> int | None:
    """Return the largest number of inputs, padding included, that an attack on `n` examples sends to a model, or None
    if it is unknown.

    For attacks that query only some of the examples in each call, it is assumed that every row is padded separately.
    """
    queries = most_queries(attack, threat)
    if queries is None:
        return None
    if isinstance(attack, Enumeration) or (isinstance(attack, QueryAttack) and attack.batched):
        return queries * passes.once(n)
    return queries * n * passes.filled(1)


_PASSES_PER_STEP = ("restarts", "searches", "fits")
"""Settings of gradient attacks that repeat all their steps."""
_FORWARDS_PER_STEP = 1.5
"""Forward passes per step of a gradient attack: one in most, and two in those that also judge each new point."""


def expected_passes(attack: Attack, threat: ThreatModel, classes: int) -> tuple[float, float]:
    """Return about how many forward passes, and how many of them with a backward pass, an attack makes for an example
    that it does not break.

    The numbers follow from the usual settings of attacks (`steps`, `restarts`, `targets`, `queries`). They serve for an
    estimate of the time, not as a bound.
    """
    forwards, backwards = _unlimited(attack, threat, classes)
    limit = math.inf if threat.queries is None else threat.queries
    return min(forwards, limit), min(backwards, limit)


def is_counted(attack: Attack) -> bool:
    """Return whether `expected_passes` follows from settings of an attack that queries the attacked model, and is not a
    bound that a search seldom reaches.
    """
    if attack.needs == "none" or isinstance(attack, Learned | Itemised | Enumeration):
        return False
    return isinstance(attack, QueryAttack) or "steps" in vars(attack)


def _unlimited(attack: Attack, threat: ThreatModel, classes: int) -> tuple[float, float]:
    """The passes of an attack, without the query budget for attacks with gradients."""
    if isinstance(attack, Relay):
        runs = attack.restarts + min(attack.targets, classes - 1) + attack.searches + attack.rounds
        steps = attack.steps * runs
        return steps + attack.queries * (attack.searches + attack.rounds), steps
    queries = most_queries(attack, threat)
    if attack.needs != "gradients" and queries is not None:
        return queries, 0
    settings = vars(attack)
    if "passes" in settings:  # about as many forwards as backwards
        return settings["passes"] / 2, settings["passes"] / 2
    steps = settings.get("steps", 1)
    for name in _PASSES_PER_STEP:
        steps *= max(settings.get(name, 1), 1)
    steps *= min(max(settings.get("targets", 1), 1), max(classes - 1, 1))
    backwards = steps * min(settings.get("candidates", 1), max(classes - 1, 1))
    return max(_FORWARDS_PER_STEP * steps, backwards), backwards
