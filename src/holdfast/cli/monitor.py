"""The command `holdfast monitor STREAM`, which compares a recorded stream with a reference."""

import sys
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
from holdfast.cli.options import Voice, offered, with_voice
from holdfast.cli.setting_options import SETTING, options_of
from holdfast.core.errors import UsageError
from holdfast.core.remedies import REFERENCE
from holdfast.reports.write import MONITORING_SUFFIXES

_HELP = """\
Compare the samples of STREAM, in their order, with those of --reference, and report which test raised an alarm.

Without --model, only inputs are compared. With it, its outputs and the outputs of an inner layer are compared as well,
and its accuracy is estimated, or measured if STREAM has labels. Each test states what is known about false alarms, and
which change it would find. Exit code 1 if a test of --alarm raised an alarm.
"""


@click.command(short_help="compare a recorded stream with a reference", help=_HELP)
@click.argument("data", required=False, metavar="[STREAM]", type=completing.DATA)
@offered(*options_of(Monitor), *SETTING)
@with_voice
def monitor(voice: Voice, **flags: Any) -> int:
    """Compare a recorded stream with a reference, and return the exit code."""
    settings = _settings(flags)
    monitored = settings.run()
    try:
        places = [monitored.write(output) for output in settings.output if output != "-"]
    finally:
        if "-" in settings.output:
            click.echo(monitored.to_json(), nl=False)
        elif not voice.quiet:
            colour = sys.stdout.isatty() and not voice.plain
            click.echo(monitored.text(colour=colour, width=voice.console().width))
        click.echo(str(monitored), err=True)
    for place in places:
        voice.say(f"report: {place}")
    return 1 if monitored.alarmed else 0


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
    refuse_reports(settings.output, MONITORING_SUFFIXES)
    return settings
