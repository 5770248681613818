"""Settings of `holdfast serve` and `holdfast adapt` that no other command has, as groups of
`holdfast.settings.groups`.
"""

import ipaddress
import re
from collections.abc import Mapping
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, ValidationInfo

from holdfast.core.catalogue import REPORT_FILE
from holdfast.core.errors import UPSTREAM_KEY, Placeholder, Remedy, UsageError
from holdfast.io.remote.remote import SCHEMES
from holdfast.settings import values
from holdfast.settings.grammar import seconds
from holdfast.settings.groups import Flag, MaskCount, ReportFiles, SettingGroup

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_OWN_HEADERS = frozenset(
    {
        "accept-encoding", "connection", "content-encoding", "content-length", "content-type", "expect", "host",
        "inference-header-content-length", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade",
    }
)  # fmt: skip
_HOST_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?")
ALARM: Literal["alarm"] = "alarm"
NOW: Literal["now"] = "now"
"""values of the setting `trigger` besides a time"""
Port = Annotated[values.Whole, Field(le=65535)]


def is_public(host: str) -> bool:
    """Return whether other machines may reach an address at which a server listens."""
    if host == "localhost":
        return False
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:  # a host name, which may be that of any interface
        return True


class ServedInference(SettingGroup):
    """Settings of a served model that describe its requests: the shape of its inputs, and its guard."""

    input_shape: Annotated[values.InputShape | None, Flag("N,…")] = Field(
        default=None,
        description="Sizes of one example without the batch, as in 3,32,32, or the largest number of bytes of a file "
        "or of characters of a text. Bundled models, pools and guards state theirs.",
    )
    guard: Annotated[values.PathText | None, Flag("FILE", completion="PATH", common=True)] = Field(
        default=None, description="Guard (guard.yaml) that decides about each request."
    )


