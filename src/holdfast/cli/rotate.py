"""The command `holdfast rotate`, which manages a pool of parameter sets, one of which serves at a time."""

from collections.abc import Mapping
from typing import Any

import click

from holdfast.api.verb_settings import RotateSettings
from holdfast.cli.assess import settings_from, settings_of_flags
from holdfast.cli.options import Group, Voice, expecting_head, offered, with_voice
from holdfast.cli.setting_options import MODEL_AND_DATA, SETTING, flag_names, options_of, with_named_parts
from holdfast.core.errors import UsageError
from holdfast.core.remedies import RUN_FOLDER

_JUDGING = options_of(RotateSettings, only=("gates", "accept_doubts"))
_OF_POOL = options_of(RotateSettings, only=("device", "trust_code", "follow_links"))
_LOOP = ("gates", "accept_doubts", "every", "min_waiting")
_COLLECTING = options_of(RotateSettings, only=[key for key in flag_names(RotateSettings) if key not in _LOOP])
_COMMANDS_WITH = {
    **dict.fromkeys(("codec", "generator"), ("train", "run")),
    **dict.fromkeys(("gates", "accept_doubts"), ("admit", "run")),
    **dict.fromkeys(("every", "min_waiting"), ("run",)),
    "immunise": ("draw", "run"),
    "n_judged": ("collect", "admit", "run"),
    "budget": ("collect", "run"),
}
"""Commands that use a setting. All commands use the others, which state how the sets of the pool are made."""


def _refuse_unused(command: str, flags: Mapping[str, Any]) -> None:
    """Raise `UsageError` for a `--set` with a setting that the command does not use. A file may have all settings."""
    for assignment in flags.get("sets", ()):
        name = assignment.partition("=")[0].partition(".")[0]
        if command not in _COMMANDS_WITH.get(name, (command,)):
            others = " and ".join(f"rotate {user}" for user in _COMMANDS_WITH[name])
            do = "do" if len(_COMMANDS_WITH[name]) > 1 else "does"
            raise UsageError(
                f"--set {name}: rotate {command} does not use {name} ({others} {do}); leave it out"
            )


_EXPECTING = expecting_head(
    "Refuse a pool whose ledger does not contain this digest, which rotate head printed earlier."
)
_HELP = """\
Serve several parameter sets in turn, so that a stolen set is soon out of use (Generate to Defend).

A pool is a folder with encrypted parameter sets and a ledger. The ledger records when each set served, how many answers
each principal received, and which sets may be stolen. The steps: collect trains sets independently, train fits a
generator to them, draw generates candidates, admit accepts candidates that resist examples computed on stolen sets, and
swap replaces the serving set. Rotation does not replace hardening: without holdfast harden the serving set is as easy
to break as before.
"""


@click.group(cls=Group, short_help="serve several parameter sets in turn", help=_HELP)
def rotate() -> None:
    """Group of the commands that manage a pool of parameter sets."""


@rotate.command(short_help="train the first parameter sets of a pool")
@offered(*MODEL_AND_DATA)
@click.option(
    "--run",
    "run",
    type=click.Path(),
    metavar="DIR",
    help="Folder of the pool (default: holdfast-runs/<time>-rotate-<digest>).",
)
@click.option("--resume", is_flag=True, help="Continue with the pool in --run.")
@_EXPECTING
@offered(*_COLLECTING, *SETTING)
@with_voice
def collect(voice: Voice, *, run: str | None, resume: bool, expect_head: str, **flags: Any) -> int:
    """Train parameter sets of MODEL's architecture on the train split of DATA, and surrogates for transfer.

    The surrogates are models of an attacker without any parameters of the pool. A fifth of the examples is held out,
    and sets are judged on it. The budget is for all trainings together. Without a budget each training has the number
    of epochs of its recipe.
    """
    _refuse_unused("collect", flags)
    settings = settings_from(with_named_parts(flags), RotateSettings)
    if resume and run is None:
        raise UsageError("--resume continues with a pool, and its folder is not given", RUN_FOLDER)
    from holdfast.cli.rotate_steps import collect as step

    return step(settings, voice, run=run, resume=resume, expect_head=expect_head)


