"""The command `holdfast harden MODEL DATA --recipe R`, which trains a more robust model."""

from typing import Any

import click

from holdfast.cli.assess import settings_from
from holdfast.cli.options import Voice, offered, with_voice
from holdfast.cli.setting_options import (
    MODEL_AND_DATA,
    SETTING,
    options_of,
    refuse_resume_without_run,
    run_options,
    with_named_parts,
)
from holdfast.config.settings import HardenSettings

_HELP = """\
Train a new model that is more robust than MODEL on the train split of DATA, and assess both on the test split.

\b
MODEL  a network, trained or untrained: a bundled name, file.py:factory (a
       function that returns the network), or a .safetensors or .pt file
DATA   a catalogue name (see holdfast data), an .npz with x_train and y_train,
       or a folder or table with a train split
"""  # the escape is click's: the paragraph below it keeps its lines


@click.command(short_help="train a new model that is more robust", help=_HELP)
@offered(*MODEL_AND_DATA, *run_options("harden"))
@offered(*options_of(HardenSettings), *SETTING)
@with_voice
def harden(voice: Voice, *, run: str | None, resume: bool, **flags: Any) -> int:
    """Train a new model with the settings of the flags, or resume such a run, and assess both models."""
    settings = settings_from(with_named_parts(flags), HardenSettings)
    refuse_resume_without_run(resume=resume, run=run)
    from holdfast.api import carry_out_hardening
    from holdfast.cli.running import command_line, folder_of_run, progress_bar, tell
    from holdfast.config.grammar import is_folder
    from holdfast.core.names import line
    from holdfast.engine.progress import ignore
    from holdfast.engine.resuming import way_out
    from holdfast.engine.signals import stoppable
    from holdfast.ops import distributed
    from holdfast.reports.card import generalisation_note

    command, folder = command_line(), folder_of_run("harden", settings, run)
    if not distributed.first():  # other processes train too, and only the first reports
        carry_out_hardening(settings, run=folder, resume=resume, command=command)
        return 0
    with stoppable(way_out(command, folder)):
        with progress_bar(voice) as progress:
            hardened = carry_out_hardening(
                settings,
                run=folder,
                resume=resume,
                progress=progress,
                notify=voice.say,
                detail=voice.say if voice.verbose else ignore,
                command=command,
            )
        outputs, place = settings.output, folder
        for output in filter(is_folder, outputs):
            place = hardened.write(output)
            voice.say(f"model: {place}")
        tell(hardened.after, [output for output in outputs if not is_folder(output)], voice, folder=folder)
    for note in (*hardened.notes, generalisation_note(hardened.card["generalisation"])):
        voice.say(f"note: {note}")
    click.echo(line(str(hardened)), err=True)
    voice.say(f"assess the new model with: {line(hardened.opened_by(place))}")
    return hardened.after.exit_code
