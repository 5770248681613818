"""Write the table of operations in `docs/concepts/bounds.md`: `make benchmarks-page`, or

python -m benchmarks.bounds_page

Each operation is translated in the networks of the row `certified-operations`, and the code of the methods is applied
to the result. A test fails while the page differs from the code.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.page import between
from benchmarks.record import Cells, as_table
from benchmarks.rows.certified_operations import NAMES, case
from holdfast.certifiers.boundary_geometry import WITH_SLOPES
from holdfast.certifiers.bounds import operations
from holdfast.certifiers.bounds.alpha import started
from holdfast.certifiers.bounds.crown import NO_CHOICES, from_intervals, lowest, relaxed
from holdfast.certifiers.bounds.graph import Graph, Node, Region, region_of
from holdfast.certifiers.bounds.lipschitz import gain_of
from holdfast.certifiers.bounds.operators import TRANSLATIONS
from holdfast.certifiers.bounds.tracing import Recording, recording
from holdfast.certifiers.bounds.translator import TracedValue, Translation, Translator
from holdfast.certifiers.branching import divisible
from holdfast.core.constraints import Linf
from holdfast.core.errors import UsageError
from holdfast.core.model import Bounds

PAGE = Path(__file__).resolve().parents[1] / "docs" / "concepts" / "bounds.md"
KINDS: dict[type, str] = {
    operations.ReLU: "exact kink",
    operations.Piecewise: "exact kinks",
    operations.MaxPool: "lines in all values",
    operations.Smooth: "grid and curvature",
    operations.Curved: "tangents and secants",
    operations.ExponentialSum: "sums of exponentials",
    operations.Product: "planes",
}
"""bounds of the nonlinear operations of a graph, in the order of the table"""
LIKE = {"baddbmm": "bmm", "square": "pow", "t": "transpose"}
"""operations that the networks do not apply to values that depend on the input, and others that are translated alike"""
SMALL, LARGE = 1e-3, 0.3
"""eps with which the bounds of most networks are finite, and one with which the signs of inputs of ReLUs are unknown"""


@dataclass(frozen=True)
class Treatment:
    """How an operation is bounded, for some of its arguments."""

    nonlinear: frozenset[type]
    """nonlinear operations of a graph of which it consists; none if it is linear"""
    float32: bool
    """whether its rounding error in float32 is known"""
    lipschitz: bool
    """whether a bound of its Lipschitz constant is known"""


@dataclass(frozen=True)
class Support:
    """Which operations the methods support, as the networks show."""

    treatments: dict[Treatment, set[str]] = field(default_factory=dict)
    """names of the operations with each treatment"""
    bounded: list[set[type]] = field(default_factory=lambda: [set(), set(), set()])
    """nonlinear operations in networks of which ibp, crown-ibp and crown have finite bounds"""
    optimised: set[type] = field(default_factory=set)
    """nonlinear operations whose lines or planes are optimised"""
    divided: set[type] = field(default_factory=set)
    """nonlinear operations whose inputs are divided"""

    def line(self, treatment: Treatment) -> Cells:
        """The line of the table for a treatment."""
        kinds, names = [kind for kind in KINDS if kind in treatment.nonlinear], self.treatments[treatment]
        names = names | {name for name, other in LIKE.items() if other in names}
        words = [_word(kinds, bounded) for bounded in self.bounded]
        return {
            "operations": ", ".join(f"`{name}`" for name in sorted(names)),
            "bounds": ", ".join(KINDS[kind] for kind in kinds) or "exact",
            **dict(zip(("`ibp`", "`crown-ibp`", "`crown`"), words, strict=True)),
            "`alpha-crown` optimises": _word(kinds, self.optimised) if kinds else "–",
            "`branch-and-bound` divides": _word(kinds, self.divided) if kinds else "–",
            "error in float32": "yes" if treatment.float32 else "no",
            "`lipschitz`": "yes" if treatment.lipschitz else "no",
            "`--geometry`": "yes" if all(issubclass(kind, WITH_SLOPES) for kind in kinds) else "no",
        }


def _word(kinds: list[type], supported: set[type]) -> str:
    missing = set(kinds) - supported
    return "yes" if not missing else "in part" if len(missing) < len(kinds) else "no"


def table() -> list[str]:
    """The lines of the table. Raises `LookupError` for an operation with bounds that is missing in it."""
    support = _support()
    known = set().union(*support.treatments.values(), LIKE)
    if missing := sorted({_short(name) for name in TRANSLATIONS if name.startswith("aten.")} - known):
        raise LookupError(f"no network of the row certified-operations has an operation of {missing}")
    places = list(KINDS)

    def order(treatment: Treatment) -> tuple[Any, ...]:
        kinds = sorted(places.index(kind) for kind in treatment.nonlinear)
        return len(kinds), kinds, not treatment.float32, not treatment.lipschitz

    return as_table([support.line(each) for each in sorted(support.treatments, key=order)])


def _short(name: str) -> str:
    return name.removeprefix("aten.")


def _support() -> Support:
    support = Support()
    for seed in range(len(NAMES)):
        _, model, x, _ = case(seed)
        with torch.no_grad():
            _add(support, recording(model, x), x)
    used = set().union(*support.treatments.values())
    for name, translate in TRANSLATIONS.items():  # other names of the same operations
        for names in support.treatments.values() if _short(name) not in used else ():
            if any(TRANSLATIONS[f"aten.{other}"] is translate for other in names & used):
                names.add(_short(name))
    return support


def _add(support: Support, recorded: Recording, x: Tensor) -> None:
    """Add what a network shows."""
    calls: list[tuple[str, int, int]] = []
    noted = {name: _noted(name, translate, calls) for name, translate in TRANSLATIONS.items()}
    to = Translator(recorded.module, recorded.shape, noted)
    to.graph(recorded.output)
    graph = Graph(recorded.shape, tuple(to.nodes))
    for name, start, end in calls:
        support.treatments.setdefault(_treatment(graph, to.nodes[start:end]), set()).add(_short(name))
    used = {type(graph.node(i).operation) for i in graph.nonlinear}
    rows = x.new_ones(1, 1, *graph.shape_of(graph.output))
    intervals, lines = (relaxed(graph, _region(x, SMALL), substituted=each) for each in (False, True))
    bounds = from_intervals(intervals, rows), lowest(intervals, rows), lowest(lines, rows)
    for bounded, lower in zip(support.bounded, bounds, strict=True):
        bounded |= used if bool(lower.isfinite().all()) else set()
    wide = relaxed(graph, _region(x, LARGE), substituted=False)
    choices = started(wide, graph.output, rows, NO_CHOICES, ())
    support.optimised.update(type(graph.node(i).operation) for i in (*choices.slopes, *choices.planes))
    support.divided.update(
        type(graph.node(i).operation) for users in divisible(graph).values() for i in users
    )


def _region(x: Tensor, eps: float) -> Region:
    return region_of(x, Linf(eps), Bounds())


def _noted(name: str, translate: Translation, calls: list[tuple[str, int, int]]) -> Translation:
    """A translation that notes which nodes it adds."""

    def noted(to: Translator, *args: Any, **kwargs: Any) -> TracedValue:
        start = len(to.nodes)
        value = translate(to, *args, **kwargs)
        calls.append((name, start, len(to.nodes)))
        return value

    return noted


def _treatment(graph: Graph, nodes: list[Node]) -> Treatment:
    nonlinear = (type(node.operation) for node in nodes if not isinstance(node.operation, operations.Linear))
    return Treatment(
        frozenset(nonlinear),
        all(node.has_error for node in nodes),
        all(_has_gain(graph, node) for node in nodes),
    )


def _has_gain(graph: Graph, node: Node) -> bool:
    try:
        gain_of(node, [graph.shape_of(i) for i in node.inputs])
    except UsageError:
        return False
    return True


def page(text: str) -> str:
    """The text of the page with the present table."""
    return between("operations", table(), text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE)