@rotate.command(short_help="train a generator of parameter sets")
@click.argument("pool", type=click.Path())
@_EXPECTING
@offered(*_OF_POOL, *SETTING)
@with_voice
def train(voice: Voice, *, pool: str, expect_head: str, **flags: Any) -> int:
    """Train a codec, which compresses parameter sets, and a latent diffusion model on the collected sets of POOL.

    Settings: --set codec.NAME=VALUE and --set generator.NAME=VALUE, as in --set generator.regulariser=hinge. If
    encoding and decoding costs more than 0.3 points of accuracy, no generator is trained (exit code 4).
    """
    _refuse_unused("train", flags)
    from holdfast.cli.rotate_steps import train as step

    return step(pool, settings_of_flags(flags, RotateSettings), voice, expect_head=expect_head)


@rotate.command(short_help="generate new candidates")
@click.argument("pool", type=click.Path())
@click.option(
    "--sets", "wanted", type=click.IntRange(1), metavar="N", help="Number of candidates (default: 8)."
)
@click.option(
    "--by",
    type=click.Choice(["generator", "retraining"]),
    help="Sample from the generator, or train from fresh random weights (default: generator, if there is one).",
)
@click.option(
    "--immunise",
    "immunising",
    is_flag=True,
    help="Train each further against examples computed on stolen sets; if there are none, on the serving set or the "
    "bases.",
)
@click.option("--resume", is_flag=True, help="Continue the last draw with its settings.")
@_EXPECTING
@offered(*_OF_POOL, *SETTING)
@with_voice
def draw(
    voice: Voice,
    *,
    pool: str,
    wanted: int | None,
    by: str | None,
    immunising: bool,
    resume: bool,
    expect_head: str,
    **flags: Any,
) -> int:
    """Add new candidates to POOL. A candidate must be admitted before it may serve."""
    _refuse_unused("draw", flags)
    from holdfast.cli.rotate_steps import draw as step

    return step(
        pool,
        settings_of_flags(flags, RotateSettings),
        voice,
        wanted=wanted,
        by=by,
        immunising=immunising,
        resume=resume,
        expect_head=expect_head,
    )


@rotate.command(short_help="judge candidates, and admit those that pass all gates")
@click.argument("pool", type=click.Path())
@_EXPECTING
@offered(*_JUDGING, *_OF_POOL, *SETTING)
@with_voice
def admit(voice: Voice, *, pool: str, expect_head: str, **flags: Any) -> int:
    """Judge every candidate of POOL on held-out examples: only an admitted set may serve.

    Waiting sets that were not judged against every stolen set are judged again.

    The usual gates are conditions on clean accuracy, robust accuracy, the success of examples computed on stolen sets
    (each alone and all together), the share of predictions that differ from the serving set, and the tensors. A
    candidate is refused if a gate remains unclear on all held-out examples. If too few examples are held out to
    distinguish equal sets from worse ones, the tolerances on accuracy are widened, and the output states it. Exit code
    0 if a candidate was admitted, 4 if none.
    """
    _refuse_unused("admit", flags)
    from holdfast.cli.rotate_steps import admit as step

    return step(pool, settings_of_flags(flags, RotateSettings), voice, expect_head=expect_head)


@rotate.command(short_help="replace the serving set by an admitted one")
@click.argument("pool", type=click.Path())
@click.option("--why", default="", metavar="TEXT", help="Reason, recorded in the ledger.")
@click.option(
    "--unjudged",
    is_flag=True,
    help="If no other set waits, use one that was not judged against every stolen set.",
)
@_EXPECTING
@with_voice
def swap(voice: Voice, *, pool: str, why: str, unjudged: bool, expect_head: str) -> int:
    """Serve another admitted set of POOL, chosen at random, and retire the serving set.

    Exit code 4 if no admitted set waits that was judged against every stolen set.
    """
    from holdfast.cli.ledger_steps import swap as step

    return step(pool, voice, why=why, unjudged=unjudged, expect_head=expect_head)


