"""The threat model: what an attacker may change, must achieve, can access and may spend."""

from dataclasses import dataclass, field

from holdfast.core.constraints import Constraint, Linf
from holdfast.core.errors import UsageError
from holdfast.core.model import Model
from holdfast.core.names import threat_text
from holdfast.core.types import ACCESS_ORDER, Access


@dataclass(frozen=True)
class ThreatModel:
    """Threat model: all assumptions about the attacker, independent of any attack algorithm.

    `goal` is None for any wrong class, or the target class. `queries` is the largest number of queries that one attack
    may make for one example; None is no limit. `surrogates` are models of the attacker, which have no limits.
    """

    constraint: Constraint = field(default_factory=lambda: Linf(8 / 255))
    goal: int | None = None
    access: Access = "gradients"
    queries: int | None = None
    surrogates: tuple[Model, ...] = ()
    unit: str = ""
    """unit of eps: `range`, `std` or `@FILE`; empty for the unit of the inputs"""

    def __post_init__(self) -> None:
        eps = self.constraint.eps
        if not eps >= 0:
            raise UsageError(f"eps is {eps}; it must be 0 (clean accuracy) or more, as in linf:8/255")
        if self.queries is not None and self.queries < 1:
            raise UsageError(f"queries is {self.queries}; it must be at least 1, or left out for no limit")

    def gives(self, needed: Access) -> bool:
        """Return whether the threat model gives the attacker enough access for an attack that needs the access
        `needed`.
        """
        return ACCESS_ORDER.index(needed) <= ACCESS_ORDER.index(self.access)

    def with_change(self, change: str) -> str:
        """Return the text of this threat model with another change, such as `l2:0.5`, in the unit of the inputs."""
        return threat_text(change, self.goal, self.access, self.queries)
