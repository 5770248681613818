"""The commands that measure: `holdfast assess`, `certify`, `explain` and `doctor`; and what the other commands that
open a model share with them.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from holdfast.cli.early import (
    refuse_foreign_server,
    refuse_missing_file,
    refuse_reports,
    refuse_server_to_certify,
    refuse_server_to_train,
    refuse_swapped,
    refuse_unknown_data,
    refuse_unknown_model,
)
from holdfast.cli.options import Command, GroupedOption, Voice, offered, with_voice
from holdfast.cli.setting_options import (
    MODEL_AND_DATA,
    SETTING,
    flag_names,
    is_mapping,
    options_of,
    refuse_resume_without_run,
    run_options,
)
from holdfast.core.catalogue import MASKING, PATCH_MASKS, SMOOTHING
from holdfast.core.errors import TRUST_CODE, Remedy, UsageError
from holdfast.core.names import line
from holdfast.runs.store.files import refuse_no_run
from holdfast.settings.groups import InferenceSource, Members
from holdfast.settings.values import SurrogateSettings
from holdfast.threats.domains import CONTROL
from holdfast.verbs.checked_settings import group_of
from holdfast.verbs.configuration import S, read_settings
from holdfast.verbs.placement import Placement
from holdfast.verbs.settings import Adapt, Assess, AuditVerb, Certify, Doctor, Explain, Harden, Opening, Serve

_CONFIG = "holdfast.yaml"
"""Default name of the file that `holdfast init` writes."""

V = TypeVar("V", bound=Opening)


def settings_from(flags: dict[str, Any], kind: type[V]) -> V:
    """Return the validated settings of a command that opens a model, from its flags, `--set` and the configuration
    file.

    A file that does not exist is reported before an argument that is missing.
    """
    from holdfast.settings.grammar import parse_surrogate

    addresses: list[str | None] = [flags.get(key) for key in ("model", "data", "config", "baseline")]
    for key, (role, _) in _OTHER_MODELS.items():
        addresses += [str(parse_surrogate(other, role)["model"]) for other in flags.get(key, ())]
    refuse_swapped(flags.get("model"), flags.get("data"))
    for address in (*addresses, *flags.get("across", ())):
        refuse_missing_file(address)
    config = flags.get("config")
    settings: V = settings_of_flags(flags, cast(Any, kind))
    refuse_code_of_config(settings, flags)
    if config:
        refuse_hosts_of_config(group_of(settings, InferenceSource), flags)
        if isinstance(settings, Harden):
            refuse_logs_of_config(settings, flags)
    _refuse_targets(settings, config)
    if isinstance(settings, Placement):
        settings.refuse_unusable_cluster()
    if isinstance(settings, Assess | Certify):
        refuse_reports(settings.output)
    if isinstance(settings, Harden):
        refuse_reports(_report_files(settings.output))
    return settings


def settings_of_flags(flags: dict[str, Any], kind: type[S]) -> S:
    """Return the validated settings of any command from its flags, `--set` and the configuration file."""
    from holdfast.settings.grammar import parse_pairs

    names = flag_names(kind)
    content: dict[str, Any] = {}
    for key, value in flags.items():
        if key in ("config", "sets"):
            continue
        if isinstance(value, tuple):
            pairs = key in names and is_mapping(kind.model_fields[key])
            value = (parse_pairs(value, names[key]) if pairs else list(value)) or None
        content[key] = value
    config = flags.get("config")
    path, sets = Path(config) if config else None, flags.get("sets", ())
    return read_settings(path, content, sets, flags=names, kind=kind)


def _report_files(outputs: Iterable[str]) -> list[str]:
    """Return those `outputs` of `harden` that are report files, without the folders for the new model."""
    from holdfast.settings.grammar import is_folder

    files = [output for output in outputs if not is_folder(output)]
    for output in files:
        if output != "-" and not Path(output).suffix:
            raise UsageError(
                f"-o {output} has no suffix; write -o {output}/ for a folder with the new model, or "
                f"-o {output}.html for a report"
            )
    return files


_OTHER_MODELS = {"surrogates": ("surrogate", "--surrogate"), "members": ("member", "--member")}
"""The role and the option of each setting that lists further models."""


def _others(settings: Opening | Serve, key: str) -> list[SurrogateSettings]:
    """Return the models in a setting of `_OTHER_MODELS`; none for a command without it."""
    if key == "members":
        return group_of(settings, Members).members
    return settings.surrogates if isinstance(settings, Assess | Harden) else []


def _refuse_targets(settings: Opening, config: str | None) -> None:
    command = click.get_current_context().command_path
    example = f"{command} {settings.example if isinstance(settings, AuditVerb) else 'mnist-cnn mnist-mini'}"
    if config is None and Path(_CONFIG).is_file():
        example = f"{command} -c {_CONFIG} (a file in this folder)"
    model, data = settings.model, settings.data
    needs_data = settings.needs_data if isinstance(settings, AuditVerb) else True
    for name, address, meaning, needed in (
        ("MODEL", model, "what is to be assessed", True),
        ("DATA", data, "examples to assess it on", needs_data),
    ):
        if address is None and needed:
            raise UsageError(f"{name} is missing ({meaning}); try {example}")
    others = [other.model for key in _OTHER_MODELS for other in _others(settings, key)]
    generators = isinstance(settings, Harden) or (isinstance(settings, AuditVerb) and settings.of_generators)
    for address in (str(model), *others):
        refuse_unknown_model(address, generators=generators)
    if isinstance(settings, Harden | AuditVerb) and not isinstance(settings, InferenceSource):
        refuse_server_to_train(str(model))
    if isinstance(settings, Certify) and settings.chosen_method not in (SMOOTHING, MASKING, PATCH_MASKS):
        refuse_server_to_certify(str(model), settings.threat)
    refuse_foreign_server(str(model), group_of(settings, InferenceSource).allow_hosts)
    across = settings.across if isinstance(settings, Assess) else ()
    if not of_policies(settings):  # whose environment has the place of data
        for address in (*(() if data is None else (str(data),)), *across):
            refuse_unknown_data(address)
    if isinstance(settings, Assess | Certify | Harden) and settings.baseline is not None:
        refuse_no_run(Path(settings.baseline))


def of_policies(settings: Opening) -> bool:
    """Return whether the model is a policy, by the threat."""
    return isinstance(settings, Assess | Certify | Harden) and settings.threat.change.domain is CONTROL


def _refuse_bare_resume(run: Path) -> None:
    """Raise `UsageError` with the command of a run, because `--resume` was given without MODEL."""
    from holdfast.runs.documents.stored_runs import command_to_resume
    from holdfast.runs.engine.identity import way_out

    command = command_to_resume(run)
    if command:
        raise UsageError(
            "MODEL is missing; give the command of the run, with your values for words in capital letters and the "
            f"options that the run does not state; {way_out(command, run)}"
        )


def refuse_code_of_config(settings: Opening | Serve, flags: dict[str, Any]) -> None:
    """Raise `UsageError` if a configuration file names code that the command line does not name."""
    if not flags.get("config") or settings.trust_code:
        return
    of_audits = ("train", "features") if isinstance(settings, AuditVerb) else ()
    for name in ("model", "arch", *of_audits):
        value = getattr(settings, name, None)
        # a file may come from elsewhere; an address that the user typed is consent to run its code
        if value and ".py:" in value and flags.get(name) != value:
            raise UsageError(
                f"the configuration refers to code ({name}: {value}). Code from a configuration is not run. "
                "Repeat the address on the command line",
                TRUST_CODE,
            )
    for key, (_, option) in _OTHER_MODELS.items():
        listed = [] if flags.get(key) else _others(settings, key)
        for place, other in enumerate(listed):
            for value in (other.model, other.arch):
                if value and ".py:" in value:
                    raise UsageError(
                        f"the configuration refers to code ({key}.{place}: {value}). Code from a configuration "
                        "is not run. Repeat the address on the command line",
                        Remedy(key, tuple(map(_spelled, listed)), option, repeated=True),
                        TRUST_CODE,
                    )
    if isinstance(settings, Harden):
        refuse_functions_of_config(settings, flags.get("sets", ()))


def refuse_functions_of_config(settings: Harden | Adapt, sets: Iterable[str]) -> None:
    """Raise `UsageError` for the address of a function in the recipe, such as an optimiser, that no `--set` names."""
    from holdfast.settings.grammar import parse_pairs
    from holdfast.settings.texts import parse_yaml

    typed = {
        address
        for key, text in parse_pairs(sets, "--set").items()
        for _, address in _code_in(parse_yaml(text, f"--set {key}"), key)
    }
    for path, address in _code_in(settings.recipe, "recipe"):
        if address not in typed:
            raise UsageError(
                f"the configuration refers to code ({path}: {address}). Code from a configuration is not run. Repeat "
                "the address on the command line",
                Remedy(path, address),
                TRUST_CODE,
            )


def _code_in(value: object, path: str) -> Iterator[tuple[str, str]]:
    """Yield the dotted path and the text of each address of code in nested settings."""
    if isinstance(value, str) and ".py:" in value:
        yield path, value
    elif isinstance(value, Mapping):
        for key, part_of_value in value.items():
            yield from _code_in(part_of_value, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for place, part_of_value in enumerate(value):
            yield from _code_in(part_of_value, f"{path}.{place}")


def _spelled(surrogate: SurrogateSettings) -> str:
    """Return a surrogate or a member in the syntax of its option, with all its settings.

    The error message needs all settings, because the option replaces the whole list in the file.
    """
    settings = surrogate.model_dump(exclude={"model", "model_args"}, exclude_none=True)
    numbers = {key: ",".join(map(str, v)) for key, v in settings.items() if isinstance(v, tuple)}
    parts = {**settings, **numbers, **surrogate.model_args}
    return ",".join((surrogate.model, *(f"{key}={value}" for key, value in parts.items())))


def refuse_hosts_of_config(inference: InferenceSource, flags: dict[str, Any]) -> None:
    """Raise `UsageError` for a host or header in the configuration that is not also given as a flag.

    A configuration may come from an untrusted source, so it alone cannot allow hosts or send environment variables.
    """
    for host in inference.allow_hosts:
        if host not in (flags.get("allow_hosts") or ()):
            raise UsageError(
                f"the configuration allows the host {host}. A configuration alone cannot allow a host. Repeat "
                "it on the command line",
                Remedy("allow_hosts", (host,), "--allow-host", repeated=True),
            )
    for header in inference.headers:
        if header not in (flags.get("headers") or ()):
            raise UsageError(
                f"the configuration sends the header {header}. A configuration alone cannot send the value of an "
                "environment variable. Repeat it on the command line",
                Remedy("headers", (header,), "--header", repeated=True),
            )


def refuse_logs_of_config(settings: Harden | Adapt, flags: dict[str, Any]) -> None:
    """Raise `UsageError` for a log in the configuration that is sent over the network, if it is not also given on the
    command line.
    """
    from holdfast.settings.grammar import is_remote_log, parse_pairs

    if flags.get("log") or "log" in parse_pairs(flags.get("sets", ()), "--set"):
        return
    for target in settings.log:
        if is_remote_log(target):
            raise UsageError(
                f"the configuration logs to {target}. A configuration alone cannot allow network access. Repeat it on "
                "the command line",
                Remedy("log", tuple(settings.log), repeated=True),
            )


_ASSESS_HELP = """\
Measure how robust MODEL is on DATA. An example is robust if it survives every attack of the suite.

