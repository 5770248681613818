"""The program `holdfast-vnn`, with the command line that the VNN-LIB standard 2.0 defines for solvers."""

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from holdfast import __version__
from holdfast.cli.app import main as run_program
from holdfast.cli.options import Group
from holdfast.core.errors import FreeSizes, Placeholder, Remedy, TargetError, UsageError
from holdfast.core.names import suggestion

if TYPE_CHECKING:
    from torch import Tensor

    from holdfast.certifiers.vnnlib.deciding import Witness
    from holdfast.certifiers.vnnlib.query import Query, Variable
    from holdfast.io.onnx.opening import OnnxNetwork

_NAME = "holdfast-vnn"
_STARTED = 0.35
"""seconds of the time limit that are kept for the start of the program and for its end"""
_LONGEST = 10_000_000.0
"""largest time limit in seconds"""


def _capabilities() -> dict[str, Callable[[], tuple[str, ...]]]:
    return {
        "onnx-opset-versions": lambda: ("7", "23"),
        "onnx-element-types": _element_types,
        "onnx-operators": _operators,
        "vnnlib-versions": lambda: ("1.0", "2.0"),
        "hidden-node-theories": lambda: ("NH",),
        "multiple-input-output-theories": lambda: ("SIO",),
        "multiple-network-theories": lambda: ("SNET", "MENET", "MINET", "MNET"),
        "multiple-node-comparison-theories": lambda: ("SNC", "MNC"),
        "arithmetic-complexity-theories": lambda: ("BND", "COUT", "LIN"),
        "optimised-disjunctive-reasoning": lambda: ("false",),
        "serialise-assignments": lambda: ("true",),
    }


def _element_types() -> tuple[str, ...]:
    from holdfast.certifiers.vnnlib.deciding import ELEMENT_TYPES

    return tuple(ELEMENT_TYPES)


def _operators() -> tuple[str, ...]:
    from holdfast.io.onnx.opening import OPERATORS

    return tuple(sorted(OPERATORS))


def _name_printed(ctx: click.Context, _: click.Parameter, given: object) -> None:
    if given and not ctx.resilient_parsing:
        click.echo("Holdfast")
        ctx.exit()


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 a verdict was printed, 2 wrong usage, 3 a query or a network cannot be used, 5 internal "
    "error.",
)
@click.option(
    "--name",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_name_printed,
    help="print the name of the solver",
)
@click.version_option(__version__, message="%(version)s")
def vnn() -> None:
    """Decide queries of VNN-LIB about neural networks."""


@vnn.command(short_help="decide a query")
@click.argument("query", type=click.Path(path_type=Path))
@click.option(
    "--network", "networks", multiple=True, metavar="NAME=FILE", help="ONNX file of a declared network"
)
@click.option(
    "--timeout", metavar="SECONDS", help="limit of the wall-clock time of the whole call  [default: none]"
)
@click.option(
    "--serialise-assignments",
    "folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="write the assignment to files NAME.pb in this folder instead of printing it",
)
@click.option("--debug", is_flag=True, help="show the traceback of an error")
def verify(
    query: Path,
    networks: tuple[str, ...],
    timeout: str | None,
    folder: Path | None,
    debug: bool,  # noqa: FBT001 (an option)
) -> int:
    """Decide whether inputs exist that satisfy the QUERY, a file of VNN-LIB 1.0 or 2 (.vnnlib or .vnnlib.gz).

    The first line of the output is sat, unsat, unknown or timed-out. After sat, the assignment follows.
    """
    started = time.perf_counter()
    limit = _seconds(timeout)
    files = _files(networks)
    for path in (query, *files.values()):
        if not path.exists():
            raise TargetError(f"the file {str(path)!r} does not exist; check the path")
    said = _Said()
    deadline = float("inf")
    if limit is not None:
        deadline = started + max(limit - _STARTED, 0.5 * limit)
        _watch(said, deadline)
    text, witness_files = _answer(query, files, deadline, folder)
    if said.claim():
        for path, content in witness_files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        click.echo(text)
    return 0


@vnn.command(context_settings={"ignore_unknown_options": True}, short_help="print a capability")
@click.argument("capability")
def supports(capability: str) -> int:
    """Print what this solver supports for a CAPABILITY of the standard, such as --onnx-operators."""
    known = _capabilities()
    name = capability.removeprefix("--")
    if name not in known:
        raise UsageError(
            f"there is no capability {capability!r}{'; ' * bool(suggestion(name, known))}{suggestion(name, known)}; "
            f"expected one of {', '.join(known)}"
        )
    click.echo("\n".join(known[name]()))
    return 0


class _Said:
    """Whether the verdict was printed, so that it is printed once: by the command or by the watch."""

    def __init__(self) -> None:
        self._lock, self._done = threading.Lock(), False

    def claim(self) -> bool:
        """Return True for the first call only."""
        with self._lock:
            first, self._done = not self._done, True
            return first


