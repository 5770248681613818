"""Program that removes a temporary folder after the process that has started it has ended, even by SIGKILL.

It waits for the end of its standard input, whose other end only that process has. It is run as a file and uses only the
standard library, so that it starts in some milliseconds and needs little memory.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

CLOSED = b"closed"
"""What a process writes before it ends the input of its watcher by itself."""
_PATIENCE_S = 10.0
"""Seconds in which killed processes must have ended before their folder is removed."""
_KILLED = (
    "holdfast: the process of the run was killed, or Ray has ended it because a process of its cluster was killed. The "
    "cluster is removed; continue the run with --resume"
)


def folder_watcher(folder: Path, temporary: Path | None = None) -> "subprocess.Popen[bytes]":
    """Start a watcher that removes `folder` after this process has ended, and return its process.

    With `temporary`, the watcher first kills all processes that were started with that folder as TMPDIR. If this
    process has ended without `close`, the watcher also writes to stderr how to continue the run.
    """
    words = [sys.executable, "-I", "-S", __file__, str(folder), *([str(temporary)] if temporary else [])]
    # a session of its own, so that Ctrl-C and the end of a terminal do not reach it
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)


def close(watcher: "subprocess.Popen[bytes]") -> None:
    """Let a watcher remove its folder now, and wait until it is removed, if processes are ended before."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        watcher.communicate(CLOSED, timeout=2 * _PATIENCE_S)


def processes_with(temporary: str) -> list[int]:
    """Return the processes that were started with TMPDIR set to a folder; none where there is no /proc."""
    entry, found = b"TMPDIR=" + os.fsencode(temporary), []
    for place in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if entry in place.read_bytes().split(b"\0"):
                found.append(int(place.parent.name))
    return found


def main(folder: str, temporary: str = "") -> None:
    """Wait for the end of the input, then end the processes and remove the folder."""
    # Ray kills the children of a worker that it ends, so that the watcher of a worker must be none of them
    if not temporary and hasattr(os, "fork") and os.fork():
        os._exit(0)
    closed = sys.stdin.buffer.read() == CLOSED
    if temporary:
        if not closed:
            with contextlib.suppress(OSError):
                sys.stderr.write(f"{_KILLED}\n")
                sys.stderr.flush()
        until = time.monotonic() + _PATIENCE_S
        while (rest := processes_with(temporary)) and time.monotonic() < until:
            for process in rest:
                with contextlib.suppress(OSError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
