"""The command `holdfast monitor STREAM`, which compares a recorded stream, or the requests to a server, with a
reference.
"""

from typing import Any

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
from holdfast.cli.live_monitor import is_server, live_options, watch_server
from holdfast.cli.options import Command, Voice, offered, with_voice
from holdfast.cli.setting_options import SETTING, options_of
from holdfast.core.errors import UsageError
from holdfast.core.remedies import REFERENCE

_HELP = """\
Compare the samples of STREAM, in their order, with those of --reference, and report which test raised an alarm. If
STREAM is the URL of the operator's port of a server, report what its monitor has found, and alarms until Ctrl-C.

Without --model, only inputs are compared. With it, its outputs and the outputs of an inner layer are compared as well,
and its accuracy is estimated, or measured if STREAM has labels. Each test states what is known about false alarms, and
which change it would find. Exit code 1 if a test of --alarm raised an alarm.
"""


@click.command(cls=Command, short_help="compare a recorded stream with a reference", help=_HELP)
@click.argument("data", required=False, metavar="[STREAM]", type=completing.DATA)
@offered(*live_options(), *options_of(Monitor), *SETTING)
@with_voice
def monitor(voice: Voice, *, key_file: str | None, once: bool, labels: str | None, **flags: Any) -> int:
    """Compare a recorded stream with a reference, or report the alarms of a server, and return the exit code."""
    if is_server(flags.get("data")):
        _refuse_options_of_streams(flags)
        return watch_server(
            voice, flags["data"], key_file=key_file, once=once, labels=labels, output=flags["output"]
        )
    for option, value in (("--key-file", key_file), ("--once", once), ("--labels", labels)):
        if value:
            raise UsageError(
                f"{option} is for a server, and STREAM is {flags.get('data')!r}; give the URL of an operator's port, "
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
