"""The commands that improve a model: `holdfast harden`, `calibrate` and `rotate`, which manages a pool of parameter
sets.
"""

import shlex
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from holdfast.cli.early import refuse_reports
from holdfast.cli.measure import of_policies, settings_from, settings_of_flags
from holdfast.cli.options import Command, Group, Voice, expecting_head, offered, plain_table, with_voice
from holdfast.cli.setting_options import (
    MODEL_AND_DATA,
    SETTING,
    Option,
    flag_names,
    options_of,
    refuse_resume_without_run,
    run_options,
    with_named_parts,
)
from holdfast.core.errors import RUN_FOLDER, UsageError
from holdfast.core.names import line
from holdfast.verbs.settings import Calibrate, Harden, RotateSettings

if TYPE_CHECKING:
    from holdfast.rotation.pool import Pool
    from holdfast.rotation.steps.admission_gates import Judged
    from holdfast.rotation.steps.draw import By


_HARDEN_HELP = """\
Train a new model that is more robust than MODEL on the train split of DATA, and assess both on the test split.

\b
MODEL  a network, trained or untrained: a bundled name, file.py:factory (a
       function that returns the network), or a .safetensors or .pt file
DATA   a catalogue name (see holdfast data), an .npz with x_train and y_train,
       or a folder or table with a train split

For a policy, DATA is an environment, as in holdfast assess, --recipe is robust-policy, and --threat is
observations:linf:EPS.
"""  # the escape is click's: the paragraph below it keeps its lines


@click.command(cls=Command, short_help="train a new model that is more robust", help=_HARDEN_HELP)
@offered(*MODEL_AND_DATA, *run_options("harden"))
@offered(*options_of(Harden), *SETTING)
@with_voice
def harden(voice: Voice, *, run: str | None, resume: bool, **flags: Any) -> int:
    """Train a new model with the settings of the flags, or resume such a run, and assess both models."""
    settings = settings_from(with_named_parts(flags), Harden)
    refuse_resume_without_run(resume=resume, run=run)
    if settings.trains_generator or of_policies(settings):
        return _hardened_generator(settings, voice, run=run, resume=resume)
    from holdfast.cli.running import command_line, finished_run, folder_of_run, tell
    from holdfast.core.names import line
    from holdfast.recipes.training import optimisation
    from holdfast.reports.card import generalisation_note
    from holdfast.settings.grammar import is_folder

    if not optimisation.first():  # other processes train too, and only the first reports
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
    """Train a new generator or policy, write its folders, and print the result of the measurements before and after."""
    from holdfast.cli.running import finished_run, tell_audit
    from holdfast.control.opening import POLICY
    from holdfast.generators.networks import FILE
    from holdfast.settings.grammar import is_folder

    files = [output for output in settings.output if not is_folder(output)]
    refuse_reports(files)
    with finished_run(settings, voice, run=run, resume=resume) as (result, folder):
        for place in filter(is_folder, settings.output):
            kind, name = ("generator", FILE) if settings.trains_generator else ("policy", POLICY)
            voice.say(f"{kind}: {result.write(place) / name}")
        tell_audit(result.after, files, voice, folder)
    return int(result.after.exit_code)


@click.command(cls=Command, short_help="set the thresholds of a guard from benign inputs")
@offered(*MODEL_AND_DATA, *options_of(Calibrate), *SETTING)
@with_voice
def calibrate(voice: Voice, **flags: Any) -> None:
    """Set the thresholds of a guard so that its rules together fire on at most a share of benign inputs like DATA.

    DATA must contain benign inputs that MODEL was not trained on. The thresholds are written next to the settings of
    the guard, with the digests of both; the guard refuses them for other settings or another model.
    """
    settings = settings_from(flags, Calibrate)
    from holdfast.verbs.opening.guard import rate_text

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


_STDOUT = "-"
_AHEAD = 2
"""Smallest recommended number of admitted sets that have not served yet, so that a swap is always possible."""
_LOOP = ("gates", "accept_doubts", "every", "min_waiting")
_POOL_OPTIONS = options_of(RotateSettings, only=("device", "trust_code", "follow_links"))
_STEPS_OF_SETTINGS = {
    **dict.fromkeys(("codec", "generator"), ("train", "run")),
    **dict.fromkeys(("gates", "accept_doubts"), ("admit", "run")),
    **dict.fromkeys(("every", "min_waiting"), ("run",)),
    "immunise": ("draw", "run"),
    "n_judged": ("collect", "admit", "run"),
    "budget": ("collect", "run"),
}
"""Steps that use a setting. All steps use the others, which state how the sets of the pool are made."""

