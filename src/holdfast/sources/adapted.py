"""What is known of a model that another library made, once it can be called with tensors."""

from dataclasses import dataclass

from torch import nn

from holdfast.core.outputs import OutputKind
from holdfast.core.types import Access, Layout


@dataclass(frozen=True)
class Adapted:
    """A module from inputs to outputs, and what the library's own object says of them; None where it says nothing."""

    net: nn.Module
    access: Access = "gradients"
    hides: str = ""
    """why it gives no gradients, where it gives none"""
    classes: int | None = None
    class_names: tuple[str, ...] | None = None
    class_labels: tuple[int, ...] | None = None
    """the labels of the classes in the order of the outputs, where these are whole numbers other than 0, 1, 2, …"""
    feature_names: tuple[str, ...] | None = None
    """of the columns that it was fitted on, in their order"""
    output: OutputKind | None = None
    layout: Layout | None = None
