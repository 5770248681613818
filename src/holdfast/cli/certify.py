"""The command `holdfast certify MODEL DATA`, which proves robustness."""

from typing import Any

import click

from holdfast.api.verb_settings import Certify
from holdfast.cli.assess import settings_from
from holdfast.cli.options import Command, Voice, offered, with_voice
from holdfast.cli.setting_options import (
    MODEL_AND_DATA,
    SETTING,
    options_of,
    refuse_resume_without_run,
    run_options,
)

_HELP = """\
Prove for each example of DATA that no input of the threat model changes the prediction of MODEL, or find one that does.

Every example is certified, broken or unknown. A certificate holds for all inputs of the threat model. Some certified
examples are attacked as a test of the certificates.

\b
MODEL  a network of torch or ONNX: a bundled name, file.py:factory (a function
       that returns the network), or a .safetensors, .pt, .pt2 or .onnx file;
       with --method smoothing any model, such as the URL of a server
DATA   a bundled data set (mnist-mini), a catalogue name (see holdfast data), an
       .npz, .csv or .parquet file, or a folder with one folder of images for
       each class
"""  # the escape is click's: the paragraph below it keeps its lines


@click.command(cls=Command, short_help="prove how robust a model is", help=_HELP)
@offered(*MODEL_AND_DATA, *run_options("certify"))
@offered(*options_of(Certify), *SETTING)
@with_voice
def certify(voice: Voice, *, run: str | None, resume: bool, **flags: Any) -> int:
    """Run or resume a certification of MODEL on DATA."""
    settings = settings_from(flags, Certify)
    refuse_resume_without_run(resume=resume, run=run)
    from holdfast.cli.running import finished_run, tell

    with finished_run(settings, voice, run=run, resume=resume) as (result, folder):
        tell(result, settings.output, voice, folder=folder)
    return int(result.exit_code)
