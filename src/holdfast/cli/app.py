"""The entry point of the command line. It imports the module of a command when the command is run, and converts errors
to messages.
"""

import gc
import importlib
import inspect
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any, TextIO, cast

import click

from holdfast import __version__
from holdfast.cli.options import Group
from holdfast.core.errors import HoldfastError, Interrupted, UsageError
from holdfast.core.names import line
from holdfast.runs.engine.progress import Stopped, Stopper

_COMMANDS = {
    "demo": ("catalogue", "assess a bundled model on bundled images, offline, in about a minute"),
    "assess": (
        "measure",
        "measure how robust a model is: the worst case over several attacks, with confidence intervals",
        "assess mnist-cnn mnist-mini --threat linf:0.1 -n 100 -o report.html",
        'assess net.py:make data.npz --threat linf:8/255 --gate "robust_accuracy >= 0.4"',
    ),
    "certify": (
        "measure",
        "prove for each example that no allowed change is misclassified, or find one that is",
        "certify mnist-cnn-hardened mnist-mini --threat linf:0.1 -n 20",
        "certify net.py:make data.npz --threat l2:0.25 --method smoothing --sigma 0.25",
    ),
    "harden": (
        "improve",
        "train a new model that is more robust, within a time budget",
        "harden mnist-cnn mnist --threat linf:0.3 --budget 10min -o hardened/",
        "harden net.py:make images/ --recipe trades --budget 1h -o hardened/",
    ),
    "audit": (
        "audit",
        "search for backdoors and manipulated data; measure membership, privacy and generators",
        "audit backdoor model.pt data.npz --arch net.py:make --controls controls/",
        "audit poison train.npz --model net.py:make --clean trusted.npz",
        "audit membership net.py:make data.npz --train net.py:fit --references 16",
    ),
    "explain": (
        "measure",
        "explain why an input breaks a model, or where a model is fragile",
        "explain runs/a -o why.html",
        "explain mnist-cnn mnist-mini --threat linf:0.1 --index 17 -o one.html",
    ),
    "rotate": (
        "improve",
        "serve several parameter sets in turn, so that a stolen set is soon out of use",
        "rotate run mnist-cnn mnist --budget 20min --every 24h --by retraining --run pool/",
        "rotate status pool/",
    ),
    "calibrate": (
        "improve",
        "set the thresholds of a guard from benign inputs",
        "calibrate mnist-cnn mnist-mini --guard guard.yaml",
        "calibrate model.onnx benign.npz --guard guard.yaml",
    ),
    "serve": (
        "operate",
        "serve a model, or a pool of parameter sets, over HTTP",
        "serve mnist-cnn --guard guard.yaml --keys keys.json --audit audit",
        "serve rotating:pool/ --keys keys.json --workers 2",
    ),
    "monitor": (
        "operate",
        "compare a stream or the requests to a server with a reference, and raise an alarm",
        "monitor stream.npz --reference mnist-mini --model mnist-cnn",
        "monitor http://127.0.0.1:8081 --key-file op.key",
    ),
    "adapt": (
        "operate",
        "harden the model of a running server, and promote the result if it passes all gates",
        "adapt http://127.0.0.1:8081 --data mnist --threat linf:0.2 --budget 10min",
        "adapt http://127.0.0.1:8081 --key-file op.key --data mnist --trigger now --approval",
    ),
    "keys": (
        "operate",
        "create, list and revoke the API keys of a server",
        "keys add alice --expires 90d --rate 100/min",
        "keys list",
    ),
    "compare": (
        "look",
        "show what changed between two runs on the same examples",
        "compare runs/before runs/after",
        "compare runs/before runs/after -o comparison.html",
    ),
    "report": (
        "look",
        "write the reports of a finished run, or the evidence of several for a standard",
        "report runs/a",
        "report runs/a -o report.html -o junit.xml",
        "report runs/a runs/audit audit/ --annex aisvs -o annex.html",
    ),
    "verify": (
        "look",
        "check that the files of a run or a pool are complete and unchanged",
        "verify runs/a",
        "verify pool/",
    ),
    "runs": ("look", "list the runs in a folder", "runs", "runs runs/"),
    "ui": (
        "look",
        "show the runs of a folder in a browser",
        "ui runs/ --port 8090",
        "ui runs/ --export site/",
    ),
    "doctor": (
        "measure",
        "find common mistakes in a model and its data before a long run",
        "doctor mnist-cnn mnist-mini",
        "doctor net.py:make data.npz",
    ),
    "init": ("catalogue", "write a commented holdfast.yaml"),
    "validate": ("catalogue", "check a holdfast.yaml without running it"),
    "data": (
        "catalogue",
        "list, show, download, import and poison data sets",
        "data list",
        "data fetch mnist",
        "data poison mnist --attack badnets,target=1,rate=0.01 -o drill.npz",
    ),
    "models": ("catalogue", "list the bundled models and architectures"),
    "attacks": ("catalogue", "list the attacks, or show one with its settings", "attacks", "attacks pgd"),
}
"""Name of each command: its module in `holdfast.cli`, what it does in a few words, and examples for its help."""


