"""The settings of `holdfast audit membership`. The module imports no torch."""

from typing import Annotated

from annotated_types import Ge, Gt, Lt
from pydantic import Field

from holdfast.settings import groups, values
from holdfast.settings.groups import Flag
from holdfast.verbs import placement
from holdfast.verbs.settings import AuditOptions, AuditVerb, TrainingFunctionSource


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
    placement.ClusterSettings,
    MembershipOptions,
    AuditVerb,
):
    """All settings of the command `holdfast audit membership`. `data` are the training examples of `model` if
    `non_members` are given, and otherwise the examples of which a training procedure gets random halves.

    A training function `fit(x, y, seed)` gets `x` (n, …) after the preprocessing of `model` and `y` (n,) as
    tensors, and returns a network with the same number of classes. It is called `references` times; without it,
    networks are trained with Adam for `epochs` epochs, which needs a `model` with gradients. The attacks are those
    of Carlini et al. (LiRA, S&P 2022, arXiv:2112.03570), Zarifzadeh et al. (RMIA, ICML 2024, arXiv:2312.03262) and
    others. The result is flagged if the interval of the true-positive rate at `fpr` is above `fpr`, and unclear if
    members and non-members differ in kind, or if attacks without reference networks do not find more.

    `facts["tpr"]` of the result is the share of the members that are found at the false-positive rate `fpr`, and
    `metrics` contains `membership_tpr_at_1_percent`, which needs 1,000 non-members. A rate for which fewer than ten
    false positives are expected is refused.
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
    opening = "holdfast.verbs.audit.opening_trainings:prepared_membership"
    example = "mnist-cnn mnist-mini --references 16"
    files = ("non_members",)
