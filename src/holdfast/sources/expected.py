"""Declared properties of a data set: the legal range, the layout, the normalisation and the classes."""

from dataclasses import dataclass
from typing import Literal

from holdfast.core.model import Bounds
from holdfast.core.normalisation import Normalisation
from holdfast.core.types import Layout
from holdfast.sources.probing import ProbedClassifier

ClassOrder = Literal["lexical", "numeric"]
"""Order in which class folders and text labels are numbered if no class names are declared."""


@dataclass(frozen=True)
class Expected:
    """Declared properties of the data, and the model that will use them. None means not known."""

    bounds: Bounds = Bounds()
    """legal range; floats outside it are refused, and it determines how bytes are scaled"""
    classes: int | None = None
    """number of classes; larger labels are refused"""
    class_names: tuple[str, ...] | None = None
    """names of the model's outputs, in their order"""
    class_labels: tuple[int, ...] | None = None
    """labels of the model's outputs, in their order, if they are whole numbers other than 0, 1, 2, …"""
    feature_names: tuple[str, ...] | None = None
    """columns of a table that the model was fitted on, in their order"""
    names_declared: bool = False
    """whether the user typed the names; False if they come from the model's file"""
    class_order: ClassOrder | None = None
    layout: Layout | None = None
    """layout of the stored arrays"""
    normalised: Normalisation | None = None
    """normalisation of the stored values, which is undone"""
    probe: ProbedClassifier | None = None
    """the model, to find out the shapes that it takes and the classes that it has"""
    lenient: bool = False
    """whether values outside the bounds and labels outside the classes are accepted"""
    checks_labels: bool = True
    """False if the labels are not used"""

    @property
    def any_label(self) -> bool:
        """Whether labels outside the classes are accepted."""
        return self.lenient or not self.checks_labels

    @property
    def remote(self) -> bool:
        """Whether the model is behind a server."""
        return self.probe is not None and self.probe.model.remote