_GROUPS = {
    "Measure": ("demo", "assess", "certify", "audit", "explain", "doctor"),
    "Improve": ("harden", "rotate", "calibrate"),
    "Operate": ("serve", "monitor", "adapt", "keys"),
    "Look": ("compare", "report", "verify", "runs", "ui", "init", "validate", "data", "models", "attacks"),
}
"""The commands in the groups in which the help lists them."""

_SPELLINGS = {
    "--eps": {"--threat": "--threat linf:{}"},
    "--epsilon": {"--threat": "--threat linf:{}"},
    "--norm": {"--threat": "--threat {}:EPS"},
    "--attack": {"--suite": "--suite {}"},
    "--attacks": {"--suite": "--suite {}"},
    "--steps": {"--suite": "--set attacks=[{{use: PGD, steps: {}}}]"},
    "--gates": {"--gate": "--gate {}"},
    "--time": {"--budget": "--budget {}", "--time-budget": "--time-budget {}"},
    "--epochs": {"--recipe": "--set recipe.training.epochs={}"},
}
"""Options of other programs. Each has, for an option of a command here, the option and value of the same meaning."""

_EXAMPLES = "Examples:"
INTERNAL = 5
"""Exit code of an internal error of Holdfast."""
_IMPORTED = 250_000
"""Number of new objects before the first garbage collection; the imports of a run create about 300,000 that stay."""


class _Verbs(Group):
    """A group that has the names and one-line descriptions of all commands, and imports a command only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            from holdfast.core.names import did_you_mean

            raise UsageError(f"there is no command {cmd_name!r}{did_you_mean(cmd_name, _COMMANDS)}")
        module = importlib.import_module(f"holdfast.cli.{_COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name)
        examples = "".join(f"\n  holdfast {example}" for example in _COMMANDS[cmd_name][2:])
        if examples and _EXAMPLES not in (command.help or ""):
            command.help = f"\b\n{_EXAMPLES}{examples}\n\n{inspect.cleandoc(command.help or '')}"
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, names in _GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(name, _COMMANDS[name][1]) for name in names])


@click.group(
    cls=_Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 all gates passed or none was given, 1 a gate failed, a monitor raised an alarm or adapt "
    "promoted no model, 2 wrong usage, 3 a model, data set or disk cannot be used, 4 a gate is unclear, 5 internal "
    "error, 130 or 143 interrupted (continue with --resume).",
)
@click.version_option(__version__, prog_name="holdfast", message="%(prog)s %(version)s")
def verbs() -> None:
    """Assess, certify, harden, audit and rotate machine-learning models against attacks."""


def main(args: Sequence[str] | None = None, program: click.Group = verbs, name: str = "holdfast") -> None:
    """Run the command line `args`, by default that of the process, and end the process with the exit code of the
    command. `name` is the name of the program.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    # read by the import of torch: threads that spin while they wait make a run five times slower if a core is busy
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _collect_after_imports()
    signal.signal(signal.SIGTERM, Stopper())
    _outlive_readers()
    try:
        code = run(arguments, program, name)
    except KeyboardInterrupt as stopped:  # between the end of the command and this line
        code = _stopped(stopped, arguments)
    for number in (
        signal.SIGTERM,
        signal.SIGINT,
    ):  # all output is complete: a signal would only change the exit code
        signal.signal(number, signal.SIG_IGN)
    gc.freeze()  # the process ends half a second earlier if it does not search the objects of torch for cycles
    sys.exit(code)


def _collect_after_imports() -> None:
    """Delay garbage collection until most modules are imported, and exclude their objects from it. Their repeated
    traversal takes a third of a second of CPU time.
    """
    usual = gc.get_threshold()

    def begin(phase: str, info: object) -> None:
        gc.callbacks.remove(begin)
        gc.freeze()
        gc.set_threshold(*usual)

    gc.callbacks.append(begin)
    gc.set_threshold(_IMPORTED, *usual[1:])


