"""The threat model: what an attacker may change, must achieve, can access and may spend.

The module does not import torch: the constraint of a threat model that is read from text is created when it is first
used.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING

from holdfast.core.errors import UsageError
from holdfast.core.names import threat_text

if TYPE_CHECKING:
    from holdfast.core.constraints import Constraint
    from holdfast.core.model import Model
    from holdfast.core.types import Access
    from holdfast.threats.domains import Domain


@dataclass(frozen=True)
class Change:
    """A constraint in text form, such as that of `linf:8/255`: its name, and its size and limits, which are the
    arguments of the function that creates it. Files that it names are read when the constraint is created.
    """

    name: str = "linf"
    limits: Mapping[str, float | str] = field(default_factory=lambda: {"eps": 8 / 255})
    creator: str = "holdfast.core.constraints:Linf"
    """module and name of the function or class that creates the constraint"""
    domain: "Domain | None" = None
    """kind of the inputs that can be changed like this; None if any inputs of numbers can"""

    @property
    def eps(self) -> float:
        """Size of the change. It is infinite if the attacks search for the smallest change that breaks an example."""
        sizes = (self.limits[name] for name in ("eps", "size", "changes", "severity") if name in self.limits)
        return float(next(sizes, 1.0))

    @cached_property
    def constraint(self) -> "Constraint":
        """The constraint, which is created once."""
        module, _, name = self.creator.partition(":")
        created: Constraint = getattr(import_module(module), name)(**self.limits)
        return created


class _Created:
    """The field `constraint` of a threat model, to which a constraint or its text form can be assigned."""

    def __get__(self, threat: "ThreatModel | None", owner: type["ThreatModel"]) -> "Constraint":
        if threat is None:  # the default of the field
            return Change()  # type: ignore[return-value]  # it is assigned to the field, and then read as a constraint
        given: Constraint | Change = vars(threat)["constraint"]
        return given.constraint if isinstance(given, Change) else given

    def __set__(self, threat: "ThreatModel", given: "Constraint | Change") -> None:
        vars(threat)["constraint"] = given


@dataclass(frozen=True)
class ThreatModel:
    """Threat model: all assumptions about the attacker, independent of any attack algorithm.

    `goal` is None for any wrong class, or the target class. `queries` is the largest number of queries that one attack
    may make for one example; None is no limit. `surrogates` are models of the attacker, which have no limits. As text
    it is what was read, and otherwise its form on the command line.
    """

    constraint: _Created = _Created()
    goal: int | None = None
    access: "Access" = "gradients"
    queries: int | None = None
    surrogates: "tuple[Model, ...]" = ()
    unit: str = ""
    """unit of eps: `range`, `std` or `@FILE`; empty for the unit of the inputs"""
    goal_name: str = ""
    """name of the target class, if its number is known from the data only"""
    objective: str = ""
    """what an attack on a detector (`Objective`) or on masks (`map:K`) is to achieve; empty for any error"""
    given: str = field(default="", init=False, compare=False)
    """the text from which the threat model was parsed; empty for another one"""

    def __post_init__(self) -> None:
        if not self.eps >= 0:
            raise UsageError(f"eps is {self.eps}; it must be 0 (clean accuracy) or more, as in linf:8/255")
        if self.queries is not None and self.queries < 1:
            raise UsageError(f"queries is {self.queries}; it must be at least 1, or left out for no limit")

    @property
    def change(self) -> "Constraint | Change":
        """The constraint, in its text form if it was not created yet."""
        given: Constraint | Change = vars(self)["constraint"]
        return given

    @property
    def name(self) -> str:
        """Name of the constraint on the command line, such as `linf`."""
        return self.change.name

    @property
    def eps(self) -> float:
        """Size of the change, as the constraint states it."""
        return self.change.eps

    def opened(self) -> "ThreatModel":
        """Return the threat model with the target class of its constraint as the goal. Only some constraints, such as a
        trigger, have a target class; the threat model is unchanged for others. A constraint that is still text is
        created, which reads its file if it has one.

        Raises `UsageError` if the threat model has another target class than its constraint.
        """
        goal = self.constraint.goal
        if goal is None:
            return self
        if self.goal not in (None, goal):
            raise UsageError(
                f"the goal is targeted:{self.goal}, and {self.constraint} has the target class {goal}; leave the goal "
                "out"
            )
        return replace(self, goal=goal)

    def gives(self, needed: "Access") -> bool:
        """Return whether the threat model gives the attacker enough access for an attack that needs the access
        `needed`.
        """
        from holdfast.core.types import ACCESS_ORDER  # late: it imports torch

        return ACCESS_ORDER.index(needed) <= ACCESS_ORDER.index(self.access)

    def with_change(self, change: str) -> str:
        """Return the text of this threat model with another change, such as `l2:0.5`, in the unit of the inputs."""
        return threat_text(change, self.goal, self.access, self.queries, objective=self.objective)

    def with_size(self, eps: float) -> str:
        """Return the text of this threat model with another eps, in the unit of the inputs."""
        return self.with_change(str(self.constraint.resized(eps)))

    @property
    def text(self) -> str:
        """The threat model as an argument on the command line, without the values that are defaults."""
        return threat_text(
            str(self.constraint), self.goal, self.access, self.queries, self.unit, self.objective
        )

    def __str__(self) -> str:
        return self.given or self.text

    def __repr__(self) -> str:
        return f"ThreatModel({str(self)!r})"
