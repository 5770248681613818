"""`holdfast monitor URL`: what the monitor of a running server has found, over the operator's port."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from holdfast.adaptation.server_state import Alarm, MonitorState, monitor_state, send_labels
from holdfast.cli.early import refuse_reports
from holdfast.cli.options import Voice
from holdfast.core.errors import UsageError
from holdfast.core.names import line
from holdfast.io.remote.operator_port import OperatorPort, read_key
from holdfast.io.remote.remote import SCHEMES
from holdfast.settings.label_files import read_labels

_POLL_S = 1.0
Option = Callable[[Any], Any]


def live_options() -> tuple[Option, ...]:
    """Return the options of `holdfast monitor` for a running server."""
    return (
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


def is_server(address: object) -> bool:
    """Return whether the first argument is the URL of a server."""
    return isinstance(address, str) and address.partition("://")[0] in SCHEMES


def watch_server(
    voice: Voice, url: str, *, key_file: str | None, once: bool, labels: str | None, output: tuple[str, ...]
) -> int:
    """Report the state of the monitor, and its alarms until Ctrl-C. Return 1 if a decisive test raised an alarm."""
    refuse_reports(output)
    port = OperatorPort(url, None if key_file is None else read_key(key_file))
    if labels is not None:
        _send(voice, port, labels)
    state = monitor_state(port)
    seen = _tests_with_alarm(state)
    from holdfast.cli.running import tell_report
    from holdfast.reports.monitoring import monitoring_report

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


def _tests_with_alarm(state: MonitorState) -> dict[str, Alarm]:
    return {test["name"]: test["alarm"] for test in state["tests"] if test["alarm"]}


def _send(voice: Voice, port: OperatorPort, file: str) -> None:
    """Send labels to the server, and report those that it does not accept."""
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
