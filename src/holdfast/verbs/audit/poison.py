"""The settings of `holdfast audit poison`. The module imports no torch."""

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field

from holdfast.settings import groups, values
from holdfast.settings.groups import Flag
from holdfast.verbs.settings import AuditVerb


class AuditPoison(AuditVerb):
    """All settings of the command `holdfast audit poison`. `data` are the examples that are audited, and `model` is
    the network that is trained on them.

    `model` is the network that is trained on the data; its weights are not used. Four copies with random weights
    are trained for four epochs each: one on all examples, and three without a third of them each. Examples are
    scored by the features of these networks (Tran et al., 2018, arXiv:1811.00636; Chen et al., 2018,
    arXiv:1811.03728), by the label that other networks predict (Northcutt et al., 2021, arXiv:1911.00068), and by
    their loss (Li et al., 2021, arXiv:2110.11571). Wrong labels are found as well. `clean` must have the same
    classes and shape as `data`, which need at least two classes.

    `facts["suspects"]` of the result is the number of suspect examples, and `suspects` names a .csv file with a row
    for each.
    """

    verb = "audit-poison"
    kind = "poison"
    summary = "search training data for manipulated examples"
    about = (
        "Search the training examples in DATA for manipulated ones, with a network (--model) that is trained "
        "on them.\n\n"
        "The train split is audited if DATA has one. DATA are flagged only by comparison with trusted "
        "examples (--clean); without them the examples are ranked, and the result is unclear."
    )
    arguments: ClassVar[Mapping[str, str]] = {"data": "DATA"}
    opening = "holdfast.verbs.audit.opening_models:prepared_poison"
    example = "mnist-mini --model mnist-cnn"
    files = ("clean",)
    model: Annotated[values.Given | None, Flag("MODEL", completion="MODEL", common=True)] = Field(
        default=None, description=groups.ModelSource.model_fields["model"].description
    )
    clean: Annotated[values.Given | None, Flag("DATA", completion="DATA", common=True)] = Field(
        default=None,
        description="Trusted examples of the same classes (the test split if there is one), with which the data are "
        "compared. Without them, examples are ranked and the result is unclear.",
    )
    suspects: Annotated[str | None, Flag("FILE", completion="PATH", identifies=False, common=True)] = Field(
        default=None, description="Write the suspect examples to this .csv file, with their scores."
    )
