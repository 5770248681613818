"""The command `holdfast calibrate MODEL DATA`, which sets the thresholds of a guard."""

from typing import Any

import click

from holdfast.api.verb_settings import Calibrate
from holdfast.cli.assess import settings_from
from holdfast.cli.options import Command, Voice, offered, with_voice
from holdfast.cli.setting_options import MODEL_AND_DATA, SETTING, options_of


@click.command(cls=Command, short_help="set the thresholds of a guard from benign inputs")
@offered(*MODEL_AND_DATA, *options_of(Calibrate), *SETTING)
@with_voice
def calibrate(voice: Voice, **flags: Any) -> None:
    """Set the thresholds of a guard so that its rules together fire on at most a share of benign inputs like DATA.

    DATA must contain benign inputs that MODEL was not trained on. The thresholds are written next to the settings of
    the guard, with the digests of both; the guard refuses them for other settings or another model.
    """
    settings = settings_from(flags, Calibrate)
    from holdfast.api.guard_notes import rate_text

    calibrated = settings.run()
    calibration, covered = calibrated.calibration, calibrated.coverage
    for note in calibrated.notes:
        voice.say(f"note: {note}")
    for name, threshold in calibration.thresholds.items():
        voice.say(f"{name}: fires above {threshold:.6g}")
    if covered is not None:
        voice.say(f"{'warning: ' if covered.short else ''}{covered.text}")
    voice.say(
        f"wrote {calibrated.path}: its rules fire on at most {100 * calibration.false_positives:g} % of benign "
        "inputs like these"
    )
    voice.say(
        f"the rules fire on {calibration.fired:,} of {calibration.n:,} calibration inputs, "
        f"{rate_text(calibration.measured)}"
    )
