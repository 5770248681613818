"""The command `holdfast adapt URL`, which hardens the model of a running server and promotes the result."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from holdfast.api.verb_settings import Adapt
from holdfast.cli.assess import refuse_functions_of_config, refuse_logs_of_config, settings_of_flags
from holdfast.cli.early import refuse_missing_file, refuse_unknown_data
from holdfast.cli.options import Command, Voice, offered, with_voice
from holdfast.cli.setting_options import (
    SETTING,
    options_of,
    refuse_resume_without_run,
    run_options,
    with_named_parts,
)
from holdfast.core.errors import UsageError

if TYPE_CHECKING:
    from holdfast.adaptation.adapted import Adapted

_HELP = """\
Harden the model of a running server, and replace it if the new model passes all gates.

URL is the address of the operator's port. The steps: wait for the trigger, screen labels, train a candidate, assess it
and the served model, judge the gates, compare both on live inputs, let the candidate answer a share of the requests,
and promote it. The file of the served model is replaced at the end, and put back if live requests show a regression.
On a server of a pool, the candidate becomes a set that the gates of the pool judge.
Exit code 1 if the candidate was not promoted.
"""


@click.command(cls=Command, short_help="harden the model of a running server", help=_HELP)
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
    from holdfast.runs.engine.resuming import way_out
    from holdfast.runs.engine.signals import stoppable

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