_POOL_ARGUMENT = click.argument("pool", type=click.Path())
_EXPECTING = expecting_head(
    "Refuse a pool whose ledger does not contain this digest, which rotate head printed earlier."
)
_FOLDER_OPTIONS = (
    click.option(
        "--run",
        "run",
        type=click.Path(),
        metavar="DIR",
        help="Folder of the pool (default: holdfast-runs/<time>-rotate-<digest>).",
    ),
    click.option("--resume", is_flag=True, help="Continue with the pool in --run."),
)
_ROTATE_HELP = """\
Serve several parameter sets in turn, so that a stolen set is soon out of use (Generate to Defend).

A pool is a folder with encrypted parameter sets and a ledger. The ledger records when each set served, how many answers
each principal received, and which sets may be stolen. The steps: collect trains sets independently, train fits a
generator to them, draw generates candidates, admit accepts candidates that resist examples computed on stolen sets, and
swap replaces the serving set. Rotation does not replace hardening: without holdfast harden the serving set is as easy
to break as before.
"""


@click.group(cls=Group, short_help="serve several parameter sets in turn", help=_ROTATE_HELP)
def rotate() -> None:
    """Group of the commands that manage a pool of parameter sets."""


def _step(
    name: str, summary: str, *options: Option, settings: tuple[Option, ...] = ()
) -> Callable[[Callable[..., int]], click.Command]:
    """Return a decorator that adds a function to the commands of `rotate`.

    The function gets the values of `options` and of `--expect-head`. With `settings`, the options of the settings that
    the step uses, it also gets the `settings` of `rotate`, which are then read from the options, `--set` and the
    configuration.
    """

    def decorated(function: Callable[..., int]) -> click.Command:
        @with_voice
        @wraps(function)
        def command(voice: Voice, **given: Any) -> int:
            of_file = {"sets", "config", *RotateSettings.model_fields}
            own = {key: value for key, value in given.items() if key not in of_file}
            if settings:
                flags = {key: value for key, value in given.items() if key in of_file}
                _refuse_unused(name, flags)
                own["settings"] = (
                    settings_from(with_named_parts(flags), RotateSettings)
                    if "model" in flags
                    else settings_of_flags(flags, RotateSettings)
                )
            return function(voice, **own)

        offering = offered(*options, _EXPECTING, *settings, *(SETTING if settings else ()))
        return rotate.command(name, short_help=summary)(offering(command))

    return decorated


def _refuse_unused(step: str, flags: Mapping[str, Any]) -> None:
    """Raise `UsageError` for a `--set` with a setting that the step does not use. A file may have all settings."""
    for assignment in flags["sets"]:
        name = assignment.partition("=")[0].partition(".")[0]
        if step not in _STEPS_OF_SETTINGS.get(name, (step,)):
            others = " and ".join(f"rotate {user}" for user in _STEPS_OF_SETTINGS[name])
            do = "do" if len(_STEPS_OF_SETTINGS[name]) > 1 else "does"
            raise UsageError(f"--set {name}: rotate {step} does not use {name} ({others} {do}); leave it out")


def _folder_and_resuming(settings: RotateSettings, run: str | None, *, resume: bool) -> tuple[Path, str]:
    """Return the folder of a pool that is created or resumed, and how a stopped step is resumed."""
    if resume and run is None:
        raise UsageError("--resume continues with a pool, and its folder is not given", RUN_FOLDER)
    from holdfast.cli.running import command_line, folder_of_run
    from holdfast.runs.engine.identity import way_out

    folder = folder_of_run(settings, run)
    return folder, way_out(command_line(), folder)


def _opened(pool: str, expect_head: str) -> "Pool":
    from holdfast.rotation.pool import Pool

    return Pool.open(Path(pool), expect_head=expect_head)


