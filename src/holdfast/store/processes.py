"""Which process holds a lease, and whether it still lives: a number is used again, so its start counts too."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Owner:
    """A process on a host; `started` tells it from a later one of the same number (empty where unknown)."""

    host: str
    pid: int
    started: str

    @classmethod
    def myself(cls) -> "Owner":
        """The process that asks."""
        return cls(socket.gethostname(), os.getpid(), started(os.getpid()) or "")

    def alive(self) -> bool:
        """Whether it runs; only asked of a process on this host."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        now = started(self.pid)
        return now is not None and (not self.started or now == self.started)


def started(pid: int) -> str | None:
    """When a process began, in ticks of this boot; None if it is dead, empty where the system does not say."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    if not boot.exists():
        return ""
    try:
        # the name stands in brackets and may hold anything; state is the first field after it, the start the 20th
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else f"{boot.read_text().strip()}:{fields[19]}"
