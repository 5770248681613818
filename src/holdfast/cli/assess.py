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
from holdfast.cli.options import Voice, offered, with_voice
from holdfast.cli.untrained import SERVED, UNTRAINED
from holdfast.config.settings import AssessSettings, HardenSettings, S, read_settings
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
    help="Examples for attacks that are fitted to data (default: the train split).",
)
ATTACKING = (
    click.option(
        "--threat",
        "-t",
        type=completing.THREAT,
        metavar="T",
        help="Threat model: what the attacker may change and use, as in linf:8/255,queries=1000.",
    ),
    click.option(
        "--suite",
        "-s",
        type=completing.SUITE,
        metavar="S",
        help=f"Suite of attacks: {', '.join(SUITES)} (default: {DEFAULT_SUITE}; black-box for a model without "
        "gradients), or attacks by name, as in pgd,square.",
    ),
    click.option(
        "--surrogate",
        "surrogates",
        multiple=True,
        type=completing.MODEL,
        metavar="MODEL[,K=V]",
        help="Surrogate model of the attacker, on which transfer examples are computed.",
    ),
    click.option(
        "--gate",
        "-g",
        "gates",
        multiple=True,
        metavar="G",
        help='Condition on a metric, as in "robust_accuracy >= 0.40".',
    ),
    click.option(
        "--baseline",
        type=click.Path(),
        metavar="RUN",
        help="Run folder for gates that end in `vs baseline`.",
    ),
    click.option(
        "--accept-doubt",
        "accept_doubts",
        multiple=True,
        metavar='NAME="why"',
        help="Accept a raised doubt, with the reason.",
    ),
    click.option(
        "--only",
        multiple=True,
        type=completing.ATTACK,
        metavar="ATTACK",
        help="Run only these attacks of the suite.",
    ),
    click.option(
        "--skip",
        multiple=True,
        type=completing.ATTACK,
        metavar="ATTACK",
        help="Leave these attacks of the suite out.",
    ),
    click.option(
        "--transform",
        metavar="T",
        help="Transform every input at random before the model, as in rotate=15,blur=1.",
    ),
    click.option(
        "--across",
        multiple=True,
        type=completing.DATA,
        metavar="DATA",
        help="Another data set: perturbations are transferred from DATA to it and back.",
    ),
    click.option(
        "--curve/--no-curve", default=None, help="Also measure robust accuracy as a function of eps."
    ),
    click.option(
        "--full",
        is_flag=True,
        default=None,
        help="Run every attack on every example, even if an earlier one broke it.",
    ),
    click.option(
        "--doubts/--no-doubts",
        default=None,
        help="Test for reasons why the result may be too optimistic (default: on).",
    ),
    click.option(
        "--adaptive/--no-adaptive",
        default=None,
        help="Also run adaptive attacks, chosen by the raised doubts and for a detector.",
    ),
    click.option("--seed", type=int, metavar="N", help="Seed of all random numbers (default: 0)."),
    click.option("--batch-size", type=int, metavar="N", help="Examples in one call of the model."),
    click.option(
        "--workers",
        type=int,
        metavar="N",
        help="Number of processes, each with one thread.",
    ),
    click.option("--time-budget", metavar="T", help="Stop attacking after this time, as in 10min."),
    click.option(
        "--save-adversarial",
        is_flag=True,
        default=None,
        help="Store all adversarial examples in the run folder.",
    ),
    click.option(
        "-o",
        "--output",
        multiple=True,
        type=click.Path(),
        metavar="FILE",
        help="Report file, in the format of its suffix: .html .json .xml .sarif .md .csv; - for JSON on stdout.",
    ),
)
"""Options for attacks, gates and reports."""