@_step(
    "collect",
    "train the first parameter sets of a pool",
    *MODEL_AND_DATA,
    *_FOLDER_OPTIONS,
    settings=options_of(RotateSettings, only=[key for key in flag_names(RotateSettings) if key not in _LOOP]),
)
def collect(
    voice: Voice, settings: RotateSettings, *, run: str | None, resume: bool, expect_head: str
) -> int:
    """Train parameter sets of MODEL's architecture on the train split of DATA, and surrogates for transfer.

    The surrogates are models of an attacker without any parameters of the pool. A fifth of the examples is held out,
    and sets are judged on it. The budget is for all trainings together. Without a budget each training has the number
    of epochs of its recipe.
    """
    folder, again = _folder_and_resuming(settings, run, resume=resume)
    from holdfast.cli.running import progress_bar
    from holdfast.rotation.steps import collect as collection
    from holdfast.runs.engine.progress import stoppable
    from holdfast.verbs import rotate as rotation_requests

    with stoppable(again), progress_bar(voice) as progress:
        request = rotation_requests.collect_request(settings, folder, resume=resume, expect_head=expect_head)
        collected = collection.collect(request, again=again, notify=voice.say, progress=progress)
    accuracy = ", ".join(f"{100 * share:.1f}" for share in collected.accuracy)
    click.echo(
        f"{collected.sets} sets of {collected.runs} trainings of {collected.epochs} epochs; "
        f"accuracy of the bases: {accuracy} %"
    )
    voice.say(f"pool: {collected.pool.path}")
    return 0


@_step("train", "train a generator of parameter sets", _POOL_ARGUMENT, settings=_POOL_OPTIONS)
def train(voice: Voice, settings: RotateSettings, *, pool: str, expect_head: str) -> int:
    """Train a codec, which compresses parameter sets, and a latent diffusion model on the collected sets of POOL.

    Settings: --set codec.NAME=VALUE and --set generator.NAME=VALUE, as in --set generator.regulariser=hinge. If
    encoding and decoding costs more than 0.3 points of accuracy, no generator is trained (exit code 4).
    """
    from holdfast.cli.running import command_line
    from holdfast.rotation.steps import draw as drawing
    from holdfast.runs.engine.progress import stoppable
    from holdfast.verbs import rotate as rotation_requests

    again = f"an earlier generator is kept, start again with: {command_line()}"
    with stoppable(again):
        request = rotation_requests.train_request(settings, _opened(pool, expect_head))
        trained = drawing.train(request, again=again, notify=voice.say)
    click.echo(
        f"generator trained on {trained.sets} sets of {trained.parameters:,} parameters in "
        f"{trained.codec_s + trained.diffusion_s:.0f} s; the codec costs {100 * trained.accuracy_lost:.2f} points of "
        f"accuracy"
    )
    return 0


@_step(
    "draw",
    "generate new candidates",
    _POOL_ARGUMENT,
    click.option(
        "--sets", "wanted", type=click.IntRange(1), metavar="N", help="Number of candidates (default: 8)."
    ),
    click.option(
        "--by",
        type=click.Choice(["generator", "retraining"]),
        help="Sample from the generator, or train from fresh random weights (default: generator, if there is one).",
    ),
    click.option(
        "--immunise",
        "immunising",
        is_flag=True,
        help="Train each further against examples computed on stolen sets; if there are none, on the serving set or "
        "the bases.",
    ),
    click.option("--resume", is_flag=True, help="Continue the last draw with its settings."),
    settings=_POOL_OPTIONS,
)
def draw(
    voice: Voice,
    settings: RotateSettings,
    *,
    pool: str,
    wanted: int | None,
    by: "By | None",
    immunising: bool,
    resume: bool,
    expect_head: str,
) -> int:
    """Add new candidates to POOL. A candidate must be admitted before it may serve."""
    from holdfast.cli.running import command_line
    from holdfast.reports.words import amount
    from holdfast.rotation.steps import draw as drawing
    from holdfast.runs.engine.progress import stoppable
    from holdfast.verbs import rotate as rotation_requests

    again = f"finished steps are stored; resume with: {command_line()}{'' if resume else ' --resume'}"
    with stoppable(again):
        request = rotation_requests.draw_request(
            settings, _opened(pool, expect_head), sets=wanted, by=by, immunising=immunising, resume=resume
        )
        drawn = drawing.draw(request, again=again, notify=voice.say)
    immunised = f", immunised against {amount(len(drawn.against), 'sets')}" if drawn.against else ""
    how = "sampled from the generator" if drawn.by == "generator" else "trained from fresh random weights"
    click.echo(f"{amount(len(drawn.names), 'candidates')} {how}, selected from {drawn.looked_at}{immunised}")
    voice.say(f"a candidate must be admitted before it may serve: holdfast rotate admit {shlex.quote(pool)}")
    return 0


