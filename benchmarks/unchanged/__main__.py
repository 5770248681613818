"""Save, compare and time: see the package."""

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import comb
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import networks
from benchmarks.unchanged.items import KINDS, LATER, NETWORKS, SUITES, VERBS
from benchmarks.unchanged.results import RESULTS
from benchmarks.unchanged.seconds import contestants

MOST = 1.02
"""CPU time over that of the earlier version"""
ROOT = Path(__file__).resolve().parents[2]
MODULES = ("holdfast", "holdfast.attacks", "holdfast.recipes", "holdfast.rotation", "holdfast.testing")
WITHOUT_WEIGHTS = ("Denoising", "FTSAM", "MaskedWords", "Partitions", "Repair")
"""recipes that need another network or threat; the results contain a hardening with all but that for texts"""
VERBS_WITH_HELP = [
    *(
        "assess",
        "harden",
        "certify",
        "compare",
        "report",
        "verify",
        "runs",
        "doctor",
        "explain",
        "monitor",
        "adapt",
    ),
    *("init", "validate", "data", "models", "attacks", "demo", "serve", "calibrate", "ui"),
    *(f"audit {kind}" for kind in ("backdoor", "poison", "membership", "privacy", "generator")),
]
STEPS_WITH_HELP = ["collect", "train", "draw", "admit", "swap", "run", "status", "expose", "head"]
COMMANDS = (*VERBS_WITH_HELP, *(f"rotate {step}" for step in STEPS_WITH_HELP))


def items() -> Iterator[tuple[str, ...]]:
    """Every item: its kind and what it is of; cheap ones first."""
    from holdfast import recipes

    yield from (("names", module) for module in MODULES)
    yield from (("help", command) for command in COMMANDS)
    yield from (("draws", sampler) for sampler in ("ddpm", "ddim"))
    yield from (("outputs", verb) for verb in (*VERBS, *LATER))
    yield from (("results", name) for name in RESULTS)
    yield from (("weights", name) for name in recipes.__all__ if name not in WITHOUT_WEIGHTS)
    yield from (("verdicts", network, suite) for suite in SUITES for network in NETWORKS)


@contextmanager
def sources(commit: str | None) -> Iterator[Path]:
    """The folder with the package of a commit, or of this checkout if none is given."""
    if commit is None:
        yield ROOT / "src"
        return
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["git", "archive", commit, "src"], cwd=ROOT, capture_output=True, check=True)
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
            archive.extractall(folder, filter="data")
        yield Path(folder) / "src"


