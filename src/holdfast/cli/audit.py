"""The commands of `holdfast audit`, which are generated from the settings of audits, and the reports of an audit."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from holdfast.cli import completing
from holdfast.cli.early import refuse_missing_file, refuse_reports
from holdfast.cli.measure import settings_from
from holdfast.cli.options import Command, Group, Voice, offered, with_voice
from holdfast.cli.setting_options import (
    SETTING,
    options_of,
    refuse_resume_without_run,
    run_options,
)
from holdfast.verbs.settings import AuditVerb, audits

_COMPLETION = {"model": completing.MODEL, "data": completing.DATA}


@click.group(cls=Group, short_help="search a model or data for manipulation, and trainings for leaks")
def audit() -> None:
    """Search a model for a backdoor or training data for manipulated examples, measure what is revealed of the
    training examples by a model or by its training, or measure generated samples.

    The result is `flagged`, `not flagged`, or `unclear` if there was nothing to compare with. Without a gate, the exit
    code of a finished audit is 0; a flagged one names the gate with which it is 1.
    """


def _command(kind: type[AuditVerb]) -> click.Command:
    """Return the command of an audit, with an option for each of its settings."""

    @with_voice
    def command(voice: Voice, *, run: str | None, resume: bool, **flags: Any) -> int:
        for key in kind.files:
            refuse_missing_file(flags[key])
        return _audited(settings_from(flags, kind), voice, run=run, resume=resume)

    arguments = (
        click.argument(
            key, metavar=None if metavar == key.upper() else metavar, required=False, type=_COMPLETION[key]
        )
        for key, metavar in kind.arguments.items()
    )
    offering = offered(*arguments, *run_options("audit"), *options_of(kind), *SETTING)
    return click.command(kind.kind, cls=Command, short_help=kind.summary, help=kind.about)(offering(command))


for _kind in audits().values():
    audit.add_command(_command(_kind))


def _audited(settings: AuditVerb, voice: Voice, *, run: str | None, resume: bool) -> int:
    refuse_resume_without_run(resume=resume, run=run)
    refuse_reports(settings.output)
    from holdfast.cli.running import finished_run, tell_audit

    with finished_run(settings, voice, run=run, resume=resume) as (result, folder):
        tell_audit(result, settings.output, voice, folder)
    return int(result.exit_code)


def report_audit(folder: Path, outputs: Sequence[str], voice: Voice) -> int:
    """Write the reports of the finished audit in a folder again, and return its exit code."""
    refuse_reports(outputs)
    from holdfast.audits.audit import open_audit
    from holdfast.cli.running import tell_audit

    result = open_audit(folder)
    tell_audit(result, outputs, voice, None)
    return result.exit_code