The report contains confidence intervals, and doubts: reasons why the measured robust accuracy may be too high.

\b
MODEL  a bundled model (mnist-cnn, mnist-cnn-hardened), file.py:factory (a
       function that returns the model), a .safetensors, .pt, .pt2, .onnx,
       .skops, .json, .ubj or .txt file, a folder of harden or transformers, or a URL with
       --allow-host
DATA   a bundled data set (mnist-mini), a catalogue name (see holdfast data), an
       .npz, .csv or .parquet file, or a folder with one folder of images for
       each class

For a policy, MODEL is file.py:make, an .onnx file, an archive of stable-baselines3 or a folder of harden, DATA an
environment (cartpole, lqr, an id of gymnasium, or file.py:make), and T is observations:linf:EPS, actions:linf:EPS or
parameters:mass=SHARE. Other options than --gate, -n, --seed, --arch, --model-args, --trust-code, --run, --resume and -o
are then refused.
"""  # the escape is click's: the paragraph below it keeps its lines


@click.command(cls=Command, short_help="measure how robust a model is", help=_ASSESS_HELP)
@offered(*MODEL_AND_DATA, *run_options("assess"))
@click.option(
    "--dry-run", cls=GroupedOption, common=True, is_flag=True, help="Print the expected cost and exit."
)
@offered(*options_of(Assess), *SETTING)
@with_voice
def assess(voice: Voice, *, run: str | None, resume: bool, dry_run: bool, **flags: Any) -> int:
    """Run or resume an assessment of MODEL on DATA, or estimate its cost."""
    if resume and run is not None and flags["model"] is None and flags["config"] is None:
        _refuse_bare_resume(Path(run))
    settings = settings_from(flags, Assess)
    refuse_resume_without_run(resume=resume, run=run)
    from holdfast.cli.running import finished_run, tell, tell_audit

    if dry_run:
        estimate = settings.estimate()
        click.echo(estimate)
        for note in estimate.notes:
            voice.say(note)
        return 0
    with finished_run(settings, voice, run=run, resume=resume) as (result, folder):
        if of_policies(settings):
            tell_audit(result, settings.output, voice, folder)
        else:
            tell(result, settings.output, voice, folder=folder)
    return int(result.exit_code)


_CERTIFY_HELP = """\
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

