"""What is declared of a data set: the legal range, the layout, the normalisation and the classes."""

from dataclasses import dataclass
from typing import Literal

from holdfast.core.model import Bounds
from holdfast.core.normalisation import Normalisation
from holdfast.core.types import Layout
from holdfast.sources.probing import Probe

ClassOrder = Literal["lexical", "numeric"]
"""How class folders and text labels are numbered where no names of classes are declared."""


@dataclass(frozen=True)
class Expected:
    """What is declared of the data, and the model that they are for; None where nothing is known."""

    bounds: Bounds = Bounds()
    """floats outside them are refused; they say how bytes are read"""
    classes: int | None = None
    """labels beyond them are refused"""
    class_names: tuple[str, ...] | None = None
    """of the model's outputs, in their order"""
    class_labels: tuple[int, ...] | None = None
    """labels of the model's outputs, in their order, where these are whole numbers other than 0, 1, 2, …"""
    feature_names: tuple[str, ...] | None = None
    """columns of a table that the model was fitted on, in their order"""
    names_declared: bool = False
    """whether the names were typed, and not read from the model's file"""
    class_order: ClassOrder | None = None
    layout: Layout | None = None
    """of the stored arrays"""
    normalised: Normalisation | None = None
    """of the stored values, which is undone"""
    probe: Probe | None = None
    """the model, for a look at the shapes that it takes and the classes that it has"""
    lenient: bool = False
    """take values outside the bounds and labels outside the classes, too"""
    checks_labels: bool = True
    """False where the labels are not used"""

    @property
    def any_label(self) -> bool:
        """Whether labels outside the classes are taken."""
        return self.lenient or not self.checks_labels

    @property
    def remote(self) -> bool:
        """Whether the model is behind a server."""
        return self.probe is not None and self.probe.model.remote
