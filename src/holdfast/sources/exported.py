"""Opens `.pt2` programs of `torch.export` without trusting them.

`torch.export.load` evaluates symbolic expressions of the file, resolves its operators by attribute, and falls back
to unsafe unpickling. So the archive is read once and judged first: plain tensors, operators of aten, and shape
expressions of known words. Anything else needs the user's trust.
"""

import io
import json
import re
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Batches
from holdfast.sources.archive import MAX_BYTES, check_archive
from holdfast.sources.files import megabytes, readable_file

_OPERATOR = re.compile(
    r"torch\.ops\.aten\.(?!from_file)\w+(\.\w+)?|_operator\.(getitem|add|sub|mul|floordiv|mod|neg|pow)"
)
_WORDS = frozenset(
    {
        "Symbol",
        "Integer",
        "Add",
        "Mul",
        "Mod",
        "Pow",
        "Max",
        "Min",
        "FloorDiv",
        "CleanDiv",
        "PythonMod",
        "int_oo",
    }
    | {"Eq", "Ne", "Ge", "Gt", "Le", "Lt", "And", "Or", "Not", "True", "False", "None", "and", "or", "not"}
    | {"positive", "integer", "nonnegative", "negative", "real", "finite", "L", "size"}
)
_TOKENS = re.compile(r"[A-Za-z_]\w*|\d+|[\s'\"()\[\],.=<>!+\-*/%]")
_SYMBOL = re.compile(r"[su]\d+")


@dataclass(frozen=True)
class Program:
    """An exported program as a module, with the batch size that it insists on (None: any)."""

    net: nn.Module
    batch_size: int | None