def run(arguments: Sequence[str], program: click.Group = verbs, name: str = "holdfast") -> int:
    """Run a command line of a program and return its exit code.

    An error is written to stderr as one message, after a traceback if `arguments` contains --debug.
    """
    debug = "--debug" in arguments
    try:
        code = program.main(args=list(arguments), prog_name=name, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        return _report(_message_of(error, arguments), 2, debug=debug)
    except (KeyboardInterrupt, click.Abort) as stopped:
        return _stopped(stopped, arguments)
    except Interrupted as error:
        return _report(error.on_command_line(), 128 + error.signal_number, debug=debug)
    except HoldfastError as error:
        return _report(error.on_command_line(), error.exit_code, debug=debug, code_lines=error.code)
    except OSError as error:
        where = "the output" if error.filename is None else repr(str(error.filename))
        message = f"{where} cannot be used: {error.strerror or error}; free some space, or give another path"
        return _report(message, 3, debug=debug)
    except Exception as error:  # noqa: BLE001 (the one place where nothing may escape)
        hint = "" if debug else "; run it again with --debug for the traceback, and please report it"
        return _report(f"internal error: {type(error).__name__}: {error}{hint}", INTERNAL, debug=debug)


def _stopped(error: BaseException, arguments: Sequence[str]) -> int:
    """Report a signal that arrived outside of a run, and return the exit code.

    `error` may be an `Abort` to which click converted the exception of the signal.
    """
    cause = error.__cause__ if isinstance(error, click.Abort) else error
    number = signal.Signals(cause.number if isinstance(cause, Stopped) else signal.SIGINT)
    return _report(
        f"stopped by {number.name}; {_again(arguments)}", 128 + number, debug="--debug" in arguments
    )


def _again(arguments: Sequence[str]) -> str:
    """Return advice on how to continue a command that was stopped. `assess`, `certify` and `harden` store their run."""
    if arguments[:1] not in (["assess"], ["certify"], ["harden"]):
        return "start it again"
    stored = "the finished part of a run is stored (see holdfast runs)"
    if not any(word == "--run" or word.startswith("--run=") for word in arguments):
        return f"{stored}; start again, or add --run DIR --resume"
    return f"{stored}; repeat the command{'' if '--resume' in arguments else ' with --resume'}"


def _message_of(error: click.ClickException, arguments: Sequence[str]) -> str:
    """Return the message of an error of click, with the command that shows the help."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    where = f"; see {context.command_path} --help" if context is not None else ""
    text = _other_spelling(error, arguments) or _verbs_with(error) or _second_bound(error, arguments)
    return (text or error.format_message().rstrip(".")) + where


def _other_spelling(error: click.ClickException, arguments: Sequence[str]) -> str:
    """Return the message about an option that other programs have, with its spelling here; else an empty string."""
    if not isinstance(error, click.NoSuchOption) or error.ctx is None:
        return ""
    known = {name for parameter in error.ctx.command.params for name in parameter.opts}
    spellings = _SPELLINGS.get(error.option_name, {})
    spelling = next((form for option, form in spellings.items() if option in known), None)
    if spelling is None:
        return ""
    option, _, form = spelling.partition(" ")
    words = [part for word in arguments for part in word.split("=", 1 if word.startswith("--") else 0)]
    following = words[words.index(error.option_name) + 1 :]
    value = following[0] if following and not following[0].startswith("-") else "VALUE"
    return f"no such option {error.option_name!r}; give {shlex.join((option, form.format(value)))}"


def _verbs_with(error: click.ClickException) -> str:
    """Return the message about an option that only other verbs have, with their names; else an empty string."""
    if not isinstance(error, click.NoSuchOption):
        return ""
    from holdfast.cli.setting_options import flag_names
    from holdfast.verbs.checked_settings import VERBS

    name = error.option_name
    names = {name, f"--{name.removeprefix('--no-')}"}
    verbs = [verb for verb, kind in VERBS.items() if names & set(flag_names(kind).values())]
    commands = [verb.replace("audit-", "audit ") for verb in verbs]
    return f"no such option {name!r}; it is an option of {', '.join(commands)}" if verbs else ""


def _second_bound(error: click.ClickException, arguments: Sequence[str]) -> str:
    """Return the message about the two numbers of `--bounds` that are separated by a space; else an empty string."""
    if not isinstance(error, click.UsageError) or "--bounds" not in arguments:
        return ""
    low, high = (*arguments[arguments.index("--bounds") + 1 :], "", "")[:2]
    if not (_is_number(low) and _is_number(high)):
        return ""
    return f"bounds is {low}, and {high} is another argument; give --bounds {low},{high}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _report(message: str, code: int, *, debug: bool, code_lines: Sequence[str] = ()) -> int:
    """Write an error message to stderr, after the traceback if `debug` is True, and return `code`. The lines of Python
    `code_lines` follow the message.
    """
    if debug:
        traceback.print_exc()
    # the text may be from servers and files; only an internal error of a worker has several lines, its traceback
    lines = message.splitlines() if code == INTERNAL else [message]
    click.echo("\n    ".join(("holdfast: " + "\n".join(map(line, lines)), *map(line, code_lines))), err=True)
    return code


class _LastingStream:
    """A wrapper of an output stream that discards what is written after the reader of its pipe has closed it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write `text` to standard output and return its length. The text is discarded if the pipe is closed."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._let_go()
            return len(text)

    def flush(self) -> None:
        """Flush standard output. Buffered text is discarded if the pipe is closed."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._let_go()
            self._stream.flush()  # discards the rest now instead of at the end of Python

    def _let_go(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)


def _outlive_readers() -> None:
    """Replace stdout and stderr by wrappers, so that this process continues when the reader of its output has ended."""
    if sys.stdout is not None:  # there is none if it was closed before the start
        sys.stdout = cast(TextIO, _LastingStream(sys.stdout))
    if sys.stderr is not None:
        sys.stderr = cast(TextIO, _LastingStream(sys.stderr))
