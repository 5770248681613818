"""`holdfast assess MODEL DATA`."""

from pathlib import Path
from shlex import quote
from typing import Any

import click

from holdfast.cli import completing
from holdfast.cli.early import (
    refuse_foreign_server,
    refuse_missing_file,
    refuse_reports,
    refuse_server_to_train,
    refuse_unknown_data,
    refuse_unknown_model,
)
from holdfast.cli.options import Voice, offered, spoken
from holdfast.cli.untrained import SERVED, UNTRAINED
from holdfast.config.settings import AssessSettings, HardenSettings, S, read
from holdfast.config.suites import DEFAULT_SUITE, SUITES
from holdfast.config.values import SurrogateSettings
from holdfast.core.errors import UsageError
from holdfast.store.files import refuse_no_run

_CONFIG = "holdfast.yaml"
"""Default file of `holdfast init`."""

FIT = click.option(
    "--fit",
    type=completing.DATA,
    metavar="DATA",
    help="Examples to learn attacks on (default: the train split).",
)
ATTACKING = (
    click.option(
        "--threat",
        "-t",
        type=completing.THREAT,
        metavar="T",
        help="What the adversary may do, as in linf:8/255,queries=1000.",
    ),
    click.option(
        "--suite",
        "-s",
        type=completing.SUITE,
        metavar="S",
        help=f"Named attacks: {', '.join(SUITES)} (default: {DEFAULT_SUITE}; black-box without gradients), or attacks "
        "by name, as in pgd,square.",
    ),
    click.option(
        "--surrogate",
        "surrogates",
        multiple=True,
        type=completing.MODEL,
        metavar="MODEL[,K=V]",
        help="A model of the attacker's own, to make examples on.",
    ),
    click.option(
        "--gate",
        "-g",
        "gates",
        multiple=True,
        metavar="G",
        help='A claim to judge, as in "robust_accuracy >= 0.40".',
    ),
    click.option(
        "--baseline",
        type=click.Path(),
        metavar="RUN",
        help="Run folder that `vs baseline` gates compare with.",
    ),
    click.option(
        "--accept-doubt",
        "accept_doubts",
        multiple=True,
        metavar='NAME="why"',
        help="Answer for a raised doubt.",
    ),
    click.option(
        "--only",
        multiple=True,
        type=completing.ATTACK,
        metavar="ATTACK",
        help="Run only these attacks of the suite.",
    ),
    click.option(
        "--skip", multiple=True, type=completing.ATTACK, metavar="ATTACK", help="Leave these attacks out."
    ),
    click.option(
        "--transform",
        metavar="T",
        help="Random changes that inputs are seen through, as in rotate=15,blur=1.",
    ),
    click.option(
        "--across",
        multiple=True,
        type=completing.DATA,
        metavar="DATA",
        help="Other data to carry changes to and from, and see what they turn.",
    ),
    click.option("--curve/--no-curve", default=None, help="Also measure accuracy against eps."),
    click.option("--full", is_flag=True, default=None, help="Run every attack on every example."),
    click.option(
        "--doubts/--no-doubts", default=None, help="Probe for reasons to doubt the number (default: on)."
    ),
    click.option(
        "--adaptive/--no-adaptive",
        default=None,
        help="Attack once more in the ways that raised doubts or a detector call for.",
    ),
    click.option("--seed", type=int, metavar="N", help="Seed of every random draw (default: 0)."),
    click.option("--batch-size", type=int, metavar="N", help="Examples that go through the model at once."),
    click.option(
        "--workers", type=int, metavar="N", help="Processes that share the work, each on one thread."
    ),
    click.option("--time-budget", metavar="T", help="Stop attacking after this long, as in 10min."),
    click.option(
        "--save-adversarial",
        is_flag=True,
        default=None,
        help="Keep every successful input in the run folder.",
    ),
    click.option(
        "-o",
        "--output",
        multiple=True,
        type=click.Path(),
        metavar="FILE",
        help="Report, by suffix: .html .json .xml .sarif .md .csv; - for JSON on stdout.",
    ),
)
"""Options for attacks, gates and reports."""