TARGET = (
    click.option("-n", type=int, metavar="N", help="Use the first N examples."),
    click.option("--sample", type=int, metavar="N", help="Use N examples chosen at random by the seed."),
    click.option("--split", metavar="NAME", help="Split of the data (default: test if there is one)."),
    click.option("--label", metavar="COL", help="Label column of a table."),
    click.option(
        "--drop",
        multiple=True,
        metavar="COL",
        help="Leave out a column of a table, such as an id.",
    ),
    click.option("--x", metavar="NAME", help="Name of the inputs in an .npz file (default: x_test or x)."),
    click.option("--y", metavar="NAME", help="Name of the labels in an .npz file (default: y_test or y)."),
    click.option(
        "--arch",
        metavar="NAME|FILE.py:F",
        help="Architecture of a state dict: a name (see holdfast models) or a function in a file.",
    ),
    click.option(
        "--model-args",
        multiple=True,
        metavar="K=V",
        help="Argument of the function that returns the model (file.py:factory).",
    ),
    click.option("--bounds", metavar="LOW,HIGH", help="Lowest and highest legal input value (default: 0,1)."),
    click.option(
        "--mean", metavar="M,…", help="Subtracted from the input inside the model, one number per channel."
    ),
    click.option("--std", metavar="S,…", help="Divides the input inside the model, one number per channel."),
    click.option(
        "--data-normalised",
        metavar="M,…/S,…",
        help="Mean and standard deviation by which the data were normalised. This is undone, and done inside the model "
        "instead.",
    ),
    click.option(
        "--layout",
        type=click.Choice(["chw", "hwc", "asis"]),
        metavar="L",
        help="Axes of stored arrays: chw (channels first), hwc (channels last), or asis (unchanged).",
    ),
    click.option(
        "--model-output",
        type=click.Choice(["logit", "probability"]),
        metavar="KIND",
        help="What the model returns: logit or probability.",
    ),
    click.option("--classes", type=int, metavar="N", help="Expected number of classes."),
    click.option(
        "--class-names",
        metavar="A,B,…|@FILE",
        help="Names of the classes in the order of the model's outputs, or a file with one name per line.",
    ),
    click.option(
        "--class-order",
        type=click.Choice(["lexical", "numeric"]),
        metavar="ORDER",
        help="Order by which classes were numbered in training: lexical or numeric.",
    ),
    click.option("--device", metavar="NAME", help="Device: auto, cpu, cuda or cuda:1 (default: auto)."),
    click.option(
        "--trust-code", is_flag=True, default=None, help="Allow files to run the code that they contain."
    ),
)
"""Options for the model, its input, and the data."""

SETTING = (
    click.option(
        "--set",
        "sets",
        multiple=True,
        metavar="A.B=C",
        help="Set any key of the configuration, as in recipe.beta=6.",
    ),
    click.option(
        "--config",
        "-c",
        type=click.Path(),
        metavar="FILE",
        help="Configuration file (see holdfast init). Flags take precedence.",
    ),
)
"""Options for the configuration as a whole."""


def settings_from(flags: dict[str, Any], kind: type[S]) -> S:
    """Return the settings of a command line. A missing file is reported before a missing flag."""
    from holdfast.config.grammar import is_folder, parse_pairs, parse_surrogate

    surrogates = (str(parse_surrogate(each)["model"]) for each in flags.get("surrogates", ()))
    named = (flags.get("model"), flags.get("data"), flags.get("config"), flags.get("baseline"))
    for address in (*named, *surrogates, *flags.get("across", ())):
        refuse_missing_file(address)

    config, sets = flags.pop("config"), flags.pop("sets")
    for key, flag in (("model_args", "--model-args"), ("accept_doubts", "--accept-doubt")):
        flags[key] = parse_pairs(flags.get(key, ()), flag) or None
    for key in ("gates", "only", "skip", "drop", "allow_hosts", "headers", "output", "surrogates", "across"):
        flags[key] = list(flags.get(key, ())) or None
    settings = read_settings(Path(config) if config else None, flags, sets, flags=_flag_names(), kind=kind)
    if config and not settings.trust_code:
        _refuse_code_of_config(settings, flags)
    if config:
        _refuse_hosts_of_config(settings, flags)
    _refuse_targets(settings, config)
    hardening = isinstance(settings, HardenSettings)
    files = [output for output in settings.output if not (hardening and is_folder(output))]
    for output in files if hardening else ():
        if output != "-" and not Path(output).suffix:
            raise UsageError(
                f"-o {output} has no suffix; write -o {output}/ for a folder with the new model, or "
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
        example = f"{command} -c {_CONFIG} (a file in this folder)"
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
                f"the configuration refers to code ({name}: {value}). Code from a configuration is not run. "
                f"Repeat the address on the command line, or add --trust-code"
            )
    if not flags.get("surrogates"):
        for place, each in enumerate(settings.surrogates):
            for value in (each.model, each.arch):
                if value and ".py:" in value:
                    flags_of_all = " ".join(
                        f"--surrogate {quote(_spelled(surrogate))}" for surrogate in settings.surrogates
                    )
                    raise UsageError(
                        f"the configuration refers to code (surrogates.{place}: {value}). Code from a configuration "
                        f"is not run. Repeat the address on the command line, with {flags_of_all}, or add --trust-code"
                    )