def computed(item: tuple[str, ...], source: Path) -> Any:
    """An item as a process with that package finds it."""
    command = [sys.executable, "-P", "-m", "benchmarks.unchanged.items", *item]
    done = subprocess.run(command, env=_environment(source), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def _environment(source: Path) -> dict[str, str]:
    folders = {
        variable: str(networks.folder(variable, beside))
        for variable, beside in (("HOLDFAST_MODELS", "models"), ("HOLDFAST_DATA", "data"))
    }
    return {**os.environ, **folders, "PYTHONPATH": f"{source}{os.pathsep}{ROOT}"}


def save(folder: Path, commit: str | None, kinds: list[str]) -> int:
    """Compute what is missing in the folder, one file an item; 1 if an item failed."""
    failed = 0
    with sources(commit) as source:
        for item in items():
            *kind, name = (part.replace(" ", "-") for part in item)
            file = folder.joinpath(*kind, f"{name}.json")
            if file.exists() or (kinds and item[0] not in kinds):
                continue
            before = _children()
            try:
                content = computed(item, source)
            except subprocess.CalledProcessError:
                failed = 1
                print(f"failed: {' '.join(item)}", flush=True)
                continue
            print(f"{' '.join(item)}: {_children() - before:.1f} s", flush=True)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    return failed


def compare(before: Path, after: Path) -> int:
    """Print which items differ or are missing; 1 where there is one."""
    known = {path.relative_to(folder) for folder in (before, after) for path in folder.rglob("*.json")}
    differing = [
        name
        for name in sorted(known)
        if not all((folder / name).is_file() for folder in (before, after))
        or (before / name).read_bytes() != (after / name).read_bytes()
    ]
    for name in differing:
        print(f"differs: {name}")
    print(f"{len(known) - len(differing)} of {len(known)} items are equal")
    return 1 if differing else 0


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def timed(commit: str, rounds: int, only: Sequence[str] = ()) -> int:
    """Print CPU time over that of a commit, in alternated pairs, of all contestants or of those named; 1 where a 95 %
    interval lies above 1.02.
    """
    slower = 0
    with sources(commit) as before, _worker(before) as one, _worker(ROOT / "src") as other:
        for name in only or contestants():
            for worker in (one, other):  # the first call fills the caches
                _seconds(worker, name)
            pairs = []
            for k in range(rounds):
                order = (one, other) if k % 2 else (other, one)
                spent = {id(worker): _seconds(worker, name) for worker in order}
                pairs.append(spent[id(other)] / spent[id(one)])
            low, high = interval(pairs)
            slower += low > MOST
            print(f"{name}: {median(pairs):.3f} ({low:.3f} to {high:.3f})", flush=True)
    return 1 if slower else 0


STARTS: Mapping[str, tuple[str, ...]] = {
    "import holdfast": ("-c", "import holdfast"),
    "holdfast --help": ("-m", "holdfast", "--help"),
    "holdfast assess --help": ("-m", "holdfast", "assess", "--help"),
    "a wrong setting of assess": (
        "-m",
        "holdfast",
        "assess",
        "mnist-cnn",
        "mnist-mini",
        "--threat",
        "linf:-1",
    ),
}
"""arguments of Python for what a user waits for before anything is measured"""


def started(commit: str, rounds: int, most: float = 1.1) -> int:
    """Print the median CPU time of each start and that of a commit, in alternated pairs; 1 if one is 10 % longer."""
    slower = 0
    with sources(commit) as before:
        for name, arguments in STARTS.items():
            spent: dict[Path, list[float]] = {before: [], ROOT / "src": []}
            for k in range(rounds + 1):  # the first pair compiles the files
                for source in list(spent)[:: 1 if k % 2 else -1]:
                    used = _start(source, arguments)
                    if k:
                        spent[source].append(used)
            earlier, later = (median(seconds) for seconds in spent.values())
            slower += later > most * earlier
            print(f"{name}: {later:.3f} s, {earlier:.3f} s before ({later / earlier:.3f})", flush=True)
    return 1 if slower else 0


def _start(source: Path, arguments: tuple[str, ...]) -> float:
    """CPU time in seconds of one process."""
    environment = {**_environment(source), "PYTHONDONTWRITEBYTECODE": ""}
    before = _children()
    subprocess.run([sys.executable, "-P", *arguments], env=environment, capture_output=True, check=False)
    return _children() - before


def interval(values: list[float]) -> tuple[float, float]:
    """A 95 % interval of the median by order statistics, as narrow as the number of values allows."""
    ordered, n = sorted(values), len(values)
    outside, rank = 0.0, 0
    while rank < n // 2 and (outside := outside + comb(n, rank) / 2**n) <= 0.025:
        rank += 1
    place = max(rank - 1, 0)
    return ordered[place], ordered[n - 1 - place]


@contextmanager
def _worker(source: Path) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-P", "-m", "benchmarks.unchanged.seconds"]
    with subprocess.Popen(
        command, env=_environment(source), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def _seconds(worker: "subprocess.Popen[str]", name: str) -> float:
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(f"{name}\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def main() -> int:
    """The exit code of one of the commands."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.unchanged", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    saving = commands.add_parser("save", help="compute what is missing in a folder")
    saving.add_argument("folder", type=Path)
    saving.add_argument("--of", metavar="COMMIT", help="the version (default: this checkout)")
    saving.add_argument("--only", choices=tuple(KINDS), action="append", default=[])
    comparing = commands.add_parser("compare", help="print what differs between two folders")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    timing = commands.add_parser("time", help="CPU time beside that of a commit")
    timing.add_argument("commit")
    timing.add_argument("--rounds", type=int, default=20)
    timing.add_argument("--only", choices=tuple(contestants()), action="append", default=[])
    starting = commands.add_parser(
        "start", help="CPU time of imports, help and refusals beside that of a commit"
    )
    starting.add_argument("commit")
    starting.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    if given.command == "save":
        return save(given.folder, given.of, given.only)
    if given.command == "compare":
        return compare(given.before, given.after)
    if given.command == "time":
        return timed(given.commit, given.rounds, given.only)
    return started(given.commit, given.rounds)


if __name__ == "__main__":
    sys.exit(main())
