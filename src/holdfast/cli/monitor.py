"""The command `holdfast monitor STREAM`, which compares a recorded stream, or the requests to a server, with a
reference.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from holdfast.api.verb_settings import Monitor
from holdfast.cli import completing
from holdfast.cli.assess import refuse_code_of_config, refuse_hosts_of_config, settings_of_flags
from holdfast.cli.early import (
    refuse_foreign_server,
    refuse_missing_file,
    refuse_reports,
    refuse_unknown_data,
    refuse_unknown_model,
)
from holdfast.cli.options import Command, Voice, offered, with_voice
from holdfast.cli.setting_options import SETTING, options_of
from holdfast.core.errors import UsageError
from holdfast.core.names import line
from holdfast.core.remedies import REFERENCE
from holdfast.io.remote.operator_port import OperatorPort, read_key
from holdfast.io.remote.remote import SCHEMES
from holdfast.settings.label_files import read_labels

if TYPE_CHECKING:
    from holdfast.adaptation.server_state import Alarm, MonitorState

_POLL_S = 1.0
_OF_SERVERS = (
    click.option(
        "--key-file",
        type=click.Path(),
        metavar="FILE",
        help="File that contains an API key with the scope metrics, and labels for --labels, if STREAM is the URL "
        "of a server that has keys.",
    ),
    click.option(
        "--once", is_flag=True, help="Report the state of a server once, and do not wait for alarms."
    ),
    click.option(
        "--labels",
        type=click.Path(),
        metavar="FILE",
        help="CSV file with the classes of requests, which are sent to the server: columns request, label and, for "
        "requests of several inputs, row.",
    ),
)
"""Options for the URL of a running server, instead of a recorded stream."""
_HELP = """\
Compare the samples of STREAM, in their order, with those of --reference, and report which test raised an alarm. If
STREAM is the URL of the operator's port of a server, report what its monitor has found, and alarms until Ctrl-C.

Without --model, only inputs are compared. With it, its outputs and the outputs of an inner layer are compared as well,
and its accuracy is estimated, or measured if STREAM has labels. Each test states what is known about false alarms, and
which change it would find. Exit code 1 if a test of --alarm raised an alarm.
"""


@click.command(cls=Command, short_help="compare a recorded stream with a reference", help=_HELP)
@click.argument("data", required=False, metavar="[STREAM]", type=completing.DATA)
@offered(*_OF_SERVERS, *options_of(Monitor), *SETTING)
@with_voice
def monitor(voice: Voice, *, key_file: str | None, once: bool, labels: str | None, **flags: Any) -> int:
    """Compare a recorded stream with a reference, or report the alarms of a server, and return the exit code."""
    address = flags.get("data")
    if isinstance(address, str) and address.partition("://")[0] in SCHEMES:
        _refuse_options_of_streams(flags)
        return _watch_server(
            voice, address, key_file=key_file, once=once, labels=labels, output=flags["output"]
        )
    for option, value in (("--key-file", key_file), ("--once", once), ("--labels", labels)):
        if value:
            raise UsageError(
                f"{option} is for a server, and STREAM is {address!r}; give the URL of an operator's port, "
                "or leave it out"
            )
    settings = _settings(flags)
    monitored = settings.run()
    from holdfast.cli.running import tell_report

    tell_report(monitored.report, settings.output, voice)
    return 1 if monitored.alarmed else 0


def _refuse_options_of_streams(flags: dict[str, Any]) -> None:
    """Raise `UsageError` for options that describe a recorded stream, which the server has settings for."""
    given = [key for key, value in flags.items() if value and key not in ("data", "output")]
    if given:
        raise UsageError(
            f"--{given[0].replace('_', '-')} is for a recorded stream, and STREAM is the server {flags['data']}; the "
            "server compares with the reference that it was started with (--monitor), so leave it out"
        )


def _settings(flags: dict[str, Any]) -> Monitor:
    """Return the settings of the command, after checks that do not need torch."""
    for key in ("data", "reference", "model", "config"):
        refuse_missing_file(flags.get(key))
    settings = settings_of_flags(flags, Monitor)
    refuse_code_of_config(settings, flags)
    if flags.get("config"):
        refuse_hosts_of_config(settings, flags)
    if settings.data is None:
        raise UsageError(
            "STREAM is missing (samples in the order of time); try holdfast monitor stream.npz --reference mnist-mini"
        )
    if settings.reference is None:
        raise UsageError(
            "the reference is missing (examples like those that the model should receive)", REFERENCE
        )
    refuse_unknown_data(str(settings.data))
    refuse_unknown_data(str(settings.reference))
    if settings.model is not None:
        refuse_unknown_model(str(settings.model))
        refuse_foreign_server(str(settings.model), settings.allow_hosts)
    refuse_reports(settings.output)
    return settings


def _watch_server(
    voice: Voice, url: str, *, key_file: str | None, once: bool, labels: str | None, output: tuple[str, ...]
) -> int:
    """Report the state of the monitor, and its alarms until Ctrl-C. Return 1 if a decisive test raised an alarm."""
    refuse_reports(output)
    from holdfast.adaptation.server_state import monitor_state
    from holdfast.cli.running import tell_report
    from holdfast.reports.monitoring import monitoring_report

    port = OperatorPort(url, None if key_file is None else read_key(key_file))
    if labels is not None:
        _send(voice, port, labels)
    state = monitor_state(port)
    seen = _tests_with_alarm(state)
    tell_report(monitoring_report(state), output, voice)
    voice.say(f"flagged: {state['flagged']:,} of {state['requests']:,} requests")
    alarmed = bool(state["alarmed"])
    try:
        while not once:
            time.sleep(_POLL_S)
            state = monitor_state(port)
            now = _tests_with_alarm(state)
            for name in now.keys() - seen.keys():
                click.echo(
                    line(f"alarm of {name} after {now[name]['after']:,} samples, on {now[name]['signal']}")
                )
            seen, alarmed = now, alarmed or bool(state["alarmed"])
    except KeyboardInterrupt:
        pass
    return 1 if alarmed else 0


def _tests_with_alarm(state: "MonitorState") -> "dict[str, Alarm]":
    return {test["name"]: test["alarm"] for test in state["tests"] if test["alarm"]}


def _send(voice: Voice, port: OperatorPort, file: str) -> None:
    """Send labels to the server, and report those that it does not accept."""
    from holdfast.adaptation.server_state import send_labels

    rows: dict[str, dict[int, int]] = {}
    for (request, row), label in read_labels(Path(file), ()).items():
        rows.setdefault(request, {})[row] = label
    labels = {}
    for request, of_rows in rows.items():
        if sorted(of_rows) != list(range(len(of_rows))):
            raise UsageError(f"{file}: the request {request!r} has no label for one of its inputs; add it")
        labels[request] = [of_rows[row] for row in range(len(of_rows))]
    answer = send_labels(port, labels)
    voice.say(f"labels of {answer['accepted']:,} requests were accepted")
    if answer["unknown"]:
        voice.say(
            f"note: {len(answer['unknown']):,} requests are unknown, such as {answer['unknown'][0]!r}: the server "
            "remembers the newest 50,000, and accepts a label once"
        )
    for request, reason in list(answer["invalid"].items())[:3]:
        voice.say(f"note: labels of {request!r} were refused: {reason}")