class ServeOptions(MaskCount):
    """Settings of the command `holdfast serve`: addresses, workers, keys, swaps, and the audit chain."""

    inputs: Annotated[values.InputKind | None, Flag("KIND")] = Field(
        default=None,
        description="What a request contains: numbers, files or texts (default: that of the guard, or numbers). The "
        "largest number of bytes of a file, or of characters of a text, is --input-shape.",
    )
    sampling_rate: Annotated[values.Positive | None, Flag("HZ")] = Field(
        default=None,
        description="Sampling rate of a model of clips, which also answers requests with .wav files in base64. Inputs "
        "are then from -1 to 1 unless bounds are given.",
    )
    masked_vote: Annotated[values.Threat | None, Flag("PATCH")] = Field(
        default=None,
        description="Answer by the vote over masks of the model, and state for each image whether a patch of this size "
        "can have changed the class, as in patch:4x4 (default: the model itself).",
    )
    name: Annotated[str | None, Flag("NAME")] = Field(
        default=None, description="Name of the model in the URL (default: from its address)."
    )
    model_version: Annotated[str, Flag("V")] = Field(
        default="1", description="Version of the model in the URL (default: 1)."
    )
    host: Annotated[str, Flag("HOST", common=True)] = Field(
        default="127.0.0.1",
        description="Address at which requests are answered (default: 127.0.0.1). Others than loopback need --keys.",
    )
    port: Annotated[Port, Flag("PORT", common=True)] = Field(
        default=8080, description="Port at which requests are answered (default: 8080; 0 for a free one)."
    )
    admin_host: Annotated[str, Flag("HOST")] = Field(
        default="127.0.0.1", description="Address of metrics and of the operator (default: 127.0.0.1)."
    )
    admin_port: Annotated[Port, Flag("PORT", common=True)] = Field(
        default=8081, description="Port of metrics and of the operator (default: 8081; 0 for a free one)."
    )
    accepted_hosts: Annotated[values.Names, Flag("NAME", "--accept-host")] = Field(
        default_factory=list,
        description="Host name that the header Host of a request may contain, as in model.example.org, besides IP "
        "addresses, localhost and names without a dot (default: none; any, if other machines can reach --host).",
    )
    workers: Annotated[values.Positive, Flag("N", common=True)] = Field(
        default=1, description="Number of processes that answer requests (default: 1)."
    )
    keys: Annotated[values.PathText | None, Flag("FILE", completion="PATH", common=True)] = Field(
        default=None,
        description="File of API keys (see holdfast keys). Without it, every client is answered.",
    )
    single_operator: Annotated[bool, Flag()] = Field(
        default=False,
        description="Allow the key with which holdfast adapt posts the steps of a run to approve this run. The audit "
        "chain records it.",
    )
    every: Annotated[list[values.Every], Flag("T", common=True)] = Field(
        default_factory=list,
        description="When to swap, as in 50q/principal (answers to one principal) or 24h. A stolen serving set is "
        "always swapped.",
    )
    swaps_per_hour: Annotated[values.Positive, Flag("N")] = Field(
        default=60,
        description="Largest number of swaps in an hour, except those of stolen sets (default: 60).",
    )
    audit: Annotated[values.PathText | None, Flag("DIR", completion="PATH", common=True)] = Field(
        default=None, description="Folder of the audit chains, which holdfast verify checks (default: none)."
    )
    monitor: Annotated[values.Given | None, Flag("DATA", completion="DATA", common=True)] = Field(
        default=None,
        description="Examples like those that the model should receive, on which it was not trained. A monitor "
        "compares a sample of the requests with them (default: none).",
    )
    on_audit_failure: Annotated[Literal["refuse", "answer"], Flag("HOW")] = Field(
        default="refuse",
        description="What happens to requests while the audit chain cannot be written, as on a full disk: refuse (the "
        "default) or answer.",
    )
    on_guard_failure: Annotated[Literal["refuse", "answer"], Flag("HOW")] = Field(
        default="refuse",
        description="What happens to requests if the guard raises an error: refuse (the default) or answer.",
    )
    profile: Annotated[bool, Flag()] = Field(
        default=False,
        description="Measure the time of each part of a request (parsing, guard, model, audit, response); it is in the "
        "metrics, and is printed at the end.",
    )
    log_format: Annotated[Literal["text", "json"], Flag("FORM")] = Field(
        default="text",
        description="Form of the log: text with errors (the default), or json with an object for each error and each "
        "request that was decided.",
    )

    scores: Annotated[values.ReleasedScores, Flag("HOW")] = Field(
        default="all",
        description="What clients receive of the scores of the model: all digits (all, the default), a number of "
        "decimal digits, as in 2 (rounded to the nearest float32), or only the predicted class (labels; its score is "
        "1, and those of the others 0).",
    )

    def refuse_contradictions(self, prefix: str, written: Mapping[str, str]) -> None:
        """Raise `UsageError` for a public address without keys, for names that do not fit into a URL, and for a vote
        over masks that is not one for patches.
        """
        vote, patch = self.masked_vote, Remedy("masked_vote", "patch:4x4")
        if vote is not None and vote.name != "patch":
            raise UsageError(
                f"{written.get('masked_vote', prefix + 'masked_vote')} is {vote}; a patch in images was expected",
                patch,
            )
        if self.masks is not None and vote is None:
            where = written.get("masks", f"{prefix}masks")
            raise UsageError(f"{where} concerns the vote over masks", patch, Remedy("masks"))
        for key in ("host", "admin_host"):
            host = getattr(self, key)
            if is_public(host) and self.keys is None:
                raise UsageError(
                    f"{written.get(key, prefix + key)} is {host}, which other machines can reach, and there are no "
                    "keys; create one with holdfast keys add NAME",
                    Remedy("keys", Placeholder("FILE")),
                    Remedy(key, "127.0.0.1"),
                )
        for name in self.accepted_hosts:
            if not _HOST_NAME.fullmatch(name):
                raise UsageError(
                    f"{written.get('accepted_hosts', prefix + 'accepted_hosts')} is {name!r}; a host name without a "
                    "port was expected, as in model.example.org"
                )
        for key in ("name", "model_version"):
            value = getattr(self, key)
            if value is not None and not _NAME.fullmatch(value):
                raise UsageError(
                    f"{written.get(key, prefix + key)} is {value!r}; letters, digits and any of _.- were expected"
                )
        if self.port == self.admin_port != 0 and self.host == self.admin_host:
            raise UsageError(
                f"{written.get('admin_port', prefix + 'admin_port')} is {self.admin_port}, which is the port of the "
                "requests; give another one"
            )


class ProxySettings(SettingGroup):
    """Settings of `holdfast serve` for a model behind another server, which the proxy guards."""

    proxy: Annotated[str | None, Flag("URL", common=True)] = Field(
        default=None,
        description="Server of the Open Inference Protocol v2 to which requests are passed on, instead of MODEL, as in "
        "http://127.0.0.1:8000 or http://127.0.0.1:8000/v2/models/NAME.",
    )
    upstream_headers: Annotated[list[values.Header], Flag("'NAME: env:VAR'", "--upstream-header")] = Field(
        default_factory=list,
        description="Header of the requests to that server. Its value is read from an environment variable.",
    )
    forward_headers: Annotated[list[str], Flag("NAME", "--forward-header")] = Field(
        default_factory=list,
        description="Header of clients that is passed on, as in traceparent (default: none).",
    )
    upstream_output: Annotated[str | None, Flag("NAME")] = Field(
        default=None,
        description="Output of that model that clients receive (default: the first one with scores).",
    )
    upstream_timeout: Annotated[values.WaitingTime, Flag("T")] = Field(
        default="10s", description="Time in which that server must answer (default: 10s)."
    )

    def refuse_contradictions(self, prefix: str, written: Mapping[str, str]) -> None:
        """Raise `UsageError` for an address that is not one of a server, and for headers that are not passed on."""
        if self.proxy is not None:
            _refuse_other_address(self.proxy, written.get("proxy", f"{prefix}proxy"))
        for name in self.forward_headers:
            where = written.get("forward_headers", f"{prefix}forward_headers")
            if not _TOKEN.fullmatch(name):
                raise UsageError(f"{where} is {name!r}; the name of a header was expected, as in traceparent")
            if name.lower() in _OWN_HEADERS:
                raise UsageError(f"{where} is {name}, which each connection sets for itself; leave it out")


