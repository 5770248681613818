"""The process with a lease, and whether it is alive. Process ids are reused, so start times are compared, too."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Owner:
    """A process on a host. `started` distinguishes it from a later process with the same id; empty if unknown."""

    host: str
    pid: int
    started: str

    @classmethod
    def myself(cls) -> "Owner":
        """The owner that represents the current process."""
        return cls(socket.gethostname(), os.getpid(), start_time(os.getpid()) or "")

    def alive(self) -> bool:
        """Whether the process is alive; only for processes on this host."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        now = start_time(self.pid)
        return now is not None and (not self.started or now == self.started)


def start_time(pid: int) -> str | None:
    """Start time of a process in clock ticks of this boot; None if it is dead, empty if it is unknown."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    if not boot.exists():
        return ""
    try:
        # the name is in parentheses; after it, the state is the first field and the start the 20th
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else f"{boot.read_text().strip()}:{fields[19]}"
