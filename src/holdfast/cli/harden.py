"""`holdfast harden MODEL DATA --recipe R`."""

from typing import Any

import click

from holdfast.cli import completing
from holdfast.cli.assess import ATTACKING, SETTING, TARGET, settings_from
from holdfast.cli.options import Voice, offered, with_voice
from holdfast.config.settings import HardenSettings
from holdfast.core.catalogue import RECIPES
from holdfast.core.errors import UsageError

TRAINING = (
    click.option(
        "--recipe",
        type=completing.RECIPE,
        metavar="R",
        help=f"Training method: auto (the default, which selects one), {', '.join(RECIPES)}. "
        "Settings: --set recipe.NAME=VALUE.",
    ),
    click.option(
        "--budget",
        metavar="T",
        help="Time for the training, as in 10min. The assessments take additional time.",
    ),
    click.option(
        "--fit", type=completing.DATA, metavar="DATA", help="Examples to train on (default: the train split)."
    ),
    click.option(
        "--unlabelled",
        type=completing.DATA,
        metavar="DATA",
        help="Additional examples to train on without labels (recipe vat).",
    ),
)
_HELP = """\
Train a new model that is more robust than MODEL on the train split of DATA, and assess both on the test split.

\b
MODEL  a network, trained or untrained: a bundled name, file.py:factory (a
       function that returns the network), or a .safetensors or .pt file
DATA   a catalogue name (see holdfast data), an .npz with x_train and y_train,
       or a folder or table with a train split
"""  # the escape is click's: the paragraph below it keeps its lines
_JUDGING = ("threat", "suite", "gates", "seed", "doubts", "batch_size", "output")


@click.command(short_help="train a new model that is more robust", help=_HELP)
@click.argument("model", required=False, type=completing.MODEL)
@click.argument("data", required=False, type=completing.DATA)
@click.option(
    "--run",
    "run",
    type=click.Path(),
    metavar="DIR",
    help="Folder of the run (default: holdfast-runs/<time>-harden-<digest>).",
)
@click.option(
    "--resume", is_flag=True, help="Continue the run in --run, or report it again if it is finished."
)
@offered(*TRAINING, *ATTACKING, *TARGET, *SETTING)
@with_voice
def harden(voice: Voice, *, run: str | None, resume: bool, **flags: Any) -> int:
    """Run or resume a hardening."""
    recipe = flags.pop("recipe")
    if recipe is not None:
        flags["sets"] = (f"recipe.use={recipe}", *flags["sets"])
    settings = settings_from(flags, HardenSettings)
    if resume and run is None:
        raise UsageError("--resume continues a run; give its folder with --run DIR (see holdfast runs)")
    from holdfast.cli.running import harden_and_report

    return harden_and_report(settings, voice, run=run, resume=resume)