For a policy, MODEL is a network as in holdfast assess, DATA an environment, and T is observations:linf:EPS. The visited
states whose action cannot change are then certified.
"""  # the escape is click's: the paragraph below it keeps its lines


@click.command(cls=Command, short_help="prove how robust a model is", help=_CERTIFY_HELP)
@offered(*MODEL_AND_DATA, *run_options("certify"))
@offered(*options_of(Certify), *SETTING)
@with_voice
def certify(voice: Voice, *, run: str | None, resume: bool, **flags: Any) -> int:
    """Run or resume a certification of MODEL on DATA."""
    settings = settings_from(flags, Certify)
    refuse_resume_without_run(resume=resume, run=run)
    from holdfast.cli.running import finished_run, tell, tell_audit

    with finished_run(settings, voice, run=run, resume=resume) as (result, folder):
        if of_policies(settings):
            tell_audit(result, settings.output, voice, folder)
        else:
            tell(result, settings.output, voice, folder=folder)
    return int(result.exit_code)


_RUN = "run.json"

_EXPLAIN_HELP = """\
Explain where MODEL is fragile on DATA, or with --index why the prediction for one example changes. MODEL may be the
folder of a finished run, whose model and data are opened by their addresses; give MODEL and DATA and --from-run if
opening the model executes code.

