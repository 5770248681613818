"""Description of a model of another library, such as scikit-learn, that was wrapped as a torch module."""

from dataclasses import dataclass

from torch import nn

from holdfast.core.outputs import OutputKind
from holdfast.core.types import Access, Layout


@dataclass(frozen=True)
class Adapted:
    """A torch module that calls a model of another library, and the properties that the original model declares.

    A property is None if it is not declared.
    """

    net: nn.Module
    access: Access = "gradients"
    hides: str = ""
    """reason why the model gives no gradients; empty if it gives them"""
    classes: int | None = None
    class_names: tuple[str, ...] | None = None
    class_labels: tuple[int, ...] | None = None
    """labels of the classes in the order of the outputs, if they are integers other than 0, 1, 2, …"""
    feature_names: tuple[str, ...] | None = None
    """names of the columns that the model was fitted on, in their order"""
    output: OutputKind | None = None
    layout: Layout | None = None
