"""The command `holdfast harden MODEL DATA --recipe R`, which trains a more robust model."""

from typing import Any

import click

from holdfast.api.verb_settings import Harden
from holdfast.cli.assess import settings_from
from holdfast.cli.early import refuse_reports
from holdfast.cli.options import Command, Voice, offered, with_voice
from holdfast.cli.setting_options import (
    MODEL_AND_DATA,
    SETTING,
    options_of,
    refuse_resume_without_run,
    run_options,
    with_named_parts,
)

_HELP = """\
Train a new model that is more robust than MODEL on the train split of DATA, and assess both on the test split.

\b
MODEL  a network, trained or untrained: a bundled name, file.py:factory (a
       function that returns the network), or a .safetensors or .pt file
DATA   a catalogue name (see holdfast data), an .npz with x_train and y_train,
       or a folder or table with a train split
"""  # the escape is click's: the paragraph below it keeps its lines


@click.command(cls=Command, short_help="train a new model that is more robust", help=_HELP)
@offered(*MODEL_AND_DATA, *run_options("harden"))
@offered(*options_of(Harden), *SETTING)
@with_voice
def harden(voice: Voice, *, run: str | None, resume: bool, **flags: Any) -> int:
    """Train a new model with the settings of the flags, or resume such a run, and assess both models."""
    settings = settings_from(with_named_parts(flags), Harden)
    refuse_resume_without_run(resume=resume, run=run)
    if settings.trains_generator:
        return _hardened_generator(settings, voice, run=run, resume=resume)
    from holdfast.cli.running import command_line, finished_run, folder_of_run, tell
    from holdfast.core.names import line
    from holdfast.recipes.training import distributed
    from holdfast.reports.card import generalisation_note
    from holdfast.settings.grammar import is_folder

    if not distributed.first():  # other processes train too, and only the first reports
        settings.run(folder_of_run(settings, run), resume=resume, command=command_line())
        return 0
    with finished_run(settings, voice, run=run, resume=resume) as (hardened, place):
        outputs = settings.output
        files = [output for output in outputs if not is_folder(output)]
        folder = place
        for output in filter(is_folder, outputs):
            place = hardened.write(output)
            voice.say(f"model: {place}")
        tell(hardened.after, files, voice, folder=folder)
    attacked = hardened.card["change"]["metric"] != "certified_accuracy"
    for note in (*hardened.notes, generalisation_note(hardened.card["generalisation"], robust=attacked)):
        voice.say(f"note: {note}")
    click.echo(line(str(hardened)), err=True)
    voice.say(f"assess the new model with: {line(hardened.opened_by(place))}")
    return int(hardened.after.exit_code)


def _hardened_generator(settings: Harden, voice: Voice, *, run: str | None, resume: bool) -> int:
    """Train a new generator, write its folders, and print the result of the audits before and after."""
    from holdfast.cli.audit import tell_audit
    from holdfast.cli.running import finished_run
    from holdfast.generators.opening import FILE
    from holdfast.settings.grammar import is_folder

    files = [output for output in settings.output if not is_folder(output)]
    refuse_reports(files)
    with finished_run(settings, voice, run=run, resume=resume) as (result, folder):
        for place in filter(is_folder, settings.output):
            voice.say(f"generator: {result.write(place) / FILE}")
        tell_audit(result.after, files, voice, folder)
    return int(result.after.exit_code)
