"""Kinds of inputs: images, clips of sound, rows of tables with rules, texts, files, and other numbers. A report shows
pictures, sounds, changed columns, words or bytes of their examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdfast.core.errors import Remedy, UsageError

if TYPE_CHECKING:
    from holdfast.core.constraints import Constraint
    from holdfast.core.types import Inputs


@dataclass(frozen=True)
class Domain:
    """A kind of inputs."""

    name: str
    noun: str = "examples"
    """what examples are called in reports"""
    metrics: tuple[str, ...] = ()
    """names of the metrics on which gates can be set; empty for those of classifiers"""
    certified: tuple[str, ...] = ()
    """the same for a certification"""
    of_symbols: bool = False
    """whether inputs are sequences of symbols, such as characters, whose differences mean nothing"""

    def __reduce__(self) -> str:
        """Return the name of the constant in this module, so that copies in worker processes are the same object."""
        return self.name.upper()


IMAGE = Domain("image", "images")
NUMBERS = Domain("numbers")
"""any other inputs of numbers"""
SIGNAL = Domain("signal", "clips")
"""clips of sound (samples), or (channels, samples)"""
TABLE = Domain("table")
TEXT = Domain("text", "texts", of_symbols=True)
BYTES = Domain("bytes", "files", of_symbols=True)
CONTROL = Domain("control", "episodes", ("worst_return", "clean_return"), ("certified_actions",))
"""episodes of a policy in an environment, which stands in the place of data"""


def domain_of(constraint: "Constraint", shape: Sequence[int] | None) -> Domain:
    """Return the domain of inputs with a shape (None if it is unknown): that of the constraint if it changes inputs of
    one kind alone, and otherwise images or numbers.
    """
    if constraint.domain is not None:
        return constraint.domain
    return IMAGE if shape is not None and is_image(shape) else NUMBERS


def is_image(shape: Sequence[int]) -> bool:
    """Return whether inputs of a shape are images, which have their channels first and 1, 3 or 4 of them."""
    return len(shape) == 3 and shape[0] in {1, 3, 4} and min(shape[1:]) > 1


def refuse_no_images(x: "Inputs") -> None:
    """Raise `UsageError` if inputs are not images, such as rows of a table, because corruptions need images."""
    if x.dim() != 4 or x.shape[1] not in (1, 3):
        shape = "x".join(map(str, x.shape[1:]))
        raise UsageError(
            f"common corruptions need images of 1 or 3 channels (channels x height x width), "
            f"and these inputs are {shape}",
            Remedy("threat", "linf:8/255"),
        )
