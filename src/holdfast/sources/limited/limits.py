"""How much memory and time the process that reads one file may take."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from holdfast.core.errors import UsageError

MEMORY = "HOLDFAST_READ_MEMORY"
"""The environment variable that raises the memory for one file, as `16GB`."""
SECONDS = "HOLDFAST_READ_SECONDS"
"""The environment variable that raises the CPU time for one file."""
CPU_SECONDS = 60
WALL_FACTOR = 5
"""the time by the clock is this multiple of the CPU time: a machine may be busy, or its disk slow"""
_DAY = 86_400
_UNITS = {"MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Limits:
    """Memory is counted beyond what the process has in use before it reads the file."""

    copies: int
    """how often the file may be in memory"""
    spare_bytes: int
    """memory beyond the copies"""

    def memory(self, n_bytes: int) -> int:
        """Bytes that reading a file of `n_bytes` may take; at least what the environment variable names."""
        return max(self.copies * n_bytes + self.spare_bytes, requested_memory())


def requested_memory() -> int:
    """Bytes in `HOLDFAST_READ_MEMORY`, 0 where it is not set; `UsageError` where it is no size."""
    text = os.environ.get(MEMORY, "")
    found = re.fullmatch(r"(\d{1,7})\s*(MB|GB)", text.strip().upper()) if text else None
    if text and found is None:
        raise UsageError(f"{MEMORY} is {text!r}; a size of at most 7 digits was expected, as 16GB or 800MB")
    return 0 if found is None else int(found[1]) * _UNITS[found[2]]


def cpu_seconds() -> int:
    """Seconds of CPU in `HOLDFAST_READ_SECONDS`, 60 where it is not set; `UsageError` where it is no number."""
    text = os.environ.get(SECONDS, "").strip()
    if text and not (re.fullmatch(r"\d{1,5}", text) and 1 <= int(text) <= _DAY):
        raise UsageError(f"{SECONDS} is {text!r}; a whole number from 1 to {_DAY} was expected, as 600")
    return int(text) if text else CPU_SECONDS


def apply(memory: int, seconds: int) -> None:
    """Limit memory, CPU time, written files and core dumps of this process, beyond what it has used already.

    Windows has no such limits; the checks that each parser makes before it allocates are what is left there.
    """
    try:
        import resource
    except ImportError:
        return
    mapped = Path("/proc/self/statm")
    in_use = int(mapped.read_text().split()[0]) * resource.getpagesize() if mapped.exists() else 2**31
    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = int(used.ru_utime + used.ru_stime) + 1
    memory_kind = resource.RLIMIT_AS if mapped.exists() else resource.RLIMIT_DATA
    _set(memory_kind, in_use + memory)
    _set(
        resource.RLIMIT_CPU, spent + seconds, grace=5
    )  # SIGXCPU first, which names the reason; SIGKILL after it
    _set(resource.RLIMIT_FSIZE, memory)
    _set(resource.RLIMIT_CORE, 0)


def _set(what: int, amount: int, grace: int = 0) -> None:
    """Set a limit, and the one that this process cannot raise it over; a lower one that is there already stays."""
    import resource

    hard = resource.getrlimit(what)[1]
    soft, most = (
        wanted if hard == resource.RLIM_INFINITY else min(wanted, hard) for wanted in (amount, amount + grace)
    )
    resource.setrlimit(what, (soft, most))
