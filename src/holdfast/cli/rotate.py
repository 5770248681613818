"""`holdfast rotate`: a pool of parameter sets that serve in turn."""

from pathlib import Path
from typing import Any, Literal

import click

from holdfast.cli import completing
from holdfast.cli.assess import SETTING, TARGET, settings_from
from holdfast.cli.once import Group
from holdfast.cli.options import Voice, offered, spoken
from holdfast.config.naming import SOURCES
from holdfast.config.settings import RotateSettings, read
from holdfast.core.catalogue import RECIPES
from holdfast.core.errors import UsageError

_COLLECTING = (
    click.option(
        "--threat",
        "-t",
        type=completing.THREAT,
        metavar="T",
        help="What the adversary may do, as in linf:0.2 (default: linf:8/255).",
    ),
    click.option(
        "--source",
        type=completing.SOURCE,
        metavar="S",
        help=f"Where sets come from: {', '.join(SOURCES)} (default: basins); its settings by --set source.NAME=VALUE.",
    ),
    click.option(
        "--recipe",
        type=completing.SETS_RECIPE,
        metavar="R",
        help=f"How sets are trained: that of the model's card (the default, else standard), {', '.join(RECIPES)}.",
    ),
    click.option("--budget", metavar="T", help="Time to plan the trainings for, as in 20min."),
    click.option(
        "--fit", type=completing.DATA, metavar="DATA", help="Examples to train on (default: the train split)."
    ),
    click.option("--seed", type=int, metavar="N", help="Seed of the trainings (default: 0)."),
)
_JUDGING = (
    click.option(
        "--gate",
        "-g",
        "gates",
        multiple=True,
        metavar="G",
        help='A claim that sets must hold beside the usual gates, as in "transfer_success <= 0.5 of static".',
    ),
    click.option(
        "--accept-doubt",
        "accept_doubts",
        multiple=True,
        metavar='NAME="why"',
        help="Answer for a raised doubt.",
    ),
)
_OF_POOL = (
    click.option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1 (default: auto)."),
    click.option(
        "--trust-code", is_flag=True, default=None, help="Run the code that the pool names for its model."
    ),
)
_EXPECTING = click.option(
    "--expect-head",
    default="",
    metavar="DIGEST",
    help="Refuse a pool whose ledger does not contain this: what rotate head printed earlier, kept elsewhere.",
)
_HELP = """\
Parameter sets that take turns at serving, so that what leaked of one goes stale: Generate to Defend.

A pool is a folder that is sealed on the disk, with a ledger of which set served when, to whom, and what leaked. Its
steps: collect sets of independent trainings, train a generator of them, draw fresh sets, admit those that hold
against what leaked, swap one in. Rotation is a second belt: without holdfast harden the set that serves is as easy to
break as before.
"""


@click.group(cls=Group, short_help="parameter sets that take turns at serving, against thieves", help=_HELP)
def rotate() -> None:
    """Group of the commands for pools."""


def _settings(flags: dict[str, Any]) -> RotateSettings:
    """Return the settings of a verb for a pool."""
    config, sets = flags.pop("config"), flags.pop("sets")
    return read(Path(config) if config else None, flags, sets, kind=RotateSettings)


def _named(flags: dict[str, Any]) -> dict[str, Any]:
    """Return the flags with `--source` and `--recipe` converted to settings, which `--set` may extend."""
    for key in ("source", "recipe"):
        name = flags.pop(key)
        if name is not None:
            flags["sets"] = (f"{key}.use={name}", *flags["sets"])
    return flags


def _judging(flags: dict[str, Any]) -> dict[str, Any]:
    """Return the flags with gates and accepted doubts converted to settings."""
    from holdfast.config.grammar import pairs

    gates, accepted = flags.pop("gates"), flags.pop("accept_doubts")
    return {**flags, "gates": list(gates) or None, "accept_doubts": pairs(accepted, "--accept-doubt") or None}


