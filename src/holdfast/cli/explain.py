"""The command `holdfast explain`, which explains an example, or where a model is fragile."""

from pathlib import Path
from typing import Any

import click

from holdfast.api.verb_settings import Explain
from holdfast.cli.assess import settings_from, settings_of_flags
from holdfast.cli.early import refuse_missing_file, refuse_reports
from holdfast.cli.options import Command, Voice, offered, with_voice
from holdfast.cli.setting_options import MODEL_AND_DATA, SETTING, options_of
from holdfast.core.errors import UsageError

_RUN = "run.json"

_HELP = """\
Explain where MODEL is fragile on DATA, or with --index why the prediction for one example changes. MODEL may be the
folder of a finished run, whose model and data are opened by their addresses; give MODEL and DATA and --from-run if
opening the model executes code.

Adversarial inputs are computed again unless the run has stored them (--save-adversarial). A model that has changed
since the run is refused.
"""


@click.command(cls=Command, short_help="explain why an input breaks a model", help=_HELP)
@offered(*MODEL_AND_DATA, *options_of(Explain), *SETTING)
@with_voice
def explain(voice: Voice, **flags: Any) -> int:
    """Explain an example or a model, and write the explanation."""
    refuse_reports(flags.get("output") or ())
    for key in ("train", "from_run"):
        refuse_missing_file(flags.get(key))
    model = flags.get("model")
    of_run = model is not None and (Path(model) / _RUN).is_file()
    own = flags.get("data") or flags.get("config")
    if model is not None and not of_run and not own:
        raise UsageError(
            f"{model!r} is not the folder of a run, because it has no {_RUN}, and DATA is missing; give the folder of "
            "one finished run, or a model and data"
        )
    settings = settings_of_flags(flags, Explain) if of_run else settings_from(flags, Explain)
    from holdfast.cli.running import tell_report

    result = settings.run()
    tell_report(result.report, settings.output, voice, text=result.text(), has_headline=True)
    return 0