def _watch(said: _Said, deadline: float) -> None:
    """Start a thread that prints `timed-out` and ends the process if there is no verdict soon after the deadline.

    The search looks at the time itself, but one operation of a large network may take longer.
    """

    def wait() -> None:
        time.sleep(max(0.0, deadline + 0.15 - time.perf_counter()))
        if said.claim():
            sys.stdout.write("timed-out\n")
            sys.stdout.flush()
            os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = float("nan")
    if not 0 < seconds <= _LONGEST:
        raise UsageError(f"--timeout is {text}; a number of seconds larger than 0 was expected, such as 60")
    return seconds


def _files(networks: tuple[str, ...]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for given in networks:
        name, sign, file = given.partition("=")
        if not sign or not file or not name:
            raise UsageError(f"--network is {given!r}; NAME=FILE was expected, such as net=model.onnx")
        if name in files:
            raise UsageError(f"--network is given twice for {name!r}; keep one")
        files[name] = Path(file)
    if not files:
        raise UsageError(
            "no network is given",
            Remedy("network", Placeholder("NAME=FILE"), reason="for each network of the query"),
        )
    return files


def _answer(
    path: Path, files: dict[str, Path], deadline: float, folder: Path | None
) -> tuple[str, dict[Path, bytes]]:
    """The text of the verdict, and the content of the files of an assignment that is not printed."""
    from holdfast.certifiers.vnnlib.reading import read_query

    query = read_query(path)
    names = _needed(query, files)

    from holdfast.certifiers.vnnlib.deciding import decide
    from holdfast.io.onnx.opening import open_network

    try:
        networks = {name: open_network(files[given]) for name, given in names.items()}
        verdict = decide(query, networks, deadline=deadline)
    except FreeSizes as error:
        raise TargetError(f"{error.message}; export the network for inputs of one size") from error
    except UsageError as error:  # the options are right
        raise TargetError(error.message, *error.remedies) from error
    if verdict.witness is None:
        return verdict.answer, {}
    if folder is not None:
        return "sat", _serialised(query, networks, verdict.witness, folder)
    return "\n".join(("sat", *_printed(query, verdict.witness))), {}


def _needed(query: "Query", files: dict[str, Path]) -> dict[str, str]:
    """The names of the declared networks that have a file, and the names for which the files are given."""
    declared = [network.name for network in query.networks if not network.equal_to]
    if query.version == "1.0" and len(files) == 1:
        return {"": next(iter(files))}
    missing, unknown = [n for n in declared if n not in files], [n for n in files if n not in declared]
    if missing:
        raise UsageError(
            f"no file is given for the network{'s' * (len(missing) > 1)} {', '.join(missing) or 'of the query'}",
            Remedy("network", Placeholder(f"{missing[0] or 'net'}=FILE")),
        )
    if unknown:
        known = ", ".join(filter(None, declared)) or "one network"
        raise UsageError(
            f"--network names {', '.join(unknown)}, but the query declares {known}; leave it out"
        )
    return {name: name for name in declared}


def _printed(query: "Query", witness: "Witness") -> list[str]:
    if query.version == "1.0":
        pairs = [f"(X_{i} {value!r})" for i, value in enumerate(witness.inputs.tolist())]
        pairs += [f"(Y_{i} {value!r})" for i, value in enumerate(witness.outputs.tolist())]
        return [f"({pairs[0]}", *(f" {pair}" for pair in pairs[1:-1]), f" {pairs[-1]})"]
    lines = []
    for variable, values in _assigned(query, witness):
        lines.append(f"{variable.name} {variable.element_type} [{','.join(map(str, variable.shape))}]")
        lines += [repr(value) for value in values.tolist()]
    return lines


def _assigned(query: "Query", witness: "Witness") -> "list[tuple[Variable, Tensor]]":
    assigned: list[tuple[Variable, Tensor]] = []
    x = y = 0
    for network in query.networks:
        assigned.append((network.input, witness.inputs[x : x + network.input.size]))
        assigned.append((network.output, witness.outputs[y : y + network.output.size]))
        x, y = x + network.input.size, y + network.output.size
    return assigned


def _serialised(
    query: "Query", networks: "dict[str, OnnxNetwork]", witness: "Witness", folder: Path
) -> dict[Path, bytes]:
    from onnx import numpy_helper

    contents = {}
    for declared, (variable, values) in zip(
        (network for network in query.networks for _ in range(2)), _assigned(query, witness), strict=True
    ):
        dtype = networks[declared.equal_to or declared.name].dtype
        array = values.numpy().reshape(variable.shape).astype(dtype)
        contents[folder / f"{variable.name}.pb"] = numpy_helper.from_array(
            array, variable.name
        ).SerializeToString()
    return contents


def main() -> None:
    """Run the command line of the process, and end the process with the exit code."""
    run_program(program=vnn, name=_NAME)
