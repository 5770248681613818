"""The settings of the audits that no other command has. The module does not import torch."""

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field

from holdfast.core.catalogue import AUDITS
from holdfast.core.errors import UsageError
from holdfast.gates.grammar import parse
from holdfast.settings import values
from holdfast.settings.groups import Flag, SettingGroup


class AuditOptions(SettingGroup):
    """Settings that all audits have."""

    gates: Annotated[list[str], Flag("G", "--gate", "-g", identifies=False)] = Field(
        default_factory=list,
        description="Condition on the result of the audit, as in no-backdoor, which passes if nothing is flagged.",
    )
    output: Annotated[list[str], Flag("FILE", short="-o", completion="PATH", identifies=False)] = Field(
        default_factory=list,
        description="Report file, in the format of its suffix: .html .json .md .xml; - for JSON on stdout.",
    )
    kind: ClassVar[str] = ""
    """name of the audit in `holdfast.core.catalogue.AUDITS`"""

    def refuse_contradictions(self, prefix: str, written: Mapping[str, str]) -> None:
        """Raise `UsageError` for a gate that the audit does not have."""
        entry = AUDITS[self.kind]
        for gate in self.gates:
            if gate.strip() == entry.gate:
                continue
            if not entry.metrics:
                raise UsageError(
                    f"{prefix}gate {gate!r} is not one of audit {self.kind}, whose gate is {entry.gate}"
                )
            parse(gate, entry.metrics)


class BackdoorOptions(AuditOptions):
    """Settings of the command `holdfast audit backdoor` that no other command has."""

    kind = "backdoor"
    controls: Annotated[values.Given | None, Flag("FOLDER", completion="PATH")] = Field(
        default=None,
        description="Folder with the weights of at least 20 networks of the same architecture that were trained on "
        "clean data, with which the model is compared.",
    )
    train_controls: Annotated[values.Budget | None, Flag("TIME")] = Field(
        default=None,
        description="Train control networks on the train split of the data within this time, as in 20min.",
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
        description="Trusted examples of the same classes, with which the data are compared. Without them, examples "
        "are ranked and the result is unclear.",
    )
    suspects: Annotated[str | None, Flag("FILE", completion="PATH", identifies=False)] = Field(
        default=None, description="Write the suspect examples to this .csv file, with their scores."
    )
