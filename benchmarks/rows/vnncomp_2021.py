"""Queries of VNN-COMP 2021: verdicts of `holdfast-vnn` beside those that the entries of the competition published.

A checkout of the repository stanleybak/vnncomp2021, which has the networks and queries, is read from
`benchmarks/cache/vnncomp2021`, or from the folder that `HOLDFAST_VNNCOMP` names. `benchmarks/published_verdicts.py`
drew the queries, and read what the entries answered within the limits of the competition, which are longer for most
queries. Each witness is run again in onnxruntime, and compared with the query.
"""

import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime

from benchmarks import parts
from benchmarks.absent import Absent
from benchmarks.guarded import environment
from benchmarks.networks import CACHE, REFERENCES
from benchmarks.record import Cells, Claim, Outcome
from holdfast.certifiers.vnnlib.query import AtMostZero, ConstrainedBox
from holdfast.certifiers.vnnlib.reading import read_query

WHAT = "queries of VNN-COMP 2021 by `holdfast-vnn`, one thread, 60 s each, beside the published verdicts"
ROW, LIMIT_S, SOLVED, START_S = "vnncomp-2021", 60, 0.85, 3.0
TOLERANCE = 1e-4
"""distance of a witness from the bounds of the query that the competition allows"""
VERDICTS = ("sat", "unsat")


def measured() -> Outcome:
    folder = Path(os.environ.get("HOLDFAST_VNNCOMP") or CACHE / "vnncomp2021") / "benchmarks"
    if not folder.is_dir():
        raise Absent(
            f"{folder} is missing; git clone https://github.com/stanleybak/vnncomp2021, and let HOLDFAST_VNNCOMP name "
            "the checkout"
        )
    queries: list[Cells] = json.loads((REFERENCES / "vnncomp2021.json").read_text())
    kept = {}
    for each in queries:
        name = f"{each['network']} {each['query']}"
        kept[name] = parts.part(ROW, name, lambda each=each: _answered(folder / each["category"], each))
    results = [{**each, **part["measured"]} for each, part in zip(queries, kept.values(), strict=True)]
    table = [
        _line(category, [each for each in results if each["category"] == category])
        for category in dict.fromkeys(each["category"] for each in queries)
    ]
    total = _line("all", results)
    first = next(iter(kept.values()))["measured"]
    claims = [
        Claim("verdicts that differ from the published ones <= 0", total["differ"], 0),
        Claim("witnesses that onnxruntime does not confirm <= 0", total["not confirmed"], 0),
        Claim("calls that end without an answer <= 0", total["errors"], 0),
        Claim(
            f"solved of those that half of the entries solved >= {SOLVED:.0%}",
            total["solved of these"] / total["solved by half"],
            SOLVED,
            least=True,
        ),
        Claim(f"CPU seconds of a trivial query (test_nano) <= {START_S:g}", first["cpu_s"], START_S),
    ]
    config = {"queries": len(queries), "limit_s": LIMIT_S, "threads": 1}
    return Outcome([*table, total], claims, config, detail={**kept, "queries": results})


def _line(name: str, results: list[Cells]) -> Cells:
    solved = [each for each in results if each["answer"] in VERDICTS]
    by_half = [each for each in results if each["published"] and 2 * each["solved"] >= each["entries"]]
    return {
        "category": name,
        "queries": len(results),
        "solved": len(solved),
        "solved by half": len(by_half),
        "solved of these": sum(each["answer"] in VERDICTS for each in by_half),
        "differ": sum(each["published"] not in ("", each["answer"]) for each in solved),
        "not confirmed": sum(each["answer"] == "sat" and not each["confirmed"] for each in results),
        "errors": sum(not each["answer"] for each in results),
        "CPU s, median": statistics.median(each["cpu_s"] for each in results),
    }


def _answered(folder: Path, each: Cells) -> Cells:
    """The answer to a query, empty for an error, with its times, and whether a witness is confirmed."""
    network, query = folder / each["network"], folder / each["query"]
    code = "from holdfast.cli.vnn import main; main()"
    options = ["verify", str(query), "--network", f"net={network}", "--timeout", str(LIMIT_S)]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *options], check=False, capture_output=True, text=True, env=environment()
    )
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    answer, _, witness = done.stdout.partition("\n")
    return {
        "answer": answer,
        "confirmed": answer == "sat" and _confirmed(network, query, witness),
        "cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2),
        "wall_s": round(wall, 2),
        "error": done.stderr.strip(),
    }


def _confirmed(network: Path, query: Path, witness: str) -> bool:
    """Whether the inputs of a printed witness, run in onnxruntime, satisfy one of the cases of a query."""
    x = np.array([float(value) for value in re.findall(r"\(X_\d+ ([^)]+)\)", witness)], np.float32)
    session = onnxruntime.InferenceSession(str(network), providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0]
    shape = [size if isinstance(size, int) else 1 for size in given.shape]
    y = np.asarray(session.run(None, {given.name: x.reshape(shape)})[0]).reshape(-1)
    return any(_satisfied(case, x, y) for case in read_query(query).alternatives.all())


def _satisfied(case: ConstrainedBox, x: np.ndarray, y: np.ndarray) -> bool:
    inside = all(case.low[i] - TOLERANCE <= x[i] <= case.high[i] + TOLERANCE for i in range(len(x)))
    return inside and all(_holds(constraint, x, y) for constraint in case.constraints)


def _holds(constraint: AtMostZero, x: np.ndarray, y: np.ndarray) -> bool:
    function = constraint.function
    terms = (
        factor * float(x[key] if key >= 0 else y[-1 - key]) for key, factor in function.coefficients.items()
    )
    value = sum(terms) + function.constant
    return value < 0 if constraint.strict else value <= 0
