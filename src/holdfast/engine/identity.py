"""Identity of a run: the digest of the code that determines its results, and the versions and hardware."""

import hashlib
import os
import platform
from functools import cache
from pathlib import Path

import numpy as np
import torch

import holdfast

DECIDING = (
    "attacks",
    "checkup",
    "core",
    "doubts",
    "engine",
    "gallery",
    "harness",
    "ops",
    "recipes",
    "rotation",
    "sources",
    "suites.py",
    "verbs",
)
"""Subpackages and modules whose code can change a measured number."""
NOT_DECIDING = ("gates", "metrics", "reports", "store")
"""Subpackages that a run imports and that only store or summarise what it measured: a change there does not prevent a
resume."""


@cache
def code_digest() -> str:
    """SHA-256 in hex over the code that determines the measurements, and over the versions of torch and numpy."""
    sha = hashlib.sha256(f"torch {torch.__version__} numpy {np.__version__}\n".encode())
    package = Path(holdfast.__file__).parent
    for name in DECIDING:
        place = package / name
        for path in sorted(place.rglob("*.py")) if place.is_dir() else (place,):
            content = path.read_bytes()
            sha.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return sha.hexdigest()


def versions() -> dict[str, str]:
    """Versions of the software that determines the measurements."""
    return {
        "holdfast": holdfast.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": str(np.__version__),
    }


def hardware(device: torch.device, processes: int = 1) -> str:
    """Description of the machine and the number of processes, in one line, without the host name."""
    threads = torch.get_num_threads()
    cores = f"{os.cpu_count()} cores, {threads} thread{'s' if threads > 1 else ''}, {platform.machine()}"
    if device.type == "cpu":
        found = f"{cores}, no accelerator"
    else:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        found = f"{name}; {cores}"
    return f"{found}; {processes} processes" if processes > 1 else found
