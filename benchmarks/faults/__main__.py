"""Choose, trace, run, place and report: see the package."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.faults.choosing import KINDS, Fault, Place, faults
from benchmarks.faults.recording import PROBE

FOLDER = Path(__file__).resolve().parent
CHOSEN, RECORD, MOVED = FOLDER / "faults.json", FOLDER / "record.json", FOLDER / "moved.json"
N = 60
MOST_S = 120
"""time for the tests of one fault"""
MOST_TESTS = 400
COLUMNS = ("before", "after")
"""names of two versions in the record"""
CHUNK = 12
"""files of tests in one process"""
DESELECTED = (
    "tests/test_tutorials.py",
    "tests/browser",
    "tests/test_report_browser.py",
    "tests/fuzzing",
    "tests/test_gpu.py",
)
"""tests that start many processes each and take minutes"""


def choose(tree: Path) -> None:
    """Draw the faults of a tree."""
    _write(CHOSEN, [asdict(place.fault) for place in faults(tree)])


def trace(tree: Path, work: Path) -> None:
    """Run every test once with a probe at each place, some files at a time."""
    work.mkdir(parents=True, exist_ok=True)
    places = faults(tree)
    assert [asdict(place.fault) for place in places] == json.loads(CHOSEN.read_text()), "another commit"
    saved = _probed(tree, places, work)
    try:
        files = sorted(
            path.relative_to(tree).as_posix()
            for path in (tree / "tests").rglob("test_*.py")
            if not path.relative_to(tree).as_posix().startswith(DESELECTED)
        )
        for slow in (False, True):
            for first in range(0, len(files), CHUNK):
                done = work / f"done-{'slow' if slow else 'quick'}-{first}"
                if not done.exists():
                    chosen = ["-m", "slow and not gpu" if slow else "not slow and not gpu"]
                    _pytest(tree, work, [*chosen, *files[first : first + CHUNK]], limit=3600)
                    done.touch()
    finally:
        for path, text in saved.items():
            path.write_text(text)
        (tree / "src" / "holdfast" / "_probe.py").unlink()


def _probed(tree: Path, places: list[Place], work: Path) -> dict[Path, str]:
    """Insert the probes, and return the texts of the files before."""
    saved: dict[Path, str] = {}
    by_line = sorted(enumerate(places), key=lambda each: (each[1].fault.file, -each[1].lineno))
    for number, place in by_line:
        path = tree / place.fault.file
        text = path.read_text()
        saved.setdefault(path, text)
        lines = text.splitlines(keepends=True)
        line = lines[place.lineno - 1]
        indentation = line[: len(line) - len(line.lstrip())]
        probe = f'{indentation}__import__("holdfast._probe", fromlist=["hit"]).hit({number})\n'
        path.write_text("".join([*lines[: place.lineno - 1], probe, *lines[place.lineno - 1 :]]))
    (tree / "src" / "holdfast" / "_probe.py").write_text(PROBE.format(folder=str(work)))
    return saved


def _pytest(tree: Path, work: Path, arguments: list[str], limit: float) -> int | None:
    """The exit code of pytest in a tree, or None if the time is over."""
    python = tree / ".venv" / "bin" / "python"
    command = [
        str(python if python.exists() else sys.executable),
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-p",
        "recording",
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HOLDFAST_FAULTS": str(work),
        "PYTHONPATH": str(FOLDER),
        "PYTHONDONTWRITEBYTECODE": "",
    }
    with (
        (work / "log").open("a") as log,
        subprocess.Popen(
            [*command, *arguments], cwd=tree, env=environment, stdout=log, stderr=log, start_new_session=True
        ) as process,
    ):
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 15)
            return None


def executed(work: Path) -> dict[int, list[str]]:
    """The tests that execute each place: quick ones first, then by their time."""
    times: dict[str, tuple[bool, float]] = {}
    for line in (work / "times").read_text().splitlines():
        entry = json.loads(line)
        times[entry["test"]] = (entry["slow"], entry["s"])
    found: dict[int, set[str]] = {}
    for path in work.glob("hits-*"):
        for line in path.read_text().splitlines():
            place, _, test = line.partition("\t")
            found.setdefault(int(place), set()).add(test)
    return {
        place: sorted(known, key=lambda test: times[test])
        for place, tests in found.items()
        if (known := [test for test in tests if test in times])
    }


def chosen_places(by_place: Mapping[int, Any], drawn: list[dict[str, Any]]) -> list[int]:
    """As many places of each kind, the first of the drawn ones that a test executes."""
    kept: list[int] = []
    for kind in KINDS:
        of_kind = [number for number, each in enumerate(drawn) if each["kind"] == kind and number in by_place]
        kept += of_kind[: N // len(KINDS)]
    return kept


def run(tree: Path, work: Path, column: str) -> None:
    """Plant each fault, and record in a column the first test that fails."""
    work.mkdir(parents=True, exist_ok=True)
    drawn = json.loads(CHOSEN.read_text())
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    known = {name: entry["tests"] for name, entry in record.items()}
    if (work / "times").exists():
        by_place = executed(work)
        known = {str(number): by_place[number] for number in chosen_places(by_place, drawn)}
    results = work / "results.json"
    done = json.loads(results.read_text()) if results.exists() else {}
    slow = {
        entry["test"]: entry["slow"]
        for line in ((work / "times").read_text().splitlines() if (work / "times").exists() else [])
        if (entry := json.loads(line))
    }
    for name, tests in known.items():
        if name in done:
            continue
        fault = Fault(**drawn[int(name)])
        place = found_in(tree, fault, int(name))
        if place is None:
            outcome: dict[str, Any] = {"caught": "", "not_placed": True}
        else:
            outcome = _tried(tree, work, place, tests[:MOST_TESTS])
            outcome["by_a_slow_test"] = slow.get(outcome["caught"], False)
        done[name] = outcome
        _write(results, done)
        print(f"{name}: {fault.kind}, {fault.file}: {outcome['caught'] or 'not caught'}", flush=True)
    for name, tests in known.items():
        entry = record.setdefault(name, {})
        record[name] = {**entry, "tests": tests[:MOST_TESTS], "executed_by": len(tests), column: done[name]}
    _write(RECORD, record)


def _tried(tree: Path, work: Path, place: tuple[Path, int, str], tests: list[str]) -> dict[str, Any]:
    """The first test that fails with a fault and not without it."""
    path, number, replacement = place
    text = path.read_text()
    lines = text.splitlines(keepends=True)
    indentation = lines[number][: len(lines[number]) - len(lines[number].lstrip())]
    faulty = "".join([*lines[:number], f"{indentation}{replacement}\n", *lines[number + 1 :]])
    remaining, end, doubtful = list(tests), time.monotonic() + MOST_S, []
    while remaining and time.monotonic() < end:
        failures = work / "failures"
        failures.unlink(missing_ok=True)
        path.write_text(faulty)
        try:
            code = _pytest(tree, work, ["-x", *remaining], end - time.monotonic())
        finally:
            path.write_text(text)
        if code is None:
            return {"caught": "", "out_of_time": True, "doubtful": doubtful}
        if code == 0:
            break
        if not failures.exists():  # the package cannot be imported, or a test ends the process
            if _pytest(tree, work, ["--collect-only", *remaining], MOST_S) != 0:
                raise SystemExit(f"{tree} has not all of these tests, so correct the record: {remaining}")
            return {"caught": "every test", "out_of_time": False, "doubtful": doubtful}
        test = json.loads(failures.read_text().splitlines()[0])["test"]
        if _pytest(tree, work, [test], MOST_S) == 0:
            return {"caught": test, "out_of_time": False, "doubtful": doubtful}
        doubtful.append(test)
        remaining = remaining[remaining.index(test) + 1 :] if test in remaining else []
    return {"caught": "", "out_of_time": time.monotonic() >= end, "doubtful": doubtful}


def found_in(tree: Path, fault: Fault, number: int) -> tuple[Path, int, str] | None:
    """The file, the number of the line from 0 and the replacement of a fault in a tree."""
    moved = json.loads(MOVED.read_text()) if MOVED.exists() else {}
    fault = Fault(**{**asdict(fault), **moved.get(str(number), {})})
    path = tree / fault.file
    paths = [path] if path.exists() else []
    paths += [other for other in sorted((tree / "src").rglob("*.py")) if other != path]
    name = fault.function.rpartition(".")[2]
    for candidate in paths:
        lines = candidate.read_text().splitlines()
        for start, end in _bodies(lines, name):
            equal = [n for n in range(start, end) if lines[n].strip() == fault.line]
            if equal:
                return candidate, equal[min(fault.occurrence, len(equal) - 1)], fault.replacement
    return None


def _bodies(lines: list[str], name: str) -> Iterable[tuple[int, int]]:
    """First and last line of each function of a name."""
    for start, line in enumerate(lines):
        if line.lstrip().startswith(f"def {name}("):
            depth = len(line) - len(line.lstrip())
            end = start + 1
            while end < len(lines) and (
                not lines[end].strip()
                or len(lines[end]) - len(lines[end].lstrip()) > depth
                or lines[end].lstrip().startswith(")")
            ):
                end += 1
            yield start, end


def place(tree: Path) -> int:
    """Print the faults of the record that are not found in a tree; 1 if there is one."""
    drawn, missing = json.loads(CHOSEN.read_text()), 0
    numbers = json.loads(RECORD.read_text()) if RECORD.exists() else range(len(drawn))
    for number in numbers:
        fault = Fault(**drawn[int(number)])
        if found_in(tree, fault, int(number)) is None:
            missing += 1
            print(f"{number}: {fault.file}, {fault.function}: {fault.line}")
    return 1 if missing else 0


def report() -> None:
    """Print how many faults of each kind are caught by quick tests, by slow ones and by none, in each column."""
    drawn, record = json.loads(CHOSEN.read_text()), json.loads(RECORD.read_text())
    for column in COLUMNS:
        table: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
        for number, entry in record.items():
            if outcome := entry.get(column):
                how = (
                    "none" if not outcome["caught"] else "slow" if outcome.get("by_a_slow_test") else "quick"
                )
                table[drawn[int(number)]["kind"]][how] += 1
        for kind, counts in table.items():
            caught = f"{counts['quick']} by a quick test, {counts['slow']} by a slow test, {counts['none']} by none"
            print(f"{column}, {kind}: {caught}")


def _write(path: Path, content: Any) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(content, indent=1) + "\n")
    shutil.move(new, path)


def main() -> int:
    """The exit code of one of the commands."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("choose", "trace", "run", "place"):
        command = commands.add_parser(name)
        command.add_argument("tree", type=lambda text: Path(text).resolve())
        if name in ("trace", "run"):
            command.add_argument(
                "--work", type=lambda text: Path(text).resolve(), default=Path("build/faults").resolve()
            )
        if name == "run":
            command.add_argument("--column", choices=COLUMNS, required=True)
    commands.add_parser("report")
    given = parser.parse_args()
    if given.command == "trace":
        trace(given.tree, given.work)
        return 0
    if given.command == "run":
        run(given.tree, given.work, given.column)
        return 0
    if given.command == "report":
        report()
        return 0
    if given.command == "choose":
        choose(given.tree)
        return 0
    return place(given.tree)


if __name__ == "__main__":
    sys.exit(main())
