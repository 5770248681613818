"""What makes two runs the same, the digest of the code that decides the numbers, and what is told beside it."""

import hashlib
import os
import platform
from functools import cache
from pathlib import Path

import numpy as np
import torch

import holdfast

_DECIDING = ("core", "ops", "attacks", "sources", "suites.py", "doubts", "harness", "recipes", "runs")
"""Floors whose code decides what is measured; a better report does not stop a run from being resumed."""


@cache
def code_digest() -> str:
    """SHA-256 over the code that decides the numbers, in hex, with the versions of what it computes with."""
    sha = hashlib.sha256(f"torch {torch.__version__} numpy {np.__version__}\n".encode())
    package = Path(holdfast.__file__).parent
    for name in _DECIDING:
        place = package / name
        for path in sorted(place.rglob("*.py")) if place.is_dir() else (place,):
            content = path.read_bytes()
            sha.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return sha.hexdigest()


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    return {
        "holdfast": holdfast.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": str(np.__version__),
    }


def hardware(device: torch.device, processes: int = 1) -> str:
    """The machine in one line, without its name, and on how many processes."""
    threads = torch.get_num_threads()
    cores = f"{os.cpu_count()} cores, {threads} thread{'s' if threads > 1 else ''}, {platform.machine()}"
    if device.type == "cpu":
        found = f"{cores}, no accelerator"
    else:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        found = f"{name}; {cores}"
    return f"{found}; {processes} processes" if processes > 1 else found
