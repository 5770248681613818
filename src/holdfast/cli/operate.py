"""The commands for models in use: `holdfast serve`, `monitor`, `adapt` and `keys`."""

import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from holdfast.cli import completing
from holdfast.cli.early import (
    refuse_foreign_server,
    refuse_missing_file,
    refuse_reports,
    refuse_unknown_data,
    refuse_unknown_model,
)
from holdfast.cli.measure import (
    refuse_code_of_config,
    refuse_functions_of_config,
    refuse_hosts_of_config,
    refuse_logs_of_config,
    settings_of_flags,
)
from holdfast.cli.options import Command, Group, Voice, offered, plain_table, with_voice
from holdfast.cli.setting_options import (
    SETTING,
    options_of,
    refuse_resume_without_run,
    run_options,
    with_named_parts,
)
from holdfast.core.errors import REFERENCE, HoldfastError, Placeholder, Remedy, UsageError
from holdfast.core.names import line
from holdfast.io.remote.remote import SCHEMES
from holdfast.settings.grammar import per_second, seconds
from holdfast.settings.texts import read_labels
from holdfast.verbs.settings import Adapt, Monitor, Serve

if TYPE_CHECKING:
    from holdfast.adaptation.journal import Adapted
    from holdfast.adaptation.server_state import Alarm, MonitorState
    from holdfast.io.remote.operator_port import OperatorPort


_SERVE_HELP = """\
Serve MODEL over HTTP in the Open Inference Protocol v2, until SIGTERM or Ctrl-C.

Requests are answered in batches by worker processes, which are replaced when they end. Requests in progress are
answered before the server ends. Metrics are served at a port of their own.

\b
MODEL  a bundled name, file.py:factory, a .safetensors, .pt, .pt2, .onnx,
       .skops, .json, .ubj or .txt file, or rotating:POOL for a pool, whose sets are
       swapped while they serve

With --proxy URL there is no MODEL: requests are passed on to another server, after the guard has decided about them.
"""  # the escape is click's: the paragraph below it keeps its lines


@click.command(cls=Command, short_help="serve a model over HTTP", help=_SERVE_HELP)
@click.argument("model", required=False, type=completing.MODEL)
@offered(*options_of(Serve), *SETTING)
@with_voice
def serve(voice: Voice, **flags: Any) -> int:
    """Serve MODEL until the process is stopped."""
    for address in (flags.get("model"), flags.get("config")):
        refuse_missing_file(address)
    settings = settings_of_flags(flags, Serve)
    address = settings.model
    if address is None and settings.proxy is None:
        raise UsageError(
            "MODEL is missing (what is to be served); try holdfast serve mnist-cnn",
            Remedy("proxy", Placeholder("URL")),
        )
    refuse_code_of_config(settings, flags)
    if address is not None:
        refuse_unknown_model(address)
    try:
        settings.run(notify=voice.say)
    except HoldfastError as error:
        if settings.log_format != "json":
            raise
        from holdfast.server.requests import json_line

        click.echo(json_line("error", error.on_command_line()), err=True)
        return error.exit_code
    return 0


