"""The command `holdfast doctor MODEL DATA`, which finds common mistakes in the use of a model with its data."""

from typing import Any

import click

from holdfast.api.verb_settings import Doctor
from holdfast.cli.assess import settings_from
from holdfast.cli.options import Command, Voice, offered, with_voice
from holdfast.cli.setting_options import MODEL_AND_DATA, SETTING, options_of
from holdfast.core.names import line

_COLOURS = {"problem": "red", "warning": "yellow", "note": "cyan", "good": "green"}


@click.command(cls=Command, short_help="find common mistakes before a long run")
@offered(*MODEL_AND_DATA, *options_of(Doctor), *SETTING)
@with_voice
def doctor(voice: Voice, **flags: Any) -> int:
    """Find common mistakes in MODEL and DATA: scale, normalisation, layout, labels, outputs, randomness, gradients.

    Exit code 0 if no problem is found, 3 if one is found.
    """
    settings = settings_from(flags, Doctor)
    from rich.text import Text

    findings = settings.run()
    console = voice.console()
    for finding in findings:
        if finding.level == "good" and voice.quiet:
            continue
        heading = f"{finding.sign} {finding.check:<14}", _COLOURS[finding.level]
        console.print(Text.assemble(heading, line(finding.message)))
        if way_out := finding.on_command_line():
            console.print(Text.assemble(" " * 16, ("-> ", "bold"), line(way_out)))
    problems = sum(finding.level == "problem" for finding in findings)
    warnings = sum(finding.level == "warning" for finding in findings)
    found = f"{problems or 'no'} problem{'' if problems <= 1 else 's'} found"
    voice.say(found + (f", {warnings} warning{'' if warnings == 1 else 's'}" if warnings else ""))
    return 3 if problems else 0
