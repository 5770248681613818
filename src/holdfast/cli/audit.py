"""The commands `holdfast audit backdoor` and `audit poison`, which search a model or a data set for manipulation, and
`audit membership` and `audit privacy`, which measure what a model or a training reveals of the training examples, and
`audit generator`, which measures generated samples.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from holdfast.api.verb_settings import (
    AuditBackdoor,
    AuditGenerator,
    AuditMembership,
    AuditPoison,
    AuditPrivacy,
    AuditVerb,
)
from holdfast.cli import completing
from holdfast.cli.assess import settings_from
from holdfast.cli.early import refuse_missing_file, refuse_reports
from holdfast.cli.options import Group, Voice, offered, with_voice
from holdfast.cli.setting_options import (
    MODEL_AND_DATA,
    SETTING,
    options_of,
    refuse_resume_without_run,
    run_options,
)

if TYPE_CHECKING:
    from holdfast.audits.audit import AuditResult


@click.group(cls=Group, short_help="search a model or data for manipulation, and trainings for leaks")
def audit() -> None:
    """Search a model for a backdoor or training data for manipulated examples, measure what is revealed of the
    training examples by a model or by its training, or measure generated samples.

    The result is `flagged`, `not flagged`, or `unclear` if there was nothing to compare with. Without a gate, the exit
    code of a finished audit is 0; a flagged one names the gate with which it is 1.
    """


@audit.command("backdoor", short_help="search a model for a backdoor")
@offered(*MODEL_AND_DATA, *run_options("audit"))
@offered(*options_of(AuditBackdoor), *SETTING)
@with_voice
def backdoor(voice: Voice, *, run: str | None, resume: bool, **flags: Any) -> int:
    """Search MODEL for a backdoor: a small trigger with which it predicts one class for almost every input.

    DATA are clean examples. MODEL is flagged only if its trigger is unusual among those of at least 20 clean networks
    of the same architecture (--controls, or --train-controls); without them the result is unclear.
    """
    refuse_missing_file(flags["controls"])
    return _audited(settings_from(flags, AuditBackdoor), voice, run=run, resume=resume)


@audit.command("poison", short_help="search training data for manipulated examples")
@click.argument("data", required=False, type=completing.DATA)
@offered(*run_options("audit"), *options_of(AuditPoison), *SETTING)
@with_voice
def poison(voice: Voice, *, run: str | None, resume: bool, **flags: Any) -> int:
    """Search the training examples in DATA for manipulated ones, with a network (--model) that is trained on them.

    The train split is audited if DATA has one. DATA are flagged only by comparison with trusted examples (--clean);
    without them the examples are ranked, and the result is unclear.
    """
    refuse_missing_file(flags["clean"])
    return _audited(settings_from(flags, AuditPoison), voice, run=run, resume=resume)


@audit.command("membership", short_help="measure how many training examples an attacker finds")
@offered(*MODEL_AND_DATA, *run_options("audit"))
@offered(*options_of(AuditMembership), *SETTING)
@with_voice
def membership(voice: Voice, *, run: str | None, resume: bool, **flags: Any) -> int:
    """Measure how many training examples an attacker finds among others, at a low false-positive rate.

    With --non-members, MODEL is audited, and DATA are its training examples. Otherwise the training procedure is
    audited: --train, or a default training of the architecture of MODEL, on random halves of DATA.
    """
    refuse_missing_file(flags["non_members"])
    return _audited(settings_from(flags, AuditMembership), voice, run=run, resume=resume)


@audit.command("privacy", short_help="test the epsilon that a private training claims")
@offered(*MODEL_AND_DATA, *run_options("audit"))
@offered(*options_of(AuditPrivacy), *SETTING)
@with_voice
def privacy(voice: Voice, *, run: str | None, resume: bool, **flags: Any) -> int:
    """Measure a lower bound of the epsilon of a differentially private training (--train), and compare it with the
    claimed one (--epsilon).

    One network of the architecture of MODEL is trained on DATA with canaries. The training is flagged if the bound at
    95 % confidence exceeds the claim; a bound below it is no proof of privacy.
    """
    return _audited(settings_from(flags, AuditPrivacy), voice, run=run, resume=resume)


@audit.command("generator", short_help="measure the quality of generated samples, and copies among them")
@click.argument("model", metavar="GENERATOR", required=False, type=completing.MODEL)
@click.argument("data", required=False, type=completing.DATA)
@offered(*run_options("audit"), *options_of(AuditGenerator), *SETTING)
@with_voice
def generator(voice: Voice, *, run: str | None, resume: bool, **flags: Any) -> int:
    """Measure how well the samples of GENERATOR match examples that it was not trained on (--held-out), and how many of
    them are copies of its training examples DATA.

    GENERATOR is a function in a Python file that returns an object with sample(n, seed), or a file of samples. It is
    flagged if more samples than held-out examples are copies, or if it has collapsed: its samples are like few training
    examples. Changes of the latent vector, of the inputs of an autoencoder and of those of a discriminator are searched
    for (--latent).
    """
    refuse_missing_file(flags["held_out"])
    return _audited(settings_from(flags, AuditGenerator), voice, run=run, resume=resume)


def _audited(settings: AuditVerb, voice: Voice, *, run: str | None, resume: bool) -> int:
    refuse_resume_without_run(resume=resume, run=run)
    refuse_reports(settings.output)
    from holdfast.cli.running import finished_run

    with finished_run(settings, voice, run=run, resume=resume) as (result, folder):
        tell_audit(result, settings.output, voice, folder)
    return int(result.exit_code)


def report_audit(folder: Path, outputs: Sequence[str], voice: Voice) -> int:
    """Write the reports of the finished audit in a folder again, and return its exit code."""
    refuse_reports(outputs)
    from holdfast.audits.audit import open_audit

    result = open_audit(folder)
    tell_audit(result, outputs, voice, None)
    return result.exit_code


def tell_audit(result: "AuditResult", outputs: Sequence[str], voice: Voice, folder: Path | None) -> None:
    """Write the reports of an audit, and print its tables (JSON if `-` is an output) and its verdict."""
    from holdfast.cli.running import tell_report
    from holdfast.reports.audit import failing_gate

    try:
        tell_report(result.report, outputs, voice)
    finally:
        if gate := failing_gate(result.content):
            _say_failing(gate, voice, folder)
        if folder is not None:
            voice.say(f"run: {folder}")


def _say_failing(gate: str, voice: Voice, folder: Path | None) -> None:
    """Print the gate that fails a flagged audit, with the command that judges it on the finished audit of this
    process.
    """
    from holdfast.cli.running import command_line
    from holdfast.runs.engine.resuming import resumed

    command = "" if folder is None else f": {resumed(command_line(), folder, '--gate', gate)}"
    voice.say(f"note: no gate was set, so that the exit code is 0; with --gate {gate} it is 1{command}")
