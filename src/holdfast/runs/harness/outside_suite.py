"""Adversarial examples that were found outside the suite, for example by probes. Those inside the threat model count in
the verdict.

Columns that begin with `suite_` contain the results of the suite alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from holdfast.core.evidence import Columns
from holdfast.core.lookup import Lookup
from holdfast.doubts.protocol import AGAIN, probe_title
from holdfast.runs.harness.stage import Outline
from holdfast.runs.harness.verdict import DISTANCES, unattacked

FOUND = "found"
"""Name of the stage with the adversarial examples of the probes.

Its columns are those of an attack, with one row for each example and probe.
"""
PROBE = "probe"
"""Name of the column with the index of the probe that found the adversarial example."""


@dataclass(frozen=True)
class Pass:
    """The adversarial examples of one attack or probe outside the suite, as the columns of an attack on
    all examples.
    """

    stage: str
    """name of the pass in tables, such as `curve-1-fmn` or `probe-noise`"""
    name: str
    """name of the pass in sentences"""
    columns: Columns
    tried: int
    """number of examples that the pass was run on"""
    settings: Mapping[str, Any]
    """settings of the attack of the pass, as in `PassRecord`"""


Probes = Sequence[tuple[str, int]]
"""Names of the probes whose adversarial examples count, each with the number of examples that it was run on.

They are in the order of their indices in the column `PROBE` of the stage `FOUND`.
"""


def passes(plan: Outline, by_stage: Mapping[str, Columns], probes: Probes = ()) -> tuple[Pass, ...]:
    """Return the results of all attacks and probes outside the suite, restricted to adversarial examples inside the
    threat model.
    """
    return (*stage_passes(plan, by_stage), *probe_passes(plan, by_stage, probes))


def stage_passes(plan: Outline, by_stage: Mapping[str, Columns]) -> tuple[Pass, ...]:
    """Return the results of the attacks outside the suite that are stages of the plan, restricted to adversarial
    examples inside the threat model.
    """
    clean = by_stage["clean"]
    results = []
    for step in plan.steps:
        if step.kind.title and step.name in by_stage:
            columns = by_stage[step.name]
            name, tried = step.kind.title.format(step.attack), int(columns["ran"].sum())
            results.append(Pass(step.name, name, _inside(plan, clean, columns), tried, step.settings))
    return tuple(results)


def probe_passes(plan: Outline, by_stage: Mapping[str, Columns], probes: Probes) -> tuple[Pass, ...]:
    """Return the results of the probes, restricted to adversarial examples inside the threat model."""
    clean = by_stage["clean"]
    suite = [step for step in plan.steps if step.kind.in_suite and not step.adaptive and not step.wave_of]
    attacks = [{"name": step.attack, **step.settings} for step in suite]
    results = []
    for place, (probe, tried) in enumerate(probes):
        columns = _of_probe(clean, by_stage[FOUND], place) if FOUND in by_stage else unattacked(clean)
        settings = {"attacks": attacks} if probe == AGAIN else {}
        results.append(
            Pass(f"probe-{probe}", probe_title(probe), _inside(plan, clean, columns), tried, settings)
        )
    return tuple(results)


def _inside(plan: Outline, clean: Columns, columns: Columns) -> dict[str, Tensor]:
    """The columns of a pass, restricted to successes inside the threat model, including distances and stored inputs."""
    success = columns["success"] & clean["correct"] & clean["eligible"]
    if plan.threat.queries is not None:
        # a pass outside the suite may use more queries than the threat model permits
        success = success & (columns["queries"] <= plan.threat.queries)
    inside = dict(columns) | {"success": success}
    for name in (*DISTANCES, "right"):  # other inputs may be outside the threat model
        inside[name] = torch.where(success, columns[name], torch.inf)
    for prefix in ("gallery.", "adversarial."):
        if f"{prefix}id" in columns:
            rows = torch.isin(columns[f"{prefix}id"], columns["id"][success])
            inside |= {name: values[rows] for name, values in columns.items() if name.startswith(prefix)}
    return inside


def _of_probe(clean: Columns, stage_columns: Columns, place: int) -> dict[str, Tensor]:
    """The rows of one probe, as columns of an attack on all examples."""
    of_place = stage_columns[PROBE] == place
    ids = stage_columns["id"][of_place]
    rows, columns = Lookup(clean["id"]).rows(ids), unattacked(clean)
    for name, values in stage_columns.items():
        if name in columns:
            columns[name][rows] = values[of_place]
    for prefix in ("gallery.", "adversarial."):
        if f"{prefix}id" in stage_columns:
            of_probe = stage_columns[f"{prefix}{PROBE}"] == place
            names = [name for name in stage_columns if name.startswith(prefix) and name != f"{prefix}{PROBE}"]
            columns |= {name: stage_columns[name][of_probe] for name in names}
    return columns