def _refuse_other_address(url: str, where: str) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in SCHEMES and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or re.search(r"[^\x21-\x7e]", url):
        raise UsageError(f"{where} is {url!r}; the URL of a server was expected, as in http://127.0.0.1:8000")
    if "@" in parts.netloc:
        raise UsageError(f"{where} contains a user name or a password; leave them out of it", UPSTREAM_KEY)
    if parts.query or parts.fragment:
        raise UsageError(f"{where} is {url!r}; a URL without ? and # was expected")


class RequestLimits(SettingGroup):
    """Settings that limit requests and connections of `holdfast serve`."""

    max_rows: Annotated[values.Positive, Flag("N")] = Field(
        default=64, description="Largest number of inputs in a request, and in a batch (default: 64)."
    )
    max_body: Annotated[values.Positive | None, Flag("BYTES")] = Field(
        default=None,
        description="Largest number of bytes of a request (default: what --max-rows inputs need at most).",
    )
    max_latency: Annotated[values.WaitingTime, Flag("T")] = Field(
        default="1s",
        description="Time for which a request may wait for the model. Further requests get 503 (default: 1s).",
    )
    header_timeout: Annotated[values.WaitingTime, Flag("T")] = Field(
        default="10s", description="Time in which the headers of a request must arrive (default: 10s)."
    )
    body_timeout: Annotated[values.WaitingTime, Flag("T")] = Field(
        default="30s",
        description="Time in which the body of a request must arrive and its response be read (default: 30s).",
    )
    max_connections: Annotated[values.Positive, Flag("N")] = Field(
        default=1000, description="Largest number of open connections of each worker (default: 1000)."
    )
    drain: Annotated[values.WaitingTime, Flag("T")] = Field(
        default="30s", description="Time for the requests in progress when the server ends (default: 30s)."
    )
    drain_delay: Annotated[values.Delay | None, Flag("T")] = Field(
        default=None,
        description="Time between SIGTERM, from which /v2/health/ready is 503, and the close of the port (default: 5s "
        "if readiness was probed in the last minute, otherwise 0s).",
    )


def _trigger(value: object, field: ValidationInfo) -> object:
    if isinstance(value, str) and value not in (ALARM, NOW):
        try:
            seconds(value, field.field_name or "trigger")
        except UsageError as error:
            raise error.reworded(f"{error.message}, or one of {ALARM}, {NOW}") from error
    return value


class AdaptOptions(SettingGroup):
    """Settings of the command `holdfast adapt`: the server, the trigger, the labels, the approval and the canary."""

    server: str | None = Field(
        default=None, description="Address of the operator's port of the server, as in http://127.0.0.1:8081."
    )
    key_file: Annotated[values.PathText | None, Flag("FILE", completion="PATH", common=True)] = Field(
        default=None,
        description="File that contains an API key with the scope adapt, if the server has keys.",
    )
    trigger: Annotated[str, BeforeValidator(_trigger), Flag("WHEN", common=True)] = Field(
        default=ALARM,
        description="What begins the adaptation: an alarm of the server's monitor (alarm, the default), now, or a time "
        "as in 24h, after which it begins also without an alarm.",
    )
    labels: Annotated[values.PathText | None, Flag("FILE", completion="PATH")] = Field(
        default=None,
        description="CSV file with the classes of flagged inputs: columns request, label and, for requests of several "
        "inputs, row.",
    )
    approval: Annotated[bool, Flag(common=True)] = Field(
        default=False, description="Wait for the approval of the operator before the candidate serves."
    )
    trust_code: Annotated[bool, Flag()] = Field(
        default=False,
        description="Allow the code of the architecture that the server names (file.py:factory).",
    )
    output: ReportFiles = Field(default_factory=list, description=REPORT_FILE)
    canary_time: Annotated[values.WaitingTime, Flag("T")] = Field(
        default="2min",
        description="Time for which the candidate answers a share of the requests, and for which it is watched after "
        "its promotion (default: 2min).",
    )