TARGET = (
    click.option("-n", type=int, metavar="N", help="The first N examples."),
    click.option("--sample", type=int, metavar="N", help="A seeded sample of N examples."),
    click.option("--split", metavar="NAME", help="Split of the data (default: test where there is one)."),
    click.option("--label", metavar="COL", help="Label column of a table."),
    click.option(
        "--drop", multiple=True, metavar="COL", help="Leave this column of a table out, as a name or an id."
    ),
    click.option("--x", metavar="NAME", help="Array of the inputs in an .npz file (default: x_test or x)."),
    click.option("--y", metavar="NAME", help="Array of the labels in an .npz file (default: y_test or y)."),
    click.option("--arch", metavar="NAME|FILE.py:F", help="Architecture of a state dict."),
    click.option("--model-args", multiple=True, metavar="K=V", help="Arguments of the factory."),
    click.option("--bounds", metavar="LOW,HIGH", help="Range of legal inputs (default: 0,1)."),
    click.option("--mean", metavar="M,…", help="Subtracted inside the model, one number a channel."),
    click.option("--std", metavar="S,…", help="Divides inside the model, one number a channel."),
    click.option(
        "--data-normalised",
        metavar="M,…/S,…",
        help="The data were normalised so: undo it, and do it in the model.",
    ),
    click.option(
        "--layout",
        type=click.Choice(["chw", "hwc", "asis"]),
        metavar="L",
        help="Axes of stored arrays: chw or hwc (channels first or last), or asis.",
    ),
    click.option(
        "--model-output",
        type=click.Choice(["logit", "probability"]),
        metavar="KIND",
        help="What the model returns: logit or probability.",
    ),
    click.option("--classes", type=int, metavar="N", help="Number of classes, to be checked."),
    click.option(
        "--class-names",
        metavar="A,B,…|@FILE",
        help="Classes of the model in their order, to match names in the data.",
    ),
    click.option(
        "--class-order",
        type=click.Choice(["lexical", "numeric"]),
        metavar="ORDER",
        help="How class names were numbered in training: lexical or numeric.",
    ),
    click.option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1 (default: auto)."),
    click.option(
        "--trust-code", is_flag=True, default=None, help="Let files run code that they bring along."
    ),
)
"""Options for the model, its input, and the data."""

SETTING = (
    click.option("--set", "sets", multiple=True, metavar="A.B=C", help="Set any key of the configuration."),
    click.option(
        "--config", "-c", type=click.Path(), metavar="FILE", help="A holdfast.yaml; flags are stronger."
    ),
)
"""Options for the configuration as a whole."""


def settings_from(flags: dict[str, Any], kind: type[S]) -> S:
    """Return the settings of a command line. A missing file is reported before a missing flag."""
    from holdfast.config.grammar import is_folder, pairs, parse_surrogate

    held = (str(parse_surrogate(each)["model"]) for each in flags.get("surrogates", ()))
    named = (flags.get("model"), flags.get("data"), flags.get("config"), flags.get("baseline"))
    for address in (*named, *held, *flags.get("across", ())):
        refuse_missing_file(address)

    config, sets = flags.pop("config"), flags.pop("sets")
    for key, flag in (("model_args", "--model-args"), ("accept_doubts", "--accept-doubt")):
        flags[key] = pairs(flags.get(key, ()), flag) or None
    for key in ("gates", "only", "skip", "drop", "allow_hosts", "headers", "output", "surrogates", "across"):
        flags[key] = list(flags.get(key, ())) or None
    settings = read(Path(config) if config else None, flags, sets, flags=_flag_names(), kind=kind)
    if config and not settings.trust_code:
        _refuse_code_of_config(settings, flags)
    if config:
        _refuse_hosts_of_config(settings, flags)
    _refuse_targets(settings, config)
    made = isinstance(settings, HardenSettings)
    files = [output for output in settings.output if not (made and is_folder(output))]
    for output in files if made else ():
        if output != "-" and not Path(output).suffix:
            raise UsageError(
                f"-o {output} has no suffix; write -o {output}/ for a folder that holds the new model, or "
                f"-o {output}.html for a report"
            )
    refuse_reports(files)
    return settings


def _flag_names() -> dict[str, str]:
    """Flags of the parameters of the running command, such as `--threat` for `threat`."""
    context = click.get_current_context()
    return {
        str(parameter.name): max(parameter.opts, key=len)
        for parameter in context.command.params
        if isinstance(parameter, click.Option)
    }


def _refuse_targets(settings: AssessSettings, config: str | None) -> None:
    command = click.get_current_context().command_path
    example = f"{command} mnist-cnn mnist-mini"
    if config is None and Path(_CONFIG).is_file():
        example = f"{command} -c {_CONFIG}, which lies here"
    for name, meaning in (("model", "what is to be assessed"), ("data", "examples to assess it on")):
        if getattr(settings, name) is None:
            raise UsageError(f"{name.upper()} is missing ({meaning}); try {example}")
    for address in (str(settings.model), *(each.model for each in settings.surrogates)):
        refuse_unknown_model(address)
    if isinstance(settings, HardenSettings):
        refuse_server_to_train(str(settings.model))
    refuse_foreign_server(str(settings.model), settings.allow_hosts)
    for address in (str(settings.data), *settings.across):
        refuse_unknown_data(address)
    if settings.baseline is not None:
        refuse_no_run(Path(settings.baseline))