@rotate.command(short_help="show the sets of a pool and their states")
@click.argument("pool", type=click.Path())
@click.option(
    "-o", "--output", multiple=True, metavar="FILE", help="File with suffix .json; - for JSON on stdout."
)
@_EXPECTING
@with_voice
def status(voice: Voice, *, pool: str, output: tuple[str, ...], expect_head: str) -> int:
    """Show the sets of POOL and their states, after every entry of its ledger was verified."""
    from holdfast.cli.ledger_steps import status as step

    return step(pool, voice, outputs=output, expect_head=expect_head)


@rotate.command(short_help="print the digest of the last entry of the ledger")
@click.argument("pool", type=click.Path())
@_EXPECTING
@with_voice
def head(voice: Voice, *, pool: str, expect_head: str) -> int:
    """Print the digest of the last entry of the ledger of POOL, to be stored outside the folder.

    A later command with --expect-head DIGEST refuses the pool if its ledger does not contain that entry. Then the
    folder was replaced by an older copy, which nothing inside the folder can detect.
    """
    from holdfast.cli.ledger_steps import head as step

    return step(pool, voice, expect_head=expect_head)


@rotate.command(short_help="record that an attacker may have a set")
@click.argument("pool", type=click.Path())
@click.argument("name", metavar="SET")
@click.option("--why", required=True, metavar="TEXT", help="What happened, as in 'laptop stolen'.")
@_EXPECTING
@with_voice
def expose(voice: Voice, *, pool: str, name: str, why: str, expect_head: str) -> int:
    """Record in the ledger of POOL that an attacker may have SET. After the next swap it never serves again."""
    from holdfast.cli.ledger_steps import expose as step

    return step(pool, name, voice, why=why, expect_head=expect_head)


@rotate.command("run", short_help="run all steps, then swap whenever a swap is due")
@offered(*MODEL_AND_DATA)
@click.option(
    "--run",
    "run",
    type=click.Path(),
    metavar="DIR",
    help="Folder of the pool (default: holdfast-runs/<time>-rotate-<digest>).",
)
@click.option("--resume", is_flag=True, help="Continue with the pool in --run.")
@click.option(
    "--by",
    type=click.Choice(["generator", "retraining"]),
    help="Sample from the generator, or train from fresh random weights (default: generator, until its sets are "
    "refused).",
)
@click.option(
    "--immunise",
    "immunising",
    is_flag=True,
    help="Train each set further against examples computed on stolen sets.",
)
@click.option("--once", is_flag=True, help="Exit when a set serves and enough sets wait.")
@click.option(
    "--anyway", is_flag=True, help="Begin even if the data or the budget are too small for the gates."
)
@_EXPECTING
@offered(*options_of(RotateSettings), *SETTING)
@with_voice
def run_(
    voice: Voice,
    *,
    run: str | None,
    resume: bool,
    by: str | None,
    immunising: bool,
    once: bool,
    anyway: bool,
    expect_head: str,
    **flags: Any,
) -> int:
    """Collect, train, draw, admit and swap; then watch the ledger, swap whenever a swap is due, and generate new sets.

    The process that answers requests records the number of answers to each principal in the ledger (Pool.answered, with
    the counts of RotatingModel.collected). Without these only time and exposures cause a swap. If the data or the
    budget are too small for the gates of an admission, nothing is trained, unless --anyway is given. If no set of the
    generator is admitted, sets are trained from fresh random weights. If five of those are refused in a row and no set
    waits, the serving set continues to serve, and the exit code is 4.
    """
    settings = settings_from(with_named_parts(flags), RotateSettings)
    if resume and run is None:
        raise UsageError("--resume continues with a pool, and its folder is not given", RUN_FOLDER)
    from holdfast.cli.rotate_steps import turn

    return turn(
        settings,
        voice,
        run=run,
        resume=resume,
        by=by,
        immunising=immunising,
        once=once,
        anyway=anyway,
        expect_head=expect_head,
    )
