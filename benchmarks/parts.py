"""Parts of a row that takes hours: each is kept when it is done, with its commit and date, and a later call goes on.

python -m benchmarks --only ROW             # goes on with the parts that are kept
python -m benchmarks --only ROW --afresh    # measures every part again
"""

import json
import re
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import peers
from benchmarks.networks import CACHE

FOLDER, RUNS = CACHE / "parts", CACHE / "hardened"


def part(row: str, name: str, measure: Callable[[], Any]) -> dict[str, Any]:
    """`made`, `holdfast` (the commit) and `measured` (plain values) of one part, as kept or measured now."""
    path = FOLDER / row / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}.json"
    if path.is_file():
        kept: dict[str, Any] = json.loads(path.read_text())
        return kept
    found = {"measured": measure(), "holdfast": peers.commit(Path(__file__).resolve().parent)}
    found["made"] = f"{datetime.now(UTC):%Y-%m-%dT%H:%MZ}"
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".part")
    whole.write_text(json.dumps(found))
    whole.replace(path)
    return found


def forget(row: str) -> None:
    """Drop the parts of a row, and the runs that they came from."""
    for place in (FOLDER, RUNS):
        shutil.rmtree(place / row, ignore_errors=True)