@rotate.command(short_help="train the sets that all begins with")
@click.argument("model", required=False, type=completing.MODEL)
@click.argument("data", required=False, type=completing.DATA)
@click.option(
    "--run",
    "run",
    type=click.Path(),
    metavar="DIR",
    help="Folder of the pool (default: holdfast-runs/<time>-rotate-<digest>).",
)
@click.option("--resume", is_flag=True, help="Go on with the pool in --run.")
@_EXPECTING
@offered(*_COLLECTING, *TARGET, *SETTING)
@spoken
def collect(voice: Voice, *, run: str | None, resume: bool, expect_head: str, **flags: Any) -> int:
    """Train sets of MODEL's architecture on the train split of DATA, and surrogates of a thief of nothing beside them.

    A fifth of the examples is held out to judge sets by. The budget covers all trainings; without one each has the
    epochs of its recipe.
    """
    settings = settings_from(_named(flags), RotateSettings)
    if resume and run is None:
        raise UsageError("--resume goes on with a pool; name its folder with --run DIR")
    from holdfast.cli.rotating import collect as step

    return step(settings, voice, run=run, resume=resume, expect_head=expect_head)


@rotate.command(short_help="learn a generator of the sets")
@click.argument("pool", type=click.Path())
@_EXPECTING
@offered(*_OF_POOL, *SETTING)
@spoken
def train(voice: Voice, *, pool: str, expect_head: str, **flags: Any) -> int:
    """Fit the codec and the latent diffusion to what POOL holds.

    Settings by --set codec.NAME=VALUE and --set generator.NAME=VALUE, as in --set generator.regulariser=hinge. Where
    the way through the codec and back costs more than 0.3 points of accuracy, nothing is learned (exit code 4).
    """
    from holdfast.cli.rotating import train as step

    return step(pool, _settings(flags), voice, expect_head=expect_head)


@rotate.command(short_help="make fresh candidates")
@click.argument("pool", type=click.Path())
@click.option("--sets", "wanted", type=click.IntRange(1), metavar="N", help="How many (default: 8).")
@click.option(
    "--by",
    type=click.Choice(["generator", "anew"]),
    help="Drawn by the generator, or trained anew (default: the generator, where there is one).",
)
@click.option(
    "--immunise",
    "immunising",
    is_flag=True,
    help="Train each on against the exposed sets; without any, against the one that serves, else the bases.",
)
@click.option("--resume", is_flag=True, help="Go on with the last drawing, as it was begun.")
@_EXPECTING
@offered(*_OF_POOL, *SETTING)
@spoken
def draw(
    voice: Voice,
    *,
    pool: str,
    wanted: int | None,
    by: Literal["generator", "anew"] | None,
    immunising: bool,
    resume: bool,
    expect_head: str,
    **flags: Any,
) -> int:
    """Bring fresh candidates into POOL; each must be admitted before it may serve."""
    from holdfast.cli.rotating import draw as step

    return step(
        pool,
        _settings(flags),
        voice,
        wanted=wanted,
        by=by,
        immunising=immunising,
        resume=resume,
        expect_head=expect_head,
    )


@rotate.command(short_help="judge candidates by what thieves can do")
@click.argument("pool", type=click.Path())
@_EXPECTING
@offered(*_JUDGING, *_OF_POOL, *SETTING)
@spoken
def admit(voice: Voice, *, pool: str, expect_head: str, **flags: Any) -> int:
    """Judge every candidate of POOL on held-out examples: only an admitted set may serve.

    Sets that wait and were not judged against everything exposed by now are judged again.

    The usual gates: clean accuracy, robust accuracy, what sets that leaked turn, alone and together, how often it
    differs from the set that serves, its tensors. A gate that stays unclear on all held-out examples refuses. Where too
    few are held out to tell equal sets from worse ones, the tolerances on accuracy are widened, and the output states
    it. Exit code 0 if one was admitted, 4 if none.
    """
    from holdfast.cli.rotating import admit as step

    return step(pool, _settings(_judging(flags)), voice, expect_head=expect_head)


@rotate.command(short_help="let another set serve")
@click.argument("pool", type=click.Path())
@click.option("--why", default="", metavar="TEXT", help="Why, for the ledger.")
@click.option(
    "--unjudged",
    is_flag=True,
    help="Where no other waits, take a set that was not judged against everything exposed by now.",
)
@_EXPECTING
@spoken
def swap(voice: Voice, *, pool: str, why: str, unjudged: bool, expect_head: str) -> int:
    """Let an admitted set of POOL serve, drawn at random, and retire what served.

    Exit code 4 where no admitted set waits that was judged against everything exposed by now.
    """
    from holdfast.cli.rotating import swap as step

    return step(pool, voice, why=why, unjudged=unjudged, expect_head=expect_head)