_POLL_S = 1.0
_SERVER_OPTIONS = (
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
_MONITOR_HELP = """\
Compare the samples of STREAM, in their order, with those of --reference, and report which test raised an alarm. If
STREAM is the URL of the operator's port of a server, report what its monitor has found, and alarms until Ctrl-C.

Without --model, only inputs are compared. With it, its outputs and the outputs of an inner layer are compared as well,
and its accuracy is estimated, or measured if STREAM has labels. Each test states what is known about false alarms, and
which change it would find. Exit code 1 if a test of --alarm raised an alarm.
"""


@click.command(cls=Command, short_help="compare a recorded stream with a reference", help=_MONITOR_HELP)
@click.argument("data", required=False, metavar="[STREAM]", type=completing.DATA)
@offered(*_SERVER_OPTIONS, *options_of(Monitor), *SETTING)
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
    settings = _monitor_settings(flags)
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


def _monitor_settings(flags: dict[str, Any]) -> Monitor:
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
    from holdfast.io.remote.operator_port import OperatorPort, read_key
    from holdfast.reports.audit import monitoring_report

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


def _send(voice: Voice, port: "OperatorPort", file: str) -> None:
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


_ADAPT_HELP = """\
Harden the model of a running server, and replace it if the new model passes all gates.

URL is the address of the operator's port. The steps: wait for the trigger, screen labels, train a candidate, assess it
and the served model, judge the gates, compare both on live inputs, let the candidate answer a share of the requests,
and promote it. The file of the served model is replaced at the end, and put back if live requests show a regression.
On a server of a pool, the candidate becomes a set that the gates of the pool judge.
Exit code 1 if the candidate was not promoted.
"""


@click.command(cls=Command, short_help="harden the model of a running server", help=_ADAPT_HELP)
@click.argument("server", required=False, metavar="[URL]")
@offered(*run_options("adapt"))
@offered(*options_of(Adapt), *SETTING)
@with_voice
def adapt(voice: Voice, *, run: str | None, resume: bool, **flags: Any) -> int:
    """Adapt the model of a running server, and return the exit code."""
    flags = with_named_parts(flags)
    for key in ("data", "config"):
        refuse_missing_file(flags.get(key))
    settings = settings_of_flags(flags, Adapt)
    if flags.get("config"):
        refuse_functions_of_config(settings, flags.get("sets", ()))
        refuse_logs_of_config(settings, flags)
    refuse_resume_without_run(resume=resume, run=run)
    if settings.server is None:
        raise UsageError("URL is missing (the operator's port), as in http://127.0.0.1:8081")
    if settings.data is None:
        raise UsageError(
            "the data are missing (examples for the training and the assessments), as in --data mnist"
        )
    refuse_unknown_data(str(settings.data))
    from holdfast.cli.running import command_line, folder_of_run, progress_bar
    from holdfast.runs.engine.identity import way_out
    from holdfast.runs.engine.progress import stoppable

    folder = folder_of_run(settings, run)
    with stoppable(way_out(command_line(), folder)), progress_bar(voice) as progress:
        adapted = settings.run(folder, resume=resume, progress=progress, notify=voice.say)
    tell_adapted(adapted, settings.output, voice)
    voice.say(f"run: {folder}")
    return adapted.exit_code


def tell_adapted(adapted: "Adapted", output: Sequence[str], voice: Voice) -> None:
    """Print the steps of an adaptation and how it ended, and write its reports."""
    from holdfast.cli.running import tell_report

    tell_report(adapted.report, output, voice, text=adapted.text(width=voice.console().width))


_KEY_FILE = click.option(
    "--file",
    "file",
    type=click.Path(path_type=Path),
    default=Path("holdfast-keys.json"),
    metavar="FILE",
    help="File of the keys (default: holdfast-keys.json).",
)
_DAY_S = 86_400.0


@click.group(cls=Group, short_help="create, list and revoke the API keys of a server")
def keys() -> None:
    """Create, list and revoke the API keys of holdfast serve.

    The file contains only hashes of keys, and only its owner may read it. A running server reads it again when it has
    changed.
    """


@keys.command(short_help="create a key")
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    metavar="SCOPE",
    help="What the key permits: infer (the default: requests to the model), and at the operator's port metrics "
    "(numbers), labels, adapt (holdfast adapt, and stored inputs), approve (adaptations), or admin (all of these, and "
    "swaps). May be repeated.",
)
@click.option(
    "--expires", metavar="T", help="Time until the key is refused, as in 90d or 12h (default: never)."
)
@click.option(
    "--rate",
    metavar="N/T",
    help="Largest number of inputs in a time, as in 100/min (default: no limit). A burst or a request may have those "
    "of ten seconds, and at least one.",
)
@click.option(
    "--budget", type=int, metavar="N", help="Largest number of inputs in total (default: no limit)."
)
@_KEY_FILE
@with_voice
def add(
    voice: Voice,
    name: str,
    scopes: tuple[str, ...],
    expires: str | None,
    rate: str | None,
    budget: int | None,
    file: Path,
) -> None:
    """Create a key for the client NAME, and print it. It cannot be printed again.

    The name is that of the principal in the audit chain, in the metrics of a pool, and of the limits: a new key with
    the name of a revoked one continues with the budget that is left.
    """
    if budget is not None and budget < 1:
        raise UsageError(f"--budget is {budget}; a number of inputs from 1 on was expected")
    moment = None if expires is None else _moment(expires)
    number = None if rate is None else per_second(rate, "--rate")
    from holdfast.server.keys import add_key, burst_of

    key = add_key(file, name, scopes or ("infer",), expires=moment, rate=number, budget=budget)
    voice.say(f"{file} contains the hash of this key; store the key itself in a safe place:")
    click.echo(key)
    if number is not None:
        n = burst_of(number)
        inputs = f"{n:,} input{'s' * (n > 1)}"
        voice.say(f"the rate allows {inputs} at once after a pause, which is also the limit of one request")


@keys.command("list", short_help="list the keys")
@_KEY_FILE
@click.option(
    "--audit",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Audit folder of a server: the pseudonym of each key in it is also shown.",
)
@with_voice
def list_keys(voice: Voice, file: Path, audit: Path | None) -> None:
    """List the keys with their scopes, their limits and their state. The keys themselves are not stored.

    With --audit, a principal in the audit, in the log and in alarms can be matched to a key. This needs the file
    DIR.key beside the audit folder.
    """
    from holdfast.reports.terminal import cell
    from holdfast.server.keys import read_keys

    pseudonym = None
    if audit is not None:
        from holdfast.server.audit_chain import AuditKey

        pseudonym = AuditKey.of(audit, create=False).pseudonym
    table = plain_table()
    headings = ("name", "scopes", "state", "expires", "rate", "budget", "created")
    for heading in headings if pseudonym is None else ("name", "principal", *headings[1:]):
        table.add_column(heading, no_wrap=True)
    for key in read_keys(file):
        rate = "" if key.rate is None else f"{key.rate:g}/s"
        budget = "" if key.budget is None else f"{key.budget:,}"
        principal = () if pseudonym is None else (pseudonym(key.name),)
        limits = (key.state, key.expires or "never", rate, budget, key.created)
        table.add_row(*map(cell, (key.name, *principal, ", ".join(key.scopes), *limits)))
    voice.console().print(table)


@keys.command(short_help="revoke a key")
@click.argument("name")
@_KEY_FILE
@with_voice
def revoke(voice: Voice, name: str, file: Path) -> None:
    """Revoke the key of the client NAME. A running server refuses it within two seconds."""
    from holdfast.server.keys import revoke_key

    revoke_key(file, name)
    voice.say(f"the key {name} is revoked")


def _moment(text: str) -> str:
    """Return the time at which a key expires, in ISO 8601."""
    number = text.strip().removesuffix("d")
    if text.strip().endswith("d") and number.isdecimal() and int(number) > 0:
        duration_s = int(number) * _DAY_S
    else:
        try:
            duration_s = seconds(text, "--expires")
        except UsageError:
            raise UsageError(f"--expires is {text!r}; expected a duration such as 90d or 12h") from None
    try:
        moment = datetime.now(UTC) + timedelta(seconds=duration_s)
    except OverflowError:
        raise UsageError(f"--expires is {text!r}; expected a duration such as 90d or 12h") from None
    return moment.isoformat(timespec="seconds")
