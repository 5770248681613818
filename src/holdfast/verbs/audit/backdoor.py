"""The settings of `holdfast audit backdoor`. The module imports no torch."""

from typing import Annotated

from pydantic import Field

from holdfast.settings import values
from holdfast.settings.groups import Flag
from holdfast.verbs.settings import AuditVerb


class AuditBackdoor(AuditVerb):
    """All settings of the command `holdfast audit backdoor`. `data` are clean examples.

    `model` is a network with gradients and trainable weights, and without a detector of its own. `data` are clean
    examples of at least two classes, on which it should not have been trained; without `n` and `sample`, at most
    2,000 of them, chosen by `seed`, are used. For each class, the smallest mask and pattern are searched with which
    98 % of the examples of the other classes are predicted as this class (Wang et al., "Neural Cleanse", S&P 2019).
    `controls` and `train_controls` exclude each other. `stream` contains inputs of the same shape, which need no
    labels and are examined by STRIP (Gao et al., ACSAC 2019, arXiv:1902.06531).

    `facts["sizes"]` of the result are the sums of the masks, one for each class. With controls, `facts["p"]` is the
    probability that a clean network has a trigger whose size is as unusual.
    """

    verb = "audit-backdoor"
    kind = "backdoor"
    summary = "search a model for a backdoor"
    about = (
        "Search MODEL for a backdoor: a small trigger with which it predicts one class for almost every "
        "input.\n\n"
        "DATA are clean examples. MODEL is flagged only if its trigger is unusual among those of at least 20 "
        "clean networks of the same architecture (--controls, or --train-controls); without them the result "
        "is unclear."
    )
    opening = "holdfast.verbs.audit.opening_models:prepared_backdoor"
    files = ("controls",)
    controls: Annotated[values.Given | None, Flag("FOLDER", completion="PATH", common=True)] = Field(
        default=None,
        description="Folder with the weights of at least 20 networks of the same architecture that were trained on "
        "clean data, with which the model is compared.",
    )
    train_controls: Annotated[values.Duration | None, Flag("TIME", common=True)] = Field(
        default=None,
        description="Train control networks on the train split of the data, each until it is as accurate as the model, "
        "at most for this time together, as in 20min.",
    )
    stream: Annotated[values.Given | None, Flag("DATA", completion="DATA", common=True)] = Field(
        default=None,
        description="Inputs that the model received. Those with a low entropy under other images are listed (STRIP).",
    )
    trigger_out: Annotated[str | None, Flag("FILE", completion="PATH", identifies=False)] = Field(
        default=None, description="Write the recovered trigger to this .npz file."
    )