Adversarial inputs are computed again unless the run has stored them (--save-adversarial). A model that has changed
since the run is refused.
"""


@click.command(cls=Command, short_help="explain why an input breaks a model", help=_EXPLAIN_HELP)
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


_COLOURS = {"problem": "red", "warning": "yellow", "note": "cyan", "good": "green"}


@click.command(cls=Command, short_help="find common mistakes before a long run")
@offered(*MODEL_AND_DATA, *options_of(Doctor), *SETTING)
@with_voice
def doctor(voice: Voice, **flags: Any) -> int:
    """Find common mistakes in MODEL and DATA: scale, normalisation, layout, labels, outputs, randomness, gradients.

    Exit code 0 if no problem is found, 3 if one is found.
    """
    settings = settings_from(flags, Doctor)
    from rich.text import Text

    findings = settings.run()
    console = voice.console()
    for finding in findings:
        if finding.level == "good" and voice.quiet:
            continue
        heading = f"{finding.sign} {finding.check:<14}", _COLOURS[finding.level]
        console.print(Text.assemble(heading, line(finding.message)))
        if way_out := finding.on_command_line():
            console.print(Text.assemble(" " * 16, ("-> ", "bold"), line(way_out)))
    problems = sum(finding.level == "problem" for finding in findings)
    warnings = sum(finding.level == "warning" for finding in findings)
    found = f"{problems or 'no'} problem{'' if problems <= 1 else 's'} found"
    voice.say(found + (f", {warnings} warning{'' if warnings == 1 else 's'}" if warnings else ""))
    return 3 if problems else 0