def _refuse_bare_resume(run: Path) -> None:
    """Raise `UsageError` with the original command of a run, if it is resumed by its folder only."""
    from holdfast.engine.resuming import way_out
    from holdfast.store.folder import read_about

    command = read_about(run).get("command")
    if command:
        raise UsageError(f"MODEL is missing; {way_out(command, run)}")


def _refuse_code_of_config(settings: AssessSettings, flags: dict[str, Any]) -> None:
    for name in ("model", "arch"):
        value = getattr(settings, name)
        if value and ".py:" in value and flags.get(name) != value:
            raise UsageError(
                f"the configuration names code ({name}: {value}); a file runs none by itself: "
                f"say it on the command line too, or add --trust-code"
            )
    if not flags.get("surrogates"):
        for place, each in enumerate(settings.surrogates):
            for value in (each.model, each.arch):
                if value and ".py:" in value:
                    flags_of_all = " ".join(
                        f"--surrogate {quote(_spelled(one))}" for one in settings.surrogates
                    )
                    raise UsageError(
                        f"the configuration names code (surrogates.{place}: {value}); a file runs none by itself: "
                        f"say it on the command line too, with {flags_of_all}, or add --trust-code"
                    )


def _spelled(surrogate: SurrogateSettings) -> str:
    """Return a surrogate in the form of `--surrogate`, with all its settings.

    A flag replaces the whole list in the file.
    """
    said = surrogate.model_dump(exclude={"model", "model_args"}, exclude_none=True)
    numbers = {key: ",".join(map(str, v)) for key, v in said.items() if isinstance(v, tuple)}
    words = {**said, **numbers, **surrogate.model_args}
    return ",".join((surrogate.model, *(f"{key}={value}" for key, value in words.items())))


def _refuse_hosts_of_config(settings: AssessSettings, flags: dict[str, Any]) -> None:
    """Raise `UsageError` for hosts and headers from a configuration, which may be untrusted, if no flag gives
    them too.
    """
    for host in settings.allow_hosts:
        if host not in (flags.get("allow_hosts") or ()):
            raise UsageError(
                f"the configuration allows the host {host}; a file allows none by itself: say it on the command line "
                f"too, with --allow-host {host}"
            )
    for header in settings.headers:
        if header not in (flags.get("headers") or ()):
            raise UsageError(
                f"the configuration sends the header {header}; a file sends nothing of the environment by itself: say "
                f"it on the command line too, with --header '{header}'"
            )


_HELP = """\
How robust is MODEL on DATA, honestly: the worst case over a suite of attacks, with intervals and doubts.

\b
MODEL  a bundled name (mnist-cnn, mnist-cnn-hardened), file.py:factory, a
       .safetensors, .pt, .pt2, .onnx, .skops, .json or .ubj file, or a URL with
       --allow-host
DATA   a bundled name (mnist-mini), a catalogue name (see holdfast data), an .npz,
       .csv or .parquet file, or a folder with one folder of images a class
"""  # the escape is click's: the paragraph below it keeps its lines


@click.command(short_help="how robust is a model, honestly", help=_HELP)
@click.argument("model", required=False, type=completing.MODEL)
@click.argument("data", required=False, type=completing.DATA)
@click.option(
    "--run",
    "run",
    type=click.Path(),
    metavar="DIR",
    help="Run folder (default: holdfast-runs/<time>-assess-<digest>).",
)
@click.option(
    "--resume", is_flag=True, help="Go on with the run in --run, or report it again if it is finished."
)
@click.option("--dry-run", is_flag=True, help="Print what it would cost, and stop.")
@offered(*ATTACKING, FIT, *TARGET, *UNTRAINED, *SERVED, *SETTING)
@spoken
def assess(voice: Voice, *, run: str | None, resume: bool, dry_run: bool, **flags: Any) -> int:
    """Run or resume an assessment of MODEL on DATA, or estimate its cost."""
    if resume and run is not None and flags["model"] is None and flags["config"] is None:
        _refuse_bare_resume(Path(run))
    settings = settings_from(flags, AssessSettings)
    if resume and run is None:
        raise UsageError("--resume goes on with a run; name its folder with --run DIR (see holdfast runs)")
    from holdfast.cli.running import assess_and_report

    return assess_and_report(settings, voice, run=run, resume=resume, dry_run=dry_run)
