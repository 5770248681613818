"""The command `holdfast serve MODEL`, which answers requests to a model over HTTP."""

import gc
from typing import Any

import click

from holdfast.api.verb_settings import Serve
from holdfast.cli import completing
from holdfast.cli.assess import refuse_code_of_config, settings_of_flags
from holdfast.cli.early import refuse_missing_file, refuse_unknown_model
from holdfast.cli.options import Command, Voice, offered, with_voice
from holdfast.cli.setting_options import SETTING, options_of
from holdfast.core.errors import HoldfastError, UsageError
from holdfast.core.remedies import Placeholder, Remedy

_HELP = """\
Serve MODEL over HTTP in the Open Inference Protocol v2, until SIGTERM or Ctrl-C.

Requests are answered in batches by worker processes, which are replaced when they end. Requests in progress are
answered before the server ends. Metrics are served at a port of their own.

\b
MODEL  a bundled name, file.py:factory, a .safetensors, .pt, .pt2, .onnx,
       .skops, .json, .ubj or .txt file, or rotating:POOL for a pool, whose sets are
       swapped while they serve

With --proxy URL there is no MODEL: requests are passed on to another server, after the guard has decided about them.
"""  # the escape is click's: the paragraph below it keeps its lines


@click.command(cls=Command, short_help="serve a model over HTTP", help=_HELP)
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
        from holdfast.server.error_log import json_line

        click.echo(json_line("error", error.on_command_line()), err=True)
        return error.exit_code
    gc.freeze()  # the process ends half a second earlier if it does not search the objects of torch for cycles
    return 0
