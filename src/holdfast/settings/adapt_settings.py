"""Settings of `holdfast adapt` that no other command has, as a group of `holdfast.settings.groups`."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationInfo

from holdfast.settings import values
from holdfast.settings.grammar import seconds
from holdfast.settings.groups import Flag, SettingGroup

ALARM: Literal["alarm"] = "alarm"
NOW: Literal["now"] = "now"


def _trigger(value: object, field: ValidationInfo) -> object:
    if isinstance(value, str) and value not in (ALARM, NOW):
        seconds(value, field.field_name or "trigger")
    return value


class AdaptOptions(SettingGroup):
    """Settings of the command `holdfast adapt`: the server, the trigger, the labels, the approval and the canary."""

    server: str | None = Field(
        default=None, description="Address of the operator's port of the server, as in http://127.0.0.1:8081."
    )
    key_file: Annotated[values.PathText | None, Flag("FILE", completion="PATH")] = Field(
        default=None,
        description="File that contains an API key with the scope admin, if the server has keys.",
    )
    trigger: Annotated[str, BeforeValidator(_trigger), Flag("WHEN")] = Field(
        default=ALARM,
        description="What begins the adaptation: an alarm of the server's monitor (alarm, the default), now, or a time "
        "as in 24h, after which it begins also without an alarm.",
    )
    labels: Annotated[values.PathText | None, Flag("FILE", completion="PATH")] = Field(
        default=None,
        description="CSV file with the classes of flagged inputs: columns request, label and, for requests of several "
        "inputs, row.",
    )
    approval: Annotated[bool, Flag()] = Field(
        default=False, description="Wait for the approval of the operator before the candidate serves."
    )
    trust_code: Annotated[bool, Flag()] = Field(
        default=False,
        description="Allow the code of the architecture that the server names (file.py:factory).",
    )
    output: Annotated[list[str], Flag("FILE", short="-o", completion="PATH", identifies=False)] = Field(
        default_factory=list, description="Report file, .json; - for JSON on stdout."
    )
    canary_time: Annotated[values.WaitingTime, Flag("T")] = Field(
        default="2min",
        description="Time for which the candidate answers a share of the requests, and for which it is watched after "
        "its promotion (default: 2min).",
    )
