"""The settings of the audits that no other command has. The module does not import torch."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import Field

from holdfast.core.catalogue import AUDITS, REPORT_FILE
from holdfast.core.errors import UsageError
from holdfast.gates.grammar import parse
from holdfast.settings import values
from holdfast.settings.groups import Flag, SettingGroup


class AuditOptions(SettingGroup):
    """Settings that all audits have."""

    gates: Annotated[list[str], Flag("G", "--gate", "-g", identifies=False)] = Field(
        default_factory=list,
        description="Condition on the result of the audit: no-backdoor, no-poison and, for the other audits, "
        "not-flagged pass if nothing is flagged; membership and privacy have the metrics membership_tpr_at_1_percent "
        "and epsilon_lower, as in epsilon_lower <= 2. Without a gate, the exit code is 0.",
    )
    output: Annotated[list[str], Flag("FILE", short="-o", completion="PATH", identifies=False)] = Field(
        default_factory=list,
        description=REPORT_FILE,
    )
    kind: ClassVar[str] = ""
    """name of the audit in `holdfast.core.catalogue.AUDITS`"""

    def refuse_contradictions(self, prefix: str, written: Mapping[str, str]) -> None:
        """Raise `UsageError` for a gate that the audit does not have."""
        entry = AUDITS[self.kind]
        for gate in self.gates:
            if gate.strip() == entry.gate:
                continue
            if not entry.metrics or gate.strip() in {other.gate for other in AUDITS.values()}:
                raise UsageError(
                    f"{prefix}gate {gate!r} is not one of audit {self.kind}, whose gate is {entry.gate}"
                )
            parse(gate, entry.metrics)


class TrainingFunctionSource(SettingGroup):
    """Setting of the audits that train networks."""

    train: Annotated[values.Given | None, Flag("FILE.py:F")] = Field(
        default=None,
        description="Function fit(x, y, seed) that trains a network on the examples and returns it, as in net.py:fit. "
        "Or a folder that harden wrote, whose card states the training.",
    )


class BackdoorOptions(AuditOptions):
    """Settings of the command `holdfast audit backdoor` that no other command has."""

    kind = "backdoor"
    controls: Annotated[values.Given | None, Flag("FOLDER", completion="PATH")] = Field(
        default=None,
        description="Folder with the weights of at least 20 networks of the same architecture that were trained on "
        "clean data, with which the model is compared.",
    )
    train_controls: Annotated[values.Duration | None, Flag("TIME")] = Field(
        default=None,
        description="Train control networks on the train split of the data, each until it is as accurate as the model, "
        "at most for this time together, as in 20min.",
    )
    stream: Annotated[values.Given | None, Flag("DATA", completion="DATA")] = Field(
        default=None,
        description="Inputs that the model received. Those with a low entropy under other images are listed (STRIP).",
    )
    trigger_out: Annotated[str | None, Flag("FILE", completion="PATH", identifies=False)] = Field(
        default=None, description="Write the recovered trigger to this .npz file."
    )


class PoisonOptions(AuditOptions):
    """Settings of the command `holdfast audit poison` that no other command has."""

    kind = "poison"
    clean: Annotated[values.Given | None, Flag("DATA", completion="DATA")] = Field(
        default=None,
        description="Trusted examples of the same classes (the test split if there is one), with which the data are "
        "compared. Without them, examples are ranked and the result is unclear.",
    )
    suspects: Annotated[str | None, Flag("FILE", completion="PATH", identifies=False)] = Field(
        default=None, description="Write the suspect examples to this .csv file, with their scores."
    )


class MembershipOptions(TrainingFunctionSource, AuditOptions):
    """Settings of the command `holdfast audit membership` that no other command has."""

    kind = "membership"
    non_members: Annotated[values.Given | None, Flag("DATA", completion="DATA")] = Field(
        default=None,
        description="Audit this model: examples that it was not trained on, of the same kind as its training examples, "
        "which are DATA.",
    )
    references: Annotated[Annotated[int, Ge(2)] | None, Flag("N")] = Field(
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
    fpr: Annotated[float, Gt(0), Lt(1), Flag("X")] = Field(
        default=0.01,
        description="False-positive rate of the attacker at which members are found (default: 0.01).",
    )


class PrivacyOptions(TrainingFunctionSource, AuditOptions):
    """Settings of the command `holdfast audit privacy` that no other command has."""

    kind = "privacy"
    epsilon: Annotated[Annotated[float, Gt(0)] | None, Flag("X")] = Field(
        default=None,
        description="The epsilon that the training claims, as in 2 (default: that of a card of dp-sgd in --train).",
    )
    delta: Annotated[float, Gt(0), Lt(1), Flag("X")] = Field(
        default=1e-5,
        description="The delta that the training claims (default: that of a card of dp-sgd in --train, else 1e-5).",
    )
    canaries: Annotated[values.Positive, Ge(8), Flag("N")] = Field(
        default=200, description="Number of canaries, each trained on with probability 1/2 (default: 200)."
    )
    canary: Annotated[Literal["mislabelled", "random"], Flag("KIND")] = Field(
        default="mislabelled",
        description="What the canaries are: examples with a wrong label (mislabelled, the default), or random inputs "
        "with a random label (random).",
    )
    guesses: Annotated[float, Gt(0), Le(1), Flag("SHARE")] = Field(
        default=2 / 3,
        description="Share of the canaries about which a guess is made, those with extreme losses (default: 2/3).",
    )


class GeneratorOptions(AuditOptions):
    """Settings of the command `holdfast audit generator` that no other command has."""

    kind = "generator"
    held_out: Annotated[values.Given | None, Flag("DATA", completion="DATA")] = Field(
        default=None,
        description="Examples of the same source that the generator was not trained on, with which its samples are "
        "compared.",
    )
    samples: Annotated[values.Positive, Flag("N")] = Field(
        default=2000, description="Number of samples (default: 2000)."
    )
    features: Annotated[str | None, Flag("MODEL[,K=V]", completion="MODEL")] = Field(
        default=None,
        description="Network whose features are compared, as in net.pt,arch=net.py:make (default: a small network that "
        "is trained on the labels of the training examples).",
    )
    latent: Annotated[values.Amount, Flag("EPS")] = Field(
        default=0.1,
        description="Root mean square of the changes for which the largest change of the output is searched, in "
        "standard deviations of the elements of a latent vector or of the features; 0 skips the search (default: 0.1).",
    )
    condition: Annotated[values.Whole | None, Flag("CLASS")] = Field(
        default=None,
        description="Class to which the samples of a conditional generator are restricted; they are compared with the "
        "examples of this label (default: all classes).",
    )

    def refuse_contradictions(self, prefix: str, written: Mapping[str, str]) -> None:
        """Raise `UsageError` for a gate on the sensitivity without the search that measures it."""
        metrics = [gate for gate in self.gates if gate.strip() != AUDITS[self.kind].gate]
        for gate in metrics:
            if not self.latent and parse(gate, AUDITS[self.kind].metrics).metric == "latent_sensitivity":
                raise UsageError(
                    f"{prefix}gate {gate!r} needs the largest change of the output, and latent is 0, which skips its "
                    "search; leave latent out"
                )
