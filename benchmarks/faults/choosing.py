"""Draws faults: places in functions, and the changed text of one line."""

import ast
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

KINDS = ("operator", "bound", "index", "missing call", "wrong default", "missing check")
CANDIDATES = 24
"""places of each kind; about half are executed by a test that is run"""
_COMPARISONS: Mapping[type[ast.AST], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.In: (" in ", " not in "),
    ast.Is: (" is ", " is not "),
    ast.IsNot: (" is not ", " is "),
}
_ARITHMETIC: Mapping[type[ast.AST], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
}


@dataclass(frozen=True)
class Fault:
    """A changed line of a function."""

    kind: str
    file: str
    """path from the root of the tree"""
    function: str
    """qualified name, as in `PGD.__call__`"""
    line: str
    """text of the line, without the indentation"""
    replacement: str
    occurrence: int
    """which of the equal lines of the function it is, from 0"""


@dataclass(frozen=True)
class Place:
    """A fault, and the line before which a statement can be inserted that is executed with it."""

    fault: Fault
    lineno: int


def faults(tree: Path, seed: int = 0) -> list[Place]:
    """The drawn faults of a tree, kind by kind."""
    found: dict[str, list[Place]] = {kind: [] for kind in KINDS}
    for path in sorted((tree / "src" / "holdfast").rglob("*.py")):
        for place in _of_file(path, path.relative_to(tree).as_posix()):
            found[place.fault.kind].append(place)
    drawn = []
    for kind, places in found.items():
        some = random.Random(f"{seed} {kind}").sample(places, min(CANDIDATES, len(places)))
        drawn += sorted(some, key=lambda place: (place.fault.file, place.lineno))
    return drawn


def _of_file(path: Path, name: str) -> Iterator[Place]:
    text = path.read_text()
    lines, root = text.splitlines(), ast.parse(text)
    for qualified, function in _functions(root, ()):
        body = function.body[1:] if ast.get_docstring(function) else function.body
        for kind, lineno, changed in _defaults(function, lines):
            if body:
                yield from _place(
                    name, qualified, function, lines, kind, lineno, changed, _first_line(body[0])
                )
        for statement in _statements(body):
            for kind, lineno, changed in _changes(statement, lines):
                yield from _place(
                    name, qualified, function, lines, kind, lineno, changed, _first_line(statement)
                )


def _place(
    name: str,
    qualified: str,
    function: ast.FunctionDef,
    lines: list[str],
    kind: str,
    lineno: int,
    changed: str,
    probe: int,
) -> Iterator[Place]:
    line = lines[lineno - 1].strip()
    assert function.end_lineno is not None
    equal = [n for n in range(function.lineno, function.end_lineno + 1) if lines[n - 1].strip() == line]
    if changed.strip() != line and lines[probe - 1].strip()[:5] not in ("elif ", "else:"):
        yield Place(Fault(kind, name, qualified, line, changed.strip(), equal.index(lineno)), probe)


def _functions(node: ast.AST, outer: tuple[str, ...]) -> Iterator[tuple[str, ast.FunctionDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            names = (*outer, child.name)
            yield ".".join(names), child
            yield from _functions(child, names)
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, (*outer, child.name))


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a function, without those of functions and classes inside."""
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            continue
        yield statement
        for field in ("body", "orelse", "finalbody"):
            yield from _statements(getattr(statement, field, []))
        for handler in getattr(statement, "handlers", []):
            yield from _statements(handler.body)


def _first_line(statement: ast.stmt) -> int:
    return min([statement.lineno, *(each.lineno for each in getattr(statement, "decorator_list", []))])


def _expressions(statement: ast.stmt) -> Iterator[ast.expr]:
    """Expressions of a statement, without those of the statements inside it."""
    waiting = [child for child in ast.iter_child_nodes(statement) if isinstance(child, ast.expr)]
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, (ast.Lambda, ast.JoinedStr)):
            waiting += [child for child in _children(node) if isinstance(child, ast.expr)]


def _children(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.keyword, ast.Slice, ast.comprehension)):
            yield from _children(child)
        yield child


def _changes(statement: ast.stmt, lines: list[str]) -> Iterator[tuple[str, int, str]]:
    """Kinds of faults in a statement, with the line and its changed text."""
    if (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Call)
        and statement.lineno == statement.end_lineno
    ):
        yield "missing call", statement.lineno, "pass"
    if isinstance(statement, ast.If) and isinstance(statement.body[0], ast.Raise):
        line = lines[statement.lineno - 1]
        if line.strip().startswith("if ") and line.rstrip().endswith(":"):
            yield "missing check", statement.lineno, "if False:"
    for node in _expressions(statement):
        if isinstance(node, ast.Compare):
            for (left, right), operator in zip(
                pairwise([node.left, *node.comparators]), node.ops, strict=True
            ):
                yield from _operator(left, right, operator, _COMPARISONS, lines)
        elif isinstance(node, ast.BinOp):
            yield from _operator(node.left, node.right, node.op, _ARITHMETIC, lines)
        elif isinstance(node, ast.BoolOp):
            words = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
            yield from _between(node.values[0], node.values[1], words, lines)
        elif isinstance(node, ast.Call):
            for value in [*node.args, *(keyword.value for keyword in node.keywords)]:
                yield from _number("bound", value, lines)
        elif isinstance(node, ast.Subscript):
            yield from _number("index", node.slice, lines)
            if isinstance(node.slice, ast.Slice):
                for part in (node.slice.lower, node.slice.upper):
                    yield from _number("index", part, lines)


def _operator(
    left: ast.expr,
    right: ast.expr,
    operator: ast.AST,
    table: Mapping[type[ast.AST], tuple[str, str]],
    lines: list[str],
) -> Iterator[tuple[str, int, str]]:
    if type(operator) in table:
        yield from _between(left, right, table[type(operator)], lines)


def _between(
    left: ast.expr, right: ast.expr, words: tuple[str, str], lines: list[str]
) -> Iterator[tuple[str, int, str]]:
    """The line with another operator between two expressions, if it is between them in one line."""
    if left.end_lineno != right.lineno:
        return
    raw = lines[right.lineno - 1].encode()  # columns of the syntax tree are in bytes
    start, end = left.end_col_offset or 0, right.col_offset
    gap = raw[start:end].decode()
    if gap.count(words[0]) == 1:
        changed = raw[:start].decode() + gap.replace(*words) + raw[end:].decode()
        yield "operator", right.lineno, changed


def _number(kind: str, node: ast.expr | None, lines: list[str]) -> Iterator[tuple[str, int, str]]:
    """The line with a number that is one larger."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float) and node.lineno == node.end_lineno:
        raw = lines[node.lineno - 1].encode()
        larger = node.value + 1 if isinstance(node.value, int) else node.value * 2 + 1
        changed = raw[: node.col_offset].decode() + repr(larger) + raw[node.end_col_offset :].decode()
        yield kind, node.lineno, changed


def _defaults(function: ast.FunctionDef, lines: list[str]) -> Iterator[tuple[str, int, str]]:
    arguments = function.args
    for value in [*arguments.defaults, *arguments.kw_defaults]:
        if isinstance(value, ast.Constant) and isinstance(value.value, bool):
            raw = lines[value.lineno - 1].encode()
            changed = (
                raw[: value.col_offset].decode() + str(not value.value) + raw[value.end_col_offset :].decode()
            )
            yield "wrong default", value.lineno, changed
        else:
            yield from _number("wrong default", value, lines)
