"""Threat models of policies: an attacker that changes observations, actions or parameters of the environment."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from holdfast.core.errors import UsageError
from holdfast.core.names import exact_size, limits_text
from holdfast.core.types import Inputs, PerExample
from holdfast.threats.domains import CONTROL, Domain
from holdfast.threats.transformations import Whole


class _OfEpisodes(Whole):
    domain: "ClassVar[Domain | None]" = CONTROL
    measures_robustness: ClassVar[bool] = False

    def distance(self, x_adv: Inputs, x: Inputs) -> PerExample:
        """Raise an error, because episodes have no distance."""
        raise self.refusal()

    def refusal(self) -> UsageError:
        """Return the error for an attack on examples, which cannot be used in episodes."""
        return UsageError(
            f"the threat {self} is for policies in an environment; attacks on examples need a threat such as linf:0.1"
        )


@dataclass(frozen=True)
class _Perturbation(_OfEpisodes):
    norm: str
    size: float

    @property
    def eps(self) -> float:
        """Size of the perturbation of each step."""
        return self.size

    @property
    def limits(self) -> Mapping[str, float | str]:
        """The norm and the size."""
        return {"norm": self.norm, "size": self.size}

    def resized(self, eps: float) -> "_Perturbation":
        """Return the same threat with another size."""
        return type(self)(self.norm, eps)

    def __str__(self) -> str:
        return f"{self.name}:{self.norm}:{exact_size(self.size)}"


class Observations(_Perturbation):
    """Perturbations of what a policy observes, of a norm `norm` of at most `size` in each step."""

    name: ClassVar[str] = "observations"


class Actions(_Perturbation):
    """Perturbations of the actions of a policy, which are vectors."""

    name: ClassVar[str] = "actions"


@dataclass(frozen=True)
class Parameters(_OfEpisodes):
    """Relative changes of parameters of the environment, which stay the same during an episode."""

    name: ClassVar[str] = "parameters"

    mass: float = 0.0
    length: float = 0.0

    @property
    def limits(self) -> Mapping[str, float | str]:
        """Largest relative change of each parameter, without those that do not change."""
        return {name: value for name, value in vars(self).items() if value}

    def resized(self, eps: float) -> "Parameters":
        """Return the same threat, which has no single size."""
        return self

    def __str__(self) -> str:
        return limits_text(self.name, self.limits)