@_step(
    "admit",
    "judge candidates, and admit those that pass all gates",
    _POOL_ARGUMENT,
    settings=(*options_of(RotateSettings, only=("gates", "accept_doubts")), *_POOL_OPTIONS),
)
def admit(voice: Voice, settings: RotateSettings, *, pool: str, expect_head: str) -> int:
    """Judge every candidate of POOL on held-out examples: only an admitted set may serve.

    Waiting sets that were not judged against every stolen set are judged again.

    The usual gates are conditions on clean accuracy, robust accuracy, the success of examples computed on stolen sets
    (each alone and all together), the share of predictions that differ from the serving set, and the tensors. A
    candidate is refused if a gate remains unclear on all held-out examples. If too few examples are held out to
    distinguish equal sets from worse ones, the tolerances on accuracy are widened, and the output states it. Exit code
    0 if a candidate was admitted, 4 if none.
    """
    from holdfast.cli.running import command_line, progress_bar
    from holdfast.rotation.steps import admit as admission
    from holdfast.runs.engine.progress import stoppable
    from holdfast.verbs import rotate as rotation_requests

    again = f"finished steps are stored; resume with: {command_line()}"
    with stoppable(again), progress_bar(voice) as progress:
        request = rotation_requests.admit_request(settings, _opened(pool, expect_head))
        result = admission.admit(request, again=again, notify=voice.say, progress=progress)
    for judged in result.judged if voice.verbose else ():
        _show_gates(judged, voice)
    click.echo(f"{len(result.admitted)} of {len(result.judged)} candidates admitted")
    if result.kept_out:
        click.echo(f"holdfast: {line(result.kept_out)}", err=True)
    return result.exit_code


def _show_gates(judged: "Judged", voice: Voice) -> None:
    from holdfast.reports.terminal import cell

    table = plain_table("verdict", "gate", "measured", "required", title=f"{judged.name}: {judged.verdict}")
    for gate in judged.gates:
        table.add_row(gate.verdict, gate.name, cell(gate.why), gate.bound)
    for name, estimate in judged.reported.items():
        measured = f"{estimate.value:.3g} ({estimate.low:.3g} to {estimate.high:.3g}, n = {estimate.n:,})"
        table.add_row("–", name, measured, "reported, not a gate")
    voice.console().print(table)


@_step(
    "swap",
    "replace the serving set by an admitted one",
    _POOL_ARGUMENT,
    click.option("--why", default="", metavar="TEXT", help="Reason, recorded in the ledger."),
    click.option(
        "--unjudged",
        is_flag=True,
        help="If no other set waits, use one that was not judged against every stolen set.",
    ),
)
def swap(voice: Voice, *, pool: str, why: str, unjudged: bool, expect_head: str) -> int:
    """Serve another admitted set of POOL, chosen at random, and retire the serving set.

    Exit code 4 if no admitted set waits that was judged against every stolen set.
    """
    from holdfast.rotation.steps import serving_set

    swapped = serving_set.swap(_opened(pool, expect_head), why, unjudged=unjudged)
    click.echo(f"{swapped.name} serves as epoch {swapped.epoch}")
    if swapped.unjudged:
        voice.say(f"note: {serving_set.UNJUDGED}")
    if swapped.waiting < _AHEAD:
        voice.say(
            f"note: number of admitted sets that wait: {swapped.waiting}, and at least {_AHEAD} are recommended; draw "
            "and admit more before the next swap"
        )
    return 0


@_step(
    "status",
    "show the sets of a pool and their states",
    _POOL_ARGUMENT,
    click.option(
        "-o",
        "--output",
        "outputs",
        multiple=True,
        metavar="FILE",
        help="File with suffix .json; - for JSON on stdout.",
    ),
)
def status(voice: Voice, *, pool: str, outputs: tuple[str, ...], expect_head: str) -> int:
    """Show the sets of POOL and their states, after every entry of its ledger was verified."""
    for output in outputs:
        if output != _STDOUT and Path(output).suffix != ".json":
            raise UsageError(f"-o {output} is not possible for a pool; write -o FILE.json, or - for stdout")
    from holdfast.reports.words import json_text
    from holdfast.rotation.steps import serving_set
    from holdfast.runs.store.files import usable, write_atomically
    from holdfast.runs.store.folder import document

    overview = serving_set.status(_opened(pool, expect_head))
    for output in outputs:
        if output != _STDOUT:
            with usable(Path(output)):
                write_atomically(Path(output), document(overview))
    if _STDOUT in outputs:
        click.echo(json_text(overview), nl=False)
    elif not voice.quiet:
        _show_sets(overview, voice)
    for note in overview["notes"]:
        voice.say(f"note: {note}")
    return 0