def _spelled(surrogate: SurrogateSettings) -> str:
    """Return a surrogate in the form of `--surrogate`, with all its settings.

    A flag replaces the whole list in the file.
    """
    settings = surrogate.model_dump(exclude={"model", "model_args"}, exclude_none=True)
    numbers = {key: ",".join(map(str, v)) for key, v in settings.items() if isinstance(v, tuple)}
    words = {**settings, **numbers, **surrogate.model_args}
    return ",".join((surrogate.model, *(f"{key}={value}" for key, value in words.items())))


def _refuse_hosts_of_config(settings: AssessSettings, flags: dict[str, Any]) -> None:
    """Raise `UsageError` for hosts and headers from a configuration, which may be untrusted, if no flag gives
    them too.
    """
    for host in settings.allow_hosts:
        if host not in (flags.get("allow_hosts") or ()):
            raise UsageError(
                f"the configuration allows the host {host}. A configuration alone cannot allow a host. Repeat "
                f"it on the command line: --allow-host {host}"
            )
    for header in settings.headers:
        if header not in (flags.get("headers") or ()):
            raise UsageError(
                f"the configuration sends the header {header}. A configuration alone cannot send the value of an "
                f"environment variable. Repeat it on the command line: --header '{header}'"
            )


_HELP = """\
Measure how robust MODEL is on DATA. An example is robust if it survives every attack of the suite.

The report contains confidence intervals, and doubts: reasons why the measured robust accuracy may be too high.

\b
MODEL  a bundled model (mnist-cnn, mnist-cnn-hardened), file.py:factory (a
       function that returns the model), a .safetensors, .pt, .pt2, .onnx,
       .skops, .json or .ubj file, or a URL with --allow-host
DATA   a bundled data set (mnist-mini), a catalogue name (see holdfast data), an
       .npz, .csv or .parquet file, or a folder with one folder of images for
       each class
"""  # the escape is click's: the paragraph below it keeps its lines


@click.command(short_help="measure how robust a model is", help=_HELP)
@click.argument("model", required=False, type=completing.MODEL)
@click.argument("data", required=False, type=completing.DATA)
@click.option(
    "--run",
    "run",
    type=click.Path(),
    metavar="DIR",
    help="Folder of the run (default: holdfast-runs/<time>-assess-<digest>).",
)
@click.option(
    "--resume", is_flag=True, help="Continue the run in --run, or report it again if it is finished."
)
@click.option("--dry-run", is_flag=True, help="Print the expected cost and exit.")
@offered(*ATTACKING, FIT, *TARGET, *UNTRAINED, *SERVED, *SETTING)
@with_voice
def assess(voice: Voice, *, run: str | None, resume: bool, dry_run: bool, **flags: Any) -> int:
    """Run or resume an assessment of MODEL on DATA, or estimate its cost."""
    if resume and run is not None and flags["model"] is None and flags["config"] is None:
        _refuse_bare_resume(Path(run))
    settings = settings_from(flags, AssessSettings)
    if resume and run is None:
        raise UsageError("--resume continues a run; give its folder with --run DIR (see holdfast runs)")
    from holdfast.cli.running import assess_and_report

    return assess_and_report(settings, voice, run=run, resume=resume, dry_run=dry_run)
