"""Identity of a run: the digest of the code that determines its results, the versions of software, and the hardware."""

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
    "audits",
    "certifiers",
    "core",
    "corruptions",
    "doubts",
    "guard/detectors",
    "guard/query_rule.py",
    "guard/rejecting.py",
    "guard/rules.py",
    "io",
    "recipes",
    "rotation",
    "runs/assess",
    "runs/engine",
    "runs/harden",
    "runs/harness",
    "runs/stored",
    "statistics",
    "threats",
)
"""Subpackages and modules whose code can change a measured number."""
NOT_DECIDING = ("gates", "metrics", "reports")
"""Subpackages that a run imports, but that only summarise its measurements. `runs/store` only stores them.

A run can be resumed after a change of this code.
"""


@cache
def code_digest() -> str:
    """Return the SHA-256, in hex, of the code that determines measured numbers and of the versions of
    torch and numpy.
    """
    sha = hashlib.sha256(f"torch {torch.__version__} numpy {np.__version__}\n".encode())
    package = Path(holdfast.__file__).parent
    for name in DECIDING:
        place = package / name
        for path in sorted(place.rglob("*.py")) if place.is_dir() else (place,):
            content = path.read_bytes()
            # with the length, so that no two trees of files give the same bytes
            sha.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return sha.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of Holdfast, Python, torch and numpy, by name, for the manifest of a run."""
    return {
        "holdfast": holdfast.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": str(np.__version__),
    }


def hardware(device: torch.device, processes: int = 1) -> str:
    """Return one line of text that describes the processor and the accelerator of this machine and the number of
    processes of a run. It does not contain the host name.
    """
    threads = torch.get_num_threads()
    cores = f"{os.cpu_count()} cores, {threads} thread{'s' if threads > 1 else ''}, {platform.machine()}"
    if device.type == "cpu":
        description = f"{cores}, no accelerator"
    else:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        description = f"{name}; {cores}"
    return f"{description}; {processes} processes" if processes > 1 else description


def node_properties(device: str) -> dict[str, str]:
    """Return the properties of this process on which the last bits of a measurement may depend, by name.

    The device is left out if its name is empty, or if this process has no such device.
    """
    known = {
        "torch build": str(torch.__version__),
        "code": code_digest(),
        "threads": str(torch.get_num_threads()),
    }
    if not device or (device != "cpu" and not torch.cuda.is_available()):
        return known
    if device != "cpu":
        return {**known, "device": torch.cuda.get_device_name(torch.device(device))}
    return {**known, "device": f"{device} with {torch.backends.cpu.get_cpu_capability()}"}
