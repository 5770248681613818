"""The properties that a user or a model declares for a data set: the valid range, the layout, the normalisation and the
classes.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from holdfast.core.model import Bounds
from holdfast.core.normalisation import Normalisation
from holdfast.core.types import Layout
from holdfast.core.units import Units
from holdfast.io.remote.probing import ProbedClassifier

if TYPE_CHECKING:
    from holdfast.threats.tables.rules import Rules
    from holdfast.threats.text_edits import TextEdits

ClassOrder = Literal["lexical", "numeric"]
"""Order in which class folders and string labels are numbered if no class names are declared."""


@dataclass(frozen=True)
class FirstTable:
    """The data set of a run that was opened first, by whose names of columns those of others are matched."""

    name: str
    columns: tuple[str, ...] | None
    """features in the order of the inputs, or their positions without names; None if the data are no table"""
    named: bool
    """whether `columns` are names"""

    @property
    def has(self) -> str:
        """The beginning of a message about its columns."""
        return f"the first table, {self.name}, has"


@dataclass(frozen=True)
class Expected:
    """Declared properties of a data set, and the model that will be called with it. A property is None if it is
    unknown.
    """

    bounds: Bounds = Bounds()
    """valid range; floats outside it are rejected, and it determines how bytes are scaled"""
    classes: int | None = None
    """number of classes; labels that are not below it are rejected"""
    class_names: tuple[str, ...] | None = None
    """names of the model's outputs, in their order"""
    class_labels: tuple[int, ...] | None = None
    """labels of the model's outputs, in their order, if they are integers other than 0, 1, 2, …"""
    feature_names: tuple[str, ...] | None = None
    """names of the columns of the table that the model was fitted on, in their order"""
    names_declared: bool = False
    """whether the user declared the class names; False if they come from the model's file"""
    class_order: ClassOrder | None = None
    layout: Layout | None = None
    """layout of the stored arrays"""
    normalised: Normalisation | None = None
    """normalisation of the stored values; it is undone when they are read"""
    units: Units | None = None
    """units in which inputs are measured when they are read; `bounds` are in these units"""
    probe: ProbedClassifier | None = None
    """model whose accepted input shapes and number of classes are determined by calling it"""
    lenient: bool = False
    """whether values outside the bounds and labels outside the classes are accepted"""
    accepts_missing: bool = False
    """whether missing values are accepted without a test of the model"""
    checks_labels: bool = True
    """whether labels are checked; False if they are not used"""
    needs_labels: bool = True
    """whether data without labels are refused; otherwise their labels are `UNLABELLED`"""
    groups: str | None = None
    """column of a table, or array of an `.npz` file, that states the group of each example"""
    needs_groups: bool = True
    """whether data without this column or array are refused; False if their groups are not used"""
    words: tuple[str, ...] | None = ()
    """columns of a table that are read as strings, and are no numeric features; None for all columns"""
    rules: "Rules | None" = None
    """rules of the table whose rows are the inputs; None for other inputs"""
    first: FirstTable | None = None
    """data set whose columns those of a table are matched with; None for the first of a run"""
    has_threat: bool = True
    """whether the verb has a threat model, which may have rules of a table or be on texts"""
    edits: "TextEdits | None" = None
    """constraint on texts, if the inputs are texts; None for numbers"""

    @property
    def bounds_of_values(self) -> Bounds:
        """Valid range of the stored values."""
        return self.bounds if self.units is None else self.units.values

    @property
    def column_names(self) -> tuple[str, ...] | None:
        """Names of the columns of the first table or, without one, of those that the model was fitted on."""
        return self.first.columns if self.first is not None and self.first.named else self.feature_names

    @property
    def column_source(self) -> str:
        """The source of `column_names`, as the beginning of a message."""
        named = self.first is not None and self.first.named
        return self.first.has if self.first is not None and named else "the model was fitted on"

    @property
    def any_label(self) -> bool:
        """Whether labels outside the classes of the model are accepted."""
        return self.lenient or not self.checks_labels

    @property
    def remote(self) -> bool:
        """Whether the model that will be called with the data is behind a server."""
        return self.probe is not None and self.probe.model.remote