def _show_sets(overview: Mapping[str, Any], voice: Voice) -> None:
    from rich.text import Text

    from holdfast.rotation.pool import NAME_DIGITS

    table = plain_table()
    table.add_column("set", min_width=NAME_DIGITS, no_wrap=True)
    for name in ("state", "since", "epoch", "answers"):
        table.add_column(name, no_wrap=True)
    table.add_column("why", overflow="fold")
    for row in overview["sets"]:
        epochs = ", ".join(map(str, row["epochs"]))
        answers = str(row["answers"]) if row["epochs"] else ""
        why = f"exposed: {row['exposed']}" if row["exposed"] else row["why"]
        table.add_row(row["name"], row["state"], row["since"][:10], epochs, answers, Text(line(why)))
    voice.console().print(table)
    now = overview["serving"]
    serving = (
        "no set serves"
        if now is None
        else f"{now['name']} serves as epoch {now['epoch']} since {now['since']}"
    )
    click.echo(f"{serving}; {len(overview['ahead'])} wait; {overview['entries']} entries, authenticated")


@_step("head", "print the digest of the last entry of the ledger", _POOL_ARGUMENT)
def head(voice: Voice, *, pool: str, expect_head: str) -> int:
    """Print the digest of the last entry of the ledger of POOL, to be stored outside the folder.

    A later command with --expect-head DIGEST refuses the pool if its ledger does not contain that entry. Then the
    folder was replaced by an older copy, which nothing inside the folder can detect.
    """
    from holdfast.rotation.steps import serving_set

    latest = serving_set.head(_opened(pool, expect_head))
    click.echo(latest.digest)
    voice.say(
        f"this is the digest of entry {latest.entries}; store it outside the folder. A later command with "
        f"--expect-head DIGEST refuses an older copy of the folder"
    )
    return 0


@_step(
    "expose",
    "record that an attacker may have a set",
    _POOL_ARGUMENT,
    click.argument("name", metavar="SET"),
    click.option("--why", required=True, metavar="TEXT", help="What happened, as in 'laptop stolen'."),
)
def expose(voice: Voice, *, pool: str, name: str, why: str, expect_head: str) -> int:
    """Record in the ledger of POOL that an attacker may have SET. After the next swap it never serves again."""
    from holdfast.rotation.steps import serving_set

    exposed = serving_set.expose(_opened(pool, expect_head), name, why)
    click.echo(f"{name} is listed as exposed: {line(why)}")
    if exposed.serving:
        voice.say(f"it is still the serving set; replace it: holdfast rotate swap {shlex.quote(pool)}")
    if exposed.unjudged:
        voice.say(
            f"{exposed.unjudged} waiting sets must be judged again: holdfast rotate admit {shlex.quote(pool)}"
        )
    return 0


@_step(
    "run",
    "run all steps, then swap whenever a swap is due",
    *MODEL_AND_DATA,
    *_FOLDER_OPTIONS,
    click.option(
        "--by",
        type=click.Choice(["generator", "retraining"]),
        help="Sample from the generator, or train from fresh random weights (default: generator, until its sets are "
        "refused).",
    ),
    click.option(
        "--immunise",
        "immunising",
        is_flag=True,
        help="Train each set further against examples computed on stolen sets.",
    ),
    click.option("--once", is_flag=True, help="Exit when a set serves and enough sets wait."),
    click.option(
        "--anyway", is_flag=True, help="Begin even if the data or the budget are too small for the gates."
    ),
    settings=options_of(RotateSettings),
)
def run_(
    voice: Voice, settings: RotateSettings, *, run: str | None, resume: bool, expect_head: str, **options: Any
) -> int:
    """Collect, train, draw, admit and swap; then watch the ledger, swap whenever a swap is due, and generate new sets.

    The process that answers requests records the number of answers to each principal in the ledger (Pool.answered, with
    the counts of RotatingModel.collected). Without these only time and exposures cause a swap. If the data or the
    budget are too small for the gates of an admission, nothing is trained, unless --anyway is given. If no set of the
    generator is admitted, sets are trained from fresh random weights. If five of those are refused in a row and no set
    waits, the serving set continues to serve, and the exit code is 4.
    """
    folder, again = _folder_and_resuming(settings, run, resume=resume)
    from holdfast.cli.running import progress_bar
    from holdfast.rotation.steps import rotation_run
    from holdfast.runs.engine.progress import stoppable
    from holdfast.verbs import rotate as rotation_requests

    with stoppable(again), progress_bar(voice) as progress:
        request = rotation_requests.run_request(
            settings, folder, resume=resume, expect_head=expect_head, **options
        )
        rotation_run.run(request, again=again, notify=voice.say, progress=progress)
    return 0