@rotate.command(short_help="what serves, waits, was exposed")
@click.argument("pool", type=click.Path())
@click.option("-o", "--output", multiple=True, metavar="FILE", help="As .json; - for JSON on stdout.")
@_EXPECTING
@spoken
def status(voice: Voice, *, pool: str, output: tuple[str, ...], expect_head: str) -> int:
    """What POOL holds, after its ledger was verified entry by entry."""
    from holdfast.cli.rotating import status as step

    return step(pool, voice, outputs=output, expect_head=expect_head)


@rotate.command(short_help="print what identifies the ledger now")
@click.argument("pool", type=click.Path())
@_EXPECTING
@spoken
def head(voice: Voice, *, pool: str, expect_head: str) -> int:
    """Print the digest of the last entry of the ledger of POOL, to be stored outside the folder.

    A later command with --expect-head DIGEST refuses the pool where its ledger does not contain that entry: the folder
    was replaced by an older copy. Nothing within the folder can detect that.
    """
    from holdfast.cli.rotating import head as step

    return step(pool, voice, expect_head=expect_head)


@rotate.command(short_help="convert a pool whose ledger is not authenticated")
@click.argument("pool", type=click.Path())
@spoken
def migrate(voice: Voice, *, pool: str) -> int:
    """Convert POOL from the older format, whose ledger was not authenticated, to this one.

    What is in the ledger is authenticated from here on. Whether entries had been removed before cannot be detected:
    note exposures that are missing by holdfast rotate expose. Sets that wait must be judged again where any set is
    exposed.
    """
    from holdfast.cli.rotating import migrate as step

    return step(pool, voice)


@rotate.command(short_help="note that an attacker may hold a set")
@click.argument("pool", type=click.Path())
@click.argument("name", metavar="SET")
@click.option("--why", required=True, metavar="TEXT", help="What happened, as in 'laptop stolen'.")
@_EXPECTING
@spoken
def expose(voice: Voice, *, pool: str, name: str, why: str, expect_head: str) -> int:
    """Note in the ledger of POOL that an attacker may hold SET: it never serves again after the next swap."""
    from holdfast.cli.rotating import expose as step

    return step(pool, name, voice, why=why, expect_head=expect_head)


@rotate.command("run", short_help="all of it, and then a swap whenever one is due")
@click.argument("model", required=False, type=completing.MODEL)
@click.argument("data", required=False, type=completing.DATA)
@click.option(
    "--run",
    "run",
    type=click.Path(),
    metavar="DIR",
    help="Folder of the pool (default: holdfast-runs/<time>-rotate-<digest>).",
)
@click.option("--resume", is_flag=True, help="Go on with the pool in --run.")
@click.option(
    "--every",
    multiple=True,
    metavar="T",
    help="When to swap, as in 50q/principal (answers) or 24h; an exposure always does.",
)
@click.option(
    "--by",
    type=click.Choice(["generator", "anew"]),
    help="Drawn by the generator, or trained anew (default: the generator, until what it draws is refused).",
)
@click.option("--keep", type=int, metavar="N", help="Admitted sets that are made ahead (default: 8).")
@click.option(
    "--immunise", "immunising", is_flag=True, help="Train each set on against what may have leaked."
)
@click.option("--once", is_flag=True, help="End when a set serves and as many as wanted wait.")
@_EXPECTING
@offered(*_COLLECTING, *_JUDGING, *TARGET, *SETTING)
@spoken
def run_(
    voice: Voice,
    *,
    run: str | None,
    resume: bool,
    by: Literal["generator", "anew"] | None,
    immunising: bool,
    once: bool,
    expect_head: str,
    **flags: Any,
) -> int:
    """Collect, train, draw, admit and swap in; then watch the ledger, swap whenever one is due, and make new sets.

    What answers requests writes into the ledger how many each principal was given (Pool.answered, from
    RotatingModel.collected); without it only the time and exposures count. Before it collects it says how many
    held-out examples the gates need. Where no set of the generator is admitted, sets are trained from fresh weights;
    where five of those are refused in a row and none waits, what serves goes on serving, and the exit code is 4.
    """
    flags["every"] = list(flags["every"]) or None
    settings = settings_from(_named(flags), RotateSettings)
    if resume and run is None:
        raise UsageError("--resume goes on with a pool; name its folder with --run DIR")
    from holdfast.cli.rotating import turn

    return turn(
        settings,
        voice,
        run=run,
        resume=resume,
        by=by,
        immunising=immunising,
        once=once,
        expect_head=expect_head,
    )
