"""The settings of `holdfast audit membership`. The module imports no torch."""

from typing import Annotated

from annotated_types import Ge, Gt, Lt
from pydantic import Field

from holdfast.api import placing
from holdfast.api.verb_settings import AuditOptions, AuditVerb, TrainingFunctionSource
from holdfast.settings import groups, values
from holdfast.settings.groups import Flag


class MembershipOptions(TrainingFunctionSource, AuditOptions):
    """Settings of the command `holdfast audit membership` that no other command has."""

    non_members: Annotated[values.Given | None, Flag("DATA", completion="DATA", common=True)] = Field(
        default=None,
        description="Audit this model: examples that it was not trained on, of the same kind as its training examples, "
        "which are DATA.",
    )
    references: Annotated[Annotated[int, Ge(2)] | None, Flag("N", common=True)] = Field(
        default=None,
        description="Number of networks that are trained on random halves, an even number (default: 16, and none for a "
        "model with non-members).",
    )
    epochs: Annotated[values.Positive, Flag("N")] = Field(
        default=30, description="Epochs of the training of networks without a function --train (default: 30)."
    )
    workers: Annotated[values.Positive | None, Flag("N", identifies=False)] = Field(
        default=None, description="Number of processes that train networks, each with one thread."
    )
    fpr: Annotated[float, Gt(0), Lt(1), Flag("X", common=True)] = Field(
        default=0.01,
        description="False-positive rate of the attacker at which members are found (default: 0.01).",
    )


class AuditMembership(
    groups.ServerLimits,
    groups.InferenceSource,
    groups.ExampleGroups,
    placing.ClusterSettings,
    MembershipOptions,
    AuditVerb,
):
    """All settings of the command `holdfast audit membership`. `data` are the training examples of `model` if
    `non_members` are given, and otherwise the examples of which a training procedure gets random halves.
    """

    verb = "audit-membership"
    kind = "membership"
    summary = "measure how many training examples an attacker finds"
    about = (
        "Measure how many training examples an attacker finds among others, at a low false-positive rate.\n\n"
        "With --non-members, MODEL is audited, and DATA are its training examples. Otherwise the training "
        "procedure is audited: --train, or a default training of the architecture of MODEL, on random halves "
        "of DATA."
    )
    opening = "holdfast.api.audit_membership:prepared_membership"
    example = "mnist-cnn mnist-mini --references 16"
    files = ("non_members",)