class FixedBatch(nn.Module):
    """Feeds a program that takes one batch size only: in slices, the last one filled up with its own last row."""

    def __init__(self, net: nn.Module, size: int) -> None:
        super().__init__()
        self.net = net
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of all rows, whatever their number."""
        if not len(x):
            empty: Tensor = self.net(x.new_zeros(self.size, *x.shape[1:]))[:0]
            return empty
        return Batches(self.size).through(self.net, x)


def open_program(path: Path, *, trust_code: bool) -> Program:
    """The program in a `.pt2` file; one that carries code is refused unless `trust_code`."""
    readable_file(path, "exported program")
    if path.stat().st_size > MAX_BYTES:
        raise TargetError(
            f"{str(path)!r} has {megabytes(path.stat().st_size)}; at most {megabytes(MAX_BYTES)} is read"
        )
    check_archive(path)
    content = path.read_bytes()  # read once: what is judged is what is loaded
    try:
        reasons = list(_needs_trust(content))
    except (zipfile.BadZipFile, KeyError, ValueError, RecursionError) as error:
        raise TargetError(
            f"{str(path)!r} is no program of torch.export.save, or is damaged: {error}"
        ) from error
    if reasons and not trust_code:
        raise UsageError(
            f"{str(path)!r} carries what could run as code: {'; '.join(reasons[:3])}. "
            "If you trust it, give --trust-code; otherwise use ONNX or a state dict"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(io.BytesIO(content))
            net = _plain(program.module())
    except (
        Exception
    ) as error:  # the loader raises anything, from KeyError to AssertionError, on a foreign file
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise TargetError(
            f"{str(path)!r} could not be opened by torch {torch.__version__}: {first[:200]}"
        ) from error
    shape = _input_shape(program)
    size = shape[0]
    if size is None or _takes_any_batch(net, size, shape[1:]):
        return Program(net, None)
    return Program(FixedBatch(net, size), size)


def _plain(exported: fx.GraphModule) -> fx.GraphModule:
    """The program as an ordinary module: it may be put in eval mode, and guards no size by itself.

    The one output of a classifier is returned as it is and not as an unflattened tree.
    """
    graph = fx.Graph()
    output = graph.graph_copy(exported.graph, {})
    graph.output(output[0] if isinstance(output, (tuple, list)) and len(output) == 1 else output)
    for node in graph.find_nodes(op="call_module", target="_guards_fn"):
        graph.erase_node(node)
    plain = fx.GraphModule(exported, graph, "Exported")
    plain.delete_all_unused_submodules()
    return plain.eval()


def _input_shape(program: torch.export.ExportedProgram) -> tuple[int | None, ...]:
    """Sizes of the one input; None where a size is free."""
    users = set(program.graph_signature.user_inputs)
    nodes = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in users]
    values = [node.meta["val"] for node in nodes]
    if len(values) != 1 or not isinstance(values[0], Tensor) or values[0].dim() == 0:
        raise TargetError(
            f"the exported program takes {len(values)} inputs; a classifier takes one batch of inputs"
        )
    sizes: tuple[object, ...] = tuple(
        values[0].shape
    )  # symbols where they are free, which torch does not annotate
    return tuple(size if isinstance(size, int) else None for size in sizes)


def _takes_any_batch(net: nn.Module, size: int, shape: tuple[int | None, ...]) -> bool:
    """Whether a program written for one batch size gives the same rows for others; slices cost many times as much."""
    if None in shape:
        return False
    slices = FixedBatch(net, size)
    for n in (size + 1, 2 * size + 3):
        x = torch.rand((n, *(side or 1 for side in shape)), generator=torch.Generator().manual_seed(n))
        try:
            with torch.no_grad():
                torch.testing.assert_close(net(x), slices(x), rtol=1e-4, atol=1e-5)
        except (AssertionError, RuntimeError, ValueError):
            return False
    return True


def _needs_trust(content: bytes) -> Iterator[str]:
    """Reasons why a program is more than tensors and known operators."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = {name.partition("/")[2]: name for name in archive.namelist()}
        programs = [name for name in names if re.fullmatch(r"models/[^/]+\.json", name)]
        if not programs:
            raise ValueError("it holds no models/*.json")
        for name, full_name in names.items():
            if name.startswith("data/sample_inputs/"):
                yield from _unsafe_pickle(archive.read(full_name), name)
            elif name.startswith("data/aotinductor/") or name.endswith((".so", ".pt", ".pkl")):
                yield f"the member {name}"
            elif re.fullmatch(r"data/(weights|constants)/.*config\.json", name):
                entries = json.loads(archive.read(full_name))["config"]
                yield from (
                    f"the pickled tensor {entry}" for entry, how in entries.items() if how["use_pickle"]
                )
        for name in programs:
            yield from _unsafe_graph(json.loads(archive.read(names[name])))


def _unsafe_pickle(content: bytes, name: str) -> Iterator[str]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            yield f"the compressed pickle {name}"
            return
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception:  # noqa: BLE001 - whatever it is, the loader would then fall back to unsafe unpickling
        yield f"the pickle {name}"


def _unsafe_graph(graph: Any) -> Iterator[str]:
    for key, text in _strings(graph, ""):
        if key == "target" and not _OPERATOR.fullmatch(text):
            yield f"the operator {text!r}"
        elif key in ("expr_str", "guards_code") and not _harmless(text):
            yield f"the expression {text[:60]!r}"
        elif key in ("in_spec", "out_spec") and set(re.findall(r'"type": "([^"]*)"', text)) - {
            "builtins.tuple",
            "builtins.list",
            "builtins.dict",
        }:
            yield f"the container {text[:60]!r}"


def _harmless(expression: str) -> bool:
    tokens = _TOKENS.findall(expression)
    words = [token for token in tokens if token[0].isalpha() or token[0] == "_"]
    known = all(word in _WORDS or _SYMBOL.fullmatch(word) or _quoted(word, expression) for word in words)
    return "".join(tokens) == expression and known


def _quoted(word: str, expression: str) -> bool:
    """Input names appear in guards as L['input'] only."""
    return expression.count(word) == expression.count(f"L['{word}']") and "__" not in word


def _strings(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _strings(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, key)
    elif isinstance(value, str):
        yield key, value
