"""Changes of the embeddings of one word of a text as a constraint, such as `l2:0.1,on=embeddings,words=1`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from holdfast.core.errors import UsageError
from holdfast.core.names import exact_size
from holdfast.core.types import Inputs, PerExample
from holdfast.threats.domains import TEXT, Domain
from holdfast.threats.transformations import Whole


@dataclass(frozen=True)
class WordEmbeddings(Whole):
    """Constraint that allows the embedding of any one word of a text to change, inside a ball around its own.

    The text does not change, so that no attack applies; robustness is proved (`holdfast.certifiers.word_embeddings`).
    """

    provers: ClassVar[tuple[str, ...]] = ("ibp", "crown")
    domain: ClassVar[Domain | None] = TEXT
    measures_robustness: ClassVar[bool] = False
    room: ClassVar[tuple[int, int]] = (0, 0)
    """number of words that may become longer, and of characters"""

    norm: str = "l2"
    """norm of the ball: linf, l2 or l1"""
    eps: float = math.inf
    """radius of the ball, in units of the embeddings"""
    on: str = "embeddings"
    words: int = 1
    """number of words whose embeddings change"""

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2", "l1") or self.on != "embeddings" or self.words != 1:
            raise UsageError(
                f"the threat is {self}; expected a norm and a size as in l2:0.1,on=embeddings,words=1"
            )

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name of the norm on the command line."""
        return self.norm

    @property
    def limits(self) -> Mapping[str, float | str]:
        """Norm and radius, and what changes."""
        return {"norm": self.norm, "eps": self.eps, "on": self.on, "words": self.words}

    def distance(self, x_adv: Inputs, x: Inputs) -> PerExample:
        """Return 0 for each text that did not change, and infinity for any other."""
        changed = (x_adv != x).flatten(1).any(1)
        return x.new_zeros(len(x)).masked_fill(changed, float("inf"))

    def resized(self, eps: float) -> "WordEmbeddings":
        """Return the constraint with another radius."""
        return replace(self, eps=eps)

    def refusal(self) -> UsageError:
        """Return the error for an attack, which changes texts."""
        return UsageError(
            f"the threat {self} changes embeddings and no text, so that no attack applies; prove robustness with "
            "holdfast certify"
        )

    def __str__(self) -> str:
        return f"{self.norm}:{exact_size(self.eps)},on={self.on},words={self.words}"
